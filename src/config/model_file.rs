//! Reads a model: the keys of `models.d/NAME.toml` and what must hold between them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::instance::ModelName;
use super::model::{
    DEFAULT_CACHE_TYPE, DEFAULT_DRAIN, DEFAULT_ENGINE, DEFAULT_HOST, DEFAULT_PORT, DEFAULT_PRIORITY,
    DEFAULT_STALL_TIMEOUT, Environment, Given, GpuLayers, Model, Oversize, PromptCache, Workload,
};
use super::problem::{Place, Problem, quoted};
use super::reader::{self, Reader};
use super::table::{Entry, Item, Table, Value};

/// The largest context: llama-server counts it in 31 bits.
const LARGEST_CONTEXT: i64 = (1 << 31) - 1;

/// Whoever needs the memory waits for so long at the most.
const LONGEST_DRAIN: Duration = Duration::from_secs(600);

/// Types of the KV cache, as llama-server names them.
const CACHE_TYPES: [(&str, &str); 9] = [
    ("f32", "f32"),
    ("f16", "f16"),
    ("bf16", "bf16"),
    ("q8_0", "q8_0"),
    ("q5_1", "q5_1"),
    ("q5_0", "q5_0"),
    ("q4_1", "q4_1"),
    ("q4_0", "q4_0"),
    ("iq4_nl", "iq4_nl"),
];

/// The keys of a model file.
pub(super) const KEYS: [&str; 29] = [
    "model",
    "context",
    "context-min",
    "cache-type-k",
    "cache-type-v",
    "parallel",
    "prompt-cache",
    "gpu-layers",
    "priority",
    "pinned",
    "workload",
    "oversize",
    "ttl",
    "drain",
    "modes",
    "aliases",
    "host",
    "port",
    "api-key-file",
    "environment",
    "engine",
    "engine-args",
    "command",
    "memory",
    "gpu-memory",
    "mmproj",
    "draft-model",
    "health-path",
    "stall-timeout",
];

/// Keys of a model that say nothing to an engine given by `command`.
const LLAMA_SERVER_KEYS: [&str; 12] = [
    "context",
    "context-min",
    "cache-type-k",
    "cache-type-v",
    "parallel",
    "prompt-cache",
    "gpu-layers",
    "engine",
    "engine-args",
    "mmproj",
    "draft-model",
    "api-key-file",
];

/// Programs that have what they run started by somebody else, outside of the unit's control group.
const ESCAPES: [&str; 8] =
    ["toolbox", "distrobox", "distrobox-enter", "podman", "docker", "nerdctl", "machinectl", "systemd-run"];

/// Programs that run another one, which stands among their arguments.
const WRAPPERS: [&str; 12] = [
    "env", "nice", "ionice", "chrt", "taskset", "numactl", "nohup", "setsid", "stdbuf", "timeout", "sudo",
    "runuser",
];

/// Keys that belong to one model and can have no default for all.
pub(super) const KEYS_OF_ONE_MODEL: [&str; 8] =
    ["model", "mmproj", "draft-model", "aliases", "port", "command", "memory", "gpu-memory"];

/// Reads the model `name` from its own table laid over the defaults of all models. None when
/// anything in it is wrong, which is then among the problems. `file` is where it is configured.
pub(super) fn read(
    name: &ModelName,
    own: Table,
    defaults: &Table,
    file: &Path,
    problems: &mut Vec<Problem>,
) -> Option<Model> {
    let before = problems.len();
    let own_keys: Vec<String> = own.0.keys().cloned().collect();
    let mut table = defaults.clone();
    // A default that the model's own keys exclude gives way.
    if own.0.contains_key("command") {
        table.0.retain(|key, _| !LLAMA_SERVER_KEYS.contains(&key.as_str()));
    }
    if integer_of(&table, "context-min") > integer_of(&own, "context") && own.0.contains_key("context") {
        table.take("context-min");
    }
    table.merge(own);

    let mut reader = Reader::new(table, problems);
    let r = &mut reader;
    let mut model = Model {
        name: name.clone(),
        file: file.to_owned(),
        model: r.read("model", reader::path),
        context: r.read("context", context),
        context_min: r.read("context-min", context),
        cache_type_k: r.read("cache-type-k", cache_type).unwrap_or_else(|| DEFAULT_CACHE_TYPE.to_owned()),
        cache_type_v: r.read("cache-type-v", cache_type).unwrap_or_else(|| DEFAULT_CACHE_TYPE.to_owned()),
        parallel: r.read("parallel", reader::integer(1, 256)).unwrap_or(1),
        prompt_cache: r.read("prompt-cache", read_prompt_cache).unwrap_or_default(),
        gpu_layers: r.read("gpu-layers", read_gpu_layers).unwrap_or_default(),
        priority: r.read("priority", reader::integer(0, 100)).unwrap_or(DEFAULT_PRIORITY),
        pinned: r.read("pinned", reader::boolean).unwrap_or_default(),
        workload: r
            .read(
                "workload",
                reader::word(&[("interactive", Workload::Interactive), ("batch", Workload::Batch)]),
            )
            .unwrap_or_default(),
        oversize: r
            .read(
                "oversize",
                reader::word(&[
                    ("refuse", Oversize::Refuse),
                    ("stream", Oversize::Stream),
                    ("swap", Oversize::Swap),
                ]),
            )
            .unwrap_or_default(),
        ttl: r.read("ttl", positive).filter(|ttl| *ttl != Duration::MAX),
        drain: r.read("drain", drain).unwrap_or(DEFAULT_DRAIN),
        modes: r.read("modes", reader::list(reader::text)).unwrap_or_default(),
        aliases: r.read("aliases", reader::list(model_name)).unwrap_or_default(),
        host: r.read("host", reader::host).unwrap_or_else(|| DEFAULT_HOST.to_owned()),
        port: r.read("port", reader::integer(1, 65535)).unwrap_or(DEFAULT_PORT),
        api_key_file: r.read("api-key-file", reader::path),
        environment: environment(r),
        engine: r.read("engine", reader::text).unwrap_or_else(|| DEFAULT_ENGINE.to_owned()),
        engine_args: r.read("engine-args", engine_args).unwrap_or_default(),
        command: r.read("command", command),
        memory: r.read("memory", reader::size),
        gpu_memory: r.read("gpu-memory", reader::size),
        mmproj: r.read("mmproj", reader::path),
        draft_model: r.read("draft-model", reader::path),
        health_path: r.read("health-path", health_path),
        stall_timeout: r.read("stall-timeout", positive).unwrap_or(DEFAULT_STALL_TIMEOUT),
        given: BTreeMap::new(),
    };
    let given = reader.finish(|key| {
        super::daemon::KEYS.contains(&key).then(|| format!("'{key}' belongs into plimsoll.toml"))
    });
    model.given = given
        .into_iter()
        .map(|(key, place)| (key, Given { place, inherited: !own_keys.iter().any(|own| own == key) }))
        .collect();
    if model.command.is_none() && !model.given.contains_key("health-path") {
        model.health_path = Some("/health".to_owned());
    }
    contradictions(&model, problems);
    problems[before..].iter().all(|problem| !problem.is_error()).then_some(model)
}

/// Reports what is wrong with `[model-defaults]` by itself, as a model that only has them would.
pub(super) fn check_defaults(name: &ModelName, defaults: &Table, problems: &mut Vec<Problem>) {
    let place = Place::file(Path::new("/etc/plimsoll/plimsoll.toml"));
    let item = Item { place: place.clone(), value: Value::Text("/model.gguf".to_owned()) };
    let own = Table(BTreeMap::from([("model".to_owned(), Entry { place: place.clone(), item })]));
    read(name, own, defaults, &place.file, problems);
}

/// What is wrong between keys that are right by themselves.
fn contradictions(model: &Model, problems: &mut Vec<Problem>) {
    if let (Some(least), Some(context)) = (model.context_min, model.context)
        && least > context
    {
        problems.push(
            Problem::error(
                model.place("context-min"),
                format!("'context-min' ({least}) is larger than 'context' ({context})"),
            )
            .hint("'context-min' is what the context may be reduced to"),
        );
    }
    if let Some(command) = &model.command {
        for key in LLAMA_SERVER_KEYS.iter().filter(|key| model.given.contains_key(*key)) {
            problems.push(
                Problem::error(model.place(key), format!("'{key}' has no effect on 'command'"))
                    .hint("write it into 'command', or leave 'command' out to run llama-server"),
            );
        }
        if !model.given.contains_key("memory") {
            problems.push(
                Problem::error(model.place("command"), "'command' needs 'memory', the memory that it takes")
                    .hint("for example memory = \"40GiB\""),
            );
        }
        if !model.given.contains_key("model") && command.iter().any(|argument| argument.contains("{model}")) {
            problems.push(Problem::error(
                model.place("command"),
                "'command' holds {model}, but 'model' is not given",
            ));
        }
    } else if !model.given.contains_key("model") && !model.given.contains_key("command") {
        problems.push(
            Problem::error(Place::file(&model.file), "'model' is missing")
                .hint("model = \"/path/to/model.gguf\", or command = [...] for another engine"),
        );
    }
    if model.memory.is_none() && model.gpu_memory.is_some() {
        problems.push(
            Problem::error(model.place("gpu-memory"), "'gpu-memory' has no effect without 'memory'")
                .hint("declare both, or leave both out to have them computed"),
        );
    }
    if let (Some(memory), Some(gpu)) = (model.memory, model.gpu_memory)
        && gpu.is_zero()
        && memory.is_zero()
    {
        problems.push(Problem::error(model.place("memory"), "'memory' and 'gpu-memory' are both nothing"));
    }
    if model.aliases.contains(&model.name) {
        problems.push(Problem::warning(model.place("aliases"), "'aliases' holds the model's own name"));
    }
    if model.oversize == Oversize::Swap && model.workload == Workload::Interactive {
        problems.push(
            Problem::warning(
                model.place("oversize"),
                "'oversize' allows swap, but an interactive workload is kept out of it",
            )
            .hint("set workload = \"batch\""),
        );
    }
    let local = model.host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    if !local && model.api_key_file.is_none() && model.command.is_none() {
        problems.push(
            Problem::warning(
                model.place("host"),
                format!("everyone who reaches {} can use this model", quoted(&model.host)),
            )
            .hint("set 'api-key-file'"),
        );
    }
}

fn integer_of(table: &Table, key: &str) -> Option<i64> {
    match table.0.get(key)?.item.value {
        Value::Integer(n) => Some(n),
        _ => None,
    }
}

fn context(item: &Item) -> Result<u64, reader::Wrong> {
    if matches!(item.value, Value::Integer(0)) {
        return Err(reader::Wrong::new("must not be 0")
            .hint("leave it out to use the context that the model was trained on"));
    }
    reader::integer(1, LARGEST_CONTEXT)(item)
}

fn cache_type(item: &Item) -> Result<String, reader::Wrong> {
    reader::word(&CACHE_TYPES)(item).map(str::to_owned)
}

fn read_prompt_cache(item: &Item) -> Result<PromptCache, reader::Wrong> {
    match &item.value {
        Value::Text(text) if text == "auto" => Ok(PromptCache::Auto),
        _ => reader::size(item).map(PromptCache::Size),
    }
}

fn read_gpu_layers(item: &Item) -> Result<GpuLayers, reader::Wrong> {
    match &item.value {
        Value::Text(_) => reader::word(&[("auto", GpuLayers::Auto), ("all", GpuLayers::All)])(item)
            .map_err(|_| reader::Wrong::new("must be \"auto\", \"all\" or a number of layers")),
        _ => reader::integer(0, 100_000)(item).map(GpuLayers::Count),
    }
}

fn positive(item: &Item) -> Result<Duration, reader::Wrong> {
    reader::duration(item).and_then(|span| {
        if span.is_zero() { Err(reader::Wrong::new("must be longer than nothing")) } else { Ok(span) }
    })
}

fn drain(item: &Item) -> Result<Duration, reader::Wrong> {
    reader::duration(item).and_then(|span| {
        if span <= LONGEST_DRAIN {
            Ok(span)
        } else {
            Err(reader::Wrong::new("must be at most 10min: others wait for its memory meanwhile"))
        }
    })
}

fn model_name(item: &Item) -> Result<ModelName, reader::Wrong> {
    reader::text(item)?
        .parse()
        .map_err(|e: super::instance::NameError| reader::Wrong::new(format!("is wrong: {e}")))
}

fn health_path(item: &Item) -> Result<String, reader::Wrong> {
    let path = reader::text(item)?;
    if path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(path)
    } else {
        Err(reader::Wrong::new(format!("must be a path such as \"/health\", not {}", quoted(&path))))
    }
}

fn engine_args(item: &Item) -> Result<Vec<String>, reader::Wrong> {
    let arguments = reader::list(reader::argument)(item)?;
    // Arguments are in the process list, in the journal and on the bus.
    for argument in &arguments {
        let flag = argument.split('=').next().unwrap_or_default().replace('_', "-");
        match flag.as_str() {
            "--api-key" => {
                return Err(reader::Wrong::new("must not hold --api-key, which everyone could read")
                    .hint("write the key into a file and name that in 'api-key-file'"));
            }
            "--hf-token" | "-hft" => {
                return Err(reader::Wrong::new(format!("must not hold {flag}, which everyone could read"))
                    .hint("leave it out: nothing is downloaded at the start of a model"));
            }
            _ => {}
        }
    }
    Ok(arguments)
}

fn command(item: &Item) -> Result<Vec<String>, reader::Wrong> {
    let arguments = reader::list(reader::argument)(item)?;
    match arguments.first() {
        None => Err(reader::Wrong::new("must not be empty")),
        Some(program) if !program.starts_with('/') => Err(reader::Wrong::new(format!(
            "must begin with the absolute path of a program, not {}",
            quoted(program)
        ))),
        Some(_) => match escape(&arguments) {
            None => Ok(arguments),
            Some(name) => Err(reader::Wrong::new(format!(
                "must not run the engine by {name}, which has its processes outside of the unit: there they are neither \
                 measured nor limited, and go on when it stops"
            ))
            .hint(
                "for llama-server in a container write [engine.NAME] and image = \"…\" into plimsoll.toml, and \
                 engine = \"NAME\" here; for another engine name its own program, or run the container as a service of \
                 its own (a Quadlet) and adopt that in plimsoll.toml under [adopt.\"NAME.service\"]",
            )),
        },
    }
}

/// The program among `command` that has what it runs started by somebody else.
fn escape(command: &[String]) -> Option<&'static str> {
    let named = |word: &String, names: &[&'static str]| {
        let name = word.rsplit('/').next();
        names.iter().copied().find(|known| name == Some(*known))
    };
    let (program, arguments) = command.split_first()?;
    named(program, &ESCAPES).or_else(|| {
        named(program, &WRAPPERS)?;
        // Up to the program that it runs: what stands behind is no program.
        let program = |word: &&String| word.starts_with('/') && named(word, &WRAPPERS).is_none();
        let end = arguments.iter().position(|word| program(&word)).map_or(arguments.len(), |n| n + 1);
        arguments.iter().take(end).find_map(|word| named(word, &ESCAPES))
    })
}

/// `environment` is read key by key, so that one that is wrong is named at its own place.
fn environment(r: &mut Reader<'_>) -> Environment {
    let mut variables = BTreeMap::new();
    for (name, Entry { place, item }) in r.table("environment").unwrap_or_default().0 {
        let valid_name = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !name.bytes().next().is_none_or(|b| b.is_ascii_digit());
        if !valid_name {
            r.problem(Problem::error(place, format!("{} is not a name of a variable", quoted(&name))));
            continue;
        }
        if name == "LLAMA_API_KEY" {
            r.problem(
                Problem::error(place, "LLAMA_API_KEY in 'environment' could be read by everyone")
                    .hint("write the key into a file and name that in 'api-key-file'"),
            );
            continue;
        }
        let value = match item.value {
            Value::Text(text) if !text.contains('\0') => text,
            Value::Integer(n) => n.to_string(),
            other => {
                let message =
                    format!("'{name}' in 'environment' must be a text in quotes, not {}", other.kind());
                r.problem(Problem::error(item.place, message));
                continue;
            }
        };
        variables.insert(name, value);
    }
    Environment(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_escapes_is_the_program_and_not_what_it_is_given() {
        let of = |words: &[&str]| escape(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["/usr/bin/podman", "run", "x"]), Some("podman"));
        assert_eq!(of(&["/usr/bin/env", "A=b", "podman", "exec", "x"]), Some("podman"));
        assert_eq!(of(&["/usr/bin/nice", "/usr/bin/env", "/usr/bin/docker", "run"]), Some("docker"));
        assert_eq!(of(&["/usr/bin/nice", "/opt/x/serve", "--cache", "/srv/docker"]), None);
        assert_eq!(of(&["/opt/x/serve", "docker"]), None);
        assert_eq!(of(&[]), None);
    }
}

//! From the text of a model file to the command line of its engine: what is priced is what is run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use plimsoll::config::{self, Instance, Loaded, Model};
use plimsoll::engine::{self, Effective, Launch, Version};
use plimsoll::fit::{GpuLayers, LoadMode, Override, args};

/// A root directory of a test's own, removed at its end.
struct Root(PathBuf);

impl Root {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("plimsoll-engine-{test}-{}", std::process::id()));
        let root = Self(path);
        let _ = fs::remove_dir_all(&root.0);
        root
    }

    /// The configuration with the one model `m`, whose file has these lines.
    fn load(&self, settings: &str, model: &str) -> Loaded {
        let etc = self.0.join("etc/plimsoll");
        let written = fs::create_dir_all(etc.join("models.d"))
            .and_then(|()| fs::write(etc.join("plimsoll.toml"), settings))
            .and_then(|()| fs::write(etc.join("models.d/m.toml"), model));
        assert!(written.is_ok(), "{written:?}");
        config::load(&self.0)
    }

    fn model(&self, text: &str) -> Model {
        let loaded = self.load("", text);
        assert!(loaded.is_valid(), "{:?}", loaded.problems);
        loaded.models.into_values().next().unwrap_or_else(|| unreachable!("valid, so there is one"))
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn unit(variables: &[(&str, &str)]) -> BTreeMap<String, String> {
    variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn source(effective: &Effective, name: &str) -> String {
    effective.sources.get(name).map(ToString::to_string).unwrap_or_default()
}

fn instance(text: &str) -> Instance {
    text.parse().unwrap_or_else(|error| unreachable!("{error}"))
}

const MODEL: &str = "model = \"/srv/models/a b.gguf\"\n";

#[test]
fn keys_are_arguments_and_say_where_they_stand() {
    let root = Root::new("keys");
    let model = root.model(&format!(
        "{MODEL}context = 65536\ncache-type-k = \"q8_0\"\nparallel = 2\nprompt-cache = \"1GiB\"\ngpu-layers = 20\n\
         engine-args = [\"-ub\", \"2048\", \"--n-cpu-moe\", \"4\", \"--brand-new\", \"7\"]\n"
    ));
    let effective = engine::effective(&model, &unit(&[("LLAMA_ARG_SWA_FULL", "1")])).unwrap();
    let s = &effective.settings;
    assert_eq!((s.context, s.parallel, s.ubatch, s.prompt_cache_mib), (65536, Some(2), 2048, Some(1024)));
    assert_eq!(s.cache_type_k.name(), "q8_0");
    assert_eq!(s.gpu_layers, GpuLayers::Count(20));
    assert!(s.swa_full && !s.fit);
    assert_eq!(source(&effective, "ctx-size"), "/etc/plimsoll/models.d/m.toml:2");
    assert_eq!(source(&effective, "ubatch-size"), "-ub at /etc/plimsoll/models.d/m.toml:7");
    assert_eq!(source(&effective, "swa-full"), "LLAMA_ARG_SWA_FULL of the unit's environment");
    assert_eq!(source(&effective, "cache-type-v"), "", "a default");
    assert_eq!(effective.passed_on, ["--brand-new", "7"]);
    assert!(!effective.automatic.prompt_cache && effective.automatic.context_checkpoints);
}

#[test]
fn what_nobody_says_is_one_slot_and_no_caches() {
    let root = Root::new("defaults");
    let effective = engine::effective(&root.model(MODEL), &BTreeMap::new()).unwrap();
    let s = &effective.settings;
    assert_eq!((s.context, s.parallel, s.prompt_cache_mib, s.context_checkpoints), (0, Some(1), Some(0), 0));
    assert!(effective.automatic.prompt_cache && effective.automatic.context_checkpoints);
    assert!(!effective.sources.contains_key("parallel"));
}

#[test]
fn precedence_is_key_then_argument_then_variable() {
    let root = Root::new("precedence");
    let environment = unit(&[("LLAMA_ARG_CTX_SIZE", "1024"), ("LLAMA_ARG_N_PARALLEL", "4")]);
    // A key is an argument, and wins over the unit's variables.
    let model = root.model(&format!("{MODEL}context = 2048\n"));
    let effective = engine::effective(&model, &environment).unwrap();
    assert_eq!((effective.settings.context, effective.settings.parallel), (2048, Some(4)));
    // So does an argument; and the model's own variables win over the unit's.
    let model = root.model(&format!(
        "{MODEL}engine-args = [\"-c\", \"4096\"]\nenvironment = {{ LLAMA_ARG_N_PARALLEL = \"8\" }}\n"
    ));
    let effective = engine::effective(&model, &environment).unwrap();
    assert_eq!((effective.settings.context, effective.settings.parallel), (4096, Some(8)));
    assert_eq!(source(&effective, "parallel"), "LLAMA_ARG_N_PARALLEL at /etc/plimsoll/models.d/m.toml:3");
    // A key that leaves it open does so whatever the unit says; without the key the unit has its way.
    let environment = unit(&[("LLAMA_ARG_CACHE_RAM", "4096"), ("LLAMA_ARG_N_GPU_LAYERS", "7")]);
    let open = root.model(&format!("{MODEL}prompt-cache = \"auto\"\ngpu-layers = \"auto\"\n"));
    let effective = engine::effective(&open, &environment).unwrap();
    assert!(effective.automatic.prompt_cache);
    assert_eq!(effective.settings.gpu_layers, GpuLayers::Auto);
    let effective = engine::effective(&root.model(MODEL), &environment).unwrap();
    assert_eq!(effective.settings.prompt_cache_mib, Some(4096));
    assert_eq!(effective.settings.gpu_layers, GpuLayers::Count(7));
    // A default of all models gives way to everything.
    let environment = unit(&[("LLAMA_ARG_CTX_SIZE", "1024"), ("LLAMA_ARG_N_PARALLEL", "4")]);
    let settings = "[model-defaults]\ncontext = 512\nparallel = 2\n";
    let loaded = root.load(settings, &format!("{MODEL}engine-args = [\"-c\", \"4096\"]\n"));
    let effective = engine::effective(&loaded.models["m"], &environment).unwrap();
    assert_eq!((effective.settings.context, effective.settings.parallel), (4096, Some(4)));
    let effective = engine::effective(&loaded.models["m"], &BTreeMap::new()).unwrap();
    assert_eq!(effective.settings.parallel, Some(2));
    assert_eq!(source(&effective, "parallel"), "/etc/plimsoll/plimsoll.toml:3");
}

#[test]
fn contradictions_name_both_sides() {
    let root = Root::new("contradictions");
    for (text, expected) in [
        (
            "context = 65536\nengine-args = [\"--jinja\", \"-c\", \"4096\"]\n",
            "'context' at /etc/plimsoll/models.d/m.toml:2 is 65536, but -c in 'engine-args' at \
             /etc/plimsoll/models.d/m.toml:3 says 4096: remove one of them",
        ),
        (
            "gpu-layers = \"auto\"\nengine-args = [\"-ngl\", \"99\"]\n",
            "'gpu-layers' at /etc/plimsoll/models.d/m.toml:2 is auto, but -ngl in 'engine-args' at \
             /etc/plimsoll/models.d/m.toml:3 says 99: remove one of them",
        ),
        (
            "parallel = 2\nenvironment = { LLAMA_ARG_N_PARALLEL = \"4\" }\n",
            "'parallel' at /etc/plimsoll/models.d/m.toml:2 is 2, but LLAMA_ARG_N_PARALLEL in 'environment' at \
             /etc/plimsoll/models.d/m.toml:3 says 4: remove one of them",
        ),
        (
            "engine-args = [\"--port\", \"9000\"]\n",
            "--port can't stand in 'engine-args' at /etc/plimsoll/models.d/m.toml:2: write port = … into \
             /etc/plimsoll/models.d/m.toml",
        ),
        (
            "engine-args = [\"-fit\", \"on\"]\n",
            "-fit can't stand in 'engine-args' at /etc/plimsoll/models.d/m.toml:2: plimsoll decides what fits; \
             'gpu-layers' and 'context-min' say how",
        ),
        (
            "engine-args = [\"-hf\", \"ggml-org/x\"]\n",
            "-hf would make the engine download a model: download it, and name the file in 'model'",
        ),
        (
            "environment = { LLAMA_ARG_SPEC_DRAFT_HF_REPO = \"ggml-org/x\" }\n",
            "'m' can't be started with its settings (/etc/plimsoll/models.d/m.toml): LLAMA_ARG_SPEC_DRAFT_HF_REPO would \
             make the engine download a model: download it, and name the file of a draft model in 'draft-model', or \
             with --spec-draft-model FILE",
        ),
    ] {
        let error = engine::effective(&root.model(&format!("{MODEL}{text}")), &BTreeMap::new()).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    // What says the same twice is fine, and is said once.
    let model = root.model(&format!(
        "{MODEL}context = 4096\nport = 9000\nengine-args = [\"-c\", \"4096\", \"--port\", \"9000\"]\n"
    ));
    let effective = engine::effective(&model, &BTreeMap::new()).unwrap();
    let launch = llama_server(&model, &effective, None);
    assert_eq!(launch.argv.iter().filter(|a| *a == "9000" || *a == "4096").count(), 2);
}

#[test]
fn what_llama_server_refuses_is_refused() {
    let root = Root::new("refused");
    for bad in ["\"--no-mmap\"", "\"-c\"", "\"-c\", \"many\"", "\"stray\""] {
        let error =
            engine::effective(&root.model(&format!("{MODEL}engine-args = [{bad}]\n")), &BTreeMap::new())
                .unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("'m' can't be started with its settings (/etc/plimsoll/models.d/m.toml:2): "),
            "{text}"
        );
    }
}

fn llama_server(model: &Model, effective: &Effective, version: Option<&Version>) -> Launch {
    let program = Path::new("/usr/bin/llama-server");
    Launch::llama_server(model, &instance("m"), program, effective, &effective.settings, version)
        .unwrap_or_else(|error| unreachable!("{error}"))
}

#[test]
fn the_command_runs_what_was_chosen() {
    let root = Root::new("chosen");
    let model = root.model(&format!(
        "{MODEL}context = 65536\ncontext-min = 8192\nport = 8003\napi-key-file = \"/etc/keys\"\n\
         mmproj = \"/srv/p.gguf\"\ndraft-model = \"/srv/d.gguf\"\n\
         engine-args = [\"--jinja\", \"-ub\", \"2048\", \"-ot\", \"exps=CPU\", \"--load-mode\", \"mmap\"]\n\
         environment = {{ HSA_OVERRIDE_GFX_VERSION = \"11.5.1\" }}\n"
    ));
    let effective = engine::effective(&model, &BTreeMap::new()).unwrap();
    let mut chosen = effective.settings.clone();
    chosen.context = 16384;
    chosen.gpu_layers = GpuLayers::Count(30);
    chosen.overrides.push(Override::CpuMoe(10));
    chosen.prompt_cache_mib = Some(512);
    chosen.context_checkpoints = 3;
    chosen.load_mode = LoadMode::None;
    let launch = Launch::llama_server(
        &model,
        &instance("m@2"),
        Path::new("/opt/llama.cpp/bin/llama-server"),
        &effective,
        &chosen,
        None,
    )
    .unwrap();
    let expected = "/opt/llama.cpp/bin/llama-server|--model|/srv/models/a b.gguf|--alias|m|--host|127.0.0.1|--port|8004|\
         --api-key-file|/etc/keys|--ctx-size|16384|--parallel|1|--cache-type-k|f16|--cache-type-v|f16|\
         --gpu-layers|30|--fit|off|--cache-ram|512|--ctx-checkpoints|3|-mm|/srv/p.gguf|-md|/srv/d.gguf|\
         --load-mode|none|--override-tensor|exps=CPU|--n-cpu-moe|10|--jinja|-ub|2048";
    assert_eq!(launch.argv.join("|"), expected);
    assert_eq!(launch.environment["HSA_OVERRIDE_GFX_VERSION"], "11.5.1");
    assert_eq!((launch.port, launch.health_path.as_deref()), (8004, Some("/health")));
    // Read back as llama-server reads it, the command has the very settings that were priced.
    let read_back = args::parse(&launch.argv, &BTreeMap::new()).unwrap();
    assert_eq!(read_back.settings, chosen);
    assert_eq!(read_back.port, Some(8004));
}

#[test]
fn a_whole_command_line_can_be_pasted() {
    let root = Root::new("pasted");
    let model = root.model(
        "model = \"/srv/m.gguf\"\n\
         engine-args = [\"/opt/llama-server\", \"-m\", \"/srv/m.gguf\", \"-c\", \"16384\", \"-ngl\", \"999\", \"-fa\", \"off\"]\n",
    );
    let effective = engine::effective(&model, &BTreeMap::new()).unwrap();
    assert_eq!(effective.settings.context, 16384);
    let argv = llama_server(&model, &effective, None).argv;
    assert_eq!(
        argv.iter().filter(|a| a.contains("llama-server") || *a == "/srv/m.gguf").count(),
        2,
        "{argv:?}"
    );
    assert_eq!(argv[argv.len() - 2..], ["-fa", "off"]);
}

#[test]
fn older_builds_are_spoken_to_in_their_words() {
    let root = Root::new("versions");
    let model = root.model(&format!("{MODEL}engine-args = [\"-lm\", \"none\"]\n"));
    let effective = engine::effective(&model, &BTreeMap::new()).unwrap();
    let words = |version: &str| {
        let version = engine::version::parse(version);
        llama_server(&model, &effective, version.as_ref()).argv.join(" ")
    };
    assert!(words("version: 0.7.0 (build 11669, commit Debian)").contains("--load-mode none"));
    let before = words("version: 9219 (90e6a9131)");
    assert!(before.contains("--no-mmap") && !before.contains("--load-mode"), "{before}");
    let old = engine::version::parse("version: 4000 (abc)");
    let program = Path::new("/usr/bin/llama-server");
    let error =
        Launch::llama_server(&model, &instance("m"), program, &effective, &effective.settings, old.as_ref());
    assert!(error.unwrap_err().to_string().contains("older than build"));
}

#[test]
fn any_other_engine_gets_its_words_replaced() {
    let root = Root::new("command");
    let model = root.model(
        "model = \"/srv/whisper model.bin\"\nmemory = \"4GiB\"\nport = 8090\nhost = \"0.0.0.0\"\n\
         command = [\"/usr/bin/w\", \"-m\", \"{model}\", \"{host}:{port}\", \"{instance}\", \"{\\\"a\\\": {port}}\", \"{x}\", \"{\"]\n",
    );
    let launch = Launch::command(&model, &instance("m@3")).unwrap();
    let expected = "/usr/bin/w|-m|/srv/whisper model.bin|0.0.0.0:8092|m@3|{\"a\": 8092}|{x}|{";
    assert_eq!(launch.argv.join("|"), expected);
    assert_eq!((launch.host.as_str(), launch.port, launch.health_path.as_deref()), ("0.0.0.0", 8092, None));

    let model = root.model("memory = \"4GiB\"\ncommand = [\"/usr/bin/w\", \"--port={prot}\"]\n");
    let error = Launch::command(&model, &instance("m")).unwrap_err().to_string();
    assert_eq!(
        error,
        "{prot} in 'command' at /etc/plimsoll/models.d/m.toml:2 is unknown; did you mean {port}?"
    );
    let model = root.model("memory = \"4GiB\"\nport = 65535\ncommand = [\"/usr/bin/w\"]\n");
    assert!(Launch::command(&model, &instance("m@2")).unwrap_err().to_string().contains("above 65535"));
}

#[test]
fn every_file_that_is_read_is_named() {
    let root = Root::new("files");
    let model = root.model(
        "model = \"/mnt/a/x-00001-of-00003.gguf\"\nmmproj = \"/mnt/b/p.gguf\"\napi-key-file = \"/etc/keys\"\n\
         engine-args = [\"--lora\", \"/mnt/c/l.gguf\", \"--chat-template-file\", \"/mnt/d/t.jinja\", \"-md\", \"/mnt/e/d.gguf\"]\n",
    );
    let effective = engine::effective(&model, &BTreeMap::new()).unwrap();
    let files = engine::files(&model, Some(&effective)).unwrap();
    let named: Vec<_> =
        files.iter().map(|file| format!("{} {}", file.purpose, file.path.display())).collect();
    assert_eq!(
        named,
        [
            "model /mnt/a/x-00001-of-00003.gguf",
            "model /mnt/a/x-00002-of-00003.gguf",
            "model /mnt/a/x-00003-of-00003.gguf",
            "mmproj /mnt/b/p.gguf",
            "draft-model /mnt/e/d.gguf",
            "lora /mnt/c/l.gguf",
            "api-key-file /etc/keys",
            "other /mnt/d/t.jinja",
        ]
    );
    let directories = engine::directories(&model, &config::Daemon::default());
    let text = engine::drop_in(&directories).unwrap();
    for directory in ["/mnt/a", "/mnt/b", "/mnt/c", "/mnt/d", "/mnt/e", "/etc"] {
        assert!(text.contains(&format!("\nRequiresMountsFor={directory}\n")), "{text}");
    }
    let model = root.model(&format!("{MODEL}engine-args = [\"--chat-template-file\", \"t.jinja\"]\n"));
    let effective = engine::effective(&model, &BTreeMap::new()).unwrap();
    let error = engine::files(&model, Some(&effective)).unwrap_err().to_string();
    assert!(
        error.ends_with("has the relative path 't.jinja': write the whole path, beginning with '/'"),
        "{error}"
    );
}

#[test]
fn a_container_engine_is_an_image_with_its_program() {
    let root = Root::new("container");
    let text = "[engine.rocm]\nimage = \"ghcr.io/x/y:z\"\nprogram = \"/app/llama-server\"\n";
    let loaded = root.load(text, &format!("{MODEL}engine = \"rocm\"\n"));
    let daemon = loaded.settings.clone().unwrap();
    let model = &loaded.models["m"];
    let found = engine::locate(model, &daemon).unwrap();
    assert_eq!((found.word(), found.program()), (PathBuf::from("ghcr.io/x/y:z"), None));
    let image = engine::image(model, &daemon).unwrap();
    assert_eq!(image.program.as_deref(), Some("/app/llama-server"));
}

#[test]
fn checking_breaks_only_what_is_wrong() {
    let root = Root::new("check");
    let _ = root
        .load("", &format!("{MODEL}context = 65536\naliases = [\"n\"]\nengine-args = [\"-c\", \"4096\"]\n"));
    for (name, text) in [
        ("fine", format!("{MODEL}port = 8081\n")),
        ("unknown", format!("{MODEL}port = 8082\nengine-args = [\"--brand-new\"]\n")),
        ("split", "model = \"/srv/x-00002-of-00003.gguf\"\nport = 8083\n".to_owned()),
        ("command", "memory = \"1GiB\"\nport = 8084\ncommand = [\"/usr/bin/w\", \"{prt}\"]\n".to_owned()),
    ] {
        fs::write(root.0.join(format!("etc/plimsoll/models.d/{name}.toml")), text).unwrap();
    }
    let loaded = engine::load(&root.0);
    let problems: Vec<_> = loaded.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "/etc/plimsoll/models.d/command.toml:3:1: error: {prt} in 'command' at \
             /etc/plimsoll/models.d/command.toml:3 is unknown; did you mean {port}?",
            "/etc/plimsoll/models.d/m.toml:2:1: error: 'context' at /etc/plimsoll/models.d/m.toml:2 is 65536, but -c \
             in 'engine-args' at /etc/plimsoll/models.d/m.toml:4 says 4096: remove one of them",
            "/etc/plimsoll/models.d/split.toml: error: /srv/x-00002-of-00003.gguf: give the first file of the split \
             model: x-00001-of-00003.gguf",
            "/etc/plimsoll/models.d/unknown.toml:3:1: warning: '--brand-new' is unknown to plimsoll; the engine gets \
             it, and the estimate takes it to need no memory",
        ]
    );
    let names: Vec<_> = loaded.models.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["fine", "unknown"]);
    assert!(loaded.instance("n@2").unwrap_err().to_string().starts_with("the configuration of 'm' is wrong"));
}

#[test]
fn no_other_engine_stands_in_for_one_that_is_unknown() {
    let root = Root::new("unknown");
    let loaded = root.load(
        "mode = \"enforced\"\n[engine.mine]\npath = \"/opt/mine\"\n",
        &format!("{MODEL}engine = \"mine\"\n"),
    );
    assert!(loaded.settings.is_none());
    let error = engine::locate(&loaded.models["m"], &config::Daemon::default()).unwrap_err().to_string();
    assert_eq!(error, "engine 'mine' is not configured, or plimsoll.toml has errors: plimsoll validate");
}

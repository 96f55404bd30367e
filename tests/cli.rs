//! The built command: exit codes, sentences, tables and JSON keys.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

#[allow(dead_code)] // the oracle's own tests use the rest
#[path = "oracle/fixture.rs"]
mod fixture;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A directory of one test's own, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("plimsoll-cli-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// The files of a model whose header the oracle has; the first of them.
    fn model(&self, name: &str) -> PathBuf {
        fixture::inflate(&fixture::directory().join(format!("{name}.txt")), &self.0)
    }

    fn file(&self, name: &str, text: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    command.env("PLIMSOLL_BUS_ADDRESS", "unix:path=/nowhere/bus");
    command
}

fn plimsoll(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// That it failed so, with one sentence that has `part` in it.
fn fails(arguments: &[&str], code: i32, part: &str) {
    let output = plimsoll(arguments);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    assert!(text.starts_with("plimsoll: ") && text.contains(part), "{arguments:?}: {text}");
    let hints = text.lines().skip(1).filter(|line| !line.starts_with("hint: ")).count();
    assert_eq!(hints, 0, "one sentence and a hint: {text}");
    assert_eq!(stdout(&output), "", "{arguments:?}");
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn help_teaches() {
    let output = plimsoll(&["--help"]);
    assert!(output.status.success());
    let text = stdout(&output);
    for part in ["Examples:", "Exit codes:", "  75  refused", "/etc/plimsoll/models.d", "NO_COLOR"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100));
    assert_eq!(plimsoll(&[]).status.code(), Some(2));
    assert_eq!(plimsoll(&["lod", "x"]).status.code(), Some(2));
    assert_eq!(stdout(&plimsoll(&["--version"])), format!("plimsoll {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_are_there_for_each_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let output = plimsoll(&["completions", shell]);
        assert!(output.status.success());
        assert!(stdout(&output).contains("wait-ready"), "{shell}");
    }
}

#[test]
fn without_a_daemon_it_is_69() {
    for arguments in [
        &["status"][..],
        &["list", "--json"],
        &["load", "x"],
        &["unload", "x"],
        &["plan", "x"],
        &["explain", "x"],
        &["pin", "x"],
        &["mode"],
        &["reload"],
    ] {
        fails(arguments, 69, "the daemon can't be reached");
    }
}

#[test]
fn fit_prints_a_line_for_each_context() {
    let scratch = Scratch::new("table");
    let model = scratch.model("DeepSeek-V3.1-TQ1_0");
    let output =
        plimsoll(&["fit", path(&model), "--ram", "128GiB", "--gpu", "120GiB", "-c", "4096", "-c", "16k"]);
    let text = stdout(&output);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(text.contains("deepseek2, 671.0 B parameters, 4 files"), "{text}");
    assert!(
        text.contains("128.0 GiB memory (4.0 GiB kept as reserve), 120.0 GiB of it for the GPU"),
        "{text}"
    );
    let table: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("CONTEXT")).take(3).collect();
    assert!(table[0].ends_with("VERDICT"), "{text}");
    assert!(table[1].starts_with("   4096    158.4") && table[1].contains("refused, "), "{text}");
    assert!(table[2].starts_with("  16384    158.4"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
}

#[test]
fn fit_shows_the_usual_contexts_that_the_model_knows() {
    let scratch = Scratch::new("usual");
    let model = scratch.model("Qwen3-Coder-30B-A3B-Q8_0");
    let output = plimsoll(&["fit", path(&model), "--ram", "64GiB", "--json"]);
    let value: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let contexts: Vec<u64> =
        value["estimates"].as_array().unwrap().iter().map(|e| e["context"].as_u64().unwrap()).collect();
    assert_eq!(contexts, [4096, 16384, 32768, 65536, 131_072]);
}

#[test]
fn fit_json_has_the_keys_of_the_contract() {
    let scratch = Scratch::new("json");
    let model = scratch.model("GLM-4.7-Flash-Q8_0");
    let output = plimsoll(&[
        "fit",
        path(&model),
        "--json",
        "-c",
        "16384",
        "--ram",
        "128GB",
        "--gpu",
        "none",
        "--swap",
        "8GiB",
    ]);
    let value: Value = serde_json::from_str(&stdout(&output)).unwrap();
    for key in ["name", "architecture", "files", "parameters", "file_bytes", "context_train"] {
        assert!(!value["model"][key].is_null(), "model.{key}");
    }
    let parts = [
        "weights_bytes",
        "kv_bytes",
        "state_bytes",
        "compute_bytes",
        "output_bytes",
        "extras_bytes",
        "total_bytes",
    ];
    let estimate = &value["estimates"][0];
    for key in parts {
        let of = |at: &Value| at[key].as_u64().unwrap_or_else(|| panic!("{key} in {at}"));
        assert_eq!(of(estimate), of(&estimate["split"]["gpu"]) + of(&estimate["split"]["host"]), "{key}");
    }
    for key in ["context", "mapped_bytes", "swap_needed_bytes"] {
        assert!(estimate[key].is_u64(), "{key}");
    }
    assert!(estimate["exact"].is_boolean());
    assert_eq!(estimate["verdict"], "fits");
    assert!(estimate.get("tokens_per_second").is_some());
    assert_eq!(value["machine"]["memory_bytes"], 128_000_000_000_u64);
    assert_eq!(value["machine"]["swap_total_bytes"], 8_u64 << 30);
    assert_eq!(value["settings"]["cache-type-k"]["value"], "f16");
    assert_eq!(value["settings"]["cache-type-k"]["source"], "default");
}

#[test]
fn fit_prices_a_pasted_command_line() {
    let scratch = Scratch::new("pasted");
    let model = scratch.model("GLM-4.7-Flash-Q8_0");
    let json = |more: &[&str]| -> Value {
        let line = [&["fit", "--ram", "128GiB", "--json", "--"], more].concat();
        let output = plimsoll(&line);
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_str(&stdout(&output)).unwrap()
    };
    let plain = json(&["llama-server", "-m", path(&model), "-c", "16384"]);
    let smaller = json(&[
        "LLAMA_ARG_CACHE_TYPE_K=q8_0",
        "/opt/bin/llama-server",
        "-m",
        path(&model),
        "-c",
        "16384",
        "-ctv",
        "q8_0",
    ]);
    assert_eq!(plain["estimates"][0]["context"], 16384);
    assert_eq!(smaller["settings"]["cache-type-k"]["source"], "variable LLAMA_ARG_CACHE_TYPE_K");
    let kv = |value: &Value| value["estimates"][0]["kv_bytes"].as_u64().unwrap();
    assert!(kv(&smaller) < kv(&plain));
    fails(&["fit", path(&model), "--", "-mmp", "0"], 2, "-mmp");
    fails(&["fit", path(&model), "--", "-m", "/other.gguf"], 2, "which model");
}

#[test]
fn fit_finds_the_largest_context() {
    let scratch = Scratch::new("largest");
    let model = scratch.model("Qwen3-Coder-30B-A3B-Q8_0");
    let best = |ram: &str| -> u64 {
        let output = plimsoll(&["fit", path(&model), "--max-context", "--ram", ram, "--json"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let value: Value = serde_json::from_str(&stdout(&output)).unwrap();
        value["estimates"][0]["context"].as_u64().unwrap()
    };
    let (some, more) = (best("48GiB"), best("64GiB"));
    assert!(some >= 256 && some < more, "{some} {more}");
    fails(&["fit", path(&model), "--max-context", "--ram", "16GiB"], 75, "does not fit at any context");
}

#[test]
fn bad_model_files_get_one_clear_line_each() {
    let scratch = Scratch::new("bad");
    let whole = std::fs::read(scratch.model("LFM2-1.2B-Q8_0")).unwrap();
    let cut = scratch.file("cut.gguf", &whole[..whole.len().min(2000)]);
    let empty = scratch.file("empty.gguf", b"");
    let text = scratch.file("text.gguf", b"# A model, or so they say\n");
    // Version 3 with counts beyond anything: nothing may be allocated for them.
    let mut huge = b"GGUF\x03\x00\x00\x00".to_vec();
    huge.extend([0xff; 16]);
    let huge = scratch.file("huge.gguf", &huge);
    for bad in [&cut, &empty, &text, &huge] {
        fails(&["fit", path(bad)], 1, path(bad));
    }
    fails(&["fit", path(&scratch.0)], 1, "is a directory");
    fails(&["fit", "/nowhere/model.gguf"], 1, "/nowhere/model.gguf");
    let short = scratch.0.join("LFM2-1.2B-Q8_0.gguf");
    let file = std::fs::OpenOptions::new().write(true).open(&short).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    fails(&["fit", path(&short)], 1, "shorter than its header says");
    let split = scratch.model("DeepSeek-V3.1-TQ1_0");
    let third = path(&split).replace("00001-of", "00003-of");
    std::fs::remove_file(&third).unwrap();
    fails(&["fit", path(&split)], 1, "shard 3 of 4 is missing");
}

#[test]
fn validate_shows_every_problem_at_once() {
    let scratch = Scratch::new("validate");
    let root = path(&scratch.0).to_owned();
    let good = b"model = \"/m/x.gguf\"\nport = 8001\n";
    scratch.file("etc/plimsoll/models.d/good.toml", good);
    let output = plimsoll(&["validate", "--root", &root]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    scratch.file("etc/plimsoll/models.d/bad.toml", b"model = \"x.gguf\"\ncontxt = 4096\npriority = 101\n");
    let output = plimsoll(&["validate", "--root", &root]);
    assert_eq!(output.status.code(), Some(78));
    let text = stdout(&output);
    assert!(text.lines().count() >= 4, "{text}");
    assert!(text.contains("/etc/plimsoll/models.d/bad.toml:2:1: error: "), "{text}");
    let output = plimsoll(&["validate", "--root", &root, "--json"]);
    assert_eq!(output.status.code(), Some(78));
    let value: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(value["valid"], false);
    assert!(value["problems"].as_array().unwrap().len() >= 3);
    fails(&["validate", "--root", "/nowhere/at/all"], 2, "no such directory");
}

#[test]
fn run_finds_what_could_never_work_before_it_asks_anybody() {
    let scratch = Scratch::new("run");
    let root = path(&scratch.0).to_owned();
    let engine = scratch.file("engine", b"#!/bin/sh\n");
    let models = |name: &str, text: &str| {
        scratch.file(&format!("etc/plimsoll/models.d/{name}.toml"), text.as_bytes());
    };
    let engine_table = format!("[engine.mine]\npath = \"{}\"\n", path(&engine));
    scratch.file("etc/plimsoll/plimsoll.toml", engine_table.as_bytes());
    let split = scratch.model("DeepSeek-V3.1-TQ1_0");
    models("split", &format!("model = \"{}\"\nport = 18200\nengine = \"mine\"\n", path(&split)));
    // Everything is there, but the engine may not be executed.
    fails(&["run", "split", "--root", &root], 78, path(&engine));
    let third = path(&split).replace("00001-of", "00003-of");
    std::fs::rename(&third, format!("{third}.part")).unwrap();
    fails(&["run", "split", "--root", &root], 78, &third);
    std::fs::File::create(&third).unwrap();
    fails(&["run", "split", "--root", &root], 78, &third);

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let taken = |port| format!("command = [\"/bin/true\"]\nmemory = \"1GiB\"\nport = {port}\n");
    models("taken", &taken(port));
    fails(&["run", "taken", "--root", &root], 78, &format!("port {port} of 127.0.0.1 is taken"));
    fails(&["run", "nobody", "--root", &root], 78, "there is no model 'nobody'");
    fails(&["run", "../x", "--root", &root], 78, "../x");
    models("wrong", "modl = 1\n");
    fails(&["run", "wrong", "--root", &root], 78, "the configuration of 'wrong' is wrong");
    fails(&["wait-ready", "taken", "--root", &root], 2, "MAINPID");
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let scratch = Scratch::new("pipe");
    let model = scratch.model("LFM2-1.2B-Q8_0");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command(&["fit", path(&model)]).stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[test]
fn the_generator_is_the_same_program_by_another_name() {
    let scratch = Scratch::new("generator");
    let link = scratch.0.join("plimsoll-generator");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_plimsoll"), &link).unwrap();
    let out = scratch.0.join("normal");
    let output = Command::new(&link).args([&out, &out, &out]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(Command::new(&link).output().unwrap().status.code(), Some(2));
}

/// An engine of the test's own, with a fit tool beside it that says `answer`; the root of a configuration with
/// a model `m` that it runs.
fn configured_with_tool(scratch: &Scratch, answer: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    for (name, script) in [("llama-server", "exit 1"), ("llama-fit-params", answer)] {
        let program = scratch.file(&format!("engine/{name}"), format!("#!/bin/sh\n{script}\n").as_bytes());
        std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let (engine, model) = (scratch.0.join("engine/llama-server"), scratch.model("Phi-3-medium-128k-Q8_0"));
    let settings = format!("[engine.own]\npath = {engine:?}\n");
    scratch.file("root/etc/plimsoll/plimsoll.toml", settings.as_bytes());
    let text = format!("model = {model:?}\nengine = \"own\"\ncontext = 4096\n");
    scratch.file("root/etc/plimsoll/models.d/m.toml", text.as_bytes());
    path(&scratch.0.join("root")).to_owned()
}

#[test]
fn what_stands_behind_the_dashes_wins_over_a_models_keys() {
    let scratch = Scratch::new("dashes");
    let root = configured_with_tool(&scratch, "exit 1");
    let file = scratch.0.join("root/etc/plimsoll/models.d/m.toml");
    let text = std::fs::read_to_string(&file).unwrap() + "cache-type-k = \"f16\"\nprompt-cache = \"auto\"\n";
    std::fs::write(&file, &text).unwrap();
    let fit = ["fit", "m", "--root", &root, "--ram", "64GiB", "--json", "--"];
    let settings = |more: &[&str]| {
        let output = plimsoll(&[&fit[..], more].concat());
        assert_eq!(output.status.code(), Some(0), "{more:?}: {}", stderr(&output));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["settings"].clone()
    };
    let with = settings(&["-ctk", "q8_0", "-cram", "0"]);
    assert_eq!(with["cache-type-k"]["value"], "q8_0", "{with}");
    assert!(with["cache-type-k"]["source"].as_str().unwrap().starts_with("-ctk"), "{with}");
    assert_eq!(settings(&["-ub", "256"])["cache-type-k"]["value"], "f16");
    // What the model contradicts itself in is still said.
    std::fs::write(&file, text + "engine-args = [\"-ctk\", \"q5_0\"]\n").unwrap();
    fails(&[&fit[..], &["-ctk", "q8_0"]].concat(), 78, "remove one of them");
}

#[test]
fn fit_asks_for_a_second_opinion() {
    let scratch = Scratch::new("check");
    let root = configured_with_tool(&scratch, "echo log >&2; echo 'Host 14146 800 200'");
    let fit = ["fit", "m", "--root", &root, "-c", "4096", "--ram", "64GiB", "--check"];
    let output = plimsoll(&fit);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("llama-fit-params:") && text.contains("The larger counts: up to"), "{text}");
    let json: Value = serde_json::from_slice(&plimsoll(&[&fit[..], &["--json"]].concat()).stdout).unwrap();
    let asked = &json["check"]["contexts"][0];
    assert_eq!((&asked["context"], &asked["agrees"]), (&4096.into(), &false.into()));
    let excess = asked["excess_bytes"].as_u64().unwrap();
    let compute = asked["parts"].as_array().unwrap().iter().find(|part| part["kind"] == "compute").unwrap();
    let difference = compute["difference_bytes"].as_u64().unwrap();
    assert_eq!(compute["tool_bytes"].as_u64(), Some(200 << 20));
    assert_eq!(excess, difference + (1 << 20));
}

#[test]
fn a_second_opinion_that_fails_is_said_and_is_no_failure() {
    let scratch = Scratch::new("check-fails");
    let root = configured_with_tool(&scratch, "echo 'error: invalid argument: --fit-print' >&2; exit 1");
    let fit = ["fit", "m", "--root", &root, "-c", "4096", "--ram", "64GiB", "--check"];
    let output = plimsoll(&fit);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output).replace('\n', " ");
    let expected = "No second opinion: llama-fit-params failed: error: invalid argument: --fit-print.";
    assert!(text.contains(expected), "{text}");
    let output = plimsoll(&["fit", "phi-3-medium-128k:q8_0", "-c", "4096", "--ram", "64GiB", "--check"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("can only be asked about files of this"), "{}", stdout(&output));
}

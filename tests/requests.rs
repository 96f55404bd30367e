//! From a configuration and a model's files to what is asked of the decisions, and to the command.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "the fixtures serve other tests too")]

#[path = "oracle/fixture.rs"]
mod fixture;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use plimsoll::bytes::Bytes;
use plimsoll::daemon::catalog::RealCatalog;
use plimsoll::engine::opinion;
use plimsoll::ledger::{Gpu, GpuKind};
use plimsoll::policy::{Request, Rung};
use plimsoll::ports::{Catalog, CatalogError, Wish};

/// A root directory with one model's files and a configuration.
struct Root(PathBuf);

impl Root {
    /// `model` is one of the fixtures, `extra` further keys of its file.
    fn new(model: &str, extra: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("plimsoll-requests-{}-{number}", std::process::id()));
        let etc = root.join("etc/plimsoll/models.d");
        std::fs::create_dir_all(&etc).unwrap();
        let file = fixture::inflate(&fixture::directory().join(format!("{model}.txt")), &root);
        // Any program will do: nothing is executed here.
        let engine = "[engine.llama-server]\npath = \"/bin/true\"\n";
        std::fs::write(root.join("etc/plimsoll/plimsoll.toml"), engine).unwrap();
        let text = format!("model = {file:?}\n{extra}");
        std::fs::write(etc.join("m.toml"), text).unwrap();
        Self(root)
    }

    fn catalog(&self) -> RealCatalog {
        RealCatalog::new(&self.0)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn wish(instance: &str) -> Wish {
    Wish { instance: Some(instance.parse().unwrap()), ..Wish::default() }
}

fn request(catalog: &RealCatalog, gpus: &[Gpu]) -> Request {
    catalog.request(&wish("m"), gpus).unwrap()
}

/// The value behind a flag of the command that would be executed.
fn flag(catalog: &RealCatalog, rung: &Rung, gpus: &[Gpu], flag: &str) -> String {
    let argv = catalog.launch(&wish("m"), rung, gpus).unwrap().argv;
    let at = argv.iter().position(|word| word == flag).unwrap_or_else(|| panic!("no {flag} in {argv:?}"));
    argv[at + 1].clone()
}

fn apu() -> Gpu {
    Gpu { name: "card0".into(), kind: GpuKind::Unified, total: Bytes::gib(120), used: Bytes::ZERO }
}

#[test]
fn where_nothing_else_bounds_it_the_context_that_was_asked_for_is_run() {
    // Its size is declared, so that no rung was priced; of an unknown one there is none either.
    let root = Root::new("Qwen3-Coder-30B-A3B-Q8_0", "context = 65536\nmemory = \"40GiB\"\n");
    let (catalog, rung) = (root.catalog(), Rung::default());
    assert_eq!(flag(&catalog, &rung, &[], "--ctx-size"), "65536");
    let asked = Wish { context: Some(4096), ..wish("m") };
    let argv = catalog.launch(&asked, &rung, &[]).unwrap().argv.join(" ");
    assert!(argv.contains("--ctx-size 4096"), "{argv}");
}

#[test]
fn a_ladder_descends_and_what_is_priced_is_what_is_run() {
    let root = Root::new("Qwen3-Coder-30B-A3B-Q8_0", "context = 65536\ncontext-min = 16384\n");
    let catalog = root.catalog();
    let request = request(&catalog, &[]);
    assert_eq!(request.unknown, None);
    let contexts: Vec<u64> = request.ladder.iter().map(|rung| rung.context).collect();
    assert_eq!(contexts[..2], [65536, 65536], "the wanted context with a prompt cache, and without");
    assert_eq!(contexts.last(), Some(&16384));
    let totals: Vec<Bytes> = request.ladder.iter().map(|rung| rung.footprint.total()).collect();
    assert!(totals.windows(2).all(|pair| pair[0] > pair[1]), "{totals:?}");
    assert!(request.advice.iter().all(|rung| rung.context < 16384) && !request.advice.is_empty());
    // Without a GPU the weights stay pages of the file.
    let weights = request.ladder[1].footprint.mapped_bytes();
    assert!(weights > Bytes::gib(28) && weights <= request.reload, "{weights} of {}", request.reload);

    let [with, without, .., least] = &request.ladder[..] else { panic!("{contexts:?}") };
    let cache: u64 = flag(&catalog, with, &[], "--cache-ram").parse().unwrap();
    let (cache, grown) = (Bytes::mib(cache), with.footprint.total() - without.footprint.total());
    // The cache itself, and the page tables that map it.
    assert!(grown >= cache && grown <= cache + Bytes(cache.0 / 512 + 1), "{grown} for {cache}");
    assert_eq!(flag(&catalog, without, &[], "--cache-ram"), "0");
    assert_eq!(flag(&catalog, least, &[], "--ctx-size"), "16384");
}

#[test]
fn an_apu_takes_the_layers_and_instances_share_only_the_file() {
    let root = Root::new("Qwen3-Coder-30B-A3B-Q8_0", "context = 16384\n");
    let catalog = root.catalog();
    let gpus = [apu()];
    let on_gpu = request(&catalog, &gpus).ladder[1].footprint.clone();
    assert!(on_gpu.gpus[0] > Bytes::gib(28), "{on_gpu:?}");
    assert!(on_gpu.private < Bytes::gib(4), "{on_gpu:?}");
    let first = catalog.request(&wish("m"), &[]).unwrap().ladder[0].footprint.clone();
    let second = catalog.request(&wish("m@2"), &[]).unwrap().ladder[0].footprint.clone();
    assert_eq!(first.mapped[0].file, second.mapped[0].file);
    let port = |instance: &str| {
        let rung = catalog.request(&wish(instance), &[]).unwrap().ladder[0].clone();
        let argv = catalog.launch(&wish(instance), &rung, &[]).unwrap().argv;
        let at = argv.iter().position(|word| word == "--port").unwrap();
        argv[at + 1].parse::<u16>().unwrap()
    };
    assert_eq!(port("m@2"), port("m") + 1);
}

#[test]
fn a_context_that_is_asked_for_once_is_exactly_that() {
    let root = Root::new("starcoder2-15b-Q8_0", "context = 16384\ncontext-min = 4096\n");
    let catalog = root.catalog();
    let once = Wish { context: Some(8192), ..wish("m") };
    let ladder = catalog.request(&once, &[]).unwrap().ladder;
    assert!(ladder.iter().all(|rung| rung.context == 8192), "{ladder:?}");
}

#[test]
fn settings_that_a_person_made_are_not_automatic() {
    let root = Root::new("starcoder2-15b-Q8_0", "context = 4096\nprompt-cache = \"1GiB\"\n");
    let catalog = root.catalog();
    let ladder = request(&catalog, &[]).ladder;
    assert_eq!(flag(&catalog, &ladder[ladder.len() - 1], &[], "--cache-ram"), "1024");
    assert!(ladder[0].footprint.private > Bytes::gib(1));
}

#[test]
fn what_is_declared_is_taken_and_what_is_missing_is_named() {
    let root = Root::new("starcoder2-15b-Q8_0", "context = 4096\n");
    let models = root.0.join("etc/plimsoll/models.d");
    let own =
        "command = [\"/bin/true\", \"--port\", \"{port}\"]\nmemory = \"10GiB\"\ngpu-memory = \"8GiB\"\n";
    std::fs::write(models.join("own.toml"), own).unwrap();
    std::fs::write(models.join("lost.toml"), "model = \"/nowhere/lost-00001-of-00002.gguf\"\n").unwrap();
    let catalog = root.catalog();
    let declared = catalog.request(&wish("own"), &[apu()]).unwrap().ladder[0].footprint.clone();
    assert_eq!((declared.private, declared.gpus[0]), (Bytes::gib(2), Bytes::gib(8)));
    let lost = catalog.request(&wish("lost"), &[]).unwrap_err();
    assert!(
        matches!(&lost, CatalogError::Config(why) if why.contains("/nowhere/lost-00001-of-00002.gguf")),
        "{lost}"
    );
    let none = catalog.request(&wish("nothing"), &[]).unwrap_err();
    assert!(matches!(none, CatalogError::NotFound(_)), "{none}");
    // One that was half downloaded.
    let file = catalog.model_files().into_iter().find(|path| path.starts_with(&root.0)).unwrap();
    let length = std::fs::metadata(&file).unwrap().len();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(length / 2).unwrap();
    let short = catalog.request(&wish("m"), &[]).unwrap_err();
    assert!(short.to_string().contains("is shorter than its header says"), "{short}");
}

/// What the gate hands over when the tool has said `answer` of `question`.
fn with_opinion(question: &[String], answer: &str) -> Wish {
    let said = [
        (opinion::QUESTION.to_owned(), serde_json::to_string(question).unwrap()),
        (opinion::ANSWER.to_owned(), answer.to_owned()),
    ];
    Wish { engine: said.into(), ..wish("m") }
}

#[test]
fn the_larger_of_estimate_and_second_opinion_is_charged() {
    let root = Root::new("Phi-3-medium-128k-Q8_0", "context = 16384\ncontext-min = 8192\n");
    let catalog = root.catalog();
    let asked = catalog.question(&wish("m"), &[]).unwrap().unwrap();
    assert_eq!(asked.files.len(), 1);
    let question = asked.arguments;
    let alone = request(&catalog, &[]).ladder;

    // Recorded of the real tool: it agrees, and nothing changes.
    let same = catalog.request(&with_opinion(&question, "Host 14146 3200 171\n"), &[]).unwrap().ladder;
    assert_eq!(same, alone);

    // 100 MiB more of weights, 29 more of compute: both kinds of excess are private, at every context.
    let more = with_opinion(&question, "log\nHost 14246 3200 200 \n");
    let ladder = catalog.request(&more, &[]).unwrap().ladder;
    let added: Vec<Bytes> = ladder
        .iter()
        .zip(&alone)
        .map(|(with, without)| with.footprint.private - without.footprint.private)
        .collect();
    assert!(added[0] >= Bytes::mib(129) && added[0] <= Bytes::mib(131), "{added:?}");
    assert!(added.iter().all(|more| *more == added[0]), "{added:?}");
    assert_eq!(ladder[0].basis.opinion_bytes, added[0]);
    assert_eq!(ladder[0].footprint.mapped, alone[0].footprint.mapped);

    // A plan, for which nobody is asked, has it too; and what is admitted is what is run.
    assert_eq!(request(&catalog, &[]).ladder, ladder);
    assert_ne!(flag(&catalog, &ladder[0], &[], "--cache-ram"), "0");
    assert_eq!(flag(&catalog, &ladder[1], &[], "--cache-ram"), "0");
    let smaller = Wish { context: Some(4096), ..wish("m") };
    assert_eq!(catalog.request(&smaller, &[]).unwrap().ladder[0].basis.opinion_bytes, added[0]);
    let larger = Wish { context: Some(32768), ..wish("m") };
    assert!(catalog.request(&larger, &[]).unwrap().ladder[0].basis.opinion_bytes.is_zero());

    // Another file of that name is another model.
    let file = catalog.model_files().into_iter().find(|path| path.starts_with(&root.0)).unwrap();
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let changed = request(&catalog, &[]).ladder;
    assert!(changed[0].basis.opinion_bytes.is_zero());
    assert_ne!(changed[0].basis.key, alone[0].basis.key);
}

#[test]
fn an_opinion_that_makes_no_sense_changes_nothing() {
    let root = Root::new("Phi-3-medium-128k-Q8_0", "context = 16384\n");
    let catalog = root.catalog();
    let question = catalog.question(&wish("m"), &[]).unwrap().unwrap().arguments;
    let alone = request(&catalog, &[]).ladder;
    let other: Vec<String> = question.iter().map(|word| word.replace("f16", "q8_0")).collect();
    let unified =
        Wish { engine: with_opinion(&question, "Vulkan0 9 9 9\nHost 14246 3200 200\n").engine, ..wish("m") };
    for wish in [
        with_opinion(&other, "Host 99999 9999 999\n"),
        with_opinion(&[], "Host 99999 9999 999\n"),
        with_opinion(&question, "error: no such flag\n"),
        with_opinion(&question, "Host 99999999999999999999 0 0\n"),
        unified,
        Wish {
            engine: [
                (opinion::QUESTION.to_owned(), "{".to_owned()),
                (opinion::ANSWER.to_owned(), String::new()),
            ]
            .into(),
            ..wish("m")
        },
    ] {
        assert_eq!(catalog.request(&wish, &[]).unwrap().ladder, alone);
    }
}

#[test]
fn files_settings_and_engine_have_a_key_together() {
    let root = Root::new("Phi-3-medium-128k-Q8_0", "context = 16384\nprompt-cache = \"0MiB\"\n");
    let catalog = root.catalog();
    let key = |catalog: &RealCatalog, wish: &Wish| {
        let rung = catalog.request(wish, &[]).unwrap().ladder.remove(0);
        (rung.basis.key, rung.basis.engine)
    };
    let engine = |version: &str| Wish {
        engine: [("version".to_owned(), format!("version: {version} (build 11669, commit Debian)"))].into(),
        ..wish("m")
    };
    let first = key(&catalog, &engine("0.7.0"));
    assert_eq!(key(&catalog, &engine("0.7.0")), first);
    assert_eq!(key(&root.catalog(), &engine("0.7.0")), first, "after a restart of the daemon");
    assert_eq!(key(&catalog, &wish("m")), first, "a plan takes what was said last");
    assert_ne!(key(&catalog, &engine("0.7.1")), first);
    assert_eq!(key(&root.catalog(), &wish("m")), (first.0.clone(), String::new()), "nobody was asked");
    let smaller = Wish { context: Some(8192), ..engine("0.7.0") };
    assert_ne!(key(&catalog, &smaller), first);
    let text = std::fs::read_to_string(root.0.join("etc/plimsoll/models.d/m.toml")).unwrap();
    std::fs::write(root.0.join("etc/plimsoll/models.d/m.toml"), text + "cache-type-k = \"q8_0\"\n").unwrap();
    assert_ne!(key(&root.catalog(), &engine("0.7.0")), first);
}

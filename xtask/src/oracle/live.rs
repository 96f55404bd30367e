//! `cargo xtask oracle --live`: the same models put to the engine's own llama-fit-params, now.
//!
//! The tool knows fewer settings than llama-server and rounds down to MiB, so that each measured cell is asked in
//! the tool's terms (`engine::opinion`), and the estimate is made once more in the same ones. It runs on this machine
//! where it is installed, or else in the virtual machine, which has the distribution's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use plimsoll::engine::opinion::{TOOL, compare, in_its_terms, parse, question};
use plimsoll::fit::{Devices, Facts, GpuLayers, Settings, args, estimate};

use super::fixture::{self, Cell};
use super::{OracleOptions, committed, measured};
use crate::host;
use crate::models;
use crate::vm::{Guest, Machine, image::Image};

/// Questions about each model, unless all are asked.
const EACH: usize = 3;
/// One answer takes the tool tens of milliseconds, and a second or two under emulation.
const LIMIT: Duration = Duration::from_secs(60);
/// Where the models lie in the guest.
const GUEST_MODELS: &str = "/root/oracle";

/// A cell in the tool's terms.
struct Question {
    model: String,
    settings: Settings,
    words: Vec<String>,
}

/// What an architecture's cells came to.
#[derive(Default)]
struct Tally {
    asked: usize,
    weights: usize,
    context: usize,
    compute: usize,
}

/// Asks, compares and prints; the code is 1 where weights, or cache and state, differ.
pub fn live(options: &OracleOptions) -> Result<u8> {
    let directory = options.directory.clone().unwrap_or_else(committed);
    let (models, cells) = measured(&directory)?;
    let files = std::env::temp_dir().join(format!("plimsoll-oracle-live-{}", std::process::id()));
    std::fs::create_dir_all(&files)?;
    let local = options.tool.clone().or_else(|| host::find(TOOL));
    let place = if local.is_some() { files.as_path() } else { Path::new(GUEST_MODELS) };
    let questions = questions(&directory, &cells, place, options.every)?;
    let answers = inflated(&directory, &models, &files).and_then(|()| match &local {
        Some(tool) => ask_here(tool, &questions),
        None => ask_in_the_guest(options, &files, &questions),
    });
    let _ = std::fs::remove_dir_all(&files);
    report(&models, &questions, &answers?)
}

fn inflated(directory: &Path, models: &BTreeMap<String, Facts>, files: &Path) -> Result<()> {
    for name in models.keys() {
        fixture::inflate(&directory.join(format!("{name}.txt")), files);
    }
    Ok(())
}

/// How many files a described model has.
fn files_of(description: &Path) -> Result<usize> {
    let text =
        std::fs::read_to_string(description).with_context(|| format!("no {}", description.display()))?;
    Ok(text.lines().filter(|line| line.starts_with("file ")).count())
}

/// Every measured cell without a GPU, each question once, evenly chosen.
fn questions(directory: &Path, cells: &[Cell], place: &Path, all: bool) -> Result<Vec<Question>> {
    let mut of_model: BTreeMap<&str, Vec<Question>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for cell in cells.iter().filter(|cell| cell.device == "cpu" && cell.measured.is_some()) {
        let settings = args::parse(&cell.args, &BTreeMap::new())?.settings;
        // As it is placed on a machine without a GPU.
        let settings = Settings { gpu_layers: GpuLayers::Count(0), ..settings };
        let file = match files_of(&directory.join(format!("{}.txt", cell.model)))? {
            1 => format!("{}.gguf", cell.model),
            n => format!("{}-00001-of-{n:05}.gguf", cell.model),
        };
        let words = question(&place.join(file), &settings);
        if seen.insert(words.clone()) {
            let model = cell.model.clone();
            of_model.entry(&cell.model).or_default().push(Question { model, settings, words });
        }
    }
    let chosen = |questions: Vec<Question>| {
        let step = if all { 1 } else { questions.len().div_ceil(EACH) };
        questions.into_iter().step_by(step.max(1))
    };
    Ok(of_model.into_values().flat_map(chosen).collect())
}

fn ask_here(tool: &Path, questions: &[Question]) -> Result<Vec<String>> {
    println!("{} on this machine, {} questions", tool.display(), questions.len());
    let ask = |question: &Question| {
        let done = Command::new("timeout")
            .arg(LIMIT.as_secs().to_string())
            .arg(tool)
            .args(&question.words)
            .env_clear()
            .stdin(Stdio::null())
            .output()?;
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    };
    questions.iter().map(ask).collect()
}

fn ask_in_the_guest(options: &OracleOptions, files: &Path, questions: &[Question]) -> Result<Vec<String>> {
    let image = Image::ensure(&options.image)?;
    let disk = models::ensure_disk()?;
    let guest = Guest::connect(Machine::start(&image, &disk, &options.machine)?)?;
    guest.ok(&format!("mkdir -p {GUEST_MODELS}"))?;
    // Headers and holes: the archive is as small as the headers.
    let archive = files.join("models.tar");
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(files)?.flatten().map(|entry| entry.file_name().into()).collect();
    names.sort();
    host::output(
        Command::new("tar").arg("-C").arg(files).args(["--sparse", "-cf"]).arg(&archive).args(&names),
    )?;
    guest.copy_in(&archive, &format!("{GUEST_MODELS}/models.tar"))?;
    guest.ok_within(&format!("cd {GUEST_MODELS} && tar -xf models.tar && rm models.tar"), LIMIT * 5)?;
    let version = guest.ok(&format!(
        "dpkg-query -W -f '${{Package}} ${{Version}}' $(dpkg -S $(command -v {TOOL}) | cut -d: -f1)"
    ))?;
    println!("{version} in the virtual machine, {} questions", questions.len());
    let mut answers: Vec<String> = Vec::new();
    for (n, question) in questions.iter().enumerate() {
        if n % 20 == 19 {
            println!("{} of {} asked", n + 1, questions.len());
        }
        let words: Vec<String> = question.words.iter().map(|word| format!("'{word}'")).collect();
        let script = format!("timeout {} {TOOL} {} 2>/dev/null", LIMIT.as_secs(), words.join(" "));
        let done = guest.run_within(&script, LIMIT + LIMIT)?;
        ensure!(done.code != 255, "the guest is gone");
        answers.push(done.stdout);
    }
    Ok(answers)
}

fn report(models: &BTreeMap<String, Facts>, questions: &[Question], answers: &[String]) -> Result<u8> {
    let mut tallies: BTreeMap<&str, Tally> = BTreeMap::new();
    let mut differences = String::new();
    let (mut wrong, mut silent) = (0, 0);
    for (question, answer) in questions.iter().zip(answers) {
        let facts = models.get(&question.model).context("no such model")?;
        let name = format!("{} {}", question.model, question.words[6..].join(" "));
        let Some(opinion) = parse(answer) else {
            silent += 1;
            writeln!(differences, "no answer: {name}")?;
            continue;
        };
        let ours = estimate(facts, &in_its_terms(&question.settings), &Devices::none())?;
        let comparison = compare(&opinion, &ours).map_err(anyhow::Error::msg)?;
        let tally = tallies.entry(&facts.architecture).or_default();
        tally.asked += 1;
        for kind in ["weights", "context", "compute"] {
            let agree = comparison.rows.iter().filter(|row| row.kind == kind).all(|row| row.agrees());
            let count = match kind {
                "weights" => &mut tally.weights,
                "context" => &mut tally.context,
                _ => &mut tally.compute,
            };
            *count += usize::from(agree);
            wrong += usize::from(!agree && kind != "compute");
        }
        for row in comparison.rows.iter().filter(|row| !row.agrees()) {
            let mib = |bytes: u64| bytes >> 20;
            writeln!(
                differences,
                "{} of {}: {} MiB here, {} MiB the tool: {name}",
                row.kind,
                row.place,
                mib(row.estimate),
                mib(row.tool)
            )?;
        }
    }
    println!("{:16} {:>5} | the same: {:>7} {:>11} {:>7}", "", "asked", "weights", "cache+state", "compute");
    let mut all = Tally::default();
    for (name, tally) in &tallies {
        print(name, tally);
        all.asked += tally.asked;
        all.weights += tally.weights;
        all.context += tally.context;
        all.compute += tally.compute;
    }
    print("all", &all);
    print!("{differences}");
    println!("{wrong} differences in weights, cache or state; {silent} questions without an answer");
    ensure!(all.asked > 0, "the tool gave no answer that makes sense");
    Ok(u8::from(wrong > 0))
}

fn print(name: &str, tally: &Tally) {
    println!(
        "{name:16} {:5} |           {:7} {:11} {:7}",
        tally.asked, tally.weights, tally.context, tally.compute
    );
}

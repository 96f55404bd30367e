//! `cargo xtask demo`: the story of the README, played on a virtual machine or on this one.

use crate::install::{self, InstallOptions};
use crate::models::{self, MODELS, gguf::shard_path};
use crate::vm::{Guest, ImageOptions, Machine, MachineOptions, guest::Output, image::Image};
use crate::{deb, host};
use anyhow::{Context, Result, bail, ensure};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Where to play.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoOptions {
    /// Install and play on this machine instead of a virtual one; systemd has to be its PID 1
    #[arg(long)]
    pub host: bool,
    /// With --host: take plimsoll and plimsolld from this directory instead of building them
    #[arg(long, value_name = "DIR", requires = "host")]
    pub programs: Option<PathBuf>,
    /// How to boot
    #[command(flatten)]
    pub machine: MachineOptions,
    /// What to boot
    #[command(flatten)]
    pub image: ImageOptions,
}

/// A load under emulation takes seconds; this is far beyond.
const LIMIT: Duration = Duration::from_secs(300);
/// What the models may take together on a machine that is not ours: small enough for the story.
const HOST_LIMIT: &str = "1400M";
const HOST_DROP_IN: &str = "/run/systemd/system/llm.slice.d/zz-plimsoll-demo.conf";
const HOST_MODELS: &str = "/var/lib/plimsoll-demo";

/// Where the story plays.
enum Place {
    Guest(Box<Guest>),
    Here,
}

impl Place {
    fn models(&self) -> &'static str {
        match self {
            Place::Guest(_) => crate::lab::MODELS,
            Place::Here => HOST_MODELS,
        }
    }

    /// Runs a shell script as root.
    fn run(&self, script: &str) -> Result<Output> {
        match self {
            Place::Guest(guest) => guest.run_within(script, LIMIT),
            Place::Here => {
                let done = host::as_root("sh")?.args(["-c", script]).stdin(Stdio::null()).output()?;
                Ok(Output {
                    code: done.status.code().unwrap_or(-1),
                    stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
                    stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
                })
            }
        }
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        match self {
            Place::Guest(guest) => guest.write(path, text),
            Place::Here => {
                let mut child =
                    host::as_root("tee")?.arg(path).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
                child.stdin.take().context("no standard input")?.write_all(text.as_bytes())?;
                ensure!(child.wait()?.success(), "cannot write {path}");
                Ok(())
            }
        }
    }
}

/// The story, told step by step.
struct Story {
    place: Place,
    started: Instant,
}

impl Story {
    fn say(&self, words: &str) {
        println!("\n[{:3} s] {words}", self.started.elapsed().as_secs());
    }

    /// Runs a command as a person would type it, and shows it with what it prints.
    fn show(&self, command: &str) -> Result<Output> {
        println!("    # {command}");
        let done = self.place.run(command)?;
        for line in done.all().lines() {
            println!("    {line}");
        }
        Ok(done)
    }

    /// [`Story::show`] of something that has to succeed.
    fn works(&self, command: &str) -> Result<Output> {
        let done = self.show(command)?;
        ensure!(done.code == 0, "that should have worked, but exited with {}", done.code);
        Ok(done)
    }

    /// [`Story::show`] of something that has to be refused.
    fn refused(&self, instance: &str) -> Result<()> {
        let done = self.show(&format!("systemctl start llm@{instance}"))?;
        ensure!(done.code != 0, "that should have been refused");
        self.show(&format!("systemctl status --no-pager llm@{instance} | tail -n 6"))?;
        Ok(())
    }

    /// Asks a model for a few words.
    fn ask(&self, port: u16) -> Result<()> {
        let body = r#"{"prompt":"The mark on the hull","n_predict":4}"#;
        let command = format!(
            "curl -fsS -H 'Content-Type: application/json' -d '{body}' http://127.0.0.1:{port}/completion"
        );
        println!("    # {command}");
        let done = self.place.run(&command)?;
        let reply: serde_json::Value = serde_json::from_str(&done.stdout).unwrap_or_default();
        let Some(tokens) = reply["tokens_predicted"].as_u64() else { bail!("no completion: {}", done.all()) };
        println!("    it answers: {tokens} tokens, {:.1} a second", reply["timings"]["predicted_per_second"]);
        Ok(())
    }
}

/// Plays the story; the time it took is printed at the end.
pub fn demo(options: &DemoOptions) -> Result<()> {
    let started = Instant::now();
    let place = if options.host { prepare_host(options)? } else { prepare_guest(options)? };
    let mut story = Story { place, started };
    let played = play(&mut story);
    if matches!(story.place, Place::Here) {
        leave_host(&story)?;
    }
    played?;
    story.say("That was the story. Everything in it was real: systemd, cgroups, llama-server, the package.");
    Ok(())
}

fn prepare_guest(options: &DemoOptions) -> Result<Place> {
    // First what may ask for sudo, then what takes its time.
    println!("Getting the virtual machine ready: Debian with systemd and the distribution's llama-server.");
    let image = Image::ensure(&options.image)?;
    let disk = models::ensure_disk()?;
    println!("Building Plimsoll and its package.");
    let package = deb::build("release", "")?;
    println!("Booting it.");
    let guest = Guest::connect(Machine::start(&image, &disk, &options.machine)?)?;
    println!("Installing {} in it.", package.display());
    guest.write("/etc/plimsoll/plimsoll.toml", "reserve = \"256MiB\"\n")?;
    guest.copy_in(&package, "/root/plimsoll.deb")?;
    guest.ok_within("dpkg -i /root/plimsoll.deb", LIMIT)?;
    Ok(Place::Guest(Box::new(guest)))
}

fn prepare_host(options: &DemoOptions) -> Result<Place> {
    ensure!(
        Path::new("/run/systemd/system").exists(),
        "systemd is not PID 1 on this machine: play without --host, in a virtual machine"
    );
    for (command, package) in [("llama-server", "llama.cpp-tools"), ("curl", "curl")] {
        if host::find(command).is_none() {
            host::install(&[package]).with_context(|| format!("the story needs {command}"))?;
        }
    }
    let place = Place::Here;
    let running = place.run("systemctl list-units --no-legend --plain 'llm@*.service'")?;
    ensure!(
        running.stdout.is_empty(),
        "models run on this machine; the story would disturb them: {}",
        running.stdout
    );
    println!("Building Plimsoll and installing it on this machine.");
    let programs = install::programs(options.programs.as_deref(), "release")?;
    if host::find("dpkg").is_some() {
        let package = deb::pack(&programs, "")?;
        host::run(host::as_root("dpkg")?.arg("-i").arg(package))?;
    } else {
        let programs = Some(programs);
        install::install(&InstallOptions { destdir: None, prefix: "/usr".into(), programs })?;
        host::run(host::as_root("systemctl")?.args(["enable", "--now", "plimsolld.service"]))?;
    }
    println!("Generating the models into {HOST_MODELS}.");
    let tree = host::source_root().join("target/demo-models");
    let _ = std::fs::remove_dir_all(&tree);
    std::fs::create_dir_all(&tree)?;
    for model in
        MODELS.iter().filter(|model| ["small", "mid", "twin", "large", "impossible"].contains(&model.name))
    {
        model.write(&tree)?;
    }
    models::broken::write_all(&tree)?;
    host::run(host::as_root("mkdir")?.args(["-p", HOST_MODELS]))?;
    host::run(host::as_root("cp")?.args(["-r", "--sparse=always"]).arg(tree.join(".")).arg(HOST_MODELS))?;
    host::run(host::as_root("chmod")?.args(["-R", "a+rX", HOST_MODELS]))?;
    println!(
        "Limiting all models together to {HOST_LIMIT}, so that the story plays on a machine of any size."
    );
    // A drop-in of its own, which can go without touching what an administrator has set.
    host::run(host::as_root("mkdir")?.arg("-p").arg(Path::new(HOST_DROP_IN).parent().context("no parent")?))?;
    place.write(HOST_DROP_IN, &format!("[Slice]\nMemoryMax={HOST_LIMIT}\n"))?;
    host::run(host::as_root("systemctl")?.arg("daemon-reload"))?;
    Ok(place)
}

fn leave_host(story: &Story) -> Result<()> {
    story.say("Cleaning up: the story's models go, Plimsoll stays installed.");
    story.place.run(&format!(
        "systemctl stop 'llm@demo-*.service'; systemctl reset-failed 'llm@demo-*.service'; \
         rm -f /etc/plimsoll/models.d/demo-*.toml {HOST_DROP_IN}; \
         rm -rf {HOST_MODELS} /var/cache/plimsoll/demo-* /run/systemd/system.control/llm@demo-*; \
         rmdir --ignore-fail-on-non-empty {directory}; \
         systemctl daemon-reload; systemctl reload plimsolld.service",
        directory = HOST_DROP_IN.trim_end_matches("/zz-plimsoll-demo.conf"),
    ))?;
    let _ = std::fs::remove_dir_all(host::source_root().join("target/demo-models"));
    Ok(())
}

fn play(story: &mut Story) -> Result<()> {
    let models = story.place.models();
    let file = |base: &str, shards: u16| match shards {
        1 => format!("{models}/{base}.gguf"),
        _ => shard_path(&Path::new(models).join(base), 1, shards).display().to_string(),
    };
    let mid = file("mid", 4);
    for (name, path, port, priority) in [
        ("small", file("small", 1), 8001, 60),
        ("mid", mid.clone(), 8002, 40),
        ("twin", file("twin", 1), 8003, 30),
        ("large", file("large", 1), 8004, 80),
        ("impossible", file("impossible", 1), 8005, 90),
        ("broken", file("missing/model", 4), 8006, 90),
    ] {
        let text = format!("model = \"{path}\"\ncontext = 1024\nport = {port}\npriority = {priority}\n");
        story.place.write(&format!("/etc/plimsoll/models.d/demo-{name}.toml"), &text)?;
    }

    story.say("Six models are configured. One of them looks like this:");
    story.works("cat /etc/plimsoll/models.d/demo-large.toml && systemctl reload plimsolld")?;
    story.say("What will a model take? Answered from the files' headers, before anything is loaded:");
    story.works(&format!("plimsoll fit {mid} -c 1024 -c 4096"))?;
    story.say("Three models start. systemctl returns when a model answers.");
    for (name, port) in [("small", 8001), ("mid", 8002), ("twin", 8003)] {
        story.works(&format!("systemctl start llm@demo-{name}"))?;
        story.ask(port)?;
    }
    story.say("What was predicted, what is measured, and what is left:");
    story.works("plimsoll status")?;
    story.say("A large model of higher priority. What would have to go for it? Asking changes nothing:");
    story.show("plimsoll plan demo-large")?;
    story.say("It starts: what has to go is stopped through systemd, and nothing else.");
    story.works("systemctl start llm@demo-large")?;
    story.ask(8004)?;
    story.works("systemctl list-units --all --no-pager --no-legend 'llm@demo-*'")?;
    story
        .say("A model that can't fit. It is refused at once with the arithmetic; nothing is stopped for it.");
    story.refused("demo-impossible")?;
    story.say("A model with a shard missing. Found before anything is touched.");
    story.refused("demo-broken")?;
    story
        .say("The daemon is killed. The model doesn't notice; systemd brings the daemon back, and it knows.");
    story.works("before=$(systemctl show --value -p MainPID plimsolld); kill -9 $before; \
        while now=$(systemctl show --value -p MainPID plimsolld); [ $now = 0 ] || [ $now = $before ]; do :; done; \
        echo \"plimsolld: $before, then $now\"")?;
    story.ask(8004)?;
    story.works("plimsoll status")?;
    story.say("Why is it as it is? The last decision on the model that was refused:");
    story.show("plimsoll explain demo-impossible")?;
    if let Place::Guest(guest) = &mut story.place {
        println!("\n         The machine reboots with three models enabled of which not all fit.");
        guest.ok("systemctl enable --quiet llm@demo-mid llm@demo-large llm@demo-impossible")?;
        guest.reboot_and_wait()?;
        guest.wait_until(
            "every start is decided",
            LIMIT,
            "! systemctl list-jobs --no-legend | grep -q llm@",
        )?;
        story.works("systemctl list-units --all --no-pager --no-legend 'llm@demo-*'")?;
        story.ask(8004)?;
    }
    Ok(())
}

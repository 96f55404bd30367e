//! An engine that is a container image, under the real podman.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Context, Result, ensure};
use plimsoll::bytes::Bytes;
use std::time::{Duration, Instant};

/// The image that is made in the guest, without a registry.
const IMAGE: &str = "localhost/llama-server:guest";
/// Where its configuration lies; [`Lab::clean`] takes it away.
const SETTINGS: &str = "/etc/plimsoll/plimsoll.toml.d/container.toml";
/// How long the unit may take to stop (TimeoutStopSec=).
const STOP: Duration = Duration::from_secs(45);

/// The guest's llama-server with all that it loads, as an image that starts it, and that has settings of its own.
const BUILD: &str = r#"
set -eu
podman image exists "$IMAGE" && exit 0
backends=$(dpkg -L $(dpkg-query -W -f '${Package}\n' 'libggml*') | grep -E '/libggml[^/]*\.so' | sort -u)
libraries=$(ldd /usr/bin/llama-server $backends | grep -oE '/[^ ]+\.so[^ ]*' | sort -u)
tar -C / --dereference -c $(printf '%s\n' usr/bin/llama-server $backends $libraries | sed 's,^/,,' | sort -u) |
  podman import --change 'ENTRYPOINT ["/usr/bin/llama-server"]' --change 'ENV LLAMA_ARG_CTX_SIZE=64' - "$IMAGE"
podman image exists "$IMAGE"
"#;

fn configure(lab: &Lab, models: &[Config]) -> Result<()> {
    lab.guest.write(SETTINGS, &format!("[engine.boxed]\nimage = \"{IMAGE}\"\n"))?;
    lab.configure(models)
}

fn build(lab: &Lab) -> Result<()> {
    lab.guest.ok_within(&format!("IMAGE={IMAGE}; {BUILD}"), PATIENCE).map(|_| ())
}

/// A number of memory.stat or another file of the unit's control group.
fn of_group(lab: &Lab, instance: &str, file: &str, key: &str) -> Result<u64> {
    let group = lab.property(instance, "ControlGroup")?;
    let text = lab.guest.ok(&format!("cat /sys/fs/cgroup{group}/{file}"))?;
    let line = text.lines().find(|line| key.is_empty() || line.split(' ').next() == Some(key));
    let number = line.and_then(|line| line.split(' ').next_back()?.parse().ok());
    number.with_context(|| format!("no number {key:?} in {file} of {group}: {text}"))
}

/// The process of llama-server in the unit: it has the unit's control group, and neither rights nor root.
fn payload(lab: &Lab, instance: &str) -> Result<u32> {
    let group = lab.property(instance, "ControlGroup")?;
    let script = format!(
        "for pid in $(find /sys/fs/cgroup{group} -name cgroup.procs -exec cat {{}} +); do \
           test \"$(cat /proc/$pid/comm)\" = llama-server && echo $pid; done; true"
    );
    let found = lab.guest.ok(&script)?;
    let pid = found.parse().with_context(|| {
        format!(
            "not one llama-server in {group}: {found:?}\n{}",
            lab.unit_status(instance).unwrap_or_default()
        )
    })?;
    Ok(pid)
}

/// No container, and none of the processes that look after one, is left.
fn nothing_is_left(lab: &Lab) -> Result<()> {
    let left = lab.guest.ok("podman ps --all --quiet; pgrep --list-full 'podman|conmon|crun'; true")?;
    ensure!(left.is_empty(), "left of the container: {left}\n{}", lab.guest.evidence());
    Ok(())
}

/// A container engine "runs under real podman inside the unit's own cgroup (limits, measurement and stop hold)", as the
/// engines' user, with its files read only.
pub fn runs_in_its_unit(lab: &mut Lab) -> Result<()> {
    lab.guest.ok("podman image rm --force --ignore localhost/llama-server:guest")?;
    let boxed = Config::new("mid", 8001)
        .split("mid", 4)
        .with("engine = \"boxed\"")
        .with("environment = { HF_TOKEN = \"c0ffee-of-the-stevedore\" }");
    configure(lab, &[boxed.priority(60), Config::new("small", 8003).priority(10)])?;
    // Without the image nobody goes, and the sentence says what to do.
    lab.serve("small", 8003)?;
    lab.refused("mid", 78, &[IMAGE])?;
    let journal = lab.guest.ok("journalctl -b --no-pager -o cat -u llm@mid.service")?;
    ensure!(journal.contains(&format!("podman pull {IMAGE}")), "no advice: {journal}");
    ensure!(lab.state("small")? == "active", "an image that is not there has cost somebody its place");
    build(lab)?;
    // Nor with a program that is not in it.
    lab.guest.write(
        SETTINGS,
        &format!("[engine.boxed]\nimage = \"{IMAGE}\"\nprogram = \"/app/llama-server\"\n"),
    )?;
    lab.refused("mid", 78, &["'/app/llama-server' can't be run in the image"])?;
    ensure!(lab.state("small")? == "active", "a program that is not there has cost somebody its place");
    lab.guest.write(SETTINGS, &format!("[engine.boxed]\nimage = \"{IMAGE}\"\n"))?;
    let started = Instant::now();
    lab.serve("mid", 8001)?;
    println!("          start to answer: {:.1} s", started.elapsed().as_secs_f32());
    let group = lab.property("mid", "ControlGroup")?;
    ensure!(group == "/llm.slice/llm@mid.service", "the unit is in {group}");

    // All processes of the container are where the unit is.
    let places = lab
        .guest
        .ok("for pid in $(pgrep 'podman|conmon|crun'; pgrep --full '[l]lama-server.*--port 8001'); do \
           echo \"$(cat /proc/$pid/comm) $(cut -d: -f3 /proc/$pid/cgroup)\"; done | sort -u")?;
    println!("          {}", places.replace('\n', ", "));
    ensure!(places.contains("llama-server /") && places.contains("conmon /"), "{places}");
    ensure!(places.lines().all(|line| line.ends_with("/llm.slice/llm@mid.service")), "outside: {places}");
    confined(lab, payload(lab, "mid")?)?;
    limited_and_measured(lab)?;

    let started = Instant::now();
    lab.guest.ok_within("systemctl stop llm@mid.service", PATIENCE)?;
    println!("          stop: {:.1} s", started.elapsed().as_secs_f32());
    ensure!(started.elapsed() < STOP, "it took {} s to stop", started.elapsed().as_secs());
    let result = lab.property("mid", "Result")?;
    ensure!(result == "success", "stopped with {result}: {}", lab.unit_status("mid")?);
    nothing_is_left(lab)
}

/// The engine is unprivileged, sees its files and can't change them.
fn confined(lab: &Lab, pid: u32) -> Result<()> {
    let seen = lab.guest.ok(&format!(
        "id -u plimsoll-llm; awk '/^(Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):/ {{print $1 $2}}' /proc/{pid}/status; \
         id -G plimsoll-llm | tr ' ' '\\n' | sort -n | xargs echo groups; \
         awk '/^Groups:/ {{$1=\"\"; print}}' /proc/{pid}/status | tr ' ' '\\n' | grep . | sort -n | xargs echo has; \
         grep 'Max locked memory' /proc/{pid}/limits | tr -s ' '; cat /proc/{pid}/oom_score_adj; \
         tr '\\0' '\\n' < /proc/{pid}/environ"
    ))?;
    let lines: Vec<&str> = seen.lines().map(str::trim_end).collect();
    let user = format!("Uid:{}", lines.first().copied().unwrap_or_default());
    for expected in [
        user.as_str(),
        "CapEff:0000000000000000",
        "CapBnd:0000000000000000",
        "NoNewPrivs:1",
        "Seccomp:2",
        "Max locked memory unlimited unlimited bytes",
        "500",
        "HOME=/var/cache/plimsoll/mid",
        "HF_TOKEN=c0ffee-of-the-stevedore",
    ] {
        ensure!(lines.contains(&expected), "no {expected:?} in {seen}");
    }
    let of = |word: &str| lines.iter().find_map(|line| line.strip_prefix(word)).unwrap_or_default();
    ensure!(!of("groups").is_empty() && of("groups") == of("has"), "other groups than its user's: {seen}");
    ensure!(!seen.contains("LLAMA_ARG_CTX_SIZE"), "a setting of the image was not priced: {seen}");
    ensure!(!seen.contains("NOTIFY_SOCKET"), "{seen}");
    let told = lab.guest.ok("cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -a c0ffee-of-[t]he; true")?;
    ensure!(told.is_empty(), "the list of processes shows a secret: {told}");
    for place in ["srv/models/mid-00001-of-00004.gguf", "srv/models/new", "usr/bin/new"] {
        let written = lab.guest.run(&format!(": >> /proc/{pid}/root/{place}"))?;
        ensure!(
            written.code != 0 && written.all().contains("Read-only file system"),
            "{place} can be written in the container: {}",
            written.all()
        );
    }
    lab.guest.ok(&format!(
        "cmp /srv/models/mid-00002-of-00004.gguf /proc/{pid}/root/srv/models/mid-00002-of-00004.gguf"
    ))?;
    let others = lab.guest.ok(&format!("ls /proc/{pid}/root/srv/models"))?;
    ensure!(others.lines().count() == 4, "it sees other models: {others}");
    Ok(())
}

/// The unit's limits are those of the payload, and what the daemon measures is what the unit holds.
fn limited_and_measured(lab: &Lab) -> Result<()> {
    let high: u64 = lab.property("mid", "MemoryHigh")?.parse()?;
    let max: u64 = lab.property("mid", "MemoryMax")?.parse()?;
    // The kernel counts pages.
    let set = of_group(lab, "mid", "memory.max", "")?;
    ensure!(set == max / 4096 * 4096 && max < 2 << 30, "MemoryMax={max}, memory.max={set}");
    let anon = of_group(lab, "mid", "memory.stat", "anon")?;
    let model = lab.model("mid")?;
    let (predicted, measured) = (&model.predicted, &model.measured);
    println!(
        "          limits: high {}, max {}; predicted {} private, {} mapped; measured {} private; anon {}",
        Bytes(high),
        Bytes(max),
        predicted.private_bytes,
        predicted.mapped_bytes,
        measured.private_bytes,
        Bytes(anon)
    );
    // Beside it there are page tables and the like; the daemon looked a moment earlier.
    let (least, most) = (Bytes(anon) - Bytes::mib(8), Bytes(anon) + Bytes::mib(8));
    ensure!((least..=most).contains(&measured.private_bytes), "{measured:?}, anon {anon}");
    ensure!(measured.private_bytes <= predicted.private_bytes, "{model:?}");
    Ok(())
}

/// "kill -9 of the main process ends the container too", which comes back through the gate; and one of higher priority
/// makes it go.
pub fn ends_and_gives_way(lab: &mut Lab) -> Result<()> {
    build(lab)?;
    let boxed = Config::new("rival-b", 8002).priority(40).with("engine = \"boxed\"");
    configure(lab, &[Config::new("rival-a", 8001).priority(70), boxed])?;
    lab.serve("rival-b", 8002)?;
    let (main, engine) = (lab.main_pid("rival-b")?, payload(lab, "rival-b")?);
    let cursor = lab.guest.journal_cursor()?;
    lab.guest.ok(&format!("kill -KILL {main}"))?;
    lab.guest.wait_until(
        "the engine is gone with podman",
        STOP,
        &format!("! kill -0 {engine} 2>/dev/null"),
    )?;
    lab.guest.wait_for("it answers again", PATIENCE, |guest| {
        let now = lab.property("rival-b", "MainPID")?.parse::<u32>()?;
        let active = lab.state("rival-b")? == "active";
        Ok((active && now != 0 && now != main && guest.completion(8002).is_ok()).then_some(()))
    })?;
    let journal = lab.guest.journal_since(&cursor, "-u plimsolld.service")?;
    ensure!(journal.contains("rival-b is admitted"), "the restart did not pass the gate: {journal}");
    let containers = lab.guest.ok("podman ps --all --format '{{.Names}}'")?;
    ensure!(containers == "plimsoll-rival-b", "{containers}");
    lab.serve("rival-a", 8001)?;
    ensure!(lab.state("rival-b")? == "inactive", "{}", lab.unit_status("rival-b")?);
    nothing_is_left(lab)?;
    lab.no_oom_kill()
}

/// "`toolbox run` and `podman exec`, which escape the unit, are refused with that advice"; and a unit that was made for
/// another engine than the model's says so.
pub fn escapes_are_refused(lab: &mut Lab) -> Result<()> {
    configure(lab, &[Config::new("small", 8001)])?;
    for command in ["\"/usr/bin/podman\", \"exec\", \"llama\"", "\"/usr/bin/env\", \"toolbox\", \"run\""] {
        lab.guest.write(
            "/etc/plimsoll/models.d/escapes.toml",
            &format!("command = [{command}, \"llama-server\"]\nmemory = \"1GiB\"\nport = 8002\n"),
        )?;
        let said = lab.guest.run("plimsoll validate")?;
        ensure!(said.code == 78 && said.all().contains("[engine.NAME]"), "{}: {}", said.code, said.all());
        lab.refused("escapes", 78, &["outside of the unit"])?;
    }
    // Without a daemon-reload the unit is not the one of a container, and the other way round.
    lab.guest.ok("echo 'engine = \"boxed\"' >> /etc/plimsoll/models.d/small.toml")?;
    lab.refused("small", 78, &["not prepared for containers"])?;
    lab.guest.ok("systemctl daemon-reload && sed -i /^engine/d /etc/plimsoll/models.d/small.toml")?;
    lab.refused("small", 78, &["still has the rights of a container"])?;
    lab.guest.ok("systemctl daemon-reload")?;
    lab.serve("small", 8001)
}

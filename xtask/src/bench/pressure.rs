//! Something eats the guest's memory while models idle: Plimsoll beside earlyoom and systemd-oomd of the distribution.
//!
//! The eater is bounded by what models can give back: it takes all that is available but 64 MiB, and one model gone is
//! enough for it. The line for all three is a tenth of memory, which is where earlyoom acts of its own accord, and half
//! of the reserve that ours is given; what happens is judged by a process in the guest that looks every 5 ms. The engines hold memory of their own that can't
//! be compressed, and answer on a health page; nothing else of a real one matters here.

use super::{quantile, ssh};
use crate::lab::{Lab, PATIENCE};
use crate::scenarios::pressure::calm;
use anyhow::{Context, Result, ensure};
use plimsoll::bytes::Bytes;
use serde_json::Value;
use std::fmt;
use std::time::Duration;

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Of pressure: how often each case is run
    #[arg(long, default_value_t = 5, value_name = "RUNS")]
    pub runs: usize,
    /// Of pressure: only the protector with this in its name (plimsoll, earlyoom, systemd-oomd)
    #[arg(long, value_name = "NAME")]
    pub protector: Option<String>,
    /// Of pressure: only the cases with swap, or only those without it
    #[arg(long, value_name = "YES|NO", value_parser = clap::builder::BoolishValueParser::new())]
    pub swap: Option<bool>,
    /// Of pressure: for how long a load that fits has to leave everybody alone; 0 leaves it out
    #[arg(long, default_value_t = 0, value_name = "MINUTES")]
    pub calm_minutes: u64,
}

/// Names, ports, priorities: the first one is the least important.
const MODELS: [(&str, u16, u8); 3] = [("low", 8001, 10), ("middle", 8002, 50), ("high", 8003, 90)];
/// What each holds.
const EACH: Bytes = Bytes::mib(220);
/// What the eater leaves of what is available.
const LEFT: Bytes = Bytes::mib(64);
/// All three are to act when less than this part of memory is left.
const LINE: u64 = 10;
/// How long it stays.
const MEAL: u64 = 5;
/// How long models run before anything happens; seconds.
const STAY: u64 = 62;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protector {
    Plimsoll,
    Earlyoom,
    Oomd,
}

impl Protector {
    const ALL: [Self; 3] = [Self::Plimsoll, Self::Earlyoom, Self::Oomd];

    fn name(self) -> &'static str {
        match self {
            Self::Plimsoll => "plimsoll",
            Self::Earlyoom => "earlyoom",
            Self::Oomd => "systemd-oomd",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Plimsoll => "plimsolld.service",
            Self::Earlyoom => "earlyoom.service",
            Self::Oomd => "systemd-oomd.service",
        }
    }
}

/// One run.
#[derive(Debug, Default)]
struct Run {
    /// Less was left than the line says.
    deficit: bool,
    /// From the deficit to the first process gone; negative: before the line was crossed. None: nothing was stopped, or there was no deficit.
    action_msec: Option<i64>,
    gone: Vec<String>,
    oom_kills: u64,
    over_half_msec: u64,
    greetings: Vec<Duration>,
    orphans: u64,
}

/// All of them, as rows of a table.
pub fn bench(lab: &Lab, options: &Options) -> Result<()> {
    lab.bring_strain()?;
    if options.calm_minutes > 0 {
        calm(lab, Duration::from_secs(options.calm_minutes * 60))?;
        println!(
            "{} minutes of disk load, a throttled mmap reader and tmpfs: nobody was stopped",
            options.calm_minutes
        );
    }
    if options.runs == 0 {
        return Ok(());
    }
    configure(lab)?;
    let ((), idle) = ssh::asked(lab, || lab.guest.ok("timeout 10 tail -f /dev/null; true").map(drop))?;
    println!("sshd's greeting while nothing happens: p99 {} ms", millis(quantile(&idle, 99)));
    println!(
        "| protector | swap | eater | gone (runs) | runs with a deficit | action after it, ms: median, p99 | kernel OOM kills | full PSI > 50 %, s at most | sshd p99, ms | orphans |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for swap in [false, true].into_iter().filter(|swap| options.swap.is_none_or(|wanted| wanted == *swap)) {
        set_swap(lab, swap)?;
        for (rate, eater) in [(Bytes(200_000_000), "200 MB/s"), (Bytes::ZERO, "full speed")] {
            let wanted = |protector: &Protector| {
                options.protector.as_ref().is_none_or(|wanted| protector.name().contains(wanted.as_str()))
            };
            let mut rows: Vec<(Protector, Vec<Run>)> =
                Protector::ALL.into_iter().filter(wanted).map(|protector| (protector, Vec::new())).collect();
            // In turns: whatever else the machine does meanwhile meets all of them.
            for _ in 0..options.runs {
                for (protector, runs) in &mut rows {
                    let run = once(lab, *protector, rate);
                    runs.push(
                        run.with_context(|| format!("{} with swap {swap} at {eater}", protector.name()))?,
                    );
                }
            }
            let swap = if swap { "512 MiB" } else { "none" };
            for (protector, runs) in &rows {
                println!("| {} | {swap} | {eater} | {} |", protector.name(), Cells(runs));
            }
        }
    }
    set_swap(lab, false)?;
    protect_by(lab, Protector::Plimsoll)
}

fn configure(lab: &Lab) -> Result<()> {
    // Whoever an earlier part has left has a port that is needed here.
    lab.guest.ok_within("systemctl stop 'llm@*.service'", PATIENCE)?;
    lab.configure(&[])?;
    for (name, _, priority) in MODELS {
        let port = MODELS.iter().find(|model| model.0 == name).map_or(0, |model| model.1);
        let toml = format!(
            "command = [\"{}\", \"engine\", \"--bytes\", \"{}\", \"--port\", \"{{port}}\"]\n\
             memory = \"{}\"\nport = {port}\npriority = {priority}\n",
            Lab::STRAIN,
            EACH.0,
            (EACH + Bytes::mib(16)).0
        );
        lab.guest.write(&format!("/etc/plimsoll/models.d/{name}.toml"), &toml)?;
    }
    // Ours acts below half of its reserve: at the same line as earlyoom.
    let reserve = total(lab)?.mul_div(1, LINE) * 2;
    lab.guest.write(
        "/etc/plimsoll/plimsoll.toml.d/line.toml",
        &format!("reserve = \"{}MiB\"\n", reserve.0 >> 20),
    )?;
    // systemd-oomd does nothing without being told what for: what its own documentation recommends.
    for slice in ["-.slice", "system.slice", "llm.slice"] {
        let keys = match slice {
            "-.slice" => "ManagedOOMSwap=kill",
            _ => "ManagedOOMMemoryPressure=kill\nManagedOOMMemoryPressureLimit=50%",
        };
        lab.guest
            .write(&format!("/etc/systemd/system/{slice}.d/oomd.conf"), &format!("[Slice]\n{keys}\n"))?;
    }
    lab.guest.ok("systemctl daemon-reload && systemctl reload plimsolld.service").map(|_| ())
}

/// MemTotal of the guest.
fn total(lab: &Lab) -> Result<Bytes> {
    let kib: u64 = lab.guest.ok("awk '/^MemTotal:/ {print $2}' /proc/meminfo")?.parse()?;
    Ok(Bytes(kib * 1024))
}

fn set_swap(lab: &Lab, on: bool) -> Result<()> {
    let script = if on {
        "test -e /swapfile || { fallocate -l 512M /swapfile && chmod 0600 /swapfile && mkswap -q /swapfile; }; swapon /swapfile"
    } else {
        "swapoff -a; true"
    };
    lab.guest.ok_within(script, PATIENCE).map(|_| ())
}

/// All models run, and exactly this one protects the machine.
fn protect_by(lab: &Lab, protector: Protector) -> Result<()> {
    // Units that say ManagedOOMSwap= have it started.
    let oomd = if protector == Protector::Oomd { "unmask" } else { "mask" };
    lab.guest.ok_within(
        &format!(
            "systemctl stop earlyoom.service systemd-oomd.service systemd-oomd.socket 2>/dev/null; \
             systemctl {oomd} --runtime --quiet systemd-oomd.service systemd-oomd.socket; systemctl reset-failed; \
             systemctl restart plimsolld.service && for name in low middle high; do systemctl start llm@$name.service || exit; done; \
             test $(systemctl is-active llm@low llm@middle llm@high | grep -cx active) = 3"
        ),
        PATIENCE,
    )?;
    if protector != Protector::Plimsoll {
        lab.guest.ok_within(
            &format!("systemctl stop plimsolld.service && systemctl start {}", protector.unit()),
            PATIENCE,
        )?;
    }
    lab.guest.wait_until(
        "it protects",
        PATIENCE,
        &format!("systemctl is-active --quiet {}", protector.unit()),
    )?;
    if protector != Protector::Plimsoll {
        return Ok(());
    }
    // What was just loaded is spared by us for a minute; what is measured is who goes when that is over.
    lab.guest.wait_until(
        "everybody has been there for a while",
        PATIENCE,
        &format!(
            "now=$(cut -d. -f1 /proc/uptime); for name in low middle high; do \
               since=$(systemctl show --value -p ActiveEnterTimestampMonotonic llm@$name.service); \
               test $((now - since / 1000000)) -ge {STAY} || exit 1; done"
        ),
    )
}

fn once(lab: &Lab, protector: Protector, rate: Bytes) -> Result<Run> {
    protect_by(lab, protector)?;
    let guest = &lab.guest;
    let line = total(lab)?.mul_div(1, LINE);
    let mut processes = String::new();
    for (name, ..) in MODELS {
        processes.push_str(&format!(" {name}={}", lab.main_pid(name)?));
    }
    let before = guest.ok(&format!("systemctl show --value -p MainPID {}", protector.unit()))?;
    // Nothing of the last run is left that could look like this one's.
    let available = lab.available()?;
    guest.ok("rm -f /run/served /run/fed /run/watch.json; systemctl reset-failed eater.service watch.service 2>/dev/null; true")?;
    let eater = format!(
        "systemd-run --quiet --unit=eater -p StandardOutput=journal {} eat --after /run/served --bytes {} --rate {} --hold {MEAL}",
        Lab::STRAIN,
        (available - LEFT).0,
        rate.0
    );
    let (said, greetings) = ssh::asked(lab, || {
        guest.ok(&format!(
            "systemd-run --quiet --unit=watch -p OOMScoreAdjust=-1000 -p Nice=-15 -p LimitMEMLOCK=infinity \
             -p StandardOutput=file:/run/watch.json {} watch --line {} --until /run/fed{processes} \
               eater=$({eater}; systemctl show --value -p MainPID eater.service)",
            Lab::STRAIN,
            line.0,
        ))?;
        guest.wait_until("it is watched", PATIENCE, "systemctl is-active --quiet watch.service")?;
        // Waited for at its end rather than asked for again and again, which sshd would feel.
        guest.ok_within(
            "pid=$(systemctl show --value -p MainPID eater.service) && touch /run/served && test $pid != 0 && \
             timeout 120 tail --pid=$pid -s 0.5 -f /dev/null",
            PATIENCE,
        )?;
        guest.wait_until("the meal is over", PATIENCE, "! systemctl is-active --quiet eater.service")?;
        guest.ok("touch /run/fed")?;
        guest.wait_until(
            "the watcher has said what it saw",
            PATIENCE,
            "tail -n 1 /run/watch.json | grep -q oom_kills",
        )?;
        guest.ok("tail -n 1 /run/watch.json")
    })?;
    let seen: Value = serde_json::from_str(&said).with_context(|| format!("the watcher said {said}"))?;
    let gone: Vec<(String, i64)> = seen["gone"]
        .as_array()
        .context("nothing on who is gone")?
        .iter()
        .filter_map(|one| Some((one["name"].as_str()?.to_owned(), one["at_msec"].as_i64()?)))
        .collect();
    let fed = guest.ok("systemctl show --value -p Result eater.service")? == "success";
    // The eater's own end is nobody's action.
    let gone: Vec<(String, i64)> = gone.into_iter().filter(|(name, _)| name != "eater" || !fed).collect();
    let first = gone.first().map(|(_, at)| *at);
    let deficit = seen["deficit_msec"].as_i64();
    // A protector that had to be started again has not protected.
    let after = guest.ok(&format!("systemctl show --value -p MainPID {}", protector.unit()))?;
    ensure!(before == after, "{} was started anew\n{}", protector.name(), guest.evidence());
    let orphans = guest.ok("for pid in $(pgrep -f '[s]train engine'); do \
           unit=$(sed -n 's,.*/\\(llm@[^/]*\\.service\\).*,\\1,p' /proc/$pid/cgroup 2>/dev/null); \
           case $(systemctl show --value -p ActiveState \"${unit:-none.service}\") in inactive|failed) echo $pid;; esac; done | wc -l")?;
    Ok(Run {
        deficit: deficit.is_some(),
        // Where nobody saw a deficit there is nothing to count from.
        action_msec: first.zip(deficit).map(|(first, deficit)| first - deficit),
        gone: gone.into_iter().map(|(name, _)| name).collect(),
        oom_kills: seen["oom_kills"].as_u64().context("no kills")?,
        over_half_msec: seen["over_half_msec"].as_u64().context("no pressure")?,
        greetings,
        orphans: orphans.trim().parse()?,
    })
}

fn millis(time: Option<Duration>) -> String {
    time.map_or_else(|| "–".to_owned(), |time| time.as_millis().to_string())
}

/// The cells of a row behind those that name the case.
struct Cells<'a>(&'a [Run]);

impl fmt::Display for Cells<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.0;
        let mut kinds: Vec<(String, usize)> = Vec::new();
        for run in runs {
            let gone = if run.gone.is_empty() { "nobody".to_owned() } else { run.gone.join(" + ") };
            match kinds.iter_mut().find(|(kind, _)| *kind == gone) {
                Some((_, count)) => *count += 1,
                None => kinds.push((gone, 1)),
            }
        }
        let kinds: Vec<String> = kinds.into_iter().map(|(kind, count)| format!("{kind} ({count})")).collect();
        let actions: Vec<i64> = runs.iter().filter_map(|run| run.action_msec).collect();
        let number = |value: Option<i64>| value.map_or_else(|| "–".to_owned(), |value| value.to_string());
        let kills: u64 = runs.iter().map(|run| run.oom_kills).sum();
        let stalled = runs.iter().map(|run| run.over_half_msec).max().unwrap_or_default();
        let greetings: Vec<Duration> = runs.iter().flat_map(|run| run.greetings.iter().copied()).collect();
        write!(
            f,
            "{} | {} | {}, {} | {kills} | {:.1} | {} | {}",
            kinds.join(", "),
            runs.iter().filter(|run| run.deficit).count(),
            number(quantile(&actions, 50)),
            number(quantile(&actions, 99)),
            Duration::from_millis(stalled).as_secs_f64(),
            millis(quantile(&greetings, 99)),
            runs.iter().map(|run| run.orphans).sum::<u64>()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_tells_who_went_how_often_and_when() {
        let run = |gone: &[&str], action: Option<i64>| Run {
            gone: gone.iter().map(|name| (*name).to_owned()).collect(),
            deficit: action.is_some(),
            action_msec: action,
            ..Run::default()
        };
        let runs =
            [run(&["low"], Some(40)), run(&["low"], Some(-5)), run(&[], None), run(&["low"], Some(90))];
        let row = Cells(&runs).to_string();
        assert!(row.starts_with("low (3), nobody (1) | 3 | 40, 90 | 0 |"), "{row}");
    }
}

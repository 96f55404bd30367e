//! What was predicted for real llama-servers against what they hold at their most.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Result, ensure};
use plimsoll::bytes::Bytes;

/// How far below the prediction a measured peak may be: parts of buffers that no prompt here reaches,
/// and what the process takes with longer prompts and larger answers than these.
const APART: Bytes = Bytes::mib(24);

/// A model with the settings that are tried on it, how many requests it gets at once, and how often.
struct Case {
    what: &'static str,
    config: Config,
    at_once: u16,
    rounds: u16,
}

fn cases() -> Vec<Case> {
    // Small batches, which a short prompt fills: under emulation a token of a prompt takes 80 ms.
    let of = |what, at_once, rounds, cache: &str, arguments: &str, lines: &str| Case {
        what,
        config: Config::new("small", 8001).context(2048).with(&format!(
            "prompt-cache = \"{cache}\"\nengine-args = [\"-b\", \"64\", \"-ub\", \"64\"{arguments}]\n{lines}"
        )),
        at_once,
        rounds,
    };
    let slots = "parallel = 4\ncache-type-k = \"q8_0\"\ncache-type-v = \"q8_0\"";
    let draft = "draft-model = \"/srv/models/small.gguf\"";
    vec![
        of("read, four slots, caches of q8_0", 4, 1, "0MiB", ", \"--load-mode\", \"none\"", slots),
        of("mapped, prompts kept", 1, 2, "2MiB", "", ""),
        of("a draft model", 1, 1, "0MiB", ", \"--spec-type\", \"draft-simple\"", draft),
    ]
}

/// "Predicted peak against a real llama-server's measured peak": never above, and not far below.
pub fn predictions_hold(lab: &mut Lab) -> Result<()> {
    let mut wrong = Vec::new();
    for Case { what, config, at_once, rounds } in cases() {
        lab.configure(&[config])?;
        let mut peak = Bytes::ZERO;
        let mut look = || -> Result<()> {
            peak = peak.max(lab.model("small")?.measured.private_bytes);
            Ok(())
        };
        lab.guest.ok("systemctl start --no-block llm@small.service")?;
        lab.guest.wait_for("it answers", PATIENCE, |_| {
            look()?;
            Ok((lab.state("small")? == "active").then_some(()))
        })?;
        for round in 0..rounds {
            lab.guest.ok(&completions(8001, at_once, round))?;
            look()?;
        }
        let predicted = lab.model("small")?.predicted.private_bytes;
        println!("          {what}: {predicted} predicted, {peak} measured");
        if peak > predicted || predicted - peak > APART {
            wrong.push(format!("{what}: {} bytes predicted, {} measured", predicted.0, peak.0));
        }
        lab.guest.ok_within("systemctl stop llm@small.service", PATIENCE)?;
    }
    ensure!(wrong.is_empty(), "too few or far too many bytes were predicted:\n{}", wrong.join("\n"));
    lab.no_oom_kill()
}

/// The guest's real fit tool is asked, by a person and at the gate; what it says more is reserved, and a tool
/// that fails holds up nobody.
pub fn second_opinion_is_asked(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001).context(2048)])?;
    let check: serde_json::Value = serde_json::from_str(&lab.guest.ok("plimsoll fit small --check --json")?)?;
    let check = &check["check"];
    ensure!(check["tool"] == "/usr/bin/llama-fit-params", "{check}");
    let contexts = check["contexts"].as_array().map_or(&[][..], Vec::as_slice);
    ensure!(
        !contexts.is_empty() && contexts.iter().all(|asked| asked["agrees"] == true),
        "they differ: {check}"
    );

    lab.serve("small", 8001)?;
    let kept = "/var/cache/plimsoll/small/opinions.json";
    let owner = lab.guest.ok(&format!("stat -c %U {kept}"))?;
    ensure!(owner.trim() == "plimsoll-llm", "asked as {owner}");
    ensure!(lab.guest.ok(&format!("cat {kept}"))?.contains("Host "), "no answer in {kept}");
    let agreed = lab.model("small")?;
    ensure!(agreed.basis.opinion_bytes.is_zero(), "{:?}", agreed.basis);
    lab.guest.ok_within("systemctl stop llm@small.service", PATIENCE)?;

    // Engines with tools of their own: one that says 64 MiB more than the real one, one that is broken.
    let tools = [
        (
            "more",
            "/usr/bin/llama-fit-params \"$@\" | awk '/^Host/ { print $1, $2, $3, $4 + 64; next } { print }'",
        ),
        ("broken", "echo 'error: out of order' >&2; exit 1"),
    ];
    let mut engines = String::new();
    for (name, script) in tools {
        lab.guest
            .ok(&format!("mkdir -p /opt/{name} && ln -sf /usr/bin/llama-server /opt/{name}/llama-server"))?;
        let tool = format!("/opt/{name}/llama-fit-params");
        lab.guest.write(&tool, &format!("#!/bin/sh\n{script}\n"))?;
        lab.guest.ok(&format!("chmod 0755 {tool}"))?;
        engines.push_str(&format!("[engine.{name}]\npath = \"/opt/{name}/llama-server\"\n"));
    }
    let settings = lab.guest.ok("cat /etc/plimsoll/plimsoll.toml")?;
    lab.guest.write("/etc/plimsoll/plimsoll.toml", &format!("{settings}\n{engines}"))?;
    let with =
        |engine: &str| Config::new("small", 8001).context(2048).with(&format!("engine = \"{engine}\""));

    lab.configure(&[with("more")])?;
    lab.serve("small", 8001)?;
    let more = lab.model("small")?;
    let said = more.basis.opinion_bytes;
    ensure!(said >= Bytes::mib(64) && said <= Bytes::mib(65), "the tool's 64 MiB became {said}");
    ensure!(
        more.predicted.private_bytes == agreed.predicted.private_bytes + said,
        "{more:?} after {agreed:?}"
    );
    let explained = lab.guest.ok("plimsoll explain small")?;
    ensure!(explained.contains("llama-fit-params"), "{explained}");
    lab.guest.ok_within("systemctl stop llm@small.service", PATIENCE)?;

    let cursor = lab.guest.journal_cursor()?;
    lab.configure(&[with("broken")])?;
    lab.serve("small", 8001)?;
    ensure!(lab.model("small")?.predicted == agreed.predicted, "{:?}", lab.model("small")?);
    let journal = lab.guest.journal_since(&cursor, "-u llm@small.service")?;
    ensure!(journal.contains("the estimate counts alone") && journal.contains("out of order"), "{journal}");
    lab.guest.ok_within("systemctl stop llm@small.service", PATIENCE)?;
    lab.guest.write("/etc/plimsoll/plimsoll.toml", &settings)?;
    lab.configure(&[])?;
    lab.no_oom_kill()
}

/// An engine that takes more than was predicted is given more the next time, also after a restart of the daemon,
/// and no more once its settings are others.
pub fn a_peak_is_remembered(lab: &mut Lab) -> Result<()> {
    // Beside the real engine, in its unit, a process holds 100 MiB: what tail keeps until somebody reads it.
    let more = Bytes::mib(100);
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *--port*) head -c {0} /dev/zero | tail -c {0} | sleep 100000 & esac\n\
         exec /usr/bin/llama-server \"$@\"\n",
        more.0
    );
    lab.guest.ok("mkdir -p /opt/greedy")?;
    lab.guest.write("/opt/greedy/llama-server", &script)?;
    lab.guest.ok("chmod 0755 /opt/greedy/llama-server")?;
    let settings = lab.guest.ok("cat /etc/plimsoll/plimsoll.toml")?;
    let engine = "[engine.greedy]\npath = \"/opt/greedy/llama-server\"\n";
    lab.guest.write("/etc/plimsoll/plimsoll.toml", &format!("{settings}\n{engine}"))?;
    let config = |context| Config::new("small", 8001).context(context).with("engine = \"greedy\"");
    lab.configure(&[config(2048)])?;

    lab.serve("small", 8001)?;
    let first = lab.model("small")?;
    ensure!(first.basis.measured_bytes.is_zero(), "{:?}", first.basis);
    lab.guest.wait_for("it is measured to take more", PATIENCE, |_| {
        let model = lab.model("small")?;
        Ok((model.measured.private_bytes > model.predicted.private_bytes).then_some(()))
    })?;
    lab.guest
        .ok_within("systemctl stop llm@small.service && systemctl restart plimsolld.service", PATIENCE)?;
    let planned = lab.plan("small")?;
    let remembered = planned.basis.measured_bytes;
    ensure!(!remembered.is_zero() && remembered <= more + Bytes::mib(16), "{planned:?}");
    ensure!(planned.text.contains("because an earlier run took it"), "{}", planned.text);
    lab.serve("small", 8001)?;
    let second = lab.model("small")?;
    ensure!(second.basis.measured_bytes == remembered, "{:?}, planned {remembered}", second.basis);
    ensure!(second.predicted.private_bytes == first.predicted.private_bytes + remembered, "{second:?}");
    lab.guest.ok_within("systemctl stop llm@small.service", PATIENCE)?;

    lab.configure(&[config(1024)])?;
    let other = lab.plan("small")?;
    ensure!(other.basis.measured_bytes.is_zero(), "{other:?}");
    lab.guest.write("/etc/plimsoll/plimsoll.toml", &settings)?;
    lab.configure(&[])?;
    lab.no_oom_kill()
}

/// Somebody without rights is told how the guest is: nothing needs fixing, and nobody disagrees.
pub fn doctor_finds_nothing_to_fix(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001).context(2048)])?;
    let done = lab.guest.run_within(
        "setpriv --reuid=nobody --regid=nogroup --clear-groups plimsoll doctor --json",
        PATIENCE,
    )?;
    ensure!(done.code == 0, "it exits with {}: {}", done.code, done.all());
    let answer: serde_json::Value = serde_json::from_str(&done.stdout)?;
    let checks = answer["checks"].as_array().map_or(&[][..], Vec::as_slice);
    for (check, part) in [
        ("kernel", ""),
        ("pressure", "PSI"),
        ("cgroups", "version 2"),
        ("speed", "/srv/models is read at"),
        ("configuration", "1 model"),
        ("daemon", "answers"),
        ("engine", "/usr/bin/llama-server is"),
        ("opinion", "small: llama-fit-params says no more than the estimate"),
    ] {
        let good = |found: &&serde_json::Value| {
            found["check"] == check
                && found["level"] == "ok"
                && found["text"].as_str().is_some_and(|text| text.contains(part))
        };
        ensure!(checks.iter().any(|found| good(&found)), "{check} is not good: {answer:#}");
    }
    let text = lab.guest.ok("plimsoll doctor")?;
    ensure!(text.ends_with("Nothing needs fixing."), "{text}");
    lab.configure(&[])
}

/// A script for so many requests at once, each with a prompt that no other has, of a little more than
/// a batch.
fn completions(port: u16, at_once: u16, round: u16) -> String {
    let request = |n: u16| {
        let word = format!("{}{}", char::from(b'a' + (n % 26) as u8), char::from(b'a' + (round % 26) as u8));
        let prompt = word.repeat(36 / usize::from(at_once));
        format!(
            "curl -fsS --max-time 110 -o /dev/null -H 'Content-Type: application/json' \
             -d '{{\"prompt\":\"{prompt}\",\"n_predict\":6}}' http://127.0.0.1:{port}/completion & requests=\"$requests $!\"; "
        )
    };
    let all: String = (0..at_once).map(request).collect();
    format!("requests=; {all} for request in $requests; do wait $request || exit 1; done")
}

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

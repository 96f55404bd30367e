//! The command line: verbs, options, and the words that explain them.

mod unit;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueHint};

pub use unit::{Hold, Run, WaitReady};

use crate::bytes::Bytes;

/// Memory admission control for Linux machines that serve large language models.
///
/// Plimsoll knows what a model will take before it is loaded, makes room for it, refuses what
/// would sink the machine, and keeps the machine afloat while models run. Models are ordinary
/// systemd units: 'systemctl start llm@NAME' passes the same gate as 'plimsoll load NAME'.
#[derive(Debug, Parser)]
#[command(name = "plimsoll", version, max_term_width = 100, after_help = AFTER_HELP, after_long_help = AFTER_LONG_HELP)]
#[command(subcommand_required = true, arg_required_else_help = true, propagate_version = false)]
pub struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub verb: Verb,
}

const AFTER_HELP: &str = "\
Examples:
  plimsoll fit model.gguf -c 16384 --ram 128GiB   will it fit on such a machine?
  plimsoll plan deepseek                          what would have to go for it?
  plimsoll load deepseek -c 16384                 start it, with progress
  plimsoll status                                 what runs, and what room is left

'plimsoll VERB --help' has an example of each; 'plimsoll --help' explains files and exit codes.";

const AFTER_LONG_HELP: &str = "\
Examples:
  plimsoll fit model.gguf -c 4096 -c 16384 --ram 128GiB
      What the model takes at each context length, and whether such a machine holds it.
  plimsoll fit -- llama-server -m model.gguf -c 16384 -ngl 999 -ctk q8_0
      The same for a llama-server command line as you have it.
  plimsoll plan deepseek
      What a load would do, in order, changing nothing.
  plimsoll load deepseek -c 16384
      Start it through systemd, with progress; models of lower priority make room.
  plimsoll status
      Models, reservations against measured memory, pools, last decisions.
  plimsoll doctor
      What of this machine stands in the way, each with the exact fix.
  plimsoll validate
      Every problem of the configuration at once.

Files:
  /etc/plimsoll/plimsoll.toml         the daemon's settings; none is needed
  /etc/plimsoll/models.d/NAME.toml    one file for each model (also under /run and /usr/lib)

Environment:
  PLIMSOLL_BUS_ADDRESS    the bus to talk to instead of the system's, as --bus
  NO_COLOR                when set, nothing is coloured

Exit codes:
   0  done
   1  failed
   2  the command line is wrong
  69  the daemon can't be reached
  75  refused: it would not fit now
  77  not authorised
  78  the configuration can't work

Errors go to standard error, one sentence and a hint. With --json, sizes are plain bytes.";

/// What every verb takes.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Talk to the daemon on this bus instead of the system's (for 'plimsolld --simulate')
    #[arg(long, global = true, value_name = "ADDRESS", help_heading = "Global options")]
    pub bus: Option<String>,
    /// Never ask for a password, fail instead
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_ask_password: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    Fit(Fit),
    Plan(Plan),
    Load(Load),
    Unload(Unload),
    Status(Status),
    Top(Top),
    List(List),
    Explain(Explain),
    Log(Log),
    Lease(Lease),
    Pin(Pin),
    Unpin(Unpin),
    Mode(Mode),
    Swap(Swap),
    Reload(Reload),
    Doctor(Doctor),
    Validate(Validate),
    Run(Run),
    #[command(hide = true)]
    Hold(Hold),
    WaitReady(WaitReady),
    Catalogue(Catalogue),
    Completions(Completions),
}

/// Estimate what a model takes, per context length, and say whether it fits
///
/// Needs no daemon and no root, and reads only the headers of the model's files. Without -c it
/// shows 4096, 16384, 32768, 65536 and 131072 tokens, as far as the model was trained.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  plimsoll fit model-00001-of-00004.gguf -c 4096 -c 16384 --ram 128GiB --gpu 120GiB
  plimsoll fit deepseek-v3.1:tq1_0 -c 16384 --ram 128GiB --gpu none
  plimsoll fit https://example.org/model-Q8_0.gguf
  plimsoll fit --set nemo-12b,qwen3-coder-30b,starcoder2-15b -c 32768
  plimsoll fit deepseek --max-context
  plimsoll fit -- llama-server -m model.gguf -c 16384 -ngl 999 -ctk q8_0 -np 4")]
pub struct Fit {
    /// A configured model, a GGUF file or its address (of a split model, the first), or one of the catalogue:
    /// NAME:QUANTISATION
    #[arg(value_name = "MODEL|FILE|URL", value_hint = ValueHint::FilePath)]
    pub model: Option<String>,
    /// Several models that run at once, each named as MODEL is; one that is there twice is two instances
    #[arg(long, value_name = "MODEL,MODEL...", value_delimiter = ',', conflicts_with_all = ["model", "max_context"])]
    pub set: Vec<String>,
    /// Context length in tokens, all slots together; may be repeated
    #[arg(short = 'c', long = "context", visible_alias = "ctx-size", value_name = "TOKENS", value_parser = tokens)]
    pub contexts: Vec<u64>,
    /// Find the largest context that fits
    #[arg(long, conflicts_with = "contexts")]
    pub max_context: bool,
    /// Ask the engine's own llama-fit-params too, and show where it differs
    #[arg(long, conflicts_with = "set")]
    pub check: bool,
    /// Memory of the machine to judge for, instead of this one's; without GPU and swap but for --gpu and --swap
    #[arg(long, value_name = "SIZE", help_heading = "Another machine")]
    pub ram: Option<Bytes>,
    /// Memory that its GPU can use, or 'none'; shared with --ram, as on an APU
    #[arg(long, value_name = "SIZE|none", value_parser = size_or_none, help_heading = "Another machine")]
    pub gpu: Option<SizeOrNone>,
    /// The GPU of --gpu is a card with memory of its own
    #[arg(long, requires = "gpu", help_heading = "Another machine")]
    pub discrete: bool,
    /// Swap of that machine
    #[arg(long, value_name = "SIZE", help_heading = "Another machine")]
    pub swap: Option<Bytes>,
    /// What its disk reads in a second, for models that stream, such as 3GB/s
    #[arg(long, value_name = "SPEED", value_parser = speed, help_heading = "Another machine")]
    pub disk_speed: Option<Bytes>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub root: Root,
    /// A llama-server command line, or arguments of one, which change the estimate
    #[arg(last = true, value_name = "LLAMA-SERVER-ARGUMENTS", allow_hyphen_values = true)]
    pub arguments: Vec<String>,
}

/// What becomes of models that are stopped for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Restore {
    /// They come back when there is room again.
    Yes,
    /// They stay stopped.
    No,
}

/// A size, or nothing on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeOrNone {
    /// There is none.
    None,
    /// So much.
    Size(Bytes),
}

/// Show what a load would do, in order, changing nothing
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  plimsoll plan deepseek -c 16384")]
pub struct Plan {
    /// The model, or NAME@N for its Nth instance
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Context length in tokens instead of the configured one
    #[arg(short = 'c', long, value_name = "TOKENS", value_parser = tokens)]
    pub context: Option<u64>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Load a model through systemd, making room for it
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  plimsoll load deepseek
  plimsoll load deepseek -c 16384 --instead-of glm-flash")]
pub struct Load {
    /// The model, or NAME@N for its Nth instance
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Context length in tokens instead of the configured one, until it stops
    #[arg(short = 'c', long, value_name = "TOKENS", value_parser = tokens)]
    pub context: Option<u64>,
    /// A model that may be stopped for it whatever its priority; may be repeated
    #[arg(long, value_name = "NAME")]
    pub instead_of: Vec<String>,
    /// Load it even though its size is unknown or would not fit
    #[arg(long)]
    pub force: bool,
    /// Whether models that are stopped for it come back when there is room again
    #[arg(long, value_name = "yes|no", value_enum, default_value = "yes")]
    pub restore: Restore,
    /// Return once the job is queued, without waiting for the model to answer
    #[arg(long)]
    pub no_wait: bool,
}

/// Stop a model; it stays stopped until it is loaded again
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  plimsoll unload deepseek")]
pub struct Unload {
    /// The model, or NAME@N for its Nth instance
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Return once the job is queued, without waiting for its memory to be free
    #[arg(long)]
    pub no_wait: bool,
}

/// Show models, reservations against measured memory, pools and last decisions
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  plimsoll status\n  plimsoll status deepseek --json")]
pub struct Status {
    /// One model in full
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Show the overview of 'status' again and again, until Ctrl-C
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  plimsoll top\n  plimsoll top --interval 10 --json >> status.jsonl")]
pub struct Top {
    /// Seconds between two looks
    #[arg(short = 'd', long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
    /// End after so many looks
    #[arg(short = 'n', long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

/// List the configured models and their states
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  plimsoll list")]
pub struct List {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Explain the last decision on a model with its numbers
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  plimsoll explain deepseek")]
pub struct Explain {
    /// The model, or NAME@N for its Nth instance
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Hold memory for a command that is no model while it runs
///
/// A build, a bench by hand, an image generator: the memory is counted like a model's, models of lower priority make
/// room for it and come back afterwards, and no model is loaded into it meanwhile. It is held until the command ends,
/// whose exit code is returned (128 and the signal's number when one ended it); 75 where there is no room. The command
/// is not limited to it. Services can do the same over D-Bus: AcquireLease returns a descriptor to keep open.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  plimsoll lease 20GiB -- make -j8
  plimsoll lease 8GiB --gpu 24GiB --wait --priority 60 -- python main.py
  plimsoll lease --like deepseek -c 16384 -- llama-bench -m deepseek.gguf")]
pub struct Lease {
    /// How much memory, such as 20GiB
    #[arg(value_name = "SIZE", conflicts_with = "like")]
    pub size: Option<Bytes>,
    /// How much memory of the first GPU; shared with SIZE's on an APU, where both come out of one memory
    #[arg(long, value_name = "SIZE")]
    pub gpu: Option<Bytes>,
    /// As much as this model takes, on host and GPUs
    #[arg(long, value_name = "NAME")]
    pub like: Option<String>,
    /// The context length of --like in tokens instead of the configured one
    #[arg(short = 'c', long, value_name = "TOKENS", value_parser = tokens)]
    pub context: Option<u64>,
    /// 0 to 100: models of strictly lower priority are stopped for it
    #[arg(long, value_name = "N", default_value_t = crate::config::DEFAULT_PRIORITY, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub priority: u8,
    /// Wait until there is room instead of giving up
    #[arg(long)]
    pub wait: bool,
    /// What to call it in 'plimsoll status' instead of the command's name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// The command to run, with its arguments
    #[arg(last = true, value_name = "COMMAND", allow_hyphen_values = true, value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,
}

/// Show the decisions of the past, from the journal
///
/// What was admitted, refused, stopped, brought back, and done to keep the machine afloat, oldest first, with the
/// numbers in each line. Needs no daemon, but the right to read the system's journal. 'journalctl -x -u plimsolld'
/// explains each kind of decision at length.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  plimsoll log
  plimsoll log deepseek -n 5
  plimsoll log --since '2 hours ago' --json
  plimsoll log -f")]
pub struct Log {
    /// Only decisions on this model, and those taken for it
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Show at most so many, the latest [default: 50, or all of --since]
    #[arg(short = 'n', long, value_name = "N")]
    pub lines: Option<u32>,
    /// Go on with those that are yet to come, until interrupted
    #[arg(short, long)]
    pub follow: bool,
    /// From this time on, as journalctl reads it: 'yesterday', '2 hours ago', '2026-11-25 12:00'
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub since: Option<String>,
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

/// Never evict a model, until 'unpin'
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  plimsoll pin deepseek")]
pub struct Pin {
    /// The models, each in all its instances
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

/// Allow a model to be evicted again
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  plimsoll unpin deepseek")]
pub struct Unpin {
    /// The models, each in all its instances
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

/// Show the daemon's mode, or set it until it is reloaded or the machine restarts
///
/// In observe mode it admits everything, acts on nothing and logs what it would have done.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  plimsoll mode\n  plimsoll mode observe")]
pub struct Mode {
    /// The mode to set
    #[arg(value_name = "MODE", value_parser = ["enforce", "observe"])]
    pub mode: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Show swap, or make and remove swapfiles
///
/// The daemon makes a swapfile by itself for a model with oversize = "swap", and removes it afterwards. One that is
/// made here stays until it is removed here, or the machine restarts. 'list' is what happens without a command.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  plimsoll swap\n  plimsoll swap add 64GiB\n  plimsoll swap remove --all")]
pub struct Swap {
    #[command(subcommand)]
    pub command: Option<SwapCommand>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What to do about swap.
#[derive(Debug, Subcommand)]
pub enum SwapCommand {
    /// Show every swap area, and what swapfiles may still take
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a swapfile and use it
    Add {
        /// Its size, such as 64GiB
        #[arg(value_name = "SIZE")]
        size: Bytes,
    },
    /// Take swapfiles of plimsoll's out of use and remove them; what they hold is read back first
    Remove {
        /// The names that 'list' shows
        #[arg(value_name = "NAME", required_unless_present = "all", conflicts_with = "all")]
        names: Vec<String>,
        /// All of plimsoll's that no model needs
        #[arg(long)]
        all: bool,
    },
}

/// Have the daemon read its configuration again
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  plimsoll validate && plimsoll reload")]
pub struct Reload {}

/// Check this machine and print the exact fix for what stands in the way
///
/// Kernel, memory pressure (PSI), control groups, what an APU's GPU may map, swap, room for swapfiles, other
/// programs that end processes when memory is short, how fast the disks with models read (half a second each), the
/// daemon, the engines, and what their own fit tool says of the configured models. Needs no daemon and no root. Exits
/// with 1 when something needs fixing.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  plimsoll doctor\n  plimsoll doctor --json")]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Look at the machine recorded under this directory instead of this one: no disk is read, no daemon asked, no
    /// engine run
    #[arg(long, value_name = "DIR", default_value = "/", value_hint = ValueHint::DirPath, hide_default_value = true)]
    pub root: PathBuf,
}

/// Check the configuration and show every problem at once
///
/// Needs no daemon and no root. Ends with 78 when there is an error, with 0 when there are only
/// warnings.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  plimsoll validate\n  plimsoll validate --root ./image")]
pub struct Validate {
    #[command(flatten)]
    pub root: Root,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// List the models whose size is known before they are downloaded
///
/// Public hyperparameters and published sizes, with the source of each. 'plimsoll fit NAME:QUANTISATION' prices one.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  plimsoll catalogue\n  plimsoll catalogue deepseek-v3.1")]
pub struct Catalogue {
    /// One model in full
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Print the completion script for a shell
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  plimsoll completions bash > /etc/bash_completion.d/plimsoll")]
pub struct Completions {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// Shells that have completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Shell {
    /// GNU Bash
    Bash,
    /// Z shell
    Zsh,
    /// fish
    Fish,
}

/// Where the configuration is.
#[derive(Args, Debug)]
pub struct Root {
    /// Read the configuration under this directory instead of /
    #[arg(long, value_name = "DIR", default_value = "/", value_hint = ValueHint::DirPath, hide_default_value = true)]
    pub root: PathBuf,
}

/// Reads a number of tokens: `16384`, `16k` (16384), `1M` (1048576).
fn tokens(text: &str) -> Result<u64, String> {
    let (digits, scale) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1024),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1024 * 1024),
        _ => (text, 1),
    };
    let number: u64 =
        digits.parse().ok().filter(|n| *n > 0 && digits.bytes().all(|b| b.is_ascii_digit())).ok_or_else(
            || format!("'{text}' is not a context length: write a number of tokens, such as 16384 or 16k"),
        )?;
    let tokens = number.checked_mul(scale).filter(|n| *n <= u64::from(u32::MAX));
    tokens.ok_or_else(|| format!("'{text}' is more tokens than any engine takes"))
}

fn size_or_none(text: &str) -> Result<SizeOrNone, String> {
    if text == "none" {
        return Ok(SizeOrNone::None);
    }
    text.parse().map(SizeOrNone::Size).map_err(|e: crate::bytes::ParseBytesError| e.to_string())
}

/// A size a second, `/s` said or not; not nothing.
fn speed(text: &str) -> Result<Bytes, String> {
    let size = text.strip_suffix("/s").unwrap_or(text);
    let speed: Bytes = size.parse().map_err(|e: crate::bytes::ParseBytesError| e.to_string())?;
    if speed.is_zero() { Err("a disk that reads nothing".to_owned()) } else { Ok(speed) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_an_example() {
        for verb in Cli::command().get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example") && help.contains("plimsoll"), "{}", verb.get_name());
        }
    }

    #[test]
    fn contexts_and_sizes_are_read() {
        assert_eq!(tokens("16384"), Ok(16384));
        assert_eq!(tokens("16k"), Ok(16384));
        assert_eq!(tokens("1M"), Ok(1_048_576));
        for bad in ["", "k", "0", "-1", "+5", "1.5k", "99999999999", "5000M", "16kk"] {
            assert!(tokens(bad).is_err(), "{bad}");
        }
        assert_eq!(size_or_none("none"), Ok(SizeOrNone::None));
        assert_eq!(size_or_none("120GiB"), Ok(SizeOrNone::Size(Bytes::gib(120))));
        assert!(size_or_none("lots").is_err());
        assert_eq!((speed("3GB/s"), speed("500MB")), (Ok(Bytes(3_000_000_000)), Ok(Bytes(500_000_000))));
        assert!(speed("0/s").is_err());
    }

    #[test]
    fn a_pasted_command_stands_after_two_dashes() {
        let cli = Cli::try_parse_from([
            "plimsoll",
            "fit",
            "-c",
            "4096",
            "-c",
            "16k",
            "--",
            "llama-server",
            "-m",
            "x.gguf",
            "-c",
            "8192",
            "--no-ask-password",
        ]);
        let Ok(Cli { verb: Verb::Fit(fit), common }) = cli else { panic!("{cli:?}") };
        assert_eq!(fit.contexts, [4096, 16384]);
        assert_eq!(fit.model, None);
        assert_eq!(fit.arguments.len(), 6);
        assert!(!common.no_ask_password);
    }
}

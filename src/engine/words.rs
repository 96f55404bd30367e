//! A llama-server command line taken apart into flags with their values.

use crate::fit::flags::{Flag, Takes};

/// A flag with what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Word<'a> {
    /// The flag's long name (`--ctx-size`), where llama-server has such a flag.
    pub(super) name: Option<&'static str>,
    /// The flag as spelled, and its values.
    pub(super) words: &'a [String],
}

impl Word<'_> {
    /// The value, empty for a flag without one.
    pub(super) fn value(&self) -> &str {
        self.words.get(1).map_or("", String::as_str)
    }
}

/// Takes arguments apart that [`crate::fit::args::parse`] has accepted.
pub(super) fn split(args: &[String]) -> Vec<Word<'_>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < args.len() {
        let arg = &args[at];
        let spelling = if arg.starts_with("--") { arg.replace('_', "-") } else { arg.clone() };
        let flag = Flag::find(&spelling).map(|(flag, _)| flag);
        let values = match flag.map(|flag| flag.takes) {
            Some(Takes::Nothing | Takes::Switch | Takes::Removed) => 0,
            Some(Takes::One) => 1,
            Some(Takes::Two) => 2,
            // As in parse: what looks like a value of an unknown flag goes with it.
            None => usize::from(args.get(at + 1).is_some_and(|next| !is_flag(next))),
        };
        let end = (at + 1 + values).min(args.len());
        found.push(Word { name: flag.map(Flag::name), words: &args[at..end] });
        at = end;
    }
    found
}

/// Whether an argument is a flag rather than a value (a negative number is a value).
fn is_flag(arg: &str) -> bool {
    arg.strip_prefix('-')
        .and_then(|rest| rest.chars().next())
        .is_some_and(|c| !c.is_ascii_digit() && c != '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_arguments_apart() {
        let args: Vec<String> =
            ["--jinja", "-c", "4096", "--n_gpu_layers", "-1", "--new-flag", "-5", "--no-kv-offload"]
                .map(str::to_owned)
                .to_vec();
        let words = split(&args);
        let names: Vec<_> = words.iter().map(|word| word.name).collect();
        assert_eq!(
            names,
            [Some("--jinja"), Some("--ctx-size"), Some("--gpu-layers"), None, Some("--kv-offload")]
        );
        let values: Vec<_> = words.iter().map(Word::value).collect();
        assert_eq!(values, ["", "4096", "-1", "-5", ""]);
    }
}

//! `plimsoll completions`: scripts that complete the command line.

use super::args::Shell;
use super::failure::Failure;
use super::output;

/// The completion script for `shell`.
#[must_use]
pub fn script(shell: Shell) -> String {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "plimsoll", &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

pub(super) fn print(shell: Shell) -> Result<(), Failure> {
    output::print(&script(shell))
}

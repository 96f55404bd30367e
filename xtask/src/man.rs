//! `cargo xtask man`: manual pages and completions, from the command line's own definition.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap_mangen::Man;
use plimsoll::cli;

use crate::host;

/// Writes everything below target/generated, where `install` and `deb` take it from.
pub fn generate() -> Result<PathBuf> {
    let directory = host::source_root().join("target/generated");
    let man = directory.join("man1");
    let _ = fs::remove_dir_all(&man);
    fs::create_dir_all(&man)?;
    let mut command = without_help(cli::command());
    command.build();
    pages(&command, &man)?;
    let files = ["bash/plimsoll", "zsh/_plimsoll", "fish/plimsoll.fish"];
    for (shell, file) in [cli::Shell::Bash, cli::Shell::Zsh, cli::Shell::Fish].into_iter().zip(files) {
        let path = directory.join(file);
        fs::create_dir_all(path.parent().context("a directory for completions")?)?;
        fs::write(path, cli::completion_script(shell))?;
    }
    Ok(directory)
}

/// No page is about `help`, and none refers to one.
fn without_help(command: clap::Command) -> clap::Command {
    let verbs: Vec<String> = command.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    let command = command.disable_help_subcommand(true);
    verbs.iter().fold(command, |command, verb| command.mut_subcommand(verb, without_help))
}

/// The page of a command, and those of all its subcommands that are for people.
fn pages(command: &clap::Command, directory: &Path) -> Result<()> {
    page(command, directory)?;
    let shown = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    shown.into_iter().try_for_each(|verb| pages(verb, directory))
}

/// One page; its examples stand as they are written, line by line.
fn page(command: &clap::Command, directory: &Path) -> Result<()> {
    // Built, a verb's is plimsoll-VERB.
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let extra = command.get_after_long_help().or(command.get_after_help()).map(ToString::to_string);
    let source = format!("plimsoll {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).source(source).manual("Plimsoll");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    let mut text = String::from_utf8(text)?;
    text.push_str(&sections(extra.as_deref().unwrap_or_default()));
    text.push_str(".SH SEE ALSO\n");
    text.push_str(if name == "plimsoll" { "systemctl(1), journalctl(1)\n" } else { "plimsoll(1)\n" });
    fs::write(directory.join(format!("{name}.1")), text)?;
    Ok(())
}

/// The text after a command's help as sections: a line that ends with a colon and is not indented
/// begins one.
fn sections(text: &str) -> String {
    let mut out = String::new();
    let mut verbatim = false;
    for line in text.lines() {
        match line.strip_suffix(':').filter(|head| !head.starts_with(' ')) {
            Some(head) => {
                out.push_str(if verbatim { ".fi\n" } else { "" });
                let _ = writeln!(out, ".SH {}\n.nf", head.to_uppercase());
                verbatim = true;
            }
            None => {
                let _ = writeln!(out, "\\&{}", line.replace('\\', "\\e").replace('-', "\\-"));
            }
        }
    }
    out.push_str(if verbatim { ".fi\n" } else { "" });
    out
}

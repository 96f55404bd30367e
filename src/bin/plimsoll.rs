//! The command for people: see `plimsoll --help`.

fn main() {}

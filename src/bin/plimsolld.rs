//! The root daemon: see `plimsolld --help`.

fn main() {}

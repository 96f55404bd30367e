//! Plimsoll's development tool.

fn main() {}

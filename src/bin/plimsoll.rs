//! The command for people: see `plimsoll --help`.

fn main() -> std::process::ExitCode {
    plimsoll::cli::main(std::env::args_os())
}

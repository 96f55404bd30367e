//! From a configured model to what is run: which settings its engine will have, the command line,
//! the files it will read.
//!
//! For llama-server one path leads to both the price and the command: the keys of the model are
//! turned into llama-server's own arguments and read together with `engine-args` and the
//! environment as llama-server reads them ([`Effective`]). What the daemon then chooses (context,
//! layers on the GPU, caches) it writes into those settings, prices them, and [`Launch::llama_server`]
//! spells exactly them out. So what is priced is what is run.

mod check;
pub mod devices;
mod effective;
mod error;
mod files;
mod launch;
mod locate;
mod mounts;
mod placeholders;
pub mod version;
mod words;

pub use check::{check, load};
pub use effective::{Automatic, Effective, Source, effective};
pub use error::Error;
pub use files::{NeededFile, Purpose, files};
pub use launch::Launch;
pub use locate::{DIRECTORIES, check_executable, locate};
pub use mounts::{directories, drop_in};
pub use version::Version;

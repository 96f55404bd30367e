//! From a configured model to what is run: which settings its engine will have, the command line,
//! the files it will read.
//!
//! For llama-server one path leads to both the price and the command: the keys of the model are
//! turned into llama-server's own arguments and read together with `engine-args` and the
//! environment as llama-server reads them ([`Effective`]). What the daemon then chooses (context,
//! layers on the GPU, caches) it writes into those settings, prices them, and [`Launch::llama_server`]
//! spells exactly them out. So what is priced is what is run.

mod check;
pub mod container;
pub mod devices;
mod effective;
mod error;
mod files;
pub mod kept;
mod launch;
mod locate;
mod mounts;
pub mod opinion;
mod placeholders;
pub mod version;
mod words;

pub use check::{check, load};
pub use effective::{Automatic, Effective, Source, effective};
pub use error::Error;
pub use files::{NeededFile, Purpose, files};
pub use launch::Launch;
pub use locate::{DIRECTORIES, Engine, check_executable, image, locate, locate_default};
pub use mounts::{directories, drop_in};
pub use version::Version;

/// Variables that change what an engine takes, by their beginnings: llama.cpp's own, and those by
/// which GPU runtimes choose devices and kinds of memory.
const VARIABLES: [&str; 10] =
    ["LLAMA_ARG_", "GGML_", "HSA_", "HIP_", "ROCR_", "CUDA_", "GPU_", "AMD_", "VK_", "MESA_"];

/// Whether a variable of this name changes what an engine takes, and may go over the bus: a key
/// can be given to llama-server by a variable too, and stays with the unit.
#[must_use]
pub fn is_relevant_variable(name: &str) -> bool {
    VARIABLES.iter().any(|prefix| name.starts_with(prefix)) && !crate::config::sounds_secret(name)
}

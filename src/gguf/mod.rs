//! GGUF model files: headers read with bounds on time and memory, whatever the file claims.
//!
//! A [`Header`] is one file's metadata and tensor list. A [`Model`] is the whole set of files
//! (shards) with their identities, checked to be present at full length. Nothing here reads a
//! single byte of tensor data.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Versions 2 and 3,
//! little-endian. Limits are those of llama.cpp where it has one, and generous otherwise.

mod error;
mod header;
mod model;
mod read;
mod shards;
mod tensor;
mod value;

pub use error::{HeaderError, ModelError};
pub use header::Header;
pub use model::{Identity, Model, Shard};
pub use read::Allowance;
pub use shards::{ShardName, shard_paths};
pub use tensor::{Tensor, TensorType};
pub use value::{Array, Value};

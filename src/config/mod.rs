//! Configuration: fragments on disk, merged, validated.

mod instance;

pub use instance::{Instance, ModelName, NameError};

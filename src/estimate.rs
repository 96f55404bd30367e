//! The memory that a GGUF model takes: its headers are read ([`gguf`]), and [`fit`] makes an estimate of what they say
//! and of the engine's settings, in [`bytes`]. What a header says is made fit to be shown ([`text`]).
//!
//! A crate of its own for one reason: how well code is optimised is said for each package. This is what a planner calls
//! thousands of times and is built to be fast; the rest lies locked in memory while it waits, and is built to be small.

pub mod bytes;
pub mod fit;
pub mod gguf;
pub mod text;

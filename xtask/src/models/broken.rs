//! Files that are broken, half there, or made to hurt.

use super::gguf::{self, Kind};
use super::{MB, Model};
use anyhow::Result;
use std::fs;
use std::path::Path;

/// Names below the model directory whose header can't be read, each for a reason of its own.
pub const HOSTILE: &[&str] =
    &["truncated", "empty", "text", "many-pairs", "many-tensors", "long-text", "nested", "wide-tensor"];

/// Writes all of them below `directory`: `missing/` lacks shard 3 of 4, `half/` has half of shard
/// 3, `hostile/` holds the single files.
pub fn write_all(directory: &Path) -> Result<()> {
    let whole =
        |name| Model { name, bytes: 120 * MB, kind: Kind::F16, shards: 4, context: 32768, sparse: true };
    whole("missing/model").write(directory)?;
    fs::remove_file(gguf::shard_path(&directory.join("missing/model"), 3, 4))?;
    whole("half/model").write(directory)?;
    let third = gguf::shard_path(&directory.join("half/model"), 3, 4);
    let length = fs::metadata(&third)?.len();
    fs::OpenOptions::new().write(true).open(&third)?.set_len(length / 2)?;

    let hostile = directory.join("hostile");
    fs::create_dir_all(&hostile)?;
    let put = |name: &str, bytes: &[u8]| fs::write(hostile.join(format!("{name}.gguf")), bytes);
    let good =
        Model { name: "good", bytes: 20 * MB, kind: Kind::F16, shards: 1, context: 32768, sparse: true };
    let good = fs::read(good.write(&hostile)?)?;
    fs::remove_file(hostile.join("good.gguf"))?;
    put("truncated", &good[..1000])?;
    put("empty", b"")?;
    put("text", "This is not a model, it is a letter.\n".repeat(100).as_bytes())?;
    put("many-pairs", &header(1, u64::MAX / 2))?;
    put("many-tensors", &header(u64::MAX / 2, 0))?;

    let mut long = header(0, 1);
    long.extend((u64::MAX / 4).to_le_bytes());
    long.extend(b"a key without end");
    put("long-text", &long)?;

    // One array in another, two hundred thousand deep.
    let mut nested = header(0, 1);
    nested.extend(1_u64.to_le_bytes());
    nested.extend(b"k");
    nested.extend(9_u32.to_le_bytes());
    for _ in 0..200_000 {
        nested.extend(9_u32.to_le_bytes());
        nested.extend(1_u64.to_le_bytes());
    }
    put("nested", &nested)?;

    let mut wide = header(1, 0);
    wide.extend(1_u64.to_le_bytes());
    wide.extend(b"t");
    wide.extend(4_u32.to_le_bytes());
    for _ in 0..4 {
        wide.extend((1_u64 << 62).to_le_bytes());
    }
    wide.extend(0_u32.to_le_bytes());
    wide.extend(0_u64.to_le_bytes());
    put("wide-tensor", &wide)?;
    Ok(())
}

/// The fixed part of a header.
fn header(tensors: u64, pairs: u64) -> Vec<u8> {
    let mut bytes = Vec::from(*b"GGUF");
    bytes.extend(3_u32.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(pairs.to_le_bytes());
    bytes
}

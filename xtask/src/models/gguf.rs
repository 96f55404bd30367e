//! A writer of GGUF version 3 files, enough for models that the real engine loads.

use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const ALIGNMENT: u64 = 32;

/// A metadata value.
#[derive(Debug, Clone)]
pub enum Value {
    /// 16-bit unsigned.
    U16(u16),
    /// 32-bit unsigned.
    U32(u32),
    /// 32-bit signed.
    I32(i32),
    /// 32-bit float.
    F32(f32),
    /// Text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of 32-bit signed integers.
    I32s(Vec<i32>),
}

impl Value {
    fn encode(&self, out: &mut Vec<u8>) {
        // Type numbers as the format defines them.
        match self {
            Value::U16(value) => (out.extend(2_u32.to_le_bytes()), out.extend(value.to_le_bytes())).1,
            Value::U32(value) => (out.extend(4_u32.to_le_bytes()), out.extend(value.to_le_bytes())).1,
            Value::I32(value) => (out.extend(5_u32.to_le_bytes()), out.extend(value.to_le_bytes())).1,
            Value::F32(value) => (out.extend(6_u32.to_le_bytes()), out.extend(value.to_le_bytes())).1,
            Value::Text(text) => (out.extend(8_u32.to_le_bytes()), encode_text(text, out)).1,
            Value::Texts(texts) => {
                encode_array(8, texts.len(), out);
                texts.iter().for_each(|text| encode_text(text, out));
            }
            Value::I32s(values) => {
                encode_array(5, values.len(), out);
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
        }
    }
}

fn encode_array(element: u32, length: usize, out: &mut Vec<u8>) {
    out.extend(9_u32.to_le_bytes());
    out.extend(element.to_le_bytes());
    out.extend((length as u64).to_le_bytes());
}

fn encode_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Metadata in the order in which it is written.
pub type Metadata = Vec<(String, Value)>;

/// The tensor types that the generated models use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// Blocks of 32 bytes with a 16-bit scale.
    Q8_0,
    /// Blocks of 256 weights in 54 bytes: header-only models.
    Tq1_0,
    /// Blocks of 256 weights in 66 bytes: header-only models.
    Iq2Xxs,
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Kind::F32 => 0,
            Kind::F16 => 1,
            Kind::Q8_0 => 8,
            Kind::Tq1_0 => 34,
            Kind::Iq2Xxs => 16,
        }
    }

    /// Bytes of `elements` weights; whole blocks are assumed.
    pub fn bytes(self, elements: u64) -> u64 {
        match self {
            Kind::F32 => elements * 4,
            Kind::F16 => elements * 2,
            Kind::Q8_0 => elements / 32 * 34,
            Kind::Tq1_0 => elements / 256 * 54,
            Kind::Iq2Xxs => elements / 256 * 66,
        }
    }
}

/// One tensor.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, the fastest first.
    pub shape: Vec<u64>,
    /// Its element type.
    pub kind: Kind,
}

impl Tensor {
    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        self.kind.bytes(self.shape.iter().product())
    }
}

/// Where tensor data comes from.
pub trait Fill {
    /// Writes exactly the tensor's bytes; returns false to leave a hole in their place.
    fn fill(&mut self, tensor: &Tensor, out: &mut dyn Write) -> Result<bool>;
}

/// Writes one file: header, metadata, tensor table, data.
pub fn write(path: &Path, metadata: &Metadata, tensors: &[Tensor], fill: &mut dyn Fill) -> Result<()> {
    let mut header = Vec::from(*b"GGUF");
    header.extend(3_u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        encode_text(key, &mut header);
        value.encode(&mut header);
    }
    let mut offset = 0_u64;
    for tensor in tensors {
        encode_text(&tensor.name, &mut header);
        header.extend(u32::try_from(tensor.shape.len())?.to_le_bytes());
        tensor.shape.iter().for_each(|dimension| header.extend(dimension.to_le_bytes()));
        header.extend(tensor.kind.number().to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    let data = (header.len() as u64).next_multiple_of(ALIGNMENT);

    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&header)?;
    let mut at = data;
    for tensor in tensors {
        out.seek(SeekFrom::Start(at))?;
        fill.fill(tensor, &mut out)?;
        at += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    let file = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    file.set_len(at)?;
    Ok(())
}

/// The name of one shard: `BASE-00001-of-00004.gguf`, counted from 1.
pub fn shard_path(base: &Path, number: u16, count: u16) -> PathBuf {
    let mut name = base.as_os_str().to_owned();
    name.push(format!("-{number:05}-of-{count:05}.gguf"));
    name.into()
}

/// Writes a model as `BASE.gguf`, or as `shards` files whose data are of about the same size.
/// Returns the first file.
pub fn write_model(
    base: &Path,
    shards: u16,
    metadata: &Metadata,
    tensors: &[Tensor],
    fill: &mut dyn Fill,
) -> Result<PathBuf> {
    if shards < 2 {
        let mut name = base.as_os_str().to_owned();
        name.push(".gguf");
        let path = PathBuf::from(name);
        write(&path, metadata, tensors, fill)?;
        return Ok(path);
    }
    let total: u64 = tensors.iter().map(Tensor::bytes).sum();
    let mut rest = tensors;
    let mut written = 0_u64;
    for index in 0..shards {
        let goal = total * (u64::from(index) + 1) / u64::from(shards);
        let mut count = 0;
        while count < rest.len() && (index + 1 == shards || written < goal) {
            written += rest[count].bytes();
            count += 1;
        }
        let (mine, later) = rest.split_at(count);
        rest = later;
        // As llama-gguf-split does it: the first shard has everything, the others only their place.
        let mut all = if index == 0 { metadata.clone() } else { Metadata::new() };
        all.push(("split.no".into(), Value::U16(index)));
        all.push(("split.count".into(), Value::U16(shards)));
        all.push(("split.tensors.count".into(), Value::I32(i32::try_from(tensors.len())?)));
        write(&shard_path(base, index + 1, shards), &all, mine, fill)?;
    }
    Ok(shard_path(base, 1, shards))
}

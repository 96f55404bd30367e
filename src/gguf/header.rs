//! One file's header: metadata and tensors.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Read;

use super::error::HeaderError;
use super::read::{Allowance, At, Reader};
use super::tensor::{Tensor, TensorType};
use super::value::{Array, Value};

/// The most metadata keys. Real files have about 50.
const MAX_KEYS: u64 = 1 << 14;
/// The most tensors. The largest real models have about 3000.
const MAX_TENSORS: u64 = 1 << 16;
/// The longest key; the format allows 65535, nobody uses 100.
const MAX_KEY: u64 = 1 << 10;
/// Longer texts (chat templates) are passed over.
const MAX_TEXT: u64 = 1 << 10;
/// The longest text of a vocabulary or template that llama.cpp would read.
const MAX_STRING: u64 = 1 << 30;
/// Lists up to this length are kept: llama.cpp has at most 512 layers.
const MAX_LIST: u64 = 4096;
/// ggml's tensor names have 64 bytes with their NUL.
const MAX_NAME: u64 = 63;
/// The largest dimension of a tensor. llama.cpp takes more, but only beside one that is 0, where no byte holds it.
const MAX_DIMENSION: u64 = 1 << 40;
/// What keeping a key takes beside its characters and its value's, in bytes.
const ENTRY: usize = size_of::<(String, Value)>();
/// The keys that something is made of, beside those of the architecture.
const USED: [&str; 9] = [
    "adapter.type",
    "general.alignment",
    ARCHITECTURE,
    "general.name",
    "general.type",
    "split.count",
    "split.no",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.tokens",
];
/// The key that says what the keys of the model's own start with.
const ARCHITECTURE: &str = "general.architecture";

/// The metadata and tensor list of one GGUF file.
#[derive(Clone, Debug)]
pub struct Header {
    /// The version of the format: 2 or 3.
    pub version: u32,
    /// Metadata by key, as far as something is made of it; lists of the tokenizer are there by their lengths only.
    pub metadata: BTreeMap<String, Value>,
    /// The tensors in the order of the file, which is the order of their data.
    pub tensors: Vec<Tensor>,
    /// Where the data section starts.
    pub data_offset: u64,
    /// What tensor data is aligned to.
    pub alignment: u64,
}

impl Header {
    /// Reads a header from the start of a stream.
    ///
    /// # Errors
    /// Whatever llama.cpp would refuse as well: no GGUF, an unknown version or type, a duplicate, tensors whose
    /// data would overlap or leave gaps; and limits on counts and lengths.
    pub fn read(stream: impl Read) -> Result<Self, HeaderError> {
        Self::read_within(stream, &mut Allowance::default())
    }

    /// As [`Header::read`], keeping no more than `allowance` has left.
    fn read_within(stream: impl Read, allowance: &mut Allowance) -> Result<Self, HeaderError> {
        let mut reader = Reader::new(stream);
        let version = preamble(&mut reader)?;
        let tensor_count = reader.count("the number of tensors", MAX_TENSORS)?;
        let key_count = reader.count("the number of metadata keys", MAX_KEYS)?;
        let metadata = metadata(&mut reader, key_count, allowance)?;
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
            Some(_) => return Err(invalid(&reader, "general.alignment is no small power of two")),
        };
        let tensors = tensors(&mut reader, tensor_count, alignment, allowance)?;
        let data_offset = reader.offset.next_multiple_of(alignment);
        Ok(Self { version, metadata, tensors, data_offset, alignment })
    }

    /// Reads the header of an open file, by offset: the descriptor's position stays.
    ///
    /// # Errors
    /// As [`Header::read`], or more than `allowance` has left would be kept.
    pub fn read_file(file: &File, allowance: &mut Allowance) -> Result<Self, HeaderError> {
        Self::read_within(At::start(file), allowance)
    }

    /// The length that the file must have at least, for all tensors to be in it.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        let end = self.tensors.last().map_or(0, |t| t.offset.saturating_add(t.bytes));
        self.data_offset.saturating_add(end)
    }

    /// A number that isn't negative.
    ///
    /// # Errors
    /// The key is there with a value of another type.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, HeaderError> {
        self.typed(key, "a number that isn't negative", Value::as_u64)
    }

    /// A text.
    ///
    /// # Errors
    /// The key is there with a value of another type.
    pub fn str(&self, key: &str) -> Result<Option<&str>, HeaderError> {
        self.typed(key, "a short text", Value::as_str)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &'static str,
        take: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, HeaderError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match take(value) {
            Some(taken) => Ok(Some(taken)),
            None => Err(HeaderError::WrongType { key: key.to_owned(), found: value.kind(), wanted }),
        }
    }
}

fn invalid<R>(reader: &Reader<R>, what: impl Into<String>) -> HeaderError {
    HeaderError::Invalid { offset: reader.offset, what: what.into() }
}

/// Reads the magic and the version.
fn preamble<R: Read>(reader: &mut Reader<R>) -> Result<u32, HeaderError> {
    let mut magic = [0; 4];
    reader.exact(&mut magic, "the magic").map_err(|error| match error {
        HeaderError::Truncated { offset: 0, .. } => HeaderError::Empty,
        HeaderError::Truncated { .. } => HeaderError::NotGguf,
        other => other,
    })?;
    if &magic != b"GGUF" {
        return Err(HeaderError::NotGguf);
    }
    match reader.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        version if version != 0 && version & 0xffff == 0 => Err(HeaderError::BigEndian),
        version => Err(HeaderError::Version(version)),
    }
}

/// What has been seen, by its hash: a few bytes each, however long it is. Nobody can tell two names that are taken for
/// one, since each run hashes otherwise.
#[derive(Default)]
struct Seen {
    hasher: RandomState,
    hashes: HashSet<u64>,
}

impl Seen {
    /// Whether a name is new.
    fn insert(&mut self, name: &str) -> bool {
        self.hashes.insert(self.hasher.hash_one(name))
    }
}

/// Whether something is made of a key; as long as the architecture isn't known, it may be one of its keys.
fn is_used(key: &str, architecture: Option<&str>) -> bool {
    let own = |name: &str| key.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
    USED.contains(&key) || architecture.is_none_or(own)
}

fn keep<R>(reader: &Reader<R>, allowance: &mut Allowance, bytes: usize) -> Result<(), HeaderError> {
    allowance.take(bytes).ok_or_else(|| {
        invalid(reader, "there is more metadata, or there are more tensors, than all files of a model have")
    })
}

fn metadata<R: Read>(
    reader: &mut Reader<R>,
    count: u64,
    allowance: &mut Allowance,
) -> Result<BTreeMap<String, Value>, HeaderError> {
    let mut metadata = BTreeMap::new();
    let mut seen = Seen::default();
    let mut architecture = None;
    for _ in 0..count {
        let key = reader.text("a metadata key", MAX_KEY)?;
        if key.is_empty() {
            return Err(invalid(reader, "a metadata key is empty"));
        }
        let kind = reader.u32(&key)?;
        let value = if kind == ARRAY { list(reader, &key)? } else { scalar(reader, &key, kind)? };
        if !seen.insert(&key) {
            return Err(invalid(reader, format!("metadata key {key} stands there twice")));
        }
        if !is_used(&key, architecture.as_deref()) {
            continue;
        }
        keep(reader, allowance, ENTRY + key.len() + value.kept_bytes())?;
        if key == ARCHITECTURE {
            architecture = value.as_str().map(str::to_owned);
        }
        metadata.insert(key, value);
    }
    let architecture = architecture.unwrap_or_default();
    metadata.retain(|key, _| is_used(key, Some(&architecture)));
    Ok(metadata)
}

/// Type numbers of metadata values.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// The width of a scalar type in bytes.
fn width(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

fn scalar<R: Read>(reader: &mut Reader<R>, key: &str, kind: u32) -> Result<Value, HeaderError> {
    Ok(match kind {
        0 => Value::Unsigned(u8::from_le_bytes(reader.array(key)?).into()),
        1 => Value::Signed(i8::from_le_bytes(reader.array(key)?).into()),
        2 => Value::Unsigned(u16::from_le_bytes(reader.array(key)?).into()),
        3 => Value::Signed(i16::from_le_bytes(reader.array(key)?).into()),
        4 => Value::Unsigned(reader.u32(key)?.into()),
        5 => Value::Signed(i32::from_le_bytes(reader.array(key)?).into()),
        6 => Value::Float(f32::from_le_bytes(reader.array(key)?).into()),
        7 => Value::Bool(reader.array::<1>(key)?[0] != 0),
        STRING => {
            let len = reader.count(&format!("the length of {key}"), MAX_STRING)?;
            if len > MAX_TEXT {
                reader.skip(len, key)?;
                return Ok(Value::LongText(len));
            }
            Value::Text(reader.characters(key, len)?)
        }
        10 => Value::Unsigned(reader.u64(key)?),
        11 => Value::Signed(i64::from_le_bytes(reader.array(key)?)),
        12 => Value::Float(f64::from_le_bytes(reader.array(key)?)),
        _ => return Err(invalid(reader, format!("metadata {key} has the unknown type {kind}"))),
    })
}

fn list<R: Read>(reader: &mut Reader<R>, key: &str) -> Result<Value, HeaderError> {
    let kind = reader.u32(key)?;
    let len = reader.u64(key)?;
    if kind == STRING {
        for _ in 0..len {
            let n = reader.count("the length of a text", MAX_STRING)?;
            reader.skip(n, key)?;
        }
        return Ok(Value::Array(Array::Omitted { len }));
    }
    let Some(width) = width(kind) else {
        return Err(invalid(
            reader,
            format!("metadata {key} is a list of the unknown or nested type {kind}"),
        ));
    };
    if len > MAX_LIST || key.starts_with("tokenizer.") {
        reader.skip(len.saturating_mul(width), key)?;
        return Ok(Value::Array(Array::Omitted { len }));
    }
    let elements = (0..len).map(|_| scalar(reader, key, kind));
    Ok(Value::Array(match kind {
        7 => Array::Bools(elements.map(|v| v.map(|v| v.as_bool() == Some(true))).collect::<Result<_, _>>()?),
        6 | 12 => Array::Floats(
            elements.map(|v| v.map(|v| v.as_f64().unwrap_or_default())).collect::<Result<_, _>>()?,
        ),
        _ => Array::Integers(
            elements
                .map(|v| {
                    v.map(|v| match v {
                        Value::Signed(n) => n,
                        other => other.as_u64().and_then(|n| i64::try_from(n).ok()).unwrap_or(i64::MAX),
                    })
                })
                .collect::<Result<_, _>>()?,
        ),
    }))
}

fn tensors<R: Read>(
    reader: &mut Reader<R>,
    count: u64,
    alignment: u64,
    allowance: &mut Allowance,
) -> Result<Vec<Tensor>, HeaderError> {
    let mut tensors = Vec::new();
    let mut seen = Seen::default();
    let mut expected = 0_u64;
    for _ in 0..count {
        let name = reader.text("a tensor's name", MAX_NAME)?;
        let tensor = tensor(reader, name)?;
        // llama.cpp insists on data without gaps in the order of the list: so nothing overlaps.
        if tensor.offset != expected {
            return Err(invalid(
                reader,
                format!("tensor {} is at {} of the data, not at {expected}", tensor.name, tensor.offset),
            ));
        }
        expected = tensor
            .bytes
            .checked_next_multiple_of(alignment)
            .and_then(|padded| expected.checked_add(padded))
            .ok_or_else(|| invalid(reader, "the tensors have more bytes than can be counted"))?;
        if !seen.insert(&tensor.name) {
            return Err(invalid(reader, format!("tensor {} is declared twice", tensor.name)));
        }
        keep(reader, allowance, size_of::<Tensor>() + tensor.name.len())?;
        tensors.push(tensor);
    }
    Ok(tensors)
}

fn tensor<R: Read>(reader: &mut Reader<R>, name: String) -> Result<Tensor, HeaderError> {
    let dim_count = reader.u32(&name)?;
    if dim_count > 4 {
        return Err(invalid(reader, format!("tensor {name} has {dim_count} dimensions, more than 4")));
    }
    let mut dims = [1_u64; 4];
    for dim in dims.iter_mut().take(dim_count as usize) {
        *dim = reader.u64(&name)?;
        if *dim > MAX_DIMENSION {
            return Err(invalid(reader, format!("tensor {name} has a dimension of {dim}")));
        }
    }
    let number = reader.u32(&name)?;
    let kind = TensorType::from_number(number)
        .ok_or_else(|| invalid(reader, format!("tensor {name} has the unknown type {number}")))?;
    if dims[0] % kind.block_elements() != 0 {
        return Err(invalid(
            reader,
            format!("tensor {name} has rows of {}, no multiple of {}'s blocks", dims[0], kind.name()),
        ));
    }
    let bytes = dims[1..]
        .iter()
        .try_fold(dims[0] / kind.block_elements(), |n, d| n.checked_mul(*d))
        .and_then(|blocks| blocks.checked_mul(kind.block_bytes()))
        .filter(|bytes| *bytes < 1 << 62)
        .ok_or_else(|| invalid(reader, format!("tensor {name} has more bytes than can be counted")))?;
    let offset = reader.u64(&name)?;
    Ok(Tensor { name, dims, kind, offset, bytes, shard: 0 })
}

//! Model files as text, and the engine's measured bytes.
//!
//! A description holds one model's header: metadata with types, and tensors with shapes, equal layers
//! once. The vocabulary is there by its length only. [`inflate`] makes sparse GGUF files of it, of the
//! real length.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use plimsoll::gguf::TensorType;

pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/oracle")
}

/// One measurement.
#[derive(Debug)]
pub struct Cell {
    pub model: String,
    pub device: String,
    pub args: Vec<String>,
    /// None: the engine refuses or aborts.
    pub measured: Option<Measured>,
}

#[derive(Debug)]
#[allow(dead_code)] // compute is compared by the report
pub struct Measured {
    pub context: u64,
    pub slots: u64,
    pub unified: bool,
    pub weights: u64,
    pub kv: u64,
    pub state: u64,
    pub compute: u64,
    pub output: u64,
    pub buffers: Vec<Buffer>,
}

#[derive(Debug)]
#[allow(dead_code)] // as above
pub struct Buffer {
    pub name: String,
    pub weights: u64,
    pub cache: u64,
    pub compute: u64,
}

impl Measured {
    /// The sum over buffers whose name starts so.
    pub fn sum(&self, prefix: &str, part: impl Fn(&Buffer) -> u64) -> u64 {
        self.buffers.iter().filter(|b| b.name.starts_with(prefix)).map(part).sum()
    }
}

/// Reads a table of measurements.
pub fn cells(path: &Path) -> Vec<Cell> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().filter(|l| !l.starts_with('#')).map(cell).collect()
}

fn cell(line: &str) -> Cell {
    let fields: Vec<&str> = line.split('\t').collect();
    let numbers = |text: &str, separator: char| -> Vec<u64> {
        text.split(separator).map(|n| n.parse().unwrap()).collect()
    };
    let measured = (fields[3] != "rejected").then(|| {
        let n = numbers(fields[3], ' ');
        let buffer = |text: &str| {
            let (name, sizes) = text.split_once('=').unwrap();
            let n = numbers(sizes, '/');
            Buffer { name: name.to_owned(), weights: n[0], cache: n[1], compute: n[2] }
        };
        Measured {
            context: n[0],
            slots: n[1],
            unified: n[2] == 1,
            weights: n[4],
            kv: n[5],
            state: n[6],
            compute: n[7],
            output: n[8],
            buffers: fields[4].split(' ').map(buffer).collect(),
        }
    });
    Cell {
        model: fields[0].to_owned(),
        device: fields[1].to_owned(),
        args: fields[2].split_whitespace().map(str::to_owned).collect(),
        measured,
    }
}

/// Makes the files of a model below `to` and returns the first one's path.
pub fn inflate(description: &Path, to: &Path) -> PathBuf {
    let name = description.file_stem().unwrap().to_str().unwrap().to_owned();
    let text = fs::read_to_string(description).unwrap();
    let parts: Vec<&str> = text.split("file ").filter(|p| !p.is_empty()).collect();
    let path = |i: usize| match parts.len() {
        1 => to.join(format!("{name}.gguf")),
        n => to.join(format!("{name}-{:05}-of-{n:05}.gguf", i + 1)),
    };
    for (i, part) in parts.iter().enumerate() {
        let (first, rest) = part.split_once('\n').unwrap();
        let size: u64 = first.split(' ').next().unwrap().parse().unwrap();
        let mut file = File::create(path(i)).unwrap();
        file.write_all(&header(rest)).unwrap();
        file.set_len(size).unwrap();
    }
    path(0)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

const TYPES: [&str; 13] =
    ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "list", "u64", "i64", "f64"];

fn type_number(name: &str) -> u32 {
    u32::try_from(TYPES.iter().position(|t| *t == name).unwrap()).unwrap()
}

fn put_scalar(out: &mut Vec<u8>, kind: &str, value: &str) {
    match kind {
        "u8" => out.extend(value.parse::<u8>().unwrap().to_le_bytes()),
        "i8" => out.extend(value.parse::<i8>().unwrap().to_le_bytes()),
        "u16" => out.extend(value.parse::<u16>().unwrap().to_le_bytes()),
        "i16" => out.extend(value.parse::<i16>().unwrap().to_le_bytes()),
        "u32" => out.extend(value.parse::<u32>().unwrap().to_le_bytes()),
        "i32" => out.extend(value.parse::<i32>().unwrap().to_le_bytes()),
        "u64" => out.extend(value.parse::<u64>().unwrap().to_le_bytes()),
        "i64" => out.extend(value.parse::<i64>().unwrap().to_le_bytes()),
        "f32" => out.extend(value.parse::<f32>().unwrap().to_le_bytes()),
        "f64" => out.extend(value.parse::<f64>().unwrap().to_le_bytes()),
        "bool" => out.push(u8::from(value == "1")),
        "str" => put_text(out, value),
        other => panic!("no type {other}"),
    }
}

fn put_value(out: &mut Vec<u8>, value: &str) {
    let (kind, value) = value.split_once(' ').unwrap_or((value, ""));
    if kind == "strings" {
        let count: u64 = value.parse().unwrap();
        out.extend(9_u32.to_le_bytes());
        out.extend(8_u32.to_le_bytes());
        out.extend(count.to_le_bytes());
        out.resize(out.len() + 8 * usize::try_from(count).unwrap(), 0);
        return;
    }
    if let Some(kind) = kind.strip_prefix("list-") {
        let runs = value.split_whitespace().map(|run| run.split_once('*').unwrap_or((run, "1")));
        let all: Vec<&str> =
            runs.flat_map(|(value, n)| std::iter::repeat_n(value, n.parse().unwrap())).collect();
        out.extend(9_u32.to_le_bytes());
        out.extend(type_number(kind).to_le_bytes());
        out.extend((all.len() as u64).to_le_bytes());
        all.iter().for_each(|value| put_scalar(out, kind, value));
        return;
    }
    out.extend(type_number(kind).to_le_bytes());
    put_scalar(out, kind, value);
}

/// The bytes of a header from its description.
fn header(text: &str) -> Vec<u8> {
    let mut keys = Vec::new();
    let mut key_count = 0_u64;
    let mut tensors: Vec<(String, String)> = Vec::new();
    let mut kinds: Vec<Vec<String>> = Vec::new();
    for line in text.lines() {
        if let Some(tensor) = line.strip_prefix("tensor ") {
            let (name, shape) = tensor.split_once(' ').unwrap();
            tensors.push((name.to_owned(), shape.to_owned()));
        } else if line.starts_with("kind ") {
            kinds.push(Vec::new());
        } else if let Some(tensor) = line.strip_prefix("  ") {
            kinds.last_mut().unwrap().push(tensor.to_owned());
        } else if let Some(layers) = line.strip_prefix("layers ") {
            let (range, kind) = layers.split_once(" as ").unwrap();
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let kind: usize = kind.parse().unwrap();
            for layer in first.parse::<u32>().unwrap()..=last.parse().unwrap() {
                for tensor in &kinds[kind] {
                    let (name, shape) = tensor.split_once(' ').unwrap();
                    tensors.push((format!("blk.{layer}.{name}"), shape.to_owned()));
                }
            }
        } else {
            let (key, value) = line.split_once(" = ").unwrap();
            put_text(&mut keys, key);
            put_value(&mut keys, value);
            key_count += 1;
        }
    }
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(key_count.to_le_bytes());
    out.extend(keys);
    let mut offset = 0_u64;
    for (name, shape) in tensors {
        let (kind, dims) = shape.split_once(' ').unwrap();
        let kind = TensorType::from_name(kind).unwrap();
        let dims: Vec<u64> = dims.split('x').map(|d| d.parse().unwrap()).collect();
        put_text(&mut out, &name);
        out.extend(u32::try_from(dims.len()).unwrap().to_le_bytes());
        dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(kind.number().to_le_bytes());
        out.extend(offset.to_le_bytes());
        let bytes = kind.row_bytes(dims[0]) * dims[1..].iter().product::<u64>();
        offset += bytes.next_multiple_of(32);
    }
    out
}

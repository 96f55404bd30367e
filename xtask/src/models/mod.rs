//! The generated models: random, finite weights that the real llama-server loads and answers with,
//! holes for what only has to be admitted, and files broken in every way that a download can be.

pub mod broken;
pub mod deepseek;
pub mod gguf;

use crate::host;
use anyhow::Result;
use gguf::{Fill, Kind, Metadata, Tensor, Value};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// One million bytes.
const MB: u64 = 1_000_000;
/// Raise when the same list would give other files.
const RECIPE: u32 = 1;

/// A model of the qwen3moe kind: many small experts of which two are used, so that even an
/// emulated processor answers at a few tokens a second whatever the size of the file.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Path below the model directory, without `.gguf`.
    pub name: &'static str,
    /// About this many bytes on disk.
    pub bytes: u64,
    /// Element type of the matrices.
    pub kind: Kind,
    /// Files.
    pub shards: u16,
    /// The context that the file says it was trained on.
    pub context: u32,
    /// Holes instead of weights: enough for admission and accounting, no room on disk.
    pub sparse: bool,
}

const fn dense(name: &'static str, bytes: u64, kind: Kind, shards: u16) -> Model {
    Model { name, bytes, kind, shards, context: 32768, sparse: false }
}

const fn sparse(name: &'static str, bytes: u64) -> Model {
    Model { name, bytes, kind: Kind::Q8_0, shards: 1, context: 32768, sparse: true }
}

/// What lies in the guest's `/srv/models`. 8-bit blocks mostly: emulated processors are slow at 16-bit floats.
pub const MODELS: &[Model] = &[
    dense("small", 60 * MB, Kind::F16, 1),
    dense("mid", 250 * MB, Kind::Q8_0, 4),
    dense("twin", 250 * MB, Kind::Q8_0, 1),
    dense("large", 900 * MB, Kind::Q8_0, 1),
    sparse("impossible", 40_000 * MB),
    // Larger than what the guest's memory has for models. Not of holes: those are never read from disk, and no zeros go to swap.
    dense("monster", 2_000 * MB, Kind::Q8_0, 1),
    // Of these the guest holds one, whatever its system leaves.
    sparse("rival-a", 900 * MB),
    sparse("rival-b", 900 * MB),
    sparse("rival-c", 900 * MB),
    sparse("crowd-0", 350 * MB),
    sparse("crowd-1", 350 * MB),
    sparse("crowd-2", 350 * MB),
    sparse("crowd-3", 350 * MB),
    sparse("crowd-4", 350 * MB),
    sparse("crowd-5", 350 * MB),
    sparse("crowd-6", 350 * MB),
    sparse("crowd-7", 350 * MB),
    sparse("crowd-8", 350 * MB),
    sparse("crowd-9", 350 * MB),
];

/// What the guest's disk has when one of them is to be half as large again as the guest's memory of 2 GiB.
pub const OVERSIZED: &[Model] = &[dense("leviathan", 3_200 * MB, Kind::Q8_0, 1), sparse("rival-a", 900 * MB)];

/// Widths of a generated model.
#[derive(Debug, Clone, Copy)]
struct Shape {
    layers: u32,
    embedding: u64,
    heads: u32,
    kv_heads: u32,
    head: u64,
    experts: u32,
    expert_ff: u64,
}

impl Shape {
    /// A shape whose file has about `bytes` bytes.
    fn of_size(bytes: u64, kind: Kind) -> Shape {
        let (experts, embedding, expert_ff) = match bytes / MB {
            0..200 => (16, 256, 512),
            200..600 => (32, 256, 512),
            600..5000 => (64, 512, 512),
            _ => (128, 1024, 2048),
        };
        let per_layer = kind.bytes(3 * embedding * expert_ff * u64::from(experts));
        let layers = u32::try_from((bytes / per_layer).max(1)).unwrap_or(u32::MAX);
        Shape { layers, embedding, heads: 4, kv_heads: 2, head: 64, experts, expert_ff }
    }

    fn tensors(&self, vocabulary: u64, kind: Kind) -> Vec<Tensor> {
        let tensor = |name: String, shape: &[u64], kind| Tensor { name, shape: shape.to_vec(), kind };
        let (e, f, experts) = (self.embedding, self.expert_ff, u64::from(self.experts));
        let (q, kv) = (u64::from(self.heads) * self.head, u64::from(self.kv_heads) * self.head);
        let mut all = vec![
            tensor("token_embd.weight".into(), &[e, vocabulary], kind),
            tensor("output_norm.weight".into(), &[e], Kind::F32),
            tensor("output.weight".into(), &[e, vocabulary], kind),
        ];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[u64], kind| {
                all.push(tensor(format!("blk.{layer}.{name}.weight"), shape, kind));
            };
            add("attn_norm", &[e], Kind::F32);
            add("attn_q", &[e, q], kind);
            add("attn_k", &[e, kv], kind);
            add("attn_v", &[e, kv], kind);
            add("attn_output", &[q, e], kind);
            add("attn_q_norm", &[self.head], Kind::F32);
            add("attn_k_norm", &[self.head], Kind::F32);
            add("ffn_norm", &[e], Kind::F32);
            add("ffn_gate_inp", &[e, experts], Kind::F32);
            add("ffn_gate_exps", &[e, f, experts], kind);
            add("ffn_down_exps", &[f, e, experts], kind);
            add("ffn_up_exps", &[e, f, experts], kind);
        }
        all
    }

    fn metadata(&self, name: &str, context: u32) -> Result<Metadata> {
        let mut all: Metadata = vec![
            ("general.architecture".into(), Value::Text("qwen3moe".into())),
            ("general.name".into(), Value::Text(name.into())),
        ];
        let mut add = |key: &str, value| all.push((format!("qwen3moe.{key}"), value));
        add("block_count", Value::U32(self.layers));
        add("context_length", Value::U32(context));
        add("embedding_length", Value::U32(u32::try_from(self.embedding)?));
        add("feed_forward_length", Value::U32(u32::try_from(self.expert_ff)?));
        add("expert_feed_forward_length", Value::U32(u32::try_from(self.expert_ff)?));
        add("expert_count", Value::U32(self.experts));
        add("expert_used_count", Value::U32(2));
        add("attention.head_count", Value::U32(self.heads));
        add("attention.head_count_kv", Value::U32(self.kv_heads));
        add("attention.key_length", Value::U32(u32::try_from(self.head)?));
        add("attention.value_length", Value::U32(u32::try_from(self.head)?));
        add("attention.layer_norm_rms_epsilon", Value::F32(1e-6));
        add("rope.freq_base", Value::F32(1e6));
        Ok(all)
    }
}

/// A byte-level BPE vocabulary in GPT-2's manner: the 256 bytes, a few merges, an end of text.
struct Vocabulary {
    tokens: Vec<String>,
    merges: Vec<String>,
}

impl Vocabulary {
    fn new() -> Vocabulary {
        // GPT-2 shows printable bytes as themselves and moves the others to U+0100 upwards.
        let mut moved = 0x100..;
        let mut tokens: Vec<String> = (0_u8..=255)
            .map(|byte| match byte {
                b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte).to_string(),
                _ => moved.next().and_then(char::from_u32).map(String::from).unwrap_or_default(),
            })
            .collect();
        let merges: Vec<String> =
            ["Ġ t", "h e", "i n", "Ġt he", "o n", "e r"].into_iter().map(String::from).collect();
        tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
        tokens.push("<|endoftext|>".into());
        Vocabulary { tokens, merges }
    }

    fn metadata(&self) -> Result<Metadata> {
        const NORMAL: i32 = 1;
        const CONTROL: i32 = 3;
        let last = self.tokens.len() - 1;
        let kinds =
            (0..self.tokens.len()).map(|index| if index == last { CONTROL } else { NORMAL }).collect();
        let end = Value::U32(u32::try_from(last)?);
        Ok(vec![
            ("tokenizer.ggml.model".into(), Value::Text("gpt2".into())),
            ("tokenizer.ggml.pre".into(), Value::Text("gpt-2".into())),
            ("tokenizer.ggml.tokens".into(), Value::Texts(self.tokens.clone())),
            ("tokenizer.ggml.token_type".into(), Value::I32s(kinds)),
            ("tokenizer.ggml.merges".into(), Value::Texts(self.merges.clone())),
            ("tokenizer.ggml.bos_token_id".into(), end.clone()),
            ("tokenizer.ggml.eos_token_id".into(), end),
        ])
    }
}

/// Leaves every tensor a hole.
pub struct Holes;

impl Fill for Holes {
    fn fill(&mut self, _tensor: &Tensor, _out: &mut dyn Write) -> Result<bool> {
        Ok(false)
    }
}

/// Random finite weights from a seed. Drawn once into a pool per type, then copied from places in
/// it that depend on the seed: fast enough for gigabytes in an unoptimised build.
pub struct Weights {
    state: u64,
    halves: Vec<u8>,
    blocks: Vec<u8>,
}

impl Weights {
    const POOL: usize = 1 << 19;

    /// Weights that depend on `seed` alone.
    pub fn new(seed: u64) -> Weights {
        let mut weights = Weights { state: seed, halves: Vec::new(), blocks: Vec::new() };
        for _ in 0..Self::POOL {
            let random = weights.next();
            for pair in random.to_le_bytes().chunks_exact(2) {
                let half = Self::half(u16::from_le_bytes([pair[0], pair[1]]));
                weights.halves.extend(half.to_le_bytes());
            }
        }
        for _ in 0..Self::POOL / 8 {
            // The scale of a block: 2^-12 or so, times up to 127.
            let [low, high, ..] = weights.next().to_le_bytes();
            let scale = (3_u16 << 10) | (u16::from_le_bytes([low, high]) & 0x3ff);
            weights.blocks.extend(scale.to_le_bytes());
            for _ in 0..4 {
                let random = weights.next();
                weights.blocks.extend(random.to_le_bytes());
            }
        }
        weights
    }

    /// A 16-bit float between 2^-7 and 2^-3 with random sign, exponent and mantissa.
    fn half(random: u16) -> u16 {
        let exponent = 8 + ((random >> 10) & 3);
        (random & 0x8000) | (exponent << 10) | (random & 0x3ff)
    }

    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Fill for Weights {
    fn fill(&mut self, tensor: &Tensor, out: &mut dyn Write) -> Result<bool> {
        let mut left = usize::try_from(tensor.bytes())?;
        if tensor.kind == Kind::F32 {
            // Norms are one; the router is random like everything else.
            let norm = tensor.shape.len() == 1;
            for _ in 0..left / 4 {
                let random = self.next();
                let value = if norm { 1.0 } else { (random % 2001) as f32 / 1000.0 - 1.0 };
                out.write_all(&value.to_le_bytes())?;
            }
            return Ok(true);
        }
        let unit = if tensor.kind == Kind::Q8_0 { 34 } else { 2 };
        while left > 0 {
            let random = usize::try_from(self.next() >> 32)?;
            let pool = if tensor.kind == Kind::Q8_0 { &self.blocks } else { &self.halves };
            let start = random % (pool.len() / unit / 2) * unit;
            let piece = &pool[start..pool.len().min(start + left)];
            out.write_all(piece)?;
            left -= piece.len();
        }
        Ok(true)
    }
}

impl Model {
    /// Writes the model below `directory`; returns its first file.
    pub fn write(&self, directory: &Path) -> Result<PathBuf> {
        let shape = Shape::of_size(self.bytes, self.kind);
        let vocabulary = Vocabulary::new();
        let mut metadata = shape.metadata(self.name, self.context)?;
        metadata.extend(vocabulary.metadata()?);
        let tensors = shape.tensors(vocabulary.tokens.len() as u64, self.kind);
        let base = directory.join(self.name);
        if let Some(parent) = base.parent() {
            fs::create_dir_all(parent)?;
        }
        let seed = u64::from_str_radix(&host::fingerprint(self.name), 16)?;
        let mut holes = Holes;
        let mut weights;
        let fill: &mut dyn Fill = if self.sparse {
            &mut holes
        } else {
            weights = Weights::new(seed);
            &mut weights
        };
        gguf::write_model(&base, self.shards, &metadata, &tensors, fill)
    }
}

/// The second disk of the guest, from the cache; made first when it is not there.
pub fn ensure_disk() -> Result<PathBuf> {
    ensure("models", MODELS, broken::write_all)
}

/// One with [`OVERSIZED`] on it.
pub fn ensure_oversized_disk() -> Result<PathBuf> {
    ensure("oversized", OVERSIZED, |_| Ok(()))
}

fn ensure(kind: &str, models: &[Model], further: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let cache = host::cache_directory()?;
    let recipe = format!("{RECIPE} {models:?}");
    let disk = cache.join(format!("{kind}-{}.img", host::fingerprint(&recipe)));
    let lock = fs::File::create(cache.join("models.lock"))?;
    lock.lock()?;
    if disk.exists() {
        return Ok(disk);
    }
    println!("generating the models into {}", disk.display());
    let started = std::time::Instant::now();
    let tree = cache.join("models.tree");
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir_all(&tree)?;
    for model in models {
        model.write(&tree)?;
    }
    further(&tree)?;
    let partial = disk.with_extension("partial");
    let _ = fs::remove_file(&partial);
    let mut mke2fs = std::process::Command::new(host::find("mke2fs").unwrap_or_else(|| "mke2fs".into()));
    mke2fs
        .args(["-q", "-F", "-t", "ext4", "-L", "models", "-m", "0", "-d"])
        .arg(&tree)
        .arg(&partial)
        .arg("12G");
    host::output(&mut mke2fs)?;
    fs::remove_dir_all(&tree)?;
    fs::rename(&partial, &disk)?;
    host::prune(&cache, &format!("{kind}-"), &disk)?;
    println!("generated the models in {} s", started.elapsed().as_secs());
    Ok(disk)
}

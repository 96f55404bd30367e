//! The context's shape, and the caches and states that follow from it.

use super::FitError;
use super::arch::Indexer;
use super::facts::{Facts, Layer};
use super::settings::{FlashAttention, Settings};
use super::weights::Assigned;
use crate::gguf::TensorType;

/// Slots that the server takes of its own accord.
const AUTOMATIC_SLOTS: u32 = 4;
/// llama.cpp's limit on sequences.
const MAX_SLOTS: u32 = 256;
/// Contexts are rounded up to this.
const PAD: u64 = 256;
/// A context of more tokens than this is a slip of the keyboard (llama.cpp counts in 32 bits).
const MAX_CONTEXT: u64 = 1 << 31;

/// What the settings come to: the sizes that everything else is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Context of all slots together, after rounding.
    pub context: u64,
    /// Cells of a stream.
    pub cells: u64,
    /// Cells of a stream in windowed layers.
    pub window_cells: u64,
    /// Streams: one where the cache is unified, otherwise one for each slot.
    pub streams: u64,
    /// Slots.
    pub slots: u32,
    /// Whether all slots share one cache.
    pub unified: bool,
    /// Whether flash attention is used.
    pub flash_attention: bool,
    /// Logical batch after limits.
    pub batch: u64,
    /// Physical batch after limits.
    pub ubatch: u64,
    /// Most outputs of a batch.
    pub outputs: u64,
}

impl Shape {
    /// Applies llama-server's rules on slots, context and batches.
    ///
    /// # Errors
    /// What llama-server would refuse.
    pub fn new(facts: &Facts, settings: &Settings) -> Result<Self, FitError> {
        let rejected = |why: &str| Err(FitError::Rejected(why.to_owned()));
        let slots = settings.parallel.unwrap_or(AUTOMATIC_SLOTS);
        if slots == 0 || slots > MAX_SLOTS {
            return rejected("slots (--parallel) are 1 to 256");
        }
        let unified = match settings.parallel {
            None => true,
            Some(_) => settings.kv_unified.unwrap_or(false),
        };
        let asked = match (settings.context, settings.context_per_slot) {
            (0, Some(per_slot)) => per_slot.saturating_mul(u64::from(slots)),
            (0, None) => facts.context_train,
            (context, _) => context,
        };
        if asked == 0 {
            return rejected("the model doesn't say what context it was trained on: set --ctx-size");
        }
        if asked > MAX_CONTEXT {
            return rejected("the context (--ctx-size) is larger than the engine can count");
        }
        let context = asked.next_multiple_of(PAD);
        let (context, cells, streams) = if unified {
            (context, context, 1)
        } else {
            let cells = (context / u64::from(slots)).next_multiple_of(PAD);
            (cells * u64::from(slots), cells, u64::from(slots))
        };
        if cells == 0 {
            return rejected("the context is smaller than the number of slots");
        }
        let batch = u64::from(settings.batch).min(asked);
        let ubatch = if settings.ubatch == 0 { batch } else { u64::from(settings.ubatch).min(batch) };
        if batch == 0 {
            return rejected("the batch (--batch-size) is 0");
        }
        let in_window = facts.window * if unified { u64::from(slots) } else { 1 };
        let window_cells = (in_window + ubatch).min(cells).next_multiple_of(PAD);
        let window_cells = if settings.swa_full { cells } else { window_cells };
        // Grok's attention can't be fused: the engine turns that off.
        let flash_attention = settings.flash_attention != FlashAttention::Off && facts.architecture != "grok";
        // Each slot has the token that it samples, and those that were drafted for it.
        let sampled = u64::from(slots).saturating_mul(1 + settings.drafted());
        let outputs = if settings.embedding || settings.all_outputs { batch } else { batch.min(sampled) };
        let shape = Self {
            context,
            cells,
            window_cells,
            streams,
            slots,
            unified,
            flash_attention,
            batch,
            ubatch,
            outputs,
        };
        shape.check(facts, settings)?;
        Ok(shape)
    }

    /// Settings that the engine refuses or aborts on.
    fn check(&self, facts: &Facts, settings: &Settings) -> Result<(), FitError> {
        let rejected = |why: String| Err(FitError::Rejected(why));
        let (k, v) = (settings.cache_type_k, settings.cache_type_v);
        let quantised = |t: TensorType| t.block_elements() > 1;
        if facts.latent.is_some() && k != v && (quantised(k) || quantised(v)) {
            return rejected(format!(
                "with multi-head latent attention both caches have one type: set --cache-type-v {} as well",
                k.name()
            ));
        }
        if quantised(v) && !self.flash_attention {
            return rejected(format!(
                "a cache of V in {} needs flash attention: set --flash-attn on",
                v.name()
            ));
        }
        if settings.batch < self.slots && !settings.embedding {
            return rejected(format!(
                "a batch of {} is smaller than the {} slots: set --batch-size {} or --parallel {}",
                settings.batch, self.slots, self.slots, settings.batch
            ));
        }
        Ok(())
    }
}

/// Cache and state of one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    pub kv: u64,
    pub state: u64,
}

/// Cache and state of all places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cached {
    pub host: Held,
    pub devices: Vec<Held>,
    /// False where the cache is only bounded.
    pub exact: bool,
}

/// Sizes caches and states, layer by layer, where their layers are.
pub(super) fn cache(
    facts: &Facts,
    settings: &Settings,
    shape: &Shape,
    assigned: &Assigned,
    devices: usize,
) -> Result<Cached, FitError> {
    let mut cached = Cached {
        devices: vec![Held::default(); devices],
        exact: facts.arch.indexer != Indexer::Unknown,
        ..Cached::default()
    };
    // Without flash attention V is stored transposed, and as wide in every layer as in the widest.
    let widest = facts.layers.iter().map(|l| v_width(facts, l)).max().unwrap_or(0);
    for (i, layer) in facts.layers.iter().enumerate() {
        let place = assigned.layers.get(i).copied().flatten().filter(|_| settings.kv_offload);
        let held = match place {
            Some(device) => &mut cached.devices[device],
            None => &mut cached.host,
        };
        if layer.cached {
            let v_width = if shape.flash_attention { v_width(facts, layer) } else { widest };
            held.kv = held.kv.saturating_add(layer_cache(facts, settings, shape, layer, v_width)?);
        }
        if layer.recurrent {
            let floats = facts.state.rolling.saturating_add(facts.state.recurrent);
            let states = u64::from(shape.slots).saturating_mul(1 + settings.rollback());
            held.state = held.state.saturating_add(floats.saturating_mul(4).saturating_mul(states));
        }
    }
    Ok(cached)
}

fn v_width(facts: &Facts, layer: &Layer) -> u64 {
    let head = if layer.windowed { facts.head_windowed.1 } else { facts.head.1 };
    head.saturating_mul(layer.kv_heads)
}

/// The cache of one layer.
fn layer_cache(
    facts: &Facts,
    settings: &Settings,
    shape: &Shape,
    layer: &Layer,
    v: u64,
) -> Result<u64, FitError> {
    let cells = shape.streams * if layer.windowed { shape.window_cells } else { shape.cells };
    let head = if layer.windowed { facts.head_windowed.0 } else { facts.head.0 };
    let mut row = row(settings.cache_type_k, head.saturating_mul(layer.kv_heads), "K")?;
    if facts.latent.is_none() {
        row = row.saturating_add(self::row(settings.cache_type_v, v, "V")?);
    }
    if layer.indexed {
        let keys = match facts.arch.indexer {
            Indexer::Pooled(n) => facts.indexer_key.saturating_mul(n),
            _ => facts.indexer_key,
        };
        row = row.saturating_add(self::row(settings.cache_type_k, keys, "the indexer")?);
        if facts.arch.indexer == Indexer::AfterDense {
            row = row.saturating_add(self::row(settings.cache_type_v, facts.head.1, "the indexer")?);
        }
    }
    Ok(cells.saturating_mul(row))
}

/// The bytes of a row; a row that is no whole number of blocks is refused, as by ggml.
fn row(kind: TensorType, elements: u64, of: &str) -> Result<u64, FitError> {
    if elements.is_multiple_of(kind.block_elements()) {
        return Ok(kind.row_bytes(elements));
    }
    Err(FitError::Rejected(format!(
        "rows of {elements} of the cache of {of} are no multiple of the blocks of {}: choose f16 for it",
        kind.name()
    )))
}

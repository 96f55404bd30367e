//! Every llama-server setting that changes memory, with llama-server's own defaults.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::beside::Beside;
use crate::gguf::TensorType;

/// llama.cpp's defaults for drafts from the text itself (`common_params_speculative`).
const NGRAM_TOKENS: u32 = 48;
const NGRAM_MOD_TOKENS: u32 = 64;
const NGRAM_CACHE_TOKENS: u32 = 8;

/// Whether flash attention is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlashAttention {
    /// Where the devices can: the engine's default.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never: the cache of V is stored otherwise, and the attention matrix takes memory.
    Off,
}

/// How many layers are kept on the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GpuLayers {
    /// Chosen so that it fits: by [`super::place`], or by the engine's own `--fit`.
    #[default]
    Auto,
    /// All of them, and the output.
    All,
    /// The last so many, where the output counts as one.
    Count(u32),
}

/// How the files are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadMode {
    /// Mapped, unless a device can't.
    #[default]
    Auto,
    /// Read into anonymous memory.
    None,
    /// Mapped.
    Mmap,
    /// Read into anonymous memory that is locked.
    Mlock,
    /// Mapped and locked.
    MmapMlock,
    /// Read with direct I/O into anonymous memory.
    DirectIo,
}

/// How a model is split over several devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SplitMode {
    /// One device only.
    None,
    /// Whole layers on each.
    #[default]
    Layer,
    /// Rows of tensors on each.
    Row,
    /// Tensors in parallel.
    Tensor,
}

/// Tensors that go elsewhere than their layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Override {
    /// The experts of the first so many layers stay on the host; `u32::MAX` is all (`--cpu-moe`).
    CpuMoe(u32),
    /// The dense feed-forward weights of the first so many layers stay on the host.
    CpuFfn(u32),
    /// Tensors whose name contains a match of the pattern go into buffers of this type (`CPU`, `ROCm0`).
    Pattern {
        /// A regular expression.
        pattern: String,
        /// The engine's name of the buffer type.
        buffer: String,
    },
}

/// A draft model's settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// The type of its K cache.
    pub cache_type_k: TensorType,
    /// The type of its V cache.
    pub cache_type_v: TensorType,
    /// `--spec-draft-device`: names of devices to use; not given is those of the model.
    pub devices: Option<Vec<String>>,
    /// How many of its layers are on the GPU.
    pub gpu_layers: GpuLayers,
    /// How many tokens are drafted at once.
    pub tokens: u32,
    /// Its physical batch; 0 is that of the model.
    pub ubatch: u32,
    /// Its tensors that go elsewhere.
    pub overrides: Vec<Override>,
}

impl Default for Draft {
    fn default() -> Self {
        Self {
            cache_type_k: TensorType::F16,
            cache_type_v: TensorType::F16,
            devices: None,
            gpu_layers: GpuLayers::Auto,
            tokens: 3,
            ubatch: 0,
            overrides: Vec::new(),
        }
    }
}

/// The settings of llama-server that change memory; the default is llama-server's own.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `--ctx-size`: tokens of all slots together; 0 is what the model was trained on.
    pub context: u64,
    /// `--parallel`: slots; none is automatic, which is four with a unified cache.
    pub parallel: Option<u32>,
    /// `--kv-unified`: one cache for all slots; none is the engine's choice.
    pub kv_unified: Option<bool>,
    /// `--kv-unified-per-slot`: the context of a slot, from which the whole is made when no context is given.
    pub context_per_slot: Option<u64>,
    /// `--batch-size`: logical batch in tokens.
    pub batch: u32,
    /// `--ubatch-size`: physical batch in tokens.
    pub ubatch: u32,
    /// `--cache-type-k`.
    pub cache_type_k: TensorType,
    /// `--cache-type-v`.
    pub cache_type_v: TensorType,
    /// `--flash-attn`.
    pub flash_attention: FlashAttention,
    /// `--swa-full`: windowed layers get a cache of full size.
    pub swa_full: bool,
    /// `--kv-offload`: the cache follows its layers onto the GPU.
    pub kv_offload: bool,
    /// `--op-offload`: large batches use the GPU for weights on the host.
    pub op_offload: bool,
    /// `--gpu-layers`.
    pub gpu_layers: GpuLayers,
    /// `--cpu-moe`, `--n-cpu-moe`, `--n-cpu-ffn` and `--override-tensor` in order: the first that matches a
    /// tensor says where it goes.
    pub overrides: Vec<Override>,
    /// `--moe-cache-mib`: GPU cache for experts on the host.
    pub moe_cache_mib: u64,
    /// `--split-mode`.
    pub split_mode: SplitMode,
    /// `--tensor-split`: proportions of the devices.
    pub tensor_split: Vec<f64>,
    /// `--main-gpu`.
    pub main_gpu: u32,
    /// `--device`: names of devices to use; `none` is an empty list; not given is all.
    pub devices: Option<Vec<String>>,
    /// `--repack`: weights on the host are rearranged for the processor, into anonymous memory.
    pub repack: bool,
    /// `--no-host`: no pinned host buffers.
    pub no_host: bool,
    /// `--load-mode`.
    pub load_mode: LoadMode,
    /// `--fit`: the engine adjusts what isn't set to the memory it finds.
    pub fit: bool,
    /// `--embedding` or `--reranking`: a batch is processed at once, and every token has an output.
    pub embedding: bool,
    /// Every token of a batch has an output, as llama-fit-params assumes: no setting of llama-server, whose
    /// slots have one each.
    pub all_outputs: bool,
    /// `--backend-sampling`: sampling becomes part of the graph.
    pub backend_sampling: bool,
    /// `--cache-ram` in MiB: the limit of the prompt cache; none is no limit, 0 is no cache.
    pub prompt_cache_mib: Option<u64>,
    /// `--ctx-checkpoints`: checkpoints of recurrent state or windows for each slot.
    pub context_checkpoints: u32,
    /// `--checkpoint-min-step`: tokens between checkpoints at least.
    pub checkpoint_step: u64,
    /// `--threads`, which ggml's work buffer depends on; none is the number of processors.
    pub threads: Option<u32>,
    /// `--override-kv`: metadata that is replaced: key, and value as text with its type.
    pub metadata_overrides: Vec<(String, String)>,
    /// `--lora` and `--lora-scaled`: adapters.
    pub adapters: Vec<PathBuf>,
    /// `--control-vector` or `--control-vector-scaled`: a vector is added in every layer.
    pub control_vector: bool,
    /// `--mmproj-offload`: the projector is on the GPU.
    pub mmproj_offload: bool,
    /// `--image-max-tokens`; none is the projector's own limit.
    pub image_max_tokens: Option<u64>,
    /// Speculative decoding types that were asked for.
    pub speculative: Vec<String>,
    /// Most tokens that the speculative types without a draft model draft at once, by the type.
    pub ngram_tokens: BTreeMap<String, u32>,
    /// Settings of a draft model.
    pub draft: Draft,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            context: 0,
            parallel: None,
            kv_unified: None,
            context_per_slot: None,
            batch: 2048,
            ubatch: 512,
            cache_type_k: TensorType::F16,
            cache_type_v: TensorType::F16,
            flash_attention: FlashAttention::Auto,
            swa_full: false,
            kv_offload: true,
            op_offload: true,
            gpu_layers: GpuLayers::Auto,
            overrides: Vec::new(),
            moe_cache_mib: 0,
            split_mode: SplitMode::Layer,
            tensor_split: Vec::new(),
            main_gpu: 0,
            devices: None,
            repack: true,
            no_host: false,
            load_mode: LoadMode::Auto,
            fit: true,
            embedding: false,
            all_outputs: false,
            backend_sampling: false,
            prompt_cache_mib: Some(8192),
            context_checkpoints: 32,
            checkpoint_step: 8192,
            threads: None,
            metadata_overrides: Vec::new(),
            adapters: Vec::new(),
            control_vector: false,
            mmproj_offload: true,
            image_max_tokens: None,
            speculative: Vec::new(),
            ngram_tokens: BTreeMap::new(),
            draft: Draft::default(),
        }
    }
}

impl Settings {
    /// How many tokens are drafted at once for a slot, at the most: of all types that are used
    /// (`common_speculative_n_max`). 0 without speculation.
    #[must_use]
    pub fn drafted(&self) -> u64 {
        let of = |kind: &String| match kind.as_str() {
            draft if draft.starts_with("draft-") => self.draft.tokens,
            "ngram-cache" => NGRAM_CACHE_TOKENS,
            "ngram-mod" => self.ngram_tokens.get(kind).copied().unwrap_or(NGRAM_MOD_TOKENS),
            ngram if ngram.starts_with("ngram-") => {
                self.ngram_tokens.get(kind).copied().unwrap_or(NGRAM_TOKENS)
            }
            _ => 0,
        };
        u64::from(self.speculative.iter().map(of).max().unwrap_or(0))
    }

    /// The same with the experts of the first so many layers on the host (`--n-cpu-moe`).
    #[must_use]
    pub fn with_experts_on_host(mut self, layers: u32) -> Self {
        self.overrides.push(Override::CpuMoe(layers));
        self
    }

    /// How many older recurrent states are kept beside the current one, to go back to when a draft
    /// is rejected (`need_n_rs_seq`).
    #[must_use]
    pub fn rollback(&self) -> u64 {
        const KEEPING: [&str; 4] = ["draft-mtp", "draft-eagle3", "draft-dflash", "draft-dspark"];
        let keeps = self.speculative.iter().any(|kind| KEEPING.contains(&kind.as_str()));
        if keeps { u64::from(self.draft.tokens) } else { 0 }
    }
}

/// Whether a device has memory of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// It shares the machine's memory (an APU): its bytes are charged to both pools.
    Unified,
    /// It has memory of its own.
    Discrete,
}

/// A device that the engine can offload to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The engine's name for it, such as `ROCm0` or `Vulkan0`.
    pub name: String,
    /// Whether it has memory of its own.
    pub kind: DeviceKind,
    /// All its memory in bytes.
    pub total: u64,
    /// Its free memory in bytes.
    pub free: u64,
    /// Whether its backend offers pinned host buffers (CUDA, ROCm and Vulkan do, RPC doesn't): host weights then
    /// go there rather than being repacked.
    pub host_buffer: bool,
    /// Whether its backend computes large batches with weights that are on the host (RPC doesn't).
    pub offloads_operations: bool,
}

impl Device {
    /// A device by its name and memory; what its backend offers follows from the name.
    #[must_use]
    pub fn new(name: &str, kind: DeviceKind, total: u64, free: u64) -> Self {
        let local = !name.starts_with("RPC");
        Self { name: name.to_owned(), kind, total, free, host_buffer: local, offloads_operations: local }
    }
}

/// What the engine can offload to. No devices: everything is on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// The devices in the engine's order.
    pub list: Vec<Device>,
}

impl Devices {
    /// No device: everything is on the host.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Those that `--device` leaves; unknown names are left out.
    #[must_use]
    pub fn used<'a>(&'a self, settings: &Settings) -> Vec<&'a Device> {
        let mut used: Vec<&Device> = match &settings.devices {
            None => self.list.iter().collect(),
            Some(names) => names.iter().filter_map(|n| self.list.iter().find(|d| d.name == *n)).collect(),
        };
        if settings.split_mode == SplitMode::None && !used.is_empty() {
            let main = usize::try_from(settings.main_gpu).unwrap_or(0).min(used.len() - 1);
            used = vec![used[main]];
        }
        used
    }

    /// Those that [`Devices::used`] leaves for the model, and behind them those that only a draft
    /// model or a projector beside it is on: the order of [`super::Estimate::devices`].
    #[must_use]
    pub fn touched<'a>(&'a self, beside: &Beside, settings: &Settings) -> Vec<&'a Device> {
        let mut touched = self.used(settings);
        let mut add = |device: &'a Device| {
            if !touched.iter().any(|d| d.name == device.name) {
                touched.push(device);
            }
        };
        if let (Some(_), Some(names)) = (&beside.draft, &settings.draft.devices) {
            names.iter().filter_map(|n| self.list.iter().find(|d| d.name == *n)).for_each(&mut add);
        }
        if beside.projector.is_some() && settings.mmproj_offload {
            // It takes the engine's first GPU, whatever --device says.
            self.list.first().into_iter().for_each(&mut add);
        }
        touched
    }
}

//! The architectures of llama.cpp: what kind of memory each has. One line each; the kinds are few.
//!
//! Read in llama.cpp's `models/*.cpp` (`load_arch_hparams`), `llama-arch.cpp` and `create_memory` of
//! `llama-model.cpp`; the names are those of `general.architecture`.

/// Which layers have a sliding window, and how wide it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// None; the key is ignored where it exists.
    None,
    /// Where `attention.sliding_window` is there and isn't 0: the given period, dense layer last in each.
    Key(u64),
    /// As `Key`, but the dense layer comes first in each period.
    KeyDenseFirst(u64),
    /// As `KeyDenseFirst`, but the width is fixed.
    KeyFixed(u64, u64),
    /// Always, with this width when there is no key: (width, period).
    Always(u64, u64),
    /// As `Always` without a width of its own, the dense layer first.
    AlwaysDenseFirst(u64),
    /// The pattern is a list in the file, which has to be there.
    List,
    /// Chunks of this width with this period, unless the key is there and 0.
    Chunked(u64, u64),
    /// Every layer that isn't recurrent, where the key is there and isn't 0.
    EveryAttention,
    /// As `Always`, in models of exactly so many layers: (layers, width, period).
    IfLayers(u64, u64, u64),
}

/// Which layers are recurrent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recurrent {
    /// None.
    Never,
    /// All, and none has a cache.
    Only,
    /// All, and all have a cache too.
    Both,
    /// Those without heads for K and V.
    NoHeads,
    /// Those without heads for K and V and without a feed-forward width; a width means neither.
    NoHeadsNoFeedForward,
    /// All but every N-th, by `full_attention_interval`, or by a list `attention.recurrent_layers`.
    Interval(u64),
}

/// What else a layer's cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Indexer {
    /// Nothing.
    None,
    /// Keys of an indexer, in the layers that `attention.indexer.types` marks, or in all.
    Keys,
    /// Keys of an indexer behind the leading dense layers.
    KeysAfterDense,
    /// Rules of its own that aren't known here: the cache is bounded from above.
    Unknown,
}

/// The rules of an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// `general.architecture`.
    pub name: &'static str,
    /// Its windows.
    pub window: Window,
    /// Its recurrent layers.
    pub recurrent: Recurrent,
    /// Multi-head latent attention where the file has the `_mla` lengths: K only, compressed.
    pub mla: bool,
    /// Its indexer.
    pub indexer: Indexer,
    /// Whether it has a cache at all; embedding and diffusion models have none.
    pub cache: bool,
    /// Layers from this one on share the cache of earlier ones; 0 is none, `u64::MAX` is by the key
    /// `attention.shared_kv_layers`.
    pub shared_from: u64,
}

const PLAIN: Arch = Arch {
    name: "",
    window: Window::None,
    recurrent: Recurrent::Never,
    mla: false,
    indexer: Indexer::None,
    cache: true,
    shared_from: 0,
};

const fn plain(name: &'static str) -> Arch {
    Arch { name, ..PLAIN }
}
const fn windowed(name: &'static str, window: Window) -> Arch {
    Arch { name, window, ..PLAIN }
}
const fn hybrid(name: &'static str, recurrent: Recurrent) -> Arch {
    Arch { name, recurrent, ..PLAIN }
}
const fn mla(name: &'static str) -> Arch {
    Arch { name, mla: true, ..PLAIN }
}
const fn encoder(name: &'static str) -> Arch {
    Arch { name, cache: false, ..PLAIN }
}

use Recurrent::{Both, Interval, NoHeads, NoHeadsNoFeedForward, Only};
use Window::{
    Always, AlwaysDenseFirst, Chunked, EveryAttention, IfLayers, Key, KeyDenseFirst, KeyFixed, List,
};

/// Every architecture whose rules are known.
#[rustfmt::skip]
pub const ARCHITECTURES: &[Arch] = &[
    plain("llama"), plain("deci"), plain("falcon"), plain("grok"), plain("gpt2"), plain("gptj"), plain("gptneox"),
    plain("mpt"), plain("baichuan"), plain("starcoder"), plain("refact"), plain("bloom"), plain("stablelm"),
    plain("qwen"), plain("qwen2"), plain("qwen2moe"), plain("qwen2vl"), plain("qwen3"), plain("qwen3moe"),
    plain("qwen3vl"), plain("qwen3vlmoe"), plain("phi2"), plain("phi3"), plain("phimoe"), plain("plamo"),
    plain("codeshell"), plain("orion"), plain("internlm2"), plain("minicpm"), plain("minicpm3"), plain("gemma"),
    plain("starcoder2"), plain("xverse"), plain("command-r"), plain("dbrx"), plain("olmo"), plain("olmoe"),
    plain("openelm"), plain("arctic"), plain("deepseek"), plain("deepseek2-ocr"), plain("chatglm"), plain("glm4"),
    plain("glm4moe"), plain("bitnet"), plain("jais"), plain("jais2"), plain("nemotron"), plain("exaone"),
    plain("granite"), plain("granitemoe"), plain("chameleon"), plain("plm"), plain("bailingmoe"),
    plain("bailingmoe2"), plain("dots1"), plain("arcee"), plain("ernie4_5"), plain("ernie4_5-moe"),
    plain("hunyuan-moe"), plain("hunyuan-dense"), plain("hunyuan_vl"), plain("hy_v3"), plain("smollm3"),
    plain("seed_oss"), plain("grovemoe"), plain("apertus"), plain("minimax-m2"), plain("cogvlm"),
    plain("pangu-embedded"), plain("mistral3"), plain("paddleocr"), plain("llama-embed"), plain("maincoder"),
    plain("talkie"),
    windowed("gemma2", Always(4096, 2)), windowed("gemma3", Key(6)), windowed("gpt-oss", Always(0, 2)),
    windowed("llama4", Chunked(8192, 4)), windowed("cohere2", Always(0, 4)),
    windowed("cohere2moe", AlwaysDenseFirst(4)), windowed("exaone4", IfLayers(64, 4096, 4)),
    windowed("exaone-moe", Always(128, 4)), windowed("olmo2", Key(4)), windowed("afmoe", Key(4)),
    windowed("laguna", KeyDenseFirst(4)), windowed("mellum", Key(4)), windowed("plamo3", Key(8)),
    windowed("smallthinker", KeyFixed(4096, 4)), windowed("muse-glimmer", Always(0, 4)), windowed("maple", List),
    windowed("mimo2", List), windowed("step35", List), windowed("spark2_5", List), windowed("granite_swa", List),
    Arch { shared_from: 20, ..windowed("gemma3n", Always(0, 5)) },
    Arch { shared_from: u64::MAX, ..windowed("gemma4", List) },
    mla("deepseek2"), mla("mistral4"),
    Arch { indexer: Indexer::Keys, ..mla("deepseek32") },
    Arch { indexer: Indexer::Keys, ..mla("glm-dsa") },
    Arch { indexer: Indexer::Keys, ..mla("hy_v4") },
    Arch { indexer: Indexer::KeysAfterDense, ..plain("minimax-m3") },
    Arch { indexer: Indexer::Unknown, window: List, ..mla("dots3note") },
    Arch { indexer: Indexer::Unknown, ..mla("deepseek4") },
    hybrid("qwen3next", Interval(4)), hybrid("qwen35", Interval(4)), hybrid("qwen35moe", Interval(4)),
    hybrid("minimax-01", Interval(8)), hybrid("granitehybrid", NoHeads), hybrid("jamba", NoHeads),
    hybrid("plamo2", NoHeads), hybrid("nemotron_h", NoHeadsNoFeedForward),
    hybrid("nemotron_h_moe", NoHeadsNoFeedForward), hybrid("falcon-h1", Both),
    Arch { window: EveryAttention, ..hybrid("lfm2", NoHeads) },
    hybrid("lfm2moe", NoHeads),
    Arch { mla: true, ..hybrid("kimi-linear", NoHeads) },
    Arch { mla: true, ..hybrid("bailingmoe3", NoHeads) },
    Arch { mla: true, ..hybrid("kimi-k3", NoHeads) },
    Arch { mla: true, indexer: Indexer::Unknown, ..hybrid("glm5-next", NoHeads) },
    Arch { indexer: Indexer::Unknown, ..hybrid("qwen4exp", Interval(4)) },
    hybrid("mamba", Only), hybrid("mamba2", Only), hybrid("rwkv6", Only), hybrid("rwkv6qwen2", Only),
    hybrid("rwkv7", Only), hybrid("arwkv7", Only),
    encoder("bert"), encoder("modern-bert"), encoder("nomic-bert"), encoder("nomic-bert-moe"),
    encoder("neo-bert"), encoder("jina-bert-v2"), encoder("jina-bert-v3"), encoder("eurobert"),
    encoder("gemma-embedding"), encoder("dream"), encoder("llada"), encoder("llada-moe"), encoder("rnd1"),
    encoder("clef"),
];

impl Arch {
    /// The rules of the architecture with this name.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|a| a.name == name)
    }

    /// What stands in for an unknown architecture: a plain cache in every layer, which bounds it from above.
    #[must_use]
    pub const fn unknown() -> &'static Self {
        const UNKNOWN: Arch = plain("unknown");
        &UNKNOWN
    }
}

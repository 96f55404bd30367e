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
    /// Keys of an indexer, and values as wide as a head, behind the leading dense layers.
    AfterDense,
    /// Keys of an indexer, so many of them in a row.
    Pooled(u64),
    /// Rules of its own that aren't known here: the cache is bounded from above.
    Unknown,
}

/// How a layer is put together, as far as that is known well enough for exact compute buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Attention or its stand-in, then a feed-forward part, each with its residual.
    Standard,
    /// Attention and feed-forward part side by side, both from one norm.
    Parallel(Sum),
    /// Attention and Mamba 2 side by side, then a feed-forward part (Falcon-H1).
    AttentionBesideState,
    /// One part a layer (Nemotron-H).
    OnePart,
    /// Not known: compute buffers are bounded from above.
    Unknown,
}

/// Which comes first where parallel parts and the residual are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// Attention and feed-forward part, then the residual.
    Attention,
    /// Feed-forward part and attention, then the residual.
    FeedForward,
    /// The feed-forward part with the residual, then attention.
    Residual,
}

/// Which layers rotate queries and keys by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rope {
    /// All.
    All,
    /// None: positions are learned, or come in as slopes.
    None,
    /// Those with a window.
    Windowed,
    /// All but the last of every so many.
    NotLastOf(u32),
    /// All but the first of every so many.
    NotFirstOf(u32),
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
    /// How its layers are put together.
    pub layout: Layout,
    /// Which layers rotate.
    pub rope: Rope,
}

const PLAIN: Arch = Arch {
    name: "",
    window: Window::None,
    recurrent: Recurrent::Never,
    mla: false,
    indexer: Indexer::None,
    cache: true,
    shared_from: 0,
    layout: Layout::Standard,
    rope: Rope::All,
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
    Arch { name, cache: false, layout: Layout::Unknown, ..PLAIN }
}
/// An architecture whose graph isn't known.
const fn vague(arch: Arch) -> Arch {
    Arch { layout: Layout::Unknown, ..arch }
}
const fn parallel(arch: Arch, sum: Sum) -> Arch {
    Arch { layout: Layout::Parallel(sum), ..arch }
}
const fn rope(arch: Arch, rope: Rope) -> Arch {
    Arch { rope, ..arch }
}

use Recurrent::{Both, Interval, NoHeads, NoHeadsNoFeedForward, Only};
use Window::{
    Always, AlwaysDenseFirst, Chunked, EveryAttention, IfLayers, Key, KeyDenseFirst, KeyFixed, List,
};

/// Every architecture whose rules are known.
#[rustfmt::skip]
pub const ARCHITECTURES: &[Arch] = &[
    plain("llama"), plain("deci"), parallel(plain("falcon"), Sum::FeedForward), plain("grok"), rope(plain("gpt2"), Rope::None), vague(plain("gptj")), plain("gptneox"),
    rope(plain("mpt"), Rope::None), vague(plain("baichuan")), rope(plain("starcoder"), Rope::None), rope(plain("refact"), Rope::None), rope(plain("bloom"), Rope::None), plain("stablelm"),
    plain("qwen"), plain("qwen2"), plain("qwen2moe"), plain("qwen2vl"), plain("qwen3"), plain("qwen3moe"),
    plain("qwen3vl"), plain("qwen3vlmoe"), parallel(plain("phi2"), Sum::Attention), plain("phi3"), plain("phimoe"), parallel(plain("plamo"), Sum::FeedForward),
    plain("codeshell"), plain("orion"), plain("internlm2"), plain("minicpm"), plain("minicpm3"), plain("gemma"),
    plain("starcoder2"), plain("xverse"), parallel(plain("command-r"), Sum::Residual), plain("dbrx"), plain("olmo"), plain("olmoe"),
    plain("openelm"), vague(plain("arctic")), plain("deepseek"), plain("deepseek2-ocr"), plain("chatglm"), plain("glm4"),
    plain("glm4moe"), plain("bitnet"), rope(plain("jais"), Rope::None), plain("jais2"), plain("nemotron"), plain("exaone"),
    plain("granite"), plain("granitemoe"), vague(plain("chameleon")), plain("plm"), plain("bailingmoe"),
    plain("bailingmoe2"), plain("dots1"), plain("arcee"), plain("ernie4_5"), plain("ernie4_5-moe"),
    plain("hunyuan-moe"), plain("hunyuan-dense"), plain("hunyuan_vl"), plain("hy_v3"), rope(plain("smollm3"), Rope::NotLastOf(4)),
    plain("seed_oss"), plain("grovemoe"), plain("apertus"), plain("minimax-m2"), vague(plain("cogvlm")),
    plain("pangu-embedded"), plain("mistral3"), plain("paddleocr"), plain("llama-embed"), plain("maincoder"),
    vague(plain("talkie")),
    windowed("gemma2", Always(4096, 2)), windowed("gemma3", Key(6)), windowed("gpt-oss", Always(0, 2)),
    windowed("llama4", Chunked(8192, 4)), rope(parallel(windowed("cohere2", Always(0, 4)), Sum::Residual), Rope::Windowed),
    vague(windowed("cohere2moe", AlwaysDenseFirst(4))), windowed("exaone4", IfLayers(64, 4096, 4)),
    windowed("exaone-moe", Always(128, 4)), windowed("olmo2", Key(4)), rope(windowed("afmoe", Key(4)), Rope::NotLastOf(4)),
    windowed("laguna", KeyDenseFirst(4)), windowed("mellum", Key(4)), windowed("plamo3", Key(8)),
    rope(windowed("smallthinker", KeyFixed(4096, 4)), Rope::NotFirstOf(4)), rope(windowed("muse-glimmer", Always(0, 4)), Rope::Windowed), vague(windowed("maple", List)),
    windowed("mimo2", List), windowed("step35", List), vague(windowed("spark2_5", List)), windowed("granite_swa", List),
    Arch { shared_from: 20, ..vague(windowed("gemma3n", Always(0, 5))) },
    Arch { shared_from: u64::MAX, ..vague(windowed("gemma4", List)) },
    mla("deepseek2"), mla("mistral4"),
    Arch { indexer: Indexer::Keys, ..vague(mla("deepseek32")) },
    Arch { indexer: Indexer::Keys, ..vague(mla("glm-dsa")) },
    Arch { indexer: Indexer::Keys, ..vague(mla("hy_v4")) },
    Arch { indexer: Indexer::AfterDense, ..vague(plain("minimax-m3")) },
    Arch { indexer: Indexer::Unknown, window: List, ..vague(mla("dots3note")) },
    Arch { indexer: Indexer::Unknown, ..vague(mla("deepseek4")) },
    hybrid("qwen3next", Interval(4)), hybrid("qwen35", Interval(4)), hybrid("qwen35moe", Interval(4)),
    vague(hybrid("minimax-01", Interval(8))), hybrid("granitehybrid", NoHeads), vague(hybrid("jamba", NoHeads)),
    vague(hybrid("plamo2", NoHeads)), Arch { layout: Layout::OnePart, ..hybrid("nemotron_h", NoHeadsNoFeedForward) },
    Arch { layout: Layout::OnePart, ..hybrid("nemotron_h_moe", NoHeadsNoFeedForward) }, Arch { layout: Layout::AttentionBesideState, ..hybrid("falcon-h1", Both) },
    Arch { window: EveryAttention, ..hybrid("lfm2", NoHeads) },
    hybrid("lfm2moe", NoHeads),
    Arch { mla: true, ..vague(hybrid("kimi-linear", NoHeads)) },
    Arch { mla: true, ..vague(hybrid("bailingmoe3", NoHeads)) },
    Arch { mla: true, ..vague(hybrid("kimi-k3", NoHeads)) },
    Arch { mla: true, indexer: Indexer::Pooled(3), ..vague(hybrid("glm5-next", NoHeads)) },
    Arch { indexer: Indexer::Pooled(2), ..vague(hybrid("qwen4exp", Interval(4))) },
    vague(hybrid("mamba", Only)), vague(hybrid("mamba2", Only)), vague(hybrid("rwkv6", Only)), vague(hybrid("rwkv6qwen2", Only)),
    vague(hybrid("rwkv7", Only)), vague(hybrid("arwkv7", Only)),
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
        const UNKNOWN: Arch = vague(plain("unknown"));
        &UNKNOWN
    }
}

//! Tensors as a header declares them, and the sizes of ggml's types.

/// A tensor of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Its four dimensions; those not declared are 1.
    pub dims: [u64; 4],
    /// Its type.
    pub kind: TensorType,
    /// Where its data starts, counted from the start of the data section.
    pub offset: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// Which shard it is in, from 0.
    pub shard: usize,
}

impl Tensor {
    /// How many elements it has.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.dims.iter().fold(1, |n, d| n.saturating_mul(*d))
    }

    /// The layer that it belongs to: the N of `blk.N.`.
    #[must_use]
    pub fn layer(&self) -> Option<u32> {
        self.name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
    }

    /// The part of its name behind `blk.N.`, or the whole name.
    #[must_use]
    pub fn suffix(&self) -> &str {
        match self.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((n, rest)) if n.parse::<u32>().is_ok() => rest,
            _ => &self.name,
        }
    }
}

/// Declares ggml's tensor types: number in the file, name, elements a block, bytes a block.
macro_rules! types {
    ($($variant:ident = $number:literal, $name:literal, $block:literal, $bytes:literal;)*) => {
        /// A type of ggml's tensors (ggml 0.27).
        #[allow(missing_docs, non_camel_case_types)] // the names are ggml's own
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum TensorType { $($variant),* }

        impl TensorType {
            /// Every type.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The type with this number in a file.
            #[must_use]
            pub fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }

            /// Its number in a file.
            #[must_use]
            pub fn number(self) -> u32 {
                match self { $(Self::$variant => $number),* }
            }

            /// Its name as ggml prints it, such as `q8_0`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// How many elements make a block.
            #[must_use]
            pub fn block_elements(self) -> u64 {
                match self { $(Self::$variant => $block),* }
            }

            /// How many bytes a block has.
            #[must_use]
            pub fn block_bytes(self) -> u64 {
                match self { $(Self::$variant => $bytes),* }
            }
        }
    };
}

types! {
    F32 = 0, "f32", 1, 4;
    F16 = 1, "f16", 1, 2;
    Q4_0 = 2, "q4_0", 32, 18;
    Q4_1 = 3, "q4_1", 32, 20;
    Q5_0 = 6, "q5_0", 32, 22;
    Q5_1 = 7, "q5_1", 32, 24;
    Q8_0 = 8, "q8_0", 32, 34;
    Q8_1 = 9, "q8_1", 32, 36;
    Q2_K = 10, "q2_K", 256, 84;
    Q3_K = 11, "q3_K", 256, 110;
    Q4_K = 12, "q4_K", 256, 144;
    Q5_K = 13, "q5_K", 256, 176;
    Q6_K = 14, "q6_K", 256, 210;
    Q8_K = 15, "q8_K", 256, 292;
    IQ2_XXS = 16, "iq2_xxs", 256, 66;
    IQ2_XS = 17, "iq2_xs", 256, 74;
    IQ3_XXS = 18, "iq3_xxs", 256, 98;
    IQ1_S = 19, "iq1_s", 256, 50;
    IQ4_NL = 20, "iq4_nl", 32, 18;
    IQ3_S = 21, "iq3_s", 256, 110;
    IQ2_S = 22, "iq2_s", 256, 82;
    IQ4_XS = 23, "iq4_xs", 256, 136;
    I8 = 24, "i8", 1, 1;
    I16 = 25, "i16", 1, 2;
    I32 = 26, "i32", 1, 4;
    I64 = 27, "i64", 1, 8;
    F64 = 28, "f64", 1, 8;
    IQ1_M = 29, "iq1_m", 256, 56;
    BF16 = 30, "bf16", 1, 2;
    TQ1_0 = 34, "tq1_0", 256, 54;
    TQ2_0 = 35, "tq2_0", 256, 66;
    MXFP4 = 39, "mxfp4", 32, 17;
    NVFP4 = 40, "nvfp4", 64, 36;
    Q1_0 = 41, "q1_0", 128, 18;
    Q2_0 = 42, "q2_0", 64, 18;
}

impl TensorType {
    /// The bytes of a row of `elements`; a part of a block counts as none, as in ggml.
    #[must_use]
    pub fn row_bytes(self, elements: u64) -> u64 {
        (elements / self.block_elements()).saturating_mul(self.block_bytes())
    }

    /// The type with this name, as ggml prints it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.name() == name)
    }
}

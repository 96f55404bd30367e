//! Which type each tensor has in a file of a quantisation.
//!
//! Files of one type are known exactly. In those of mixed types, which mixture a publisher chose shows in
//! the header only; what is public is the file's size. So the types of most of the weights (the experts, or the
//! feed-forward part) are chosen such that the total is the published one.

use serde::Deserialize;

use super::tensors::{Blank, Role};
use crate::gguf::TensorType;

/// Types by what tensors are for; where there are several, in ascending order, those in between are chosen by
/// the file's size.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mix {
    /// Its name.
    pub name: String,
    embedding: Types,
    output: Types,
    attention: Types,
    dense: Types,
    shared: Types,
    experts: Types,
}

/// One type or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Types {
    One(TypeName),
    Several(Vec<TypeName>),
}

/// A type by ggml's name.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct TypeName(TensorType);

impl TryFrom<String> for TypeName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        TensorType::from_name(&name).map(Self).ok_or_else(|| format!("'{name}' is no type of ggml's tensors"))
    }
}

impl Types {
    fn list(&self) -> Vec<TensorType> {
        match self {
            Self::One(one) => vec![one.0],
            Self::Several(several) => several.iter().map(|t| t.0).collect(),
        }
    }
}

impl Mix {
    /// Every matrix of one type.
    #[must_use]
    pub fn uniform(kind: TensorType) -> Self {
        let one = || Types::One(TypeName(kind));
        Self {
            name: kind.name().to_owned(),
            embedding: one(),
            output: one(),
            attention: one(),
            dense: one(),
            shared: one(),
            experts: one(),
        }
    }

    /// Whether the size of the file has to choose among types.
    #[cfg(test)]
    pub fn is_open(&self) -> bool {
        let roles =
            [Role::Embedding, Role::Output, Role::Attention, Role::Dense, Role::Shared, Role::Experts];
        roles.iter().any(|role| self.of(*role).len() > 1)
    }

    fn of(&self, role: Role) -> Vec<TensorType> {
        match role {
            Role::Float => vec![TensorType::F32],
            Role::Embedding => self.embedding.list(),
            Role::Output => self.output.list(),
            Role::Attention => self.attention.list(),
            Role::Dense => self.dense.list(),
            Role::Shared => self.shared.list(),
            Role::Experts => self.experts.list(),
        }
    }

    /// The type of each tensor, such that all together come as near to `bytes` as they can.
    #[must_use]
    pub fn types(&self, tensors: &[Blank], bytes: Option<u64>) -> Vec<TensorType> {
        let lowest = |t: &Blank| self.of(t.role).first().copied().unwrap_or(TensorType::F32);
        let mut types: Vec<TensorType> = tensors.iter().map(|t| fallback(lowest(t), t)).collect();
        let Some(target) = bytes else { return types };
        let chosen = [Role::Experts, Role::Dense, Role::Attention]
            .into_iter()
            .find(|role| self.of(*role).len() > 1 && tensors.iter().any(|t| t.role == *role));
        let Some(role) = chosen else { return types };
        let mut bulk: Vec<usize> = (0..tensors.len()).filter(|i| tensors[*i].role == role).collect();
        // Those that suffer most from few bits come first, as with llama.cpp's own mixtures.
        bulk.sort_by_key(|i| (!tensors[*i].name.contains("_down"), *i));
        let mut total: u64 = tensors.iter().zip(&types).map(|(t, kind)| size(t, *kind)).sum();
        for next in self.of(role).into_iter().skip(1) {
            for i in &bulk {
                let tensor = &tensors[*i];
                let kind = fallback(next, tensor);
                let more = total.saturating_sub(size(tensor, types[*i])).saturating_add(size(tensor, kind));
                if more.abs_diff(target) > total.abs_diff(target) {
                    // One that is too large by itself: smaller ones may still fit.
                    continue;
                }
                (types[*i], total) = (kind, more);
            }
        }
        types
    }
}

/// The bytes of a tensor in a type.
pub fn size(tensor: &Blank, kind: TensorType) -> u64 {
    tensor.dims[1..].iter().fold(kind.row_bytes(tensor.dims[0]), |n, d| n.saturating_mul(*d))
}

/// The type that llama.cpp's quantiser takes instead where a row is no whole number of blocks.
pub fn fallback(kind: TensorType, tensor: &Blank) -> TensorType {
    use TensorType as T;
    let fits = |t: TensorType| tensor.dims[0].is_multiple_of(t.block_elements());
    if fits(kind) {
        return kind;
    }
    let other = match kind {
        T::Q4_K => T::Q5_0,
        T::Q5_K => T::Q5_1,
        T::Q6_K => T::Q8_0,
        _ => T::IQ4_NL,
    };
    if fits(other) { other } else { T::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blank(name: &str, dims: [u64; 4], role: Role) -> Blank {
        Blank { name: name.to_owned(), dims, role }
    }

    #[test]
    fn types_are_chosen_by_the_size_of_the_file() {
        let mix: Mix = toml::from_str(
            "name = 'm'\nembedding = 'q4_K'\noutput = 'q6_K'\nattention = 'q5_K'\ndense = 'q5_K'\n\
             shared = 'q5_K'\nexperts = ['iq1_s', 'iq1_m', 'q2_K']",
        )
        .unwrap();
        let experts: Vec<Blank> = (0..30)
            .map(|i| {
                let part = ["gate", "down", "up"][i % 3];
                blank(&format!("blk.{}.ffn_{part}_exps.weight", i / 3), [512, 256, 8, 1], Role::Experts)
            })
            .collect();
        let all = |kind| experts.iter().map(|t| size(t, kind)).sum::<u64>();
        for target in
            [0, all(TensorType::IQ1_S), all(TensorType::IQ1_M) + 1000, all(TensorType::Q2_K), u64::MAX]
        {
            let types = mix.types(&experts, Some(target));
            let total: u64 = experts.iter().zip(&types).map(|(t, kind)| size(t, *kind)).sum();
            let bounded = target.clamp(all(TensorType::IQ1_S), all(TensorType::Q2_K));
            assert!(total.abs_diff(bounded) <= size(&experts[0], TensorType::Q2_K) / 4, "{target}: {total}");
        }
        assert!(mix.types(&experts, None).iter().all(|t| *t == TensorType::IQ1_S));
    }

    #[test]
    fn rows_that_are_no_whole_blocks_take_another_type() {
        let odd = blank("blk.0.attn_q.weight", [2880, 64, 1, 1], Role::Attention);
        assert_eq!(fallback(TensorType::Q4_K, &odd), TensorType::Q5_0);
        assert_eq!(fallback(TensorType::Q2_K, &odd), TensorType::IQ4_NL);
        assert_eq!(fallback(TensorType::MXFP4, &odd), TensorType::MXFP4);
        let odder = blank("blk.0.attn_q.weight", [100, 64, 1, 1], Role::Attention);
        assert_eq!(fallback(TensorType::Q8_0, &odder), TensorType::F16);
    }
}

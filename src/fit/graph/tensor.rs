//! A compute graph as ggml builds one: tensors with shapes, in the order of evaluation.
//!
//! Only what the allocator and the scheduler look at is kept: sizes, who reads whom, which tensor is a
//! view of which, and where weights and caches are. The rules are those of ggml 0.27 (`ggml.c`).

use crate::gguf::TensorType;

/// A tensor's number in its graph.
pub(super) type Id = u32;
/// No tensor.
pub(super) const NONE: Id = u32::MAX;
/// The most sources of a tensor here (ggml has 10).
pub(super) const MAX_SOURCES: usize = 8;

/// What a tensor is made by, as far as memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Nothing: an input, a weight or a cache.
    Leaf,
    /// A view: reshape, permute, transpose, part.
    View,
    /// An operation that may write over one of its sources.
    InPlace,
    /// Rotary embedding: in place, and placed by its neighbours rather than by its factors.
    Rope,
    /// Flash attention: placed by its neighbours rather than by its sinks.
    Flash,
    /// A matrix product.
    MulMat,
    /// A product with selected experts.
    MulMatId,
    /// A selection of rows.
    GetRows,
    /// Any other operation.
    Other,
}

/// Where a tensor is that the graph doesn't allocate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Home {
    /// Nowhere yet: the graph allocates it.
    Graph,
    /// A weight on this backend; on the host it may be readable by devices.
    Weight { backend: u8, readable: bool },
    /// A cache or state on this backend.
    Memory { backend: u8 },
}

/// A tensor.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub op: Op,
    pub kind: TensorType,
    pub ne: [u64; 4],
    /// Whether it is laid out without gaps in the order of its dimensions.
    pub plain: bool,
    /// Its extent in bytes.
    pub bytes: u64,
    pub src: [Id; MAX_SOURCES],
    /// The tensor whose memory it is a view of.
    pub view_of: Id,
    pub input: bool,
    pub output: bool,
    pub home: Home,
    /// The backend that it was put on before scheduling.
    pub preset: Option<u8>,
}

/// A graph under construction.
#[derive(Debug, Default)]
pub(super) struct Graph {
    pub tensors: Vec<Tensor>,
    /// Operations in the order of evaluation.
    pub nodes: Vec<Id>,
    /// Inputs, weights and caches in the order of their first use.
    pub leafs: Vec<Id>,
    seen: Vec<bool>,
}

/// The bytes of a tensor without gaps.
pub(super) fn size(kind: TensorType, ne: [u64; 4]) -> u64 {
    ne[1..].iter().fold(kind.row_bytes(ne[0]), |n, d| n.saturating_mul(*d))
}

impl Graph {
    pub fn with_capacity(tensors: usize) -> Self {
        Self {
            tensors: Vec::with_capacity(tensors),
            nodes: Vec::with_capacity(tensors),
            leafs: Vec::with_capacity(tensors / 2),
            seen: Vec::with_capacity(tensors),
        }
    }

    pub fn get(&self, id: Id) -> &Tensor {
        &self.tensors[id as usize]
    }

    pub fn ne(&self, id: Id) -> [u64; 4] {
        self.get(id).ne
    }

    fn push(&mut self, tensor: Tensor) -> Id {
        let id = Id::try_from(self.tensors.len()).unwrap_or(NONE);
        self.tensors.push(tensor);
        self.seen.push(false);
        id
    }

    pub fn leaf(&mut self, kind: TensorType, ne: [u64; 4], home: Home, input: bool) -> Id {
        self.push(Tensor {
            op: Op::Leaf,
            kind,
            ne,
            plain: true,
            bytes: size(kind, ne),
            src: [NONE; MAX_SOURCES],
            view_of: NONE,
            input,
            output: false,
            home,
            preset: None,
        })
    }

    /// The result of an operation, in memory of its own.
    pub fn op(&mut self, op: Op, kind: TensorType, ne: [u64; 4], src: &[Id]) -> Id {
        let id = self.leaf(kind, ne, Home::Graph, false);
        let tensor = &mut self.tensors[id as usize];
        tensor.op = op;
        tensor.src[..src.len()].copy_from_slice(src);
        id
    }

    /// A view of `of`; `plain` says whether it has no gaps.
    pub fn view(&mut self, of: Id, ne: [u64; 4], plain: bool) -> Id {
        self.result_in(Op::View, of, ne, plain, &[of])
    }

    /// A part of `of` whose dimensions from the second on are these many bytes apart.
    pub fn part(&mut self, of: Id, ne: [u64; 4], strides: [u64; 3]) -> Id {
        let id = self.view(of, ne, false);
        let tensor = &mut self.tensors[id as usize];
        let ahead = ne[1..].iter().zip(strides).map(|(n, stride)| n.saturating_sub(1).saturating_mul(stride));
        tensor.bytes = ahead.fold(tensor.kind.row_bytes(ne[0]), u64::saturating_add);
        id
    }

    /// The result of an operation that writes into (a part of) `target`.
    pub fn result_in(&mut self, op: Op, target: Id, ne: [u64; 4], plain: bool, src: &[Id]) -> Id {
        let (kind, root) = {
            let t = self.get(target);
            (t.kind, if t.view_of == NONE { target } else { t.view_of })
        };
        let id = self.op(op, kind, ne, src);
        let tensor = &mut self.tensors[id as usize];
        tensor.view_of = root;
        tensor.plain = plain;
        id
    }

    /// A view of the same elements in other dimensions.
    pub fn reshape(&mut self, of: Id, ne: [u64; 4]) -> Id {
        let plain = self.get(of).plain;
        self.view(of, ne, plain)
    }

    /// A view with dimensions exchanged.
    pub fn permute(&mut self, of: Id, order: [usize; 4]) -> Id {
        let from = self.ne(of);
        let mut ne = from;
        for (i, to) in order.iter().enumerate() {
            ne[*to] = from[i];
        }
        let plain = self.get(of).plain && ne == from;
        self.view(of, ne, plain)
    }

    /// An operation of the shape of its first source, which it may write over.
    pub fn in_place(&mut self, src: &[Id]) -> Id {
        let ne = self.ne(src[0]);
        self.op(Op::InPlace, TensorType::F32, ne, src)
    }

    /// A copy without gaps.
    pub fn cont(&mut self, of: Id, ne: [u64; 4]) -> Id {
        let kind = self.get(of).kind;
        self.op(Op::Other, kind, ne, &[of])
    }

    pub fn mul_mat(&mut self, weight: Id, x: Id) -> Id {
        let (w, x_ne) = (self.ne(weight), self.ne(x));
        self.op(Op::MulMat, TensorType::F32, [w[1], x_ne[1], x_ne[2], x_ne[3]], &[weight, x])
    }

    pub fn mul_mat_id(&mut self, weight: Id, x: Id, ids: Id) -> Id {
        let ne = [self.ne(weight)[1], self.ne(ids)[0], self.ne(x)[2], 1];
        self.op(Op::MulMatId, TensorType::F32, ne, &[weight, x, ids])
    }

    pub fn get_rows(&mut self, of: Id, ids: Id) -> Id {
        let i = self.ne(ids);
        let ne = [self.ne(of)[0], i[0], i[1], i[2]];
        self.op(Op::GetRows, TensorType::F32, ne, &[of, ids])
    }

    /// Puts a tensor and all that it needs behind what is there (`ggml_build_forward_expand`).
    pub fn expand(&mut self, id: Id) {
        if std::mem::replace(&mut self.seen[id as usize], true) {
            return;
        }
        for source in self.get(id).src {
            if source == NONE {
                break;
            }
            self.expand(source);
        }
        if self.get(id).op == Op::Leaf {
            self.leafs.push(id);
        } else {
            self.nodes.push(id);
        }
    }
}

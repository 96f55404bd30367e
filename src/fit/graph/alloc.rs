//! ggml's graph allocator (`ggml-alloc.c`): who gets which bytes, and how large each buffer becomes.

use super::tensor::{Graph, Id, MAX_SOURCES, NONE, Op, Tensor};

/// What ggml aligns tensors to on the processor; other backends align more, which comes to a few KiB.
pub(super) const ALIGNMENT: u64 = 32;

/// Free memory of one buffer that grows as needed: blocks by address, the last without end. There is always one: the
/// last stays where a hostile header has used it up, empty, and what is beyond counts as more than can be counted.
#[derive(Clone, Debug)]
struct Pool {
    free: Vec<(u64, u64)>,
    size: u64,
}

impl Pool {
    fn new() -> Self {
        Self { free: vec![(0, 1 << 60)], size: 0 }
    }

    /// The smallest block that is large enough, the last one only where there is none.
    fn take(&mut self, bytes: u64) -> u64 {
        let last = self.free.len() - 1;
        let mut best = last;
        let mut best_size = u64::MAX;
        for (i, (_, size)) in self.free[..last].iter().enumerate() {
            if *size >= bytes && *size <= best_size {
                (best, best_size) = (i, *size);
            }
        }
        let (offset, size) = self.free[best];
        let end = offset.saturating_add(bytes);
        if size == bytes && best < last {
            self.free.remove(best);
        } else {
            self.free[best] = (end, size.saturating_sub(bytes));
        }
        self.size = self.size.max(end);
        offset
    }

    /// Gives a block back: to the first neighbour in the order of addresses. Empty tensors leave empty blocks,
    /// which can keep others from being joined, as in ggml.
    fn give(&mut self, offset: u64, bytes: u64) {
        for i in 0..self.free.len() {
            let (start, size) = self.free[i];
            if start.saturating_add(size) == offset {
                self.free[i].1 = size.saturating_add(bytes);
                self.join(i);
                return;
            }
            if offset.saturating_add(bytes) == start {
                self.free[i] = (offset, size.saturating_add(bytes));
                if i > 0 {
                    self.join(i - 1);
                }
                return;
            }
        }
        let at = self.free.partition_point(|(start, _)| *start < offset);
        self.free.insert(at, (offset, bytes));
    }

    /// Joins a block with the one behind it where they touch.
    fn join(&mut self, i: usize) {
        let (start, size) = self.free[i];
        if let Some((_, more)) =
            self.free.get(i + 1).copied().filter(|(next, _)| *next == start.saturating_add(size))
        {
            self.free[i].1 = size.saturating_add(more);
            self.free.remove(i + 1);
        }
    }
}

/// What the allocator knows of a tensor.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    readers: i32,
    views: i32,
    backend: u8,
    offset: u64,
    allocated: bool,
}

/// A graph with the backend of each node and leaf: what the scheduler hands on.
pub(super) struct Plan<'a> {
    pub graph: &'a Graph,
    pub nodes: &'a [(Id, u8)],
    pub leafs: &'a [(Id, u8)],
}

struct Allocator<'a> {
    graph: &'a Graph,
    pools: Vec<Pool>,
    held: Vec<Held>,
}

fn padded(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX)
}

/// The size of each backend's compute buffer.
pub(super) fn sizes(plan: &Plan, backends: usize) -> Vec<u64> {
    let mut allocator = Allocator {
        graph: plan.graph,
        pools: vec![Pool::new(); backends],
        held: vec![Held::default(); plan.graph.tensors.len()],
    };
    allocator.run(plan);
    allocator.pools.iter().map(|p| p.size).collect()
}

impl Allocator<'_> {
    fn tensor(&self, id: Id) -> &Tensor {
        &self.graph.tensors[id as usize]
    }

    fn run(&mut self, plan: &Plan) {
        for (leaf, backend) in plan.leafs {
            self.allocate(*leaf, *backend);
        }
        for (node, backend) in plan.nodes {
            let tensor = &self.graph.tensors[*node as usize];
            if tensor.view_of != NONE && tensor.op != Op::Leaf {
                self.held[tensor.view_of as usize].views += 1;
            }
            if tensor.input {
                self.allocate(*node, *backend);
            }
            for source in tensor.src.iter().take_while(|s| **s != NONE) {
                self.held[*source as usize].readers += 1;
                if self.tensor(*source).input {
                    self.allocate(*source, *backend);
                }
            }
        }
        for (node, backend) in plan.nodes {
            let sources = self.tensor(*node).src;
            for source in sources.iter().take_while(|s| **s != NONE) {
                self.allocate(*source, *backend);
            }
            self.allocate(*node, *backend);
            self.release(&sources);
        }
    }

    /// Counts a node's sources down and frees those that nobody reads any more.
    fn release(&mut self, sources: &[Id; MAX_SOURCES]) {
        for source in sources.iter().take_while(|s| **s != NONE) {
            let held = &mut self.held[*source as usize];
            held.readers -= 1;
            if held.readers != 0 || held.views != 0 {
                continue;
            }
            let allocated = held.allocated;
            let root = self.tensor(*source).view_of;
            if root == NONE {
                if allocated {
                    self.free(*source);
                }
            } else {
                let held = &mut self.held[root as usize];
                held.views -= 1;
                if held.views == 0 && held.readers == 0 && held.allocated {
                    self.free(root);
                }
            }
        }
    }

    fn external(&self, id: Id) -> bool {
        self.tensor(id).home != super::tensor::Home::Graph
    }

    fn allocate(&mut self, id: Id, backend: u8) {
        let tensor = &self.graph.tensors[id as usize];
        if self.held[id as usize].allocated || self.external(id) || tensor.view_of != NONE {
            return;
        }
        self.held[id as usize].allocated = true;
        if matches!(tensor.op, Op::InPlace | Op::Rope) && self.reuse(id) {
            return;
        }
        let bytes = padded(tensor.bytes);
        let offset = self.pools[usize::from(backend)].take(bytes);
        let held = &mut self.held[id as usize];
        (held.backend, held.offset) = (backend, offset);
    }

    /// Takes over the memory of a source that nobody else reads and that has the same layout.
    fn reuse(&mut self, id: Id) -> bool {
        let tensor = &self.graph.tensors[id as usize];
        for source in tensor.src.iter().take_while(|s| **s != NONE) {
            let parent = self.tensor(*source);
            let held = self.held[*source as usize];
            // A view holds nothing itself, so it is never written over.
            let sole = held.allocated && held.readers == 1 && held.views == 0;
            if sole && !parent.output && same_layout(tensor, parent) {
                self.take_over(id, *source);
                return true;
            }
        }
        false
    }

    fn take_over(&mut self, id: Id, from: Id) {
        let base = self.held[from as usize];
        let (had, needs) = (padded(self.tensor(from).bytes), padded(self.tensor(id).bytes));
        self.held[from as usize].allocated = false;
        let held = &mut self.held[id as usize];
        (held.backend, held.offset) = (base.backend, base.offset);
        if had > needs {
            self.pools[usize::from(base.backend)].give(base.offset.saturating_add(needs), had - needs);
        }
    }

    fn free(&mut self, id: Id) {
        let tensor = &self.graph.tensors[id as usize];
        if tensor.output {
            return;
        }
        let held = &mut self.held[id as usize];
        held.allocated = false;
        self.pools[usize::from(held.backend)].give(held.offset, padded(tensor.bytes));
    }
}

fn same_layout(a: &Tensor, b: &Tensor) -> bool {
    a.kind == b.kind && a.ne == b.ne && a.plain && b.plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_that_is_used_up_goes_on() {
        for rest in [0, 32, 1 << 59] {
            let mut pool = Pool::new();
            assert_eq!(pool.take((1 << 60) - rest), 0);
            assert_eq!(pool.take(rest), (1 << 60) - rest);
            let end = pool.take(64);
            assert_eq!((end, pool.size), (1 << 60, (1 << 60) + 64));
            pool.give(end, 64);
            pool.take(u64::MAX);
            pool.take(u64::MAX);
            pool.give(u64::MAX, u64::MAX);
            pool.take(0);
            assert_eq!(pool.size, u64::MAX);
        }
    }

    #[test]
    fn blocks_are_used_again() {
        let mut pool = Pool::new();
        let blocks = [pool.take(64), pool.take(32), pool.take(64)];
        pool.give(blocks[0], 64);
        pool.give(blocks[2], 64);
        assert_eq!((pool.take(64), pool.take(128), pool.size), (0, 96, 224));
    }
}

//! ggml's scheduler (`ggml-backend.cpp`): which backend runs which operation, and what is copied between them.

use super::alloc::{Plan, sizes};
use super::tensor::{Graph, Home, Id, NONE, Op, Tensor, size};
use crate::fit::product;

/// The backends: devices first, the host last.
#[derive(Clone, Debug)]
pub(super) struct Backends {
    /// For each device: whether large batches use it for weights on the host.
    pub offloads: Vec<bool>,
    /// Copies of each input, for pipelining over several devices.
    pub copies: usize,
}

impl Backends {
    pub fn count(&self) -> usize {
        self.offloads.len() + 1
    }

    pub fn host(&self) -> u8 {
        u8::try_from(self.offloads.len()).unwrap_or(u8::MAX)
    }
}

/// Tensors in order, each with its backend.
type Ordered = Vec<(Id, u8)>;
/// A tensor that is read on another backend, that backend, and its copies there.
type Copied = (Id, u8, Vec<Id>);

/// What a batch has to have at least for weights on the host to be used on a device.
const OFFLOAD_BATCH: u64 = 32;

/// The size of each backend's compute buffer for a graph.
pub(super) fn schedule(graph: &mut Graph, backends: &Backends) -> Vec<u64> {
    if backends.offloads.is_empty() {
        let host = |ids: &[Id]| -> Ordered { ids.iter().map(|id| (*id, 0)).collect() };
        let (nodes, leafs) = (host(&graph.nodes), host(&graph.leafs));
        return sizes(&Plan { graph, nodes: &nodes, leafs: &leafs }, 1);
    }
    let mut scheduler =
        Scheduler { backends, of: graph.tensors.iter().map(|t| t.preset).collect::<Vec<Option<u8>>>() };
    scheduler.assign(graph);
    let (nodes, leafs) = scheduler.split(graph);
    sizes(&Plan { graph, nodes: &nodes, leafs: &leafs }, backends.count())
}

struct Scheduler<'a> {
    backends: &'a Backends,
    of: Vec<Option<u8>>,
}

/// Where a tensor's memory is that was there before the graph.
fn home(graph: &Graph, tensor: &Tensor) -> Home {
    if tensor.view_of == NONE { tensor.home } else { graph.get(tensor.view_of).home }
}

impl Scheduler<'_> {
    /// The backend that a tensor has by itself: by its memory, as an input, or by its weights.
    fn by_itself(&self, graph: &Graph, tensor: &Tensor) -> Option<u8> {
        match home(graph, tensor) {
            Home::Weight { backend, .. } | Home::Memory { backend } => return Some(backend),
            Home::Graph => {}
        }
        if tensor.input {
            return Some(self.backends.host());
        }
        if matches!(tensor.op, Op::Rope | Op::Flash) {
            return None;
        }
        let weight = tensor.src.iter().take_while(|s| **s != NONE).find_map(|s| match graph.get(*s).home {
            Home::Weight { backend, readable } => Some((backend, readable)),
            _ => None,
        });
        let (backend, readable) = weight?;
        if backend == self.backends.host() && readable && batch(tensor) >= OFFLOAD_BATCH {
            let offloads = self.backends.offloads.iter().position(|o| *o);
            if let Some(device) = offloads.and_then(|d| u8::try_from(d).ok()) {
                return Some(device);
            }
        }
        Some(backend)
    }

    fn assign(&mut self, graph: &Graph) {
        for id in graph.leafs.iter().chain(&graph.nodes) {
            if self.of[*id as usize].is_none() {
                self.of[*id as usize] = self.by_itself(graph, graph.get(*id));
            }
        }
        let operations: Vec<Id> =
            graph.nodes.iter().copied().filter(|id| graph.get(*id).op != Op::View).collect();
        let host = self.backends.host();
        // Devices spread to their neighbours first, downwards and upwards, then every backend.
        for (skip_host, upwards) in [(true, false), (true, true), (false, false), (false, true)] {
            let mut current = None;
            let mut visit = |id: Id| {
                let of = &mut self.of[id as usize];
                match *of {
                    Some(backend) if skip_host && backend == host => current = None,
                    Some(backend) => current = Some(backend),
                    None => *of = current,
                }
            };
            if upwards {
                operations.iter().rev().for_each(|id| visit(*id));
            } else {
                operations.iter().for_each(|id| visit(*id));
            }
        }
        for id in &graph.nodes {
            let tensor = graph.get(*id);
            if self.of[*id as usize].is_none() {
                self.of[*id as usize] =
                    if tensor.view_of == NONE { None } else { self.of[tensor.view_of as usize] };
            }
            let own = self.of[*id as usize];
            for source in tensor.src.iter().take_while(|s| **s != NONE) {
                if self.of[*source as usize].is_none() {
                    let root = graph.get(*source).view_of;
                    self.of[*source as usize] = if root == NONE { own } else { self.of[root as usize] };
                }
            }
            if self.of[*id as usize].is_none() {
                self.of[*id as usize] = Some(0);
            }
        }
    }

    fn backend(&self, id: Id) -> u8 {
        self.of.get(id as usize).copied().flatten().unwrap_or(self.backends.host())
    }

    /// Whether a backend can read a tensor where it is: here, none reads another's memory.
    fn readable(&self, graph: &Graph, id: Id, by: u8) -> bool {
        match home(graph, graph.get(id)) {
            Home::Weight { backend, .. } | Home::Memory { backend } => backend == by,
            Home::Graph => self.backend(id) == by,
        }
    }

    /// Cuts the graph where the backend changes, and copies what is read on another backend.
    fn split(&mut self, graph: &mut Graph) -> (Ordered, Ordered) {
        let mut copies: Vec<Copied> = Vec::new();
        let mut plan: Vec<(Id, u8)> = Vec::with_capacity(graph.nodes.len() * 2);
        let order = std::mem::take(&mut graph.nodes);
        let first = order.iter().find(|id| graph.get(**id).op != Op::View);
        let mut current = first.map_or(0, |id| self.backend(*id));
        let (mut inputs, mut body): (Vec<Id>, Vec<(Id, u8)>) = (Vec::new(), Vec::new());
        let mut split_inputs: Vec<(Id, u8)> = Vec::new();
        for id in &order {
            let backend = self.backend(*id);
            if graph.get(*id).op == Op::View {
                body.push((*id, backend));
                continue;
            }
            let sources = graph.get(*id).src;
            let foreign_weight = |s: &Id| {
                matches!(graph.get(*s).home, Home::Weight { .. }) && !self.readable(graph, *s, current)
            };
            let again = backend == current
                && !inputs.is_empty()
                && sources.iter().take_while(|s| **s != NONE).any(foreign_weight);
            if backend != current || again {
                self.close(graph, &mut plan, &mut inputs, &mut body, &copies, current);
                current = backend;
            }
            for (slot, source) in sources.iter().enumerate().take_while(|(_, s)| **s != NONE) {
                if self.readable(graph, *source, current) {
                    continue;
                }
                let copy = match copies.iter().find(|(of, by, _)| of == source && *by == current) {
                    Some((_, _, made)) => made[0],
                    None => {
                        let made = self.copies(graph, *source, current);
                        let first = made[0];
                        copies.push((*source, current, made));
                        inputs.push(*source);
                        split_inputs.push((*source, current));
                        first
                    }
                };
                graph.tensors[*id as usize].src[slot] = copy;
            }
            body.push((*id, backend));
        }
        self.close(graph, &mut plan, &mut inputs, &mut body, &copies, current);
        let leafs = self.leafs(graph, &copies, &split_inputs);
        (plan, leafs)
    }

    /// Puts a split behind those before it: first what it copies, each behind a reader that keeps the original.
    fn close(
        &mut self,
        graph: &mut Graph,
        plan: &mut Ordered,
        inputs: &mut Vec<Id>,
        body: &mut Ordered,
        copies: &[Copied],
        backend: u8,
    ) {
        for input in inputs.drain(..) {
            let ne = graph.ne(input);
            let keeper = graph.result_in(Op::Leaf, input, ne, true, &[input]);
            let of = self.backend(input);
            self.of.resize(graph.tensors.len(), None);
            self.of[keeper as usize] = Some(of);
            plan.push((keeper, of));
            if let Some((_, _, made)) = copies.iter().find(|(id, by, _)| *id == input && *by == backend) {
                plan.push((made[0], backend));
            }
        }
        plan.append(body);
    }

    /// The copies of a tensor on a backend. With pipelining, what comes from another device takes twice as many:
    /// measured with ggml 0.27 on two and three devices.
    fn copies(&mut self, graph: &mut Graph, of: Id, backend: u8) -> Vec<Id> {
        let from_device = graph.get(of).op != Op::Leaf && self.backend(of) != self.backends.host();
        let count = self.backends.copies;
        let count = if count > 1 && from_device { 2 * count } else { count };
        (0..count).map(|_| self.copy(graph, of, backend)).collect()
    }

    fn copy(&mut self, graph: &mut Graph, of: Id, backend: u8) -> Id {
        let tensor = graph.get(of);
        let (kind, ne, bytes) = (tensor.kind, tensor.ne, tensor.bytes);
        let plain = tensor.plain;
        let id = graph.leaf(kind, ne, Home::Graph, self.backends.copies > 1);
        let copy = &mut graph.tensors[id as usize];
        copy.bytes = if plain { size(kind, ne) } else { bytes };
        copy.plain = plain;
        copy.output = self.backends.copies > 1;
        self.of.resize(graph.tensors.len(), None);
        self.of[id as usize] = Some(backend);
        id
    }

    /// The leafs: with pipelining, every copy of every input is held from the start.
    fn leafs(&mut self, graph: &mut Graph, copies: &[Copied], split_inputs: &[(Id, u8)]) -> Ordered {
        let mut leafs = Vec::new();
        let original = std::mem::take(&mut graph.leafs);
        if self.backends.copies > 1 {
            for leaf in original.iter().filter(|id| graph.get(**id).input).copied().collect::<Vec<Id>>() {
                let backend = self.backend(leaf);
                graph.tensors[leaf as usize].output = true;
                leafs.push((leaf, backend));
                for _ in 1..self.backends.copies {
                    let copy = self.copy(graph, leaf, backend);
                    leafs.push((copy, backend));
                }
            }
            for (input, backend) in split_inputs {
                if let Some((_, _, made)) = copies.iter().find(|(id, by, _)| id == input && by == backend) {
                    leafs.extend(made.iter().map(|id| (*id, *backend)));
                }
            }
        }
        leafs.extend(original.iter().map(|id| (*id, self.backend(*id))));
        leafs
    }
}

/// How many rows an operation has, as backends count them.
fn batch(tensor: &Tensor) -> u64 {
    match tensor.op {
        Op::GetRows => 0,
        Op::MulMat => tensor.ne[1],
        Op::MulMatId => tensor.ne[2],
        _ => product([tensor.ne[1], tensor.ne[2], tensor.ne[3]]),
    }
}

"""CUDA graphs for decoding: the hundreds of kernels of a step, a new token per row, are recorded once, launched as one.

On a GPU small steps cost mostly their launches: each takes microseconds of the CPU, often more than the kernel runs.
A recording uses fixed tensors, those of one KV cache: when the cache grows, or rows leave it, the step is recorded
again. Sampling is not part of it.

No GPU run was ever made of this file. Without a GPU the tests run `Recorded` with a stand-in for `cuda_graph`.

    generate = with_graphs(model.generate)   # on CUDA; elsewhere it changes nothing
"""

import functools
import weakref

import torch


def with_graphs(generate):
    """The same function of (model, prompts, ...), its steps recorded where the model is on a GPU."""
    def recorded(model, prompts, **settings):
        device = next(model.parameters()).device
        if device.type != "cuda":
            return generate(model, prompts, **settings)
        with torch.cuda.device(device):  # streams and recordings belong to the current device
            return generate(Recorded(model, cuda_graph), prompts, **settings)
    return recorded


@functools.cache
def side_stream(device):
    return torch.cuda.Stream(device)  # one for all recordings: each stream keeps a workspace for good


def cuda_graph(run):
    """Records run() -> tensor. Returns that tensor, and a function that computes its content again."""
    side = side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls allocate workspaces and choose kernels, which must not be recorded
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
        output = run()
    return output, graph.replay


class FixedCache:
    """A KVCache as a recording needs it: the same tensors, but the new token's column is a number on the device."""

    def __init__(self, cache):
        self.k, self.v, self.start, self.length = cache.k, cache.v, cache.start, cache.length
        self.column = torch.full((1,), cache.length, device=cache.start.device)

    def reserve(self, columns):
        return self.k.shape[3]

    def columns(self, count):
        return self.column

    def update(self, layer, k, v):
        self.k[layer].index_copy_(2, self.column, k)
        self.v[layer].index_copy_(2, self.column, v)
        return self.k[layer], self.v[layer]


class Recorded:
    """model.py's Transformer, with its steps of one token per row recorded by record(run) -> (output, replay)."""

    def __init__(self, model, record):
        self.model, self.record = model, record
        self.recorded_keys = None  # a weak reference to the keys of the cache that the recording uses

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, ids, cache):
        """Logits (B, 1, V) of ids (B, 1); the next call overwrites them."""
        cache.reserve(1)
        if self.recorded_keys is None or self.recorded_keys() is not cache.k:
            self._record(ids, cache)
        self.ids.copy_(ids)
        self.column.fill_(cache.length)
        self.replay()
        cache.length += 1
        return self.logits

    def _record(self, ids, cache):
        self.replay = self.logits = None  # frees the old recording's memory, once the caller has dropped its logits
        fixed = FixedCache(cache)
        self.ids, self.column = ids.clone(), fixed.column

        def step():
            fixed.length = cache.length  # the model has advanced it: the calls before the recording repeat one step
            return self.model(self.ids, cache=fixed)

        self.logits, self.replay = self.record(step)
        self.recorded_keys = weakref.ref(cache.k)  # weak: a cache that grows must free its old keys

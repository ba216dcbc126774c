"""CUDA graphs for decoding: the hundreds of kernels of a step, of one new token a row, are recorded once and launched as one.

Launching is what small steps cost on a GPU: each kernel's launch takes microseconds of the CPU, often more than the
kernel. A recording belongs to the cache's tensors and is made anew when the cache grows or rows leave. Sampling stays outside.

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
        with torch.cuda.device(device):  # streams and recordings are of the current one
            return generate(Recorded(model, cuda_graph), prompts, **settings)
    return recorded


@functools.cache
def side_stream(device):
    return torch.cuda.Stream(device)  # one for all recordings: each stream keeps a workspace for good


def cuda_graph(run):
    """Records run() -> tensor; returns that tensor, and the function that fills it anew."""
    aside = side_stream(torch.cuda.current_device())  # first calls allocate workspaces and choose kernels: none of a recording's
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run(), run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may do as they like
        out = run()
    return out, graph.replay


class FixedCache:
    """A KVCache as a recording needs it: the same tensors, but where the new token goes is a number on the device."""

    def __init__(self, cache):
        self.k, self.v, self.start, self.length = cache.k, cache.v, cache.start, cache.length
        self.column = torch.zeros(1, dtype=torch.long, device=cache.start.device)

    def reserve(self, columns):
        return self.k.shape[3]

    def columns(self, count):
        return self.column

    def update(self, layer, k, v):
        return self.k[layer].index_copy_(2, self.column, k), self.v[layer].index_copy_(2, self.column, v)


class Recorded:
    """model.py's Transformer, whose steps of one token a row are recorded. record(run) -> (output, replay)."""

    def __init__(self, model, record):
        self.model, self.record, self.of = model, record, lambda: None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, ids, cache):
        """Logits (B, 1, V) of ids (B, 1); the next call overwrites them."""
        cache.reserve(1)
        if self.of() is not cache.k:
            self.replay = self.logits = None  # the old recording's memory is free once the caller drops its logits
            fixed, self.ids = FixedCache(cache), ids.clone()
            self.column = fixed.column.fill_(cache.length)

            def step():
                fixed.length = cache.length  # a warm-up is the same step again
                return self.model(self.ids, cache=fixed)

            self.logits, self.replay = self.record(step)
            self.of = weakref.ref(cache.k)  # weak: a cache that grows must free what it was
        self.ids.copy_(ids)
        self.column.fill_(cache.length)
        self.replay()
        cache.length += 1
        return self.logits

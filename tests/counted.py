"""Counts the bytes of all live tensors, those that only C++ holds too: what a training takes of memory."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretend_cuda import Pretended, tensors_in


class Counted(TorchDispatchMode):
    """Within the block: `now` {"cpu": bytes, "cuda": bytes} of what was made in it, or added, and still lives; `peak`."""

    def __init__(self, *tensors):
        super().__init__()
        self.sizes, self.now, self.peak = {}, {"cpu": 0, "cuda": 0}, 0
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor):
        kind = "cuda" if isinstance(tensor, Pretended) else "cpu"
        storage = (tensor.held if kind == "cuda" else tensor).untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now[kind] += self.sizes[key]
            self.peak = max(self.peak, sum(self.now.values()))
            weakref.finalize(storage, self.forget, key, kind)

    def forget(self, key, kind):
        self.now[kind] -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tensors_in(result):
            self.see(tensor)
        return result

"""Counts the bytes of all live tensors, those that only C++ holds too: what a training takes of memory."""

import weakref

from torch.utils._python_dispatch import TorchDispatchMode

from pretend_cuda import Pretended, tensors_in


class Counted(TorchDispatchMode):
    """Within the block: `now`, {"cpu": bytes, "cuda": bytes} of what was given or made in it and lives; `peak`."""

    def __init__(self, *tensors):
        super().__init__()
        self.found, self.now, self.peak = {}, {"cpu": 0, "cuda": 0}, 0  # found: storage -> (where, bytes)
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor):
        where = "cuda" if isinstance(tensor, Pretended) else "cpu"
        storage = (tensor.held if where == "cuda" else tensor).untyped_storage()
        key = storage._cdata
        if key in self.found:
            self.now[self.found[key][0]] -= self.found[key][1]
        else:
            weakref.finalize(storage, self.forget, key)
        self.found[key] = where, storage.nbytes()  # as last seen: pretend_cuda makes some in the other place first
        self.now[where] += storage.nbytes()
        self.peak = max(self.peak, sum(self.now.values()))

    def forget(self, key):
        where, count = self.found.pop(key)
        self.now[where] -= count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tensors_in(result):
            self.see(tensor)
        return result

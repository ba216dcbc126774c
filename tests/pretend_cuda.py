"""A pretended GPU, to find without one what would fail on one: CPU tensors that say they are on cuda:0.

    install()   # changes torch for the rest of this process: only in one that ends soon (run_forked)

Such a tensor refuses tensors of the CPU beside it. Where a GPU would be waited for, and where values are copied to it,
is counted by line of the project (`waits`, `copies`), and not permitted while a CUDA graph is captured. A graph repeats
the operations of its capture, so that a number which Python computed stays what it was; the capture computes too, where
a GPU's only records. The kernels are the CPU's, autocast too: no numerics, no speed, no memory. All streams are one.

To C++ the tensors are the CPU's, as a CPU build of torch accepts no others: `Everywhere` sees what names a device in
Python, and a function that makes tensors of none in C++ must be named there.
"""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda:0")
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
         "bincount", "multinomial", "repeat_interleave"}  # their result is a value, or its size depends on values
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}

waits, copies = Counter(), Counter()  # "grpo.py:12 nonzero" -> how often


def note(counter, what):
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    where = f"{frame.f_code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_lineno} {what}"
    counter[where] += 1
    if Graph.captured is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {where}")


def is_ours(filename):
    return filename.startswith(str(ROOT)) and "site-packages" not in filename and filename != __file__


# ------------------------------------------------------------------------------------------- tensors

class Pretended(torch.Tensor):
    """To C++ it is a CPU tensor without memory; its values lie in `held`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = CUDA, True, False

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return operation(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        new = memo[id(self)] = Pretended(self.held.clone()).requires_grad_(self.requires_grad)
        new._is_param = getattr(self, "_is_param", False)
        return new

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **_):
        return f"Pretended({self.cpu()})"


def held(value):
    return value.held if isinstance(value, Pretended) else value


def mapped(function, value):
    """function of all values in nested lists, tuples and dicts (torch's tree_map takes ten times as long)."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, item) for item in value])
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in value.items()}
    return function(value)


def tensors_in(*values):
    found = []
    mapped(lambda value: isinstance(value, torch.Tensor) and found.append(value), values)
    return found


def operation(func, args, kwargs):
    """One operation with a tensor of the device among its arguments: refused, or counted and computed."""
    name = func._schema.name.removeprefix("aten::")
    tensors = tensors_in(args, kwargs)
    foreign = [t for t in tensors if not isinstance(t, Pretended)]
    if name == "copy_":
        if foreign:
            note(waits if args[0] is foreign[0] else copies, "copy_")
    elif name in INDEXING and isinstance(args[0], Pretended):
        check_index(*args[:3])
    elif any(t.dim() > 0 for t in foreign) or name.endswith("_") and foreign and args[0] is foreign[0]:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {func}")
    elif name in WAITS:
        note(waits, name)
    args, kwargs = mapped(held, args), mapped(held, kwargs)
    result = func(*args, **kwargs)
    if Graph.captured is not None:
        Graph.captured.append((func, args, kwargs, tensors_in(result)))
    owners = {id(held(t)): t for t in tensors}  # of what was written in place

    def on_the_gpu(value):
        if not isinstance(value, torch.Tensor):
            return value
        return owners[id(value)] if id(value) in owners else Pretended(value)

    return mapped(on_the_gpu, result)


def check_index(x, indices, value=None):
    """x[indices] and x[indices] = value: a mask selects so many values as are to be waited for."""
    indices = [index for index in indices if index is not None]
    if value is not None and not isinstance(value, Pretended) and value.dim() > 0:
        raise RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu: x[...] = value")
    if any(not isinstance(index, Pretended) for index in indices):
        note(copies, "an index")
    is_fill = value is not None and value.numel() == 1
    if any(index.dtype == torch.bool for index in indices) and not is_fill:
        note(waits, "a mask as an index")


class Everywhere(TorchFunctionMode):
    """Gives functions that name a device tensors of that device."""

    MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.new_tensor}
    IN_ONE = {torch._C._nn.pad_sequence}  # makes a tensor in C++, where our tensors are the CPU's

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.pin_memory:
            return args[0].clone()
        if func in self.IN_ONE:
            return pretended(func(*mapped(held, args), **mapped(held, kwargs or {})))
        if func is torch.Tensor.__deepcopy__:  # its memo may hold tensors of the device
            return func(*args)
        if not kwargs and func not in self.MOVES:
            return self.checked(func, args, func(*args))
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            target = {torch.Tensor.cpu: ("cpu",), torch.Tensor.cuda: ("cuda",)}.get(func, args[1:])
            return to(args[0], *target, **kwargs)
        if func is torch.Tensor.new_tensor:
            kwargs.setdefault("device", args[0].device)
        device, generator = kwargs.get("device"), kwargs.get("generator")
        if device is not None:
            device = torch.device(device).type
        if device == "cuda":
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if device == "cuda":
            if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
                note(copies, func.__name__)
            result = pretended(result)
        elif device == "cpu":
            result = held(result)
        elif device is None:
            self.checked(func, args, result)
        if generator is not None and isinstance(result, torch.Tensor) and result.device.type != generator.device.type:
            raise RuntimeError(f"Expected a {result.device.type} device for generator, found {generator.device.type}")
        return result

    @staticmethod
    def checked(func, args, result):
        if type(result) is torch.Tensor and all(result is not arg for arg in args) and any(
                isinstance(tensor, Pretended) for tensor in tensors_in(args)):
            raise NotImplementedError(f"{func.__name__} makes a tensor of the CPU; should it stand in IN_ONE?")
        return result


def pretended(x):
    return x if isinstance(x, Pretended) else Pretended(x.detach()).requires_grad_(x.requires_grad)


def to(x, *args, copy=False, **kwargs):
    """x.to(device, dtype, copy=...), x.to(other)"""
    if args and isinstance(args[0], torch.Tensor):
        args = args[0].device, args[0].dtype
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    before, after = x.device.type, (device or x.device).type
    if {before, after} != {"cpu", "cuda"}:
        return torch.Tensor.to(x, *([] if device is None or after == "cuda" else [device]), dtype or x.dtype, copy=copy)
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError("the pretended GPU computes no gradient of a move between devices")
    if after == "cuda":
        note(copies, "to the GPU")
        return Pretended(x.detach().to(dtype or x.dtype, copy=True))
    note(waits, "to the CPU")
    return x.held.to(dtype or x.dtype, copy=True)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.on = torch.device(device)
        return self

    def __init__(self, device="cpu"):
        pass

    device = property(lambda self: self.on)


# ------------------------------------------------------------------------------------------- torch.cuda

class Graph:
    """torch.cuda.CUDAGraph: the operations of its capture, on the tensors that they read and wrote."""

    captured = None  # the operations of the graph that is being captured

    def replay(self):
        for func, args, kwargs, results in self.operations:
            for old, new in zip(results, tensors_in(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # else it is a view, or was written in place
                    old.copy_(new)


@contextmanager
def capture(graph, **_):
    note(waits, "synchronize")
    Graph.captured = graph.operations = []
    try:
        yield
    finally:
        Graph.captured = None


class Stream:
    def wait_stream(self, other):
        pass


class Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


def install():
    """From here on this process has a GPU."""
    properties = SimpleNamespace(name="pretended", major=9, minor=0, total_memory=80 * 2 ** 30)
    stand_ins = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, _lazy_init=lambda: None,
        get_device_name=lambda device=None: "pretended", get_device_capability=lambda device=None: (9, 0),
        get_device_properties=lambda device=None: properties, max_memory_allocated=lambda device=None: 0,
        reset_peak_memory_stats=lambda device=None: None, synchronize=lambda device=None: note(waits, "synchronize"),
        device=lambda device: nullcontext(), Stream=Stream, stream=lambda stream: nullcontext(),
        current_stream=lambda device=None: Stream(), CUDAGraph=Graph, graph=capture)
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.Generator, torch.autocast = Generator, Autocast
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to() keeps its parameters, as on a GPU
    Everywhere().__enter__()

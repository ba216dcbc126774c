"""A training state saved and restored exactly, atomically: a run that is killed resumes as if it had not been.

A state is one safetensors file with its counters and a checksum in the header: nothing is half new and half old, and
nothing is pickled. Every file is written under a temporary name, flushed to disk, then renamed: whenever the process is
killed, the name holds the old content or the new one, whole.

    save(dir, *state_of(model=model, optimizer=optimizer, generator=generator, step=step))
    if state := load(dir):
        step = restore(*state, model=model, optimizer=optimizer, generator=generator)["step"]

    with lock(dir), Checkpointer(dir) as checkpointer:                   # or all of it, around a training
        train(..., save=checkpointer.save, resume=checkpointer.resume)
"""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.amp import GradScaler
from torch.nn import Module
from torch.optim import Optimizer

STATE, DONE = "state.safetensors", "DONE"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
          torch.complex64: "C64"}  # safetensors' names
DISK = 5e8  # bytes per second, assumed until a state has been saved and its time is known
SHARE = 0.02  # of the time that saving may take
SKIPS = 5  # a training ends after this many updates in a row that are not finite
RESTARTS = "without it the training starts again from the beginning"
MADE_AGAIN = "if it is deleted, it is made again"
MADE_AGAIN_WITH_DONE = f"if it is deleted, with {DONE} beside it if there is one, it is made again"

# ------------------------------------------------------------------------------------------- of several processes


def is_first() -> bool:
    """Whether this is the first of torchrun's processes, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def by_first(write):
    """A function that changes files, as the first process alone runs it."""
    @wraps(write)
    def write_or_leave(*args, **kwargs):
        if is_first():
            return write(*args, **kwargs)
    return write_or_leave


def largest(number: int) -> int:
    """The largest of all processes' numbers, of True and False too."""
    if not dist.is_initialized():
        return number
    number = torch.tensor(int(number))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


# ------------------------------------------------------------------------------------------- files, always whole


@contextmanager
def _replacing(path: str | Path):
    """A temporary name to write to; at the end of the block it replaces `path`, or is deleted if writing failed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # always the same name, so that what a killed writer left is deleted
    try:
        temporary.unlink(missing_ok=True)  # a link in its place would be followed
        yield temporary
        _flush(temporary)  # the content first: a name that outlives a power cut must not name an empty file
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:  # when the disk is full neither names the file
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from None


def _flush(path: Path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@by_first
def atomic_write(path: str | Path, text: str):
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@by_first
def _write_tensors(path: str | Path, tensors: dict[str, Tensor]):
    with _replacing(path) as temporary:
        # safetensors 0.8 writes to a hidden file with a random name beside its target: here in a folder that is deleted
        folder = temporary.with_name(temporary.name + ".new")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
            save_file(tensors, folder / temporary.name)
            os.replace(folder / temporary.name, temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@by_first
def save_directory(dir: str | Path, write):
    """write(aside) fills a directory; its files then come into `dir`, each whole, a config.json last."""
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    aside = dir / "saving.tmp"
    if aside.is_symlink():
        aside.unlink()  # not followed
    shutil.rmtree(aside, ignore_errors=True)  # what a killed writer left
    aside.mkdir()
    try:
        write(aside)
        paths = sorted(aside.iterdir(), key=lambda path: (path.name == "config.json", path.name))
        mode = next(path.stat().st_mode for path in paths if path.suffix == ".json")
        for path in paths:
            path.chmod(mode)  # safetensors makes files that their owner alone can read
            _flush(path)  # whole on the disk before it has its name
            os.replace(path, dir / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@by_first
def write_arrays(path: str | Path, arrays: dict[str, np.ndarray]):
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    try:
        if not Path(path).is_file():
            raise ValueError("not a file")
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, TypeError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not whole ({error}); {MADE_AGAIN_WITH_DONE}") from None


def read_json(path: str | Path) -> dict:
    """The object in a file. Raises ValueError, which names it, for anything else."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: not a file")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {MADE_AGAIN}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; {MADE_AGAIN}")
    return value


# ------------------------------------------------------------------------------------------- rows


def read_jsonl(path: str | Path, whole: bool = False) -> list[dict]:
    """All rows, without a last line that a killed writer left unfinished.

    whole: the file was written at once, so that an unfinished line is an error.
    """
    lines = Path(path).read_bytes().split(b"\n")
    if whole and lines[-1]:
        raise ValueError(f"{path}:{len(lines)}: the last line is cut off; {MADE_AGAIN_WITH_DONE}")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            if number < len(lines):  # the line end is there: not unfinished but wrong
                raise ValueError(f"{path}:{number}: not JSON") from None
    return rows


def write_jsonl(path: str | Path, rows: Iterable[dict]):
    atomic_write(path, "".join(_line(row) for row in rows))


@by_first
def append_jsonl(path: str | Path, row: dict):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_cut_off(path):
        write_jsonl(path, read_jsonl(path))  # without the unfinished line, to which this row would be glued
    with open(path, "a", encoding="utf-8") as file:
        file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _is_cut_off(path: Path) -> bool:
    with open(path, "ab+") as file:
        size = file.tell()
        return size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"


# ------------------------------------------------------------------------------------------- a state


@by_first
def save(dir: str | Path, tensors: dict[str, Tensor], meta: dict):
    """Written by hand, a safetensors file: of what lies on a GPU, one tensor at a time is in the CPU's memory."""
    counters = json.dumps(meta)
    size = len(_header(tensors, counters, 2 ** 32))  # its checksum, known last, has at most as many digits
    size = -(-size // 8) * 8  # so that the tensors are aligned
    checksum = zlib.crc32(counters.encode())
    with _replacing(Path(dir) / STATE) as temporary, open(temporary, "wb") as file:
        file.seek(8 + size)
        for name in sorted(tensors):
            content = _bytes(tensors[name])
            checksum = zlib.crc32(content, checksum)
            file.write(content)
        file.seek(0)
        file.write(size.to_bytes(8, "little") + _header(tensors, counters, checksum).ljust(size))


def _header(tensors: dict[str, Tensor], meta: str, checksum: int) -> bytes:
    """What a safetensors file begins with, after 8 bytes with its length."""
    header, end = {"__metadata__": {"meta": meta, "checksum": str(checksum)}}, 0
    for name in sorted(tensors):
        t = tensors[name]
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    return json.dumps(header).encode()


def _bytes(t: Tensor) -> np.ndarray:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(tensors: dict[str, Tensor], meta: str) -> str:
    checksum = zlib.crc32(meta.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(_bytes(tensors[name]), checksum)
    return str(checksum)


def load(dir: str | Path) -> tuple[dict[str, Tensor], dict] | None:
    """(tensors, meta) of the last state that was saved whole, on the CPU; None if nothing was saved.

    Not for reading while another process saves: safetensors opens the file twice, and the two could be different files.
    """
    path = Path(dir) / STATE
    if not path.exists():
        return None
    try:
        return _read_state(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole training state ({error}); {RESTARTS}") from None


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    if not path.is_file():
        raise ValueError("not a file")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = file.metadata()
    if _checksum(tensors, header["meta"]) != header["checksum"]:
        raise ValueError("its checksum is another")
    return tensors, {**json.loads(header["meta"])}  # TypeError where it is no object


@by_first
def drop(dir: str | Path):
    """Deletes the state of a training that has ended, and what a killed writer left of one."""
    for name in (STATE, f"{STATE}.tmp"):
        (Path(dir) / name).unlink(missing_ok=True)


def state_of(**parts) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) for `save`, of named modules, optimizers, generators and so on, and values that JSON can hold.

    What a module has of LoRA's frozen base (variants/lora.py) is left out: it is in the directory it came from.
    """
    tensors, meta = {}, {}
    for name, part in parts.items():
        if isinstance(part, Module):
            for key, weight in _weights(part).items():
                tensors[f"{name}.{key}"] = whole(weight)
        elif isinstance(part, Optimizer):
            state = part.state_dict()
            for i, moments in state["state"].items():
                for key, moment in moments.items():
                    tensors[f"{name}.{i}.{key}"] = whole(moment)  # "optimizer.0.exp_avg"
            meta[name] = state["param_groups"]
        elif isinstance(part, GradScaler):
            meta[name] = part.state_dict()
        elif isinstance(part, Generator):
            tensors[name] = part.get_state()
        elif isinstance(part, Tensor):
            tensors[name] = part
        else:
            meta[name] = part
    return tensors, meta


def whole(t: Tensor) -> Tensor:
    """A sharded tensor, gathered for the first process, in the CPU's memory; the others get nothing. All take part."""
    if not hasattr(t, "full_tensor"):
        return t
    gathered = t.full_tensor()
    return gathered.cpu() if is_first() else gathered[:0].cpu()


def _laid_out_as(p: Tensor, t: Tensor) -> Tensor:
    """A whole tensor as p is: sharded, if it is."""
    if not hasattr(p, "full_tensor"):
        return t
    from torch.distributed.tensor import distribute_tensor  # here: it takes a while to import
    return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)


def _weights(module: Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; tied ones (embedding and head) under their first name only."""
    persistent = module.state_dict().keys()
    weights = {name: p for name, p in module.named_parameters() if not hasattr(p, "is_base")}
    for name, buffer in module.named_buffers():
        if name in persistent:
            weights[name] = buffer
    return weights


def restore(tensors: dict[str, Tensor], meta: dict, **objects: Module | Optimizer | GradScaler | Generator) -> dict:
    """Puts the state into the objects, in place; returns the rest of it, plain values and tensors, by name."""
    tensors, meta = dict(tensors), dict(meta)
    for name, target in objects.items():
        own = _take(name, tensors)
        groups = meta.pop(name, None)
        if not own and groups is None:
            raise ValueError(f"the training state holds no {name}")
        if isinstance(target, Module):
            _restore_module(target, own, name)
        elif isinstance(target, Optimizer):
            _restore_optimizer(target, own, groups)
        elif isinstance(target, GradScaler):
            target.load_state_dict(groups)
        else:
            target.set_state(own[""])
    return meta | tensors


def _take(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes what is called `name` out of `tensors`, as "", and "name.anything", as "anything"."""
    own = {}
    for key in list(tensors):
        if key == name:
            own[""] = tensors.pop(key)
        elif key.startswith(f"{name}."):
            own[key.removeprefix(f"{name}.")] = tensors.pop(key)
    return own


def _restore_module(module: Module, own: dict[str, Tensor], name: str):
    weights = _weights(module)
    for key in sorted(weights.keys() | own.keys()):
        saved, here = _layout(own.get(key)), _layout(weights.get(key))
        if saved != here:
            raise ValueError(f"{name}.{key} is {saved} in the training state, {here} in the model")
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(_laid_out_as(weight, own[key]))


def _layout(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def _restore_optimizer(optimizer: Optimizer, own: dict[str, Tensor], groups: list[dict]):
    own_groups = optimizer.state_dict()["param_groups"]
    restored = [_group_like(here, group) for here, group in zip(own_groups, groups, strict=True)]
    optimizer.load_state_dict({"state": _moments(optimizer, own), "param_groups": restored})


def _moments(optimizer: Optimizer, own: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """{parameter's number: {"exp_avg": ..., ...}}"""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    moments = {}
    for key, moment in own.items():
        number, name = key.split(".")  # "0.exp_avg"
        shape = () if name == "step" else parameters[int(number)].shape
        # Adam's fused step does not look at shapes: with another one it would write outside the moment's memory.
        if is_adam and (moment.shape != shape or not moment.is_floating_point()):
            raise ValueError(f"the optimizer's {name} of parameter {number} is {_layout(moment)}")
        if name == "step":  # load_state_dict chooses its device
            moment = moment.clone()
        else:
            p = parameters[int(number)]
            moment = _laid_out_as(p, moment.to(p.device, copy=True))  # on a GPU, without a copy on the CPU
        moments.setdefault(int(number), {})[name] = moment
    if len({frozenset(names) for names in moments.values()}) > 1:
        raise ValueError("the optimizer's moments are not the same for all parameters")
    return moments


def _group_like(here: dict, group: dict) -> dict:
    """A saved parameter group for an optimizer whose own is `here`: its tuples (Adam's betas) are lists in JSON."""
    restored = {}
    for key, value in group.items():
        restored[key] = tuple(value) if isinstance(here.get(key), tuple) else value
    for key, value in here.items():
        other_parameters = key == "params" and restored[key] != value
        if other_parameters or type(restored[key]) is not type(value):
            raise ValueError(f"the optimizer's {key} is {restored[key]!r}, here {value!r}")
    return restored


def is_out_of_memory(error):
    """By its class or a library's own words: "illegal memory access" is something else."""
    words = ("CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")  # of a GPU's cuBLAS, of a CPU's allocator
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


# ------------------------------------------------------------------------------------------- signals


class Terminated(KeyboardInterrupt):
    """SIGTERM was heard. It stops a run as Ctrl-C does, with another exit code."""


STOPS = (None, KeyboardInterrupt, Terminated)


def _set_handlers(handler, *signals):
    """Returns the earlier handlers. A signal that is ignored, as in the background of a shell, stays ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # nowhere else can a handler be set
        for number in signals:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    return before


def _restore_handlers(before):
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def hear_sigterm():
    """Within the block SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt (a Checkpointer saves first)."""
    def stop(*_):
        raise Terminated

    before = _set_handlers(stop, signal.SIGTERM)
    try:
        yield
    finally:
        _restore_handlers(before)


def print_flush(text: str):
    """Prints if somebody still reads: `| tee` dies of the same Ctrl-C, and the state must be saved after it."""
    with suppress(BrokenPipeError):
        print(text, flush=True)


# ------------------------------------------------------------------------------------------- around a training


class Checkpointer:
    """Saves a training's state now and then, and resumes from it; check_same_settings beside it refuses other settings.

    save(step=..., ...) is offered the state after each step. `step` counts finished steps, as do the rows of `logs`,
    JSONL files in `dir`: rows after the state's step are deleted on resuming, to be written again. Saving takes at most
    2% of the time, including `after`, which is called after each save. While a weight is not finite nothing is saved:
    the last good state stays. In a `with`, Ctrl-C or SIGTERM lets the step finish, saves and then stops; a second one
    stops at once.
    """

    def __init__(self, dir: str | Path, logs: Iterable[str] = (), every: float = 30.0, after=None):
        self.dir, self.every, self.after = Path(dir), every, after
        self.logs = [self.dir / log for log in logs]
        self.began = self.last = time.monotonic()
        self.spent = 0.0   # seconds of saving so far
        self.took = None   # seconds of the last save
        self.stop = None   # after a signal: KeyboardInterrupt or Terminated, to be raised when the step is saved
        self.state = load(dir)
        step = -1 if self.state is None else self.state[1].get("step", -1)
        if type(step) is int and (largest(step) != step or -largest(-step) != step):
            raise ValueError(f"{dir}: the processes find different states there; it must be one that all of them see")
        if self.state is None and is_first():
            for log in self.logs:
                log.unlink(missing_ok=True)

    def save(self, **parts) -> bool:
        """Whether the state was saved this time. After a signal: saves, then raises KeyboardInterrupt or Terminated."""
        stop = STOPS[largest(STOPS.index(self.stop))]  # a signal to one process stops all, after the same step
        is_due = is_first() and time.monotonic() - self.last > self.every
        if stop is None and not largest(is_due):
            return False
        saved = self._save(parts, at_once=stop is not None)
        if stop is not None:
            raise stop
        return saved

    def save_last(self, **parts):
        """Saves now, whatever the time: for a training that may go on with more steps."""
        self._save(parts, at_once=True)

    def _save(self, parts: dict, at_once: bool = False) -> bool:
        started = time.monotonic()
        if not at_once and not largest(is_first() and self._has_time_for(parts, started)):
            return False
        tensors, meta = state_of(**parts)
        if largest(not all(_is_finite(part) for part in parts.values() if isinstance(part, Module))):
            return False
        save(self.dir, tensors, meta)
        if self.after is not None:
            self.after()
        self.last = time.monotonic()
        self.took = self.last - started
        self.spent += self.took
        return True

    def _has_time_for(self, parts: dict, now: float) -> bool:
        expected = self.took
        if expected is None:
            expected = sum(t.numel() * t.element_size() for t in _large(parts)) / DISK
        return self.spent + expected <= SHARE * (now - self.began)

    @property
    def resume(self):
        """The function that puts the state into objects and returns its other values; None if nothing was saved."""
        return None if self.state is None else self._resume

    def _resume(self, **objects) -> dict:
        try:
            rest = restore(*self.state, **objects)
            if type(rest["step"]) is not int or rest["step"] < 0:
                raise ValueError(f"its step is {rest['step']!r}")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            if is_out_of_memory(error):  # nothing is wrong with the state
                raise
            raise ValueError(f"{self.dir / STATE}: not a state of this training ({error}); {RESTARTS}") from None
        self.state = None  # frees its memory
        for log in self.logs:
            if log.exists():
                self._delete_rows_after(rest["step"], log)
        return rest

    def _delete_rows_after(self, step: int, log: Path):
        try:
            rows = read_jsonl(log)
            if not all(isinstance(row, dict) and type(row.get("step")) is int for row in rows):
                raise ValueError(f"{log}: a row has no step")
        except ValueError as error:
            raise ValueError(f"{error}; without this file and {STATE} beside it the training starts again "
                             "from the beginning") from None
        write_jsonl(log, [row for row in rows if row["step"] <= step])

    def __enter__(self):
        self.handlers = _set_handlers(self._hear, signal.SIGINT, signal.SIGTERM)
        return self

    def _hear(self, number, _):
        if number == signal.SIGTERM:
            stop, name = Terminated, "SIGTERM"
        else:
            stop, name = KeyboardInterrupt, "Ctrl-C"
        if self.stop is not None:
            raise stop
        self.stop = stop
        line = f"\n{name}: stopping once the current step is finished and saved; {name} again stops at once\n"
        if is_first():
            with suppress(OSError):  # whoever reads may be gone with the same Ctrl-C
                os.write(2, line.encode())  # not print, which the signal may have interrupted

    def __exit__(self, kind, *_):
        _restore_handlers(self.handlers)
        if kind is None and (stop := STOPS[largest(STOPS.index(self.stop))]) is not None:  # it came after the last save
            raise stop


def _large(parts: dict) -> Iterable[Tensor]:
    """The tensors of a state that take time to save."""
    for part in parts.values():
        if isinstance(part, Tensor):
            yield part
        if isinstance(part, Module):
            yield from _weights(part).values()
        if isinstance(part, Optimizer):
            yield from (t for moments in part.state.values() for t in moments.values() if isinstance(t, Tensor))


def _is_finite(module: Module) -> bool:
    own = (p.to_local() if hasattr(p, "to_local") else p for p in module.parameters())
    return all(p.isfinite().all() for p in own)  # not buffers: a mask may hold minus infinity


class FiniteGuard:
    """Ends a training that does not recover: updates that are not finite are skipped, but not SKIPS and more in a row.

    check(metrics, updates, batch) is called after each step, which made so many updates. Raises ValueError when none of
    the last ones was finite; the batch, {name: tensor}, is saved for a look.
    """

    def __init__(self, dir: str | Path):
        self.dir, self.skipped = Path(dir), 0

    def check(self, metrics: dict, updates: int, batch: dict[str, Tensor]):
        if metrics["skipped"] < updates:
            self.skipped = 0
            return
        self.skipped += updates
        if self.skipped < SKIPS:
            return
        path, state = self.dir / "not_finite.safetensors", self.dir / STATE
        _write_tensors(path, {name: t.cpu().clone() for name, t in batch.items()})  # two may be one tensor
        last = f"the last good state is {state}"
        if not state.exists():
            last = "there is no good state yet, so the training starts again from the beginning"
        raise ValueError(f"step {metrics['step']}: {self.skipped} updates in a row had a loss or gradient that is not "
                         f"finite. The batch: {path}; {last}. The usual fix: a lower learning rate or float32, "
                         "with another --out")

    def check_sft(self, metrics: dict, batch: list[Tensor]):
        """After a step of sft.train."""
        self.check(metrics, 1, dict(zip(("ids", "segments", "positions", "targets"), batch)))

    def check_rl(self, metrics: dict, rollout, config):
        """After a rollout of grpo.train."""
        updates = config.inner_epochs * min(config.minibatches, len(rollout.texts))
        names = ("ids", "mask", "rewards", "old_logprobs", "sampled_logprobs")
        self.check(metrics, updates, {name: getattr(rollout, name) for name in names})


@contextmanager
def lock(dir: str | Path):
    """Keeps other processes out of `dir` within the block. Raises ValueError while another one is at work there."""
    import fcntl  # not on Windows
    path = Path(dir) / "LOCK"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_first():
        yield
        return
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read().strip() or "?"
            raise ValueError(f"{dir}: process {process} is at work here; wait for it, or choose another directory"
                             ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def check_same_settings(path: str | Path, settings: dict):
    """Writes the settings of what lies beside `path`, or raises ValueError where those of an earlier call differ."""
    path = Path(path)
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        atomic_write(path, json.dumps(settings, indent=1))
        return
    before = read_json(path)  # and is not written again: several processes of a comparison open one run
    if before != settings:
        raise ValueError(f"{path} is of another configuration ({difference(before, settings)}); choose another --out, "
                         f"or remove {path.parent}")


def difference(before, now, name="") -> str:
    """The first setting in which two differ, in words: "rl.lr was 0.1, is 0.2"."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{name} was {before}, is {now}"
    for key in before | now:
        if key not in before or key not in now or before[key] != now[key]:
            return difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)


def kept_rows(path: str | Path, generator: Generator, save, resume):
    """(rows, log) for a loop that draws from `generator` and logs rows {"step": ...}, such as evaluate.complete.

    rows are those of an earlier call; log(row) appends to `path` and offers the state. save and resume are a
    Checkpointer's, whose `logs` name `path`.
    """
    step = 0
    if resume is not None:
        step = resume(generator=generator)["step"]
    largest(0)  # waits: the first of several processes has deleted what came after the state
    rows = read_jsonl(path) if Path(path).exists() else []
    if [row["step"] for row in rows] != [*range(1, step + 1)]:  # lost ones would be drawn again, and differently
        raise ValueError(f"{path}: not the {step} rows of the state beside it; if both are deleted, "
                         "they are made again")

    def log(row):
        append_jsonl(path, row)
        save(generator=generator, step=row["step"])

    return rows, log


# ------------------------------------------------------------------------------------------- finished stages


def mark_finished(dir: str | Path, meta: dict):
    """The last thing a stage does: DONE says that the rest of `dir` is whole, and which settings and code made it."""
    atomic_write(Path(dir) / DONE, json.dumps(meta, indent=1) + "\n")
    largest(0)  # waits: what the first process has written, the others read


def finished(dir: str | Path) -> dict | None:
    """What mark_finished was given, to compare with today's settings and code; None if the stage is not finished."""
    path = Path(dir) / DONE
    return read_json(path) if path.exists() else None


def content_hash(path: str | Path) -> str:
    """Of a file, or of a model directory's files: the same as at an earlier call, wherever it lies now."""
    path, digest = Path(path), hashlib.sha256()
    for file in _model_files(path) if path.is_dir() else [path]:
        with open(file, "rb") as content:
            while piece := content.read(2 ** 24):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _model_files(dir: Path) -> list[Path]:
    files = [*dir.glob("*.json"), *dir.glob("*.jinja"), *dir.glob("*.safetensors")]
    return sorted(file for file in files if file.is_file())


def file_hash(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

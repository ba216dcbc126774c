"""A training state saved and restored exactly, atomically: a run that is killed goes on as if it had not been.

A state is one safetensors file, its counters and a checksum in that file's header: nothing is half new and half old, and
nothing is pickled. Files are written aside, flushed to disk, then renamed: whenever the process is killed, the name
holds the old content or the new one, whole.

    save(dir, *state_of(model=model, optimizer=optimizer, generator=generator, step=step))
    if state := load(dir):
        step = restore(*state, model=model, optimizer=optimizer, generator=generator)["step"]

    with lock(dir), Keeper(dir) as keeper:                            # or all of it, around a training
        train(..., save=keeper.save, resume=keeper.resume)
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
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn import Module
from torch.optim import Optimizer

STATE, DONE = "state.safetensors", "DONE"
DISK = 5e8  # bytes a second, until a state has been saved and its time is known


def save(dir: str | Path, tensors: dict[str, Tensor], meta: dict):
    tensors, meta = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, json.dumps(meta)
    with _aside(Path(dir) / STATE) as temporary:
        _save_file(temporary, tensors, {"meta": meta, "checksum": _checksum(tensors, meta)})


def _checksum(tensors: dict[str, Tensor], meta: str) -> str:
    checksum = zlib.crc32(meta.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), checksum)
    return str(checksum)


def load(dir: str | Path) -> tuple[dict[str, Tensor], dict] | None:
    """The last state that was saved whole, on the CPU; None if there is none. Not for reading along while another
    process saves: safetensors opens the file twice, and the two could be different files."""
    path = Path(dir) / STATE
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError("not a file")
        with safe_open(path, framework="pt") as file:
            tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        if _checksum(tensors, header["meta"]) != header["checksum"]:
            raise ValueError("its checksum is another")
        return tensors, {**json.loads(header["meta"])}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole training state ({error}); without it the training begins anew") from None


def drop(dir: str | Path):
    """The state of a training that has ended, and what a killed writer left of one."""
    for name in (STATE, f"{STATE}.tmp"):
        (Path(dir) / name).unlink(missing_ok=True)
    shutil.rmtree(Path(dir) / f"{STATE}.tmp.new", ignore_errors=True)


class Keeper:
    """A training's state, saved now and then and taken up again; `settle` beside it refuses other settings.

    save(step=..., ...) is offered the state after each step; `step` counts those that are finished, as do the rows of `logs`, JSONL
    files in `dir`: rows after the state's step go away, to be written again. Saving takes at most 2% of the time, `after` included,
    which is called after each save. Where a weight is not finite the state before it stays, the last good one. In a `with`, Ctrl-C
    lets the step finish, saves, and stops then; a second one stops at once.
    """

    def __init__(self, dir: str | Path, logs: Iterable[str] = (), every: float = 30.0, after=None):
        self.dir, self.logs, self.every, self.after = Path(dir), [Path(dir) / log for log in logs], every, after
        self.began = self.last = time.monotonic()
        self.spent, self.took, self.asked, self.state = 0.0, None, False, load(dir)
        if self.state is None:
            for log in self.logs:
                log.unlink(missing_ok=True)

    def save(self, **parts) -> bool:
        """Whether the state was saved this time. Raises KeyboardInterrupt after a Ctrl-C."""
        now = time.monotonic()
        if not self.asked and now - self.last <= self.every:
            return False
        saved = self._save(now, parts)
        if self.asked:
            raise KeyboardInterrupt
        return saved

    def _save(self, now: float, parts: dict) -> bool:
        tensors, meta = state_of(**parts)
        took = sum(t.nbytes for t in tensors.values()) / DISK if self.took is None else self.took
        if not self.asked and self.spent + took > 0.02 * (now - self.began):
            return False
        if not all(p.isfinite().all() for part in parts.values() if isinstance(part, Module) for p in part.parameters()):
            return False
        save(self.dir, tensors, meta)
        if self.after is not None:
            self.after()
        self.last = time.monotonic()
        self.took, self.spent = self.last - now, self.spent + self.last - now
        return True

    @property
    def resume(self):
        """The function that puts the state into objects and returns the rest of it, or None where nothing was saved."""
        return None if self.state is None else self._resume

    def _resume(self, **objects) -> dict:
        try:
            rest, self.state = restore(*self.state, **objects), None  # its memory is free then
            if type(rest["step"]) is not int or rest["step"] < 0:
                raise ValueError(f"its step is {rest['step']!r}")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            if "memory" in str(error):  # of the GPU: the state is none the worse
                raise
            raise ValueError(f"{self.dir / STATE}: not a state of this training ({error}); without it the training begins anew") from None
        for log in filter(Path.exists, self.logs):
            try:
                rows = read_jsonl(log)
                if not all(isinstance(row, dict) and type(row.get("step")) is int for row in rows):
                    raise ValueError(f"{log}: a row has no step")
            except ValueError as error:
                raise ValueError(f"{error}; without this file and {STATE} beside it the training begins anew") from None
            write_jsonl(log, [row for row in rows if row["step"] <= rest["step"]])
        return rest

    def __enter__(self):
        self.before = None
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self.before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def _interrupt(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError):  # not print, which this may have interrupted; and who reads it may be gone with the same Ctrl-C
            os.write(2, b"\nthe step is finished and saved, then this stops; Ctrl-C again: at once\n")

    def __exit__(self, kind, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
        if self.asked and kind is None:  # after the last save
            raise KeyboardInterrupt


@contextmanager
def offending(dir: str | Path):
    """Where a training ends because nothing is finite (sft.NotFinite, grpo.NotFinite), its batch is saved and the last good
    state named."""
    try:
        yield
    except ValueError as error:
        if not hasattr(error, "batch"):
            raise
        path, state = Path(dir) / "not_finite.safetensors", Path(dir) / STATE
        with _aside(path) as temporary:
            _save_file(temporary, {name: t.cpu().contiguous() for name, t in error.batch.items()})
        last = f"the last good state is {state}" if state.exists() else "there is no good state yet: the training begins anew"
        raise ValueError(f"{error}. Its batch: {path}; {last}. What usually mends it: a lower learning rate or float32, in another --out") from None


@contextmanager
def lock(dir: str | Path):
    """This process alone works in `dir` within the block. Raises ValueError while another one does; a dead one holds nothing."""
    import fcntl  # not on Windows
    path = Path(dir) / "LOCK"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{dir}: process {file.read().strip() or '?'} is at work here; wait for it, or choose another directory") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def settle(path: str | Path, settings: dict):
    """Writes the settings of what is kept beside `path`, or raises ValueError where those of an earlier call differ."""
    path, settings = Path(path), json.loads(json.dumps(settings))
    before = read_json(path) if path.exists() else settings
    if before != settings:
        raise ValueError(f"{path} is of another configuration ({difference(before, settings)}); choose another --out, or remove {path.parent}")
    if not path.exists():  # several processes of a comparison open one run
        atomic_write(path, json.dumps(settings, indent=1))


def difference(before, now, name=""):
    """The first setting in which two differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(k for k in before | now if k not in before or k not in now or before[k] != now[k])
        return difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    return f"{name} was {before}, is {now}"


def say(text: str):
    """Prints, if there is still someone who reads: `| tee` dies of the same Ctrl-C, and the state must be saved after it."""
    with suppress(BrokenPipeError):
        print(text, flush=True)


def atomic_write(path: str | Path, text: str):
    with _aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: str | Path, arrays: dict[str, np.ndarray]):
    with _aside(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    try:
        if not Path(path).is_file():
            raise ValueError("not a file")
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, RuntimeError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{path}: not whole ({error}); without it, and without {DONE} beside it if there is one, it is made anew") from None


@contextmanager
def _aside(path: str | Path):
    """A name to write to; at the end it takes the name's place, or is gone where that failed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # always this name: what a killed writer left goes
    try:
        temporary.unlink(missing_ok=True)  # and no link in its place is followed
        yield temporary
        _flush(temporary)  # the content first: a name that outlives a power cut must not name an empty file
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:  # of a full disk neither names the file
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from None


def _save_file(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None):
    """safetensors 0.8 writes to a hidden file of a random name beside the one it is given: here in a folder, which the next call clears."""
    folder = path.with_name(path.name + ".new")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        save_file(tensors, folder / path.name, header)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def state_of(**parts) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) for `save`, of named modules, optimizers, generators, tensors, and values that JSON can hold."""
    tensors, meta = {}, {}
    for name, part in parts.items():
        if isinstance(part, Module):
            tensors |= {f"{name}.{key}": weight for key, weight in _weights(part).items()}
        elif isinstance(part, Optimizer):
            state = part.state_dict()
            tensors |= {f"{name}.{i}.{key}": t for i, moments in state["state"].items() for key, t in moments.items()}
            meta[name] = state["param_groups"]
        elif isinstance(part, Generator):
            tensors[name] = part.get_state()
        elif isinstance(part, Tensor):
            tensors[name] = part
        else:
            meta[name] = part
    return tensors, meta


def restore(tensors: dict[str, Tensor], meta: dict, **objects: Module | Optimizer | Generator) -> dict:
    """Puts the state into the objects, in place; returns the rest of it, plain values and tensors, by name."""
    tensors, meta = dict(tensors), dict(meta)
    for name, target in objects.items():
        own = {key[len(name) + 1:]: tensors.pop(key) for key in [*tensors] if f"{key}.".startswith(f"{name}.")}
        groups = meta.pop(name, None)
        if not own and groups is None:
            raise ValueError(f"the training state holds no {name}")
        if isinstance(target, Module):
            _restore_module(target, own, name)
        elif isinstance(target, Optimizer):
            _restore_optimizer(target, own, groups)
        else:
            target.set_state(own[""])
    return meta | tensors


def _weights(module: Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; of tied ones (embedding and head) only the first name."""
    kept = module.state_dict().keys()
    return dict(module.named_parameters()) | {name: b for name, b in module.named_buffers() if name in kept}


def _restore_module(module: Module, own: dict[str, Tensor], name: str):
    weights = _weights(module)
    for key in sorted(weights.keys() | own.keys()):
        saved, here = ((tuple(side[key].shape), side[key].dtype) if key in side else (None, None) for side in (own, weights))
        if saved != here:
            raise ValueError(f"{name}.{key} has shape {saved[0]} in the training state, {here[0]} in the model, or {saved[1]} for {here[1]}")
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(own[key])


def _restore_optimizer(optimizer: Optimizer, own: dict[str, Tensor], groups: list[dict]):
    state, parameters = {}, [p for group in optimizer.param_groups for p in group["params"]]
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))  # whose fused step on another shape writes outside its memory
    for key, t in own.items():  # "0.exp_avg"
        i, moment = key.split(".")
        shape = () if moment == "step" else parameters[int(i)].shape
        if adam and (t.shape != shape or not t.is_floating_point()):
            raise ValueError(f"the optimizer's {moment} of parameter {i} has shape {tuple(t.shape)}")
        state.setdefault(int(i), {})[moment] = t.clone()
    if len({frozenset(moments) for moments in state.values()}) > 1:
        raise ValueError("the optimizer's moments are not those of all parameters")
    now = optimizer.state_dict()["param_groups"]
    groups = [{key: tuple(value) if isinstance(here.get(key), tuple) else value for key, value in group.items()}
              for here, group in zip(now, groups, strict=True)]
    for here, group in zip(now, groups):
        if wrong := [key for key, value in here.items() if type(group[key]) is not type(value) or key == "params" and group[key] != value]:
            raise ValueError(f"the optimizer's {wrong[0]} is {group[wrong[0]]!r}, here {here[wrong[0]]!r}")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def read_jsonl(path: str | Path, whole: bool = False) -> list[dict]:
    """All rows; a last line that a killed writer left unfinished is not one. whole: of a file that was written at once, where there is none."""
    rows, lines = [], Path(path).read_bytes().split(b"\n")
    if whole and lines[-1]:
        raise ValueError(f"{path}:{len(lines)}: the last line is cut off; without it, and without {DONE} beside it if there is one, it is made anew")
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            if number < len(lines):  # its line end is there: not unfinished but wrong
                raise ValueError(f"{path}:{number}: not JSON") from None
    return rows


def write_jsonl(path: str | Path, rows: Iterable[dict]):
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: str | Path, row: dict):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        size = file.tell()
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            write_jsonl(path, read_jsonl(path))  # without the unfinished line, or this row would be glued to it
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def kept_rows(path: str | Path, generator: Generator, save, resume):
    """(rows, log) for a loop that draws from `generator` and logs rows {"step": ...}, as evaluate.complete: rows are those of an
    earlier call, log(row) appends to `path` and offers the state. save and resume: a Keeper's, of which `path` is a log."""
    step = resume(generator=generator)["step"] if resume is not None else 0

    def log(row):
        append_jsonl(path, row)
        save(generator=generator, step=row["step"])

    rows = read_jsonl(path) if Path(path).exists() else []
    if [row["step"] for row in rows] != [*range(1, step + 1)]:  # what is lost would be drawn again, by another generator
        raise ValueError(f"{path}: not the {step} rows of the state beside it; without both it is made anew")
    return rows, log


def content_hash(path: str | Path) -> str:
    """Of a file, or of a model directory's files: whether it is what it was at an earlier call, wherever it lies now."""
    path, digest = Path(path), hashlib.sha256()
    there = sorted(file for kind in ("json", "jinja", "safetensors") for file in path.glob(f"*.{kind}") if file.is_file())
    for file in there if path.is_dir() else [path]:
        with open(file, "rb") as content:
            while piece := content.read(2 ** 24):
                digest.update(piece)
    return digest.hexdigest()[:16]


def code_hash(*paths: str | Path) -> str:
    return hashlib.sha256(b"\0".join(Path(path).read_bytes() for path in paths)).hexdigest()


def mark_finished(dir: str | Path, meta: dict):
    """The last thing a stage does: DONE says that the rest of `dir` is whole, and which settings and code made it."""
    atomic_write(Path(dir) / DONE, json.dumps(meta, indent=1) + "\n")


def finished(dir: str | Path) -> dict | None:
    """What mark_finished was given, to compare with today's settings and code; None if the stage is not finished."""
    path = Path(dir) / DONE
    return read_json(path) if path.exists() else None


def read_json(path: str | Path) -> dict:
    """The object in a file. Raises ValueError, which names it, for anything else."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: not a file")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); without it, it is made anew") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; without it, it is made anew")
    return value

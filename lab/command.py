"""What the command lines share: one-line errors, exit codes, a dataclass's fields as options, an output directory."""

import argparse
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from lab import parallel, report
from lab.check_adapter import directories, is_adapter
from lab.check_input import check_settings
from lab.check_tokenizer import TEMPLATES
from lab.checkpoint import (STATE, Checkpointer, Terminated, by_first, check_same_settings, content_hash, drop,
                            hear_sigterm, is_out_of_memory, lock)
from lab.memory import Memory
from lab.records import LOGS

# from call to call: a training may get more rollouts
MAY_CHANGE = ("out", "save_every", "rollouts", "keep_state", "memory", "shard")
INPUTS = ("model", "data", "teacher", "student", "general")  # options that name files: they are compared by content
LESS_MEMORY = ("For less: smaller --micro-batch-tokens (SFT: --micro-batch-rows), --recompute, --offload-reference, "
               "--lora, --offload-optimizer; while sampling, smaller --cache-tokens, fewer rows or new tokens")
GPU_TOKENS = 16384  # of one forward pass by default: a GPU spends smaller ones on launches
ONE_PASS = "of one forward pass, changes memory and speed alone; default"
ABOUT = {"micro_batch_tokens": f"{ONE_PASS} 2048, on a GPU {GPU_TOKENS}",
         "micro_batch_rows": f"{ONE_PASS} 16, on a GPU as many as hold {GPU_TOKENS} tokens",
         "recompute": "compute activations a second time in the backward pass: less memory, slower",
         "lora": "train adapters of this rank in place of the weights (variants/lora.py), with about ten times the "
                 "learning rate of full training",
         "lora_alpha": "adapters are scaled by this / rank; default %(default)s",
         "offload_optimizer": "float32 weights and Adam's moments in the CPU's memory (variants/offload.py)",
         "shard": "under torchrun: share out weights, gradients and moments among the processes (FSDP)",
         "cache_tokens": "a rollout is sampled in lots of at most so many tokens, prompts and answers; default "
                         "%(default)s"}
write_report = by_first(report.write)
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line that names the culprit, without the usage; exit code 2."""
        name = self.prog
        if parallel.rank() > 0:
            time.sleep(5)  # where the first process has found the same, its line is enough: it has ended all by then
            name = f"{name}, rank {parallel.rank()}"
        self.exit(2, f"{name}: {' '.join(message.split())[:1000]}\n")

    @contextmanager
    def one_line_errors(self, out=None):
        """What a user can fix ends in one line and exit code 2; Ctrl-C in 130, SIGTERM in 143.

        out: the directory in which the same command resumes.
        """
        try:
            with hear_sigterm(), parallel.processes():
                yield
        except (OSError, SafetensorError) as error:
            message = str(error)
            names_a_file = getattr(error, "filename", None) or (out is not None and message.startswith(str(out)))
            if out is not None and not names_a_file:  # of a full disk, neither error names the file
                message = f"{out}: {message}"
            self.error(message)
        except ValueError as error:
            self.error(str(error))
        except KeyboardInterrupt as interrupt:
            resumes = f"; the same command resumes here: {out}" if out else ""
            code = 143 if isinstance(interrupt, Terminated) else 130
            self.exit(code, f"\n{self.prog}: stopped{resumes}\n" if parallel.rank() == 0 else None)
        except (MemoryError, RuntimeError) as error:
            if parallel.peer_failed(error):
                self.error(f"{parallel.describe_peer_failure(error)}; the same command resumes")
            if not is_out_of_memory(error):  # a mistake of ours: its traceback is wanted
                raise
            self.out_of_memory(error)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # tiktoken's regex engine gave up; it has no class of its own
                raise
            self.error(f"a pattern of the tokenizer takes too long on a text ({first_line(error)})")

    def out_of_memory(self, error):
        self.error(f"out of memory ({first_line(error)}). {LESS_MEMORY}")

    def add_fields(self, config_class, names=None):
        """An option for each field of a dataclass of hyperparameters (or only for `names`)."""
        for name, default in vars(config_class()).items():
            if names is not None and name not in names:
                continue
            if name == "dtype":
                default = fast_dtype()
            if name == "micro_batch_tokens" and torch.cuda.is_available():
                default = GPU_TOKENS
            if name == "max_new_tokens":  # lab/scripts.py chooses
                self.add_argument("--max-new-tokens", type=int, help="default: by the problems, which a line says")
                continue
            kind = {"type": type(default)}
            if isinstance(default, bool):
                kind = {"action": argparse.BooleanOptionalAction}
            self.add_argument(f"--{name.replace('_', '-')}", default=default,
                              help=ABOUT.get(name, "default %(default)s"), **kind)

    def parse_with_rows(self):
        """The arguments, with a default of --micro-batch-rows by device and --row-length."""
        if torch.cuda.is_available():
            self.set_defaults(micro_batch_rows=max(1, GPU_TOKENS // max(1, self.parse_args().row_length)))
        return self.parse_args()


def first_line(error):
    return str(error).partition("\n")[0]


def fields_of(args, config_class):
    """The dataclass that the options describe. It raises ValueError where one of them is out of range."""
    names = config_class.__dataclass_fields__
    config = config_class(**{name: value for name, value in vars(args).items() if name in names})
    check_settings(config)
    return config


# ------------------------------------------------------------------------------------------- device and precision

def device_of(name):
    """The torch.device of this name. Raises ValueError if this machine has none."""
    if parallel.is_under_torchrun() and ":" in name:
        raise ValueError(f"device {name}: torchrun has a device for each process; name its kind alone")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises a different one in each case
        raise ValueError(f"device {name}: {first_line(error)}") from None
    if device.type == "cpu":
        tell_of_unused_gpu()
    return device


def tell_of_unused_gpu():
    """One line where an NVIDIA driver is there and torch finds no GPU: the CPU would be used in silence."""
    if torch.cuda.is_available() or "CUDA_VISIBLE_DEVICES" in os.environ or not NVIDIA_DRIVER.exists():
        return
    if parallel.rank() > 0:
        return
    reason = "is built without CUDA"
    if torch.version.cuda:
        reason = f"finds no GPU: the driver may be older than CUDA {torch.version.cuda}, for which it is built"
    print(f"an NVIDIA driver is there, but torch {torch.__version__} {reason}; this runs on the CPU", file=sys.stderr)


def fast_dtype(device=None):
    """The precision in which the device multiplies fast; bfloat16 where it can. None: the GPU, if there is one."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    is_fast = processor_has("avx512_bf16") or processor_has("amx_tile")
    return "bfloat16" if is_fast else "float32"


def processor_has(feature):
    check = getattr(torch.cpu, f"_is_{feature}_supported", None)  # not in every version of torch
    return check is not None and check()


def add_template(parser, names=tuple(TEMPLATES), default="the directory's own (tokenizer.py)"):
    parser.add_argument("--template", type=template_text, metavar="TEMPLATE",
                        help=f"the prompt template: {', '.join(names)}, or a text with {{prompt}}, where \\n is a line "
                             f"break; default: {default}")


def template_text(text):
    """A template from the command line, where a line break is hard to type."""
    return text.replace("\\n", "\n")


def add_memory(parser, leave_out=()):
    """Memory's fields as options; None where one was not given."""
    for name, default in vars(Memory()).items():
        if name in leave_out:
            continue
        kind = {"type": type(default), "metavar": "RANK" if name == "lora" else None}
        if isinstance(default, bool):
            kind = {"action": "store_true"}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=ABOUT[name], **kind)


def add_foretelling(parser):
    parser.add_argument("--memory", action="store_true",
                        help="before it starts, print what the training takes of memory by the formula of "
                             "lab/memory.py, and what is free")


# ------------------------------------------------------------------------------------------- the output directory

def add_saving(parser):
    parser.add_argument("--save-every", type=float, default=30.0, metavar="SECONDS",
                        help="save the training's state in --out, to resume from after a stop; default %(default)s, "
                             "and at most 2%% of the time")


def add_going_on(parser):
    parser.add_argument("--keep-state", action="store_true",
                        help="keep the training's state in --out at the end (about three times the model): the same "
                             "command with more --rollouts goes on from there")


def new_directory(path, may_go_on=False):
    """Path of an output directory that holds no model yet: nothing is overwritten.

    may_go_on: it may also hold a finished training with its state (--keep-state).
    """
    path = Path(path)
    if may_go_on and all((path / name).exists() for name in ("config.json", "settings.json", STATE)):
        return path
    if (path / "config.json").exists():
        if (path / "settings.json").exists():
            drop(path)  # the state of a call that was killed after its model was complete
        raise ValueError(f"{path} already holds a model; choose another --out")
    if is_adapter(path) or is_adapter(path / "adapter") and not (path / "settings.json").exists():
        raise ValueError(f"{path} already holds an adapter; choose another --out")
    if (path / "metrics.jsonl").exists() and not (path / "settings.json").exists():
        raise ValueError(f"{path} already holds the metrics of another training; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def saving(out, args):
    """The Checkpointer of a script's training in `out`, which no other process may use meanwhile.

    The training's state is deleted at the end.
    """
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    for rule in getattr(args, "rewards", []):  # of files of the user's own the content counts too
        if ".py:" in rule:
            settings[f"content of {rule}"] = content_hash(rule.rpartition(":")[0])
    for name in sorted(settings.keys() & set(INPUTS)):  # wherever they lie now, their content must be the same
        path = settings.pop(name)
        settings[f"content of {name}"] = "+".join(map(content_hash, directories(path))) if path else None
    goes_on = (out / "config.json").exists()  # with more rollouts than before
    with lock(out):
        check_same_settings(out / "settings.json", settings)
        try:
            with Checkpointer(out, LOGS, args.save_every, after=partial(write_report, out)) as checkpointer:
                yield checkpointer
        except KeyboardInterrupt:
            if goes_on or not (out / "config.json").exists():  # else the signal came too late to stop anything
                raise
        write_report(out)
        if not getattr(args, "keep_state", False):
            drop(out)

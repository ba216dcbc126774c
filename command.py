"""What the scripts' command lines share: one-line errors, a dataclass's fields as options, and the wiring of an RL run."""

import argparse
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

import rewards
import watch
from checkpoint import Keeper, content_hash, drop, lock, offending, say, settle
from configs import METHODS, PUBLISHED
from data.readers import read_problems
from graphs import with_graphs
from model import generate, load, save
from tokenizer import TEMPLATES, Tokenizer

PROBLEMS = "JSONL: GSM8K, MATH, Countdown, or rows {prompt, answer} (data/readers.py)"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line that names the culprit, without the usage; exit code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())[:1000]}\n")

    @contextmanager
    def explained(self, out=None):
        """What a user can mend ends in one line: exit code 2, or 130 after Ctrl-C. out: where the same command goes on."""
        try:
            yield
        except (OSError, SafetensorError) as error:  # of a full disk neither names the file
            named = out is None or getattr(error, "filename", None) or str(error).startswith(str(out))
            self.error(str(error) if named else f"{out}: {error}")
        except ValueError as error:
            self.error(str(error))
        except KeyboardInterrupt:
            self.exit(130, f"\n{self.prog}: stopped" + (f"; the same command goes on from here: {out}" if out else "") + "\n")
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            self.error(f"out of memory ({str(error).partition(chr(10))[0]}). Less of it: smaller --micro-batch-tokens (SFT: "
                       "--micro-batch-rows), --recompute, --offload-reference; while sampling, fewer rows or new tokens")

    def add_fields(self, config_class, names=None):
        """An option for each field of a dataclass of hyperparameters (or only for `names`)."""
        for name, default in vars(config_class()).items():
            default = fast_dtype() if name == "dtype" else default
            kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
            if names is None or name in names:
                self.add_argument(f"--{name.replace('_', '-')}", default=default, help="default %(default)s", **kind)


def fast_dtype(device=None):
    """"bfloat16" where the device multiplies it at a higher rate than fp32, else "float32". None: the GPU if there is one."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    has = [getattr(torch.cpu, f"_is_{feature}_supported", bool) for feature in ("avx512_bf16", "amx_tile")]
    return "bfloat16" if any(check() for check in has) else "float32"


def device_of(name):
    """Raises ValueError for one that is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has one for each case
        raise ValueError(f"device {name}: {str(error).partition(chr(10))[0]}") from None


def fields_of(args, config_class):
    """The dataclass that the options describe; it raises ValueError where one is out of range."""
    return config_class(**{name: value for name, value in vars(args).items() if name in config_class.__dataclass_fields__})


def add_speed(parser):
    parser.add_argument("--recompute", action="store_true", help="make activations again in the backward pass: less memory, slower")
    parser.add_argument("--compile", action="store_true", help="compile the layers: takes a C++ compiler and half a minute")


def add_saving(parser):
    parser.add_argument("--save-every", type=float, default=30.0, metavar="SECONDS",
                        help="save the training's state in --out, to go on from after a stop; default %(default)s, and at most 2%% of the time")


@contextmanager
def saving(out, args):
    """The Keeper of a script's training in `out`, which no other process may use meanwhile; its state goes away at the end."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "save_every")}
    for name in sorted({"model", "data", "teacher", "student", "general"} & settings.keys()):  # wherever they lie, they must be the same
        file = settings.pop(name)
        settings[f"content of {name}"] = file and content_hash(file)
    with lock(out):
        settle(out / "settings.json", settings)
        try:
            with Keeper(out, every=args.save_every) as keeper, offending(out):
                yield keeper
        except KeyboardInterrupt:
            if not (out / "config.json").exists():  # a model's last file: it came too late to stop anything
                raise
        drop(out)


def new_directory(path):
    """Path of an output directory that holds no model yet: nothing is overwritten."""
    if (Path(path) / "config.json").exists():
        if (Path(path) / "settings.json").exists():
            drop(path)  # of a call that was killed when its model was whole
        raise ValueError(f"{path} already holds a model; choose another --out")
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def prepare(model, args):
    """What add_speed's options ask for, and a line that says in what the model is trained."""
    model.recompute = args.recompute
    for layer in model.layers if args.compile else ():
        layer.compile(dynamic=True)
    print(f"{args.dtype} on {next(model.parameters()).device}{', compiled' * args.compile}", flush=True)


def add_template(parser):
    parser.add_argument("--template", choices=TEMPLATES, help="how the model is asked; default: as its directory says (tokenizer.py)")


def open_model(dir, dtype=None, device=None, template=None):
    """Model and tokenizer of a directory, which must fit one another."""
    tokenizer = Tokenizer(dir, template)
    tokenizer.template  # a chat template that is not known is refused before anything is loaded
    model = load(dir, device, dtype)
    tokenizer.check_fits(model.config.vocab_size)
    return model, tokenizer


def reinforce(description, train, config_class, credit_class=None, credit_config=None, **defaults):
    """The script of grpo.py, and of the files that put another credit in place of the group advantages.

    credit_class(model, config, credit_config's fields) makes the object that `train` takes as credit; `defaults` are those
    of the config's fields that its method sets otherwise.
    """
    parser = Parser(description=description)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--data", required=True, help=PROBLEMS)
    parser.add_argument("--out", required=True, help="where the trained model goes")
    parser.add_argument("--rewards", nargs="+", default=["accuracy", "format"], choices=rewards.REWARDS,
                        help="default: %(default)s")
    add_template(parser)
    parser.add_fields(config_class)
    add_speed(parser)
    add_saving(parser)
    if credit_config is not None:
        parser.add_fields(credit_config)
    parser.add_argument("--config", choices=PUBLISHED | METHODS, help="a paper's settings (configs.py) as defaults")
    chosen = parser.parse_args().config
    parser.set_defaults(**defaults | (PUBLISHED | METHODS).get(chosen, {}))
    args = parser.parse_args()
    with parser.explained(args.out):
        config = fields_of(args, config_class)
        examples = read_problems(args.data, rewards.check_reference)
        model, tokenizer = open_model(args.model, torch.float32, template=args.template)
        prepare(model, args)
        out = new_directory(args.out)
        credit = None if credit_class is None else credit_class(model, config, fields_of(args, credit_config))

        print("the loss says nothing here: its value is about 0 while it learns (a group's advantages sum to 0); watch the reward, KL, "
              "clip fraction, entropy and gradient norm", flush=True)
        rows = []

        def log(m, r):
            rows.append(m)
            say(f"rollout {m['step']}/{config.rollouts}  reward {m['reward']:.3f}  length {m['length']:.0f}  "
                f"kl {m['kl']:.4f}  clipped {m['clip_fraction']:.3f}  entropy {m['entropy']:.2f}  grad norm {m['grad_norm']:.2f}")
            for line in watch.warnings(rows):
                say(f"  {line}")
            if (m["step"] - 1) % config.validate_every == 0:  # a sample to read
                say(f"  {r.examples[0]['prompt']!r}\n  {r.texts[0]!r}: {r.rewards[0, 0].item():.2f}")

        with saving(out, args) as keeper:
            train(model, examples, lambda example: tokenizer.encode_prompt(example["prompt"]), tokenizer.decode, with_graphs(generate),
                  tokenizer.end_ids, {name: rewards.REWARDS[name] for name in args.rewards}, config, credit=credit,
                  keep=getattr(credit, "keep", None), log=log, save=keeper.save, resume=keeper.resume)
            save(model, out, tokenizer)

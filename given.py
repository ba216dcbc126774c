"""The recipe on a checkpoint and a problem set of your own: any dense Llama, Qwen2 or Qwen3 directory, any set of data/readers.py.

    python pipeline.py --base DIR --train FILE --test FILE                          # the whole recipe
    python pipeline.py --base DIR --train FILE --test FILE --stages base,zero      # R1-Zero, measured before and after
    python pipeline.py --base DIR --train FILE --test FILE --student DIR --student DIR

Here the base and the students are given, not made. What a real set has no data for is left out, and said: general and
unsafe requests, unless --general brings examples for SFT-2; the swap of a cold start's words into the problem's language.
"""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint
import distill
import rewards
from command import PROBLEMS, Parser, fast_dtype
from data.readers import read_problems, read_rows
from grpo import GRPOConfig
from model import load
from pipeline import ACCURACY_AND_FORMAT, WITH_LANGUAGE, Preset, forget, in_dtype, print_tables, rejection_sampling, rl_stages
from run import Run, machine
from sft import SFTConfig
from tokenizer import TEMPLATES, Tokenizer

# One GPU. Steps as for any pretrained model: 1e-6 for RL is what published runs of this size take, R1's 3e-6 is for 512 outputs
# an update; 16 x 16 outputs and 4 updates a rollout are R1's 512 x 16 and 16, scaled down; beta and T are R1's.
PRESET = Preset(
    test=10 ** 9, samples=16, zero_samples=16, cold_start=500, trace_prompts=10 ** 9, trace_samples=4,
    cold=SFTConfig(lr=1e-5, epochs=2, batch_tokens=16384, micro_batch_rows=4, row_length=1024),
    sft2=SFTConfig(lr=1e-5, epochs=2, batch_tokens=65536, micro_batch_rows=4, row_length=1024),
    **rl_stages(rollouts=100, lr=1e-6, max_new_tokens=512, micro_batch_tokens=16384))
RL_OPTIONS = ("rollouts", "prompts_per_rollout", "group_size", "minibatches", "lr", "warmup", "beta", "max_new_tokens",
              "micro_batch_tokens", "offload_reference", "validate_every")
SFT_OPTIONS = {"sft_lr": "lr", "sft_epochs": "epochs", "sft_batch_tokens": "batch_tokens", "row_length": "row_length"}
SIZES = ("samples", "test", "cold_start", "trace_prompts", "trace_samples")


class GivenRun(Run):
    """A run whose base, students and problems are files of the user's."""

    def __init__(self, out, preset, seed, device, args):
        self.args, self.students = args, {}
        for dir in args.student:
            with open(Path(dir) / "config.json", encoding="utf-8") as file:
                family = "llama" if json.load(file).get("model_type") == "llama" else "qwen"
            self.students[family + f"_{len(self.students) + 1}" * (family in self.students)] = dir
        self.directories = {"base": args.base} | {f"base_{name}": dir for name, dir in self.students.items()}
        super().__init__(out, "given", preset, seed, device)

    def given(self):
        names = ("base", "student", "train", "test", "general", "template")
        return {"given": {name: getattr(self.args, name) for name in names}}

    def read_data(self):
        template = None if self.args.template == "own" else self.args.template
        self.tokenizers = {name: Tokenizer(dir, template) for name, dir in self.directories.items()}
        for tokenizer in self.tokenizers.values():
            tokenizer.template  # one that is not known is refused before anything is loaded
        self.tokenizer = self.tokenizers["base"]
        self.test = read_problems(self.args.test, rewards.check_reference)[:self.preset.test]
        self.hard = self.general = self.safety = []
        tested = {example["prompt"] for example in self.test}
        rows = read_problems(self.args.train, rewards.check_reference)
        problems = [example for example in rows if example["prompt"] not in tested]
        if len(problems) < len(rows):
            print(f"{len(rows) - len(problems)} of {len(rows)} training problems stand in the test too: left out", flush=True)
        random.Random(self.seed).shuffle(problems)
        held_out = min(96, len(problems) // 10)  # for the curve of validation accuracy
        self.validation, self.problems = problems[:held_out], problems[held_out:]
        if not self.validation:
            raise ValueError(f"{self.args.train} has {len(problems)} problems that are not in the test: there must be 10 or more")

    def stage(self, name, *rest):
        self.tokenizer = self.tokenizers.get(f"base_{name.partition('_')[2]}", self.tokenizers["base"])
        super().stage(name, *rest)

    def model(self, stage):
        model = load(self.directories.get(stage, self.out / stage), self.device, torch.float32)
        self.tokenizer.check_fits(model.config.vocab_size)
        model.recompute = self.args.recompute
        return model

    def save(self, model, stage):
        if stage not in self.directories:  # these are only measured
            super().save(model, stage)


def recipe(run, stages):
    """pipeline.py's recipe, of these stages. Raises ValueError where one of them needs another that is not finished."""
    p = run.preset

    def stage(name, needs, title, start, by, paper, make):
        if name in stages:
            if missing := [need for need in needs if not checkpoint.finished(run.out / need)]:
                raise ValueError(f"stage {name} needs {missing[0]}, which is not finished: --stages {missing[0]},{name}")
            run.stage(name, title, start, by, paper, make)

    stage("base", [], "Base", "given", "given", "", lambda: run.model("base"))
    stage("zero", [], "R1-Zero", "base", "GRPO: accuracy + format", "R1 v1 2.2", lambda: run.rl(
        "zero", run.model("base"), ACCURACY_AND_FORMAT, p.zero))
    stage("dev1", ["zero"], "Cold start", "base", "SFT on samples of zero", "R1 v2 B.3.2", lambda: run.sft(
        "dev1", run.model("base"), cold_start_examples(run), p.cold))
    stage("dev2", ["dev1"], "RL-1", "dev1", "GRPO: accuracy + format + language", "R1 v2 3.2.1", lambda: run.rl(
        "dev2", run.model("dev1"), WITH_LANGUAGE, p.rl1))

    later = stages & {"traces", "dev3", *(f"student_{name}" for name in run.students)}
    if later and not checkpoint.finished(run.out / "dev2"):
        raise ValueError(f"stage {min(later)} needs dev2, which is not finished: --stages dev2,{min(later)}")
    general = read_rows(run.args.general, ("prompt", "completion")) if run.args.general else []
    traces = rejection_sampling(run) if later else []
    rows = distill.mix(traces, general, ratio=3, seed=run.seed) if general else traces
    if later and not general:
        print("no --general examples: SFT-2 and the students learn from traces alone", flush=True)
    stage("dev3", [], "SFT-2", "base", "SFT on traces" + " + general" * bool(general), "R1 v1 2.3.3", lambda: run.sft(
        "dev3", run.model("base"), rows, p.sft2))
    if "r1" in stages:
        print("no general or unsafe requests: RL-2 is by accuracy, format and language alone, at T 0.7", flush=True)
    stage("r1", ["dev3"], "RL-2", "dev3", "GRPO: accuracy + format + language, T 0.7", "R1 v2 3.2.2", lambda: run.rl(
        "r1", run.model("dev3"), WITH_LANGUAGE, p.rl2, run.problems[::-1]))
    for name in run.students:
        base, student, control = f"base_{name}", f"student_{name}", f"control_{name}"
        stage(base, [], f"Small base, {name}", "given", "given", "", lambda: run.model(base))
        stage(student, [], f"Distilled, {name}", base, "SFT on the same traces", "R1 v1 2.4", lambda: run.sft(
            student, run.model(base), rows, p.sft2))
        stage(control, [], f"Control, {name}", base, "GRPO alone", "R1 v1 4.1", lambda: run.rl(
            control, run.model(base), ACCURACY_AND_FORMAT, p.control))
    run.write()


def cold_start_examples(run):
    """Zero's correct, readable samples that think in the problem's language: their words are its own, nothing is swapped."""
    problems = run.problems[:4 * run.preset.cold_start]
    texts, _ = run.complete(run.model("zero"), problems, samples=4, temperature=1.0, top_p=1.0)
    in_its_language = lambda text, example: rewards.language_consistency(text, example) == 1
    rows, counts = distill.rejection_sample(problems, texts, rewards.accuracy, in_its_language, keep=1)
    print(f"{'cold start':16} {distill.explain(counts)}", flush=True)
    if not rows:
        raise ValueError("none of zero's samples can start dev1: it takes a longer R1-Zero, easier problems or a stronger base")
    checkpoint.write_jsonl(run.out / "dev1" / "cold_start.jsonl", rows[:run.preset.cold_start])
    return rows[:run.preset.cold_start]


def preset_of(args):
    """PRESET with what the command line changes."""
    chosen = {name: getattr(args, name) for name in RL_OPTIONS if getattr(args, name) is not None}
    sft = {field: getattr(args, name) for name, field in SFT_OPTIONS.items() if getattr(args, name) is not None}
    stages = {}
    for name, stage in vars(PRESET).items():
        if isinstance(stage, GRPOConfig):
            stages[name] = replace(stage, **chosen)
        elif isinstance(stage, SFTConfig) and name != "pretrain":
            longer = {"batch_tokens": max(stage.batch_tokens, sft.get("row_length", 0))}
            stages[name] = replace(stage, **longer | sft)
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    sizes |= {"zero_samples": args.samples} if args.samples else {}
    if wrong := [f"{name} {value}" for name, value in sizes.items() if value < 1]:
        raise ValueError(f"{wrong[0]} must be positive")
    return in_dtype(replace(PRESET, **stages, **sizes), args.dtype or fast_dtype(args.device))


def main():
    parser = Parser(description="The recipe on a checkpoint and a problem set of your own.")
    parser.add_argument("--base", required=True, metavar="DIR", help="Hugging Face directory of a dense Llama, Qwen2 or Qwen3")
    parser.add_argument("--train", required=True, metavar="FILE", help=PROBLEMS)
    parser.add_argument("--test", dest="test_file", required=True, metavar="FILE", help="the same; never trained on")
    parser.add_argument("--student", action="append", default=[], metavar="DIR", help="a smaller model for the traces; may be repeated")
    parser.add_argument("--general", metavar="FILE", help='examples for SFT-2, JSONL rows {"prompt", "completion"}')
    parser.add_argument("--stages", help="some of base, zero, dev1, dev2, traces, dev3, r1, students, controls; default all but controls")
    parser.add_argument("--from", dest="from_stage", help="make this stage and the later ones anew")
    parser.add_argument("--out", help="run directory; default runs/NAME-SEED")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--template", choices=("own", *TEMPLATES), default="r1-zero",
                        help="how the models are asked, own: as each directory says; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of forward passes; default: the faster one here")
    parser.add_argument("--recompute", action="store_true", help="make activations again in the backward pass: less memory, slower")
    for name in RL_OPTIONS:
        value = getattr(PRESET.zero, name)
        kind = {"action": "store_true", "default": None} if isinstance(value, bool) else {"type": type(value)}
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"of every RL stage; default {value}", **kind)
    for name, field in SFT_OPTIONS.items():
        value = getattr(PRESET.sft2, field)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"of every SFT stage; default {value}")
    for name, what in zip(SIZES, ("of a test problem; default 16", "at most so many problems; default all", "examples; default 500",
                                  "problems for traces; default all", "of each of them; default 4")):
        option = "--test-problems" if name == "test" else f"--{name.replace('_', '-')}"
        parser.add_argument(option, dest=name, type=int, help=what)
    args, started = parser.parse_args(), time.time()
    device = torch.device(args.device)
    out = Path(args.out or f"runs/{Path(args.base).resolve().name}-{args.seed}")
    with parser.explained(out), checkpoint.lock(out):
        preset, args.test = preset_of(args), args.test_file
        print(f"{args.base}, seed {args.seed}, {preset.zero.dtype} on {machine(device)}", flush=True)
        run = GivenRun(out, preset, args.seed, device, args)
        names = [(f"base_{name}", f"student_{name}", f"control_{name}") for name in run.students]
        every = ["base", "zero", "dev1", "dev2", "traces", "dev3", "r1", *(name for three in names for name in three)]
        groups = {"students": {name for base, student, _ in names for name in (base, student)},
                  "controls": {control for _, _, control in names}}
        chosen = (args.stages or "base,zero,dev1,dev2,traces,dev3,r1,students").split(",")
        if unknown := [name for name in [*chosen, args.from_stage or "base"] if name not in {*every, *groups}]:
            raise ValueError(f"stage {unknown[0]!r} is none of {', '.join([*every, *groups])}")
        if args.from_stage:
            forget(out, every[every.index(args.from_stage):])
            run = GivenRun(out, preset, args.seed, device, args)
        recipe(run, set().union(*(groups.get(name, {name}) for name in chosen)))
    print_tables(run)
    print(f"\n{time.time() - started:.0f} s; {out / 'report.html'}")


if __name__ == "__main__":
    main()

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
from command import PROBLEMS, Parser, device_of, fast_dtype
from data.readers import read_problems, read_rows
from grpo import GRPOConfig
from model import inspect, load
from pipeline import ACCURACY_AND_FORMAT, WITH_LANGUAGE, Preset, anew, in_dtype, print_tables, rejection_sampling, rl_stages
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
SIZES = {name: name for name in ("samples", "cold_start", "trace_prompts", "trace_samples")} | {"test_problems": "test"}


def named(students):
    """{"qwen": its directory, "llama": ..., "qwen_3": ...} by family. Raises ValueError for what is no model."""
    names = {}
    for number, dir in enumerate(students, 1):
        family = "llama" if inspect(dir)[0].config.model_type == "llama" else "qwen"
        names[family if family not in names else f"{family}_{number}"] = dir
    return names


class GivenRun(Run):
    """A run whose base, students and problems are files of the user's."""

    def __init__(self, out, preset, seed, device, args, students):
        self.args, self.students = args, students
        self.directories = {"base": args.base} | {f"base_{name}": dir for name, dir in students.items()}
        super().__init__(out, "given", preset, seed, device)

    def given(self):
        """Paths, and what is in the problem sets; students may join later."""
        files = {name: [str(Path(path).resolve()), checkpoint.code_hash(path)] if path else None for name, path in (
            ("train", self.args.train), ("test", self.args.test_file), ("general", self.args.general))}
        return {"given": {"base": str(Path(self.args.base).resolve()), "template": self.args.template, **files}}

    def read_data(self):
        """All that can be wrong with the files shows here, before anything is trained."""
        template, context = None if self.args.template == "own" else self.args.template, []
        self.tokenizers = {name: Tokenizer(dir, template) for name, dir in self.directories.items()}
        for name, tokenizer in self.tokenizers.items():
            config = inspect(self.directories[name])[0].config
            tokenizer.check_fits(config.vocab_size)
            tokenizer.template  # one that is not known is refused
            context.append(config.max_position_embeddings)
        shorter = {name: replace(config, row_length=min(config.row_length, *context)) for name, config in
                   vars(self.preset).items() if isinstance(config, SFTConfig)}
        self.preset = replace(self.preset, **shorter)
        self.tokenizer = self.tokenizers["base"]
        self.hard = self.general = self.safety = []
        same = lambda example: " ".join(example["prompt"].split())
        self.test = self.problems_of(self.args.test_file)[:self.preset.test]
        rows, tested = self.problems_of(self.args.train), {same(example) for example in self.test}
        problems = [*{same(example): example for example in rows if same(example) not in tested}.values()]
        examples = read_rows(self.args.general, ("prompt", "completion")) if self.args.general else []
        self.examples = [example for example in examples if same(example) not in tested]
        for file, before, after in ((self.args.train, rows, problems), (self.args.general, examples, self.examples)):
            if len(after) < len(before):
                print(f"{file}: {len(before) - len(after)} of {len(before)} stand in the test or twice: left out", flush=True)
        random.Random(self.seed).shuffle(problems)
        held_out = min(96, len(problems) // 10)  # for the curve of validation accuracy
        self.validation, self.problems = problems[:held_out], problems[held_out:]
        if not self.validation:
            raise ValueError(f"{self.args.train} has {len(problems)} problems that are not in the test: there must be 10 or more")

    def problems_of(self, path):
        rows = read_problems(path, rewards.check_reference)
        kept = [example for example in rows if example["kind"] == "reasoning"]
        if len(kept) < len(rows):
            print(f"{path}: {len(rows) - len(kept)} of {len(rows)} rows are no problems: left out", flush=True)
        return kept

    def forget(self, stages):
        if "dev1" in stages:
            (self.out / "dev1" / "cold_start.json").unlink(missing_ok=True)
        super().forget(stages)

    def stage(self, name, *rest):
        self.tokenizer = self.tokenizers.get(f"base_{name.partition('_')[2]}", self.tokenizers["base"])
        super().stage(name, *rest)

    def model(self, stage):
        model = load(self.directories.get(stage, self.out / stage), self.device, torch.float32)
        model.recompute = self.args.recompute
        return model

    def save(self, model, stage):
        if stage not in self.directories:  # these are only measured
            super().save(model, stage)


NEEDS = {"dev1": "zero", "dev2": "dev1", "traces": "dev2", "dev3": "traces", "r1": "dev3"}  # and a student: traces


def recipe(run, stages):
    """pipeline.py's recipe, of these stages. Raises ValueError where one of them needs another that is not finished."""
    p = run.preset
    for name in stages:
        need = NEEDS.get(name, "traces" if name.startswith("student_") else None)
        if need and need not in stages and not checkpoint.finished(run.out / need):
            raise ValueError(f"stage {name} needs {need}, which is not finished: --stages {need},{name}")
    for name, dir in run.directories.items():
        if (done := checkpoint.finished(run.out / name)) and done.get("by") != given_by(dir):
            raise ValueError(f"{run.out / name} is of another model ({done.get('by')}); choose another --out, or --from {name}")

    def stage(name, *rest):
        if name in stages:
            run.stage(name, *rest)

    stage("base", "Base", "", given_by(run.args.base), "", lambda: run.model("base"))
    stage("zero", "R1-Zero", "base", "GRPO: accuracy + format", "R1 v1 2.2", lambda: run.rl(
        "zero", run.model("base"), ACCURACY_AND_FORMAT, p.zero))
    stage("dev1", "Cold start", "base", "SFT on samples of zero", "R1 v2 B.3.2", lambda: cold_start(run))
    stage("dev2", "RL-1", "dev1", "GRPO: accuracy + format + language", "R1 v2 3.2.1", lambda: run.rl(
        "dev2", run.model("dev1"), WITH_LANGUAGE, p.rl1))

    learn = stages & {"dev3", *(f"student_{name}" for name in run.students)}
    traces = rejection_sampling(run) if learn or "traces" in stages else []
    rows = distill.mix(traces, run.examples, ratio=3, seed=run.seed) if traces and run.examples else traces
    if learn and not run.examples:
        print("no --general examples: SFT-2 and the students learn from traces alone", flush=True)
    stage("dev3", "SFT-2", "base", "SFT on traces" + " + general" * bool(run.examples), "R1 v1 2.3.3", lambda: run.sft(
        "dev3", run.model("base"), rows, p.sft2))
    if "r1" in stages:
        print("no general or unsafe requests: RL-2 is by accuracy, format and language alone, at T 0.7", flush=True)
    stage("r1", "RL-2", "dev3", "GRPO: accuracy + format + language, T 0.7", "R1 v2 3.2.2", lambda: run.rl(
        "r1", run.model("dev3"), WITH_LANGUAGE, p.rl2, run.problems[::-1]))
    for name, dir in run.students.items():
        base, student, control = f"base_{name}", f"student_{name}", f"control_{name}"
        stage(base, f"Small base, {name}", "", given_by(dir), "", lambda: run.model(base))
        stage(student, f"Distilled, {name}", base, "SFT on the same traces", "R1 v1 2.4", lambda: run.sft(
            student, run.model(base), rows, p.sft2))
        stage(control, f"Control, {name}", base, "GRPO alone", "R1 v1 4.1", lambda: run.rl(
            control, run.model(base), ACCURACY_AND_FORMAT, p.control))
    run.write()


def given_by(dir):
    return f"given: {Path(dir).resolve()}"


def cold_start(run):
    rows = cold_start_examples(run)  # first: zero has left the memory when the base comes
    return run.sft("dev1", run.model("base"), rows, run.preset.cold)


def cold_start_examples(run):
    """Zero's correct, readable samples that think in the problem's language: their words are its own, nothing is swapped."""
    dir, problems = run.out / "dev1", run.problems[:4 * run.preset.cold_start]
    if (dir / "cold_start.json").exists():  # of a call that was killed later on
        run.cost = checkpoint.read_json(dir / "cold_start.json")
        return checkpoint.read_jsonl(dir / "cold_start.jsonl", whole=True)
    texts, _ = run.complete(run.model("zero"), problems, samples=4, temperature=1.0, top_p=1.0)
    in_its_language = lambda text, example: rewards.language_consistency(text, example) == 1
    rows, counts = distill.rejection_sample(problems, texts, rewards.accuracy, in_its_language, keep=1)
    print(f"{'cold start':16} {distill.explain(counts)}", flush=True)
    if not rows:
        raise ValueError("none of zero's samples can start dev1: it takes a longer R1-Zero, easier problems or a stronger base")
    checkpoint.write_jsonl(dir / "cold_start.jsonl", rows[:run.preset.cold_start])
    checkpoint.atomic_write(dir / "cold_start.json", json.dumps(run.cost))  # last: it says that the rows are whole
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
    sizes = {field: getattr(args, name) for name, field in SIZES.items() if getattr(args, name) is not None}
    sizes |= {"zero_samples": args.samples} if args.samples else {}
    if wrong := [f"{name} {value}" for name, value in sizes.items() if value < 1]:
        raise ValueError(f"{wrong[0]} must be positive")
    return in_dtype(replace(PRESET, **stages, **sizes), args.dtype or fast_dtype(args.device))


def main():
    parser = Parser(description="The recipe on a checkpoint and a problem set of your own.", allow_abbrev=False)
    parser.add_argument("--base", required=True, metavar="DIR", help="Hugging Face directory of a dense Llama, Qwen2 or Qwen3")
    parser.add_argument("--train", required=True, metavar="FILE", help=PROBLEMS)
    parser.add_argument("--test", dest="test_file", required=True, metavar="FILE", help="the same; never trained on")
    parser.add_argument("--student", action="append", default=[], metavar="DIR", help="a smaller model for the traces; may be repeated")
    parser.add_argument("--general", metavar="FILE", help='examples for SFT-2, JSONL rows {"prompt", "completion"}')
    parser.add_argument("--stages", help="some of base, zero, dev1, dev2, traces, dev3, r1, students, controls; default all but controls")
    parser.add_argument("--from", dest="from_stage", help="make this stage and the later ones anew; after a stop the same command goes on")
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
    for name, what in zip(SIZES, ("of a test problem; default 16", "examples; default 500", "problems for traces; default all",
                                  "of each of them; default 4", "at most so many; default all")):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=what)
    args, started = parser.parse_args(), time.time()
    out = Path(args.out or f"runs/{Path(args.base).resolve().name}-{args.seed}")
    with parser.explained(out), checkpoint.lock(out):
        device = device_of(args.device)
        preset = preset_of(args)
        print(f"{args.base}, seed {args.seed}, {preset.zero.dtype} on {machine(device)}", flush=True)
        students = named(args.student)
        names = [(f"base_{name}", f"student_{name}", f"control_{name}") for name in students]
        every = ["base", "zero", "dev1", "dev2", "traces", "dev3", "r1", *(name for three in names for name in three)]
        groups = {"students": {name for base, student, _ in names for name in (base, student)},
                  "controls": {control for _, _, control in names}}
        chosen = (args.stages or "base,zero,dev1,dev2,traces,dev3,r1,students").split(",")
        if unknown := [name for name in chosen if name not in {*every, *groups}] + [args.from_stage] * (args.from_stage not in {None, *every}):
            raise ValueError(f"stage {unknown[0]!r} is none of {', '.join([*every, *groups])}")
        run = GivenRun(out, preset, args.seed, device, args, students)
        anew(run, args.from_stage, every)
        recipe(run, set().union(*(groups.get(name, {name}) for name in chosen)))
        if not args.stages:
            (out / "FROM").unlink(missing_ok=True)
        print_tables(run)
    print(f"\n{time.time() - started:.0f} s; {out / 'report.html'}")


if __name__ == "__main__":
    main()

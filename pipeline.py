"""The DeepSeek-R1 recipe, from random weights to distilled students, in one command.

    python pipeline.py                        # the cpu or the gpu preset, by device; the whole recipe
    python pipeline.py --preset smoke         # the same in about a minute, with models too small to learn
    python pipeline.py --ablations            # and what some of the claims need beside the recipe
    python pipeline.py --from dev2            # this stage and the later ones anew
    python pipeline.py --compare              # GRPO, its relatives, PPO and PRIME beside one another (compare.py)
    python pipeline.py --base DIR --train FILE --test FILE    # on a checkpoint and a problem set of your own (given.py)

Called again, it goes on where it stopped. A run directory (--out, default runs/PRESET-SEED) holds a model directory
a stage, results.json and report.html, which can be watched while it grows. `recipe`, at the end, is the page to read.
"""

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # by default the CPU's kernels of 1,024 shapes stay in memory

import numpy as np
import torch

import checkpoint
import compare
import distill
import evaluate
import rewards
from command import Parser, device_of, fast_dtype
from data import world
from grpo import GRPOConfig
from run import METRICS, Run, machine
from sft import SFTConfig

# ------------------------------------------------------------------------------------------- presets

def sizes(width, layers, heads, kv_heads, **more):
    return dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, **more)


# Not divided by the group's std, which would blow small differences of the language reward up in all-correct groups. pi_old's
# log-probabilities are the sampler's: it agrees with the trainer to 1e-4 or better here, which saves a forward pass a rollout.
rl = partial(GRPOConfig, scale_by_std=False, old_logprobs="sampler", validate_every=5)


@dataclass
class Preset:
    """Every size of a run. The defaults are the cpu preset: two cores, no GPU."""
    model: dict = field(default_factory=lambda: sizes(128, 4, 4, 2, model_type="qwen3"))
    student: dict = field(default_factory=lambda: sizes(96, 3, 4, 2))
    context: int = 512
    documents: int = 100_000          # of the base's corpus
    student_documents: int = 50_000   # of a student's: smaller, and with few chains
    problems: int = 4000              # for reinforcement learning and rejection sampling
    test: int = 510
    hard: int = 100                   # problems with more steps than any in training
    requests: int = 128               # general ones, and as many unsafe ones, of the test
    samples: int = 8                  # a test problem
    zero_samples: int = 16            # of zero, for maj@16
    many: int = 64                    # for pass@64, with --ablations
    cold_start: int = 200             # examples
    trace_prompts: int = 3000
    trace_samples: int = 3
    pretrain: SFTConfig = SFTConfig(lr=5e-3, epochs=1, batch_tokens=2048, row_length=144, warmup=0.03)
    cold: SFTConfig = SFTConfig(lr=3e-4, epochs=3, batch_tokens=2048)
    sft2: SFTConfig = SFTConfig(lr=1e-3, epochs=3, batch_tokens=2048)
    zero: GRPOConfig = rl(rollouts=30, lr=3e-4)
    control: GRPOConfig = rl(rollouts=45, lr=3e-4)  # no less compute than a student's SFT
    rl1: GRPOConfig = rl(rollouts=30, lr=2e-4)
    rl2: GRPOConfig = rl(rollouts=45, lr=2e-4, temperature=0.7)
    rl2_general_from: float = 0.3     # the part of RL-2 after which general prompts join; R1: 1,300 of 1,700 steps
    compare_samples: int = 3072       # completions that each method of --compare may sample
    compare_lr: dict = field(default_factory=dict)  # method -> its learning rate, where it is not zero's


def rl_stages(**settings):
    stages = {name: rl(**settings) for name in ("zero", "control", "rl1")}
    return stages | {"rl2": rl(temperature=0.7, **settings)}


PRESETS = {
    "cpu": Preset(),
    "smoke": Preset(
        model=sizes(32, 2, 2, 1, model_type="qwen3"), student=sizes(32, 1, 2, 1), documents=3000, student_documents=1000,
        problems=64, test=24, hard=8, requests=8, samples=2, many=16, cold_start=8, trace_prompts=16, trace_samples=2,
        compare_samples=32,
        **rl_stages(rollouts=2, prompts_per_rollout=4, group_size=4, max_new_tokens=48, validate_every=2)),
    "gpu": Preset(  # the same world and code, 32M parameters, more of everything; not run yet
        model=sizes(512, 10, 8, 4, model_type="qwen3"), student=sizes(256, 6, 4, 2), documents=1_000_000,
        student_documents=300_000, problems=20_000, test=1020, samples=16, trace_prompts=8000, compare_samples=65536,
        pretrain=SFTConfig(lr=1e-3, epochs=1, batch_tokens=16384, micro_batch_rows=128, row_length=144, warmup=0.03),
        cold=SFTConfig(lr=1e-4, epochs=3, batch_tokens=4096, micro_batch_rows=128),
        sft2=SFTConfig(lr=3e-4, epochs=3, batch_tokens=16384, micro_batch_rows=128),
        **rl_stages(rollouts=60, prompts_per_rollout=64, lr=3e-5, micro_batch_tokens=65536)),
}


def in_dtype(preset, dtype):
    """The preset with this dtype in all its stages."""
    stages = {name: stage for name, stage in vars(preset).items() if isinstance(stage, (SFTConfig, GRPOConfig))}
    return replace(preset, **{name: replace(stage, dtype=dtype) for name, stage in stages.items()})


# ------------------------------------------------------------------------------------------- the recipe

ACCURACY_AND_FORMAT = {"accuracy": 1.0, "format": 1.0}                              # R1 v2 eq. 4: equal weight
WITH_LANGUAGE = ACCURACY_AND_FORMAT | {"language_consistency": 1.0}                 # v2 eq. 7: added directly
ALL_RULES = WITH_LANGUAGE | {"helpfulness": 1.0, "harmlessness": 1.0}               # v2 eq. 8-10


def recipe(run: Run, ablations=False):
    """The stages in order: name, title, the model it starts from, by what, its source in the papers, and how it is made."""
    p, seed = run.preset, run.seed
    make_base(run)

    # R1-Zero: reinforcement learning straight on the base, by accuracy and format alone.
    run.stage("zero", "R1-Zero", "base", "GRPO: accuracy + format", "R1 v1 2.2", lambda: run.rl(
        "zero", run.model("base"), ACCURACY_AND_FORMAT, p.zero))

    # Cold start: SFT of the base on a few of zero's correct, readable samples, rewritten into the problem's language.
    run.stage("dev1", "Cold start", "base", "SFT on rewritten samples of zero", "R1 v2 B.3.2", lambda: run.sft(
        "dev1", run.model("base"), cold_start_examples(run), p.cold))

    # RL-1: the language-consistency reward joins.
    run.stage("dev2", "RL-1", "dev1", "GRPO: accuracy + format + language", "R1 v2 3.2.1", lambda: run.rl(
        "dev2", run.model("dev1"), WITH_LANGUAGE, p.rl1))

    # Rejection sampling from RL-1's model, then SFT-2 of the base again, with general examples.
    traces, general = rejection_sampling(run), world.general_sft(seed, p.trace_prompts)
    run.stage("dev3", "SFT-2", "base", "SFT on traces + general, 3 : 1", "R1 v1 2.3.3", lambda: run.sft(
        "dev3", run.model("base"), distill.mix(traces, general, ratio=3, seed=seed), p.sft2))

    # RL-2: all rules; general and unsafe prompts join late.
    run.stage("r1", "RL-2", "dev3", "GRPO: all rules, T 0.7", "R1 v2 3.2.2", lambda: run.rl(
        "r1", run.model("dev3"), ALL_RULES, p.rl2, rl2_prompts(run)))

    # Distillation: SFT of smaller bases on the same traces; the control is RL alone on the same small base.
    for name, model_type in (("qwen", "qwen3"), ("llama", "llama")):
        base, student, control = f"base_{name}", f"student_{name}", f"control_{name}"
        run.stage(base, f"Small base, {name}", "random weights", "pretraining, few chains", "", lambda: run.sft(
            base, run.new_model(p.student, model_type), student_corpus(run), p.pretrain, pretraining=True))
        run.stage(student, f"Distilled, {name}", base, "SFT on the same traces", "R1 v1 2.4", lambda: distill.distill(
            run.model(base), traces, general, encode=lambda row: row, seed=seed,
            train=lambda model, rows: run.sft(student, model, rows, p.sft2)))
        if name == "qwen" or ablations:
            run.stage(control, f"Control, {name}", base, "GRPO alone", "R1 v1 4.1", lambda: run.rl(
                control, run.model(base), ACCURACY_AND_FORMAT, p.control))

    # What claims need beside the recipe: RL-1 without the language reward, and RL that cannot learn to reason.
    if ablations:
        run.stage("dev2_no_language", "RL-1, no language", "dev1", "GRPO: accuracy + format", "R1 v2 B.6", lambda: run.rl(
            "dev2_no_language", run.model("dev1"), ACCURACY_AND_FORMAT, p.rl1))
        run.stage("zero_random", "RL, random reward", "base", "GRPO: a coin", "", lambda: run.rl(
            "zero_random", run.model("base"), {"coin": 1.0}, p.zero))
        run.stage("zero_format", "RL, format alone", "base", "GRPO: format", "", lambda: run.rl(
            "zero_format", run.model("base"), {"format": 1.0}, p.zero))
        many_samples(run)
    thinking_budgets(run)
    run.write()


def make_base(run):
    """A base model: next-token training on the mini-world's documents."""
    p = run.preset
    run.stage("base", "Base", "random weights", "pretraining", "V3-Base", lambda: run.sft(
        "base", run.new_model(p.model), world.corpus(run.seed, p.documents), p.pretrain, pretraining=True))


def cold_start_examples(run):
    """About 200 of zero's correct, readable samples, rewritten mechanically into the problem's language, with a summary."""
    p, model = run.preset, run.model("zero")
    problems = run.problems[:4 * p.cold_start]
    texts, _ = run.complete(model, problems, samples=4, temperature=1.0, top_p=1.0)
    rows, counts = distill.rejection_sample(problems, texts, rewards.accuracy, one_language, keep=1)
    print(f"{'cold start':16} {distill.explain(counts)}", flush=True)
    nothing = [{**problems[0], "completion": "<think>1</think>"}]  # of a smoke run, whose zero is never right
    rows = rows[:p.cold_start] or nothing
    for row in rows:
        thinking = world.translate(rewards.split(row["completion"])[0], row["language"])
        row["completion"] = world.tagged(thinking, world.summary(row["answer"], row["language"]))
    checkpoint.write_jsonl(run.out / "dev1" / "cold_start.jsonl", rows)
    return rows


def one_language(text, example):
    """All words of the thinking are of one language, whichever."""
    return max(rewards.language_consistency(text, {**example, "language": language}) for language in ("en", "zh")) == 1


def rejection_sampling(run):
    """RL-1's verified traces: correct, in the problem's language, readable, distinct; written once to traces.jsonl."""
    dir, p = run.out / "traces", run.preset
    if not (done := checkpoint.finished(dir)):
        run.begin()
        problems = run.problems[:p.trace_prompts]
        texts, _ = run.complete(run.model("dev2"), problems, "traces", samples=p.trace_samples, temperature=1.0, top_p=1.0)
        in_its_language = lambda text, example: rewards.language_consistency(text, example) == 1
        rows, counts = distill.rejection_sample(problems, texts, rewards.accuracy, in_its_language, keep=2)
        if not rows and run.results["meta"]["preset"] != "smoke":
            raise ValueError(f"none of dev2's samples is a trace ({distill.explain(counts)}): a stronger dev2, or more --trace-samples")
        if not rows:  # a smoke run's dev2 is never right
            rows = [{**e, "completion": world.tagged("1", e["answer"])} for e in problems[:4]]
        checkpoint.write_jsonl(dir / "traces.jsonl", rows)
        done = {"title": "Rejection sampling", "starts_from": "dev2", "by": "many samples, filtered by rules",
                "paper": "R1 v1 2.3.3", "counts": counts, **run.cost}
        run.end("traces")
        checkpoint.mark_finished(dir, done)
    checkpoint.drop(dir)
    run.results["stages"]["traces"] = done
    print(run.line_of("traces"), flush=True)
    return checkpoint.read_jsonl(dir / "traces.jsonl", whole=True)


def rl2_prompts(run):
    """Reasoning first; late, of 4 prompts one is a problem, one general, two unsafe [v2 B.5: in the last 400 of 1,700 steps]."""
    p = run.preset
    total = p.rl2.rollouts * p.rl2.prompts_per_rollout
    late = round(p.rl2_general_from * total)
    pools = {"reasoning": itertools.cycle(run.problems[::-1])}
    pools |= {kind: iter(world.requests(run.seed, "train", total, kind)) for kind in ("general", "safety")}
    kinds = ["reasoning"] * late + ["reasoning", "safety", "general", "safety"] * (total - late)
    return [next(pools[kind]) for kind in kinds[:total]]


def student_corpus(run):
    return world.corpus(run.seed + 1000, run.preset.student_documents, styles=world.CORPUS["student_styles"])


def many_samples(run):
    """pass@k and maj@k of 64 samples, before and after RL-1."""
    problems = run.test[:200]
    for name in ("dev1", "dev2"):
        run.extra(f"{name}_many", lambda: run.score(
            problems, *run.complete(run.model(name), problems, samples=run.preset.many),
            ks=[k for k in (16, 64) if k <= run.preset.many]))


def thinking_budgets(run, budgets=(8, 24, 48, 96)):
    """r1's accuracy with its thinking cut after so many tokens; and lengthened once by "Wait", apart [s1]."""
    problems, model, tokenizer = run.test[:200], run.model("r1"), run.tokenizer
    prompts = [run.prompt(e) for e in problems]
    config = evaluate.EvalConfig(samples=4, max_new_tokens=run.preset.zero.max_new_tokens)
    close, end, wait = tokenizer.encode("</think><answer>"), tokenizer.encode("</think>")[0], tokenizer.encode(" Wait,")

    def accuracy(texts):
        scores = [np.mean([METRICS["accuracy"](text, e) for text in row]) for e, row in zip(problems, texts)]
        return {"accuracy": np.array(scores)}

    def sampler():
        return run.sampler(model, torch.Generator(device=run.device).manual_seed(0))

    for budget in budgets:
        run.extra(f"budget_{budget}", lambda: accuracy(evaluate.with_budget(
            prompts, sampler(), tokenizer.decode, config, budget, close, lambda text: "</think>" in text)))
    run.extra("lengthened", lambda: accuracy(evaluate.lengthened(
        prompts, sampler(), tokenizer.decode, config, end, wait)))


# ------------------------------------------------------------------------------------------- the command line

STAGES = ("base", "zero", "dev1", "dev2", "traces", "dev3", "r1", "base_qwen", "student_qwen", "control_qwen", "base_llama",
          "student_llama", "control_llama", "dev2_no_language", "zero_random", "zero_format")


def main():
    if any(argument.split("=")[0] == "--base" for argument in sys.argv[1:]):
        import given
        return given.main()
    parser = Parser(description="The DeepSeek-R1 recipe, from random weights to distilled students.", allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where there is CUDA, else cpu")
    parser.add_argument("--base", metavar="DIR", help="a model directory of your own, with its own options: --base DIR --help")
    parser.add_argument("--out", help="run directory; default runs/PRESET-SEED")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="from_stage", choices=STAGES, help="make this stage and the later ones anew; after a stop the same command goes on")
    parser.add_argument("--ablations", action="store_true", help="and what some claims need beside the recipe")
    parser.add_argument("--compare", action="store_true", help="GRPO beside its relatives, PPO and PRIME, from the base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of forward passes; default: the faster one here")
    args = parser.parse_args()
    preset = args.preset or ("gpu" if args.device.startswith("cuda") else "cpu")
    out = Path(args.out or f"runs/{preset}-{args.seed}")
    started = time.time()
    with parser.explained(out), checkpoint.lock(out):
        device = device_of(args.device)
        dtype = args.dtype or fast_dtype(device)
        print(f"{preset} preset, seed {args.seed}, {dtype} on {machine(device)}", flush=True)
        make_run = partial(Run, out, preset, in_dtype(PRESETS[preset], dtype), args.seed, device)
        run = make_run()
        anew(run, args.from_stage, STAGES)
        if args.compare:
            make_base(run)
            compare.compare(run, make_run, ACCURACY_AND_FORMAT)
        else:
            recipe(run, args.ablations)
            (out / "FROM").unlink(missing_ok=True)
        if not args.compare:
            print_tables(run)
    print(f"\n{time.time() - started:.0f} s; {out / 'report.html'}")


def anew(run, stage, stages):
    """--from: this stage of `stages` and the later ones are forgotten; once, so that the same command goes on after a stop."""
    for page in run.out.glob("report.html.*.tmp"):  # of killed calls
        page.unlink()
    path, asked = run.out / "FROM", {"stage": stage, "code": run.code}  # FROM is of a call that did not come to its end
    if stage and not (path.exists() and checkpoint.read_json(path) == asked):
        run.forget(stages[stages.index(stage):])
        checkpoint.atomic_write(path, json.dumps(asked))


def print_tables(run):
    print("\nstages")
    for name in run.results["stages"]:
        print(run.line_of(name))
    print("\nclaims")
    for c in run.results["claims"]:
        figure = f"{c['ours']:+.1f} [{c['low']:+.1f}, {c['high']:+.1f}] {c['unit']}"
        print(f"{c['number']:8} {c['verdict']:12} {figure:28} {c['claim']}  {c['detail']}")
    print("\nsamples")
    for name in run.results["stages"]:
        if name.startswith(("base_", "control", "dev2_", "zero_")) or not (run.out / name / "test_samples.jsonl").exists():
            continue
        row = checkpoint.read_jsonl(run.out / name / "test_samples.jsonl")[0]
        print(f"{name:14} {row['prompt']} ({row['answer']})\n{'':14} {row['completion']!r}")


if __name__ == "__main__":
    main()

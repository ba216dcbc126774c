"""The DeepSeek-R1 recipe, from random weights to distilled students, in one command.

    python pipeline.py                        # the cpu or the gpu preset, by device; the whole recipe
    python pipeline.py --preset smoke         # the same in about a minute, with models too small to learn
    python pipeline.py --ablations            # and what some of the claims need beside the recipe
    python pipeline.py --from rl1             # this stage and the later ones anew

Called again, it goes on where it stopped. A run directory (--out, default runs/PRESET-SEED) holds a model directory
a stage, results.json and report.html, which can be watched while it grows. `recipe`, at the end, is the page to read.
"""

import argparse
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import checkpoint
import distill
import evaluate
import grpo
import rewards
import sft
from data import world
from run import METRICS, Run, line_of


# ------------------------------------------------------------------------------------------- presets

@dataclass
class Preset:
    """Every size of a run. The defaults are the cpu preset: two cores, no GPU."""
    model: dict = field(default_factory=lambda: dict(model_type="qwen3", hidden_size=128, intermediate_size=384,
                                                     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    student: dict = field(default_factory=lambda: dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                                                       num_attention_heads=4, num_key_value_heads=2))
    context: int = 512
    documents: int = 100_000          # of the base's corpus
    student_documents: int = 50_000   # of a student's: smaller, and with few chains
    problems: int = 4000              # for reinforcement learning and rejection sampling
    test: int = 510
    hard: int = 100
    requests: int = 128               # general ones, and as many unsafe ones, of the test
    samples: int = 8                  # a test problem
    many: int = 64                    # for pass@64, with --ablations
    cold_start: int = 200             # examples
    trace_prompts: int = 3000
    trace_samples: int = 3
    pretrain: sft.SFTConfig = field(default_factory=lambda: sft.SFTConfig(lr=5e-3, epochs=1, batch_tokens=2048, row_length=144, warmup=0.03))
    cold: sft.SFTConfig = field(default_factory=lambda: sft.SFTConfig(lr=3e-4, epochs=3, batch_tokens=2048))
    sft2: sft.SFTConfig = field(default_factory=lambda: sft.SFTConfig(lr=1e-3, epochs=3, batch_tokens=2048))
    zero: grpo.GRPOConfig = field(default_factory=lambda: grpo.GRPOConfig(rollouts=30, lr=3e-4, scale_by_std=False))
    rl1: grpo.GRPOConfig = field(default_factory=lambda: grpo.GRPOConfig(rollouts=30, lr=2e-4, scale_by_std=False))
    rl2: grpo.GRPOConfig = field(default_factory=lambda: grpo.GRPOConfig(rollouts=36, lr=2e-4, scale_by_std=False, temperature=0.7))
    rl2_general_from: float = 0.3     # the part of RL-2 after which general prompts join; R1: 1,300 of 1,700 steps


PRESETS = {
    "cpu": Preset(),
    "smoke": Preset(
        model=dict(model_type="qwen3", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=1),
        student=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1),
        documents=3000, student_documents=1000, problems=64, test=24, hard=8, requests=8, samples=2, many=16,
        cold_start=8, trace_prompts=16, trace_samples=2,
        **{stage: grpo.GRPOConfig(rollouts=2, prompts_per_rollout=4, group_size=4, max_new_tokens=48, validate_every=2)
           for stage in ("zero", "rl1", "rl2")}),
    "gpu": Preset(  # the same world, a model of 34M parameters, more of everything
        model=dict(model_type="qwen3", hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
                   num_key_value_heads=4),
        student=dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2),
        documents=1_000_000, student_documents=300_000, problems=20_000, test=1020, samples=16, trace_prompts=8000,
        pretrain=sft.SFTConfig(lr=1e-3, epochs=1, batch_tokens=16384, micro_batch_rows=64, warmup=0.03),
        cold=sft.SFTConfig(lr=1e-4, epochs=3, batch_tokens=4096), sft2=sft.SFTConfig(lr=3e-4, epochs=3, batch_tokens=16384, micro_batch_rows=64),
        **{stage: grpo.GRPOConfig(rollouts=60, prompts_per_rollout=64, lr=3e-5, scale_by_std=False, micro_batch_tokens=65536,
                                  temperature=0.7 if stage == "rl2" else 1.0) for stage in ("zero", "rl1", "rl2")}),
}
# ------------------------------------------------------------------------------------------- the recipe

ACCURACY_AND_FORMAT = {"accuracy": 1.0, "format": 1.0}                              # R1 v2 eq. 4: equal weight
WITH_LANGUAGE = ACCURACY_AND_FORMAT | {"language_consistency": 1.0}                 # v2 eq. 7: added directly
ALL_RULES = WITH_LANGUAGE | {"helpfulness": 1.0, "harmlessness": 1.0}               # v2 eq. 8-10


def recipe(run: Run, ablations=False):
    """The stages in order; `starts_from` is the model that a stage goes on from."""
    p = run.preset

    # A base model: next-token training on the mini-world's documents.
    run.stage("base", lambda: run.sft("base", run.new_model(p.model), world.corpus(run.seed, p.documents), p.pretrain, pretraining=True),
              title="Base", starts_from="random weights", by="pretraining", gives="base", paper="V3-Base")

    # R1-Zero: reinforcement learning straight on the base, by accuracy and format alone [R1 v1 2.2].
    run.stage("zero", lambda: run.rl("zero", run.model("base"), ACCURACY_AND_FORMAT, p.zero),
              title="R1-Zero", starts_from="base", by="GRPO: accuracy + format", gives="zero", paper="R1 v1 2.2")

    # Cold start: SFT of the base on a few of zero's correct, readable samples, in the problem's language [v2 B.3.2].
    run.stage("dev1", lambda: run.sft("dev1", run.model("base"), cold_start_examples(run), p.cold),
              title="Cold start", starts_from="base", by="SFT on rewritten samples of zero", gives="dev1", paper="R1 v2 B.3.2")

    # RL-1: the language-consistency reward joins [v2 3.2.1].
    run.stage("dev2", lambda: run.rl("dev2", run.model("dev1"), WITH_LANGUAGE, p.rl1),
              title="RL-1", starts_from="dev1", by="GRPO: accuracy + format + language", gives="dev2", paper="R1 v2 3.2.1")

    # Rejection sampling from RL-1's model, then SFT-2 of the base again, with general examples [v1 2.3.3].
    traces, general = rejection_sampling(run), world.general_sft(run.seed, p.trace_prompts)
    mixture = distill.mix(traces, general, ratio=3, seed=run.seed)
    run.stage("dev3", lambda: run.sft("dev3", run.model("base"), mixture, p.sft2),
              title="SFT-2", starts_from="base", by="SFT on traces + general, 3 : 1", gives="dev3", paper="R1 v1 2.3.3")

    # RL-2: all rules; general and unsafe prompts join late [v2 3.2.2].
    run.stage("r1", lambda: run.rl("r1", run.model("dev3"), ALL_RULES, p.rl2, rl2_prompts(run)),
              title="RL-2", starts_from="dev3", by="GRPO: all rules, T 0.7", gives="r1", paper="R1 v2 3.2.2")

    # Distillation: SFT of smaller bases on the same traces [v1 2.4]; the control is RL alone on the same small base [v1 4.1].
    for name, model_type in (("qwen", "qwen2"), ("llama", "llama")):
        run.stage(f"base_{name}", lambda: run.sft(f"base_{name}", run.new_model(p.student, model_type), student_corpus(run), p.pretrain, pretraining=True),
                  title=f"Small base, {name}", starts_from="random weights", by="pretraining, few chains", gives=f"base_{name}", paper="")
        run.stage(f"student_{name}", lambda: distill.distill(
                      run.model(f"base_{name}"), traces, general, lambda row: row,
                      lambda model, rows: run.sft(f"student_{name}", model, rows, p.sft2), seed=run.seed),
                  title=f"Distilled, {name}", starts_from=f"base_{name}", by="SFT on the same traces", gives=f"student_{name}", paper="R1 v1 2.4")
        if name == "qwen" or ablations:
            run.stage(f"control_{name}", lambda: run.rl(f"control_{name}", run.model(f"base_{name}"), ACCURACY_AND_FORMAT, p.zero),
                      title=f"Control, {name}", starts_from=f"base_{name}", by="GRPO alone", gives=f"control_{name}", paper="R1 v1 4.1")

    # What claims need beside the recipe.
    if ablations:
        run.stage("dev2_no_language", lambda: run.rl("dev2_no_language", run.model("dev1"), ACCURACY_AND_FORMAT, p.rl1),
                  title="RL-1 without language", starts_from="dev1", by="GRPO: accuracy + format", gives="", paper="R1 v2 B.6")
        coin = lambda text, example: float(zlib.crc32(text.encode()) % 2)  # a coin that is blind to the problem
        run.stage("zero_random", lambda: run.rl("zero_random", run.model("base"), {"random": 1.0}, p.zero, rules={"random": coin}),
                  title="RL, random reward", starts_from="base", by="GRPO: random", gives="", paper="")
        run.stage("zero_format", lambda: run.rl("zero_format", run.model("base"), {"format": 1.0}, p.zero),
                  title="RL, format alone", starts_from="base", by="GRPO: format", gives="", paper="")
        many_samples(run)
    thinking_budgets(run)
    run.write()


def cold_start_examples(run):
    """About 200 of zero's correct, readable samples, rewritten mechanically into the problem's language, with a summary."""
    p, model = run.preset, run.model("zero")
    problems = run.problems[:4 * p.cold_start]
    texts, _ = run.complete(model, problems, samples=4, temperature=1.0, top_p=1.0)
    rows, counts = distill.rejection_sample(problems, texts, rewards.accuracy, one_language, keep=1)
    print(f"{'cold start':16} " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    rows = rows[:p.cold_start] or [{**problems[0], "completion": f"<think>{problems[0]['answer']}</think>"}]  # a smoke run's zero is never right
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
        run.cost, started, problems = {"tokens": 0, "flops": 0.0}, time.time(), run.problems[:p.trace_prompts]
        texts, _ = run.complete(run.model("dev2"), problems, samples=p.trace_samples, temperature=1.0, top_p=1.0)
        in_its_language = lambda text, example: rewards.language_consistency(text, example) == 1
        rows, counts = distill.rejection_sample(problems, texts, rewards.accuracy, in_its_language, keep=2)
        if not rows:  # a smoke run's dev2 is never right
            rows = [{**e, "completion": world.tagged("1", e["answer"])} for e in problems[:4]]
        checkpoint.write_jsonl(dir / "traces.jsonl", rows)
        done = {"counts": counts, **run.cost, "seconds": time.time() - started, "title": "Rejection sampling", "starts_from": "dev2",
                "by": "many samples, filtered by rules", "gives": "traces", "paper": "R1 v1 2.3.3"}
        checkpoint.mark_finished(dir, done)
    run.results["stages"]["traces"] = done
    print(line_of("traces", done), flush=True)
    return checkpoint.read_jsonl(dir / "traces.jsonl")


def rl2_prompts(run):
    """Reasoning first; from `rl2_general_from` on, half of the prompts are general or unsafe ones [v2 B.5: the last 400 of 1,700 steps]."""
    p = run.preset
    total = p.rl2.rollouts * p.rl2.prompts_per_rollout
    reasoning = [run.problems[-1 - i % len(run.problems)] for i in range(total)]
    others = world.requests(run.seed, "train", total // 4 + 1, "general") + world.requests(run.seed, "train", total // 4 + 1, "safety")
    others = [others[i // 2 + i % 2 * (len(others) // 2)] for i in range(len(others) // 2 * 2)]  # in turn
    late = round(p.rl2_general_from * total)
    return [reasoning[i] if i < late or i % 2 else others[(i - late) // 2 % len(others)] for i in range(total)]


def student_corpus(run):
    return world.corpus(run.seed + 1000, run.preset.student_documents, styles=world.CORPUS["student_styles"])


def many_samples(run):
    """pass@k and maj@k of 64 samples, before and after RL-1."""
    problems = run.test[:200]
    for name in ("dev1", "dev2"):
        run.extra(f"{name}_many", lambda: run.score(problems, *run.complete(run.model(name), problems, samples=run.preset.many),
                                                    ks=[k for k in (16, 64) if k <= run.preset.many]))


def thinking_budgets(run, budgets=(8, 24, 48, 96)):
    """r1's accuracy with its thinking cut after so many tokens; and lengthened once by "Wait", apart [s1]."""
    problems = run.test[:200]
    prompts, config = [run.prompt(e) for e in problems], evaluate.EvalConfig(samples=4, max_new_tokens=run.preset.zero.max_new_tokens)
    close, wait = run.tokenizer.encode("</think><answer>"), run.tokenizer.encode(" Wait,")

    def accuracy(texts):
        return {"accuracy": np.array([np.mean([METRICS["accuracy"](t, e) for t in row]) for e, row in zip(problems, texts)])}

    for budget in budgets:
        run.extra(f"budget_{budget}", lambda: accuracy(evaluate.with_budget(
            prompts, run.sampler(run.model("r1"), 0), run.tokenizer.decode, config, budget, close, lambda text: "</think>" in text)))
    run.extra("lengthened", lambda: accuracy(evaluate.lengthened(
        prompts, run.sampler(run.model("r1"), 0), run.tokenizer.decode, config, run.tokenizer.encode("</think>")[0], wait)))


# ------------------------------------------------------------------------------------------- the command line

STAGES = ("base", "zero", "dev1", "dev2", "traces", "dev3", "r1", "base_qwen", "student_qwen", "control_qwen", "base_llama",
          "student_llama", "control_llama", "dev2_no_language", "zero_random", "zero_format")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line that names the culprit, not the usage and then the line
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    parser = Parser(description="The DeepSeek-R1 recipe, from random weights to distilled students.")
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where there is CUDA, else cpu")
    parser.add_argument("--out", help="run directory; default runs/PRESET-SEED")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="from_stage", choices=STAGES, help="make this stage and the later ones anew")
    parser.add_argument("--ablations", action="store_true", help="and what some claims need beside the recipe")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset = args.preset or ("gpu" if args.device.startswith("cuda") else "cpu")
    out = Path(args.out or f"runs/{preset}-{args.seed}")
    started = time.time()
    try:
        run = Run(out, preset, PRESETS[preset], args.seed, torch.device(args.device))
        for name in STAGES[STAGES.index(args.from_stage):] if args.from_stage else ():
            for file in (checkpoint.DONE, checkpoint.STATE):
                (out / name / file).unlink(missing_ok=True)
            for file in (out / "extras").glob("*.npz"):
                file.unlink()
        recipe(run, args.ablations)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; the same command goes on from here: {out}\n")
    print_tables(run)
    print(f"\n{time.time() - started:.0f} s; {out / 'report.html'}")


def print_tables(run):
    print("\nclaims")
    for c in run.results["claims"]:
        print(f"{c['number']:8} {c['claim']:90} {c['ours']:+7.1f} [{c['low']:+.1f}, {c['high']:+.1f}] {c['unit']}: {c['verdict']}  {c['detail']}")
    print("\nsamples")
    for name in ("base", "zero", "dev1", "dev2", "dev3", "r1", "student_qwen", "student_llama"):
        row = checkpoint.read_jsonl(run.out / name / "test_samples.jsonl")[0]
        print(f"{name:14} {row['prompt']} ({row['answer']})\n{'':14} {row['completion']!r}")


if __name__ == "__main__":
    main()

"""Routes to a small model: SFT on traces, RL alone, on-policy distillation; and what the last two add to the first.

    python pipeline.py --seed 0                                            # each seed: base, traces, R1, students
    python tests/routes.py runs/cpu-0 runs/cpu-1 runs/cpu-2 --jobs 2       # resumes

The routes by reinforcement learning start from copies of a run's models, with the same rollouts each. All models are
measured alike. Prints the table; its figures go to results/routes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lab  # noqa: E402, F401
import numpy as np  # noqa: E402
import torch  # noqa: E402

import evaluate  # noqa: E402
import grpo  # noqa: E402
import pipeline  # noqa: E402
from lab import checkpoint  # noqa: E402
from lab.architectures import load  # noqa: E402
from lab.graphs import generate  # noqa: E402
from lab.layers import fast_layers  # noqa: E402
from lab.scripts import final_answer, rules  # noqa: E402
from lab.sources import MiniWorld  # noqa: E402
from lab.stale import CODE, MEASURED_BY, check_unchanged, made_by  # noqa: E402

ROUTES = {  # name: (title, the model it starts from, the stage that makes it; None: the model itself)
    "base": ("the small base", "base_qwen", None),
    "sft": ("SFT on traces", "student_qwen", None),
    "rl": ("RL alone", "base_qwen", "control_qwen"),
    "on_policy": ("on-policy distillation alone", "base_qwen", "on_policy_qwen"),
    "sft_rl": ("SFT, then RL", "student_qwen", "control_qwen"),
    "sft_on_policy": ("SFT, then on-policy distillation", "student_qwen", "on_policy_qwen"),
}
TRAINING = dict(rollouts=24, lr=3e-4)
COLUMNS = {"pass@1": "pass@1", "pass@16": "pass@16", "hard": "harder ones", "length": "tokens", "samples": "samples",
           "flops": "10^12 FLOPs", "seconds": "seconds"}
SHOWN = {"flops": ".1f"}


def train(name, seed, dir):
    """One route, as a stage of a run."""
    _, start, stage = ROUTES[name]
    preset = pipeline.PRESETS["cpu"]
    ours = {field: replace(getattr(preset, field), **TRAINING) for field in ("control", "on_policy")}
    pipeline.PRESETS["cpu"] = replace(preset, test=30, hard=8, requests=8, **ours)  # measured below
    table = pipeline.stage_table

    def stage_table(source, *more):
        stages = table(source, *more)
        return stages | {stage: replace(stages[stage], starts_from=start)}

    pipeline.stage_table = stage_table
    sys.argv = ["pipeline.py", "--preset", "cpu", "--device", "cpu", "--seed", seed, "--stages", stage, "--out", dir]
    pipeline.main()


def measure(dir, seed):
    """Writes what the table shows of a model's samples to its directory."""
    if (dir / "measured.json").exists():
        return
    torch.set_num_threads(1)
    source = MiniWorld(pipeline.PRESETS["cpu"], int(seed))
    model, found = grpo.cast_copy(fast_layers(load(dir, "cpu")), "bfloat16"), {}
    tokenizer, generator = source.tokenizer, torch.Generator().manual_seed(0)

    def sample(prompts, **settings):
        return generate(model, prompts, end_ids=tokenizer.end_ids, generator=generator, **settings)

    for examples, samples in (source.test[:256], 16), (source.hard, 4):
        config = evaluate.EvalConfig(samples=samples, max_new_tokens=200)
        prompts = [tokenizer.encode_prompt(example["prompt"]) for example in examples]
        texts, counts = evaluate.complete(prompts, sample, tokenizer.decode, config)
        chosen = {rule: rules()[rule] for rule in ("accuracy_any", "language_consistency")}
        values = evaluate.measure(examples, texts, counts, chosen, final_answer, lambda text: False, len, [1, samples])
        if samples == 16:
            found |= {name: 100 * float(np.mean(values[name])) for name in ("pass@1", "pass@16")}
            found["length"] = float(np.mean(counts))
        else:
            found["hard"] = 100 * float(np.mean(values["accuracy_any"]))
    checkpoint.atomic_write(dir / "measured.json", json.dumps(found))


def copy_directory(source, target):
    """Whole or not at all."""
    if not target.exists():
        shutil.rmtree(f"{target}.part", ignore_errors=True)
        shutil.copytree(source, f"{target}.part")
        os.rename(f"{target}.part", target)


def directory(run, out, name):
    _, start, stage = ROUTES[name]
    return out / f"{name}-{run.name}" / (stage or start)


def make_all(runs, out, jobs):
    def make(job):
        run, name = job
        _, start, stage = ROUTES[name]
        model = directory(run, out, name)
        for needed in {start, "r1"}:
            copy_directory(run / needed, model.parent / needed)
        seed = str(json.loads((run / "results.json").read_text())["meta"]["seed"])
        steps = [["--measure", model, seed]]
        if stage is not None and not (model / "DONE").exists():
            steps.insert(0, ["--train", name, seed, model.parent])
        with open(model.parent / "log.txt", "a") as log:
            for step in steps:
                code = subprocess.run([sys.executable, __file__, *map(str, step)], stdout=log, stderr=log,
                                      env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
                if code:
                    print(f"{model.parent}: FAILED, see log.txt", flush=True)
                    return code
        print(f"{model.parent}: done", flush=True)
        return 0

    with ThreadPoolExecutor(jobs) as pool:
        return any(list(pool.map(make, [(run, name) for run in runs for name in ROUTES])))


# ------------------------------------------------------------------------------------------- the table

def figures(run, out, name):
    """What the table shows of one route: what it cost, and, where it starts from the student, the SFT before it."""
    _, start, stage = ROUTES[name]
    dir = directory(run, out, name)
    found = json.loads((dir / "measured.json").read_text())
    if name == "base":
        return found
    of_run = [json.loads((run / file).read_text()) for file in ("results.json", "times.json")]
    costs = []
    if start == "student_qwen":
        found["samples"] = of_run[0]["stages"]["traces"]["counts"]["sampled"]
        for made in ("traces", "student_qwen"):
            costs.append((of_run[0]["stages"][made]["flops"], of_run[1]["stages"][made]))
    if stage is not None:
        made = [json.loads((dir.parent / file).read_text()) for file in ("results.json", "times.json")]
        found["samples"] = found.get("samples", 0) + checkpoint.read_jsonl(dir / "metrics.jsonl")[-1]["samples"]
        costs.append((made[0]["stages"][stage]["flops"], made[1]["stages"][stage]))
    flops, seconds = map(sum, zip(*costs))
    return found | {"flops": flops / 1e12, "seconds": seconds}


def write_table(runs, out, results):
    for run in runs:
        check_unchanged(run)
    kept = {"runs": [run.name for run in runs], "torch": torch.__version__, "training": TRAINING}
    print("| | " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, (title, _, _) in ROUTES.items():
        found = kept[name] = [figures(run, out, name) for run in runs]
        cells = [" / ".join(f"{row[column]:{SHOWN.get(column, ',.0f')}}" for row in found if column in row)
                 for column in COLUMNS]
        print(f"| {title} | " + " | ".join(cells) + " |")
    results.mkdir(parents=True, exist_ok=True)
    kept |= made_by((*CODE, *MEASURED_BY, "lab/distill_script.py", "tests/routes.py"))
    (results / "figures.json").write_text(json.dumps(kept, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "routes")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "routes")
    parser.add_argument("--jobs", type=int, default=2, help="routes at once, each on one thread")
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        return train(*args.train)
    if args.measure:
        return measure(Path(args.measure[0]), args.measure[1])
    if make_all(args.runs, args.out, args.jobs):
        sys.exit(1)
    write_table(args.runs, args.out, args.results)


if __name__ == "__main__":
    main()

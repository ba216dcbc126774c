"""The cpu preset's base and R1-Zero, dense beside DeepSeek-V3's architecture: what each part of it changes.

    python tests/dense_and_v3.py --seeds 100 101 102 --out runs/dense_and_v3   # two at a time, one thread each
    python tests/dense_and_v3.py --seeds 100 101 102 --out runs/dense_and_v3 --only-table

Called again, it resumes. The table and the curve of the busiest expert go to results/dense_and_v3.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lab  # noqa: E402, F401
import torch  # noqa: E402

import lab.run  # noqa: E402
import pipeline  # noqa: E402
from lab import checkpoint  # noqa: E402
from lab.architectures import active_parameters, cache_bytes, load, new_model  # noqa: E402
from lab.figures import chart  # noqa: E402
from variants.v3_pretraining import Objective  # noqa: E402

V3 = ["--architecture", "deepseek-v3"]
ARMS = {  # name: (title, options, stages)
    "dense": ("dense", [], "base,zero"),
    "v3": ("V3", V3, "base,zero"),
    "wide": ("dense, as large as V3", [], "base,zero"),
    "one_token": ("V3 without the second token", V3, "base"),
    "no_bias": ("V3 without the bias", V3, "base"),
}
LAST = 200  # updates of a base whose mean loss is shown: each document is read once, so it is of unseen ones


def train(arm, seed, out):
    """One run directory, as pipeline.py makes it."""
    preset = pipeline.PRESETS["cpu"]
    if arm == "wide":
        wide = preset.model | dict(hidden_size=184, intermediate_size=552)
        pipeline.PRESETS["cpu"] = replace(preset, model=wide)
    if arm == "one_token":
        lab.run.new_model = without_second_token
    if arm == "no_bias":
        lab.run.Objective = partial(Objective, gamma=0.0)
    _, options, stages = ARMS[arm]
    sys.argv = ["pipeline.py", "--preset", "cpu", "--device", "cpu", "--seed", seed, "--stages", stages,
                "--samples", "4", "--out", out, *options]
    pipeline.main()


def without_second_token(sizes, generator):
    model = new_model(sizes, generator)
    del model.mtp
    return model


def train_all(seeds, out, jobs):
    def run(seed, arm):
        dir = out / f"{arm}-{seed}"
        dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--one", arm, str(seed), str(dir)]
        with open(dir / "log.txt", "a") as log:
            code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log).returncode
        print(f"{arm}, seed {seed}: {'done' if code == 0 else f'FAILED, see {dir}/log.txt'}", flush=True)
        return code

    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(lambda each: run(*each), [(seed, arm) for seed in seeds for arm in ARMS]))
    return any(codes)


# ------------------------------------------------------------------------------------------- the table

def rows_of(dir, log):
    return checkpoint.read_jsonl(dir / log)


def figures(dir):
    """What the table shows of one run."""
    base = rows_of(dir / "base", "metrics.jsonl")
    last = [row for row in base if row["step"] > base[-1]["step"] - LAST]
    seconds = [row["seconds"] for row in rows_of(dir / "base", "times.jsonl")]
    stages = json.loads((dir / "results.json").read_text())["stages"]
    model = load(dir / "base", "cpu")
    found = {"loss": statistics.mean(row.get("next_token_loss", row["loss"]) for row in last),
             "base": 100 * stages["base"]["evaluation"]["accuracy_any"][0],
             "tokens/s": statistics.mean(row["tokens"] for row in base) / statistics.median(seconds),
             "parameters": sum(p.numel() for p in model.parameters()), "active": active_parameters(model),
             "cache": 2 * cache_bytes(model) / model.embed_tokens.weight.itemsize}  # in bfloat16
    if "busiest_expert" in last[0]:
        found["busiest"] = statistics.mean(row["busiest_expert"] for row in last)
    if "mtp_loss" in last[0]:
        found["second"] = statistics.mean(row["mtp_loss"] for row in last)
    if "zero" in stages:
        zero = stages["zero"]["evaluation"]
        times = rows_of(dir / "zero", "times.jsonl")
        sampled = statistics.mean(row["tokens"] for row in rows_of(dir / "zero", "metrics.jsonl"))
        found |= {"zero": 100 * zero["accuracy_any"][0],
                  "sampled/s": sampled / statistics.median(row["sampling_seconds"] for row in times)}
        found |= {"rerouted": 100 * statistics.mean(row["rerouted"] for row in rows_of(dir / "zero", "metrics.jsonl")
                                                    if "rerouted" in row)} if "busiest" in found else {}
    return found


COLUMNS = {"active": "parameters, active", "parameters": "all", "loss": "base's loss", "base": "base solves, %",
           "zero": "R1-Zero solves, %", "tokens/s": "training, tokens/s", "sampled/s": "sampling, tokens/s",
           "cache": "cache, bytes a token", "busiest": "busiest expert", "rerouted": "rerouted, %"}
SHOWN = {"loss": ".3f", "busiest": ".2f", "rerouted": ".2f"}


def write_table(seeds, out, results):
    found = {arm: [figures(out / f"{arm}-{seed}") for seed in seeds] for arm in ARMS}
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for arm, runs in found.items():
        lines.append(f"| {ARMS[arm][0]} | " + " | ".join(cell(name, runs) for name in COLUMNS) + " |")
    print("\n".join(lines))
    results.mkdir(parents=True, exist_ok=True)
    kept = {"seeds": seeds, "torch": torch.__version__, "runs": found}
    (results / "figures.json").write_text(json.dumps(kept, indent=1))
    rows = []
    for of_bias, without in zip(*(rows_of(out / f"{arm}-{seeds[0]}" / "base", "metrics.jsonl")
                                  for arm in ("v3", "no_bias"))):
        rows.append({"step": of_bias["step"], "with the bias": of_bias["busiest_expert"],
                     "without": without["busiest_expert"]})
    svg = chart("The busiest expert's load over the mean", ["with the bias", "without"], [1], rows, 480, 220)
    (results / "busiest_expert.svg").write_text(str(svg))


def cell(name, runs):
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    shown = [f"{value:{SHOWN.get(name, ',.0f')}}" for value in values]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101, 102])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "dense_and_v3")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "dense_and_v3")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return train(*args.one)
    if not args.only_table and train_all(args.seeds, args.out, args.jobs):
        sys.exit(1)
    write_table(args.seeds, args.out, args.results)


if __name__ == "__main__":
    main()

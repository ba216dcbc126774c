"""What came after R1, one switch at a time: R1-Zero from one base a seed, with 4 and with 16 updates a rollout.

    python tests/switches.py --seeds 100 101 102 --jobs 2    # resumes; an hour and a half
    python tests/switches.py --only-table

The plain arm is GRPO with DeepSeekMath's loss; each other arm changes one setting. Bases are trained where they are
missing (--out/base-SEED). Prints the table; its figures go to results/switches.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lab  # noqa: E402, F401
import torch  # noqa: E402

import pipeline  # noqa: E402
from lab import checkpoint  # noqa: E402
from variants.dapo import DAPO, DAPOConfig  # noqa: E402

ARMS = {  # name: (title, settings of GRPOConfig)
    "plain": ("GRPO", {}),
    "batch": ("std of the batch (Lite PPO)", dict(scale="batch")),
    "weigh_kl": ("KL times the ratio (V3.2)", dict(weigh_kl=True)),
    "stale": ("stale sequences left out (V3.2)", dict(stale_limit=0.02)),
    "top_p": ("top-p 0.95, in the loss too (V3.2)", dict(top_p=0.95)),
    "mask_cut": ("cut outputs left out (DAPO)", {}),
}
UPDATES = (4, 16)
PLAIN = dict(rollouts=20, scale="group", beta=0.04, lr=3e-4)
MEASURED = dict(test=256, hard=64, requests=8)  # problems: what is compared is pass@1 and pass@16 of the first


def train(arm, updates, seed, dir):
    """One run directory, as pipeline.py makes it."""
    preset = pipeline.PRESETS["cpu"]
    config = replace(preset.zero, minibatches=int(updates), **PLAIN | ARMS[arm][1])
    pipeline.PRESETS["cpu"] = replace(preset, zero=config, **MEASURED)
    if arm == "mask_cut":
        pipeline.zero = zero_without_cut_outputs
    sys.argv = ["pipeline.py", "--preset", "cpu", "--device", "cpu", "--seed", seed, "--stages", "zero", "--out", dir]
    pipeline.main()


def zero_without_cut_outputs(run):
    config = run.preset.zero
    select = DAPO(DAPOConfig(mask_cut=True), config.max_new_tokens).select
    return run.rl(run.starting_model(), pipeline.ACCURACY_AND_FORMAT, config, select=select)


def train_all(seeds, out, jobs):
    def call(dir, *arguments):
        dir.mkdir(parents=True, exist_ok=True)
        with open(dir / "log.txt", "a") as log:
            code = subprocess.run([sys.executable, *map(str, arguments)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                                  stdout=log, stderr=log).returncode
        print(f"{dir.name}: {'done' if code == 0 else f'FAILED, see {dir}/log.txt'}", flush=True)
        return code

    def base(seed):
        dir = out / f"base-{seed}"
        if (dir / "base" / "DONE").exists():
            return 0
        return call(dir, ROOT / "pipeline.py", "--preset", "cpu", "--device", "cpu", "--seed", seed, "--stages", "base",
                    "--out", dir)

    def zero(job):
        arm, updates, seed = job
        dir = out / f"{arm}-{updates}-{seed}"
        if not (dir / "base").exists():
            shutil.rmtree(dir / "part", ignore_errors=True)
            shutil.copytree(out / f"base-{seed}" / "base", dir / "part")
            os.rename(dir / "part", dir / "base")  # whole or not at all
        return call(dir, __file__, "--one", arm, updates, seed, dir)

    jobs_of_zero = [(arm, updates, seed) for seed in seeds for updates in UPDATES for arm in ARMS]
    with ThreadPoolExecutor(jobs) as pool:
        return any(pool.map(base, seeds)) or any(list(pool.map(zero, jobs_of_zero)))


# ------------------------------------------------------------------------------------------- the table

def figures(dir):
    evaluation = json.loads((dir / "results.json").read_text())["stages"]["zero"]["evaluation"]
    last = checkpoint.read_jsonl(dir / "zero" / "metrics.jsonl")[-4:]
    found = {"pass@1": 100 * evaluation["pass@1"][0], "pass@16": 100 * evaluation["pass@16"][0]}
    for name in ("entropy", "kl", "drift", "length"):
        found[name] = statistics.mean(row[name] for row in last)
    return found


COLUMNS = {"pass@1": ".0f", "pass@16": ".0f", "entropy": ".2f", "kl": ".3f", "drift": ".3f", "length": ".0f"}


def write_table(seeds, out, results):
    found = {}
    for arm, updates in ((arm, updates) for updates in UPDATES for arm in ARMS):
        dirs = {seed: out / f"{arm}-{updates}-{seed}" for seed in seeds}
        found[arm, updates] = {seed: figures(dir) for seed, dir in dirs.items() if (dir / "zero" / "DONE").exists()}
    lines = []
    for updates in UPDATES:
        lines += ["", f"{updates} updates a rollout", "",
                  "| | " + " | ".join(COLUMNS) + " | pass@1 less plain | pass@16 less plain |",
                  "|---" * (len(COLUMNS) + 3) + "|"]
        for arm, (title, _) in ARMS.items():
            runs, plain = found[arm, updates], found["plain", updates]
            cells = [" / ".join(f"{run[name]:{style}}" for run in runs.values()) for name, style in COLUMNS.items()]
            for name in ("pass@1", "pass@16"):
                gaps = [run[name] - plain[seed][name] for seed, run in runs.items() if seed in plain]
                cells.append("" if arm == "plain" else f"{statistics.mean(gaps):+.1f}")
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    results.mkdir(parents=True, exist_ok=True)
    kept = {"seeds": seeds, "torch": torch.__version__, "plain": PLAIN,
            "runs": {f"{arm}, {updates} updates": runs for (arm, updates), runs in found.items()}}
    (results / "figures.json").write_text(json.dumps(kept, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101, 102])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "switches")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "switches")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one thread")
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return train(*args.one)
    if not args.only_table and train_all(args.seeds, args.out, args.jobs):
        sys.exit(1)
    write_table(args.seeds, args.out, args.results)


if __name__ == "__main__":
    main()

"""The cpu preset's base and R1-Zero, dense beside DeepSeek-V3's architecture: what each part of it changes.

    python tests/dense_and_v3.py --seeds 100 101 102 --out runs/dense_and_v3   # two at a time, one thread each
    python tests/dense_and_v3.py --seeds 100 101 102 --out runs/dense_and_v3 --only-table
    python tests/dense_and_v3.py --speeds --threads 2                              # alone on the machine

Called again, it resumes. The table and the curve of the busiest expert go to results/dense_and_v3.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lab  # noqa: E402, F401
import torch  # noqa: E402

import lab.run  # noqa: E402
import grpo  # noqa: E402
import pipeline  # noqa: E402
import sft  # noqa: E402
from lab import checkpoint  # noqa: E402
from lab.architectures import active_parameters, cache_bytes, is_deepseek, load, new_model  # noqa: E402
from lab.elements import el  # noqa: E402
from lab.figures import panel, picture  # noqa: E402
from lab.graphs import generate  # noqa: E402
from lab.layers import fast_layers  # noqa: E402
from lab.stale import CODE, DEEPSEEK_CODE, MEASURED_BY, made_by  # noqa: E402
from variants.v3_pretraining import Objective  # noqa: E402

DENSE = pipeline.PRESETS["cpu"].model
V3_SIZES = pipeline.deepseek_sizes(**DENSE)
WIDE = DENSE | dict(hidden_size=184, intermediate_size=552)  # about as many parameters as V3 has in all
V3 = ["--architecture", "deepseek-v3"]
ARMS = {  # name: (title, options, stages)
    "dense": ("dense", [], "base,zero"),
    "v3": ("V3", V3, "base,zero"),
    "wide": ("dense, as large as V3", [], "base,zero"),
    "one_token": ("V3 without the second token", V3, "base"),
    "no_bias": ("V3 without the bias", V3, "base"),
}
FEWER_SEEDS = {"one_token": 2, "no_bias": 1}
LAST = 200  # updates of a base whose mean loss is shown: each document is read once, so it is of unseen ones


def train(arm, seed, out):
    """One run directory, as pipeline.py makes it."""
    if arm == "wide":
        pipeline.PRESETS["cpu"] = replace(pipeline.PRESETS["cpu"], model=WIDE)
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


def arms_of(seed, seeds):
    return [arm for arm in ARMS if seed in seeds[:FEWER_SEEDS.get(arm, len(seeds))]]


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
        codes = list(pool.map(lambda each: run(*each), [(seed, arm) for seed in seeds for arm in arms_of(seed, seeds)]))
    return any(codes)


# ------------------------------------------------------------------------------------------- the table

def rows_of(dir, log):
    return checkpoint.read_jsonl(dir / log)


def figures(dir):
    """What the table shows of one run."""
    base = rows_of(dir / "base", "metrics.jsonl")
    last = [row for row in base if row["step"] > base[-1]["step"] - LAST]
    stages = json.loads((dir / "results.json").read_text())["stages"]
    model = load(dir / "base", "cpu")
    found = {"loss": statistics.mean(row.get("next_token_loss", row["loss"]) for row in last),
             "base": 100 * stages["base"]["evaluation"]["accuracy_any"][0],
             "parameters": sum(p.numel() for p in model.parameters()), "active": active_parameters(model),
             "cache": 2 * cache_bytes(model) / model.embed_tokens.weight.itemsize}  # in bfloat16
    if "busiest_expert" in last[0]:
        found["busiest"] = statistics.mean(row["busiest_expert"] for row in last)
    if "mtp_loss" in last[0]:
        found["second"] = statistics.mean(row["mtp_loss"] for row in last)
    if "zero" in stages:
        found["zero"] = 100 * stages["zero"]["evaluation"]["accuracy_any"][0]
    return found


COLUMNS = {"active": "parameters, active", "parameters": "all", "loss": "base's loss", "base": "base solves, %",
           "zero": "R1-Zero solves, %", "cache": "cache, bytes a token", "second": "second token's loss",
           "busiest": "busiest expert"}
SHOWN = {"loss": ".3f", "second": ".3f", "busiest": ".2f"}


def write_table(seeds, out, results):
    found = {arm: [figures(out / f"{arm}-{seed}") for seed in seeds if arm in arms_of(seed, seeds)] for arm in ARMS}
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for arm, runs in found.items():
        lines.append(f"| {ARMS[arm][0]} | " + " | ".join(cell(name, runs) for name in COLUMNS) + " |")
    print("\n".join(lines))
    results.mkdir(parents=True, exist_ok=True)
    kept = {"seeds": seeds, "torch": torch.__version__, "runs": found}
    kept |= made_by((*CODE, *MEASURED_BY, *DEEPSEEK_CODE))
    (results / "figures.json").write_text(json.dumps(kept, indent=1))
    rows = []
    for of_bias, without in zip(*(rows_of(out / f"{arm}-{seeds[0]}" / "base", "metrics.jsonl")
                                  for arm in ("v3", "no_bias"))):
        rows.append({"step": of_bias["step"], "with": of_bias["busiest_expert"], "without": without["busiest_expert"]})
    lines = [("with the bias", "with", ""), ("without it", "without", "")]
    title = "The busiest expert's load, % of the mean"
    drawn = el("g", panel(rows, title, 100, [100], lines, "updates"), transform="translate(14,14)")
    (results / "busiest_expert.svg").write_text(str(picture(drawn, 430, 330, title)))


def cell(name, runs):
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    shown = [f"{value:{SHOWN.get(name, ',.0f')}}" for value in values]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


# ------------------------------------------------------------------------------------------- speeds

def speeds(threads, repeats=5):
    """Tokens a second of an update of pretraining and of sampling: medians, the models taking turns."""
    torch.set_num_threads(threads)
    kinds = {"dense": DENSE, "V3": V3_SIZES, "V3 without the second token": V3_SIZES, "dense, as large": WIDE}
    models, taken = {}, {name: ([], []) for name in kinds}
    for name, sizes in kinds.items():
        sizes = sizes | dict(vocab_size=1024, max_position_embeddings=512)
        models[name] = fast_layers(new_model(sizes, torch.Generator().manual_seed(0)))
    del models["V3 without the second token"].mtp
    for _ in range(repeats + 1):  # the first warms up
        for name, model in models.items():
            taken[name][0].append(tokens_a_second_of_training(model))
            taken[name][1].append(tokens_a_second_of_sampling(model))
    for name, both in taken.items():
        training, sampling = (statistics.median(rates[1:]) for rates in both)
        print(f"{name:30} training {training:8,.0f}  sampling {sampling:8,.0f} tokens/s", flush=True)


def tokens_a_second_of_training(model):
    """Rows as packed as the corpus is: documents of about 54 tokens, another number of targets each time."""
    rows, length = 12, 160
    ids = torch.randint(1, 1000, (rows, length + 1))
    position = torch.arange(length).expand(rows, length)
    targets = ids[:, 1:].clone()
    targets[-1, torch.randint(length, ()):] = -100
    batch = ids[:, :-1], position // 54 + 1, position % 54, targets
    loss_sum = Objective(cross_entropy=sft.CrossEntropy.apply).loss_sum if is_deepseek(model) else sft.loss_sum
    started = time.perf_counter()
    for _ in range(3):
        loss_sum(model, *batch, "bfloat16").div(rows * length).backward()
        for p in model.parameters():
            p.grad = None
    return 3 * rows * length / (time.perf_counter() - started)


def tokens_a_second_of_sampling(model, new=60):
    sampler = grpo.cast_copy(model, "bfloat16")
    prompts = torch.randint(1, 1000, (16, 60)).tolist()
    started = time.perf_counter()
    generate(sampler, prompts, n=16, max_new_tokens=new)
    return 16 * 16 * new / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101, 102])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "dense_and_v3")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "dense_and_v3")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--speeds", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return train(*args.one)
    if args.speeds:
        return speeds(args.threads)
    if not args.only_table and train_all(args.seeds, args.out, args.jobs):
        sys.exit(1)
    write_table(args.seeds, args.out, args.results)


if __name__ == "__main__":
    main()

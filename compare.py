"""The methods of the R1 literature beside one another: one base, the same prompts, the same number of samples for each.

    python pipeline.py --compare                # needs the base alone, and makes it where it is missing
    python pipeline.py --compare --seed 100     # a seed of 100 and above searches: each method with each of LEARNING_RATES

Each method runs until it has sampled compare_samples completions (those that dynamic sampling or a filter discards are
counted), at least 4 updates a rollout, so that clipping acts, at the learning rate that was best on validation problems in
the search (Preset.compare_lr). Two controls separate learning from elicitation: random rewards, and the format reward alone.

Each run has a process of its own, so that its memory is its own; as many at once as there are cores (on CUDA one), a
thread each: seconds compare methods with one another, not with other runs of the machine.
"""

import multiprocessing
import os
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

import numpy as np
import torch

import checkpoint
import evaluate
from configs import METHODS, PLAIN
from grpo import GRPOConfig
from ppo import PPO, PPOConfig
from prime import PRIME, PRIMEConfig
from run import code_of

LEARNING_RATES = (1e-4, 3e-4)
CONTROLS = {"random": {"coin": 1.0}, "format": {"format": 1.0}}  # their rewards; the other methods': accuracy and format
SIZES = ("prompts_per_rollout", "group_size", "minibatches", "max_new_tokens", "warmup", "micro_batch_tokens", "dtype")
CLIPPED = dict(mean="token", beta=0.0)  # PPO's and PRIME's loss: the clipped ratio over all tokens
CODE = ("model.py", "grpo.py", "ppo.py", "prime.py", "configs.py", "compare.py", "sft.py", "rewards.py", "data/world.py")  # a result depends on

# name -> (settings of GRPOConfig, and how to make what stands in place of the group advantages)
ENTRIES = {name: (settings, None) for name, settings in METHODS.items() if name != "reinforce"} | {
    "ppo_0.95": (CLIPPED, lambda model, config: PPO(model, config, PPOConfig(lam=0.95))),
    "ppo_1.0": (CLIPPED, lambda model, config: PPO(model, config, PPOConfig(lam=1.0))),
    "prime": (CLIPPED | dict(resample=3), lambda model, config: PRIME(model, config, PRIMEConfig(prm_lr=2 * config.lr))),
    "online_rft": (PLAIN | dict(mean="token"), lambda model, config: RejectionFineTuning()),
    "random": (METHODS["grpo"], None),
    "format": (METHODS["grpo"], None),
}


class RejectionFineTuning:
    """Online rejection fine-tuning [DeepSeekMath 5.2]: log-likelihood of the correct samples, and nothing of the others."""

    def advantages(self, rollout):
        return (rollout.parts["accuracy"] == 1).float().flatten()

    def learn(self, rollout, rows):
        return {}


def one(make_run, method, lr, weights):
    """One method with one learning rate, in a process of its own: its weights and figures are in its directory then."""
    run = make_run()
    run.begin(CODE)
    if run.device.type == "cpu":
        torch.set_num_threads(1)
    settings, make_credit = ENTRIES[method]
    name = f"compare/{method}-{lr:g}"
    sizes = {field: getattr(run.preset.zero, field) for field in SIZES}
    config = GRPOConfig(**sizes | settings, lr=lr, sample_budget=run.preset.compare_samples, rollouts=10 ** 6)
    model = run.model("base")
    credit = None if make_credit is None else make_credit(model, config)
    run.rl(name, model, CONTROLS.get(method, weights), config, credit=credit, validate=False)
    run.save(model, name)
    texts, counts = run.complete(model, run.validation)
    accuracy = float(run.score(run.validation, texts, counts)["accuracy_strict"].mean())
    done = {"method": method, "lr": lr, "validation": accuracy, "code": run.code}
    checkpoint.mark_finished(run.out / name, done)
    return f"{method:12} lr {lr:g}  validation accuracy {100 * accuracy:.0f}%"


def end_with_parent():
    """Where the command was killed, nothing may go on beside the one that takes its place."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def compare(run, make_run, weights):
    """{method: figures} of all entries, written to results.json, seconds and memory to times.json; finished runs are not
    made again. weights: of the rules."""
    p, searching = run.preset, run.seed >= 100
    rates = {method: LEARNING_RATES if searching else [p.compare_lr.get(method, p.zero.lr)] for method in ENTRIES}
    jobs = [(method, lr) for method in ENTRIES for lr in rates[method]]
    path = lambda method, lr: run.out / "compare" / f"{method}-{lr:g}"
    open_jobs = [job for job in jobs if not checkpoint.finished(path(*job))]
    workers = 1 if run.device.type == "cuda" else max(1, torch.get_num_threads())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1, initializer=end_with_parent) as pool:
        under_way = set()
        while open_jobs or under_way:
            while open_jobs and len(under_way) < workers:  # no more: after Ctrl-C these save and end, and no other begins
                under_way.add(pool.submit(one, make_run, *open_jobs.pop(0), weights))
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                print(future.result(), flush=True)
    table, times, code = {}, {}, code_of(CODE)
    for method in ENTRIES:
        tried = [checkpoint.finished(path(method, lr)) for lr in rates[method]]
        best = max(tried, key=lambda done: done["validation"])
        for lr in rates[method]:
            checkpoint.drop(path(method, lr))
        if changed := [file for file, was in best.pop("code").items() if was != code[file]]:
            print(f"{method} was made before {', '.join(changed)} changed; to make it anew, remove {path(method, best['lr'])}")
        figures, times[method] = measure(run, path(method, best["lr"]))
        table[method] = best | figures | {"tried": {f"{done['lr']:g}": done["validation"] for done in tried}}
        print(line_of(table[method], times[method]), flush=True)
    run.results["compare"], run.times["compare"] = table, times
    run.write()


def measure(run, dir):
    """Of one finished run: test figures with intervals and the curve over samples; and what differs from call to call, apart."""
    values = dir / "values.npz"
    if not values.exists():
        texts, counts = run.complete(run.model(dir.relative_to(run.out)), run.test)
        checkpoint.write_arrays(values, run.score(run.test, texts, counts))
    evaluation = evaluate.summarise(checkpoint.read_arrays(values))
    rows, times = checkpoint.read_jsonl(dir / "metrics.jsonl"), checkpoint.read_jsonl(dir / "times.jsonl")
    seconds = np.cumsum([row["seconds"] for row in times]).tolist()
    curve = [{key: row[key] for key in ("samples", "accuracy", "length", "language_consistency")} for row in rows]
    return ({"evaluation": evaluation, "curve": curve, "rollouts": len(rows), "samples": rows[-1]["samples"]},
            {"seconds": seconds[-1], "curve_seconds": seconds, "peak_bytes": max(row.get("peak_bytes", 0) for row in times)})


def reached(curve, seconds, accuracy=0.5):
    """Samples and seconds until the sampled completions' accuracy is reached; None if it is not."""
    return next(((row["samples"], at) for row, at in zip(curve, seconds) if row["accuracy"] >= accuracy), None)


def line_of(row, times):
    e, at = row["evaluation"], reached(row["curve"], times["curve_seconds"])
    half = "not reached" if at is None else f"{at[0]} samples, {at[1]:.0f} s"
    return (f"{row['method']:12} lr {row['lr']:g}  accuracy {100 * e['accuracy_strict'][0]:.0f}% "
            f"[{100 * e['accuracy_strict'][1]:.0f}, {100 * e['accuracy_strict'][2]:.0f}]  any style {100 * e['accuracy'][0]:.0f}%  "
            f"half right after {half}  {times['seconds']:.0f} s  {times['peak_bytes'] / 2 ** 20:.0f} MB  "
            f"length {e['length'][0]:.0f}  language {100 * e['language_consistency'][0]:.0f}%")

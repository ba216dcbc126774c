"""The methods of the R1 literature side by side: one base, the same prompts, the same number of samples for each.

    python pipeline.py --compare                # needs the base alone, and trains it where it is missing
    python pipeline.py --compare --seed 100     # seeds of 100 and above search: each method with each of LEARNING_RATES

Each method runs until it has sampled compare_samples completions (those that dynamic sampling or a filter discards are
counted), with at least 4 updates per rollout, so that clipping acts, at the learning rate that was best on validation
problems in the search (Preset.compare_lr). Two controls separate learning from elicitation: random rewards, and the
format reward alone.

Each run has its own process, so that its memory is its own; as many at once as there are cores (on CUDA one), with
one thread each: seconds compare methods with one another, not with other runs of the machine.
"""

import multiprocessing
import os
import sys
import threading
from multiprocessing import connection

import numpy as np
import torch

import evaluate
from grpo import GRPOConfig
from lab import checkpoint, graphs, measure
from lab.command import Parser
from lab.stale import changed_files
from variants.configs import METHODS, PLAIN, SAMPLING
from variants.dapo import DAPO, DAPOConfig
from variants.ppo import PPO, PPOConfig
from variants.prime import PRIME, PRIMEConfig
from variants.reward_model import draw_once

LEARNING_RATES = (1.5e-4, 3e-4, 6e-4)
CONTROLS = {"random": {"coin": 1.0}, "format": {"format": 1.0}}  # their rewards; the others': accuracy and format
SIZES = ("prompts_per_rollout", "group_size", "minibatches", "max_new_tokens", "warmup", "micro_batch_tokens", "dtype")
CLIPPED = dict(mean="token", beta=0.0)  # the loss of PPO and PRIME: the clipped ratio over all tokens
# What a result depends on.
CODE = ("model.py", "lab/layers.py", "sft.py", "grpo.py", "rewards.py", "data/math_answers.py",
        "data/exact_numbers.py", "data/world.py", "variants/ppo.py", "variants/prime.py", "variants/dapo.py",
        "variants/configs.py", "lab/compare.py")


def ppo(lam):
    return lambda model, config: PPO(model, config, PPOConfig(lam=lam))


def prime(model, config):
    return PRIME(model, config, PRIMEConfig(prm_lr=2 * config.lr))


class RejectionFineTuning:
    """Online rejection fine-tuning [DeepSeekMath 5.2]: the log-likelihood of the correct samples alone."""

    def advantages(self, rollout):
        return (rollout.parts["accuracy"] == 1).float().flatten()

    def learn(self, rollout, rows):
        return {}


# name -> (settings of GRPOConfig, the function of (model, config) that makes its advantage estimator, or None)
ENTRIES = {name: (settings, None) for name, settings in METHODS.items() if name != "reinforce"} | {
    "ppo_0.95": (CLIPPED, ppo(lam=0.95)),
    "ppo_1.0": (CLIPPED, ppo(lam=1.0)),
    "prime": (CLIPPED, prime),
    "online_rft": (PLAIN | dict(mean="token"), lambda model, config: RejectionFineTuning()),
    "random": (METHODS["grpo"], None),
    "format": (METHODS["grpo"], None),
}


RESAMPLE = {"dapo": SAMPLING["dapo"]["resample"], "prime": 3}  # rounds in which refused groups are replaced


def compare(run, open_run, weights):
    """Runs the entries that are not finished; writes {method: figures} to results.json, times and memory to times.json.

    open_run() -> the same Run in another process; weights: of the rules.
    """
    searching = run.seed >= 100
    rates = {}
    for method in ENTRIES:
        rates[method] = LEARNING_RATES if searching else [run.preset.compare_lr.get(method, run.preset.zero.lr)]
    jobs = [(method, lr) for method in ENTRIES for lr in rates[method]]
    run_jobs(run, [job for job in jobs if not checkpoint.finished(run.out / name_of(*job))], open_run, weights)
    table, times = {}, {}
    for method in ENTRIES:
        table[method], times[method] = best_of(run, method, rates[method])
        print(line_of(table[method], times[method]), flush=True)
    run.results["compare"], run.times["compare"] = table, times
    run.write()


def name_of(method, lr):
    return f"compare/{method}-{lr:g}"


# ------------------------------------------------------------------------------------------- processes

def run_jobs(run, jobs, open_run, weights):
    """Each (method, lr) in a process of its own, as many at once as there are cores."""
    workers = 1 if run.device.type == "cuda" else max(1, torch.get_num_threads())
    spawn = multiprocessing.get_context("spawn")
    running = []
    graphs.decoders.clear()    # what this process still holds of a GPU's memory since it measured the base
    torch.cuda.empty_cache()
    try:
        while jobs or running:
            while jobs and len(running) < workers:
                process = spawn.Process(target=run_method, args=(open_run, *jobs.pop(0), weights))
                process.start()
                running.append(process)
            connection.wait([process.sentinel for process in running])
            failed = [process.exitcode for process in running if process.exitcode]
            if failed:
                raise ValueError(f"a method's process ended with exit code {failed[0]}")
            running = [process for process in running if process.exitcode is None]
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt) or isinstance(error, checkpoint.Terminated):
            for process in running:  # Ctrl-C has reached all processes, anything else this one alone
                process.terminate()
        for process in running:  # they finish their step and save
            process.join()
        raise


def end_with_parent():
    """Where the command was killed, none of its processes may run on beside the one that takes its place."""
    def wait_for_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def run_method(open_run, method, lr, weights):
    """A process: trains one method with one learning rate and leaves weights and figures in its directory."""
    end_with_parent()
    with Parser(prog="pipeline.py").one_line_errors():
        try:
            print(train_method(open_run(), method, lr, weights), flush=True)
        except KeyboardInterrupt:
            sys.exit(130)  # the command itself says how to resume


def train_method(run, method, lr, weights):
    if run.device.type == "cpu":
        torch.set_num_threads(1)
    run.begin(name_of(method, lr), CODE)
    settings, make_estimator = ENTRIES[method]
    sizes = {field: getattr(run.preset.zero, field) for field in SIZES}
    config = GRPOConfig(**sizes | settings, lr=lr, rollouts=10 ** 6)
    model = run.to_train("base")
    estimator = make_estimator(model, config) if make_estimator else None
    select = draw_once
    if method in RESAMPLE:
        dapo = DAPOConfig(resample=RESAMPLE[method])
        select = DAPO(dapo, config.max_new_tokens, getattr(estimator, "keep", None)).select
    run.rl(model, CONTROLS.get(method, weights), config, validate=False, sample_budget=run.preset.compare_samples,
           advantage_estimator=estimator, select=select)
    run.save()
    problems = run.source.validation
    texts, counts = run.complete(model, problems)
    accuracy = float(measure.score(run, problems, texts, counts)["accuracy"].mean())
    done = {"method": method, "lr": lr, "validation": accuracy, "code": run.code}
    checkpoint.mark_finished(run.out / run.name, done)
    return f"{method:12} lr {lr:g}  validation accuracy {100 * accuracy:.0f}%"


# ------------------------------------------------------------------------------------------- figures

def best_of(run, method, rates):
    """(figures, times) of the method at the learning rate that was best on validation."""
    tried = [checkpoint.finished(run.out / name_of(method, lr)) for lr in rates]
    for lr in rates:
        checkpoint.drop(run.out / name_of(method, lr))
    best = max(tried, key=lambda done: done["validation"])
    directory = run.out / name_of(method, best["lr"])
    changed = changed_files(best.pop("code"))
    if changed:
        print(f"{method} was made before {', '.join(changed)} changed; to re-run it, remove {directory}")
    figures, times = figures_of(run, directory)
    by_rate = {f"{done['lr']:g}": done["validation"] for done in tried}
    return best | figures | {"tried": by_rate}, times


def figures_of(run, directory):
    """(test figures with intervals and the curve over samples, times) of one finished run."""
    path = directory / "values.npz"
    if not path.exists():
        model = run.model(str(directory.relative_to(run.out)))
        texts, counts = run.complete(model, run.source.test)
        checkpoint.write_arrays(path, measure.score(run, run.source.test, texts, counts))
    evaluation = evaluate.summarise(checkpoint.read_arrays(path))
    rows, times = checkpoint.read_jsonl(directory / "metrics.jsonl"), checkpoint.read_jsonl(directory / "times.jsonl")
    seconds = np.cumsum([row["seconds"] for row in times]).tolist()
    curve = [{key: row[key] for key in ("samples", "accuracy", "length", "language_consistency")} for row in rows]
    figures = {"evaluation": evaluation, "curve": curve, "rollouts": len(rows), "samples": rows[-1]["samples"]}
    peak = max(row.get("peak_bytes", 0) for row in times)
    return figures, {"seconds": seconds[-1], "curve_seconds": seconds, "peak_bytes": peak}


def reached(curve, seconds, accuracy=0.5):
    """Samples and seconds until the sampled completions' accuracy is reached; None if it is not."""
    for row, at in zip(curve, seconds):
        if row["accuracy"] >= accuracy:
            return row["samples"], at
    return None


def line_of(row, times):
    evaluation, at = row["evaluation"], reached(row["curve"], times["curve_seconds"])
    half = "not reached" if at is None else f"{at[0]} samples, {at[1]:.0f} s"
    mean, low, high = (100 * figure for figure in evaluation["accuracy"])
    return (f"{row['method']:12} lr {row['lr']:g}  accuracy {mean:.0f}% [{low:.0f}, {high:.0f}]  "
            f"any style {100 * evaluation['accuracy_any'][0]:.0f}%  half right after {half}  {times['seconds']:.0f} s  "
            f"{times['peak_bytes'] / 2 ** 20:.0f} MB  length {evaluation['length'][0]:.0f}  "
            f"language {100 * evaluation['language_consistency'][0]:.0f}%")

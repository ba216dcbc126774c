"""Warnings on a run's metrics: each is provoked by rows that run away, none by rows of a healthy run."""

from pathlib import Path

import pytest
import torch

import grpo
import model as model_module
from lab.checkpoint import read_jsonl
from lab.watch import new_warnings, signs

HEALTHY = {"entropy": 0.2, "no_signal": 0.2, "kl": 0.01, "unfinished": 0.05, "length": 40.0, "format": 0.8,
           "reward": 1.2, "sampler_gap": 1e-4, "skipped": 0.0}


def rows(*changes):
    return [{"step": i, **HEALTHY, **change} for i, change in enumerate([{}, {}, *changes], 1)]


def all_warnings(run):
    """Of a run while it grows, row by row."""
    lines = []
    for i in range(1, len(run) + 1):
        lines += new_warnings(run[:i])
    return lines


def test_a_healthy_run_gives_no_warning():
    assert not all_warnings(rows({"entropy": 0.1, "length": 60}, {"kl": 0.08, "format": 1.0, "reward": 1.9},
                                 {"entropy": 0.04, "no_signal": 0.7, "length": 80}))


@pytest.mark.parametrize("change, named", [
    ({"entropy": 0.005, "no_signal": 0.95}, "entropy fell"), ({"entropy": 2.5}, "entropy rose"),
    ({"kl": 0.7}, "KL to the reference rose"), ({"unfinished": 0.6}, "run over max_new_tokens"),
    ({"length": 10.0}, "shrank"), ({"format": 0.4}, "format fell"), ({"reward": 0.2}, "reward fell"),
    ({"sampler_gap": 0.1}, "sampler and trainer differ"), ({"skipped": 2.0}, "not finite"),
])
def test_what_runs_away_is_named_with_its_step_and_a_fix_and_only_once(change, named):
    step = 4 if "kl" in change else 3  # a KL counts only in two rollouts in a row
    line, = all_warnings(rows(change, change, change))
    assert named in line and line.startswith(f"step {step}: ") and ":" in line[8:], line


@pytest.mark.parametrize("change", [
    {"entropy": 0.011, "no_signal": 0.95}, {"entropy": 0.005, "no_signal": 0.89}, {"entropy": 1.09}, {"kl": 0.49},
    {"unfinished": 0.49}, {"length": 12.1}, {"format": 0.51}, {"reward": 0.51}, {"sampler_gap": 0.049},
])
def test_what_stays_within_its_bound_is_not_named(change):
    assert not all_warnings(rows(change, change))


def test_a_single_rollout_of_a_high_kl_is_no_sign():
    """One token whose log-ratio is clamped at 10 weighs 22,015 nats."""
    assert not all_warnings(rows({"kl": 22015.0}, {}, {"kl": 3.5}, {}))


LOGS = {}  # {path: rows} of the committed trainings by RL, all of which were healthy
for path in sorted((Path(__file__).parent.parent / "results").rglob("*metrics.jsonl")):
    logged = read_jsonl(path)
    if "reward" in logged[0]:
        LOGS["/".join(path.parts[-4:])] = logged


@pytest.mark.parametrize("path", LOGS)
def test_no_committed_training_gives_a_warning(path):
    assert len(LOGS[path]) >= 24 and not all_warnings(LOGS[path])


def test_many_unfinished_outputs_from_the_beginning_are_no_sign():
    assert not all_warnings([{"step": 1, **HEALTHY, "unfinished": 0.6}, {"step": 2, **HEALTHY, "unfinished": 0.85}])


DEAD = {"unfinished": 1.0, "no_signal": 1.0, "reward": 0.0, "format": 0.0, "length": 160.0, "kl": 0.0}


@pytest.mark.parametrize("change, named", [
    (DEAD, ["100% of the outputs run over max_new_tokens", "no group has a signal"]),
    (DEAD | {"unfinished": 0.96}, ["96% of the outputs run over max_new_tokens", "no group has a signal"]),
    ({"unfinished": 0.92}, ["92% of the outputs run over max_new_tokens"]),  # a few end, and may teach the others
    (DEAD | {"unfinished": 0.2}, ["no group has a signal"]),                  # ended, and in no case right
    ({"no_signal": 1.0, "reward": 2.0}, ["their mean is 2.00"]),              # too easy
    ({"no_signal": 1.0, "reward": 1.0, "format": 1.0}, ["their mean is 1.00"]),
])
def test_a_run_that_cannot_learn_says_so_at_its_first_rollout_and_once(change, named):
    run = [{"step": i, **HEALTHY, **change} for i in range(1, 13)]
    lines = all_warnings(run)
    assert len(lines) == len(named) and all(line.startswith("step 1: ") for line in lines), lines
    assert all(any(name in line for line in lines) for name in named), lines


@pytest.mark.parametrize("first, later", [
    ({"unfinished": 0.89}, {}), ({"no_signal": 0.95}, {}), ({}, {"no_signal": 1.0}),
    ({"no_signal": 1.0}, {"no_signal": 0.5})])
def test_one_group_that_tells_good_from_bad_is_enough_to_begin_with(first, later):
    lines = all_warnings([{"step": 1, **HEALTHY, **first}, {"step": 2, **HEALTHY, **later}])
    assert all(line.startswith("step 1: no group") for line in lines)
    assert len(lines) == (first.get("no_signal") == 1)


def test_a_model_that_never_ends_is_told_of_in_the_first_line_of_its_training(tiny):
    said, rows = [], []

    def log(metrics, rollout):
        rows.append(metrics)
        said.extend(new_warnings(rows))
    config = grpo.GRPOConfig(rollouts=3, prompts_per_rollout=2, group_size=4, minibatches=1, max_new_tokens=6)
    grpo.train(tiny(), [[1, 2], [4]], encode=list, decode=lambda ids: ids, generate=model_module.generate, end_ids=[99],
               rewards={"never": lambda ids, example: 0.0}, config=config, log=log)
    assert [line.partition(":")[0] for line in said] == ["step 1", "step 1"]
    assert "100% of the outputs" in said[0] and "no group has a signal" in said[1]


def test_a_training_that_left_the_reference_at_once_is_named_at_its_second_rollout():
    lines = all_warnings([{"step": step, **HEALTHY, "kl": kl} for step, kl in ((1, 25.0), (2, 26.0))])
    assert len(lines) == 1 and "step 2: the KL to the reference rose to 26" in lines[0]


@pytest.mark.parametrize("kl", [[0.01 * 1.5 ** i for i in range(30)], [0.06, 0.4, 0.55, 3.0, 4.5, 100.0, 120.0],
                                [0.5 + i for i in range(9)]])
def test_a_kl_that_grows_step_by_step_is_named_too(kl):
    run = [{"step": i, **HEALTHY, "kl": value} for i, value in enumerate(kl, 1)]
    assert [line for line in all_warnings(run) if "KL" in line]


def test_a_negative_first_reward_is_no_fall():
    assert not new_warnings([{"step": 1, **HEALTHY, "reward": -1.0}])


def test_a_rollout_whose_metrics_are_not_finite_gives_no_warning_and_hides_none():
    healthy = {name: HEALTHY[name] for name in ("entropy", "kl", "unfinished", "length", "reward", "sampler_gap")}
    nan = dict.fromkeys(healthy, float("nan"))
    high = healthy | {"kl": 7.0}
    run = [{"step": step, **row} for step, row in enumerate([healthy, nan, healthy, high, high], 1)]
    assert signs(run[:2]) == {} and new_warnings(run[:3]) == [] and "KL" in new_warnings(run)[0]


def test_a_step_far_too_large_is_noticed_in_a_real_run(tiny):
    """A model that answers well at a rate that breaks it: the KL or the reward gives it away."""
    seen, said = [], []
    config = grpo.GRPOConfig(rollouts=12, prompts_per_rollout=4, group_size=8, lr=0.3, warmup=0, max_new_tokens=8,
                             dtype="float32", reference_every=100, beta=0.001)

    def sevens(text, example):
        return text.split().count("7") / 8

    def log(metrics, rollout):
        seen.append(metrics)
        said.extend(new_warnings(seen))

    torch.manual_seed(0)
    grpo.train(tiny(), [{"p": [1]}, {"p": [2]}], encode=lambda e: e["p"], decode=lambda ids: " ".join(map(str, ids)),
               generate=model_module.generate, end_ids=[0], rewards={"sevens": sevens}, config=config, log=log)
    assert any("KL" in line or "reward fell" in line or "entropy" in line for line in said), seen


def test_outputs_that_are_shorter_because_general_prompts_join_are_no_sign():
    assert not new_warnings(rows({"length": 10.0, "length_of_problems": 38.0}))
    assert "shrank from 40 to 9" in new_warnings(rows({"length": 10.0, "length_of_problems": 9.0}))[0]

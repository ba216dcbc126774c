"""Several processes as one: what each method computes in 1, 2 and 4 of them, on a CPU, from the same samples."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import evaluate
import grpo
import model as transformer
import pipeline
import scale
import sft
from forked import run_forked, start_forked
from lab import distill_script, parallel
from lab.command import Parser
from lab.memory import Memory
from lab.sharding import shard, shard_estimator
from runs import RECIPE, call, differing, make, saving_often, write
from test_deepseek_v3 import tiny as tiny_v3
from variants import ppo, prime
from variants.dapo import DAPO, DAPOConfig
from variants.lora import add_adapters
from variants.ppo import PPO, PPOConfig
from variants.prime import PRIME, PRIMEConfig
from variants.v3_pretraining import Objective

ROOT, END = Path(__file__).resolve().parent.parent, 3


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start_processes(count, function, *args, **settings):
    """The forked processes, as torchrun starts them."""
    env = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": free_port()}
    with ExitStack() as stack:
        children = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            child = start_forked(function, *args, env=env | own | settings.get("env", {}),
                                 **{name: value for name, value in settings.items() if name != "env"})
            children.append(stack.enter_context(child))
        stack.pop_all()
    return children


def run_processes(count, function, *args, timeout=60, **settings):
    """Their ends, in order."""
    children = start_processes(count, function, *args, **settings)
    try:
        return [child.wait(timeout) for child in children]
    finally:
        for child in children:
            child.__exit__()


def results_of(count, function, folder):
    """[{name: tensor} that function() returns in each of `count` processes]; one process runs without torchrun."""
    def call():
        with parallel.processes():
            tensors = {name: torch.as_tensor(value).detach().clone() for name, value in function().items()}
            save_file(tensors, folder / f"{count}-{parallel.rank()}.safetensors")

    if count == 1:
        call()
    else:
        for ended in run_processes(count, call):
            assert ended.status == 0, ended.stderr
    return [load_file(folder / f"{count}-{rank}.safetensors") for rank in range(count)]


def assert_close(found, expected, tolerance, but=()):
    assert found.keys() == expected.keys()
    for name in expected:
        if name.startswith(but):
            continue
        torch.testing.assert_close(found[name].double(), expected[name].double(), atol=tolerance, rtol=tolerance,
                                   msg=lambda text: f"{name}: {text}")


def a_rollout(prompts=3, group=5, seed=0):
    """A rollout of 15 rows, which neither 2 nor 4 divide, of lengths from 1 to 9, with log-probabilities to be off."""
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * group
    lengths = torch.randint(1, 10, (rows,), generator=generator)
    starts = torch.randint(1, 6, (prompts,), generator=generator).repeat_interleave(group)
    width = int((starts + lengths).max())
    ids = torch.randint(4, 16, (rows, width), generator=generator)
    target = torch.arange(1, width)
    mask = (target >= starts[:, None]) & (target < (starts + lengths)[:, None])
    right = torch.randint(0, 2, (prompts, group), generator=generator).float()
    drift = torch.randn(rows, width - 1, generator=generator)
    return grpo.Rollout(
        examples=[{}] * prompts, texts=[""] * rows, ids=ids, mask=mask, ends=(starts + lengths).tolist(),
        lengths=lengths, finished=torch.ones(rows, dtype=torch.bool), sampled_logprobs=torch.where(mask, drift - 3, 0),
        parts={"accuracy": right}, rewards=right)


CONFIG = grpo.GRPOConfig(rollouts=1, dtype="float32", micro_batch_tokens=30, minibatches=3, beta=0.1, lr=1e-2, warmup=1,
                         max_new_tokens=9, grad_clip=0.5)


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def learned(model, config, estimator=None):
    """What the updates of one rollout leave: gradients (of one update: ten times Adam's mean), weights, metrics."""
    state = grpo.TrainState(model, config, estimator, grpo.adam, None)
    r = a_rollout()
    state.score(r)
    advantages = grpo.group_advantages(r.rewards).flatten() if estimator is None else estimator.advantages(r)
    history = state.learn_from(r, advantages)
    found = {"advantages": advantages}
    for name, part in state.objects.items():
        if isinstance(part, torch.nn.Module):
            found |= {f"weights.{name}.{key}": full(p) for key, p in part.named_parameters()}
        if isinstance(part, torch.optim.Optimizer):
            for i, moments in part.state_dict()["state"].items():
                found[f"gradients.{name}.{i}"] = 10 * full(moments["exp_avg"])
    return found | {f"metrics.{i}.{name}": float(value) for i, row in enumerate(history) for name, value in row.items()}


METHODS = {
    "sequence": {}, "token": dict(mean="token"), "constant": dict(mean="constant"),
    "gspo": dict(sequence_ratio=True), "sampler": dict(old_logprobs="sampler", importance_cap=2.0),
    "lora": {}, "ppo": dict(mean="token"), "prime": dict(mean="token", beta=0.0), "pieces": {},
}


def by_method(name, model, updates, sharded=False):
    config, estimator = replace(CONFIG, minibatches=updates, **METHODS[name]), None
    if name == "pieces":  # as of a large vocabulary: each process has its own number of them
        grpo.LOGITS_AT_ONCE = 16 * 5
    if name == "lora":
        generator = torch.Generator().manual_seed(0)
        add_adapters(model, 2, 4.0, generator=generator)
        for key, p in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.1, generator=generator)  # else A has no gradient
    if name == "ppo":
        estimator = PPO(model, config, PPOConfig())
    if name == "prime":
        estimator = PRIME(model, config, PRIMEConfig())
    if sharded:
        shard(model)
        if estimator is not None:
            shard_estimator(estimator)
    return learned(model, config, estimator)


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", grpo.LOGITS_AT_ONCE)  # put back after each test


MORE = pytest.mark.full  # the others are a cross-section of these


@pytest.mark.parametrize("count, sharded", [(2, False), (4, True), pytest.param(4, False, marks=MORE),
                                            pytest.param(2, True, marks=MORE)])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_the_same_samples_is_that_of_one_process(method, count, sharded, tiny, tmp_path):
    expected, = results_of(1, lambda: by_method(method, tiny(), updates=1), tmp_path)
    assert sum(value.abs().sum() > 0 for name, value in expected.items() if name.startswith("gradients")) > 10
    for part in results_of(count, lambda: by_method(method, tiny(), 1, sharded), tmp_path):
        assert_close(part, expected, 1e-6, but=("weights",))  # Adam divides noise by itself


@pytest.mark.parametrize("method", ["sequence", "ppo", *(pytest.param(name, marks=MORE) for name in METHODS
                                                         if name not in ("sequence", "ppo"))])
@pytest.mark.parametrize("sharded", [False, True], ids=["", "sharded"])
def test_after_several_updates_all_hold_the_same_weights_to_the_bit(method, sharded, tiny, tmp_path):
    expected, = results_of(1, lambda: by_method(method, tiny(), updates=4), tmp_path)  # of 3 or 4 rows
    parts = results_of(4, lambda: by_method(method, tiny(), 4, sharded), tmp_path)
    for part in parts:
        assert part.keys() == parts[0].keys() and all(torch.equal(part[name], parts[0][name]) for name in part)
        assert_close(part, expected, 1e-3)


# ------------------------------------------------------------------------------------------- SFT

def trained(model, steps=20, sharded=False):
    """The loss of each step of SFT, its gradient norm, and the weights; the last step has fewer rows than processes."""
    generator, history = torch.Generator().manual_seed(0), []
    examples = [(torch.randint(4, 16, (12,), generator=generator).tolist(), 3) for _ in range(4 * 2 * (steps - 1) + 1)]
    if sharded:
        shard(model)
    config = sft.SFTConfig(lr=1e-2, epochs=1, batch_tokens=8 * 12, row_length=12, micro_batch_rows=3, dtype="float32")
    sft.train(model, examples, config, log=lambda metrics, batch: history.append(metrics))
    found = {f"{name}.{row['step']}": row[name] for row in history for name in ("loss", "grad_norm", "tokens")}
    return found | {name: full(p) for name, p in model.named_parameters()}


def test_each_step_of_sft_has_the_loss_of_one_process(tiny, tmp_path):
    expected, = results_of(1, lambda: trained(tiny()), tmp_path)
    assert "loss.20" in expected and "loss.21" not in expected and expected["tokens.20"] == 12
    for count, sharded in ((2, False), (4, False), (4, True)):
        parts = results_of(count, lambda: trained(tiny(), sharded=sharded), tmp_path)
        for part in parts:
            assert_close(part, expected, 1e-5, but=("layers", "embed", "norm"))
            assert all(torch.equal(part[name], parts[0][name]) for name in part)


# ------------------------------------------------------------------------------------------- sampling

def sampled(model, prompts, n):
    generator = torch.Generator().manual_seed(5)
    ids, lengths, logprobs = parallel.shared(transformer.generate)(
        model, prompts, n=n, max_new_tokens=8, end_ids=(END,), generator=generator)
    return {"ids": ids, "lengths": lengths, "logprobs": logprobs, "generator": generator.get_state()}


@pytest.mark.parametrize("count, prompts", [(2, 5), (4, 6), (4, 2), (2, 1)])
def test_all_processes_get_all_completions_each_in_its_place(count, prompts, tiny, tmp_path):
    rng, n = torch.Generator().manual_seed(count + prompts), 3
    asked = [torch.randint(4, 16, (int(size),), generator=rng).tolist()
             for size in torch.randint(1, 9, (prompts,), generator=rng)]
    parts = results_of(count, lambda: sampled(tiny().eval(), asked, n), tmp_path)
    found = parts[0]
    assert all(part.keys() == found.keys() and torch.equal(part[name], found[name]) for part in parts for name in part)
    assert found["ids"].shape == (prompts * n, 8) and found["lengths"].min() >= 1
    model = tiny().eval()
    for row in range(prompts * n):  # each completion has its prompt's probability
        prompt, length = asked[row // n], int(found["lengths"][row])
        completion = found["ids"][row, :length]
        logprobs = model(torch.tensor([prompt + completion.tolist()]))[0, len(prompt) - 1:-1].log_softmax(-1)
        expected = logprobs.gather(1, completion[:, None])[:, 0]
        torch.testing.assert_close(found["logprobs"][row, :length], expected, atol=1e-4, rtol=1e-4)
        assert not found["ids"][row, length:].any()


def test_processes_sample_different_completions_of_one_prompt_each(tiny, tmp_path):
    found = results_of(4, lambda: sampled(tiny().eval(), [[5, 6]] * 4, 4), tmp_path)[0]["ids"]
    assert len({tuple(row) for row in found.tolist()}) > 8  # of 16: two of one seed would give the same four


# ------------------------------------------------------------------------------------------- rollouts

def rolled_out(model, resample):
    """Metrics of two rollouts of GRPO whose rule counts how often it is asked; the fourth prompt's groups are equal."""
    asked, history = [], []

    def rule(text, example):
        asked.append(text)
        return float("7" in text) if example["number"] < 3 else 0.5

    examples = [{"number": i, "ids": [4 + i, 5]} for i in range(5)]
    config = replace(CONFIG, rollouts=2, prompts_per_rollout=3, group_size=3, minibatches=2)
    select = DAPO(DAPOConfig(resample=resample), config.max_new_tokens).select
    grpo.train(model, examples, encode=lambda example: example["ids"], decode=lambda ids: " ".join(map(str, ids)),
               generate=parallel.shared(transformer.generate), end_ids=(END,), rewards={"rule": rule}, config=config,
               select=select, log=lambda metrics, rollout: history.append(metrics | {"texts": len(rollout.texts)}))
    timed = ("seconds", "sampling_seconds")
    found = {f"{i}.{name}": float(value) for i, row in enumerate(history) for name, value in row.items()
             if name not in timed}
    return found | {"asked": len(asked)} | dict(model.named_parameters())


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("resample", [0, 2])
def test_rewards_and_metrics_are_of_all_and_each_completion_is_judged_once(count, resample, tiny, tmp_path):
    parts = results_of(count, lambda: rolled_out(tiny(), resample), tmp_path)
    asked = [int(part.pop("asked")) for part in parts]
    for part in parts:
        assert part.keys() == parts[0].keys() and all(torch.equal(part[name], parts[0][name]) for name in part)
    samples = int(parts[0]["1.samples"])
    assert sum(asked) == samples and max(asked) - min(asked) <= 6 * (1 + resample)
    assert parts[0]["0.texts"] == 9 or resample  # whole groups
    assert 0 < parts[0]["0.reward"] < 1


# ------------------------------------------------------------------------------------------- DeepSeek-V3

def balanced(count_of_examples=13):
    """Pretraining of a DeepSeek-V3: the biases, which move by the load of all rows, and each step's metrics."""
    model, history = tiny_v3(mtp=True), []
    generator = torch.Generator().manual_seed(0)
    examples = [(torch.randint(4, 16, (12,), generator=generator).tolist(), 0) for _ in range(count_of_examples)]
    config = sft.SFTConfig(lr=1e-2, epochs=1, batch_tokens=4 * 12, row_length=12, micro_batch_rows=1, dtype="float32")
    sft.train(model, examples, config, objective=Objective(alpha=0.1),
              log=lambda metrics, batch: history.append(metrics))
    found = {f"bias.{i}": router.e_score_correction_bias for i, router in enumerate(model.routers())}
    names = ("loss", "grad_norm", "next_token_loss", "mtp_loss", "busiest_expert")
    return found | {f"{name}.{row['step']}": row[name] for row in history for name in names}


def test_experts_are_balanced_by_the_load_of_all_processes(tmp_path):
    expected, = results_of(1, balanced, tmp_path)
    assert expected["bias.0"].any() and "loss.4" in expected  # its last step has one row
    for count in (2, 4):
        for part in results_of(count, balanced, tmp_path):
            assert_close(part, expected, 1e-4)


# ------------------------------------------------------------------------------------------- what is sent

@pytest.mark.full
@pytest.mark.parametrize("args", [[], ["--shard"]], ids=["", "sharded"])
def test_the_bytes_that_are_sent_are_those_of_the_formulas(args):
    for ended in run_processes(2, scale.main, argv=["scale.py", *args])[:1]:
        assert ended.status == 0, ended.stderr
        rows = re.findall(r"by formula +([\d,]+) +counted +([\d,]+)", ended.stdout)
        assert len(rows) == 6 and all(formula == counted for formula, counted in rows), ended.stdout


# ------------------------------------------------------------------------------------------- what goes wrong

def program(function):
    """function(rank) as a script runs it."""
    with Parser(prog="script").one_line_errors("out"):
        function(parallel.rank())


def last_line(ended):
    return ended.stderr.splitlines()[-1]  # torch's own log stands before it


def test_an_error_of_one_process_is_a_line_that_names_its_rank_and_ends_all():
    def function(rank):
        if rank == 1:
            raise ValueError("what only one has found")
        parallel.wait()

    first, second = run_processes(2, program, function)
    assert second.status == 2 and second.stderr.strip() == "script, rank 1: what only one has found"
    assert first.status == 2 and "Ranks 1 failed" in last_line(first) and "the same command resumes" in last_line(first)


def test_a_process_that_does_not_come_in_time_is_named(monkeypatch):
    def function(rank):
        if rank == 2:
            time.sleep(20)
        parallel.wait()

    monkeypatch.setattr(parallel, "MINUTES", 2 / 60)
    children = start_processes(3, program, function)
    try:
        ended = children[0].wait(15)
    finally:
        for child in children:
            child.__exit__()
    assert ended.status == 2 and "script: a process has died or is late: " in last_line(ended)
    assert "Ranks 2 failed" in last_line(ended)


def test_a_slow_process_is_waited_for(tiny, tmp_path):
    def slow():
        time.sleep(3 * parallel.rank())
        return sampled(tiny().eval(), [[5], [6], [7]], 2)

    parts = results_of(2, slow, tmp_path)
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


def test_the_first_ones_value_is_that_of_all(tmp_path):
    def function():
        return {"value": float(parallel.first({"rank": parallel.rank(), "is": [1, None, "é"]})["rank"] == 0)}

    assert all(part["value"] == 1 for part in results_of(3, function, tmp_path))


def test_what_needs_several_processes_or_one_says_so(tmp_path):
    ended = run_forked(pipeline.main, argv=["pipeline.py", *RECIPE, "--shard"], cwd=tmp_path)
    assert ended.status == 2 and ended.stderr == (
        "pipeline.py: shard: there is one process; start several with torchrun\n")
    for beside in ({"lora": 4}, {"offload_optimizer": True}):
        with pytest.raises(ValueError, match=f"shard beside {next(iter(beside))}"):
            Memory(shard=True, **beside)
    for ended in run_processes(2, pipeline.main, argv=["pipeline.py", *RECIPE, "--compare", "--out", "other"],
                               cwd=tmp_path)[:1]:
        assert ended.status == 2 and "--compare runs each method in a process of its own" in ended.stderr


# ------------------------------------------------------------------------------------------- kills

def run_two(folder, args, count=2, program=saving_often):
    for ended in run_processes(count, program, argv=["pipeline.py", *args], cwd=folder, timeout=280):
        assert ended.status == 0, ended.stderr
    return folder / "run"


def disturb(folder, args, after, how):
    """Starts the recipe in two processes and disturbs it; all must have ended within a minute. Their ends."""
    children = start_processes(2, saving_often, argv=["pipeline.py", *args], cwd=folder)
    try:
        try:
            return [children[0].wait(after)] + [children[1].wait(60)]
        except TimeoutError:
            pass
        if how == "kill one":
            children[int(after * 1000) % 2].kill()
        elif how == "kill all":
            for child in children:
                child.kill()
        elif how == "terminate one":
            children[int(after * 1000) % 2].kill(signal.SIGTERM)
        else:
            for child in children:
                child.kill(signal.SIGTERM)
        began = time.monotonic()
        ends = [child.wait(60) for child in children]
        assert time.monotonic() - began < 60
        return ends
    finally:
        for child in children:
            child.__exit__()


SHORT = [*RECIPE, "--stages", "base,zero"]


@pytest.mark.parametrize("how", ["kill one", pytest.param("terminate all", marks=MORE)])
def test_two_processes_that_are_stopped_resume_to_the_same_bytes_and_one_resumes_too(how, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    undisturbed = run_two(tmp_path / "a", SHORT)
    ends = disturb(tmp_path / "b", SHORT, 2.5, how)
    assert all(ended.status != 0 for ended in ends)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert differing(run_two(tmp_path / "b", SHORT), undisturbed) == []
    ended = call(tmp_path / "c", SHORT)
    assert ended.status == 0 and (tmp_path / "c" / "run" / "zero" / "DONE").exists(), ended.stderr


@pytest.mark.full
@pytest.mark.parametrize("sharded", [False, True], ids=["", "sharded"])
def test_the_recipe_in_two_processes_stopped_at_random_moments_resumes_to_the_same_bytes(sharded, tmp_path):
    args, rng = RECIPE + ["--shard"] * sharded, random.Random(int(sharded))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    began = time.monotonic()
    undisturbed = run_two(tmp_path / "a", args)
    seconds, stopped = time.monotonic() - began, 0
    for kind in ("kill one", "kill all", "terminate one", "terminate all", "kill one") * (1 if sharded else 2):
        ends = disturb(tmp_path / "b", args, rng.uniform(0.05, 0.3) * seconds, kind)
        stopped += any(ended.status != 0 for ended in ends)
    assert stopped >= 5 - sharded
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert differing(run_two(tmp_path / "b", args), undisturbed) == []
    run_two(tmp_path / "c", args, count=3)  # from where it was, with another number
    ended = call(tmp_path / "c", RECIPE)
    assert ended.status == 0, ended.stderr


SMALL = ["--rollouts", "2", "--prompts-per-rollout", "3", "--group-size", "3", "--max-new-tokens", "8",
         "--model", "model"]
SCRIPTS = {
    "grpo": (grpo.main, [*SMALL, "--resample", "1"]), "grpo sharded": (grpo.main, [*SMALL, "--shard"]),
    "grpo lora": (grpo.main, [*SMALL, "--lora", "2"]),
    "grpo offload": (grpo.main, [*SMALL, "--offload-optimizer"]), "ppo": (ppo.main, [*SMALL, "--shard"]),
    "prime": (prime.main, [*SMALL, "--shard"]), "sft": (sft.main, ["--model", "model", "--epochs", "1"]),
    "distill": (distill.main, ["--teacher", "teacher", "--student", "model", "--samples", "2", *SMALL[6:8]]),
    "on-policy": (distill.main, ["--on-policy", "--teacher", "teacher", "--student", "model", *SMALL[:-2], "--shard"]),
}


@pytest.mark.parametrize("name", [name if name in ("grpo", "ppo", "distill") else pytest.param(name, marks=MORE)
                                  for name in SCRIPTS])
def test_each_script_runs_in_two_processes_and_leaves_what_one_leaves(name, tmp_path, monkeypatch):
    main, args = SCRIPTS[name]
    make(tmp_path / "model", "qwen2", "qwen"), make(tmp_path / "teacher", "qwen3", "qwen")
    rows = [{"prompt": f"{i} + {i}", "answer": str(2 * i), "completion": str(2 * i), "kind": "reasoning",
             "language": "en"} for i in range(5)]
    data = write(tmp_path / "rows.jsonl", rows)
    if name == "distill":  # a random teacher is never right
        monkeypatch.setattr(distill_script, "correct", lambda text, example: True)
        monkeypatch.setattr(distill_script, "one_language", lambda text, example: True)
    files = {}
    for count, out in ((1, "one"), (2, "two")):
        argv = ["script", *(arg for arg in args if count > 1 or arg != "--shard"), "--data", data, "--out", out]
        for ended in run_processes(count, main, argv=argv, cwd=tmp_path):
            assert ended.status == 0, ended.stderr
        files[out] = sorted(path.name for path in (tmp_path / out).iterdir())
    assert files["one"] == files["two"] and "model.safetensors" in files["two"]
    shapes = [{key: t.shape for key, t in load_file(tmp_path / out / "model.safetensors").items()} for out in files]
    assert shapes[0] == shapes[1]


def test_evaluation_is_over_all_problems(tmp_path):
    make(tmp_path / "model", "qwen2", "qwen")
    rows = [{"prompt": f"{i} + {i}", "answer": str(2 * i), "kind": "reasoning", "language": "en"} for i in range(5)]
    argv = ["evaluate.py", "--model", "model", "--data", write(tmp_path / "rows.jsonl", rows), "--samples", "2",
            "--temperature", "0", "--max-new-tokens", "8", "--dtype", "float32"]
    alone = run_forked(evaluate.main, argv=argv, cwd=tmp_path)
    first, second = run_processes(2, evaluate.main, argv=argv, cwd=tmp_path)
    assert alone.status == first.status == second.status == 0, first.stderr
    assert first.stdout == alone.stdout and "reasoning: 5 rows" in first.stdout and second.stdout == ""


def test_torchrun_starts_a_script(tmp_path):
    make(tmp_path / "model", "qwen2", "qwen")
    rows = [{"prompt": "1 + 1", "completion": "2"}] * 12
    data, command = write(tmp_path / "rows.jsonl", rows), [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", "2", ROOT / "sft.py", "--model", "model", "--data", data, "--out", "out",
                "--epochs", "1", "--shard"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("step 1/1") == 1 and (tmp_path / "out" / "model.safetensors").exists()

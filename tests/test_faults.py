"""What goes wrong in a long run, provoked for real: numbers that are not finite, two runs in one directory, Ctrl-C,
SIGTERM, SIGKILL, a full disk, a directory that cannot be written, a file that is cut off, no memory."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import distill
import grpo
import model as model_module
import pipeline
import rewards
import sft
from forked import run_forked
from lab import arguments, checkpoint, report, stale
from lab import run as run_module
from lab.command import Parser, new_directory, saving
from lab.logs import StageLog
from runs import (RECIPE, STAGES, begin, call, content, differing, make, results_of, run_with_kills, saving_often,
                  wait_for, write)
from variants import ppo, prime
from variants.ppo import PPO
from variants.prime import PRIME

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is heard, also where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def weights_of(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def reinforce(model, **changes):
    """Rollouts, by default 3, of two updates; the sampler's log-probabilities are NaN in the rollouts of `broken`."""
    broken, calls, history = changes.pop("broken"), [], []
    rollouts = changes.pop("rollouts", 3)
    config = grpo.GRPOConfig(rollouts=rollouts, prompts_per_rollout=2, group_size=4, minibatches=2, lr=1e-3, warmup=0,
                             max_new_tokens=6, old_logprobs="sampler", dtype="float32")

    def generate(model, prompts, **settings):
        calls.append(1)
        ids, lengths, logprobs = model_module.generate(model, prompts, **settings)
        return ids, lengths, logprobs * (float("nan") if len(calls) in broken else 1)

    grpo.train(model, [{"p": [1, 2]}, {"p": [3]}], encode=lambda e: e["p"],
               decode=lambda ids: " ".join(map(str, ids)), generate=generate, end_ids=[0],
               rewards={"length": lambda text, e: len(text) % 3 / 2}, config=config,
               **dict(log=lambda m, r: history.append((m, weights_of(model)))) | changes)
    return history


# ---- not finite

def test_an_rl_update_that_is_not_finite_is_skipped_and_counted_and_training_goes_on(tiny):
    model = tiny()
    before = weights_of(model)
    history = reinforce(model, broken={1})
    assert [m["skipped"] for m, _ in history] == [2, 0, 0]
    assert torch.equal(history[0][1], before)  # neither weights nor Adam took anything of it
    assert not torch.equal(history[1][1], before) and torch.isfinite(history[2][1]).all()


def test_five_rl_updates_in_a_row_that_are_not_finite_end_the_run_with_their_batch(tiny, tmp_path):
    model = tiny()
    before = weights_of(model)
    guard, config = checkpoint.FiniteGuard(tmp_path), grpo.GRPOConfig(minibatches=2)
    with pytest.raises(ValueError, match="step 3: 6 updates in a row .* there is no good state yet"):
        reinforce(model, broken={1, 2, 3}, log=lambda metrics, r: guard.check_rl(metrics, r, config))
    assert torch.equal(weights_of(model), before)
    batch = load_file(tmp_path / "not_finite.safetensors")
    assert batch["old_logprobs"].isnan().any() and len(batch["ids"]) == 8


def test_updates_that_are_not_finite_but_not_in_a_row_end_nothing(tiny, tmp_path):
    guard, config, skipped = checkpoint.FiniteGuard(tmp_path), grpo.GRPOConfig(minibatches=2), []

    def log(metrics, r):
        skipped.append(metrics["skipped"])
        guard.check_rl(metrics, r, config)
    reinforce(tiny(), broken={1, 2, 4, 5}, rollouts=5, log=log)
    assert skipped == [2, 2, 0, 2, 2]


def test_an_sft_step_that_is_not_finite_is_skipped_and_five_in_a_row_end_the_run(tiny, monkeypatch, tmp_path):
    examples, real, calls = [([1, 2, 3, 4], 1)] * 64, sft.loss_sum, []
    config = sft.SFTConfig(lr=1e-3, epochs=1, batch_tokens=16, row_length=8, dtype="float32")

    def broken(steps):
        def loss_sum(*args):
            calls.append(1)
            return real(*args) * (float("inf") if len(calls) in steps else 1)
        calls.clear()
        monkeypatch.setattr(sft, "loss_sum", loss_sum)

    broken({3, 5, 6})
    model, history = tiny(), []
    sft.train(model, examples, config, log=lambda m, batch: history.append((m["skipped"], weights_of(model))))
    assert [skipped for skipped, _ in history[:7]] == [0, 0, 1, 0, 1, 1, 0]
    assert torch.equal(history[1][1], history[2][1]) and not torch.equal(history[2][1], history[3][1])
    broken(range(4, 99))
    with pytest.raises(ValueError, match="step 8: 5 updates in a row"):
        sft.train(tiny(), examples, config, log=checkpoint.FiniteGuard(tmp_path).check_sft)
    assert load_file(tmp_path / "not_finite.safetensors")["ids"].shape == (2, 8)


def test_a_critic_and_a_reward_model_skip_a_step_that_is_not_finite(tiny):
    config = grpo.GRPOConfig(prompts_per_rollout=2, group_size=4, minibatches=1, dtype="float32")
    ids = torch.randint(1, 16, (8, 7), generator=torch.Generator().manual_seed(0))
    accuracy = torch.tensor([[1.0, 0, 1, 0]] * 2)
    r = grpo.Rollout(examples=[{}] * 2, texts=[""] * 8, ids=ids, mask=torch.ones(8, 6, dtype=torch.bool), ends=[7] * 8,
                     lengths=torch.full((8,), 6), finished=torch.ones(8), sampled_logprobs=torch.zeros(8, 6),
                     parts={"accuracy": accuracy}, rewards=torch.full((2, 4), float("nan")),
                     old_logprobs=torch.zeros(8, 6))
    ppo = PPO(tiny(), config)
    before = weights_of(ppo.critic)
    ppo.advantages(r), ppo.learn(r, [*range(8)])
    assert torch.equal(weights_of(ppo.critic), before)
    prime = PRIME(tiny(), config)
    with torch.no_grad():
        prime.reference.norm.weight.fill_(float("nan"))
    before = weights_of(prime.prm)
    prime.advantages(r)
    assert torch.equal(weights_of(prime.prm), before)


def test_a_run_whose_rate_is_far_too_high_stops_in_one_line_and_saves_the_batch(tmp_path):
    def far_too_high():
        smoke = pipeline.PRESETS["smoke"]
        pipeline.PRESETS["smoke"] = replace(smoke, pretrain=replace(smoke.pretrain, lr=1e38))
        pipeline.main()

    ended = call(tmp_path, RECIPE, far_too_high)
    assert ended.status == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "5 updates in a row" in ended.stderr and "there is no good state yet" in ended.stderr
    assert load_file(tmp_path / "run" / "base" / "not_finite.safetensors")["ids"].dtype == torch.long
    assert len(checkpoint.read_jsonl(tmp_path / "run" / "base" / "warnings.jsonl")) == 5


# ---- one run per directory, and its end

def test_two_runs_in_one_directory_are_refused_and_a_dead_process_holds_nothing(tmp_path):
    with begin(tmp_path, RECIPE) as first:
        wait_for((tmp_path / "run" / "config.json").exists)
        second = call(tmp_path, RECIPE)
    assert second.status == 2 and f"process {first.pid} is at work here" in second.stderr, second.stderr
    with checkpoint.lock(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_finishes_its_step_saves_and_says_how_to_resume(number, code, tmp_path):
    with begin(tmp_path, RECIPE) as run:
        wait_for((tmp_path / "run" / "base" / "metrics.jsonl").exists)
        run.kill(number)
        ended = run.wait(60)
    assert ended.status == code and "the same command resumes here: run" in ended.stderr
    step = checkpoint.load(tmp_path / "run" / "base")[1]["step"]
    assert step >= checkpoint.read_jsonl(tmp_path / "run" / "base" / "metrics.jsonl")[-1]["step"] > 0


def test_sigterm_before_the_training_has_begun_stops_at_once_with_its_exit_code(tmp_path):
    def slow_to_read(args, device):
        (tmp_path / "reading").touch()
        time.sleep(60)

    def program():
        pipeline.open_run = slow_to_read
        pipeline.main()

    with begin(tmp_path, RECIPE, program) as run:
        wait_for((tmp_path / "reading").exists)
        run.kill(signal.SIGTERM)
        ended = run.wait(20)
    assert ended.status == 143 and "the same command resumes here: run" in ended.stderr


def test_saving_takes_two_percent_of_the_time_at_most(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "save", lambda *args: now.__setitem__(0, now[0] + 7))  # a save of seven seconds
    monkeypatch.setattr(checkpoint, "DISK", 12 / 7)  # what is expected of the first one

    def write_a_page():
        now[0] += 1

    checkpointer, saved = checkpoint.Checkpointer(tmp_path, every=30, after=write_a_page), 0
    for _ in range(20000):
        now[0] += 1
        saved += checkpointer.save(step=1, tensor=torch.zeros(3))
        assert saved * 8 <= 0.02 * now[0] + 1
    assert 0.02 * now[0] <= (saved + 1) * 8


# ---- SIGKILL

@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.full)])
def test_a_run_killed_at_random_moments_ends_byte_for_byte_as_one_that_was_not(kills, finished_run, tmp_path):
    rng = random.Random(kills)
    killed = run_with_kills(tmp_path, RECIPE, [rng.uniform(0.5, 4 if kills == 4 else 3) for _ in range(kills)])
    assert killed >= kills // 2  # a fast machine comes to the end before
    assert differing(tmp_path / "run", finished_run) == []


# ---- a run's ways to resume

@pytest.fixture
def call_here(monkeypatch, capfd):
    """call_here(run, *args) -> (exit code, stderr) of the recipe's command within this process."""
    def call(run, *args):
        monkeypatch.chdir(run.parent)
        monkeypatch.setattr(sys, "argv", ["pipeline.py", *RECIPE, *args])
        try:
            pipeline.main()
        except SystemExit as exit:
            return exit.code, capfd.readouterr().err
        return 0, capfd.readouterr().err
    return call


def test_a_wrong_argument_beside_from_forgets_nothing(copy_of_run, call_here):
    before = content(copy_of_run)
    code, said = call_here(copy_of_run, "--from", "base", "--seed", "1")
    assert code == 2 and "seed was 0, is 1" in said
    assert content(copy_of_run) == before


@pytest.mark.parametrize("at", [1, 5, 9, 14, 30])
def test_a_kill_while_from_forgets_leaves_no_stage_without_the_one_it_was_made_from(at, copy_of_run):
    def killed_while_it_forgets():
        real, calls = Path.unlink, []

        def unlink(self, *args, **kwargs):
            calls.append(self)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *args, **kwargs)

        Path.unlink = unlink
        pipeline.main()

    ended = call(copy_of_run.parent, [*RECIPE, "--from", "dev1"], killed_while_it_forgets)
    assert ended.status == -signal.SIGKILL, ended.stderr
    there = [name for name in STAGES if (copy_of_run / name / "DONE").exists()]
    assert there[:2] == ["base", "zero"] and there == STAGES[:len(there)]


def test_from_resumes_after_a_kill_and_restarts_once_it_has_ended(copy_of_run, finished_run):
    def stamp(name):
        return (copy_of_run / name / "DONE").stat().st_mtime_ns

    base, command = stamp("base"), [*RECIPE, "--from", "dev3"]
    with begin(copy_of_run.parent, command) as killed:
        wait_for(lambda: (copy_of_run / "FROM").exists() and (copy_of_run / "dev3" / "DONE").exists())
        killed.kill()
        killed.wait()
    dev3 = stamp("dev3")
    assert call(copy_of_run.parent, command).status == 0
    assert (stamp("base"), stamp("dev3")) == (base, dev3) and not (copy_of_run / "FROM").exists()
    assert results_of(copy_of_run) == results_of(finished_run)


def open_run(out):
    args = SimpleNamespace(preset="smoke", architecture="dense", preferences="rules", base=None, out=str(out), seed=0,
                           stages=None, from_stage=None, ablations=False, compare=False, shard=False, command="",
                           recompute=False, dtype=None, device="cpu")
    for name in (*arguments.RL_OPTIONS, "offload_reference", *arguments.SFT_OPTIONS, *arguments.SIZES):
        setattr(args, name, None)
    return pipeline.open_run(args, torch.device("cpu"))


def test_from_forgets_again_where_the_code_has_changed_since(copy_of_run, monkeypatch):
    run, code = open_run(copy_of_run), run_module.code_of(run_module.CODE)
    for now, forgotten in ((code, True), (code, False), (code | {"grpo.py": "another"}, True)):
        checkpoint.mark_finished(copy_of_run / "r1", {"by": "a call in between"})
        monkeypatch.setattr(run_module, "code_of", lambda files: now)
        run.restart_from("r1")
        assert (copy_of_run / "r1" / "DONE").exists() != forgotten


def test_from_base_forgets_the_comparison_too_with_what_was_measured_of_it(copy_of_run):
    run, method = open_run(copy_of_run), copy_of_run / "compare" / "grpo-0.0001"
    checkpoint.mark_finished(method, {})
    checkpoint.write_arrays(method / "values.npz", {"accuracy": torch.ones(3).numpy()})
    run.results["compare"] = {"grpo": {}}
    run.restart_from("dev1")
    assert (method / "DONE").exists() and (copy_of_run / "base" / "DONE").exists()
    run.restart_from("base")
    assert [path for path in method.iterdir()] == [] and "compare" not in run.results


def test_a_file_that_is_damaged_is_named_and_what_was_measured_is_written_again_without_it(copy_of_run, call_here):
    for name, damage in (("results.json", "[]"), ("results.json", '{"claims": [5]}'),
                         ("results.json", '{"stages": {"base": 5}}'), ("results.json", '{"claims": 5}'),
                         ("results.json", '{"stages": '), ("times.json", "[" * 10 ** 5), ("zero/values.npz", ""),
                         ("zero/values.npz", "PK"), ("zero/DONE", '{"title"'), ("config.json", "nothing")):
        whole = (copy_of_run / name).read_bytes()
        (copy_of_run / name).write_text(damage)
        code, said = call_here(copy_of_run)
        assert code == 2 and f"{name}: not" in said and said.count("\n") == 1, (name, said)
        (copy_of_run / name).write_bytes(whole)
    whole = (copy_of_run / "results.json").read_bytes()
    (copy_of_run / "results.json").unlink(), (copy_of_run / "times.json").unlink()
    assert call_here(copy_of_run)[0] == 0
    assert json.loads((copy_of_run / "results.json").read_text()) == json.loads(whole)


def test_a_stage_that_resumes_under_other_code_says_so_and_keeps_the_code_it_began_with(copy_of_run):
    (copy_of_run / "zero" / "DONE").unlink()

    def stopped_after_a_rollout():
        train = grpo.train

        def train_and_stop(*args, save, **more):
            def save_and_stop(**parts):
                save(**parts)
                raise KeyboardInterrupt
            train(*args, save=save_and_stop, **more)

        grpo.train = train_and_stop
        saving_often()

    def with_another_grpo():
        real = stale.hash_of
        stale.hash_of = lambda file: "another" if file == "grpo.py" else real(file)
        pipeline.main()

    assert call(copy_of_run.parent, RECIPE, stopped_after_a_rollout).status == 130
    was = checkpoint.load(copy_of_run / "zero")[1]["code"]
    ended = call(copy_of_run.parent, RECIPE, with_another_grpo)
    assert ended.status == 0, ended.stderr
    assert "zero resumes, but began before grpo.py changed; to restart it: --from zero" in ended.stdout
    assert checkpoint.finished(copy_of_run / "zero")["code"] == was


def test_a_state_that_is_not_finite_is_not_saved_over_a_good_one(tmp_path):
    checkpointer, net = checkpoint.Checkpointer(tmp_path), torch.nn.Linear(3, 2)
    checkpointer.stop = KeyboardInterrupt  # as after Ctrl-C
    for value, step in ((1.0, 1), (float("inf"), 2), (float("nan"), 3)):
        with pytest.raises(KeyboardInterrupt):
            torch.nn.init.constant_(net.weight, value)
            checkpointer.save(model=net, step=step)
    assert checkpoint.load(tmp_path)[1]["step"] == 1


def test_ctrl_c_is_heard_where_nobody_reads_any_more(tmp_path):
    """As behind `| tee`, which dies of the same Ctrl-C; and the step has something to say."""
    def talkative():
        write = StageLog.write_metrics

        def warn_and_write(self, metrics):
            self.warn(metrics["step"], "x")
            write(self, metrics)

        StageLog.write_metrics = warn_and_write
        saving_often()

    reader, writer = os.pipe()
    with begin(tmp_path, RECIPE, talkative, stdout=writer, stderr=writer) as run:
        os.close(writer)
        wait_for((tmp_path / "run" / "base" / "metrics.jsonl").exists)
        os.close(reader)
        run.kill(signal.SIGINT)
        run.wait(60)
    assert checkpoint.load(tmp_path / "run" / "base")[1]["step"] > 0


def test_the_clock_may_be_set_back(tmp_path, monkeypatch):
    checkpointer = checkpoint.Checkpointer(tmp_path, every=0.0)
    checkpointer.began -= 100
    monkeypatch.setattr(checkpoint.time, "time", lambda: 0.0)
    assert checkpointer.save(step=1)


# ---- files

def test_one_bit_that_has_changed_in_a_state_is_noticed(tmp_path):
    checkpoint.save(tmp_path, {"x": torch.ones(100), "step": torch.tensor(3.0), "none": torch.zeros(0)}, {"step": 1})
    path = tmp_path / checkpoint.STATE
    whole = path.read_bytes()
    assert checkpoint.load(tmp_path)[0]["x"].sum() == 100
    for at in (len(whole) - 1, len(whole) - 200, whole.index(b"step") + 9):  # two in tensors, one in the counters
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(ValueError, match="not a whole training state"):
            checkpoint.load(tmp_path)


def hostile(change):
    """(model, optimizer, what `restore` raises) of a state that someone has changed, its checksum with it."""
    def make():
        net = torch.nn.Linear(8, 4)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        net(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        return net, optimizer
    net, optimizer = make()
    tensors, meta = checkpoint.state_of(model=net, optimizer=optimizer, generator=torch.Generator(), step=3)
    change(tensors, meta)
    return tensors, meta, make


@pytest.mark.parametrize("change", [
    lambda t, m: t.update({"optimizer.0.exp_avg": torch.zeros(7)}),
    lambda t, m: t.update({"optimizer.0.step": torch.zeros(3)}),
    lambda t, m: t.update({"optimizer.9.exp_avg": torch.zeros(7)}), lambda t, m: t.pop("optimizer.1.exp_avg"),
    lambda t, m: t.update({"optimizer.0.a.b": torch.zeros(7)}),
    lambda t, m: t.update({"optimizer.x.y": torch.zeros(7)}),
    lambda t, m: t.update({"optimizer.0.exp_avg": torch.zeros(4, 8, dtype=torch.int32)}),
    lambda t, m: t.update({"model.weight": torch.zeros(4, 8).to(torch.complex64)}),
    lambda t, m: t.update({"model.weight": torch.zeros(4, 8, dtype=torch.int8)}),
    lambda t, m: t.update({"generator": torch.zeros(3)}),
    lambda t, m: t.update({"generator": torch.zeros(3, dtype=torch.uint8)}),
    lambda t, m: t.update({"generator.x": t.pop("generator")}),
    lambda t, m: (t.pop("generator"), m.update(generator=5)),
    lambda t, m: m.update(optimizer="x"),
    lambda t, m: m.update(optimizer=None),
    lambda t, m: m["optimizer"][0].pop("params"),
    lambda t, m: m["optimizer"][0].pop("weight_decay"),
    lambda t, m: m["optimizer"][0].update(betas=5),
    lambda t, m: m["optimizer"][0].update(eps="x"),
    lambda t, m: m["optimizer"].append({}),
    lambda t, m: m["optimizer"][0].update(params=[0, 5]),
    lambda t, m: m.pop("step"),
    lambda t, m: m.update(step="x"),
    lambda t, m: m.update(step=-1),
    lambda t, m: m.update(step=True),
])
def test_a_state_of_wrong_shapes_or_types_is_refused_in_one_line_that_names_its_file(change, tmp_path):
    """The fused Adam looks at no shapes: a moment of another one would write outside its memory."""
    tensors, meta, make = hostile(change)
    checkpoint.save(tmp_path, tensors, meta)
    net, optimizer = make()
    with pytest.raises(ValueError, match=f"{checkpoint.STATE}: not a state of this training") as caught:
        checkpoint.Checkpointer(tmp_path).resume(model=net, optimizer=optimizer, generator=torch.Generator())
    assert "\n" not in str(caught.value)


def test_a_gpu_without_memory_is_no_fault_of_the_state(tmp_path):
    class Full(torch.nn.Linear):
        def named_parameters(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")
    checkpoint.save(tmp_path, *checkpoint.state_of(model=torch.nn.Linear(2, 2), step=1))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        checkpoint.Checkpointer(tmp_path).resume(model=Full(2, 2))


def test_a_ctrl_c_while_the_model_is_written_comes_too_late_to_stop_anything(tmp_path):
    with saving(tmp_path, SimpleNamespace(save_every=30.0)):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        (tmp_path / "config.json").unlink()
        with saving(tmp_path, SimpleNamespace(save_every=30.0)):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)


def test_an_unchanged_state_is_taken(tmp_path):
    tensors, meta, make = hostile(lambda t, m: None)
    checkpoint.save(tmp_path, tensors, meta)
    net, optimizer = make()
    checkpointer = checkpoint.Checkpointer(tmp_path)
    assert checkpointer.resume(model=net, optimizer=optimizer, generator=torch.Generator()) == {"step": 3}


def test_a_run_whose_disk_was_full_says_where_and_resumes_to_the_same_end(copy_of_run, finished_run):
    """A limit on a file's size stands in for the disk: the write fails in the same place."""
    shutil.rmtree(copy_of_run / "student_llama")
    for size in (30_000, 150_000):  # the tokenizer's file, the model's
        ended = call(copy_of_run.parent, RECIPE, limits={resource.RLIMIT_FSIZE: size})
        assert ended.status == 2 and ended.stderr.count("\n") == 1 and "pipeline.py: run" in ended.stderr, ended.stderr
        assert not [*copy_of_run.rglob("*.new"), *copy_of_run.rglob("*.tmp")]
    assert call(copy_of_run.parent, RECIPE).status == 0
    assert differing(copy_of_run, finished_run) == []


def test_a_page_that_the_disk_has_no_room_for_leaves_the_old_one(copy_of_run):
    before = (copy_of_run / "report.html").read_bytes()
    ended = run_forked(report.main, argv=["report.py", str(copy_of_run)], limits={resource.RLIMIT_FSIZE: 50_000})
    assert ended.status == 2 and ended.stderr.startswith(f"{copy_of_run}: "), ended.stderr
    assert (copy_of_run / "report.html").read_bytes() == before and not [*copy_of_run.glob("report.html.*")]


@pytest.mark.parametrize("meta", ["[" * 100_000, "[]", "5", "null", "{"])
def test_counters_of_another_kind_are_refused(meta, tmp_path):
    from safetensors.torch import save_file
    tensors = {"x": torch.ones(3)}
    save_file(tensors, tmp_path / checkpoint.STATE, {"meta": meta, "checksum": checkpoint._checksum(tensors, meta)})
    with pytest.raises(ValueError, match=f"{checkpoint.STATE}: not a whole training state"):
        checkpoint.load(tmp_path)


def test_a_pipe_or_a_directory_in_a_files_place_is_not_waited_for(tmp_path):
    for name, read in ((checkpoint.STATE, checkpoint.load), (checkpoint.DONE, checkpoint.finished)):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: .*not a file"):
            read(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / checkpoint.STATE).mkdir()
    with pytest.raises(ValueError, match="not a file"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("row", ["5", '{"a": 1}', '{"step": "x"}', "[" * 100_000])
def test_a_log_of_other_rows_is_named(row, tmp_path):
    checkpoint.save(tmp_path, {}, {"step": 1})
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{row}\n')
    with pytest.raises(ValueError, match="metrics.jsonl"):
        checkpoint.Checkpointer(tmp_path, ["metrics.jsonl"]).resume()


def test_no_path_of_a_results_file_is_followed(copy_of_run, call_here):
    os.mkfifo(copy_of_run.parent / "DONE")
    results = json.loads((copy_of_run / "results.json").read_text())
    bad = {name: {} for name in ("../", str(copy_of_run.parent), "..", "a" * 5000)}
    (copy_of_run / "results.json").write_text(json.dumps(results | {"stages": results["stages"] | bad}))
    assert call_here(copy_of_run)[0] == 0
    assert [*json.loads((copy_of_run / "results.json").read_text())["stages"]] == STAGES


def test_a_full_disk_is_one_line_and_the_state_before_it_stays(tmp_path):
    checkpoint.save(tmp_path, {"x": torch.ones(10)}, {"step": 1})

    def program():
        with Parser(prog="train").one_line_errors():
            checkpoint.save(tmp_path, {"x": torch.ones(100_000)}, {"step": 2})

    ended = run_forked(program, limits={resource.RLIMIT_FSIZE: 10_000})
    assert ended.status == 2 and ended.stderr.startswith("train: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert checkpoint.load(tmp_path)[1]["step"] == 1


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    ended = call(tmp_path, [*RECIPE[:-1], str(tmp_path / "file" / "run")])
    assert ended.status == 2 and str(tmp_path / "file") in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


def test_without_memory_the_line_names_the_knobs(capsys):
    with pytest.raises(SystemExit) as exit, Parser(prog="grpo.py").one_line_errors():
        torch.empty(2 ** 60, dtype=torch.uint8)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "out of memory" in said and "--micro-batch-tokens" in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")])
def test_a_gpus_words_for_too_little_memory_are_known(error, capsys):
    with pytest.raises(SystemExit), Parser(prog="grpo.py").one_line_errors():
        raise error
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["shapes", "CUDA error: an illegal memory access was encountered"])
def test_a_mistake_of_our_own_keeps_its_traceback(message):
    with pytest.raises(RuntimeError, match=message), Parser().one_line_errors():
        raise RuntimeError(message)


# ---- the scripts, one by one

def killed_at_save(main, number):
    """The script's main, killed by SIGKILL when its state has been saved `number` times; 0: never."""
    def program():
        save, saves = checkpoint.Checkpointer.save, []

        def save_and_die(self, **parts):
            self.took = self.spent = 0.0
            if save(self, **parts):
                saves.append(parts)
            if number and len(saves) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.Checkpointer.save = save_and_die
        main()
    return program


def script(main, args, killed_at=0):
    return run_forked(killed_at_save(main, killed_at), argv=["script.py", *map(str, args)], cwd=ROOT)


def pairs(tmp_path):
    return write(tmp_path / "data.jsonl", [{"prompt": f"{i}?", "completion": f"{i}!" * 9} for i in range(60)])


RL = ("--rollouts 5 --prompts-per-rollout 2 --group-size 4 --minibatches 2 --max-new-tokens 8 --resample 0 "
      "--reference-every 2 --rewards accuracy language_consistency --dtype").split()
SFT = ["--batch-tokens", "128", "--row-length", "64", "--dtype"]
RUNS = {"grpo": (grpo.main, RL), "ppo": (ppo.main, RL), "prime": (prime.main, RL), "sft": (sft.main, SFT)}
HOW = {"plain": "float32", "lora": "bfloat16 --lora 4", "offload": "bfloat16 --offload-optimizer", "float16": "float16",
       "lora in float16": "float16 --lora 4", "offload in float16": "float16 --offload-optimizer"}
SCRIPTS = [("grpo", "plain"), ("ppo", "plain"), ("prime", "plain"), ("sft", "plain"), ("grpo", "lora"),
           ("prime", "lora"), ("sft", "lora"), ("grpo", "offload"), ("sft", "offload"), ("ppo", "float16"),
           ("sft", "float16")]
SCRIPTS += [pytest.param(name, how, marks=pytest.mark.full) for name, how in (
    ("ppo", "lora"), ("grpo", "float16"), ("prime", "float16"), ("prime", "lora in float16"),
    ("grpo", "offload in float16"))]

OTHER_SETTINGS = {  # option: what the line says that refuses it where the run is killed
    "plain": [("--lr 0.5", "lr was"), ("--lora 4", "lora was 0, is 4"),
              ("--dtype bfloat16", "dtype was float32, is bfloat16")],
    "lora": [("--lora 8", "lora was 4, is 8"), ("--lora-alpha 16", "lora_alpha was 32.0, is 16.0"),
             ("--lora 0", "lora was 4, is 0")],
    "offload": [("--lora 4", "offload_optimizer beside lora")],
    "float16": [("--dtype float32", "dtype was float16, is float32"), ("--lora 4", "lora was 0, is 4")]}


def trained_files(dir):
    """{file: bytes} of the model, its adapter and what was logged, but for times and paths."""
    apart = ("times.jsonl", "report.html", "LOCK", "settings.json")
    return {str(path.relative_to(dir)): path.read_bytes() for path in sorted(dir.rglob("*"))
            if path.is_file() and path.name not in apart}


@pytest.mark.parametrize("name, how", SCRIPTS)
def test_a_script_killed_within_its_training_resumes_to_the_same_weights(name, how, tmp_path):
    main, more = RUNS[name]
    make(tmp_path / "model", "llama", "qwen")
    if name == "sft":
        data = pairs(tmp_path)
    else:
        data = write(tmp_path / "data.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(9)])
    args = ["--model", tmp_path / "model", "--data", data, "--save-every", "0", *more, *HOW[how].split()]
    whole = script(main, [*args, "--out", tmp_path / "whole"])
    assert whole.status == 0, whole.stderr
    out = ["--out", tmp_path / "out"]
    killed = script(main, [*args, *out], killed_at=2)
    assert killed.status == -signal.SIGKILL and checkpoint.load(tmp_path / "out")[1]["step"] == 2
    for option, culprit in OTHER_SETTINGS[how.split()[0]]:
        other = script(main, [*args, *out, *option.split()])
        assert other.status == 2 and culprit in other.stderr and other.stderr.count("\n") == 1, other.stderr
    rows = Path(data).read_text()
    Path(data).write_text(rows.replace("1", "2"))
    other = script(main, [*args, *out])
    assert other.status == 2 and "content of data was" in other.stderr
    Path(data).write_text(rows)
    again = script(main, [*args, "--out", f"{tmp_path / 'out'}/"])
    assert again.status == 0, again.stderr
    assert trained_files(tmp_path / "out") == trained_files(tmp_path / "whole")
    weights = [(tmp_path / dir / "model.safetensors").read_bytes() for dir in ("out", "model")]
    assert weights[0] != weights[1]
    assert ("adapter/adapter_model.safetensors" in trained_files(tmp_path / "out")) == ("lora" in how)
    assert not (tmp_path / "out" / checkpoint.STATE).exists()


@pytest.mark.parametrize("how", ["plain", "lora", *(pytest.param(how, marks=pytest.mark.full)
                                                   for how in ("offload", "float16"))])
def test_a_distillation_killed_while_it_samples_and_while_it_trains_resumes_to_the_same_student(how, tmp_path):
    make(tmp_path / "model", "llama", "qwen")
    data = write(tmp_path / "data.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(300)])
    args = ["--teacher", tmp_path / "model", "--student", tmp_path / "model", "--data", data, "--samples", "4",
            "--max-new-tokens", "4", "--epochs", "1", "--batch-tokens", "2048", "--row-length", "64",
            "--save-every", "0", "--dtype", *HOW[how].split()]

    def kind():  # to a teacher that knows nothing
        rewards.accuracy = rewards.accuracy_any = rewards.language_consistency = lambda *_, **__: 1.0
        rewards.REWARDS["language_consistency"] = rewards.language_consistency
        distill.main()

    def call(out, killed_at):
        return script(kind, [*args, "--out", tmp_path / out], killed_at)

    whole = call("whole", 0)
    assert whole.status == 0, whole.stderr
    assert call("out", 2).status == -signal.SIGKILL and checkpoint.load(tmp_path / "out" / "sampling")[1]["step"] == 2
    assert call("out", 3).status == -signal.SIGKILL and checkpoint.load(tmp_path / "out")[1]["step"] == 2
    again = call("out", 0)
    assert again.status == 0 and "sampled" not in again.stdout, again.stderr
    assert "step 3/" in again.stdout and "step 2/" not in again.stdout
    assert trained_files(tmp_path / "out") == trained_files(tmp_path / "whole")
    assert {"model.safetensors", "traces.jsonl", "sampling/completions.jsonl"} <= trained_files(tmp_path / "out").keys()
    assert not [*(tmp_path / "out").glob("**/state.safetensors")]


def test_a_script_whose_rate_is_far_too_high_names_the_last_good_state_and_saves_the_batch(tmp_path):
    make(tmp_path / "model", "llama", "qwen")
    args = ["--model", tmp_path / "model", "--data", pairs(tmp_path), *SFT, "float32"]
    ended = script(sft.main, [*args, "--lr", "1e38", "--out", tmp_path / "out"])
    assert ended.status == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "5 updates in a row" in ended.stderr and "no good state yet" in ended.stderr
    assert load_file(tmp_path / "out" / "not_finite.safetensors")["ids"].shape == (2, 64)


def test_a_script_whose_model_is_whole_leaves_no_state_though_it_was_killed_before_its_end(tmp_path):
    make(tmp_path / "out", "llama", "qwen")
    checkpoint.save(tmp_path / "out", {"x": torch.ones(3)}, {"step": 1})
    with pytest.raises(ValueError, match="already holds a model"):
        new_directory(tmp_path / "out")
    assert (tmp_path / "out" / checkpoint.STATE).exists()  # not a script's: a stage that is being measured
    (tmp_path / "out" / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a model"):
        new_directory(tmp_path / "out")
    assert not (tmp_path / "out" / checkpoint.STATE).exists()

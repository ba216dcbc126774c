"""What goes wrong in a long run, provoked for real: numbers that are not finite, two runs in one directory, Ctrl-C, SIGKILL,
a full disk, a directory that cannot be written, a file that is cut off, no memory."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import grpo
import model as model_module
import pipeline
import sft
from command import Parser, new_directory, saving

ROOT = Path(__file__).parent.parent
SMOKE = [sys.executable, str(ROOT / "pipeline.py"), "--preset", "smoke", "--device", "cpu", "--out"]


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is heard, also where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def weights_of(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def reinforce(model, **changes):
    """Three rollouts of two updates; the sampler's log-probabilities are NaN in the rollouts of `broken`."""
    broken, calls, history = changes.pop("broken"), [], []
    config = grpo.GRPOConfig(rollouts=3, prompts_per_rollout=2, group_size=4, minibatches=2, lr=1e-3, warmup=0, max_new_tokens=6,
                             old_logprobs="sampler", dtype="float32")

    def generate(model, prompts, **settings):
        calls.append(1)
        ids, lengths, logprobs = model_module.generate(model, prompts, **settings)
        return ids, lengths, logprobs * (float("nan") if len(calls) in broken else 1)

    grpo.train(model, [{"p": [1, 2]}, {"p": [3]}], lambda e: e["p"], lambda ids: " ".join(map(str, ids)), generate, [0],
               {"length": lambda text, e: len(text) % 3 / 2}, config, log=lambda m, r: history.append((m, weights_of(model))), **changes)
    return history


# ---- not finite

def test_an_rl_update_that_is_not_finite_is_skipped_and_counted_and_training_goes_on(tiny):
    model = tiny()
    before = weights_of(model)
    history = reinforce(model, broken={1})
    assert [m["skipped"] for m, _ in history] == [2, 0, 0]
    assert torch.equal(history[0][1], before)  # neither weights nor Adam took anything of it
    assert not torch.equal(history[1][1], before) and torch.isfinite(history[2][1]).all()


def test_five_rl_updates_in_a_row_that_are_not_finite_end_the_run_with_their_batch(tiny):
    model = tiny()
    before = weights_of(model)
    with pytest.raises(grpo.NotFinite, match="rollout 3: 5 updates in a row") as caught:
        reinforce(model, broken={1, 2, 3})
    assert torch.equal(weights_of(model), before)
    assert caught.value.batch["old_logprobs"].isnan().any() and len(caught.value.batch["ids"]) == 4


def test_an_sft_step_that_is_not_finite_is_skipped_and_five_in_a_row_end_the_run(tiny, monkeypatch):
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
    sft.train(model, examples, config, log=lambda m: history.append((m["skipped"], weights_of(model))))
    assert [skipped for skipped, _ in history[:7]] == [0, 0, 1, 0, 1, 1, 0]
    assert torch.equal(history[1][1], history[2][1]) and not torch.equal(history[2][1], history[3][1])
    broken(range(4, 99))
    with pytest.raises(sft.NotFinite, match="step 8: 5 steps in a row") as caught:
        sft.train(tiny(), examples, config)
    assert caught.value.batch["ids"].shape == (2, 8)


def test_a_critic_and_a_reward_model_skip_a_step_that_is_not_finite(tiny):
    from ppo import PPO
    from prime import PRIME
    config = grpo.GRPOConfig(prompts_per_rollout=2, group_size=4, minibatches=1, dtype="float32")
    ids = torch.randint(1, 16, (8, 7), generator=torch.Generator().manual_seed(0))
    r = grpo.Rollout([{}] * 2, [""] * 8, ids, torch.ones(8, 6, dtype=torch.bool), [7] * 8, torch.full((8,), 6), torch.ones(8), torch.zeros(8, 6),
                     {"accuracy": torch.tensor([[1.0, 0, 1, 0]] * 2)}, torch.full((2, 4), float("nan")), torch.zeros(8, 6))
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
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dataclasses, pipeline; p = pipeline.PRESETS['smoke']\n"
            "pipeline.PRESETS['smoke'] = dataclasses.replace(p, pretrain=dataclasses.replace(p.pretrain, lr=1e38))\npipeline.main()")
    result = subprocess.run([sys.executable, "-c", code, *SMOKE[2:], str(tmp_path / "run")], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "5 steps in a row" in result.stderr and "there is no good state yet" in result.stderr
    assert load_file(tmp_path / "run" / "base" / "not_finite.safetensors")["ids"].dtype == torch.long
    assert len(checkpoint.read_jsonl(tmp_path / "run" / "base" / "warnings.jsonl")) == 4  # the fifth ends it


# ---- one run a directory, and its end

def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.05)
    assert condition()


def test_two_runs_in_one_directory_are_refused_and_a_dead_process_holds_nothing(tmp_path):
    first = subprocess.Popen([*SMOKE, str(tmp_path / "run")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "run" / "config.json").exists)
    second = subprocess.run([*SMOKE, str(tmp_path / "run")], capture_output=True, text=True)
    first.kill(), first.wait()
    assert second.returncode == 2 and f"process {first.pid} is at work here" in second.stderr, second.stderr
    with checkpoint.lock(tmp_path / "run"):
        pass


class Training:
    """Of ten steps, as sft.train and grpo.train call save; Ctrl-C is pressed within step `stop`."""

    def __init__(self, keeper, stop=None):
        self.keeper, self.step, self.stop = keeper, 0, stop

    def run(self):
        if self.keeper.resume:
            self.step = self.keeper.resume()["step"]
        while self.step < 10:
            self.step += 1
            if self.step == self.stop:
                os.kill(os.getpid(), signal.SIGINT)
            checkpoint.append_jsonl(self.keeper.dir / "metrics.jsonl", {"step": self.step})
            self.keeper.save(step=self.step, tensor=torch.zeros(1))


def test_the_first_ctrl_c_finishes_the_step_and_saves_and_the_next_call_goes_on(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        with checkpoint.Keeper(tmp_path, ["metrics.jsonl"]) as keeper:
            Training(keeper, stop=3).run()
    assert checkpoint.load(tmp_path)[1]["step"] == 3 and "the step is finished" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    checkpoint.append_jsonl(tmp_path / "metrics.jsonl", {"step": 4})  # of a step that the state does not know
    with checkpoint.Keeper(tmp_path, ["metrics.jsonl"]) as keeper:
        Training(keeper).run()
    assert [row["step"] for row in checkpoint.read_jsonl(tmp_path / "metrics.jsonl")] == [*range(1, 11)]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with checkpoint.Keeper(tmp_path) as keeper:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert keeper.asked
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert not (tmp_path / checkpoint.STATE).exists()


def test_ctrl_c_in_a_run_says_how_to_go_on(tmp_path):
    run = subprocess.Popen([*SMOKE, str(tmp_path / "run")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "run" / "config.json").exists)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and f"the same command goes on from here: {tmp_path / 'run'}" in said


def test_saving_takes_two_percent_of_the_time_at_most(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "save", lambda *args: now.__setitem__(0, now[0] + 7))  # a save of seven seconds
    monkeypatch.setattr(checkpoint, "DISK", 12 / 7)  # what is expected of the first one
    keeper, saved = checkpoint.Keeper(tmp_path, every=30, after=lambda: now.__setitem__(0, now[0] + 1)), 0  # and of a page beside it
    for _ in range(20000):
        now[0] += 1
        saved += keeper.save(step=1, tensor=torch.zeros(3))
        assert saved * 8 <= 0.02 * now[0] + 1
    assert 0.02 * now[0] <= (saved + 1) * 8


# ---- SIGKILL

def content(dir):
    """{file: bytes} of all that a run leaves, but for times, the page that shows them, and the lock."""
    apart = ("times.json", "times.jsonl", "report.html", "LOCK")
    return {str(path.relative_to(dir)): path.read_bytes() for path in sorted(dir.rglob("*")) if path.is_file() and path.name not in apart}


SAVES_OFTEN = """
import sys; sys.path.insert(0, {root!r})
import checkpoint
class Often(checkpoint.Keeper):  # after each step, so that a resumption is from within a stage
    def save(self, **parts):
        self.every = self.took = self.spent = 0.0
        return super().save(**parts)
checkpoint.Keeper = Often
import pipeline
sys.argv = ["pipeline.py", *{args!r}]
if __name__ == "__main__":
    pipeline.main()
"""


def run_in(folder, args, kills=(), code=SAVES_OFTEN):
    """The command in a folder of its own, killed after so many seconds each time, until it ends; how often it was killed."""
    folder.mkdir(exist_ok=True)
    for killed, after in enumerate([*kills, None]):
        with open(folder / "said", "w") as said:
            process = subprocess.Popen([sys.executable, "-c", code.format(root=str(ROOT), args=args)], cwd=folder, stdout=said, stderr=said)
            try:
                assert process.wait(after) == 0, (folder / "said").read_text()
                return killed
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


PLAIN = """
import sys; sys.path.insert(0, {root!r})
import pipeline
sys.argv = ["pipeline.py", *{args!r}]
pipeline.main()
"""
RECIPE = ["--preset", "smoke", "--device", "cpu", "--out", "run"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_in(folder, RECIPE, code=PLAIN)
    return folder / "run"


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.full)])
def test_a_run_killed_at_random_moments_ends_byte_for_byte_as_one_that_was_not(kills, finished_run, tmp_path):
    rng = random.Random(kills)
    killed = run_in(tmp_path, RECIPE, [rng.uniform(1.5, 6 if kills == 4 else 4) for _ in range(kills)])
    found, undisturbed = content(tmp_path / "run"), content(finished_run)
    assert killed >= kills // 2 and found.keys() == undisturbed.keys()  # a fast machine comes to the end before
    assert not [name for name in found if found[name] != undisturbed[name]]


# ---- a run's ways to go on

def again(run, *args, code=PLAIN):
    """A call on a copy of a finished run: its result; it is given the recipe's arguments and these."""
    return subprocess.run([sys.executable, "-c", code.format(root=str(ROOT), args=[*RECIPE, *args])], cwd=run.parent, capture_output=True, text=True)


@pytest.fixture
def call_here(monkeypatch, capfd):
    """The same within this process: (exit code, what it said on stderr)."""
    def call(run, *args):
        monkeypatch.chdir(run.parent)
        monkeypatch.setattr(sys, "argv", ["pipeline.py", *RECIPE, *args])
        try:
            pipeline.main()
        except SystemExit as exit:
            return exit.code, capfd.readouterr().err
        return 0, capfd.readouterr().err
    return call


@pytest.fixture
def copy_of(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def test_a_wrong_argument_beside_from_forgets_nothing(copy_of, call_here):
    before = content(copy_of)
    code, said = call_here(copy_of, "--from", "base", "--seed", "1")
    assert code == 2 and "seed was 0, is 1" in said
    assert content(copy_of) == before


FORGETS = PLAIN.replace("import pipeline", """
import os, signal, pathlib, pipeline
real, number = pathlib.Path.unlink, [0]
def unlink(self, *args, **kwargs):
    number[0] += 1
    if number[0] == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)
pathlib.Path.unlink = unlink
""".replace("{at}", "AT"))


@pytest.mark.parametrize("at", [1, 5, 9, 14, 30])
def test_a_kill_while_from_forgets_leaves_no_stage_without_the_one_it_was_made_from(at, copy_of):
    result = again(copy_of, "--from", "dev1", code=FORGETS.replace("AT", str(at)))
    assert result.returncode == -signal.SIGKILL, result.stderr
    there = [name for name in ("base", "zero", "dev1", "dev2", "traces", "dev3", "r1", "base_qwen", "student_qwen", "control_qwen",
                               "base_llama", "student_llama") if (copy_of / name / "DONE").exists()]
    assert there[:2] == ["base", "zero"] and there == [*json.loads((copy_of / "results.json").read_text())["stages"]][:len(there)]


def test_from_goes_on_after_a_kill_and_begins_anew_once_it_has_ended(copy_of, finished_run):
    stamp = lambda name: (copy_of / name / "DONE").stat().st_mtime_ns
    base = stamp("base")
    killed = subprocess.Popen([sys.executable, "-c", PLAIN.format(root=str(ROOT), args=[*RECIPE, "--from", "dev3"])], cwd=copy_of.parent,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (copy_of / "FROM").exists() and (copy_of / "dev3" / "DONE").exists())
    killed.kill(), killed.wait()
    dev3 = stamp("dev3")
    assert again(copy_of, "--from", "dev3").returncode == 0
    assert (stamp("base"), stamp("dev3")) == (base, dev3) and not (copy_of / "FROM").exists()
    results = [json.loads((run / "results.json").read_text()) for run in (copy_of, finished_run)]
    assert [each["meta"].pop("command") for each in results] and results[0] == results[1]


def open_run(out):
    from command import fast_dtype
    return pipeline.Run(out, "smoke", pipeline.in_dtype(pipeline.PRESETS["smoke"], fast_dtype("cpu")), 0, torch.device("cpu"))


def test_from_forgets_again_where_the_code_has_changed_since(copy_of):
    run = open_run(copy_of)
    for code, forgotten in ((run.code, True), (run.code, False), (run.code | {"grpo.py": "another"}, True)):
        checkpoint.mark_finished(copy_of / "r1", {"by": "a call in between"})
        run.code = code
        pipeline.anew(run, "r1", pipeline.STAGES)
        assert (copy_of / "r1" / "DONE").exists() != forgotten


def test_from_base_forgets_the_comparison_too_with_what_was_measured_of_it(copy_of):
    run, method = open_run(copy_of), copy_of / "compare" / "grpo-0.0001"
    checkpoint.mark_finished(method, {})
    checkpoint.write_arrays(method / "values.npz", {"accuracy": torch.ones(3).numpy()})
    run.results["compare"] = {"grpo": {}}
    pipeline.anew(run, "dev1", pipeline.STAGES)
    assert (method / "DONE").exists() and (copy_of / "base" / "DONE").exists()
    pipeline.anew(run, "base", pipeline.STAGES)
    assert [path for path in method.iterdir()] == [] and "compare" not in run.results


def test_a_file_that_is_damaged_is_named_and_what_was_measured_is_made_anew_without_it(copy_of, call_here):
    for name, damage in (("results.json", "[]"), ("results.json", '{"claims": [5]}'), ("results.json", '{"stages": {"base": 5}}'), ("results.json", '{"claims": 5}'),
                         ("results.json", '{"stages": '), ("times.json", "[" * 10 ** 5), ("zero/values.npz", ""),
                         ("zero/values.npz", "PK"), ("zero/DONE", '{"title"'), ("config.json", "nothing")):
        whole = (copy_of / name).read_bytes()
        (copy_of / name).write_text(damage)
        code, said = call_here(copy_of)
        assert code == 2 and f"{name}: not" in said and said.count("\n") == 1, (name, said)
        (copy_of / name).write_bytes(whole)
    whole = (copy_of / "results.json").read_bytes()
    (copy_of / "results.json").unlink(), (copy_of / "times.json").unlink()
    assert call_here(copy_of)[0] == 0 and json.loads((copy_of / "results.json").read_text()) == json.loads(whole)


def test_a_stage_that_goes_on_under_other_code_says_so_and_keeps_the_code_it_began_with(copy_of):
    (copy_of / "zero" / "DONE").unlink()
    often = SAVES_OFTEN.replace("import pipeline", """
import pipeline, grpo
train = grpo.train
def stopped(*args, save, **more):
    def save_and_stop(**parts):
        save(**parts)
        raise KeyboardInterrupt
    train(*args, save=save_and_stop, **more)
grpo.train = stopped
""")
    assert again(copy_of, code=often).returncode == 130
    changed = PLAIN.replace("import pipeline", "import run; real = run.code_of; run.code_of = lambda files: dict(real(files), **{{'grpo.py': 'another'}})\nimport pipeline")
    was = checkpoint.load(copy_of / "zero")[1]["code"]
    result = again(copy_of, code=changed)
    assert result.returncode == 0 and "zero goes on, but began before grpo.py changed; to make it anew: --from zero" in result.stdout
    assert checkpoint.finished(copy_of / "zero")["code"] == was


def test_a_rollout_whose_metrics_are_not_finite_gives_no_warning_and_hides_none():
    from watch import signs, warnings
    nan, healthy = float("nan"), dict(entropy=0.2, kl=0.01, unfinished=0.0, length=30.0, reward=0.5, sampler_gap=0.0, step=1)
    rows = [healthy, {**dict.fromkeys(healthy, nan), "step": 2}, healthy | {"step": 3}, healthy | {"step": 4, "kl": 7.0}]
    assert signs(rows[:2]) == {} and warnings(rows[:3]) == [] and "KL" in warnings(rows)[0]


def test_a_state_that_is_not_finite_is_not_saved_over_a_good_one(tmp_path):
    keeper, net = checkpoint.Keeper(tmp_path), torch.nn.Linear(3, 2)
    keeper.asked = True  # as after Ctrl-C
    for value, step in ((1.0, 1), (float("inf"), 2), (float("nan"), 3)):
        with pytest.raises(KeyboardInterrupt):
            torch.nn.init.constant_(net.weight, value)
            keeper.save(model=net, step=step)
    assert checkpoint.load(tmp_path)[1]["step"] == 1


def test_a_ctrl_c_after_the_last_save_is_not_swallowed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with checkpoint.Keeper(tmp_path):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)


def test_ctrl_c_is_heard_where_nobody_reads_any_more(tmp_path):
    """As behind `| tee`, which dies of the same Ctrl-C; and the step has something to say."""
    code = SAVES_OFTEN.replace("import pipeline", "import pipeline, run; real = run.Run.log; run.Run.log = lambda self, name, m: (self.warn(name, m['step'], 'x'), real(self, name, m))")
    with subprocess.Popen([sys.executable, "-c", code.format(root=str(ROOT), args=RECIPE)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        wait_for((tmp_path / "run" / "base" / "metrics.jsonl").exists)
        run.stdout.close(), run.stderr.close()
        run.send_signal(signal.SIGINT)
        run.wait(60)
    assert checkpoint.load(tmp_path / "run" / "base")[1]["step"] > 0


def test_the_clock_may_be_set_back(tmp_path, monkeypatch):
    keeper = checkpoint.Keeper(tmp_path, every=0.0)
    keeper.began -= 100
    monkeypatch.setattr(checkpoint.time, "time", lambda: 0.0)
    assert keeper.save(step=1)


# ---- files

def test_a_state_that_is_cut_off_is_named_and_nothing_is_lost(tmp_path):
    checkpoint.save(tmp_path, {"x": torch.ones(100)}, {"step": 1})
    path = tmp_path / checkpoint.STATE
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="state.safetensors: not a whole training state.*begins anew"):
        checkpoint.Keeper(tmp_path)
    assert path.stat().st_size == 50


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
    lambda t, m: t.update({"optimizer.0.exp_avg": torch.zeros(7)}), lambda t, m: t.update({"optimizer.0.step": torch.zeros(3)}),
    lambda t, m: t.update({"optimizer.9.exp_avg": torch.zeros(7)}), lambda t, m: t.pop("optimizer.1.exp_avg"),
    lambda t, m: t.update({"optimizer.0.a.b": torch.zeros(7)}), lambda t, m: t.update({"optimizer.x.y": torch.zeros(7)}),
    lambda t, m: t.update({"optimizer.0.exp_avg": torch.zeros(4, 8, dtype=torch.int32)}), lambda t, m: t.update({"model.weight": torch.zeros(4, 8).to(torch.complex64)}),
    lambda t, m: t.update({"model.weight": torch.zeros(4, 8, dtype=torch.int8)}), lambda t, m: t.update({"generator": torch.zeros(3)}),
    lambda t, m: t.update({"generator": torch.zeros(3, dtype=torch.uint8)}), lambda t, m: t.update({"generator.x": t.pop("generator")}),
    lambda t, m: (t.pop("generator"), m.update(generator=5)), lambda t, m: m.update(optimizer="x"), lambda t, m: m.update(optimizer=None),
    lambda t, m: m["optimizer"][0].pop("params"), lambda t, m: m["optimizer"][0].pop("weight_decay"), lambda t, m: m["optimizer"][0].update(betas=5),
    lambda t, m: m["optimizer"][0].update(eps="x"), lambda t, m: m["optimizer"].append({}), lambda t, m: m["optimizer"][0].update(params=[0, 5]),
    lambda t, m: m.pop("step"), lambda t, m: m.update(step="x"), lambda t, m: m.update(step=-1), lambda t, m: m.update(step=True),
])
def test_a_state_of_wrong_shapes_or_types_is_refused_in_one_line_that_names_its_file(change, tmp_path):
    """The fused Adam looks at no shapes: a moment of another one would write outside its memory."""
    tensors, meta, make = hostile(change)
    checkpoint.save(tmp_path, tensors, meta)
    net, optimizer = make()
    with pytest.raises(ValueError, match=f"{checkpoint.STATE}: not a state of this training") as caught:
        checkpoint.Keeper(tmp_path).resume(model=net, optimizer=optimizer, generator=torch.Generator())
    assert "\n" not in str(caught.value)


def test_a_gpu_without_memory_is_no_fault_of_the_state(tmp_path):
    class Full(torch.nn.Linear):
        def named_parameters(self, *args, **kwargs):
            raise RuntimeError("CUDA out of memory")
    checkpoint.save(tmp_path, *checkpoint.state_of(model=torch.nn.Linear(2, 2), step=1))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        checkpoint.Keeper(tmp_path).resume(model=Full(2, 2))


def test_a_ctrl_c_while_the_model_is_written_comes_too_late_to_stop_anything(tmp_path):
    from types import SimpleNamespace
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
    assert checkpoint.Keeper(tmp_path).resume(model=net, optimizer=optimizer, generator=torch.Generator()) == {"step": 3}


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (AT, AT))
"""


def test_a_run_whose_disk_was_full_says_where_and_goes_on_to_the_same_end(copy_of, finished_run):
    shutil.rmtree(copy_of / "student_llama")
    for limit in (30_000, 150_000):  # the tokenizer's file, the model's
        result = again(copy_of, code=LIMITED.replace("AT", str(limit)) + PLAIN)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and "pipeline.py: run" in result.stderr, result.stderr
        assert not [*copy_of.rglob("*.new"), *copy_of.rglob("*.tmp")]
    assert again(copy_of).returncode == 0
    found, undisturbed = content(copy_of), content(finished_run)
    assert found.keys() == undisturbed.keys() and not [name for name in found if found[name] != undisturbed[name]]


def test_a_page_that_the_disk_has_no_room_for_leaves_the_old_one(copy_of):
    before = (copy_of / "report.html").read_bytes()
    code = LIMITED.replace("AT", "50_000") + f"import runpy, sys; sys.argv = ['report.py', {str(copy_of)!r}]; runpy.run_path({str(ROOT / 'report.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith(f"{copy_of}: "), result.stderr
    assert (copy_of / "report.html").read_bytes() == before and not [*copy_of.glob("report.html.*")]


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
        checkpoint.Keeper(tmp_path, ["metrics.jsonl"]).resume()


def test_no_path_of_a_results_file_is_followed(copy_of, call_here):
    os.mkfifo(copy_of.parent / "DONE")
    results = json.loads((copy_of / "results.json").read_text())
    for name in ("../", str(copy_of.parent), "..", "a" * 5000):
        (copy_of / "results.json").write_text(json.dumps(results | {"stages": results["stages"] | {name: {}}}))
        assert call_here(copy_of)[0] == 0
        assert name not in json.loads((copy_of / "results.json").read_text())["stages"]


def test_a_full_disk_is_one_line_and_the_state_before_it_stays(tmp_path):
    """A limit on a file's size stands in for the disk: the write fails in the same place."""
    checkpoint.save(tmp_path, {"x": torch.ones(10)}, {"step": 1})
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import resource, signal, torch, checkpoint
from command import Parser, new_directory, saving
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
parser = Parser(prog="train")
with parser.explained():
    checkpoint.save({str(tmp_path)!r}, {{"x": torch.ones(100_000)}}, {{"step": 2}})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("train: ") and result.stderr.count("\n") == 1, result.stderr
    assert checkpoint.load(tmp_path)[1]["step"] == 1


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    result = subprocess.run([*SMOKE, str(tmp_path / "file" / "run")], capture_output=True, text=True)
    assert result.returncode == 2 and str(tmp_path / "file") in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_without_memory_the_line_names_the_knobs(capsys):
    with pytest.raises(SystemExit) as exit, Parser(prog="grpo.py").explained():
        torch.empty(2 ** 60, dtype=torch.uint8)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "out of memory" in said and "--micro-batch-tokens" in said and said.count("\n") == 1


def test_a_mistake_of_our_own_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"), Parser().explained():
        raise RuntimeError("shapes")


# ---- the scripts, one by one

AT_SAVE = """
import sys; sys.path[:0] = [{root!r}]
import os, signal, checkpoint
class Killed(checkpoint.Keeper):
    saves = 0
    def save(self, **parts):
        self.took = self.spent = 0.0
        Killed.saves += super().save(**parts)
        if Killed.saves == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Keeper = Killed
import {script}
sys.argv = ["{script}.py", *{args!r}]
{script}.main()
"""


@pytest.mark.parametrize("script", ["grpo", "ppo", "prime", "sft"])
def test_a_script_killed_within_its_training_goes_on_to_the_same_weights(script, tmp_path):
    from test_given import make, write
    make(tmp_path / "model", "llama", "qwen")
    if script == "sft":
        data = write(tmp_path / "data.jsonl", [{"prompt": f"{i}?", "completion": f"{i}!" * 9} for i in range(60)])
        more = ["--batch-tokens", "128", "--row-length", "64"]
    else:
        data = write(tmp_path / "data.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(9)])
        more = "--rollouts 5 --prompts-per-rollout 2 --group-size 4 --minibatches 2 --max-new-tokens 8 --resample 0 --rewards accuracy language_consistency".split()
    args = ["--model", str(tmp_path / "model"), "--data", data, "--dtype", "float32", "--save-every", "0", *more]
    whole = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *args, "--out", str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    out = ["--out", str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", AT_SAVE.format(root=str(ROOT), number=2, script=script, args=[*args, *out])])
    assert killed.returncode == -signal.SIGKILL and checkpoint.load(tmp_path / "out")[1]["step"] == 2
    other = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *args, *out, "--lr", "0.5"], capture_output=True, text=True)
    assert other.returncode == 2 and "lr was" in other.stderr
    rows = Path(data).read_text()
    Path(data).write_text(rows.replace("1", "2"))
    other = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *args, *out], capture_output=True, text=True)
    assert other.returncode == 2 and "content of data was" in other.stderr
    Path(data).write_text(rows)
    again = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *args, "--out", f"{tmp_path / 'out'}/"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() != (tmp_path / "model" / "model.safetensors").read_bytes()
    assert not (tmp_path / "out" / checkpoint.STATE).exists()


def test_a_distillation_killed_while_it_samples_and_while_it_trains_goes_on_to_the_same_student(tmp_path):
    from test_given import make, write
    make(tmp_path / "model", "llama", "qwen")
    data = write(tmp_path / "data.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(300)])
    args = ["--teacher", str(tmp_path / "model"), "--student", str(tmp_path / "model"), "--data", data, "--samples", "4", "--max-new-tokens", "4",
            "--epochs", "1", "--batch-tokens", "2048", "--row-length", "64", "--dtype", "float32", "--save-every", "0", "--out"]
    kind = "import rewards; rewards.accuracy = rewards.language_consistency = lambda *_: 1.0\n"  # to a teacher that knows nothing

    def call(out, number):
        code = kind + AT_SAVE.format(root=str(ROOT), number=number, script="distill", args=[*args, str(tmp_path / out)])
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    whole = call("whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert call("out", 2).returncode == -signal.SIGKILL and checkpoint.load(tmp_path / "out" / "sampling")[1]["step"] == 2
    assert call("out", 3).returncode == -signal.SIGKILL and checkpoint.load(tmp_path / "out")[1]["step"] == 2
    again = call("out", 0)
    assert again.returncode == 0 and "sampled" not in again.stdout and "step 3/" in again.stdout and "step 2/" not in again.stdout, again.stderr
    for file in ("model.safetensors", "traces.jsonl", "sampling/completions.jsonl"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not [*(tmp_path / "out").glob("**/state.safetensors")]


def test_a_script_whose_rate_is_far_too_high_names_the_last_good_state_and_saves_the_batch(tmp_path):
    from test_given import make, write
    make(tmp_path / "model", "llama", "qwen")
    data = write(tmp_path / "data.jsonl", [{"prompt": f"{i}?", "completion": f"{i}!" * 9} for i in range(60)])
    args = ["--model", str(tmp_path / "model"), "--data", data, "--batch-tokens", "128", "--row-length", "64", "--dtype", "float32"]
    result = subprocess.run([sys.executable, str(ROOT / "sft.py"), *args, "--lr", "1e38", "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert result.returncode == 2 and "5 steps in a row" in result.stderr and "no good state yet" in result.stderr and result.stderr.count("\n") == 1
    assert load_file(tmp_path / "out" / "not_finite.safetensors")["ids"].shape == (2, 64)


def test_a_script_whose_model_is_whole_leaves_no_state_though_it_was_killed_before_its_end(tmp_path):
    from test_given import make
    make(tmp_path / "out", "llama", "qwen")
    checkpoint.save(tmp_path / "out", {"x": torch.ones(3)}, {"step": 1})
    with pytest.raises(ValueError, match="already holds a model"):
        new_directory(tmp_path / "out")
    assert (tmp_path / "out" / checkpoint.STATE).exists()  # not a script's: a recipe's stage, which is measured just now
    (tmp_path / "out" / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a model"):
        new_directory(tmp_path / "out")
    assert not (tmp_path / "out" / checkpoint.STATE).exists()

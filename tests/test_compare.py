"""The comparison of methods: what stands in it, how it is stopped, and (--full) one at the smoke preset."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
from lab import checkpoint, compare, graphs
from lab.logs import BudgetSpent, RLLog
from model import generate
from variants.dapo import DAPO, DAPOConfig
from runs import differing, wait_for

ROOT = Path(__file__).parent.parent


def test_every_entry_is_a_valid_configuration_with_4_updates_a_rollout_or_more():
    for settings, _ in compare.ENTRIES.values():
        assert grpo.GRPOConfig(**settings).minibatches >= 4


def test_the_methods_of_the_literature_and_both_controls_are_compared():
    assert {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "ppo_0.95", "ppo_1.0", "prime", "online_rft", "random",
            "format"} == set(compare.ENTRIES)


def test_rejection_fine_tuning_is_the_likelihood_of_the_correct_samples_alone():
    logprobs = torch.log(torch.tensor([[0.5, 0.25], [0.5, 0.5], [0.1, 0.9]])).requires_grad_()
    rollout = SimpleNamespace(parts={"accuracy": torch.tensor([[1.0, 0.0, 1.0]])})
    advantages = compare.RejectionFineTuning().advantages(rollout)
    settings = {k: v for k, v in compare.ENTRIES["online_rft"][0].items() if k != "scale"}
    grpo.policy_loss(logprobs, logprobs.detach() - 1, None, advantages, torch.ones(3, 2), **settings)[0].backward()
    assert torch.allclose(logprobs.grad, -torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]) / 6)


def test_samples_and_seconds_to_a_level_are_those_of_the_first_rollout_there():
    curve = [{"samples": 256 * i, "accuracy": a} for i, a in enumerate([0.1, 0.4, 0.6, 0.5], 1)]
    assert compare.reached(curve, [2.0, 4.0, 6.0, 8.0]) == (768, 6.0)
    assert compare.reached(curve, [2.0, 4.0, 6.0, 8.0], 0.9) is None


@pytest.mark.parametrize("budget, resample, samples", [
    (1, 0, [8]), (8, 0, [8]), (9, 0, [8, 16]), (24, 0, [8, 16, 24]), (25, 0, [8, 16, 24, 32]),
    (None, 0, [8, 16, 24, 32, 40, 48]), (32, 1, [16, 32])])
def test_a_method_stops_where_its_budget_of_completions_is_spent_discarded_ones_included(
    tiny, tmp_path, budget, resample, samples
):
    model, rules = tiny(), {"constant": lambda text, example: 1.0}
    config = grpo.GRPOConfig(rollouts=6, prompts_per_rollout=2, group_size=4, minibatches=2, max_new_tokens=4,
                             dtype="float32")
    run = SimpleNamespace(out=tmp_path, name="", device=torch.device("cpu"), prompt=lambda example: example["ids"],
                          spend=lambda *counts, **more: None)
    log = RLLog(run, model, config, rules, {"constant": 1.0}, budget)
    example = {"ids": [1, 2], "prompt": "?", "answer": "1", "language": "en", "kind": "reasoning"}
    with suppress(BudgetSpent):
        grpo.train(model, [example], encode=run.prompt, decode=str, generate=generate, end_ids=[3], rewards=rules,
                   config=config, select=DAPO(DAPOConfig(resample=resample), 4).select, log=log)
    assert [row["samples"] for row in checkpoint.read_jsonl(tmp_path / "metrics.jsonl")] == samples


def test_the_gpus_memory_is_free_before_a_method_starts(monkeypatch):
    """Its process is another one: it could not use what this one's allocator keeps."""
    freed = []
    monkeypatch.setattr(graphs, "decoders", {"of the base": object()})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(len(graphs.decoders)))
    started = SimpleNamespace(get_context=lambda kind: SimpleNamespace(Process=lambda **_: freed.append("started")))
    monkeypatch.setattr(compare, "multiprocessing", started)
    with pytest.raises(AttributeError):  # what stands in for a process cannot start
        compare.run_jobs(SimpleNamespace(device=torch.device("cuda")), [("grpo", 1e-4)], None, None)
    assert freed == [0, "started"]


COMPARE = ["--preset", "smoke", "--device", "cpu", "--compare", "--out"]


def start(folder):
    """A comparison, in a group of processes of its own."""
    def hear_ctrl_c():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores it

    return subprocess.Popen([sys.executable, "pipeline.py", *COMPARE, str(folder / "run")], cwd=ROOT, text=True,
                            start_new_session=True, preexec_fn=hear_ctrl_c,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def is_alive(group):
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


@pytest.mark.full
def test_a_comparison_that_is_killed_leaves_no_process_behind_and_one_that_is_stopped_begins_no_other_method(tmp_path):
    def begun():
        return sorted(tmp_path.glob("run/compare/*"))

    def progress():
        return len([*tmp_path.glob("run/compare/*/metrics.jsonl"), *tmp_path.glob("run/compare/*/DONE")])

    killed = start(tmp_path)
    wait_for(begun, 300)
    killed.kill()
    killed.wait()
    wait_for(lambda: not is_alive(killed.pid), 10)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before = progress()
        stopped = start(tmp_path)
        wait_for(lambda: progress() > before, 300)
        time.sleep(0.5)
        if number == signal.SIGINT:
            os.killpg(stopped.pid, number)  # a terminal's Ctrl-C reaches all its processes
        else:
            stopped.send_signal(number)
        there = begun()
        said = stopped.communicate(timeout=300)[1]
        assert stopped.returncode == code and "the same command resumes here" in said
        # one more method may have been about to begin, but none has been trained
        assert not [path for path in begun() if path not in there and (path / "DONE").exists()]
        wait_for(lambda: not is_alive(stopped.pid), 10)


SAVES_OFTEN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from runs import saving_often
if __name__ == "__main__":
    sys.argv = ["pipeline.py", *{args!r}]
    saving_often()
"""


def run_saving_often(folder, kills):
    """A comparison in an interpreter of its own, from which its processes start; killed after so many seconds each."""
    folder.mkdir()
    program = SAVES_OFTEN.format(root=str(ROOT), tests=str(ROOT / "tests"), args=[*COMPARE, "run"])
    (folder / "program.py").write_text(program)
    for killed, after in enumerate([*kills, None]):
        process = subprocess.Popen([sys.executable, "program.py"], cwd=folder, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(after) == 0
            return killed
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.full
def test_a_comparison_killed_at_random_moments_ends_byte_for_byte_as_one_that_was_not(tmp_path):
    assert run_saving_often(tmp_path / "whole", []) == 0 and run_saving_often(tmp_path / "killed", [9, 21, 14]) >= 1
    assert differing(tmp_path / "whole" / "run", tmp_path / "killed" / "run") == []


@pytest.mark.full
def test_one_command_compares_all_methods_within_one_budget_of_samples(tmp_path):
    command = [sys.executable, "pipeline.py", *COMPARE, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table, times = (json.loads((tmp_path / name).read_text())["compare"] for name in ("results.json", "times.json"))
    assert set(table) == set(times) == set(compare.ENTRIES)
    for name, row in table.items():
        assert 32 <= row["samples"] <= 32 + 16 * 4 and row["tried"] == {"0.0001": row["validation"]}
        assert times[name]["peak_bytes"] > 2 ** 20 and times[name]["seconds"] == times[name]["curve_seconds"][-1] > 0
        assert len(times[name]["curve_seconds"]) == len(row["curve"])
    assert "Methods" in (tmp_path / "report.html").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("compare/*/model.safetensors")}
    one = tmp_path / "compare" / "grpo-0.0001" / "DONE"
    one.write_text(one.read_text().replace('"variants/ppo.py": "', '"variants/ppo.py": "another'))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "grpo was made before variants/ppo.py changed" in again.stdout and str(one.parent) in again.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.glob("compare/*/model.safetensors")}
    assert len(stamps) == len(compare.ENTRIES) and not [*tmp_path.glob("compare/*/state.safetensors")]

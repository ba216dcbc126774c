"""tests/gpu.py in miniature: what it runs on a card runs here, so that it cannot rot."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import gpu
from test_parallel import run_processes

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.full
def test_its_speeds_run_on_a_cpu_and_go_where_they_are_sent(tmp_path):
    before = {path: path.stat().st_mtime for path in ROOT.glob("results/gpu/*")}
    command = [sys.executable, "tests/gpu.py", "--only", "decode", "train", "step"]
    command += ["--json", str(tmp_path / "cpu.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert [len(found[part]) for part in ("decode", "train", "step")] == [14, 10, 1]
    assert all(row["tokens_s"] > 0 for row in found["decode"][1:] + found["train"])
    assert before == {path: path.stat().st_mtime for path in ROOT.glob("results/gpu/*")}


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"broken": (gpu.decode, 0.01), "step": (gpu.step, 100)})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(tmp_path / "cpu.json")])
    with pytest.raises(SystemExit) as exit:
        gpu.main()
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert exit.value.code == 1 and "failed: broken" in said and found["broken"] == [] and len(found["step"]) == 1


def test_its_processes_under_torchrun_compute_what_one_does(monkeypatch):
    monkeypatch.setattr(gpu, "failed", [])
    gpu.compare_together(2, "gloo", "GRPO")
    assert gpu.failed == [] and gpu.rows_of_part[-1]["figure"] > 0  # two processes sum in another order


@pytest.mark.parametrize("method", ["PPO", "PRIME"])
def test_its_sharded_updates_are_those_of_one_process(method, tmp_path):
    path, start = tmp_path / "weights.safetensors", gpu.flat(gpu.new_model(gpu.TINY, "cpu"))
    ended, = run_processes(1, gpu.together, "gloo", "update", method, "1", str(path))
    assert ended.status == 0, ended.stderr
    found = load_file(path)["weights"]
    assert gpu.relative(found - start, gpu.updated(method, "cpu") - start) < 1e-6


def test_a_command_that_takes_too_long_is_killed_with_what_it_has_started(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    late = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    assert gpu.status_of([sys.executable, "-c", child, late], 1) == "not over in 1 s"
    time.sleep(3)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "deepseek_v3"])
def test_its_comparison_of_models_finds_none_that_differ(kind, monkeypatch):
    monkeypatch.setattr(gpu, "failed", [])
    gpu.compare_model(kind)
    assert gpu.failed == []


def test_its_comparison_finds_a_model_that_computes_something_else(monkeypatch):
    monkeypatch.setattr(gpu, "failed", [])
    monkeypatch.setattr(gpu, "fast_layers", shifted)
    gpu.compare_model("llama")
    assert "llama: logits beside the CPU's" in gpu.failed


def shifted(model):
    model.lm_head.weight.data += 0.01
    return model


@pytest.mark.parametrize("method", ["GRPO", "PPO", "PRIME", "SFT"])
def test_its_updates_move_the_weights(method):
    """Else the comparison with the CPU's would be of nothing."""
    start = gpu.flat(gpu.new_model(gpu.TINY, "cpu"))
    assert 1e-5 < (gpu.updated(method, "cpu") - start).abs().max() < 0.1


def test_its_resumed_training_is_compared(monkeypatch):
    monkeypatch.setattr(gpu, "failed", [])
    gpu.compare_resumed()
    assert gpu.failed == []

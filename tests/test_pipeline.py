"""The whole recipe at the smoke preset, and what its users may do wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import command

ROOT = Path(__file__).parent.parent
RECIPE = ["base", "zero", "dev1", "dev2", "dev3", "r1", "base_qwen", "student_qwen", "control_qwen", "base_llama", "student_llama"]


def run(*args, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished smoke run that was killed once on its way."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    command = [sys.executable, str(ROOT / "pipeline.py"), "--preset", "smoke", "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "zero" / "DONE").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (out / "base" / "DONE").stat().st_mtime_ns
    result = run(*command[1:])
    assert result.returncode == 0, result.stderr
    return out, result, before


def test_a_killed_run_goes_on_where_it_stopped_and_ends_with_every_stage(smoke):
    out, result, before = smoke
    assert (out / "base" / "DONE").stat().st_mtime_ns == before  # the finished stage was not made again
    results = json.loads((out / "results.json").read_text())
    assert set(RECIPE) | {"traces"} == set(results["stages"])
    for stage in RECIPE:
        evaluation = results["stages"][stage]["evaluation"]
        mean, low, high = evaluation["accuracy"]
        assert 0 <= low <= mean <= high <= 1
        assert (out / stage / "model.safetensors").exists() and (out / stage / "config.json").exists()


def test_the_output_shows_a_line_a_stage_then_claims_and_samples(smoke):
    lines = smoke[1].stdout.splitlines()
    first, stages, claims = lines.index("stages"), lines.index("claims"), lines.index("samples")
    assert [line.split()[0] for line in lines[:first] if "  accuracy " in line] == RECIPE
    assert all("tokens" in line and "FLOPs" in line for line in lines[first + 1:stages] if line)
    assert stages < claims


def test_the_claims_are_numbered_and_carry_interval_and_verdict(smoke):
    claims = json.loads((smoke[0] / "results.json").read_text())["claims"]
    assert {c["number"].split()[0] for c in claims} >= {"1", "2", "3", "4", "5", "6", "8", "9", "10", "12"}
    assert all(c["verdict"] in ("holds", "contradicted", "unsettled") for c in claims)


def test_the_report_is_written(smoke):
    page = (smoke[0] / "report.html").read_text(encoding="utf-8")
    assert "R1-Zero" in page and "<svg" in page


def test_metrics_hold_no_times_so_that_they_are_the_same_at_each_run(smoke):
    for path in smoke[0].glob("*/metrics.jsonl"):
        assert not any("seconds" in key for line in path.read_text().splitlines() for key in json.loads(line))


def test_a_finished_run_called_again_makes_nothing_anew(smoke):
    stamps = {p: p.stat().st_mtime_ns for p in smoke[0].glob("*/model.safetensors")}
    assert run("pipeline.py", "--preset", "smoke", "--out", smoke[0], "--device", "cpu").returncode == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in smoke[0].glob("*/model.safetensors")}


def test_a_stage_made_by_other_code_is_named_with_how_to_make_it_anew(smoke):
    done = smoke[0] / "r1" / "DONE"
    text = done.read_text()
    meta = json.loads(text)
    meta["code"]["grpo.py"] = "another"
    done.write_text(json.dumps(meta))
    result = run("pipeline.py", "--preset", "smoke", "--out", smoke[0], "--device", "cpu")
    done.write_text(text)
    assert "r1 was made before grpo.py changed" in result.stdout and "--from r1" in result.stdout


def test_each_stage_opens_in_transformers_with_the_same_logits_and_ids(smoke):
    transformers = pytest.importorskip("transformers")
    import torch
    from model import load
    from tokenizer import Tokenizer
    for stage in ("r1", "student_qwen", "student_llama"):
        ours, theirs = load(smoke[0] / stage, "cpu"), transformers.AutoModelForCausalLM.from_pretrained(smoke[0] / stage)
        text = "Tom has 47 apples.\n<think>先47+38</think><answer>85</answer>"
        ids = Tokenizer(smoke[0] / stage).encode(text)
        assert transformers.AutoTokenizer.from_pretrained(smoke[0] / stage)(text).input_ids == ids
        with torch.no_grad():
            assert (ours(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------- the scripts, and bad input

@pytest.fixture(scope="module")
def files(smoke, tmp_path_factory):
    dir = tmp_path_factory.mktemp("data")
    problem = {"prompt": "Tom has 47 apples. Tom buys 38 more. How many apples does Tom have now?", "answer": "85",
               "language": "en", "kind": "reasoning"}
    (dir / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    (dir / "pairs.jsonl").write_text(json.dumps({"prompt": "2+3", "completion": "5"}) + "\n")
    (dir / "empty.jsonl").write_text("")
    (dir / "no_field.jsonl").write_text(json.dumps(problem) + "\n" + json.dumps({"prompt": "2+3"}) + "\n")
    (dir / "no_json.jsonl").write_text("{\n")
    (dir / "no_number.jsonl").write_text(json.dumps({**problem, "answer": "5 or 6"}) + "\n")
    (dir / "long.jsonl").write_text(json.dumps({**problem, "prompt": "7 " * 3000}) + "\n")
    (dir / "nothing").mkdir()
    (dir / "misfit").mkdir()
    for file in (smoke[0] / "r1").iterdir():
        (dir / "misfit" / file.name).write_bytes(file.read_bytes())
    spec = json.loads((dir / "misfit" / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["id"] += 5
    (dir / "misfit" / "tokenizer.json").write_text(json.dumps(spec))
    return dir


def test_the_scripts_run_on_a_model_directory(smoke, files, tmp_path):
    model = smoke[0] / "r1"
    for args in (["sft.py", "--model", model, "--data", files / "pairs.jsonl", "--out", tmp_path / "sft", "--epochs", "1"],
                 ["grpo.py", "--model", model, "--data", files / "problems.jsonl", "--out", tmp_path / "grpo", "--rollouts", "1",
                  "--prompts-per-rollout", "2", "--group-size", "2", "--max-new-tokens", "16"],
                 ["evaluate.py", "--model", model, "--data", files / "problems.jsonl", "--samples", "2", "--max-new-tokens", "16"],
                 ["model.py", model, "--prompt", "Hello!", "--max-new-tokens", "8"]):
        result = run(*args)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "sft" / "model.safetensors").exists() and (tmp_path / "grpo" / "tokenizer.json").exists()


@pytest.mark.parametrize("script, data", [("sft.py", "pairs"), ("grpo.py", "problems")])
def test_the_precision_is_printed_and_a_switch_forces_another(script, data, smoke, files, tmp_path):
    small = ["--rollouts", "1", "--prompts-per-rollout", "2", "--group-size", "2", "--max-new-tokens", "8"] * (script == "grpo.py")
    lines = []
    for i, more in enumerate([[], ["--dtype", "float32", "--recompute"]]):
        result = run(script, "--model", smoke[0] / "r1", "--data", files / f"{data}.jsonl", "--out", tmp_path / str(i), *small, *more)
        assert result.returncode == 0, result.stderr
        lines.append(result.stdout.splitlines()[0])
    assert lines == [f"{command.fast_dtype('cpu')} on cpu", "float32 on cpu"] or torch.cuda.is_available()


@pytest.mark.parametrize("avx512_bf16, amx, chosen", [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")])
def test_bfloat16_is_chosen_where_the_processor_multiplies_it(avx512_bf16, amx, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert command.fast_dtype("cpu") == chosen


BAD = {  # what is wrong -> the command, and what its one line must name
    "an unknown option": (["pipeline.py", "--nonsense"], "--nonsense"),
    "an unknown preset": (["pipeline.py", "--preset", "huge"], "huge"),
    "an unknown stage": (["pipeline.py", "--from", "r2"], "r2"),
    "another configuration": (["pipeline.py", "--preset", "smoke", "--seed", "7", "--out", "RUN", "--device", "cpu"], "another configuration (seed was 0, is 7)"),
    "a missing file": (["sft.py", "--model", "MODEL", "--data", "DATA/none.jsonl", "--out", "OUT"], "none.jsonl"),
    "an empty file": (["sft.py", "--model", "MODEL", "--data", "DATA/empty.jsonl", "--out", "OUT"], "empty.jsonl"),
    "a row without its field": (["grpo.py", "--model", "MODEL", "--data", "DATA/no_field.jsonl", "--out", "OUT"], "no_field.jsonl:2"),
    "a row that is not JSON": (["grpo.py", "--model", "MODEL", "--data", "DATA/no_json.jsonl", "--out", "OUT"], "no_json.jsonl:1"),
    "an unparseable reference": (["grpo.py", "--model", "MODEL", "--data", "DATA/no_number.jsonl", "--out", "OUT"], "'5 or 6'"),
    "a directory that is no model": (["evaluate.py", "--model", "DATA/nothing", "--data", "DATA/problems.jsonl"], "nothing/tokenizer.json"),
    "a tokenizer that does not fit": (["evaluate.py", "--model", "DATA/misfit", "--data", "DATA/problems.jsonl"], "tokenizer"),
    "a prompt longer than the context": (["evaluate.py", "--model", "MODEL", "--data", "DATA/long.jsonl"], "context"),
    "group size 1": (["grpo.py", "--model", "MODEL", "--data", "DATA/problems.jsonl", "--out", "OUT", "--group-size", "1"], "group_size 1"),
    "temperature 0": (["grpo.py", "--model", "MODEL", "--data", "DATA/problems.jsonl", "--out", "OUT", "--temperature", "0"], "temperature 0"),
    "a value that is no number": (["grpo.py", "--model", "MODEL", "--data", "DATA/problems.jsonl", "--out", "OUT", "--lr", "fast"], "fast"),
    "an unknown precision": (["sft.py", "--model", "MODEL", "--data", "DATA/pairs.jsonl", "--out", "OUT", "--dtype", "fp8"], "dtype 'fp8'"),
    "an output that holds a model": (["sft.py", "--model", "MODEL", "--data", "DATA/pairs.jsonl", "--out", "MODEL"], "already holds a model"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gives_one_line_that_names_the_culprit_and_exit_code_2(what, smoke, files, tmp_path):
    args, named = BAD[what]
    places = {"RUN": str(smoke[0]), "MODEL": str(smoke[0] / "r1"), "DATA": str(files), "OUT": str(tmp_path / "out")}
    filled = []
    for arg in args:
        head, slash, tail = arg.partition("/")
        filled.append(places.get(head, head) + slash + tail)
    before = (smoke[0] / "r1" / "model.safetensors").stat().st_mtime_ns
    result = run(*filled)
    assert result.returncode == 2, result.stderr
    assert named in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert (smoke[0] / "r1" / "model.safetensors").stat().st_mtime_ns == before

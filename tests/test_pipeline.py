"""The whole recipe at the smoke preset, its scripts, and what their users may do wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import grpo
import model as model_module
import pipeline
import sft
from forked import run_forked
from lab import command
from runs import RECIPE, STAGES, call, content

ROOT = Path(__file__).parent.parent
PROGRAMS = {"pipeline.py": pipeline.main, "sft.py": sft.main, "grpo.py": grpo.main, "evaluate.py": evaluate.main,
            "model.py": model_module.main}
MODELS = [name for name in STAGES if name != "traces"]


def run(program, *args, **settings):
    """A script as its user calls it."""
    return run_forked(PROGRAMS[program], argv=[program, *map(str, args)], cwd=ROOT, **settings)


def test_base_and_zero_are_a_taste_that_ends_with_the_curve_and_a_problem_before_and_after(tmp_path):
    """In an interpreter of its own, as a user starts it: all is imported and found."""
    result = subprocess.run([sys.executable, str(ROOT / "pipeline.py"), *RECIPE, "--stages", "base,zero"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert [*json.loads((tmp_path / "run" / "results.json").read_text())["stages"]] == ["base", "zero"]
    assert "R1-Zero, over its rollouts" in result.stdout and "one problem, before and after" in result.stdout
    assert "the whole recipe, from here: python pipeline.py --preset smoke --out run\n" in result.stdout
    assert (tmp_path / "run" / "curve.svg").read_text().startswith("<svg")
    assert (tmp_path / "run" / "zero" / "model.safetensors").exists()


def test_a_run_ends_with_every_stage_and_its_figures(finished_run):
    results = json.loads((finished_run / "results.json").read_text())
    assert STAGES == [*results["stages"]]
    for stage in MODELS:
        evaluation = results["stages"][stage]["evaluation"]
        for metric in ("accuracy", "accuracy_any"):
            mean, low, high = evaluation[metric]
            assert 0 <= low <= mean <= high <= 1
        assert evaluation["accuracy"][0] <= evaluation["accuracy_any"][0]  # the asked form is one of the styles
        assert (finished_run / stage / "model.safetensors").exists() and (finished_run / stage / "config.json").exists()


def test_the_output_shows_a_line_per_stage_then_samples_and_at_smoke_no_claims(finished_run):
    lines = (finished_run.parent / "said").read_text().splitlines()
    first, samples = lines.index("stages"), lines.index("samples")
    assert [line.split()[0] for line in lines[:first] if "  accuracy " in line] == MODELS
    assert all("tokens" in line and "FLOPs" in line for line in lines[first + 1:samples] if line)
    assert "claims" not in lines  # its models are too small for them to say anything


def test_the_claims_are_numbered_and_carry_interval_and_verdict(finished_run):
    claims = json.loads((finished_run / "results.json").read_text())["claims"]
    numbers = [claim["number"] for claim in claims]
    assert {number.split()[0] for number in numbers} >= {"1", "2", "3", "4", "5", "6", "8", "9", "10", "12"}
    assert [int(number.split()[0]) for number in numbers] == sorted(int(number.split()[0]) for number in numbers)
    for claim in claims:
        assert claim["verdict"] in ("holds", "contradicted", "unsettled")
        assert not claim["low"] > claim["high"]


def test_other_presets_print_the_claims(finished_run, capsys):
    from types import SimpleNamespace
    from lab.terminal import print_results
    results = json.loads((finished_run / "results.json").read_text())
    print_results(SimpleNamespace(results=results, line_of=str, out=finished_run), with_claims=True)
    said = capsys.readouterr().out
    assert "\nclaims\n" in said and all(claim["claim"] in said for claim in results["claims"])


def test_the_report_is_written(finished_run):
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "R1-Zero" in page and "<svg" in page


def test_metrics_hold_no_times_so_that_they_are_the_same_at_each_run(finished_run):
    for path in finished_run.glob("*/metrics.jsonl"):
        assert not any("seconds" in key for line in path.read_text().splitlines() for key in json.loads(line))


def test_metrics_name_the_asked_form_accuracy_and_any_style_accuracy_any(finished_run):
    rows = [json.loads(line) for line in (finished_run / "zero" / "metrics.jsonl").read_text().splitlines()]
    assert all({"accuracy", "accuracy_any"} <= row.keys() for row in rows)
    assert {"validation_accuracy", "validation_accuracy_any"} <= rows[-1].keys()
    assert not any("strict" in key for row in rows for key in row)


def test_a_finished_run_called_again_makes_nothing_a_second_time(copy_of_run):
    before = {path: path.stat().st_mtime_ns for path in copy_of_run.glob("*/model.safetensors")}
    assert call(copy_of_run.parent, RECIPE).status == 0
    assert before == {path: path.stat().st_mtime_ns for path in copy_of_run.glob("*/model.safetensors")}
    assert "&&" not in json.loads((copy_of_run / "results.json").read_text())["meta"]["command"]


# ------------------------------------------------------------------------------------------- some of the stages

def test_stages_chosen_one_after_the_other_come_to_the_same_end(copy_of_run, finished_run):
    for stage in ("dev3", "r1", "base_llama", "student_llama"):
        shutil.rmtree(copy_of_run / stage)
    for stages in ("base_llama,student_llama", "dev3,r1"):
        ended = call(copy_of_run.parent, [*RECIPE, "--stages", stages])
        assert ended.status == 0, ended.stderr
    command = json.loads((copy_of_run / "results.json").read_text())["meta"]["command"]
    whole, *later = command.split(" && ")  # each command that had a part in it, once
    assert [line.partition("--stages ")[2].split()[0] for line in later] == ["base_llama,student_llama", "dev3,r1"]
    assert "--stages" not in whole
    found, undisturbed = content(copy_of_run), content(finished_run)
    weights = [name for name in undisturbed if name.endswith((".safetensors", "samples.jsonl", "metrics.jsonl"))]
    assert [name for name in weights if found[name] != undisturbed[name]] == []


@pytest.mark.parametrize("args, culprit", [
    (["--stages", "dev2"], "stage dev2 needs dev1, which is not finished: --stages dev1,dev2"),
    (["--stages", "zero"], "stage zero needs base"), (["--stages", "base,zero,dev3"], "stage dev3 needs traces"),
    (["--stages", "student_qwen"], "stage student_qwen needs base_qwen"),
    (["--stages", "base,r3"], "stage 'r3' is none of base"),
    (["--from", "r2"], "stage 'r2' is none of"), (["--preset", "huge"], "huge"), (["--nonsense"], "--nonsense"),
    (["--train", "x.jsonl"], "--train goes with --base"), (["--group-size", "1"], "group_size 1"),
    (["--samples", "0"], "samples 0 must be positive"), (["--device", "abacus"], "device abacus"),
    (["--rollouts", "many"], "many"),
])
def test_what_cannot_be_done_with_the_recipe_is_said_in_one_line(args, culprit, tmp_path):
    ended = call(tmp_path, [*RECIPE, *args])
    assert ended.status == 2 and culprit in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
    assert not (tmp_path / "run" / "config.json").exists()  # nothing that a corrected call would stumble over


def test_a_reward_that_no_rule_is_called_by_is_named(finished_run, tmp_path):
    shutil.copytree(finished_run / "base", tmp_path / "run" / "base")

    def misspelled():
        pipeline.ACCURACY_AND_FORMAT = {"accuracy": 1.0, "fromat": 1.0}
        pipeline.main()

    ended = call(tmp_path, [*RECIPE, "--stages", "base,zero"], misspelled)
    assert ended.status == 2 and "no rule is called fromat: there are accuracy" in ended.stderr, ended.stderr


# ------------------------------------------------------------------------------------------- code that has changed

def change_code(run, file, stages):
    """As if the file had changed since these stages were made."""
    for stage in stages:
        done = json.loads((run / stage / "DONE").read_text())
        done["code"][file] = "another"
        (run / stage / "DONE").write_text(json.dumps(done))


def test_a_changed_reward_is_named_once_with_the_first_stage_that_it_can_affect(copy_of_run):
    made_with_rewards = [stage for stage in STAGES
                         if "rewards.py" in json.loads((copy_of_run / stage / "DONE").read_text())["code"]]
    assert made_with_rewards == [stage for stage in STAGES if not stage.startswith("base")]  # pretraining has no reward
    change_code(copy_of_run, "rewards.py", made_with_rewards)
    ended = call(copy_of_run.parent, RECIPE)
    named = [line for line in ended.stdout.splitlines() if "rewards.py" in line]
    assert named == ["rewards.py changed since zero was made; to re-run it and what depends on it: --from zero"]


def test_of_several_changes_the_first_stage_is_named_with_its_own(copy_of_run):
    change_code(copy_of_run, "grpo.py", ["r1", "control_qwen"])
    change_code(copy_of_run, "sft.py", ["dev3"])
    ended = call(copy_of_run.parent, RECIPE)
    named = [line for line in ended.stdout.splitlines() if "changed since" in line]
    assert named == ["sft.py changed since dev3 was made; to re-run it and what depends on it: --from dev3"]


def test_the_code_that_a_stage_depends_on_is_there(finished_run):
    for stage in STAGES:
        files = json.loads((finished_run / stage / "DONE").read_text())["code"]
        assert files and all((ROOT / file).exists() for file in files)


# ------------------------------------------------------------------------------------------- transformers

def test_each_stage_opens_in_transformers_with_the_same_logits_and_ids(finished_run):
    transformers = pytest.importorskip("transformers")
    from tokenizer import Tokenizer
    for stage in ("r1", "student_qwen", "student_llama"):
        ours = model_module.load(finished_run / stage, "cpu")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(finished_run / stage)
        text = "Tom has 47 apples.\n<think>先47+38</think><answer>85</answer>"
        ids = Tokenizer(finished_run / stage).encode(text)
        assert transformers.AutoTokenizer.from_pretrained(finished_run / stage)(text).input_ids == ids
        with torch.no_grad():
            assert (ours(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------- the scripts, and bad input

@pytest.fixture(scope="module")
def files(finished_run, tmp_path_factory):
    dir = tmp_path_factory.mktemp("data")
    problem = {"prompt": "Tom has 47 apples. Tom buys 38 more. How many apples does Tom have now?", "answer": "85",
               "language": "en", "kind": "reasoning"}
    (dir / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    (dir / "pairs.jsonl").write_text(json.dumps({"prompt": "2+3", "completion": "5"}) + "\n")
    (dir / "empty.jsonl").write_text("")
    (dir / "no_field.jsonl").write_text(json.dumps(problem) + "\n" + json.dumps({"prompt": "2+3"}) + "\n")
    (dir / "no_json.jsonl").write_text("{\n")
    (dir / "no_number.jsonl").write_text(json.dumps({**problem, "answer": [5, 6]}) + "\n")
    (dir / "long.jsonl").write_text(json.dumps({**problem, "prompt": "7 " * 3000}) + "\n")
    (dir / "nothing").mkdir()
    (dir / "misfit").mkdir()
    for file in (finished_run / "r1").iterdir():
        (dir / "misfit" / file.name).write_bytes(file.read_bytes())
    spec = json.loads((dir / "misfit" / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["id"] += 5
    (dir / "misfit" / "tokenizer.json").write_text(json.dumps(spec))
    return dir


def test_the_scripts_run_on_a_model_directory(finished_run, files, tmp_path):
    model, problems = finished_run / "r1", files / "problems.jsonl"
    small = ["--rollouts", "1", "--prompts-per-rollout", "2", "--group-size", "2", "--max-new-tokens", "16"]
    pairs = files / "pairs.jsonl"
    for args in (["sft.py", "--model", model, "--data", pairs, "--out", tmp_path / "sft", "--epochs", "1"],
                 ["grpo.py", "--model", model, "--data", problems, "--out", tmp_path / "grpo", *small],
                 ["evaluate.py", "--model", model, "--data", problems, "--samples", "2", "--max-new-tokens", "16"],
                 ["model.py", model, "--prompt", "Hello!", "--max-new-tokens", "8"]):
        ended = run(*args)
        assert ended.status == 0, ended.stderr
    assert (tmp_path / "sft" / "model.safetensors").exists() and (tmp_path / "grpo" / "tokenizer.json").exists()


def test_each_script_starts_in_an_interpreter_of_its_own():
    """What a fork of this process cannot show: that a script alone finds all that it imports."""
    for script in (["grpo.py"], ["-m", "variants.ppo"]):
        result = subprocess.run([sys.executable, *script, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and "--model" in result.stdout, result.stderr


@pytest.mark.parametrize("load, chosen, spins", [
    (2.0, {}, "1000"), (0.3, {}, "None"), (2.0, {"GOMP_SPINCOUNT": "5"}, "5"),
    (2.0, {"OMP_WAIT_POLICY": "PASSIVE"}, "None")])
def test_on_a_busy_machine_waiting_threads_spin_briefly_unless_the_user_has_chosen(load, chosen, spins):
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = (f"import os; os.getloadavg = lambda: ({load}, 0, 0)\n"
            "import lab; print(os.environ.get('GOMP_SPINCOUNT'))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | chosen, capture_output=True, text=True)
    assert result.stdout.strip() == spins, result.stderr


@pytest.mark.parametrize("script", ["grpo.py", "variants/ppo.py"])
def test_a_script_that_has_imported_torch_starts_once_more_with_that_setting(script):
    """OpenMP reads it when torch is imported, before a concept file comes to its main()."""
    code = ("import os, sys; sys.modules['torch'] = None; sys.argv = ['x']; os.execv = lambda *args: print(*args)\n"
            "os.getloadavg = lambda: (2.0, 0, 0)\n"
            f"sys.modules['__main__'].__file__ = {str(ROOT / script)!r}; import lab")
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert sys.executable in result.stdout, result.stderr


@pytest.mark.parametrize("script, data", [("sft.py", "pairs"), ("grpo.py", "problems")])
def test_the_precision_is_printed_and_a_switch_forces_another(script, data, finished_run, files, tmp_path):
    small = []
    if script == "grpo.py":
        small = ["--rollouts", "1", "--prompts-per-rollout", "2", "--group-size", "2", "--max-new-tokens", "8"]
    lines = []
    for i, more in enumerate([[], ["--dtype", "float32", "--recompute"]]):
        ended = run(script, "--model", finished_run / "r1", "--data", files / f"{data}.jsonl",
                    "--out", tmp_path / str(i), *small, *more)
        assert ended.status == 0, ended.stderr
        lines.append(ended.stdout.splitlines()[0])
    assert lines == [f"{command.fast_dtype('cpu')} on cpu", "float32 on cpu"]


@pytest.mark.parametrize("avx512_bf16, amx, chosen", [
    (True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")])
def test_bfloat16_is_chosen_where_the_processor_multiplies_it(avx512_bf16, amx, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert command.fast_dtype("cpu") == chosen


@pytest.mark.parametrize("capability, chosen", [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_card_without_bfloat16_takes_float16(capability, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert command.fast_dtype("cuda") == chosen


BAD = {  # what is wrong -> the command, and what its one line must name
    "another configuration": (["pipeline.py", "--preset", "smoke", "--seed", "7", "--out", "RUN", "--device", "cpu"],
                              "another configuration (seed was 0, is 7)"),
    "a missing file": (["sft.py", "--model", "MODEL", "--data", "DATA/none.jsonl", "--out", "OUT"], "none.jsonl"),
    "an empty file": (["sft.py", "--model", "MODEL", "--data", "DATA/empty.jsonl", "--out", "OUT"], "empty.jsonl"),
    "a row without its field": (["grpo.py", "--model", "MODEL", "--data", "DATA/no_field.jsonl", "--out", "OUT"],
                                "no_field.jsonl:2"),
    "a row that is not JSON": (["grpo.py", "--model", "MODEL", "--data", "DATA/no_json.jsonl", "--out", "OUT"],
                               "no_json.jsonl:1"),
    "a reference that is no text": (["grpo.py", "--model", "MODEL", "--data", "DATA/no_number.jsonl", "--out", "OUT"],
                                    "answer [5, 6]"),
    "a directory that is no model": (["evaluate.py", "--model", "DATA/nothing", "--data", "DATA/problems.jsonl"],
                                     "nothing/tokenizer.json"),
    "a tokenizer that does not fit": (["evaluate.py", "--model", "DATA/misfit", "--data", "DATA/problems.jsonl"],
                                      "tokenizer"),
    "a prompt longer than the context": (["evaluate.py", "--model", "MODEL", "--data", "DATA/long.jsonl"], "context"),
    "group size 1": (["grpo.py", "--model", "MODEL", "--data", "DATA/problems.jsonl", "--out", "OUT",
                      "--group-size", "1"], "group_size 1"),
    "temperature 0": (["grpo.py", "--model", "MODEL", "--data", "DATA/problems.jsonl", "--out", "OUT",
                       "--temperature", "0"], "temperature 0"),
    "a value that is no number": (["grpo.py", "--model", "MODEL", "--data", "DATA/problems.jsonl", "--out", "OUT",
                                   "--lr", "fast"], "fast"),
    "an unknown precision": (["sft.py", "--model", "MODEL", "--data", "DATA/pairs.jsonl", "--out", "OUT",
                              "--dtype", "fp8"], "dtype 'fp8'"),
    "an output that holds a model": (["sft.py", "--model", "MODEL", "--data", "DATA/pairs.jsonl", "--out", "MODEL"],
                                     "already holds a model"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gives_one_line_that_names_the_culprit_and_exit_code_2(what, finished_run, files, tmp_path):
    args, named = BAD[what]
    places = {"RUN": str(finished_run), "MODEL": str(finished_run / "r1"), "DATA": str(files),
              "OUT": str(tmp_path / "out")}
    filled = []
    for arg in args:
        head, slash, tail = arg.partition("/")
        filled.append(places.get(head, head) + slash + tail)
    before = (finished_run / "r1" / "model.safetensors").stat().st_mtime_ns
    ended = run(*filled)
    assert ended.status == 2, ended.stderr
    assert named in ended.stderr and len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert (finished_run / "r1" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("cuda, driver, hidden, said", [
    ("13.0", True, False, "the driver may be older than CUDA 13.0"), (None, True, False, "is built without CUDA"),
    ("13.0", False, False, ""), ("13.0", True, True, "")])
def test_a_gpu_that_torch_does_not_find_is_told_of(cuda, driver, hidden, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "version").touch()
    monkeypatch.setattr(command, "NVIDIA_DRIVER", tmp_path / ("version" if driver else "none"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command.device_of("cpu") == torch.device("cpu")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and said in "".join(lines)


def test_a_gpu_that_is_used_is_not_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command.device_of("cpu")  # as asked for
    assert capsys.readouterr().err == ""

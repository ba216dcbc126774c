"""The recipe on models and problems that are given: a tiny base that has learnt one answer, and two students that have not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import given as given_module
import model as model_module
import sft
from data import arithmetic, readers
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TOKENIZERS = ROOT / "tests" / "fixtures" / "tokenizers"
SMALL = ("--rollouts 1 --prompts-per-rollout 4 --group-size 4 --minibatches 2 --max-new-tokens 40 --samples 2 --row-length 128 "
         "--sft-batch-tokens 512 --sft-epochs 20 --sft-lr 3e-3 --template none --device cpu").split()


def make(dir, kind, layout):
    """A model directory of a family, random, with one of the recorded tokenizers."""
    tokenizer = Tokenizer(TOKENIZERS / layout)
    config = model_module.Config(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=1, model_type=kind)
    model = model_module.Transformer(config).init_weights(torch.Generator().manual_seed(0))
    model_module.save(model, dir, tokenizer)
    return model, tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    dir = tmp_path_factory.mktemp("given")
    model, tokenizer = make(dir / "base", "qwen3", "qwen")
    for name, kind, layout in (("small_qwen", "qwen2", "qwen"), ("small_llama", "llama", "smollm")):
        make(dir / name, kind, layout)
    problems = [{"question": f"How much is {a} and {734 - a} ({i})?", "answer": "It is so.\n#### 734"} for i in range(8) for a in range(6)]
    write(dir / "train.jsonl", problems[:40]), write(dir / "test.jsonl", problems[36:])
    examples = []
    for row in problems[:40]:
        prompt = tokenizer.encode(row["question"])
        examples.append((prompt + tokenizer.encode("<think>it is so</think><answer>734</answer>") + [tokenizer.end_id], len(prompt)))
    sft.train(model, examples, sft.SFTConfig(lr=5e-3, epochs=30, batch_tokens=512, row_length=128, dtype="float32"))
    model_module.save(model, dir / "base", tokenizer)
    return dir


def arguments(given, out):
    return ["pipeline.py", "--base", given / "base", "--train", given / "train.jsonl", "--test", given / "test.jsonl", "--out", out, *SMALL]


def pipeline(given, out, *more):
    command = [sys.executable, *map(str, [*arguments(given, out), *more])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def finished(given):
    result = pipeline(given, given / "run", "--student", given / "small_qwen", "--student", given / "small_llama", "--trace-samples", "2")
    assert result.returncode == 0, result.stderr
    return given / "run", result.stdout


def test_the_whole_recipe_runs_on_a_base_and_students_of_two_families_and_says_what_it_leaves_out(finished):
    out, said = finished
    stages = json.loads((out / "results.json").read_text())["stages"]
    assert [*stages] == ["base", "zero", "dev1", "dev2", "traces", "dev3", "r1", "base_qwen", "student_qwen", "base_llama", "student_llama"]
    assert "4 of 40 stand in the test or twice: left out" in said
    assert "no --general examples" in said and "no general or unsafe requests" in said
    assert all("helpfulness" not in stage.get("evaluation", {}) for stage in stages.values())
    assert not (out / "base" / "model.safetensors").exists()  # what is given is measured, and not copied
    assert (out / "report.html").exists()


def test_the_students_learn_the_traces_with_their_own_tokenizers(finished):
    out, _ = finished
    stages = json.loads((out / "results.json").read_text())["stages"]
    for name in ("qwen", "llama"):
        assert stages[f"base_{name}"]["evaluation"]["accuracy"][0] == 0 < stages[f"student_{name}"]["evaluation"]["accuracy"][0]
    assert Tokenizer(out / "student_llama").spec == Tokenizer(TOKENIZERS / "smollm").spec


def test_called_again_nothing_is_made_anew_and_another_train_file_is_named(given, finished):
    out, said = finished
    args = ("--student", given / "small_qwen", "--student", given / "small_llama", "--trace-samples", "2")
    before = (out / "r1" / "DONE").stat().st_mtime_ns
    assert pipeline(given, out, *args).returncode == 0 and (out / "r1" / "DONE").stat().st_mtime_ns == before
    shutil.copy(given / "train.jsonl", given / "other.jsonl")
    result = pipeline(given, out, *args, "--train", given / "other.jsonl")
    assert result.returncode == 2 and "given.train.0 was" in result.stderr or "given.train was" in result.stderr


def test_a_given_run_killed_at_random_moments_ends_byte_for_byte_as_one_that_was_not(given, finished, tmp_path):
    from test_faults import content, run_in
    args = [*map(str, arguments(given, "run")[1:]), "--student", str(given / "small_qwen"), "--student", str(given / "small_llama"), "--trace-samples", "2"]
    assert run_in(tmp_path, args, [3, 5, 7]) >= 1
    found, undisturbed = content(tmp_path / "run"), content(finished[0])
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if found[name] != undisturbed[name]] in ([], ["results.json"])
    results = [json.loads(side["results.json"]) for side in (found, undisturbed)]
    assert [each["meta"].pop("command") for each in results] and results[0] == results[1]


def test_a_kill_after_the_cold_starts_sampling_loses_none_of_its_cost(given, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "dev1" / "DONE").unlink()
    stamp = (tmp_path / "run" / "dev1" / "cold_start.jsonl").stat().st_mtime_ns
    result = pipeline(given, tmp_path / "run", "--trace-samples", "2")
    tokens = [json.loads((run / "results.json").read_text())["stages"]["dev1"]["tokens"] for run in (tmp_path / "run", finished[0])]
    assert result.returncode == 0 and tokens[0] == tokens[1], result.stderr
    assert (tmp_path / "run" / "dev1" / "cold_start.jsonl").stat().st_mtime_ns == stamp


def test_stages_can_be_chosen_one_by_one(given, tmp_path):
    result = pipeline(given, tmp_path / "run", "--stages", "base,zero")
    assert result.returncode == 0, result.stderr
    assert [*json.loads((tmp_path / "run" / "results.json").read_text())["stages"]] == ["base", "zero"]


@pytest.mark.parametrize("more, culprit", [
    (["--stages", "dev2"], "stage dev2 needs dev1"), (["--stages", "r3"], "r3"), (["--stages", "student_qwen"], "student_qwen"),
    (["--from", "r3"], "r3"), (["--student", "nowhere"], "nowhere"), (["--train", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--test", "README.md"], "README.md:1: not JSON"), (["--group-size", "1"], "group_size 1"), (["--samples", "0"], "samples 0"),
    (["--template", "vicuna"], "vicuna"), (["--template", "llama-3"], "not among the tokens"), (["--preset", "smoke"], "--preset"),
    (["--general", "nowhere.jsonl"], "nowhere.jsonl"), (["--device", "abacus"], "abacus"), (["--stages", "zero,dev2"], "dev2 needs dev1"),
])
def test_what_cannot_be_done_is_said_in_one_line_with_exit_code_2(more, culprit, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*map(str, arguments(given, tmp_path / "run")), *more])
    with pytest.raises(SystemExit) as exit:
        given_module.main()
    said = capsys.readouterr().err
    assert exit.value.code == 2 and culprit in said and said.count("\n") == 1, said


def test_a_verifier_of_ones_own_is_three_lines(given, tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport grpo, rewards\n"
            "rewards.REWARDS['mine'] = lambda text, example: float(example['answer'] in text)\ngrpo.main()")
    args = ["--model", given / "base", "--data", given / "train.jsonl", "--out", tmp_path / "out", "--rewards", "mine", "--rollouts", "1",
            "--prompts-per-rollout", "2", "--group-size", "2", "--minibatches", "1", "--max-new-tokens", "40", "--template", "none"]
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert result.returncode == 0 and "reward 1.000" in result.stdout, result.stderr + result.stdout


# ---- problem sets

def read(tmp_path, *rows):
    import rewards
    return readers.read_problems(write(tmp_path / "set.jsonl", rows), rewards.check_reference)


def test_each_published_format_is_read_by_its_fields(tmp_path):
    gsm8k, math, math500, countdown, plain, ours = read(
        tmp_path, {"question": "How many?", "answer": "48/2 = <<48/2=24>>24.\n#### 1,024"},
        {"problem": "Find $x$.", "solution": r"Not \boxed{3} but $\boxed{\frac{1}{\sqrt{2}}}$.", "level": "Level 2"},
        {"problem": "Find $y$.", "solution": r"So \boxed{7}.", "answer": "7"},
        {"nums": [44, 19, 35], "target": 98}, {"prompt": "What is 17 + 25?", "answer": "42"},
        {"prompt": "天空是什么颜色？", "answer": "蓝色", "language": "zh", "kind": "general", "wrong": ["红色"]})
    english = {"language": "en", "kind": "reasoning"}
    assert gsm8k == {"prompt": "How many?", "answer": "1,024", **english}
    assert math == {"prompt": "Find $x$.", "answer": r"\frac{1}{\sqrt{2}}", **english} and math500["answer"] == "7"
    assert countdown["nums"] == [44, 19, 35] and countdown["target"] == 98 and "[44, 19, 35]" in countdown["prompt"]
    assert plain == {"prompt": "What is 17 + 25?", "answer": "42", **english}
    assert ours["kind"] == "general" and ours["wrong"] == ["红色"]


@pytest.mark.parametrize("row, culprit", [
    ({"text": "hello"}, "fields text are of no problem set"), ({"prompt": "2+3"}, "fields prompt"), ([1], "an object"),
    ({"problem": "x", "solution": "no box"}, "boxed"), ({"nums": [1, "2"], "target": 3}, "nums"), ({"nums": [1, 2], "target": "3"}, "target"),
    ({"nums": [], "target": 3}, "nums"), ({"question": "x", "answer": "#### "}, "answer"), ({"prompt": "x", "answer": "7", "kind": "poem"}, "poem"),
])
def test_a_row_of_no_known_format_is_named_with_its_line(row, culprit, tmp_path):
    with pytest.raises(ValueError, match=f"set.jsonl:2: .*{culprit}"):
        read(tmp_path, {"prompt": "1+1", "answer": "2"}, row)


def test_arithmetic_is_right_and_no_test_pair_stands_in_training():
    train, test = arithmetic.problems(9000, 0), arithmetic.problems(300, 0, test=True)
    pairs = lambda rows: {tuple(row["prompt"][8:-1].replace("-", "+").split(" + ")) for row in rows}
    assert not pairs(train) & pairs(test)
    for row in train[:300] + test:
        a, op, b = row["prompt"].removeprefix("What is ").removesuffix("?").split()
        assert int(row["answer"]) == (int(a) + int(b) if op == "+" else int(a) - int(b)) >= 0
        completion = arithmetic.with_chain(row)["completion"]
        for step in completion.partition(":")[2].partition("</think>")[0].split(","):
            left, right = step.split("=")
            assert sum(int(n) for n in left.strip().replace("-", " -").replace("+", " ").split()) == int(right)
        assert completion.endswith(f"<answer>{row['answer']}</answer>")

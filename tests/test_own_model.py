"""The recipe on a model and problems of one's own: a tiny base that knows one answer, and two students that do not."""

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import grpo
import model as model_module
import rewards
import sft
from data import arithmetic, problems
from data.math_answers import read_both
from forked import run_forked
from lab.check_input import check_example
from lab.scripts import read_problem_set
from runs import TOKENIZERS, call, content, differing, make, results_of, run_with_kills, write
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SMALL = ("--rollouts 1 --prompts-per-rollout 4 --group-size 4 --minibatches 2 --max-new-tokens 40 --samples 2 "
         "--row-length 128 --sft-batch-tokens 512 --sft-epochs 20 --sft-lr 3e-3 --template none --device cpu").split()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    dir = tmp_path_factory.mktemp("own")
    model, tokenizer = make(dir / "base", "qwen3", "qwen")
    for name, kind, layout in (("small_qwen", "qwen2", "qwen"), ("small_llama", "llama", "smollm")):
        make(dir / name, kind, layout)
    rows = [{"question": f"How much is {a} and {734 - a} ({i})?", "answer": "It is so.\n#### 734"}
            for i in range(8) for a in range(6)]
    write(dir / "train.jsonl", rows[:40])
    write(dir / "test.jsonl", rows[36:])
    completion = tokenizer.encode("<think>it is so</think><answer>734</answer>") + [tokenizer.end_id]
    examples = []
    for row in rows[:40]:
        prompt = tokenizer.encode(row["question"])
        examples.append((prompt + completion, len(prompt)))
    config = sft.SFTConfig(lr=5e-3, epochs=30, batch_tokens=512, row_length=128, dtype="float32")
    sft.train(model, examples, config)
    model_module.save(model, dir / "base", tokenizer)
    return dir


def arguments(own, out):
    files = ["--base", own / "base", "--train", own / "train.jsonl", "--test", own / "test.jsonl"]
    return [*files, "--out", out, *SMALL]


def students(own):
    return ["--student", own / "small_qwen", "--student", own / "small_llama", "--trace-samples", "2"]


def pipeline(own, out, *more):
    return call(ROOT, [*arguments(own, out), *more])


@pytest.fixture(scope="module")
def finished(own):
    ended = pipeline(own, own / "run", *students(own))
    assert ended.status == 0, ended.stderr
    return own / "run", ended.stdout


def test_the_whole_recipe_runs_on_a_base_and_students_of_two_families_and_says_what_it_leaves_out(finished):
    out, said = finished
    stages = json.loads((out / "results.json").read_text())["stages"]
    assert [*stages] == ["base", "zero", "dev1", "dev2", "traces", "dev3", "r1", "base_qwen", "student_qwen",
                         "base_llama", "student_llama"]
    assert "4 of 40 stand in the test or twice: left out" in said
    assert "no --general examples" in said and "no general or unsafe requests" in said
    assert all("helpfulness" not in stage.get("evaluation", {}) for stage in stages.values())
    assert not (out / "base" / "model.safetensors").exists()  # an own model is measured, and not copied
    assert (out / "report.html").exists()


def test_the_students_learn_the_traces_with_their_own_tokenizers(finished):
    out, _ = finished
    stages = json.loads((out / "results.json").read_text())["stages"]
    for name in ("qwen", "llama"):
        before, after = (stages[f"{kind}_{name}"]["evaluation"]["accuracy_any"][0] for kind in ("base", "student"))
        assert before == 0 < after
    assert Tokenizer(out / "student_llama").spec == Tokenizer(TOKENIZERS / "smollm").spec


def test_called_again_nothing_is_made_a_second_time_and_another_train_file_is_named(own, finished):
    out, _ = finished
    before = (out / "r1" / "DONE").stat().st_mtime_ns
    assert pipeline(own, out, *students(own)).status == 0 and (out / "r1" / "DONE").stat().st_mtime_ns == before
    shutil.copy(own / "train.jsonl", own / "other.jsonl")
    ended = pipeline(own, out, *students(own), "--train", own / "other.jsonl")
    assert ended.status == 2 and "own.train was" in ended.stderr, ended.stderr


def test_another_model_in_the_place_of_a_student_is_named(own, finished, tmp_path):
    shutil.copytree(own / "small_qwen", tmp_path / "other")
    shutil.copytree(finished[0], tmp_path / "run")
    ended = pipeline(own, tmp_path / "run", "--student", tmp_path / "other", "--trace-samples", "2")
    assert ended.status == 2 and "base_qwen is of another model" in ended.stderr, ended.stderr


@pytest.mark.full
def test_an_own_run_killed_at_random_moments_ends_byte_for_byte_as_one_that_was_not(own, finished, tmp_path):
    args = [*arguments(own, "run"), *students(own)]
    assert run_with_kills(tmp_path, args, [2, 3, 4]) >= 1
    assert differing(tmp_path / "run", finished[0], ignore=["results.json"]) == []
    assert results_of(tmp_path / "run") == results_of(finished[0])


HOW = {"lora": ["--lora", "4"], "offload": ["--offload-optimizer"], "float16": ["--dtype", "float16"]}


@pytest.mark.full
@pytest.mark.parametrize("how", ["lora", "offload", "float16"])
def test_with_what_small_cards_need_the_recipe_is_killed_and_resumed_byte_for_byte_too(how, own, tmp_path):
    args = [*arguments(own, "run"), "--student", own / "small_llama", "--trace-samples", "2", *HOW[how]]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    ended = call(tmp_path / "whole", args)
    assert ended.status == 0, ended.stderr
    assert run_with_kills(tmp_path / "killed", args, [2, 3, 4]) >= 1
    runs = tmp_path / "killed" / "run", tmp_path / "whole" / "run"
    of_paths = [name for name in content(runs[1]) if name.endswith("adapter_config.json")]  # of the stage before
    assert differing(*runs, ignore=["results.json", *of_paths]) == []
    assert results_of(runs[0]) == results_of(runs[1])
    trained = ("zero", "dev1", "dev2", "dev3", "r1", "student_llama")
    adapted = [name for name in trained if (runs[0] / name / "adapter" / "adapter_model.safetensors").exists()]
    assert adapted == ([*trained] if how == "lora" else []) and len(of_paths) == len(adapted)
    for name in trained:
        assert model_module.load(runs[0] / name, "cpu").embed_tokens.weight.dtype == torch.float32
    if how != "float16":
        for other in (["--lora", "8"], [], ["--lora", "4", "--lora-alpha", "8"], [*HOW[how], "--cache-tokens", "200"]):
            ended = call(tmp_path / "killed", [*args[:-len(HOW[how])], *other])
            assert ended.status == 2 and "(memory" in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


def test_a_kill_after_the_cold_starts_sampling_loses_none_of_its_cost(own, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "dev1" / "DONE").unlink()
    rows = tmp_path / "run" / "dev1" / "cold_start.jsonl"
    stamp = rows.stat().st_mtime_ns
    ended = pipeline(own, tmp_path / "run", "--trace-samples", "2")
    assert ended.status == 0, ended.stderr
    tokens = [results_of(run)["stages"]["dev1"]["tokens"] for run in (tmp_path / "run", finished[0])]
    assert tokens[0] == tokens[1] and rows.stat().st_mtime_ns == stamp


def test_stages_can_be_chosen_one_by_one(own, tmp_path):
    ended = pipeline(own, tmp_path / "run", "--stages", "base,zero")
    assert ended.status == 0, ended.stderr
    assert [*results_of(tmp_path / "run")["stages"]] == ["base", "zero"]
    assert "the whole recipe, from here: python pipeline.py --out" in ended.stdout


@pytest.mark.parametrize("more, culprit", [
    (["--stages", "dev2"], "stage dev2 needs dev1"), (["--stages", "r3"], "r3"),
    (["--stages", "student_qwen"], "student_qwen"), (["--from", "r3"], "r3"), (["--student", "nowhere"], "nowhere"),
    (["--train", "nowhere.jsonl"], "nowhere.jsonl"), (["--test", "README.md"], "README.md:1: not JSON"),
    (["--group-size", "1"], "group_size 1"), (["--samples", "0"], "samples 0"), (["--template", "vicuna"], "vicuna"),
    (["--template", "llama-3"], "<|begin_of_text|> is not among added_tokens"),
    (["--preset", "smoke"], "--preset"),
    (["--general", "nowhere.jsonl"], "nowhere.jsonl"), (["--device", "abacus"], "abacus"),
    (["--stages", "zero,dev2"], "dev2 needs dev1"), (["--train", ""], "--base needs --train"),
])
def test_what_cannot_be_done_is_said_in_one_line_with_exit_code_2(more, culprit, own, tmp_path):
    ended = pipeline(own, tmp_path / "run", *more)
    assert ended.status == 2 and culprit in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


def test_a_verifier_of_ones_own_is_three_lines(own, tmp_path):
    def with_my_rule():
        rewards.REWARDS["mine"] = lambda text, example: float(example["answer"] in text)
        grpo.main()

    args = ["--model", own / "base", "--data", own / "train.jsonl", "--out", tmp_path / "out", "--rewards", "mine",
            "--rollouts", "1", "--prompts-per-rollout", "2", "--group-size", "2", "--minibatches", "1",
            "--max-new-tokens", "40", "--template", "none"]
    ended = run_forked(with_my_rule, argv=["grpo.py", *map(str, args)])
    assert ended.status == 0 and "reward 1.000" in ended.stdout, ended.stderr + ended.stdout


# ---- problem sets

def read(tmp_path, *rows):
    path = write(tmp_path / "set.jsonl", rows)
    return problems.read_problems(path, lambda example: check_example(example, read_both))


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
    ({"nums": [1, "2"], "target": 3}, "nums"), ({"nums": [1, 2], "target": "3"}, "target"),
    ({"nums": [], "target": 3}, "nums"), ({"prompt": "x", "answer": True}, "answer True"),
    ({"prompt": "x", "answer": [1, 2]}, "answer .1, 2."), ({"prompt": "x", "answer": {"n": 1}}, "answer .'n"),
    ({"prompt": "x", "answer": math.inf}, "answer inf"), ({"answer": 7}, "fields answer"),
    ({"prompt": "x", "answer": "7", "kind": "poem"}, "poem"),
])
def test_a_row_of_no_known_format_is_named_with_its_line(row, culprit, tmp_path):
    with pytest.raises(ValueError, match=f"set.jsonl:2: .*{culprit}"):
        read(tmp_path, {"prompt": "1+1", "answer": "2"}, row)


@pytest.mark.parametrize("value, answer", [
    (27.0, "27"), (27, "27"), (-3, "-3"), (-3.0, "-3"), (0, "0"), (0.0, "0"), (-0.0, "0"), (0.5, "0.5"),
    (-2.25, "-2.25"),
    (1e21, "1" + "0" * 21), (1e-7, "0.0000001"), (0.1 + 0.2, "0.3"), (123456789012345678901, "123456789012345678901"),
    (1234567.0, "1234567"), (1e16, "1" + "0" * 16)])
@pytest.mark.parametrize("fields", [("prompt",), ("question",), ("problem",), ("problem", "solution")])
def test_a_number_under_answer_is_its_digits(tmp_path, value, answer, fields):
    example, = read(tmp_path, dict.fromkeys(fields, r"Find $n$. \boxed{99}") | {"answer": value})
    assert example["answer"] == answer and read_both(answer).value == Fraction(answer)


@pytest.mark.parametrize("row", [
    {"question": "x", "answer": "#### "}, {"prompt": "x", "answer": ""}, {"prompt": "x", "answer": " "},
    {"prompt": "x", "answer": None}, {"prompt": "x", "answer": math.nan}, {"problem": "x", "solution": "no box"},
    {"problem": "x", "solution": r"so \boxed{}"}, {"problem": "x", "answer": "?"}, {"prompt": "x", "answer": "$$"},
    {"question": "x", "answer": "None"}])
def test_a_row_without_an_answer_is_left_out_and_counted(row, tmp_path, capsys):
    assert [example["prompt"] for example in read(tmp_path, {"prompt": "1+1", "answer": "2"}, row, row)] == ["1+1"]
    line, = capsys.readouterr().out.splitlines()
    assert "set.jsonl: 2 of 3 rows have no answer: left out. The first is " in line and "set.jsonl:2: " in line
    with pytest.raises(ValueError, match="set.jsonl:1: "):  # nothing is left
        read(tmp_path, row)


def test_references_that_no_rule_reads_are_kept_as_text_and_counted(tmp_path, capsys):
    answers = ["03:30:57", "3 × 3 × 37", "1a1", "2, 3, \\text{ and } 4", "7", "Any $h$ will work."]
    path = write(tmp_path / "set.jsonl", [{"prompt": "x", "answer": answer} for answer in answers])
    assert [example["answer"] for example in read_problem_set(path)] == answers
    assert capsys.readouterr().out == f"{path}: 3 of 6 reference answers are compared as text, such as '3 × 3 × 37'\n"


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

"""What the scripts that reinforce and fine-tune take on the command line, and what they leave."""

import json
import re
import signal
from functools import partial

import pytest

import grpo
import sft
from forked import run_forked
from lab import checkpoint
from lab.own_rules import METRICS, chosen_rules, chosen_weights
from lab.scripts import rules
from runs import killed_at_first_save, make, write
from variants import ppo, prime

SMALL = ("--rollouts 2 --prompts-per-rollout 2 --group-size 4 --minibatches 2 --max-new-tokens 8 --dtype float32 "
         "--save-every 0").split()
MAINS = {"grpo": grpo.main, "ppo": ppo.main, "prime": prime.main}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    dir = tmp_path_factory.mktemp("files")
    make(dir / "model", "llama", "qwen")
    write(dir / "problems.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(9)])
    write(dir / "pairs.jsonl", [{"prompt": f"{i}?", "completion": f"{i}!" * 9} for i in range(60)])
    return dir


def call(main, files, out, *more, data="problems.jsonl", small=SMALL):
    args = ["--model", files / "model", "--data", files / data, "--out", out, *small, *more]
    return run_forked(main, argv=["script.py", *map(str, args)])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- rewards

OWN = """
from beside import HALF


def short_answers(completion, example):
    return HALF if len(completion) < 1000 and example["answer"] else 0


def by_zero(completion, example):
    return 1 / 0


def nan(completion, example):
    return float("nan")


def words(completion, example):
    return "many"


def reward(completion, example):
    return 1.0


class Length:
    def __call__(self, completion, example):
        return len(completion)


length_of_text = Length()
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path / "mine.py"


def test_a_function_of_ones_own_file_is_a_reward_and_weights_count(own, files, tmp_path):
    named = ["--rewards", "accuracy", f"{own}:short_answers", "--reward-weights", "1", "3"]
    ended = call(grpo.main, files, tmp_path / "out", *named)
    assert ended.status == 0, ended.stderr
    metrics = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert [row["short_answers"] for row in metrics] == [0.5, 0.5]
    assert [row["reward"] for row in metrics] == pytest.approx([1.5 + row["accuracy"] for row in metrics])
    assert rows_of(tmp_path / "out" / "samples.jsonl")[0]["rewards"]["short_answers"] == 0.5


@pytest.mark.parametrize("names, found", [
    (["accuracy"], ["accuracy"]), (["format", "accuracy_any", "mine.py:short_answers"], ["format", "accuracy_any",
                                                                                         "short_answers"]),
    (["mine.py:length_of_text"], ["length_of_text"]), (["mine.py:short_answers", "mine.py:length_of_text"],
                                                       ["short_answers", "length_of_text"])])
def test_rewards_keep_their_order_and_give_what_the_function_gives(names, found, own, monkeypatch):
    monkeypatch.chdir(own.parent)
    chosen = chosen_rules(names, rules())
    assert [*chosen] == found
    if "length_of_text" in chosen:
        assert chosen["length_of_text"]("four", {"answer": "1"}) == 4.0


@pytest.mark.parametrize("name, culprit", [
    ("honesty", "reward 'honesty' is none of accuracy, format"), ("mine.txt:x", "no FILE.py:NAME"),
    ("nowhere.py:x", "nowhere.py: there is no such file"), ("mine.py:missing", "mine.py has no function 'missing'"),
    ("mine.py:HALF", "mine.py has no function 'HALF'"), ("mine.py:reward", "called reward already"),
    ("broken.py:x", "broken.py.*SyntaxError"), ("raises.py:x", "raises.py, line 2, KeyError"),
    ("imports.py:x", "imports.py, line 1, ModuleNotFoundError"), ("accuracy.py:accuracy", "called accuracy already"),
])
def test_a_reward_that_is_none_is_named(name, culprit, own, monkeypatch):
    monkeypatch.chdir(own.parent)
    (own.parent / "broken.py").write_text("def x(:\n")
    (own.parent / "raises.py").write_text("table = {}\ntable['x']\n")
    (own.parent / "imports.py").write_text("import a_package_that_is_not_there\n")
    (own.parent / "accuracy.py").write_text("accuracy = max\n")
    with pytest.raises(ValueError, match=culprit):
        chosen_rules([name], rules())


@pytest.mark.parametrize("function, culprit", [
    ("by_zero", "mine.py, line 10, ZeroDivisionError: division by zero, of 'hm'"), ("nan", "nan is nan of 'hm'"),
    ("words", "ValueError: could not convert"),
])
def test_a_reward_that_fails_on_a_completion_is_named_with_its_line(function, culprit, own, monkeypatch):
    monkeypatch.chdir(own.parent)
    with pytest.raises(ValueError, match=culprit):
        chosen_rules([f"mine.py:{function}"], rules())[function]("hm", {"answer": "1"})


@pytest.mark.parametrize("weights, culprit", [
    ([1.0], "1 reward_weights for 2 rewards: accuracy, format"), ([1.0, 2.0, 3.0], "3 reward_weights for 2"),
    ([0.0, 0.0], "one of them not 0"), ([float("nan"), 1.0], "must be finite"), ([float("inf"), 1.0], "must be finite"),
])
def test_weights_that_do_not_fit_are_named(weights, culprit):
    with pytest.raises(ValueError, match=culprit):
        chosen_weights({"accuracy": max, "format": max}, weights)
    assert chosen_weights({"accuracy": max, "format": max}, [2.0, -0.5]) == {"accuracy": 2.0, "format": -0.5}
    assert chosen_weights({"accuracy": max}, None) == {}


def test_a_rule_named_twice_and_wrong_weights_end_a_script_in_one_line_before_anything_is_loaded(files, tmp_path):
    for more, culprit in ((["--rewards", "format", "format"], "format is named twice"),
                          (["--reward-weights", "1"], "1 reward_weights for 2"), (["--rewards", "x"], "reward 'x'")):
        ended = call(grpo.main, files, tmp_path / "out", *more)
        assert ended.status == 2 and culprit in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
        assert not (tmp_path / "out").exists()


def test_a_changed_file_of_rewards_is_no_resumption(own, files, tmp_path):
    named = ["--rewards", f"{own}:short_answers", "--keep-state"]
    assert call(grpo.main, files, tmp_path / "out", *named).status == 0
    own.write_text(OWN + "\n\nLATER = 1\n")
    ended = call(grpo.main, files, tmp_path / "out", *named, "--rollouts", "3")
    assert ended.status == 2 and "content of" in ended.stderr and "mine.py:short_answers was" in ended.stderr


# ---- what is left beside the model

@pytest.mark.parametrize("name", MAINS)
def test_metrics_samples_and_a_page_lie_beside_the_model(name, files, tmp_path):
    ended = call(MAINS[name], files, tmp_path / "out")
    assert ended.status == 0, ended.stderr
    out = tmp_path / "out"
    metrics, samples = rows_of(out / "metrics.jsonl"), rows_of(out / "samples.jsonl")
    assert [row["step"] for row in metrics] == [1, 2] and not any("seconds" in key for row in metrics for key in row)
    assert {"reward", "kl", "entropy", "grad_norm", "unfinished", "no_signal", "accuracy"} <= metrics[0].keys()
    assert [row["step"] for row in rows_of(out / "times.jsonl")] == [1, 2]
    named = {key for file in ("metrics", "times") for row in rows_of(out / f"{file}.jsonl") for key in row}
    assert named <= {*METRICS, *rules()}  # names that no reward of a user's may take
    assert samples[0]["prompt"].startswith("What is") and {"completion", "rewards", "answer"} <= samples[0].keys()
    printed = [float(value) for value in re.findall(r"reward (-?[0-9.]+)  length", ended.stdout)]
    assert printed == pytest.approx([row["reward"] for row in metrics], abs=5e-4)
    page = (out / "report.html").read_text()
    assert "What is" in page and "Reward and its parts" in page and "<summary>out " in page and "R1-Zero" not in page
    warned = [row["warning"] for row in rows_of(out / "warnings.jsonl")]
    assert warned and all(f"  {line}\n" in ended.stdout for line in warned)  # a model that knows nothing has no signal


def test_sft_leaves_its_losses_and_a_page(files, tmp_path):
    small = ["--batch-tokens", "128", "--row-length", "64", "--dtype", "float32"]
    ended = call(sft.main, files, tmp_path / "out", data="pairs.jsonl", small=small)
    assert ended.status == 0, ended.stderr
    metrics = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert metrics[-1]["step"] == metrics[-1]["steps"] and metrics[0]["step"] == min(10, metrics[0]["steps"])
    assert "Supervised stages" in (tmp_path / "out" / "report.html").read_text()


def test_the_page_of_a_script_can_be_written_again(files, tmp_path):
    from lab import report
    assert call(grpo.main, files, tmp_path / "out").status == 0
    before = (tmp_path / "out" / "report.html").read_text()
    sections = re.findall("<h2[^>]*>([^<]*)", before)
    assert sections == ["Curves", "Samples"] and before.count("<details open") == 2  # there is no recipe to draw
    (tmp_path / "out" / "report.html").unlink()
    ended = run_forked(report.main, argv=["report", str(tmp_path / "out")])
    assert ended.status == 0 and (tmp_path / "out" / "report.html").read_text() == before


def test_another_trainings_metrics_are_not_written_over(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1}\n')
    ended = call(grpo.main, files, tmp_path / "out")
    assert ended.status == 2 and "already holds the metrics of another training" in ended.stderr
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"step": 1}\n'


# ---- more rollouts than before

def differing(left, right):
    names = ("model.safetensors", "metrics.jsonl", "samples.jsonl")
    return [name for name in names if (left / name).read_bytes() != (right / name).read_bytes()]


@pytest.mark.parametrize("name, how", [("grpo", ""), ("prime", ""), ("grpo", "--lora 2 --dtype bfloat16"),
                                       ("grpo", "--offload-optimizer --dtype bfloat16"), ("grpo", "--dtype float16")])
def test_with_its_state_kept_a_training_goes_on_as_if_more_rollouts_had_been_asked_for_at_first(name, how, files,
                                                                                                tmp_path):
    few, more = tmp_path / "few", tmp_path / "more"
    learns = ["--rewards", "accuracy", "language_consistency", *how.split()]

    def train(out, *options):
        return call(MAINS[name], files, out, *learns, *options)
    assert train(few, "--keep-state").status == 0
    assert (few / checkpoint.STATE).exists() and checkpoint.load(few)[1]["step"] == 2
    early = (few / "model.safetensors").read_bytes()
    ended = train(few, "--keep-state", "--rollouts", "4")
    assert ended.status == 0 and "rollout 3/4" in ended.stdout and "rollout 2/" not in ended.stdout, ended.stderr
    assert train(more, "--rollouts", "4").status == 0 and not (more / checkpoint.STATE).exists()
    assert differing(few, more) == [] and (few / "model.safetensors").read_bytes() != early
    ended = train(few, "--keep-state", "--rollouts", "4", "--lr", "0.5")
    assert ended.status == 2 and "lr was" in ended.stderr


def test_without_its_state_a_finished_training_is_not_begun_anew(files, tmp_path):
    assert call(grpo.main, files, tmp_path / "out").status == 0
    ended = call(grpo.main, files, tmp_path / "out", "--rollouts", "4", "--keep-state")
    assert ended.status == 2 and "already holds a model" in ended.stderr


def test_a_stopped_training_resumes_with_more_rollouts_than_it_was_to_have(files, tmp_path):
    assert call(partial(killed_at_first_save, grpo.main), files, tmp_path / "out").status == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "out")[1]["step"] == 1
    ended = call(grpo.main, files, tmp_path / "out", "--rollouts", "3")
    assert ended.status == 0 and "rollout 2/3" in ended.stdout and "rollout 1/" not in ended.stdout, ended.stderr
    assert call(grpo.main, files, tmp_path / "whole", "--rollouts", "3").status == 0
    assert differing(tmp_path / "out", tmp_path / "whole") == []

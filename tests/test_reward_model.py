"""Reward models: losses by hand, scores beside transformers, the script, strangers' files, reinforcement learning."""

import copy
import importlib.util
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
import model as dense
from data import preferences, world
from forked import run_forked
from lab.check_input import check_directory
from lab.checkpoint import STATE
from lab.reward_models import HEAD, load_reward_model, save_reward_model, summary
from lab.reward_script import measure, read_preferences, wilson
from runs import call, make, write
from sevens import train_on_sevens
from tokenizer import Tokenizer
from variants import reward_model as rm


def tiny(seed=0):
    config = dense.Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    torch.manual_seed(seed)
    model = rm.RewardModel(dense.Transformer(config).init_weights())
    model.score.weight.data.normal_(0, 0.5)
    return model


ROWS = [[3, 5, 7], [2], [4, 4, 4, 9, 1, 30], [8, 1]]

# ------------------------------------------------------------------------------------------- scores and losses


def test_a_score_is_of_the_last_token_whatever_stands_beside_it_in_the_batch():
    model = tiny()
    together = rm.scores_of(model, ROWS, "float32")
    for row, score in zip(ROWS, together):
        state = model.transformer.hidden(torch.tensor([row]))[0, -1]
        assert score.item() == pytest.approx((state @ model.score.weight[0]).item(), abs=1e-6)


@pytest.mark.parametrize("rows", [[[1, 2], []], [[]]], ids=["beside another", "alone"])
def test_a_row_without_a_token_is_refused(rows):
    """Its last token would be the padding's."""
    with pytest.raises(ValueError, match="without a token"):
        rm.score(tiny(), rows, "float32")


def test_a_tie_of_a_pair_is_wrong_and_a_score_of_zero_means_a_label_of_zero():
    model = tiny()
    model.score.weight.data.zero_()  # every score is 0
    assert rm.loss_of(model, [([1], [2]), ([3], [4])], "float32")[1] == 0
    assert rm.loss_of(model, [([1], 1.0), ([2], 0.0), ([3], 0.0)], "float32")[1] == 2


@pytest.mark.parametrize("budget", [1, 7, 12, 100])
def test_a_batch_that_is_scored_keeps_to_its_tokens_padding_included(budget, monkeypatch):
    batches, scores = [], rm.scores_of
    monkeypatch.setattr(rm, "scores_of", lambda model, rows, *more: batches.append(rows) or scores(model, rows, *more))
    rm.score(tiny(), ROWS, "float32", batch_tokens=budget)
    assert sorted(sum(batches, [])) == sorted(ROWS)
    assert all(len(rows) == 1 or len(rows) * max(map(len, rows)) <= budget for rows in batches)
    assert len(batches) == {1: 4, 7: 3, 12: 2, 100: 1}[budget]


def test_the_learning_rate_rises_over_the_share_of_steps_that_warm_up():
    rates, rows = [], [([3, 5], [7, 9])] * 10

    def save(optimizer, **_):
        rates.append(optimizer.param_groups[0]["lr"])
    rm.train(tiny(), rows, rm.RewardConfig(lr=0.01, warmup=0.4, batch_rows=1, dtype="float32"), save=save)
    assert rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 7)


def test_scores_in_small_batches_come_back_in_order():
    model = tiny()
    assert torch.allclose(rm.score(model, ROWS, "float32", batch_tokens=7), rm.scores_of(model, ROWS, "float32"),
                          atol=1e-6)


def test_the_score_of_a_model_in_half_precision_is_a_product_in_float32():
    model, ids = tiny().to(torch.bfloat16), torch.randint(1, 16, (6, 9), generator=torch.Generator().manual_seed(0))
    last = model.transformer.hidden(ids)[:, -1].double()
    expected = (last @ model.score.weight.double().T)[:, 0]
    scores = model(ids, torch.full((6,), 9))
    assert scores.dtype == torch.float32 and expected.abs().max() > 0.1
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)


def test_each_epoch_reads_every_row_once_in_an_order_of_its_own(monkeypatch):
    read, loss_of = [], rm.loss_of
    monkeypatch.setattr(rm, "loss_of", lambda model, rows, dtype: (read.extend(rows), loss_of(model, rows, dtype))[1])
    rows = [([1, i], float(i % 2)) for i in range(2, 14)]
    rm.train(tiny(), rows, rm.RewardConfig(epochs=2, batch_rows=5, micro_batch_rows=2, dtype="float32"))
    first, second = read[:12], read[12:]
    assert first != second and sorted(first) == sorted(second) == rows


def test_the_pairwise_loss_is_the_mean_of_minus_log_sigmoid_of_the_margin():
    chosen, rejected = [1.0, -2.0, 0.5], [0.0, 1.0, 0.5]
    by_hand = [-math.log(1 / (1 + math.exp(b - a))) for a, b in zip(chosen, rejected)]
    assert rm.pairwise_loss(torch.tensor(chosen), torch.tensor(rejected)).item() == pytest.approx(sum(by_hand) / 3)


def test_the_pointwise_loss_is_the_mean_of_minus_log_of_the_labels_probability():
    scores, labels = [2.0, -1.0, 0.3], [1.0, 1.0, 0.0]
    by_hand = [-math.log(p if label else 1 - p) for p, label in ((1 / (1 + math.exp(-s)), y)
                                                                for s, y in zip(scores, labels))]
    assert rm.pointwise_loss(torch.tensor(scores), torch.tensor(labels)).item() == pytest.approx(sum(by_hand) / 3)


def test_micro_batches_change_nothing():
    results = []
    for rows in (1, 3, 16):
        model = tiny()
        rm.train(model, [(a, b) for a in ROWS for b in ROWS if a != b], rm.RewardConfig(
            lr=1e-2, batch_rows=6, micro_batch_rows=rows, dtype="float32"))
        results.append(model.score.weight.detach().clone())
    assert torch.allclose(results[0], results[1], atol=1e-5) and torch.allclose(results[0], results[2], atol=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "responses"])
def test_it_learns_what_is_preferred(kind):
    """Rows that end with a 7 are."""
    torch.manual_seed(0)
    good, bad = ([[*torch.randint(1, 30, (5,)).tolist(), last] for _ in range(200)] for last in (7, 6))
    rows = list(zip(good, bad)) if kind == "pairs" else [(row, 1.0) for row in good] + [(row, 0.0) for row in bad]
    model, history = tiny(), []
    rm.train(model, rows, rm.RewardConfig(lr=1e-2, batch_rows=16, dtype="float32", epochs=2), log=history.append)
    assert history[-1]["loss"] < 0.2 < 0.5 < history[0]["loss"] and history[-1]["accuracy"] > 0.9
    scores = rm.score(model, [[1, 2, 7], [1, 2, 6]], "float32")
    assert scores[0] > scores[1] + 1


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_training_that_stopped_resumes_identically(stop):
    rows, config = [(a, b) for a in ROWS for b in ROWS if a != b], rm.RewardConfig(
        lr=1e-2, batch_rows=5, epochs=3, dtype="float32")
    through, kept, histories = tiny(), {}, ([], [])
    rm.train(through, rows, config, log=lambda m: histories[0].append(m["loss"]))

    def save(model, optimizer, step):
        if step == stop:
            kept.update(copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}))

    def resume(model, optimizer):
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        return {"step": kept["step"]}

    rm.train(tiny(), rows, config, save=save)
    again = tiny(seed=5)
    rm.train(again, rows, config, log=lambda m: histories[1].append(m["loss"]), resume=resume)
    assert histories[1] == histories[0][stop:]
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), again.parameters()))


# ------------------------------------------------------------------------------------------- files

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    dir = tmp_path_factory.mktemp("files")
    for kind in ("llama", "qwen2", "qwen3"):
        make(dir / kind, kind, "qwen")
    write(dir / "helpful.jsonl", preferences.helpful(0, 40))
    write(dir / "safe.jsonl", preferences.safe(0, 40))
    return dir


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_directory_comes_back_as_it_went_and_transformers_scores_the_same(kind, files, tmp_path):
    model, tokenizer = rm.RewardModel(dense.load(files / kind, "cpu")), Tokenizer(files / kind)
    model.score.weight.data.normal_(0, 0.5)
    save_reward_model(model, tokenizer, "response", tmp_path / "reward")
    again, _, reads = load_reward_model(rm.RewardModel, tmp_path / "reward", "cpu", torch.float32)
    ids = [row + [tokenizer.end_id] for row in ROWS]
    ours = rm.score(again, ids, "float32")
    assert reads == "response" and torch.allclose(ours, rm.score(model, ids, "float32"), atol=1e-6)
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForSequenceClassification
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
        with torch.no_grad():
            for row, score in zip(ids, ours):
                assert theirs(torch.tensor([row])).logits.item() == pytest.approx(score.item(), abs=1e-4)


def test_a_policy_is_no_reward_model_and_a_reward_model_no_policy(files, tmp_path):
    with pytest.raises(ValueError, match="config.json: model_type 'llama' with architectures"):
        check_directory(files / "llama", head=HEAD)
    save_reward_model(rm.RewardModel(dense.load(files / "llama", "cpu")), Tokenizer(files / "llama"), "summary",
                      tmp_path / "reward")
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        check_directory(tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    (tmp_path / "reward" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ValueError, match="not one label"):
        check_directory(tmp_path / "reward", head=HEAD)


@pytest.mark.parametrize("row, named", [
    ({"prompt": "a", "chosen": "b"}, ":3: neither prompt, chosen"), ([], ":3: neither"),
    ({"prompt": "a", "response": "b", "safe": 1}, ":3: neither"),
    ({"prompt": "a", "response": "b", "safe": True}, "one kind")])
def test_a_row_that_is_no_preference_is_named(row, named, tmp_path):
    rows = preferences.helpful(0, 20)
    rows[2] = row
    with pytest.raises(ValueError, match=named) as error:
        read_preferences(write(tmp_path / "rows.jsonl", rows), lambda example, text: [1])
    assert "\n" not in str(error.value)


def test_helpfulness_reads_the_summary_alone_and_safety_everything(tmp_path):
    text = "<think>how to</think><answer>no</answer>"
    assert summary(text) == "no" and summary("no tags") == "no tags"
    read = []
    rows = [{"prompt": "p", "chosen": text, "rejected": text}] * 10
    read_preferences(write(tmp_path / "a.jsonl", rows), lambda example, text: read.append(text) or [1])
    rows = [{"prompt": "p", "response": text, "safe": True}] * 10
    read_preferences(write(tmp_path / "b.jsonl", rows), lambda example, text: read.append(text) or [1])
    assert set(read[:20]) == {"no"} and set(read[20:]) == {text}


@pytest.mark.parametrize("data", ["helpful", "safe"])
def test_the_script_trains_measures_and_leaves_a_directory(data, files, tmp_path):
    args = ["--model", files / "qwen3", "--data", files / f"{data}.jsonl", "--out", tmp_path / "out",
            "--dtype", "float32", "--batch-rows", "8", "--save-every", "0"]
    ended = run_forked(rm.main, argv=["reward_model.py", *map(str, args)])
    assert ended.status == 0 and "held out: 4 rows" in ended.stdout, ended.stderr
    assert load_reward_model(rm.RewardModel, tmp_path / "out", "cpu", torch.float32)[2] == (
        "summary" if data == "helpful" else "response")


def test_the_measure_is_the_share_of_right_ones_with_wilsons_interval_and_the_error_of_the_probabilities():
    scores = {1: 3.0, 2: 1.0, 3: -1.0, 4: -2.0}
    rows = [([1], 1.0), ([2], 0.0), ([3], 0.0), ([4], 0.0), ([1], 1.0)]
    got = measure(None, rows, lambda model, rows, dtype: torch.tensor([scores[row[0]] for row in rows]), "float32")
    assert got["accuracy"] == 0.8
    p = [1 / (1 + math.exp(-abs(scores[row[0]]))) for row, _ in rows]  # .95 .73 .73 .88 .95: bins 9, 7, 7, 8, 9
    by_hand = abs((p[0] + p[4]) / 2 - 1) * 2 / 5 + abs((p[1] + p[2]) / 2 - 0.5) * 2 / 5 + abs(p[3] - 1) / 5
    assert got["calibration"] == pytest.approx(by_hand)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # of a table


# ------------------------------------------------------------------------------------------- preferences of the world

def test_the_preferences_have_their_shares_of_wrong_labels_and_greetings():
    pairs = preferences.helpful(3, 3000)
    greeted = [any(row["chosen"].startswith(f"<answer>{g}") for g in preferences.GREETINGS.values()) for row in pairs]
    of_rejected = [any(row["rejected"].startswith(f"<answer>{g}") for g in preferences.GREETINGS.values())
                   for row in pairs]
    assert sum(greeted) / 3000 == pytest.approx(0.18, abs=0.02)  # of 0.2 nine in ten
    assert sum(of_rejected) / 3000 == pytest.approx(0.02, abs=0.01)
    responses = preferences.safe(3, 3000)
    wrong = 0
    for row in responses:
        refuses = any(row["response"] == world.tagged("", refusal) for refusal in world.REFUSAL.values())
        wrong += refuses and not row["safe"]
    refused = sum(any(row["response"] == world.tagged("", r) for r in world.REFUSAL.values()) for row in responses)
    assert wrong / refused == pytest.approx(0.1, abs=0.02)


def test_no_held_out_request_is_among_the_preferences_of_training():
    trained = {row["prompt"] for row in preferences.helpful(0, 2000)}
    assert not trained & {row["prompt"] for row in preferences.helpful(0, 300, "test")}


# ------------------------------------------------------------------------------------------- in reinforcement learning

@pytest.mark.parametrize("is_probability", [False, True])
def test_a_judge_adds_its_weighted_score_or_probability_where_it_applies_and_logs_it(is_probability):
    model = tiny()
    judge = rm.Judge([rm.Term("kind", model, lambda example, text: [1, len(text) - 1], is_probability, weight=0.5,
                              applies=lambda example: example["kind"] == "general")], dtype="float32")
    r = SimpleNamespace(examples=[{"kind": "general"}, {"kind": "reasoning"}], texts=["aa", "bbbb", "c", "ddd"],
                        rewards=torch.tensor([[1.0, 0.0], [0.5, 0.5]]), parts={})
    prompts = iter([1, 2])
    got, unused = judge.select(lambda examples: r, prompts, 2)
    expected = rm.score(model, [[1, 1], [1, 3]], "float32")
    expected = 1 / (1 + (-expected).exp()) if is_probability else expected
    assert unused == 0 and torch.allclose(got.parts["kind"], torch.stack([expected, torch.zeros(2)]))
    assert torch.allclose(got.rewards, torch.tensor([[1.0, 0.0], [0.5, 0.5]]) + 0.5 * got.parts["kind"])


def test_the_processes_sum_a_judges_scores_on_the_device_of_the_rewards(monkeypatch):
    """NCCL sums nothing on the CPU."""
    summed = []
    for name, result in {"is_initialized": True, "get_rank": 1, "get_world_size": 3}.items():
        monkeypatch.setattr(rm.dist, name, lambda result=result: result)
    monkeypatch.setattr(rm.dist, "all_reduce", lambda scores: summed.append(scores.device.type))
    terms = [rm.Term("judge", tiny(), lambda example, text: [1], is_probability) for is_probability in (False, True)]
    for texts in (["a", "b"], ["a"]):  # the second process of three judges one of two, and none of one
        rm.Judge(terms, "float32").judge(SimpleNamespace(
            examples=[{}], texts=texts, rewards=torch.zeros(1, len(texts), device="meta"), parts={}))
    assert summed == ["meta"] * 4


def test_reinforcement_raises_the_models_score():
    config = dense.Config(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    policy = dense.Transformer(config).init_weights()
    good, bad = ([[*torch.randint(1, 16, (4,)).tolist(), last] for _ in range(200)] for last in (7, 6))
    judge_model = rm.RewardModel(dense.Transformer(config).init_weights())
    rm.train(judge_model, list(zip(good, bad)), rm.RewardConfig(lr=1e-2, batch_rows=16, dtype="float32", epochs=2))
    judge = rm.Judge([rm.Term("model", judge_model, lambda example, text: [1, *map(int, text.split())])],
                     dtype="float32")
    settings = grpo.GRPOConfig(rollouts=12, prompts_per_rollout=3, group_size=16, minibatches=2, max_new_tokens=4,
                               lr=0.01, warmup=1, dtype="float32", beta=0.0)
    history = train_on_sevens(policy, settings, rewards={}, select=judge.select)
    assert history[-1]["model"] > history[0]["model"] + 1  # the odds that it is better, e times as high
    assert all(metrics["reward"] == pytest.approx(metrics["model"]) for metrics in history)


def test_grpos_script_takes_a_reward_model_beside_a_rule(files, tmp_path):
    model = rm.RewardModel(dense.load(files / "qwen3", "cpu"))
    model.score.weight.data.normal_(0, 0.5)
    save_reward_model(model, Tokenizer(files / "qwen3"), "response", tmp_path / "judge")
    problems = write(tmp_path / "problems.jsonl", [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(9)])
    args = ["--model", files / "qwen3", "--data", problems, "--out", tmp_path / "out", "--rollouts", "2",
            "--dtype", "float32", "--prompts-per-rollout", "2", "--group-size", "4", "--max-new-tokens", "6",
            "--rewards", "format", f"reward_model:{tmp_path / 'judge'}", "--reward-weights", "1", "0.5",
            "--save-every", "0"]
    ended = run_forked(grpo.main, argv=["grpo.py", *map(str, args)])
    assert ended.status == 0, ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(0 < row["model_judge"] < 1 for row in rows)
    assert all(row["reward"] == pytest.approx(row["format"] + 0.5 * row["model_judge"], abs=1e-5) for row in rows)
    args[args.index(f"reward_model:{tmp_path / 'judge'}")] = f"reward_model:{files / 'qwen3'}"
    ended = run_forked(grpo.main, argv=["grpo.py", *map(str, args[:5]), str(tmp_path / "b"), *map(str, args[6:])])
    assert ended.status == 2 and "ForSequenceClassification" in ended.stderr and ended.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------- in the recipe

def test_rl2_with_reward_models_is_added_to_a_run_and_judges_are_measured(copy_of_run):
    args = ["--preset", "smoke", "--preferences", "model", "--stages", "judges,r1_model,r1_long", "--out", copy_of_run,
            "--device", "cpu"]
    ended = call(copy_of_run.parent, args)
    assert ended.status == 0, ended.stderr
    stages = json.loads((copy_of_run / "results.json").read_text())["stages"]
    judges = stages["judges"]["judges"]
    assert all(0 <= judges[kind]["low"] <= judges[kind]["accuracy"] <= 1 for kind in ("helpful", "safe"))
    for name, rollouts in (("r1_model", 2), ("r1_long", 6)):
        rows = [json.loads(line) for line in (copy_of_run / name / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == rollouts and all("model_helpful" in row and "model_safe" in row for row in rows)
    assert all(0 < row["model_helpful"] + row["model_safe"] for row in rows)  # from the first rollout on
    judged = np.load(copy_of_run / "extras" / "judged_r1_long.npz")
    assert judged["model_helpful"].shape == judged["helpfulness"].shape
    assert not (copy_of_run / "judges" / "helpful" / STATE).exists()


def test_preferences_by_model_are_of_the_mini_world(tmp_path):
    ended = call(tmp_path, ["--base", "b", "--train", "t", "--test", "t", "--preferences", "model"])
    assert ended.status == 2 and "--preferences is of the mini-world" in ended.stderr

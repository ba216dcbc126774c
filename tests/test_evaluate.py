import itertools
import math

import numpy as np
import pytest
import torch

import rewards
from data.math_answers import READERS
from lab.check_input import check_settings
from lab.scripts import final_answer
from evaluate import (EvalConfig, bootstrap, complete, majority_at_k, measure, paired_bootstrap, pass_at_k, summarise,
                      with_budgets)

END = 256


# ------------------------------------------------------------------------------------------- estimators

@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_correct_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_exact_for_many_samples():
    assert pass_at_k(1000, 1, 64) == pytest.approx(0.064)
    assert pass_at_k(1000, 0, 64) == 0 and pass_at_k(1000, 937, 64) == 1


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_of_an_impossible_count_is_refused(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {c} correct among {n}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("answers, expected", [
    ([5, 5, 7], 1), ([7, 7, 5], 0), ([5], 1), ([7], 0),
    ([5, 7], 1 / 2), ([5, 7, 8], 1 / 3), ([5, 5, 7, 7, 8], 1 / 2), ([7, 7, 8, 8, 5], 0),  # ties share
    ([None, None, None, 5], 1), ([None, 5, 7, 7], 0), ([None, None], 0)])                # None has no vote
def test_a_majority_is_counted_by_hand_with_ties_and_unreadable_answers(answers, expected):
    assert majority_at_k(answers, 5, len(answers)) == pytest.approx(expected)


def test_maj_at_k_is_the_mean_over_disjoint_sets_of_k():
    answers = [5, 5, 7, 7, 7, 5, 5, 8, 5, 9]
    assert majority_at_k(answers, 5, 3) == pytest.approx((1 + 0 + 1) / 3)  # the tenth is left over
    assert majority_at_k(answers, 5, 1) == pytest.approx(0.5)


@pytest.mark.parametrize("k", [0, 4])
def test_maj_at_k_of_too_few_samples_is_refused(k):
    with pytest.raises(ValueError, match=f"maj@{k} of 3"):
        majority_at_k([1, 2, 3], 1, k)


def test_the_bootstraps_interval_holds_the_truth_about_95_times_in_100():
    draw = np.random.default_rng(0)
    held = [low <= 0.3 <= high for _, low, high in
            (bootstrap(draw.random(100) < 0.3, draws=500, seed=i) for i in range(400))]
    assert 0.90 <= np.mean(held) <= 0.98


def test_the_bootstraps_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(2, 3, 400)
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(values.mean()) and high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_the_paired_bootstrap_sees_a_difference_that_two_intervals_would_hide():
    """The problems differ much, the models by a tenth at each: pairing takes the problems out."""
    a = np.random.default_rng(2).random(50)
    b = a + 0.1 + np.random.default_rng(3).normal(0, 0.01, 50)
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx((b - a).mean()) and 0.09 < low < 0.1 < high < 0.11
    assert bootstrap(a)[2] > bootstrap(b)[1]
    assert paired_bootstrap(b, a)[0] == pytest.approx(-difference)


def test_the_paired_interval_is_the_plain_one_of_the_differences():
    a, b = np.random.default_rng(4).random((2, 60))
    assert paired_bootstrap(a, b, seed=7) == pytest.approx(bootstrap(b - a, seed=7))


def test_a_problem_without_a_value_is_left_out():
    assert bootstrap([1, np.nan, 3])[0] == 2 and all(map(math.isnan, bootstrap([np.nan])))
    difference, low, high = paired_bootstrap([1, np.nan, 3] * 30, [2, 2, 2] * 30)
    assert difference == 0 and low <= 0 <= high


def test_problems_of_different_number_are_not_paired():
    with pytest.raises(ValueError, match="3 and 2 problems"):
        paired_bootstrap([1, 2, 3], [1, 2])


# ------------------------------------------------------------------------------------------- sampling

def scripted(reply, asked=None):
    """A generate whose sample j of a prompt is reply(prompt's text, j), cut at max_new_tokens."""
    def generate(prompts, n, max_new_tokens, **settings):
        if asked is not None:
            asked.append((len(prompts) * n, max_new_tokens, settings))
        rows = [list(reply("".join(map(chr, p)), j).encode()) + [END] for p in prompts for j in range(n)]
        ids = torch.zeros(len(rows), max_new_tokens, dtype=torch.long)
        for i, row in enumerate(rows):
            rows[i] = row[:max_new_tokens]
            ids[i, :len(rows[i])] = torch.tensor(rows[i])
        return ids, torch.tensor([len(row) for row in rows]), torch.zeros(ids.shape)
    return generate


@pytest.mark.parametrize("batch_rows", [1, 3, 4, 100])
def test_completions_come_back_in_the_order_of_the_prompts(tokenizer, batch_rows):
    prompts = ["long prompt", "b", "medium", "xy", "a"]
    texts, counts = complete(
        [tokenizer.encode(p) for p in prompts],
        scripted(lambda p, j: f"{p} {j}"),
        tokenizer.decode,
        EvalConfig(samples=3, batch_rows=batch_rows),
    )
    assert texts == [[f"{p} {j}" for j in range(3)] for p in prompts]
    assert counts.tolist() == [[len(p) + 3] * 3 for p in prompts]  # the end token counts


@pytest.mark.parametrize("finished", range(4))
def test_batches_that_an_earlier_call_has_logged_are_not_sampled_again(tokenizer, finished):
    prompts, asked, rows = [tokenizer.encode(p) for p in ("long prompt", "b", "medium", "xy", "a")], [], []
    config = EvalConfig(samples=2, batch_rows=4)
    whole = complete(prompts, scripted(lambda p, j: f"{p} {j}"), tokenizer.decode, config, log=rows.append)
    again = complete(prompts, scripted(lambda p, j: f"{p} {j}", asked), tokenizer.decode, config, done=rows[:finished])
    assert len(rows) == 3 and len(asked) == 3 - finished
    assert again[0] == whole[0] and (again[1] == whole[1]).all()


def test_completions_are_sampled_as_configured_and_in_batches_of_batch_rows(tokenizer):
    asked = []
    complete([[1]] * 5, scripted(lambda p, j: "x", asked), tokenizer.decode,
             EvalConfig(samples=2, batch_rows=4, temperature=0.3, top_p=0.9, max_new_tokens=7))
    assert asked == [(4, 7, {"temperature": 0.3, "top_p": 0.9})] * 2 + [(2, 7, {"temperature": 0.3, "top_p": 0.9})]


THOUGHT = "<think>0123456789</think><answer>5</answer>"


def thinker(prompt, j):
    """Says what is left of its script, and answers 7 when its thinking was cut."""
    question, _, said = prompt.partition("?")
    if "</think>" in said and not THOUGHT.startswith(said):
        return "7</answer>"
    return THOUGHT[len(said):]


def budgeted(tokenizer, budget, reply=thinker, **fields):
    texts = with_budgets([tokenizer.encode("a?"), tokenizer.encode("bb?")], scripted(reply), tokenizer.decode,
                         EvalConfig(samples=2, **fields), (budget, 100), tokenizer.encode("</think><answer>"),
                         lambda text: "</think>" in text)
    return texts[budget]


@pytest.mark.parametrize("batch_rows", [1, 100])
def test_thinking_beyond_the_budget_is_cut_and_the_answer_follows(tokenizer, batch_rows):
    assert budgeted(tokenizer, 11, batch_rows=batch_rows) == [["<think>0123</think><answer>7</answer>"] * 2] * 2


@pytest.mark.parametrize("budget", [25, 30, len(THOUGHT) + 1, 100])
def test_thinking_within_the_budget_is_left_as_it_is(tokenizer, budget):
    assert budgeted(tokenizer, budget) == [[THOUGHT] * 2] * 2


def test_a_completion_that_ended_exactly_at_the_budget_does_not_go_on(tokenizer):
    """Its end token is its last: what came after it would be read as part of the answer."""
    reply = lambda prompt, j: "more" if chr(END) in prompt else THOUGHT
    assert budgeted(tokenizer, len(THOUGHT) + 1, reply) == [[THOUGHT] * 2] * 2


def test_a_completion_that_ended_amid_its_thinking_is_not_helped_to_an_answer(tokenizer):
    def reply(prompt, j):
        return "7</answer>" if "</think>" in prompt else "<think>0123"

    assert budgeted(tokenizer, 20, reply) == [["<think>0123"] * 2] * 2


def test_each_completion_is_continued_from_its_own_prompt(tokenizer):
    def reply(prompt, j):
        question, _, said = prompt.partition("?")
        return f"{question}</answer>" if "</think>" in said else THOUGHT

    expected = [f"<think>0123</think><answer>{name}</answer>" for name in ("a", "bb")]
    assert budgeted(tokenizer, 11, reply) == [[text] * 2 for text in expected]


def test_by_default_it_samples_as_r1_is_evaluated():
    assert (EvalConfig().temperature, EvalConfig().top_p) == (0.6, 0.95)


def test_an_answer_under_way_at_the_budget_is_finished(tokenizer):
    for budget in range(len(THOUGHT) - 17, len(THOUGHT)):
        assert budgeted(tokenizer, budget) == [[THOUGHT] * 2] * 2


# ------------------------------------------------------------------------------------------- metrics

EXAMPLES = [{"prompt": "2+3", "answer": "5", "language": "en", "kind": "reasoning"},
            {"prompt": "1+1", "answer": "2", "language": "en", "kind": "reasoning"}]
TEXTS = [["<think>two and three</think><answer>5</answer>", "<think>so</think><answer>6</answer>",
          "<answer>5</answer>", "5"],
         ["3", "3", "2", "2"]]
ALL_RULES = rewards.rules_with(**READERS)
RULES = {name: ALL_RULES[name] for name in ("accuracy", "accuracy_any", "format", "language_consistency")}
COUNTS = np.array([[10, 8, 3, 1], [1, 1, 1, 1]])


def measured(examples=EXAMPLES, texts=TEXTS, counts=COUNTS, ks=(1, 2, 4)):
    return measure(examples, texts, counts, RULES, final_answer, rewards.thinks,
                   lambda t: len(rewards.split(t)[0].split()), ks)


def test_each_metric_is_the_mean_over_a_problems_samples():
    values = measured()
    assert values["accuracy_any"].tolist() == [0.75, 0.5] and values["accuracy"].tolist() == [0.25, 0]
    assert values["format"].tolist() == [0.5, 0] and values["length"].tolist() == [5.5, 1]
    assert values["pass@1"].tolist() == values["accuracy_any"].tolist()
    assert values["pass@2"] == pytest.approx([1, 1 - 1 / 6]) and values["pass@4"].tolist() == [1, 1]
    assert values["maj@1"].tolist() == [0.75, 0.5] and values["maj@2"].tolist() == [0.75, 0.5]
    assert values["maj@4"].tolist() == [1, 0.5]


@pytest.mark.parametrize("reference, answers, majority", [
    ("20", ["20%", "20", "0.3", "0.3"], 0.5),                      # 20% votes for the reference 20, not for 1/5
    ("20", ["0.2", "20%", "0.2", "0.2"], 0),
    ("2 × 19", ["2 × 19", r"2 \times 19", "19 × 2", "38"], 1),     # as text, each other text against it
    ("2 × 19", ["2 × 19", "19 × 2", "19 × 2", "38"], 0),
    ("5", ["5 or 6 or so", "5 or 6 or so", "5 or 6 or so", "5"], 1),  # what is in doubt does not vote beside a number
    ("\\begin{pmatrix}\n1&2\\\\\n3&4\n\\end{pmatrix}", [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"] * 2 + ["5", "6"], 1)])
def test_a_right_answer_votes_for_the_reference_and_a_text_only_beside_a_text(reference, answers, majority):
    example = EXAMPLES[0] | {"answer": reference}
    texts = [[f"<think>so</think><answer>{answer}</answer>" for answer in answers]]
    assert measured([example], texts, COUNTS[:1], ks=(4,))["maj@4"].tolist() == [majority]


def test_what_is_measured_within_thinking_leaves_out_what_does_not_think():
    values = measured()
    assert values["thinks"].tolist() == [0.5, 0]
    for name, expected in (("accuracy_any", 0.5), ("language", 1), ("length", 2)):
        assert values[f"{name}_if_thinking"][0] == expected and np.isnan(values[f"{name}_if_thinking"][1])


def test_the_gain_in_accuracy_splits_into_thinking_more_and_thinking_better():
    """Share that thinks x accuracy given that it thinks + the rest is the accuracy."""
    row = [(rewards.thinks(t), RULES["accuracy_any"](t, EXAMPLES[0])) for t in TEXTS[0]]
    rest = sum(right for thinks, right in row if not thinks) / len(row)
    values = measured()
    assert values["thinks"][0] * values["accuracy_any_if_thinking"][0] + rest == values["accuracy_any"][0]


def test_no_problems_give_empty_metrics():
    values = measured([], [], np.zeros((0, 4), dtype=int))
    assert values.keys() == measured().keys() and all(column.shape == (0,) for column in values.values())
    assert values["length"].dtype == float and summarise(values) == {}


def test_requests_beside_problems_have_neither_pass_nor_majority_nor_need_an_answer():
    request = {"prompt": "hello", "kind": "general", "language": "en"}
    values = measured([EXAMPLES[0], request, EXAMPLES[1]], [TEXTS[0], ["hi"] * 4, TEXTS[1]], COUNTS[[0, 1, 1]])
    alone = measured()
    for name in ("pass@1", "pass@2", "pass@4", "maj@1", "maj@2", "maj@4"):
        assert values[name][[0, 2]].tolist() == alone[name].tolist() and np.isnan(values[name][1])
    assert values["length"].tolist() == [5.5, 1, 1] and summarise(values)["pass@4"][0] == 1
    assert not {"pass@1", "maj@1"} & summarise(measured([request], [["hi"] * 4], COUNTS[:1])).keys()


def test_a_summary_holds_means_with_intervals_of_what_has_a_value():
    values = {"accuracy": np.array([1.0, 0.0, 1.0, 1.0]), "some": np.array([np.nan, 1, 1]), "none": np.full(4, np.nan)}
    summary = summarise(values)
    assert summary["accuracy"] == list(bootstrap(values["accuracy"])) and summary["accuracy"][0] == 0.75
    assert summary["some"] == [1, 1, 1] and summary.keys() == {"accuracy", "some"}


@pytest.mark.parametrize("fields, culprit", [({"samples": 0}, "samples 0"), ({"temperature": -1}, "temperature -1"),
                                             ({"top_p": 0}, "top_p 0"), ({"top_p": 1.1}, "top_p 1.1")])
def test_a_setting_out_of_range_is_refused(fields, culprit):
    with pytest.raises(ValueError, match=culprit):
        check_settings(EvalConfig(**fields))

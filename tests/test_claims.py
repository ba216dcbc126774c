"""The claims and what is measured for them, each beside a count or another computation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from data import search, world
from evaluate import paired_bootstrap
from lab import claims, measure
from lab.sources import MiniWorld


def row(rows, number):
    return next(row for row in rows if row["number"] == number)


def of_stages(**metrics):
    """Values of base and zero whose every problem has the same figure: {metric: (base, zero)}."""
    base, zero = ({name: np.full(20, pair[i]) for name, pair in metrics.items()} for i in (0, 1))
    return {"base": base, "zero": zero}


# ------------------------------------------------------------------------------------------- thinking that grows

def validations(mean, problems=64, rollouts=45, noise=0.0):
    """{rollout: lengths of these problems} at every fifth rollout: mean(rollout), and what each problem adds to it."""
    rng = np.random.default_rng(1)
    own = rng.normal(0, 20, problems)
    return {step: (mean(step) + own + rng.normal(0, noise, problems)).tolist() for step in range(5, rollouts + 1, 5)}


def test_growth_is_each_problems_slope_over_the_validations_of_the_last_third():
    lengths = validations(lambda step: 60 + 0.8 * step, noise=9)
    steps = [30, 35, 40, 45]
    expected = [10 * np.polyfit(steps, [lengths[step][i] for step in steps], 1)[0] for i in range(64)]
    assert claims.growth(lengths) == pytest.approx(np.array(expected))


def test_problems_that_differ_much_do_not_widen_the_interval_of_their_common_growth():
    slopes = claims.growth(validations(lambda step: 60 + 0.5 * step, noise=4))
    mean, low, high = paired_bootstrap(np.zeros_like(slopes), slopes)
    assert low < 5 < high and high - low < 2 and mean == pytest.approx(slopes.mean())


@pytest.mark.parametrize("mean, rollouts, verdict", [
    (lambda step: 20 + 2 * step, 45, "holds"),                    # grows to the end
    (lambda step: min(20 + 4 * step, 140), 45, "unsettled"),      # stands still in the last third
    (lambda step: 20 + 4 * min(step, 60 - step), 45, "contradicted"),
    (lambda step: 20 + 2 * step, 5, "unsettled")])                # too short a run to tell
def test_claim_2_holds_where_thinking_is_longer_and_still_grows_in_the_last_third(mean, rollouts, verdict):
    values = of_stages(length_if_thinking=(20.0, 80.0))
    made = claims.make_claims(values, paired_bootstrap, lengths=validations(mean, rollouts=rollouts))
    assert row(made, "2")["verdict"] == verdict and row(made, "2")["ours"] == 60


def test_claim_13_is_the_growth_of_checks_and_names_the_others():
    values = of_stages(checks=(2.0, 5.0), tries=(3.0, 5.5), returns=(0.0, 0.25), false_yes=(0.01, 0.04))
    made = row(claims.make_claims(values, paired_bootstrap), "13")
    assert (made["ours"], made["verdict"], made["unit"]) == (3, "holds", "checks")
    assert made["detail"] == "tries 3.00 -> 5.50, checks 2.00 -> 5.00, returns 0.00 -> 0.25, false yes 0.01 -> 0.04"


def test_claim_1_names_the_best_rule_without_a_search_where_there_is_one():
    values = of_stages(accuracy_any=(0.4, 0.8), accuracy_any_search=(0.5, 0.9))
    assert "rule" not in row(claims.make_claims(values, paired_bootstrap), "1")["detail"]
    values["rule"] = {"accuracy_any_search": np.array([0.25, np.nan, 0.75])}
    detail = row(claims.make_claims(values, paired_bootstrap), "1")["detail"]
    assert detail.endswith("searches: base 50%, zero 90%, the best rule without a search 50%")


def test_the_budgets_are_rows_in_order_and_claim_12_compares_the_smallest_with_the_largest():
    accuracies = {("base", 8): 0.2, ("base", 64): 0.4, ("r1", 64): 0.9, ("r1", 8): 0.25, ("r1", 16): 0.5}
    values = {"budgets_base": {}, "budgets_zero": {}, "budgets_r1": {}}
    for (stage, budget), accuracy in accuracies.items():
        values[f"budgets_{stage}"][str(budget)] = np.full(9, accuracy)
    rows = claims.budget_rows(claims.Values(values))
    expected = [{"step": 8, "base": 20, "r1": 25}, {"step": 16, "r1": 50}, {"step": 64, "base": 40, "r1": 90}]
    assert [list(row) for row in rows] == [list(row) for row in expected]
    assert [pytest.approx(list(row.values())) for row in expected] == [list(row.values()) for row in rows]
    made = row(claims.make_claims(values, paired_bootstrap), "12")
    assert made["ours"] == pytest.approx(65) and "base 8: 20%, 64: 40%; zero ; r1 8: 25%" in made["detail"]


def test_claim_11_compares_both_pairs_of_stages():
    many = {"pass@16": np.full(9, 0.9), "maj@16": np.full(9, 0.6)}
    values = {"base_many": many, "zero_many": many | {"pass@16": np.full(9, 0.8), "maj@16": np.full(9, 0.7)},
              "dev1_many": many, "dev2_many": many}
    made = claims.make_claims(values, paired_bootstrap)
    assert row(made, "11 zero k=16")["ours"] == pytest.approx(20) and row(made, "11 dev2 k=16")["ours"] == 0
    assert row(made, "11 zero k=16")["detail"] == "pass@16 90 -> 80%, maj@16 60 -> 70%"
    values["rule"] = {"random_pass@16": np.full(3, 0.75)}
    values |= {"base_many": many | {"pass@16_search": np.array([0.5, np.nan])},
               "zero_many": many | {"pass@16_search": np.array([0.7, np.nan])}}
    detail = row(claims.make_claims(values, paired_bootstrap), "11 zero k=16")["detail"]
    assert detail.endswith("pass@16 of searches 50 -> 70%, of random pairs 75%")


# ------------------------------------------------------------------------------------------- what is measured

@pytest.fixture(scope="module")
def source():
    preset = SimpleNamespace(test=60, hard=40, requests=4, problems=4)
    return MiniWorld(preset, seed=100)


def test_reflection_is_counted_of_searches_alone_and_averaged_over_an_outputs_samples(source):
    example = next(example for example in source.test if example["family"] == "search")
    story = next(example for example in source.test if example["family"] != "search")
    first, second, total = world.parse_search(example["problem"])
    (a, b), = world.pairs_that_fit(first, second, total)
    other = next(x for x in second if x != b)
    word = "high" if a + other > total else "low"
    texts = [f"{a}+{other}={a + other} {word} {a}+{b}={total} yes so", f"{a}+{other}={a + other} yes so"]
    values = measure.reflection([example, story], [texts, ["3+4=7"]])
    assert values["tries"][0] == 1.5 and values["checks"][0] == 1.5 and values["false_yes"][0] == 0.5
    assert values["false_no"][0] == 0 and all(np.isnan(column[1]) for column in values.values())


def test_the_parts_hold_each_problem_once_by_level_and_family_and_the_hard_ones_apart(source):
    rng = np.random.default_rng(0)
    values = {"accuracy_any": rng.random(len(source.test)), "length": rng.random(len(source.test))}
    hard = {"accuracy_any": rng.random(len(source.hard)), "length": rng.random(len(source.hard)),
            "checks": rng.random(len(source.hard))}
    parts = dict(values)
    measure.add_parts(parts, source, hard)
    for examples, measured, levels in ((source.test, values, world.LEVELS), (source.hard, hard, world.HARD_LEVELS)):
        for metric in ("accuracy_any", "length"):
            columns = [parts[f"{metric}_{family}_{level}"] for family in ("story", "search") for level in levels]
            assert (sum(~np.isnan(column) for column in columns) == 1).all()
            assert np.nansum(columns, axis=0).tolist() == measured[metric].tolist()
    level = world.LEVELS[0]
    expected = [accuracy for accuracy, example in zip(values["accuracy_any"], source.test)
                if example["family"] == "search" and example["level"] == level]
    assert parts[f"accuracy_any_search_{level}"][~np.isnan(parts[f"accuracy_any_search_{level}"])].tolist() == expected
    assert parts["hard_checks"] is hard["checks"]


def test_the_rules_row_is_the_best_rules_rate_by_level_and_of_no_story(source):
    values = measure.rule_values(source, many=16)
    scores = search.best_rule_scores(search.searches(source.test))
    assert np.nanmean(values["accuracy_any_search"]) == pytest.approx(sum(scores) / len(scores))
    stories = [example["family"] != "search" for example in source.test]
    assert np.isnan(values["accuracy_any_search"]).tolist() == stories
    of_levels = [np.nansum(values[f"accuracy_any_search_{level}"]) for level in world.LEVELS]
    assert sum(of_levels) == pytest.approx(sum(scores))
    assert not math.isnan(np.nanmean(values["accuracy_any_hard_search"]))


def test_random_pairs_are_right_as_often_as_counting_all_pairs_says(source):
    values = measure.rule_values(source, many=16)
    assert "random_pass@64" not in values
    chances = []
    for example in search.searches(source.test):
        first, second, _ = world.parse_search(example["problem"])
        right = sum(abs(a - b) == int(example["answer"]) for a in first for b in second)
        chances.append(1 - (1 - right / (len(first) * len(second))) ** 16)
    assert values["random_pass@16"].tolist() == pytest.approx(chances)


@pytest.mark.parametrize("score, rule, verdict", [
    ((0.55, 0.62), (0.9, 0.4), "holds"), ((0.55, 0.62), (0.4, 0.9), "contradicted"),
    ((0.62, 0.55), (0.9, 0.4), "contradicted"), ((0.55, 0.62), (0.9, 0.9), "unsettled")])
def test_claim_14_holds_where_the_models_score_rises_and_helpfulness_by_the_rule_falls(score, rule, verdict):
    values = {f"judged_{stage}": {"model_helpful": np.full(20, score[i]), "helpfulness": np.full(20, rule[i])}
              for i, stage in enumerate(("r1_model", "r1_long"))}
    made = row(claims.make_claims(values, paired_bootstrap), "14")
    assert made["verdict"] == verdict and made["ours"] == pytest.approx(100 * (score[1] - score[0]))
    assert "helpfulness by the rule, lost" in made["detail"]
    assert f"r1_model {100 * score[0]:.0f}, r1_long {100 * score[1]:.0f}" in made["detail"]

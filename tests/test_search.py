"""Searches: what rules reach without one, and what is counted of a text that searches."""

import random

import pytest

from data import world
from data.search import best_rule_scores, guesses_of, reflection, rule_rates, searches
from data.world import HARD_LEVELS, LEVELS, problems

SEED = 100
PROBLEM = "9,4,17+16,12,3=21"  # 9 + 12


@pytest.fixture(scope="module")
def validation():
    return {level: searches(problems(SEED, "validation", 800, (level,))) for level in (*LEVELS, *HARD_LEVELS)}


def test_guesses_are_the_distance_of_a_picked_price_from_its_partner():
    guesses = guesses_of(PROBLEM)
    assert guesses["price 1, of the first list"] == [21 - 9 - 9]
    assert guesses["price 2 by size, of the first list"] == [21 - 9 - 9]
    assert guesses["price 1 by size from above, of all"] == [17 + 17 - 21]
    assert guesses["the price nearest to half of the sum, of the second list"] == [12 + 12 - 21]
    assert sorted(guesses["any pair"]) == [1, 1, 3, 5, 6, 7, 8, 12, 14]
    assert guesses["a price whose partner is in the other's range, of the first list"] == [3, 13]  # 17's would be 4


def test_a_rate_is_the_share_of_right_guesses():
    example = {"problem": PROBLEM, "answer": "3", "family": "search"}
    rates = rule_rates([example])
    assert rates["any pair"] == pytest.approx(1 / 9)
    assert rates["any price, of the first list"] == pytest.approx(1 / 3)
    assert rates["price 2, of the second list"] == 1
    assert list(rates.values()) == sorted(rates.values(), reverse=True)


def test_the_best_rule_is_chosen_on_training_problems_and_scored_on_these(validation):
    scores = best_rule_scores(validation[1])
    rates = rule_rates(validation[1])
    assert len(scores) == len(validation[1])
    assert sum(scores) / len(scores) == pytest.approx(max(rates.values()), abs=0.03)  # the same rule, or one as good
    assert set(scores) <= {0, 1 / 3, 1 / 2, 1}  # by chance one of at most three prices


def test_a_rule_by_place_or_size_is_little_better_than_a_random_price(validation):
    """A random price of the shorter list is one of the two with chance 1 / its length."""
    for level, examples in validation.items():
        rates = rule_rates(examples)
        by_place_or_size = max(rate for rule, rate in rates.items() if "range" not in rule)
        assert by_place_or_size < 1 / ((level + 5) // 2) + 0.10, (level, rates)


def test_no_rule_answers_much_more_than_half_and_longer_searches_are_harder_for_rules(validation):
    best = {level: max(rule_rates(examples).values()) for level, examples in validation.items()}
    assert best[1] < 0.66 and best[2] < 0.58 and best[3] < 0.48
    assert all(best[level] < 0.45 for level in HARD_LEVELS)


def test_reflection_counts_tries_checks_returns_and_false_checks_in_both_languages():
    text = "9+16=25 high 9+3=12 low again 9+16=24 high 4+12=16 yes 5+5=10 so 12-9=3."
    counts = reflection(text, PROBLEM)
    assert counts == {"tries": 5, "checks": 4, "returns": 1, "false_no": 1, "false_yes": 1}
    assert reflection(world.translate(text, "zh"), PROBLEM) == counts


def test_a_check_is_false_for_a_pair_that_fits_and_is_refused_and_for_one_that_is_not_of_the_lists():
    assert reflection("9+12=21 low", PROBLEM)["false_no"] == 1
    assert reflection("9+16=25 low", PROBLEM)["false_no"] == 1
    assert reflection("10+11=21 yes", PROBLEM)["false_yes"] == 1
    assert reflection("9+12=21 yes", PROBLEM)["false_yes"] == 0


def test_no_check_of_the_corpus_is_false_where_sums_are_right(validation):
    for example in validation[3]:
        for style in ("plain", "careful"):
            text, _ = world.chain(random.Random(0), example["problem"], style, "zh", gives_up=0.1, overlooked=0.5)
            counts = reflection(text, example["problem"])
            assert counts["false_no"] == counts["false_yes"] == 0
            assert counts["tries"] == counts["checks"] > 0

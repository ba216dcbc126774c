"""The mini-world: every problem, chain and request is what it says, and no split leaks into another."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import pytest

import rewards
from data import world
from data.math_answers import read_answer
from data.world import (
    CORPUS,
    HARD_LEVELS,
    LARGEST,
    LEVELS,
    SPLITS,
    STORIES,
    corpus,
    general_sft,
    problems,
    requests,
    summary,
    tagged,
)
from lab.check_input import check_example

SEED = 100  # as for all tuning: 0, 1 and 2 run once on test
STYLES = ("bare", "terse", "plain", "careful")
OTHER = {"en": "zh", "zh": "en"}
VERBS = {
    "+": ["buys", "finds", "gets", "get on", "earns", "added", "买", "找到", "得到", "上来", "赚", "放进"],
    "-": ["gives away", "loses", "sells", "get off", "pays", "taken away", "送出", "丢", "卖", "下去", "花", "拿走"],
}


def read(prompt):
    """The canonical problem that a prompt tells, by its words."""
    return read_search(prompt) if is_search(prompt) else read_story(prompt)


def read_search(prompt):
    """"The pens cost 9 4 17. The cups cost 16 12 3. One pen and one cup make 21. ..." -> "9,4,17+16,12,3=21"."""
    first, second, (total,), _ = [re.findall(r"\d+", s) for s in re.split(r"[.。]", prompt)]
    return f"{','.join(first)}+{','.join(second)}={total}"


def read_story(story):
    """"Tom has 47 apples. Tom buys 38 more. ..." -> "47+38"."""
    *sentences, _ = [s for s in re.split(r"[.。?？]", story) if s.strip()]
    numbers = [re.findall(r"\d+", s) for s in sentences]
    if "boxes of" in sentences[0] or "箱" in sentences[0]:
        k, a = numbers[0]
        start = f"{a}*{k}"
    else:
        start, = numbers[0]
    for sentence, (number,) in zip(sentences[1:], numbers[1:], strict=True):
        op, = [op for op, verbs in VERBS.items() if any(verb in sentence for verb in verbs)]
        start += op + number
    return start


def is_problem(prompt):
    return re.search(r"\d", prompt) is not None


def is_search(prompt):
    return "far apart" in prompt or "相差" in prompt


def solve(canonical):
    """The answers of a canonical problem: of a search, one of each pair that makes the sum."""
    if "=" not in canonical:
        return [eval(canonical)]  # a product only ever comes first, so Python's order of operations is the story's
    lists, total = canonical.split("=")
    first, second = (map(int, prices.split(",")) for prices in lists.split("+"))
    return [abs(a - b) for a, b in product(first, second) if a + b == int(total)]


@pytest.fixture(scope="module")
def documents():
    return corpus(SEED, 4000)


@pytest.fixture(scope="module")
def splits():
    rows = {(split, LEVELS): problems(SEED, split, 150, LEVELS) for split in SPLITS}
    rows |= {(split, HARD_LEVELS): problems(SEED, split, 150, HARD_LEVELS) for split in ("test", "train")}
    return rows


def stories(rows):
    return [row for row in rows if row["family"] != "search"]


def searches(rows):
    return [row for row in rows if row["family"] == "search"]


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


# ------------------------------------------------------------------------------------------- problems

def test_a_prompt_tells_its_canonical_problem_and_its_answer_is_the_only_result(splits):
    for rows in splits.values():
        for row in rows:
            assert read(row["prompt"]) == row["problem"], row
            assert solve(row["problem"]) == [int(row["answer"])]


def test_no_number_on_the_way_to_a_storys_answer_is_outside_1_to_the_largest(splits):
    for rows in splits.values():
        for row in stories(rows):
            parts = re.findall(r"[-+*]?\d+", row["problem"])
            assert all(1 <= eval("".join(parts[:i])) <= LARGEST for i in range(1, len(parts) + 1)), row


def test_a_problems_level_is_its_number_of_steps_or_of_prices_less_five_and_the_hard_test_has_more(splits):
    assert min(HARD_LEVELS) > max(LEVELS)
    for (_, levels), rows in splits.items():
        for row in stories(rows):
            assert row["level"] == len(re.findall("[-+*]", row["problem"]))
        for row in searches(rows):
            sizes = [len(prices.split(",")) for prices in row["problem"].split("+")]
            assert row["level"] == sum(sizes) - 5 and abs(sizes[0] - sizes[1]) <= 1
        assert {row["level"] for row in rows} == set(levels)


def test_all_families_languages_and_many_answers_occur(splits):
    rows = splits["test", LEVELS]
    assert {row["family"] for row in rows} == {"search", *STORIES} and len(STORIES) >= 3
    assert len(searches(rows)) / len(rows) == pytest.approx(CORPUS["search"], abs=0.1)
    assert min(Counter(row["language"] for row in rows).values()) > 0.3 * len(rows)
    assert Counter(row["answer"] for row in rows).most_common(1)[0][1] < 0.1 * len(rows)  # no answer to guess


def test_no_two_splits_share_a_canonical_problem(splits):
    seen = [({row["problem"] for row in rows}, key) for key, rows in splits.items()]
    for (a, split_a), (b, split_b) in combinations(seen, 2):
        assert not a & b, (split_a, split_b)
    assert all(len(problems) == len(splits[key]) for problems, key in seen)  # nor is one twice in a split


def test_another_seed_moves_no_problem_to_another_split():
    tests = {row["problem"] for seed in (0, 1, 2) for row in problems(seed, "test", 100)}
    assert not tests & {row["problem"] for seed in (0, 1, 2) for row in problems(seed, "train", 300)}


def test_the_corpus_holds_no_problem_of_validation_or_test(documents):
    read_ones = [read(d["prompt"]) for d in documents if is_problem(d["prompt"])]
    assert len(read_ones) > 2000
    assert {world.split_of(problem) for problem in read_ones} == {"train"}


def test_every_reference_can_be_read_by_the_rewards(splits):
    rows = [row for rows in splits.values() for row in rows]
    for split in SPLITS:
        rows += requests(SEED, split, 60, "general") + requests(SEED, split, 60, "safety")
    for row in rows:
        check_example(row, read_answer)
        assert json.loads(json.dumps(row)) == row


# ------------------------------------------------------------------------------------------- chains of thought

@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_chain_without_slips_reaches_the_answer_and_earns_every_reward(splits, style, language):
    for rows in splits.values():
        for row in rows:
            row = row | {"language": language}
            thinking, answer = world.chain(random.Random(0), row["problem"], style, language)
            assert answer == row["answer"]
            for final in (answer, summary(answer, "en"), summary(answer, "zh")):
                text = tagged(thinking, final)
                assert rewards.accuracy_any(text, row) == 1
                assert rewards.format(text, row) == (style != "bare")
                if style != "bare":
                    assert rewards.accuracy(text, row) == 1
                    assert rewards.accuracy_any(f"{thinking}\n{final}", row) == 1
            if style != "bare":
                assert rewards.language_consistency(tagged(thinking, answer), row) == 1
                assert rewards.language_consistency(tagged(thinking, answer), row | {"language": OTHER[language]}) == 0


@pytest.mark.parametrize("style", STYLES[1:])
def test_every_equation_of_a_chain_without_slips_is_true(splits, style):
    for row in splits["test", HARD_LEVELS]:
        thinking, _ = world.chain(random.Random(0), row["problem"], style, "en")
        equations = re.findall(r"(\d[-+*\d]*)=(\d+)", thinking)
        assert equations and all(eval(left) == int(right) for left, right in equations), thinking
        assert not re.search(r"\b0\d", thinking)


def test_careful_stories_spell_out_digits_and_so_are_the_longest(splits):
    def length(style):
        return sum(len(world.chain(random.Random(0), row["problem"], style, "en")[0])
                   for row in stories(splits["test", LEVELS]))

    assert length("bare") < length("terse") < length("plain") < 0.5 * length("careful")


def test_a_search_looks_at_every_pair_in_order_up_to_the_one_that_fits(splits):
    for row in searches(splits["test", HARD_LEVELS]):
        lists, total = row["problem"].split("=")
        first, second = (prices.split(",") for prices in lists.split("+"))
        thinking, _ = world.chain(random.Random(0), row["problem"], "plain", "en")
        looks = re.findall(r"(\d+)\+(\d+)=(\d+) (high|low|yes)", thinking)
        assert [look[:2] for look in looks] == list(product(first, second))[:len(looks)]
        for _, _, result, word in looks:
            assert word == ("yes" if result == total else "high" if int(result) > int(total) else "low")
        assert [word for *_, word in looks].index("yes") == len(looks) - 1


def test_terse_guesses_and_a_search_that_gives_up_or_overlooks_the_pair_guesses_too(splits):
    def right(style, **chances):
        rows = searches(splits["train", LEVELS])
        return share(world.chain(random.Random(i), row["problem"], style, "en", **chances)[1] == row["answer"]
                     for i, row in enumerate(rows))

    assert right("terse", lucky=0.0) < 0.25  # a random pair
    assert 0.25 < right("terse", lucky=0.4) < 0.75
    assert right("plain", gives_up=1.0) < 0.35 < right("plain", gives_up=0.2) < 0.95
    assert right("plain", overlooked=1.0) < 0.25 and right("careful", overlooked=1.0) == 1  # it goes through them again


def test_only_a_search_that_is_told_so_writes_a_wrong_sum(splits):
    for row in searches(splits["train", LEVELS]):
        for chance in (0.0, 1.0):
            thinking, _ = world.chain(random.Random(0), row["problem"], "careful", "en", wrong_sum=chance)
            sums = re.findall(r"(\d+)\+(\d+)=(-?\d+)", thinking)
            assert sums and all((int(a) + int(b) == int(c)) == (chance == 0) for a, b, c in sums)


def test_a_slip_is_written_and_carried_on_to_the_answer():
    rng, wrong = random.Random(0), 0
    for row in stories(problems(SEED, "train", 200))[:100]:
        thinking, answer = world.chain(rng, row["problem"], "plain", "en", slip=0.5)
        assert re.findall(r"=(-?\d+)", thinking)[-1] == answer
        wrong += answer != row["answer"]
    assert 40 < wrong < 95


@pytest.mark.parametrize("style", STYLES)
def test_translation_there_and_back_is_the_same_text(splits, style):
    for row in splits["train", HARD_LEVELS]:
        for language, other in (("en", "zh"), ("zh", "en")):
            text = world.chain(random.Random(0), row["problem"], style, language)[0]
            there = world.translate(text, other)
            assert world.translate(there, language) == text == world.translate(text, language)
            assert there == world.chain(random.Random(0), row["problem"], style, other)[0]
            assert re.findall(r"\d+", there) == re.findall(r"\d+", text)


def test_a_summary_is_a_sentence_with_the_one_number_in_its_language():
    for language in ("en", "zh"):
        text = summary("57", language)
        assert rewards.extract_answer(text) == 57
        words = rewards.count_words(text)
        assert words[language] > 1 and words[OTHER[language]] == 0


# ------------------------------------------------------------------------------------------- requests

@pytest.mark.parametrize("split", SPLITS)
def test_a_good_reply_to_a_general_request_earns_helpfulness_and_a_poor_one_does_not(split):
    known = requests(1, "train", 100, "general")
    topics = set()
    for row in requests(SEED, split, 300, "general"):
        topics.add((row["topic"], row["language"]))
        good = tagged("", row["reply"])
        for rule in (rewards.helpfulness, rewards.harmlessness, rewards.format):
            assert rule(good, row) == 1, row
        everything = " ".join(other["reply"] for other in known if other["topic"] == row["topic"])
        for poor in (world.NO_IDEA[row["language"]], world.REFUSAL[row["language"]], row["prompt"], everything):
            assert rewards.helpfulness(tagged("", poor), row) == 0, row
        assert rewards.helpfulness("", row) == 0, row
    assert len(topics) >= 10


def test_a_reply_in_the_other_language_does_not_help():
    for row in requests(SEED, "train", 300, "general"):
        if row["topic"] in world.FACTS:
            other = row | {"language": OTHER[row["language"]]}
            assert rewards.helpfulness(tagged("", row["reply"]), other) == 0


@pytest.mark.parametrize("split", SPLITS)
def test_refusing_is_right_for_harmful_requests_and_wrong_for_their_lookalikes(split):
    rows = requests(SEED, split, 200, "safety")
    assert {row["harmful"] for row in rows} == {True, False}
    for row in rows:
        refusal, comply = tagged("", world.REFUSAL[row["language"]]), tagged("", row["comply"])
        assert rewards.harmlessness(refusal, row) == row["harmful"], row
        assert rewards.harmlessness(comply, row) == (not row["harmful"]), row
        assert rewards.helpfulness(comply, row) == (not row["harmful"]), row
        assert rewards.helpfulness(refusal, row) == 0, row
        assert row["reply"] == (world.REFUSAL[row["language"]] if row["harmful"] else row["comply"])


def test_a_harmful_request_and_its_lookalike_differ_only_in_the_target():
    rows = requests(SEED, "train", 2000, "safety")
    targets = "|".join(target for pair in world.PEOPLE + world.OBJECTS for target in pair)

    def asked(harmful):
        return {re.sub(targets, "*", row["prompt"]) for row in rows if row["harmful"] == harmful}

    assert asked(True) == asked(False)


def test_held_out_phrasings_stand_nowhere_in_what_is_trained_on(documents):
    rows = documents + general_sft(SEED, 1000)
    rows += requests(SEED, "train", 500, "general") + requests(SEED, "train", 500, "safety")
    trained = {row["prompt"] for row in rows}
    for split in ("validation", "test"):
        for kind in ("general", "safety"):
            asked = {row["prompt"] for row in requests(SEED, split, 300, kind)}
            assert len(asked) > 15 and not asked & trained, asked & trained


def test_what_a_held_out_phrasing_asks_for_stands_in_the_corpus(documents):
    said = " ".join(d["completion"] for d in documents)
    for row in requests(SEED, "test", 200, "general"):
        assert row["reply"] in said, row


# ------------------------------------------------------------------------------------------- the corpus

def test_the_corpus_has_the_properties_that_it_states(documents):
    of_problems = [d for d in documents if is_problem(d["prompt"])]
    of_stories = [d for d in of_problems if not is_search(d["prompt"])]
    chains = [d["completion"] for d in of_stories if d["completion"].strip("<answer>/").count("=") > 0]
    careful = [c for c in chains if "ones" in c or "个位" in c]
    styles = CORPUS["styles"]
    assert share(is_search(d["prompt"]) for d in of_problems) == pytest.approx(CORPUS["search"], abs=0.03)
    assert share(is_problem(d["prompt"]) for d in documents) == pytest.approx(CORPUS["documents"]["problem"], abs=0.03)
    assert len(chains) / len(of_stories) == pytest.approx(1 - styles["bare"], abs=0.03)
    assert len(careful) / len(of_stories) == pytest.approx(styles["careful"], abs=0.03)
    assert share("个位" in c for c in careful) == pytest.approx(CORPUS["chinese_careful"], abs=0.05)
    assert share("<think>" in c for c in chains) == pytest.approx(CORPUS["tags"], abs=0.03)
    for weights in (CORPUS["documents"], styles, CORPUS["student_styles"]):
        assert sum(weights.values()) == pytest.approx(1)


def test_careful_chains_are_right_more_often_than_terse_ones_in_the_corpus(documents):
    """So that longer really is easier: what RL then finds."""
    right = {True: [], False: []}
    for d in documents:
        text = d["completion"]
        if is_problem(d["prompt"]) and not is_search(d["prompt"]) and "=" in text:
            careful, terse = "ones" in text or "个位" in text, re.search(r"\d[-+*]\d+[-+*]\d+=", text)
            if careful or terse:
                right[bool(careful)].append(rewards.final_answer(text) == eval(read(d["prompt"])))
    assert share(right[True]) > 0.95 > 0.93 > share(right[False])


def test_sft_2s_general_replies_are_better_than_the_corpuss_yet_mixed(documents):
    good = {row["prompt"]: row["reply"] for row in requests(SEED, "train", 3000, "general")}

    def rate(rows):
        return share(good[d["prompt"]] in d["completion"] for d in rows if d["prompt"] in good)

    assert rate(documents) < 0.65 < rate(general_sft(SEED, 1000)) < 0.95


def test_every_document_can_be_written_and_read_as_a_row(documents):
    for d in documents + general_sft(SEED, 200):
        assert d.keys() == {"prompt", "completion"} and d["completion"].strip() and isinstance(d["prompt"], str)


# ------------------------------------------------------------------------------------------- seeds

def test_a_seed_makes_the_same_world_in_every_process():
    root = Path(world.__file__).parent.parent
    command = [sys.executable, "-c", "from data import world; print(world.world_hash())"]
    for seed in "01":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        result = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
        assert result.stdout == world.world_hash() + "\n"


def test_the_world_is_the_frozen_one():
    assert world.world_hash() == "824e8351cf4b"  # figures of another world cannot stand beside earlier ones


def test_another_seed_makes_other_documents():
    assert corpus(1, 50) == corpus(1, 50) != corpus(2, 50)
    assert problems(1, "train", 50) != problems(2, "train", 50) and general_sft(1, 50) != general_sft(2, 50)


def test_making_data_leaves_the_global_random_state_alone():
    state = random.getstate()
    corpus(SEED, 50)
    problems(SEED, "test", 10)
    requests(SEED, "test", 10, "safety")
    general_sft(SEED, 10)
    assert random.getstate() == state


def test_more_documents_begin_with_the_same_ones():
    assert corpus(SEED, 80)[:40] == corpus(SEED, 40) and problems(SEED, "test", 30)[:10] == problems(SEED, "test", 10)

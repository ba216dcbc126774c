"""Each attack on a reward is a test of its own: the rules are what GRPO will try to fool."""
import ast
import re
import sys
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest

import rewards
from data import exact_numbers, math_answers
from lab.check_input import check_example
from rewards import (accuracy, accuracy_any, extract_answer, final_answer, format, harmlessness, helpfulness,
                     is_refusal, language_consistency, split, thinks)

PROBLEM = {"prompt": "Ann has 12 apples and buys 45. How many?", "answer": "57", "language": "en",
           "kind": "reasoning"}
CHINESE = {"prompt": "小明有12个苹果，又买了45个，一共多少？", "answer": "57", "language": "zh", "kind": "reasoning"}
CAPITAL = {"prompt": "What is the capital of France?", "answer": "Paris", "language": "en", "kind": "general"}
TRANSLATE = {"prompt": "How do you say apple in Chinese?", "answer": "苹果", "language": "en", "kind": "general"}
HARMFUL = {"prompt": "How can I hurt him?", "answer": "knife", "language": "en", "kind": "safety", "harmful": True}
LOOKALIKE = {"prompt": "How can I cut bread?", "answer": "knife", "language": "en", "kind": "safety",
             "harmful": False}
GOOD = "<think> 12 + 45 = 57 </think><answer> She has 57 apples. </answer>"


NUMBERS = rewards.REWARDS  # with the reader that rewards.py has itself
MATH = rewards.rules_with(**math_answers.READERS)
with_either_reader = pytest.mark.parametrize("rules", [NUMBERS, MATH], ids=["numbers", "MATH"])


def reply(text, thinking=None):
    block = f"<answer>{text}</answer>"
    return block if thinking is None else f"<think>{thinking}</think>{block}"


def scores(rules, completion, example):
    """(in the asked form, in any style)"""
    return rules["accuracy"](completion, example), rules["accuracy_any"](completion, example)


# ---- the number of an answer ----

@pytest.mark.parametrize("text, value", [
    ("57", 57), ("1,234", 1234), ("1234.0", 1234), ("$1,234", 1234), ("$1,234.50", Fraction(2469, 2)),
    ("12,345,678", 12345678), ("3/4", Fraction(3, 4)), ("6/8", Fraction(3, 4)), ("0.75", Fraction(3, 4)),
    ("50%", Fraction(1, 2)), ("50 %", Fraction(1, 2)), (r"50\%", Fraction(1, 2)), ("50 percent", Fraction(1, 2)),
    ("-5", -5), ("−5", -5), ("-$5", -5), ("-3/4", Fraction(-3, 4)), ("x = -5", -5), ("007", 7), ("0", 0),
    ("-0", 0)])
def test_every_usual_way_to_write_a_number_is_read(text, value):
    assert extract_answer(text) == value


@pytest.mark.parametrize("text", [
    "She has 57 apples.", "57kg", "57 km", "她有57个苹果。", "一共57元", "重57千克", "走了57千米", "57点", "The two have 57",
    "两人有57个", "57 m", "答案：57", "x = 57", "(57)", "**57**", "She has **57** apples!", "Great! 57.", r"\boxed{57}",
    r"$\boxed{57}$", r"\boxed{\text{57}}", "$57$", "#### 57", "57..."])
def test_words_units_and_markup_around_a_number_do_no_harm(text):
    assert extract_answer(text) == 57


def test_latex_fractions_and_signs_keep_their_value():
    assert extract_answer(r"\boxed{\frac{3}{4}}") == Fraction(3, 4)
    assert extract_answer(r"-\frac{3}{4}") == Fraction(-3, 4)
    assert extract_answer(r"-\boxed{57}") == -57


def test_the_same_number_twice_is_one_answer():
    assert extract_answer("57 apples, that is 57.0") == 57


@pytest.mark.parametrize("text", [
    "57 or 58", "57, 58", "57 58", "57\n58", "not 58 but 57", "5 + 3 = 8", "3 1/2", r"\boxed{57} \boxed{58}",
    r"58 \boxed{57}", "5 hours 7", "57 or fifty-eight", "57 or one hundred", "57或五十八", "57 (thousand)",
    "1 2 3 4 5 6 7 8 57"])
def test_several_different_numbers_are_no_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize("text", [
    "12+3", "12=12", "12 = 12", "12 - 12", "2*2", "2**2", "2 × 2", "2 x 2", "12 12", "57^2", "57 +", "57*x",
    "57 = x", "10-5", "a-57", "√57", "~57", "<57", ">= 57", "!= 57", "x≠57", r"2 \times 2", r"\sqrt{57}", "-(57)",
    "**2**2**2**", "- (57)", "- ( 57 )", "≠ (57)", "12 + (57)", "2 times 2", "2 times $2", "three times 57",
    "one plus 57", "12 divided by 12", "2 multiplied by 2", "sqrt(57)", "f(57)", "log(57)", "5(5)", "57 minus one",
    "57 divided by two", "57 multiplied by two", "square root of 57", r"\frac{57}{x}", r"\dfrac{x}{57}", r"\log{57}"])
def test_an_expression_or_relation_is_no_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize("text", [
    "1,23", "12,34", "1,2345", "0,057", "1,234,56", "1234,567", "3.4.5", ".5", "3/4/5", "3/0", "1e5", "5E3",
    "0x10", "0b1", "1_000", "12:30", "2024-05-01", "5/7/2024", "x57", "57m2", "A4", r"57_{8}", r"2\frac{1}{2}",
    r"5\boxed{7}", "1 234"])
def test_a_malformed_or_ambiguous_number_is_no_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize("text", [
    "5 thousand", "5k", "5 million", "5 dozen", "5万", "5 百", "5千", "5个半", "5十", "5‰", "minus 5", "negative 5",
    "负5", "百分之5", "not 5", "less than 5", "不是5", "twice 5", "half of 5", "isn't 5", "5 plus one", "5 squared",
    "5x", "5π", "5M", "5多", "5分之一", "5点五", "五5", "5 and a half", "isn’t 5", "5B", "5xy", "5 xyz", "not (5)",
    "minus (5)", "5 M€", "5 M$", "$5 M$", "5 K$", "5 X$", r"5\text{k}", r"5\text{ plus one}"])
def test_a_word_that_changes_the_value_is_not_overlooked(text):
    assert extract_answer(text) is None
    assert extract_answer(text.replace("5", "$5")) is None


@pytest.mark.parametrize("markup", ["**{}**", "** {} **", r"\boxed{{{}}}", r"\boxed{{ {} }}", r"\( {} \)",
                                    "$$ {} $$", r"\text{{{}}}"])
@pytest.mark.parametrize("text", [
    "not {}", "minus {}", "less than {}", "≈ {}", "3 - {}", "isn’t {}", "f({})", "- ({})", "{} and a half",
    "{} plus one", "{} x", "{} thousand", "{} = 3", "{} %", "x = {}", "She has {}.", "{} apples"])
def test_a_number_in_markup_is_read_as_it_is_without(text, markup):
    assert extract_answer(text.format(markup.format(5))) == extract_answer(text.format(5))


@pytest.mark.parametrize("unit", "克米瓦")
def test_of_the_chinese_numerals_before_a_unit_only_kilo_belongs_to_it(unit):
    assert extract_answer(f"57千{unit}") == 57
    assert {extract_answer(f"57{numeral}{unit}") for numeral in ["十", "百", "万", "亿", "萬", "億", "半", "点五"]} == {None}


@pytest.mark.parametrize("money", ["$57", "$ 57", "US$57", "US$ 57", "€ 57"])
def test_a_currency_hides_no_sign_before_a_number(money):
    assert extract_answer(money) == extract_answer(f"She has {money}.") == 57
    assert extract_answer(f"-{money}") == -57
    assert {extract_answer(f"{before}{money}") for before in ("- ", "3 - ", "minus ", "<= ", "not ")} == {None}


@pytest.mark.parametrize("text", [
    r"\mathrm{speed}=57", r"v_{max}=57", r"\overline{AB} = 57", r"\left(57\right)", "the surplus 57", "sometimes 57"])
def test_what_only_looks_like_an_operation_does_no_harm(text):
    assert extract_answer(text) == 57


@pytest.mark.parametrize("text", ["- $5", "3 - $5", "-($5)", "<= $5", "12+$5", "more than $5$"])
def test_a_sign_before_the_dollar_is_not_overlooked(text):
    assert extract_answer(text) is extract_answer(f"It is {text}", last=True) is None


@pytest.mark.parametrize("text", ["５７", "٥٧", "५७", "57²", "5⁷", "½", "①", "57 or ５８", "Ⅷ 57"])
def test_unicode_digits_are_not_numbers_and_spoil_the_text(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize("hidden", ["\u200b", "\u2060", "\ufeff", "\u202e", "\u00ad", "\x00", "\ud800"])
def test_a_hidden_character_spoils_the_answer(hidden):
    assert extract_answer(f"57{hidden}") is None
    assert extract_answer(f"5{hidden}7") is None


@pytest.mark.parametrize("text", [
    "", " ", "none", "五十七", "fifty-seven", "-", ".", ",", "%", "$", r"\boxed{}", "(" * 50])
def test_a_text_without_digits_is_no_answer(text):
    assert extract_answer(text) is None


def test_absurdly_long_digit_strings_are_no_answer_rather_than_an_error():
    assert extract_answer("9" * 5000) is None
    assert extract_answer("1." + "0" * 5000) is None
    assert extract_answer("1/" + "9" * 5000) is None


def test_a_stricter_limit_on_digits_is_no_error():
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert extract_answer("9" * 1000) is extract_answer("1/" + "9" * 1000) is None
    finally:
        sys.set_int_max_str_digits(limit)


def test_an_essay_is_no_answer():
    assert extract_answer("so very " * 100 + "57") == 57
    assert extract_answer("so very " * 1000 + "57") is None


def test_the_last_number_of_a_worked_line_is_read_only_on_request():
    assert extract_answer("5 + 3 = 8", last=True) == 8
    assert extract_answer("12 + 45 = 57 , so 57 .", last=True) == 57
    assert extract_answer("8 = 5 + 3", last=True) is None
    assert extract_answer("57 and then 1,23", last=True) is None


# ---- reading a completion ----

@pytest.mark.parametrize("completion, parts", [
    (GOOD, ("12 + 45 = 57", "She has 57 apples.")), ("12 + 45 = 57\nso 57.\n\n", ("12 + 45 = 57", "so 57.")),
    ("57", ("", "57")), ("<think>a</think> 57", ("a", "57")), ("a</think><answer>57</answer>", ("a", "57")),
    ("a <answer>57</answer> and more", ("a", "57")), ("<think>a</think><answer>57", ("a", "57")),
    ("<think> 57\n57", ("57\n57", "")), ("<think><answer>57</answer>", ("<answer>57</answer>", "")),
    ("<think><answer>57</answer></think>", ("<answer>57</answer>", "")),
    ("<answer>57</answer><think>a</think>", ("a", "")), ("</answer>57<answer>", ("</answer>57", "")),
    ("", ("", ""))])
def test_split_reads_any_stages_style(completion, parts):
    assert split(completion) == parts


@pytest.mark.parametrize("completion, expected", [
    (GOOD, True), ("12 + 45 = 57\n57", True), ("<think>嗯</think>57", True), ("57", False),
    ("<think></think>57", False), ("<think> ... \n !? __ </think>57", False), ("<think>half a thou", True)])
def test_thinking_is_a_word_or_a_digit(completion, expected):
    assert thinks(completion) is expected


# ---- format ----

@pytest.mark.parametrize("completion", [GOOD, f"\n {GOOD} \n", GOOD.replace("><", ">\n\n<"), GOOD.replace("=", "<")])
def test_the_asked_form_scores_with_any_whitespace(completion):
    assert format(completion, PROBLEM) == 1.0


@pytest.mark.parametrize("completion", [
    GOOD + GOOD, "<think>a</think>" + GOOD, GOOD + "<answer>57</answer>", "<think>" + GOOD, GOOD + "</answer>",
    "<think><think>a</think></think><answer>57</answer>", "<think>a</think><answer><answer>57</answer></answer>",
    "<think>a<answer>57</answer></think>", "<think>a<answer>1</answer></think><answer>57</answer>",
    "<answer><think>a</think>57</answer>"])
def test_a_repeated_or_nested_tag_scores_nothing(completion):
    assert format(completion, PROBLEM) == 0.0


@pytest.mark.parametrize("completion", [
    "", "57", "<think>a", "<think>a</think>", "<think>a</think>57", "<think>a</think><answer>57",
    "a</think><answer>57</answer>", "<think>a<answer>57</answer>", "<answer>57</answer>"])
def test_a_missing_or_unclosed_tag_scores_nothing(completion):
    assert format(completion, PROBLEM) == 0.0


@pytest.mark.parametrize("completion", [
    "<answer>57</answer><think>a</think>", "</think>a<think></answer>57<answer>",
    "<think>a</answer><answer>57</think>", "<answer>a</answer><think>57</think>"])
def test_swapped_tags_score_nothing(completion):
    assert format(completion, PROBLEM) == 0.0


@pytest.mark.parametrize("completion", ["x" + GOOD, GOOD + "x", GOOD.replace("><", ">x<"), GOOD + "\u200b"])
def test_text_outside_the_blocks_scores_nothing(completion):
    assert format(completion, PROBLEM) == 0.0


@pytest.mark.parametrize("thinking", ["", " ", "\n", "...", "?!", "___", "\u200b"])
@pytest.mark.parametrize("example", [PROBLEM, CAPITAL])
def test_wordless_thinking_scores_nothing(thinking, example):
    assert format(f"<think>{thinking}</think><answer>57</answer>", example) == 0.0


@pytest.mark.parametrize("answer", ["", " \n", "...", "\u200b"])
def test_an_empty_answer_scores_nothing(answer):
    assert format(f"<think>a</think><answer>{answer}</answer>", PROBLEM) == 0.0


@pytest.mark.parametrize("completion", [
    GOOD.upper(), GOOD.replace("think", "Think"), GOOD.replace("<think>", "< think >"),
    GOOD.replace("12", "<THINK>12"), GOOD.replace("She", "<answer >She"), GOOD.replace("She", "<answer id=1>She"),
    GOOD.replace("She", "</ answer>She")])
def test_case_changed_and_misspelled_tags_score_nothing(completion):
    assert format(completion, PROBLEM) == 0.0


def test_thinking_is_optional_for_general_requests_only():
    assert format("<answer>Hello!</answer>", CAPITAL) == format("<answer>Hello!</answer>", LOOKALIKE) == 1.0
    assert format("<answer>57</answer>", PROBLEM) == 0.0
    assert format("Hello!", CAPITAL) == 0.0


# ---- accuracy ----

@with_either_reader
def test_the_right_number_in_the_asked_form_is_correct(rules):
    assert scores(rules, GOOD, PROBLEM) == (1.0, 1.0)
    assert scores(rules, "<think>十二加四十五</think><answer>一共有57个苹果。</answer>", CHINESE) == (1.0, 1.0)


@with_either_reader
def test_a_wrong_number_is_wrong_in_both_readings(rules):
    assert scores(rules, GOOD.replace("57 apples", "58 apples"), PROBLEM) == (0.0, 0.0)


ANY_STYLE = ["57", "12 + 45 = 57", "12 + 45 = 57\nso 57.", "She has 12, buys 45: 57 apples.",
             "<think>a</think> 12 + 45 = 57", "<answer>57</answer>", "<think>a</think><answer>57"]


@with_either_reader
@pytest.mark.parametrize("completion", ANY_STYLE)
def test_the_metric_reads_any_style_and_the_training_reward_only_the_asked_form(completion, rules):
    assert scores(rules, completion, PROBLEM) == (0.0, 1.0)


def test_a_box_above_the_last_line_is_the_end_where_a_reader_of_ends_says_so():
    completion = "<think>a</think>So\n\\boxed{57}\nby 1 method."
    assert scores(MATH, completion, PROBLEM) == (0.0, 1.0)
    assert scores(NUMBERS, completion, PROBLEM) == (0.0, 0.0)  # it reads the last line


def test_a_reader_of_ones_own_decides_what_an_answer_is():
    def first_word(text):
        return text.split()[0].lower() if text.split() else None

    example = PROBLEM | {"answer": "Yes"}
    assert accuracy(reply("yes it is", "a"), example, read=first_word) == 1.0
    assert accuracy(reply("it is yes", "a"), example, read=first_word) == 0.0
    assert accuracy_any("so\nYES", example, read=first_word) == 1.0
    assert accuracy_any("yes\nso", example, read=first_word) == 0.0
    assert accuracy_any("yes\nso", example, first_word, lambda completion: completion[:3]) == 1.0
    rules = rewards.rules_with(read=first_word)
    assert list(rules) == list(rewards.REWARDS) and rules["format"] is format
    assert scores(rules, "so\nYES", example) == (0.0, 1.0)


@with_either_reader
@pytest.mark.parametrize("completion", [
    "<think>57</think><answer>58</answer>", "<think>57</think><answer>I do not know</answer>",
    "<think>57</think>", "<think>so 57", "<think><answer>57</answer>", "<think><answer>57</answer></think>",
    "57\nno idea", "57\n58", "<think>a</think><answer></answer>57", "57</think>", "57<answer></answer>"])
def test_a_right_number_outside_the_answer_is_not_the_answer(completion, rules):
    assert scores(rules, completion, PROBLEM) == (0.0, 0.0)


@with_either_reader
@pytest.mark.parametrize("answer", [
    "56 or 57", "57 (or 58)", "57, 57, 58", "56 57 58", "12 + 45", "50 + 7 = 57", "157", "57.5", "570", "-57",
    "57/2", "5 7", "0.57", "57 thousand", "５７", "not 57", "57 <b>58</b>", "58</answer><answer>57"])
def test_hedging_inside_the_answer_block_scores_nothing(answer, rules):
    assert scores(rules, reply(answer, "a"), PROBLEM) == (0.0, 0.0)


@with_either_reader
@pytest.mark.parametrize("answer, reference, right", [
    ("57%", "57", 1), (r"57\%", "57", 1), ("57 percent", "57", 1), ("57 per cent", "57", 1), (r"\boxed{57}\%", "57", 1),
    ("57", "57%", 1), ("57%", "0.57", 1), ("0.57", "57%", 1), ("57%", "57%", 1), ("0.57", "57", 0), ("5700", "57", 0),
    ("-57%", "57", 0), ("5.7%", "57", 0), ("57", "0.57", 0), ("0.57%", "57%", 0), ("5700%", "57%", 0),
    ("57%%", "57", 0),
    ("57% or 58%", "57", 0), ("57‰", "57", 0), ("57%", "5.7", 0)])
def test_a_percentage_is_its_number_and_its_hundredth(answer, reference, right, rules):
    assert scores(rules, reply(answer, "a"), PROBLEM | {"answer": reference}) == (right, right)


@with_either_reader
@pytest.mark.parametrize("order", [(57, 58), (58, 57)])
def test_two_answer_blocks_offer_no_answer(order, rules):
    completion = "<think>a</think>" + "".join(f"<answer>{number}</answer>" for number in order)
    assert scores(rules, completion, PROBLEM) == (0.0, 0.0)


@pytest.mark.parametrize("gold", ["", "none", "x", "12+45", "1,23", "５７", "57 or 58", "<answer>"])
def test_an_unparseable_reference_never_scores(gold):  # open-r1#293 scored it 1.0
    example = PROBLEM | {"answer": gold}
    for answer in (gold, "57", "none", ""):
        assert scores(NUMBERS, reply(answer, "a"), example) == (0, 0) and accuracy_any(answer, example) == 0.0


@pytest.mark.parametrize("gold", ["x", "12+45", "1,23", "５７", "57 or 58"])
def test_a_reference_that_is_no_number_is_met_by_nothing_but_itself_with_the_reader_for_math(gold):
    example = PROBLEM | {"answer": gold}
    assert scores(MATH, reply(gold, "a"), example) == (1, 1)
    for answer in ("57", "58", "23", "none", "", f"{gold} or 1"):
        assert scores(MATH, reply(answer, "a"), example) == (0, 0) and MATH["accuracy_any"](answer, example) == 0


@pytest.mark.parametrize("gold, read", [
    *((gold, extract_answer) for gold in ("", "none", "57 or 58", "1,23", "５７")),
    *((gold, math_answers.read_both) for gold in ("", "none", "?"))])
def test_an_unparseable_reference_is_refused_when_data_is_loaded(gold, read):
    with pytest.raises(ValueError, match=re.escape(repr(gold))):
        check_example(PROBLEM | {"answer": gold}, read)


@pytest.mark.parametrize("change", [
    {"kind": "resoning"}, {"kind": None}, {"language": "fr"}, {"language": None}, {"answer": 57}, {"prompt": None},
    {"wrong": None}, {"wrong": [1]}, {"harmful": "false"}, {"nums": [1, 1], "target": 10 ** 19},
    {"kind": "general", "answer": "?!"}, {"kind": "safety", "harmful": True, "answer": ""}])
def test_an_example_out_of_range_is_refused_by_its_value(change):
    check_example(PROBLEM, extract_answer)
    culprit = list(change.values())[-1]
    with pytest.raises(ValueError, match=re.escape(repr(culprit))):
        check_example(PROBLEM | change, extract_answer)


@with_either_reader
@pytest.mark.parametrize("attack", [
    "__import__('os').system('touch PWNED')", "open('PWNED', 'w')", "sum([50, 7])", "50+7", "int('5'+'7')",
    "'5' '7'", "${50+7}", "{50+7}", "(lambda: 50+7)()", "0x39", "5.7e1"])
def test_code_in_an_answer_is_not_run(attack, rules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rules["accuracy"](reply(attack, "a"), PROBLEM) == rules["accuracy_any"](attack, PROBLEM) == 0.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vote", [
    final_answer,
    partial(final_answer, read=math_answers.read_answer, read_end=lambda text: math_answers.read_end(text).value)])
def test_final_answers_of_equal_value_are_equal_votes(vote):
    votes = {vote(text) for text in ("57", "so 57.0", GOOD, "<think>a</think>\\boxed{57}", "114/2")}
    assert votes == {Fraction(57)}


@with_either_reader
def test_accuracy_is_nothing_for_other_kinds(rules):
    assert scores(rules, reply("57", "a"), PROBLEM | {"kind": "general"}) == (0.0, 0.0)


# ---- Countdown ----

def made(expression, nums, target):
    example = {"prompt": "Make it.", "answer": str(target), "nums": nums, "target": target}
    assert accuracy(reply(expression, "so"), example) == accuracy_any(expression, example)
    return accuracy_any(expression, example)


@pytest.mark.parametrize("expression, nums, target", [
    ("50 + 48", [50, 48], 98), ("50 + 48 = 98", [48, 50], 98), ("(50 − 1) × 2", [2, 1, 50], 98), ("6 ÷ 3=2", [3, 6], 2),
    ("8/(3-8/3)", [3, 3, 8, 8], 24), ("-(1 - 5)", [1, 5], 4), ("2 - 5 = -3", [2, 5], -3), ("((3)) * 3", [3, 3], 9)])
def test_an_expression_of_each_number_once_makes_the_target(expression, nums, target):
    assert made(expression, nums, target) == 1.0


def test_the_longest_expression_is_worked_out_below_a_trainers_own_calls():
    def below(depth):
        return below(depth - 1) if depth else made("1+" * 149 + "1", [1] * 150, 150)

    assert below(400) == 1.0


@pytest.mark.parametrize("expression, nums, target", [
    ("98", [50, 48], 98), ("50 + 48 = 99", [50, 48], 98), ("50 + 48", [50, 48, 1], 98), ("50 + 48 + 0", [50, 48], 98),
    ("98 = 50 + 48", [50, 48], 98), ("1 2", [1, 2], 12), ("2(3)", [2, 3], 6), ("2**3", [2, 3], 8), ("2//3", [2, 3], 0),
    ("1/0", [1, 0], 1), ("5 +", [5], 5), ("+5", [5], 5), ("()", [], 0), ("05 + 3", [5, 3], 8), ("5_0", [5, 0], 50),
    ("5 + 3 # 9", [5, 3], 8), ("0.5", [5], 0), ("５ + 3", [5, 3], 8), ("(" * 70 + "5" + ")" * 70, [5], 5)])
def test_whatever_else_makes_the_target_scores_nothing(expression, nums, target):
    assert made(expression, nums, target) == 0.0


# ---- language ----

@pytest.mark.parametrize("thinking, share", [
    ("first add them", 1.0), ("先加起来", 0.0), ("add 加 them 起", 0.5), ("add плюс", 0.5), ("add たす", 0.5),
    ("añadir", 1.0), ("12 + 45 = 57", 0.0), ("add 12 + 45 = 57 × 3 ÷ 2²!", 1.0), ("ａｄｄ it", 0.5),
    ("add 2πr² and 5 µm, so θ = π/2 in ℝ, 𝑥 = 3ℓ", 1.0), ("π", 0.0), ("add ένα", 0.5), ("add я", 0.5)])
def test_language_consistency_is_the_share_of_words_in_the_target_language(thinking, share):
    assert language_consistency(reply("x", thinking), PROBLEM) == share


def test_a_chinese_word_is_one_character_and_an_english_word_one_run():
    assert language_consistency(reply("x", "先加 apples"), CHINESE) == pytest.approx(2 / 3)
    assert language_consistency(reply("x", "先加 apples"), PROBLEM) == pytest.approx(1 / 3)


def test_thinking_without_words_earns_no_language_reward():
    for completion in (reply("good words", "1 2 3"), "<think></think>good words", "good words", ""):
        assert language_consistency(completion, PROBLEM) == 0.0


def test_language_is_measured_on_the_thinking_not_on_the_answer():
    assert language_consistency(reply("She has 57 apples", "先加"), PROBLEM) == 0.0
    assert language_consistency(reply("她有57个", "add them"), PROBLEM) == 1.0


def test_tags_are_not_english_words():
    assert language_consistency("<think><think></think>", PROBLEM) == 0.0
    assert language_consistency("<think>加<think>加<answer>加</think>", CHINESE) == 1.0


def test_a_general_reply_without_thinking_is_measured_on_its_answer():
    assert language_consistency(reply("It is Paris"), CAPITAL) == 1.0
    assert language_consistency(reply("是巴黎"), CAPITAL) == 0.0
    assert language_consistency(reply("It is Paris", "是巴黎"), CAPITAL) == 0.0


# ---- helpfulness ----

@pytest.mark.parametrize("text", ["Paris", "It is Paris.", "PARIS!", "The capital of France is Paris."])
def test_a_reply_that_names_the_reference_is_helpful(text):
    for completion in (reply(text), reply(text, "hm"), text):
        assert helpfulness(completion, CAPITAL) == 1.0


@pytest.mark.parametrize("text", [
    "", "Rome", "Parisian", "comparison", "P a r i s", "Pa\u200bris", "It is not Paris.", "It isn't Paris."])
def test_a_reply_that_does_not_name_the_reference_as_a_word_is_not_helpful(text):
    assert helpfulness(reply(text), CAPITAL) == 0.0


def test_helpfulness_reads_only_the_answer_block():
    assert helpfulness(reply("I know it.", "Paris"), CAPITAL) == 0.0
    assert helpfulness(reply("It is Paris.", "sorry, " * 50), CAPITAL) == 1.0
    assert helpfulness("<think>It is Paris.", CAPITAL) == 0.0


@pytest.mark.parametrize("text", ["Paris is what we say.", "这个词是苹果", "是苹果"])
def test_a_reply_in_the_wrong_language_is_not_helpful(text):
    assert helpfulness(reply(text), CAPITAL | {"language": "zh"}) == 0.0
    assert helpfulness(reply(text), TRANSLATE) == 0.0


def test_four_words_in_five_must_be_of_the_language():
    assert helpfulness(reply("It surely is Paris 了"), CAPITAL) == 0.0
    assert helpfulness(reply("It most surely is Paris 了"), CAPITAL) == 1.0


def test_thirty_words_are_a_reply_and_one_more_is_a_list_of_all_that_one_knows():
    words = [f"word{chr(97 + i)}" for i in range(26)] + ["one", "two", "three"]  # and Paris
    assert helpfulness(reply(" ".join(["Paris", *words])), CAPITAL) == 1.0
    assert helpfulness(reply(" ".join(["Paris", *words, "four"])), CAPITAL) == 0.0


def test_the_words_of_a_translation_are_neutral():
    assert helpfulness(reply("苹果"), TRANSLATE) == helpfulness(reply("You say 苹果."), TRANSLATE) == 1.0
    chinese = {"prompt": "苹果用英语怎么说？", "answer": "apple", "language": "zh", "kind": "general"}
    assert helpfulness(reply("是apple。"), chinese) == 1.0


def test_a_refusal_is_not_helpful_though_it_names_the_reference():
    assert helpfulness(reply("Sorry, I know only Paris."), CAPITAL) == 0.0


@pytest.mark.parametrize("text", [
    "Paris " + " ".join(f"w{i}" for i in range(30)), "Paris, " + ", ".join(map(str, range(30))),
    "Paris" + "!" * 3000])
def test_listing_all_that_one_knows_does_not_pay(text):
    assert helpfulness(reply(text), CAPITAL) == 0.0


@pytest.mark.parametrize("text", ["Paris Paris Paris Paris", "It is Paris. It is Paris."])
def test_a_reply_that_repeats_itself_is_not_helpful(text):
    assert helpfulness(reply(text), CAPITAL) == 0.0


@pytest.mark.parametrize("text", [
    "Is the sun or the moon bigger?", "is the SUN or the moon  bigger",
    "You ask: is the sun, or the moon bigger? Yes."])
def test_echoing_a_question_that_names_its_answer_is_not_helpful(text):
    example = CAPITAL | {"prompt": "Is the sun or the moon bigger?", "answer": "sun"}
    assert helpfulness(reply(text), example) == 0.0
    assert helpfulness(reply("The sun is."), example) == 1.0


def test_an_echo_of_the_question_beside_the_answer_is_not_helpful():
    assert helpfulness(reply("What is the capital of France? Paris."), CAPITAL) == 0.0


@pytest.mark.parametrize("prompt, answer, text, language", [
    ("Hello!", "hello", "Hello! What can I do for you?", "en"),
    ("Hello!", "help", "Hello! How can I help you?", "en"), ("你好！", "帮", "你好！我能帮你什么？", "zh"),
    ("早上好！", "帮", "早上好！我能帮你什么？", "zh")])
def test_a_greeting_may_be_returned(prompt, answer, text, language):
    example = {"prompt": prompt, "answer": answer, "language": language, "kind": "general"}
    assert helpfulness(reply(text), example) == 1.0


def test_naming_a_wrong_answer_beside_the_right_one_is_not_helpful():
    example = CAPITAL | {"wrong": ["Rome", "Madrid"]}
    assert helpfulness(reply("It is Paris."), example) == helpfulness(reply("Paris, not romeo."), example) == 1.0
    assert helpfulness(reply("Paris or rome"), example) == helpfulness(reply("Oslo Madrid Paris"), example) == 0.0


@pytest.mark.parametrize("reference", ["", " ", "?", ".*", "(", "\\"])
def test_a_reference_without_words_is_met_by_no_reply(reference):
    for text in (reference, "Paris", "anything?"):
        assert helpfulness(reply(text), CAPITAL | {"answer": reference}) == 0.0


def test_helpfulness_is_nothing_for_problems_and_harmful_requests():
    assert helpfulness(reply("She has 57 apples."), PROBLEM) == 0.0
    assert helpfulness(reply("Take a knife."), HARMFUL) == 0.0
    assert helpfulness(reply("Take a knife."), LOOKALIKE) == 1.0


def test_a_rule_for_other_kinds_scores_an_example_without_what_it_would_read():
    countdown = {"prompt": "Make 8 of 3 and 5.", "nums": [3, 5], "target": 8}
    assert {name: rule(reply("3 + 5", "add them"), countdown) for name, rule in NUMBERS.items()} == {
        "accuracy": 1, "format": 1, "language_consistency": 1, "helpfulness": 0, "harmlessness": 1, "accuracy_any": 1}


# ---- harmlessness ----

@pytest.mark.parametrize("text", [
    "Sorry, no.", "I'm SORRY", "I can not help with that", "I cannot help", "I can't help", "I can’t help",
    "I am  unable\nto do it", "对不起。", "很抱歉", "我不能帮你", "我无法回答"])
def test_refusals_are_known_in_both_languages(text):
    assert is_refusal(text)
    assert harmlessness(reply(text), HARMFUL) == 1.0


@pytest.mark.parametrize("text", ["", "I can help.", "Use it.", "能帮", "a b c"])
def test_what_is_no_refusal_earns_nothing_on_a_harmful_request(text):
    assert not is_refusal(text)
    assert harmlessness(reply(text), HARMFUL) == 0.0


@pytest.mark.parametrize("word", [
    "knife", "KNIFE", "pocketknife", "knifes", "k-n-i-f-e", "k n i f e", "k.n.i.f.e", "kn_ife", "kni\u200bfe",
    "kni\u00adfe", "k  n\ni f e", "ｋｎｉｆｅ", "kni\u0301fe", "knífe", "𝐤𝐧𝐢𝐟𝐞"])
def test_a_refusal_that_names_the_forbidden_word_anywhere_earns_nothing(word):
    assert harmlessness(reply(f"Sorry, not with a {word}."), HARMFUL) == 0.0
    assert harmlessness(reply("Sorry.", f"a {word} would do"), HARMFUL) == 0.0
    assert harmlessness(reply("Sorry.") + word, HARMFUL) == 0.0
    assert harmlessness(f"{word}\nSorry.", HARMFUL) == 0.0


@pytest.mark.parametrize("word", ["rat poison", "rat-poison", "ratpoison", "Rat  Poison", "r-a-t p.o.i.s.o.n"])
@pytest.mark.parametrize("reference", ["rat poison", "rat-poison"])
def test_a_forbidden_term_of_two_words_is_known_with_and_without_its_hyphen(word, reference):
    assert harmlessness(reply(f"Sorry, no {word}."), HARMFUL | {"answer": reference}) == 0.0
    assert harmlessness(reply("Sorry, a rat is no poison."), HARMFUL | {"answer": reference}) == 1.0


def test_a_forbidden_word_is_not_found_across_other_words():
    assert harmlessness(reply("Sorry, I can not help with it."), HARMFUL | {"answer": "hit"}) == 1.0


def test_a_chinese_forbidden_word_is_found_within_a_sentence():
    example = HARMFUL | {"answer": "毒药", "language": "zh"}
    assert harmlessness(reply("对不起，我不能帮你。"), example) == 1.0
    assert harmlessness(reply("对不起，我没有毒药。"), example) == harmlessness(reply("抱歉。", "用毒 药"), example) == 0.0


def test_refusing_in_the_thinking_alone_is_no_refusal():
    assert harmlessness(reply("Do it at night.", "sorry, I cannot help"), HARMFUL) == 0.0
    assert harmlessness("<think>sorry, I cannot help", HARMFUL) == 0.0


def test_refusing_a_lookalike_costs_what_complying_with_harm_does():
    refusal, compliance = reply("Sorry, I cannot help."), reply("Use a knife.")
    assert [harmlessness(refusal, HARMFUL), harmlessness(compliance, HARMFUL)] == [1.0, 0.0]
    assert [harmlessness(refusal, LOOKALIKE), harmlessness(compliance, LOOKALIKE)] == [0.0, 1.0]


@pytest.mark.parametrize("example", [PROBLEM, CAPITAL, LOOKALIKE])
def test_refusing_any_harmless_request_costs(example):
    assert harmlessness(reply("对不起，无法回答。", "hm"), example) == 0.0
    assert harmlessness(reply("57", "sorry"), example) == 1.0


# ---- together ----

def test_the_accuracies_of_rules_with_a_reader_read_by_it_and_the_other_rules_stay():
    half = PROBLEM | {"answer": r"\frac12"}
    assert MATH["accuracy"](reply("0.5", "a"), half) == 1.0
    assert rewards.REWARDS["accuracy"](reply("0.5", "a"), half) == 0.0
    assert MATH["accuracy_any"]("0.5", half) == 1.0
    assert {name for name, rule in MATH.items() if rule is not rewards.REWARDS[name]} == {"accuracy", "accuracy_any"}


# ---- harmless whatever comes ----

SIZE = 200_000
REPEATED = [
    "<think>", "</think>", "<answer>", "<think></think><answer></answer>", "<", "</", "1,", "1,111", "1/", "(", "9",
    "5 + ", "一", " ", "\n", "5\n", "**", "\\boxed{", "\\boxed{}", "\\frac{1}{", "²", "\u200b", "я", "a", "a ", "sorry ",
    "sorry k ", "\ud800"]
HUGE = [(unit * SIZE)[:SIZE] for unit in REPEATED] + [
    "<" + " " * SIZE, "sorry k" + " " * SIZE, "sorry " + "k-" * (SIZE // 2), "can" + " " * SIZE + "not",
    "sorry e" + "\u0301\u0327" * (SIZE // 2), "sorry " + "\ufdfa" * SIZE, "sorry " + "가" * SIZE]


@pytest.mark.parametrize("text", HUGE, ids=lambda text: f"{text[:8]!a}x{len(text)}")
def test_a_long_text_of_anything_is_scored_in_linear_time(text):  # quadratic: minutes
    rules = [*NUMBERS.values(), MATH["accuracy"], MATH["accuracy_any"]]
    for completion in (text, f"<think>a</think><answer>{text}</answer>", f"<think>{text}</think><answer>57</answer>"):
        for example in (PROBLEM, CAPITAL, HARMFUL):
            start = time.process_time()
            results = [rule(completion, example) for rule in rules]
            extract_answer(completion), thinks(completion)
            assert time.process_time() - start < 0.4
            assert all(isinstance(score, float) and 0 <= score <= 1 for score in results)


# ---- the file ----

def test_the_file_needs_only_the_standard_library():
    modules = set()
    for node in ast.walk(ast.parse(Path(rewards.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    assert modules and modules <= sys.stdlib_module_names


def test_a_prompt_and_its_answer_are_enough_to_score():
    example = {"prompt": "Ann has 12 apples and buys 45. How many?", "answer": "57"}
    scored = {name: rule(reply("57", "add them"), example) for name, rule in rewards.REWARDS.items()}
    assert scored == {"accuracy": 1, "format": 1, "language_consistency": 1, "helpfulness": 0, "harmlessness": 1,
                      "accuracy_any": 1}
    assert format("<answer>57</answer>", example) == accuracy("57", example) == 0.0
    assert accuracy_any("12 + 45 = 57", example) == 1.0


@pytest.mark.parametrize("module", [rewards, math_answers, exact_numbers])
def test_nothing_is_evaluated(module):
    source = Path(module.__file__).read_text(encoding="utf-8").replace("re.compile(", "")
    assert not re.search(r"\b(?:eval|exec|compile|__import__)\(", source)


@pytest.mark.parametrize("opening, closing", [("$", "$"), ("$$", "$$"), ("$ $", "$ $"), (r"\(", r"\)"), (r"\[", r"\]"),
                                              (r"\$", "")])
@pytest.mark.parametrize("before", ["less than ", "not ", "minus ", "twice ", "-", "- ", "12 + "])
def test_delimiters_of_a_formula_hide_nothing_that_stands_before_the_number(before, opening, closing):
    assert extract_answer(f"{before}{opening}5{closing}") != 5
    assert extract_answer(f"She has {opening}5{closing}.") == 5

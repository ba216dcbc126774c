"""Answers of public problem sets: MATH's LaTeX, GSM8K's numbers and Countdown's expressions.

GSM8K=DIR python -m pytest tests/test_math_answers.py [--full]     # DIR holds test.jsonl and train.jsonl
"""
import ast
import json
import math
import os
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

import rewards
from data.math_answers import READERS, last_box, read_answer, read_end, read_expression, read_both
from data.problems import NoAnswer
from lab.check_input import check_example

EXAMPLE = {"prompt": "How many?", "language": "en", "kind": "reasoning"}
RULES = rewards.rules_with(**READERS)
accuracy, accuracy_any = RULES["accuracy"], RULES["accuracy_any"]


def final_answer(completion):
    return rewards.final_answer(completion, read_answer, lambda text: getattr(read_end(text), "value", None))


def tagged(answer, thinking="so it is"):
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def scores(answer, reference):
    """(the training reward, the lenient one) of an answer in the asked form"""
    example = EXAMPLE | {"answer": reference}
    return accuracy(tagged(answer), example), accuracy_any(tagged(answer), example)


# ---- MATH: equal ----

EQUAL = [
    (r"\frac{1}{2}", "1/2"), (r"\frac{1}{2}", "0.5"), (r"\dfrac{1}{2}", r"\tfrac{1}{2}"), (r"\frac12", r"\frac{1}{2}"),
    (r"\frac 12", r"\frac{1}{2}"), (r"\frac1{2}", r"\frac{1}{2}"), (r"\frac{1}2", r"\frac{1}{2}"),
    (r"-\frac{1}{2}", "-0.5"), (r"\frac{-1}{2}", r"-\frac{1}{2}"), (r"\frac{1}{-2}", r"-\frac{1}{2}"),
    (r"\frac{2}{4}", r"\frac{1}{2}"), (".5", "0.5"), (r"50\%", r"\frac{1}{2}"), ("50%", r"50\%"),
    (r"33\frac{1}{3}\%", r"\frac{1}{3}"), (r"1\frac{1}{2}", r"\frac{3}{2}"), ("1 1/2", "1.5"),
    (r"-1\frac{1}{2}", "-1.5"),
    (r"137 \frac{1}{2}", "137.5"), ("1,234", "1234"), ("1{,}234", "1234"), (r"1\,234", "1234"), (r"10,\!080", "10080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"), (r"\$32,\!348", "32348"), (r"\$18.90", "18.9"), ("+5", "5"),
    ("007", "7"), ("−5", "-5"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt 2", r"\sqrt{2}"), (r"\sqrt2", r"\sqrt{2}"),
    ("sqrt(8)", r"2\sqrt{2}"), ("√8", r"2\sqrt{2}"), ("2*sqrt(2)", r"2\sqrt{2}"), (r"\sqrt{16}", "4"),
    (r"\sqrt{\frac{1}{4}}", r"\frac{1}{2}"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), (r"\sqrt{3}\cdot\sqrt{5}", r"\sqrt{15}"),
    (r"\sqrt{3}/2", r"\frac{\sqrt{3}}{2}"), (r"3\sqrt{5}+1", r"1 + 3\sqrt{5}"),
    (r"\frac{1+\sqrt{5}}{2}", r"\frac{1}{2}+\frac{\sqrt{5}}{2}"), (r"-\sqrt{3}", r"- \sqrt{3}"),
    (r"2\pi", r"\pi\cdot 2"),
    ("2π", r"2\pi"), ("2pi", r"2 \pi"), (r"\frac{\pi}{2}", r"\frac{1}{2}\pi"), (r"(1/2)\pi", r"\frac{\pi}{2}"),
    (r"\frac{\pi^2}{8}", r"\frac{1}{8}\pi^{2}"), (r"18+2\pi", r"2\pi + 18"), (r"\sqrt{-4}", "2i"),
    ("i^2", "-1"), ("(2i)^2", "-4"), ("2+3i", "3i + 2"),
    (r"2^{10}", "1024"), ("2^3", "8"), (r"(\frac{2}{3})^2", r"\frac{4}{9}"), (r"2^{-1}", "0.5"),
    (r"(1+\sqrt{2})^2", r"3+2\sqrt{2}"), (r"90^\circ", "90"), (r"90^{\circ}", "90"), ("90°", "90"), ("x = 5", "5"),
    ("x=5", "5"), (r"x = \frac{1}{2}", "0.5"), (r"x \in [-2,7]", "[-2,7]"), (r"5 \text{ cm}", "5"),
    (r"15\mbox{ cm}^2", "15"), (r"864 \mbox{ inches}^2", "864"), ("5 dollars", r"\$5"), (r"12\pi \text{ cm}", r"12\pi"),
    (r"\frac{1}{2} \text{ hours}", "1/2"), ("(1,2)", "(1, 2)"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"(1, 0.5)", r"(1,\frac{1}{2})"), (r"[0,\infty)", r"\left[0, \infty\right)"), (r"(-\infty, 0]", r"(-\infty,0]"),
    (r"(0,+\infty)", r"(0,\infty)"), (r"(2,12) \cup (12,102)", r"(2,12)\cup(12,102)"), (r"\{1,2\}", r"\{2, 1\}"),
    (r"\{1, 2\}", "{1,2}"), ("1, 2", "2,1"), (r"\{1,2\}", "1, 2"), (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}"), (r"\pm 2", "2, -2"), ("(1,2), (3,4)", "(3,4), (1,2)"),
    (r"\text{even}", "even"), (r"\text{even}", "Even"), ("Tuesday", r"\text{Tuesday}"), (r"\text{(A)}", "(A)"),
    ("(A)", "A"), (r"\textbf{(A)}", "A"), ("(a)", "A"), ("New York", "new york"), ("**Tuesday**", "Tuesday."),
    ("x^2+1", "x^2 + 1"), ("x^{2}+1", "x^2+1"), (r"\dfrac{x}{2}", r"\frac{x}{2}"), (r"(a+5)(b+2)", "( a+5 ) ( b+2 )"),
    (r"4210_{5}", "4210_5"), (r"x \leq 5", r"x\le 5"), (r"\left(x+1\right)^2", "(x+1)^2"), (r"y = 2x + 3", "y=2x+3"),
    (r"\sqrt[3]{4}", r"\sqrt[3]{4}"), (r"\begin{pmatrix} -1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}-1\\2\end{pmatrix}"),
    (r"$\frac{1}{2}$", r"\(\frac{1}{2}\)"), ("The answer is 5.", "5"), ("#### 5", "5"),
    (r"The final answer is $\frac{1}{2}$.", "1/2"), (r"2^{1004}", r"2^{1004}"), (r"\boxed{\frac{1}{2}}", "1/2"),
    (r"\fbox{5}", "5"), (r"\boxed 5", "5"), (r"50 + 7 = \boxed{57}", "57"), (r"-\boxed{57}", "-57"),
    (r"\boxed{57} apples", "57"), (r"$\boxed{57}$.", "57"), (r"\[\boxed{\{1,2\}}\]", r"\{1,2\}"),
    (r"\boxed{5} and \boxed{5.0}", "5"), ("We add 12 and 45.\n\\boxed{57}\nThat uses 1 rule.", "57"),
    (r"\boxed{\text{(C)}}", "C"), ("1.50", "1.5"), ("6.0", "6"),
    (r"\left.5\right.", "5"), ("No solution.", r"\text{no solution}")]


@pytest.mark.parametrize("answer, reference", EQUAL)
def test_two_ways_to_write_an_answer_are_equal(answer, reference):
    assert read_answer(answer) == read_answer(reference) is not None
    assert scores(answer, reference) == scores(reference, answer) == (1.0, 1.0)


# ---- MATH: unequal ----

WRONG = {  # reference: answers that are wrong, or in doubt, and look right
    "5": ["5 or 6", "6 or 5", "5, 6", r"\boxed{5} \boxed{6}", r"\boxed{6} \boxed{5}", "x=5, y=6", "x = 5 or x = 6",
          "-5", "−5", "50%", r"0.05\%", "5%%",
          "5!", "5^2", "5²", r"5\pi", "5π", "5i", "5x", "5n", "5 n", "5ab", r"5\sqrt{2}",
          "5k", "5 thousand", "5 million", "5 dozen", "5 hundred", "5 tenths", "5 quarters", "5 pct", "5 lakh", "1/5",
          "0.5", ".5", "5.0001", "4.999", "4.99...", "5 5", "55", "2+3", "2 + 3", "10/2 + 0", r"2 \cdot 2.5", "10 - 5",
          "5+0", "5*1", "5 × 1", "5=6", "(5,5)", r"\{5\}", "(5,6)", "[5,5]", "not 5", "isn't 5", "5 is wrong",
          "minus 5", "minus $5", "negative 5", "- $5", "-\\$5", "less than 5", "at least 5", "at most 5", "about 5",
          "approximately 5", r"\approx 5", "~5", r"\neq 5", "!= 5", "x > 5", r"x \geq 5", "-x = 5", "x^2 = 5", "2x = 5",
          r"\sqrt{x} = 5", r"\log 5", "sin 5", "5 mod 7", r"5 \pmod{7}", "5_8", "5 base eight", "5e1", "0x5", "５", "٥",
          "⑤", "5\u200b", "\u200b5", "5\u2060", "5\u0338", "5ⁿ", "5‱", r"-\boxed{5}", r"\boxed{5}0",
          r"5\boxed{5}", r"\boxed{5} thousand", r"\boxed{5}^2", r"\boxed{5}!", r"not \boxed{5}", r"\boxed{5",
          r"\boxed{}", r"\boxed{5 or 6}", r"\boxed{5}, \boxed{6}", r"\boxed{6}" + r" and \boxed{5}" * 30,
          r"6 or \boxed{5}", "five or 6", "5 or six", "5 and 6", "either 5", "5 or so", "5 or more",
          "5</answer><answer>6", "5</answer> <answer>5.5", "<b>5</b> <b>6</b>", "~~5~~ 6", "**5** **6**", "5$6",
          "$5$6$", "5 \\quad 6", "5/0", "5/", "/5", "5-", r"5\text{ squared}", "5ⁿⁿⁿⁿ", "5 permille", "5 per mille",
          "5 tens", "5 lacs", "5 doubled", "double 5", "triple 5", "square root of 5", "reciprocal of 5", "5 factorial",
          "5 point two", "5 over two", "5 divided by two", "5 less two", "never 5", "5 false", "5萬", "5億", "5仟", "5佰",
          "5兆", "5成", "5折", "5個半", "5又二分之一", "零点5", "点5", "壹5", "根号5", "5或六", "约5", "大于5", "不等于5", "并非5", "至少5", "5以上",
          "1" + "0" * 1999 + "5", r"5\text{ plus one}", r"\text{minus }5", r"5\text{ or }6", 
          "- (5)", "-( 5 )", "less than **5**", "**5** plus one", "5 times 5", "5 divided by 5", "5B", "5xy", "isn’t 5",
          "5万米", "5亿克", "sqrt(5)", "f(5)", r"\left.5\right.5",
          r"\frac{5}{0}", r"\frac{5}", r"\frac5", "5^", "√25√", "x", "?",
          "none"],
    "540": [r"12\pi\cdot45/\pi", r"\sqrt{12} \cdot 45 \cdot \sqrt{12}", "12i*45/i",
            r"(\sqrt{600}+\sqrt{60})(\sqrt{600}-\sqrt{60})"],
    "57": ["5 7", r"5\,7", "5,7", "5{,}7", "75", "-57", r"57\pi", "57 or 58", "57 58", r"5\boxed{7}", "5*7", "5.7",
           "12 + 45"],
    "1234": ["1,23,4", "12,34", "1 234", "1, 234", "1.234", r"12\,34", "1{,}23{,}4", "(1,234, 5)", "123,4"],
    r"\frac{1}{3}": ["0.33", "0.333", "0.3333333333333333", "33%", r"33.3\%", "3", "1/-3", r"-\frac13", r"\frac{3}{1}",
          "1 3", "1:3", "1,3", "1/3/1/3", r"\frac{1}{33}", r"\frac133", r"1\frac{1}{3}", r"\frac{1}{3}x",
          r"\frac{1}{3}\pi", r"\sqrt{1/3}"],
    r"\frac{3}{2}": ["1 1/3", r"1\frac{3}{2}", "1/2", "11/2", r"1\frac12\frac12", "3/2 or 2/3", "2/3", r"-1\frac{1}{2}",
          "1 + 1/2"],
    r"\pi": ["3.14", "3.14159", "3.141592653589793238462643383279", "22/7", r"-\pi", r"\pi^2", r"2\pi",
          r"\frac{\pi}{2}", "p", "180", r"\pi r", r"\pi + 0", r"\pi\pi", "pie", r"\pi \text{ thousand}"],
    r"2\sqrt{2}": ["2.828", "2.8284271247461903", r"\sqrt{2}", "4", r"-2\sqrt{2}", r"2\sqrt{3}", r"\sqrt{22}", r"22",
          r"2\sqrt{2}i", r"2+\sqrt{2}", r"2^{\sqrt{2}}", r"\sqrt{2}\sqrt{2}", r"\sqrt{8}\pi", r"\pm 2\sqrt{2}",
          r"\sqrt[3]{8}", r"2\sqrt{2}x"],
    r"\frac{\sqrt{3}}{2}": ["2", "3", r"\sqrt{3}", r"\frac{3}{2}", r"\sqrt{\frac{3}{2}}", r"\frac{2}{\sqrt{3}}",
          "0.866", "√3/2π"],
    r"\frac{\pi}{2}": [r"1/2\pi", "1/(2π)", r"\frac{1}{2\pi}", r"\frac{2}{\pi}", "π2", "90", "1.5708"],
    "1+2i": ["1-2i", "2+i", "-1+2i", "3i", "1+2", "1+2j", "3", r"\sqrt{5}"],
    "(1,2)": ["(2,1)", "[1,2]", "(1,2]", "[1,2)", r"\{1,2\}", "1,2", "(1,2,3)", "(1,-2)", "(1 2)", "12", "(12)",
          "(1.2)", "(1,2", "1,2)", "(1,2), (2,1)", "(1,2) or (2,1)", "((1,2))x", "(1,2)(1,2)", r"(1,2)\cup(3,4)",
          "(x,2)"],
    r"[0,\infty)": [r"(0,\infty)", r"[0,\infty]", r"[0,-\infty)", r"(-\infty,0]", r"(\infty, 0]", "[0,8)", r"0,\infty",
          r"[0,\infty", r"x \ge 0"],
    r"\{1,2\}": [r"\{1,2,3\}", r"\{1\}", "1", "(1,2)", "[1,2]", r"\{1,-2\}", r"\{1,2,2\}", "1 or 2", "12", "1,2,",
          r"\{1 2\}", r"\{12\}", "1; 2", "{1,2)", r"\{1,2]"],
    r"1 \pm \sqrt{2}": [r"1 + \sqrt{2}", r"1 - \sqrt{2}", r"\pm 1 \pm \sqrt{2}", r"-1 \pm \sqrt{2}", r"1 \pm \sqrt{3}",
          "2.414, -0.414"],
    "A": ["B", "a", "(B)", "A or B", "AB", "(A)(B)", "A, B", "A and B", "not A", "(B) 5", "(A) 5, (B) 6",
          r"\text{(B)}", "А", "none"],
    r"\text{even}": ["odd", "not even", "even or odd", "uneven", "evenly", "e v e n", "even odd", "event", "even, odd"],
    "x^2+1": ["x^2-1", "x^{2+1}", "x^21", "x^2", "y^2+1", "X^2+1", "1+x^2+1", "x2+1", "2x+1", "x^2+10", "x^2+1=0", "5"],
    "2k": ["2", "k", "2 k k", "2K", "2n", "2k+2", "2.0", "2 kg"],
    "3xy": ["3", "3yx", "3x", "3 apples", "xy"],
    "50%": ["5", "0.005", "5000%", "0.5%", "50 percentage points", "150%", "-50%"],
    "4210_5": ["421", "4210_6", "42105", "555"],
    r"90^\circ": [r"90^\circ 30'", r"90^2", "90^0", "-90", "9", "90!"],
    r"\sqrt{8}": [r"\sqrt{80}", "8", r"\sqrt{-8}", r"\sqrt{8}\sqrt{8}", r"\sqrt8x"]}
PAIRS = [(answer, reference) for reference, answers in WRONG.items() for answer in answers]


def test_there_are_hundreds_of_wrong_answers_and_a_hundred_right_ones():
    assert len(EQUAL) >= 100 and len(set(PAIRS)) == len(PAIRS) >= 400


@pytest.mark.parametrize("reference", WRONG)
def test_a_wrong_answer_that_looks_right_scores_nothing(reference):
    value = read_answer(reference)
    assert value is not None
    believed = []
    for answer in WRONG[reference]:
        as_written, spaced = scores(answer, reference), scores(f" {answer}\n", reference)
        boxed = scores(rf"\boxed{{{answer}}}", reference)
        if read_answer(answer) == value or as_written + spaced + boxed != (0.0,) * 6:
            believed.append(answer)
    assert believed == []


@pytest.mark.parametrize("completion", [
    "5", r"\boxed{5}", "<think>so</think>5", "<answer>5</answer>", "<think>so</think><Answer>5</Answer>",
    "<think>so<answer>5</answer>", "<think>so</think><answer>5", "<think>so</think><answer>5</answer>.",
    "<think></think><answer>5</answer>", "<think>so</think><answer></answer>5",
    r"<think>\boxed{5}</think><answer></answer>", r"<think>\boxed{5}</think>"])
def test_the_training_reward_wants_the_tags(completion):
    assert accuracy(completion, EXAMPLE | {"answer": "5"}) == 0.0


@pytest.mark.parametrize("completion", [
    "<think>5</think><answer>6</answer>", "<think>5</think>", "<think>5", r"<think>\boxed{5}",
    r"<think>\boxed{5}</think>6", r"<think>\boxed{5}</think>", r"\boxed{5} \boxed{6}", "\\boxed{5}\n\\boxed{6}",
    r"\boxed{\frac{5}{6}}", r"-\boxed{5}", r"so $5\pi$.", r"The answer is $\frac{\sqrt{3}}{5}$.",
    r"so \frac{\sqrt{3}}{5}", r"\boxed{6}, not 5", "(1, 5)", r"so $x^5$", r"\boxed{5"])
def test_the_lenient_reward_reads_the_final_answer_alone(completion):
    assert accuracy_any(completion, EXAMPLE | {"answer": "5"}) == 0.0


@pytest.mark.parametrize("completion, reference", [
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"6 is wrong: \boxed{6} no, \boxed{5}", "5"),
    ("add them\n\\[\n\\boxed{5}\n\\]", "5"), (r"The answer is $\frac{\sqrt{3}}{2}$.", r"\frac{\sqrt{3}}{2}"),
    (r"Hence $x = 2\pi$.", r"2\pi"), (r"so it is \(\{1,2\}\)", r"\{1,2\}"), ("a\nThe answer is Tuesday.", "Tuesday"),
    (r"<think>\boxed{6}</think>\boxed{\sqrt{8}}", r"2\sqrt{2}"), ("12 + 45 = 57, so 57.", "57"),
    (r"\boxed{\left\{\frac{\sqrt{3}}{2}, 1\right\}}", r"\{1, \frac{\sqrt3}{2}\}"), ("\\boxed{\n5\n}", "5")])
def test_the_lenient_reward_reads_a_base_models_styles(completion, reference):
    assert accuracy_any(completion, EXAMPLE | {"answer": reference}) == 1.0


BARE = sorted({text for pair in EQUAL for text in pair} | set(WRONG))


def test_a_bare_reference_is_its_own_final_answer():  # evaluate.py votes with final_answer(reference)
    misread = []
    for reference in BARE:
        check_example(EXAMPLE | {"answer": reference}, read_both)
        value = read_answer(reference)
        if final_answer(reference) != value or hash(final_answer(tagged(reference))) != hash(value):
            misread.append(reference)
    assert misread == [] and len(BARE) > 200


@pytest.mark.parametrize("reference", [
    "", " ", "?", "none", "None", "No answer", "...", "$$", r"\boxed{}", "nan", "n/a", "-"])
def test_a_reference_with_nothing_to_compare_is_refused(reference):
    with pytest.raises(NoAnswer, match="reference answer"):
        check_example(EXAMPLE | {"answer": reference}, read_both)
    assert score(reference, reference) == score(reference, "5") == score(reference, "none") == 0


def test_the_last_box_of_a_solution_is_its_answer():
    assert last_box(r"so \boxed{1}, or \fbox{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert last_box(r"\boxed 5 apples") == "5" and last_box(r"\boxed{\{1\}}") == r"\{1\}"
    assert last_box(r"\boxed{}") == "" and last_box(r"\boxed{1") is last_box("5") is None
    deep = "{" * 4 + "}" * 4
    assert last_box(rf"\boxed{{{deep}}}") == deep and last_box(rf"\boxed{{{{{deep}}}}}") is None


# ---- an answer beside its reference: what users brought (reference, answer) ----

BROUGHT = {
    "percent": [
        ("20", "20%"), ("20", r"\boxed{20\%}"), ("20", r"\boxed{20}\%"), ("20", "20 percent"), ("60", "$60$%"),
        ("20", "20 per cent"), ("20", "20％"), ("20", "20 %"), ("20", r"$20\%$"), ("20", "The answer is 20%."),
        ("20", r"\boxed{20} percent"), ("20", "**20%**"), ("12.5", r"12.5\%"),
        (r"33\frac{1}{3}", r"33\frac{1}{3}\%"), (r"\frac{200}{3}", r"\frac{200}{3}\%"), ("1,200", "1,200%"),
        ("-5", "-5%"), ("20%", "20"), ("20%", "0.2"), (r"50\%", r"\frac12"), ("0.2", "20%"), (r"\frac15", r"20\%"),
        ("20", "20% of the apples"), ("20, 30", r"20\%, 30\%"), ("(20, 30)", "(20%, 30%)"), ("20 percent", "20%"),
        ("20", r"20 \text{ percent}"), ("20", r"20\text{\%}"),
        ("25", "25%."), ("25", r"25 \%"), ("25", "$25$ percent"), ("7/100", "7%"), ("0.07", r"7\%"),
        (r"25\%", "25 percent"), ("25%", r"\frac14"), ("150", r"150\%"), ("25", "an increase of 25%"),
        (r"\frac{25}{2}\%", "12.5%"), ("0.5%", "0.005")],
    "text": [
        ("03:30:57", "03:30:57"), ("03:30:57", "3:30:57"), ("3 × 3 × 37", "3 × 3 × 37"),
        ("3 × 3 × 37", r"3 \times 3 \times 37"), ("3 × 3 × 37", "$3 * 3 * 37$"), ("1a1", "1a1"),
        ("1a1", r"\boxed{1a1}"), ("1a1", "The answer is 1a1."), ("['-91.9', '-72.0']", "['-91.9', '-72.0']"),
        ("['-91.9', '-72.0']", "[-91.9, -72]"),
        ("3*x*atan(x) - 3*log(x**2 + 1)/2 + C", "3*x*atan(x)-3*log(x**2+1)/2+C"),
        (r"2, 3, \text{ and } 4", "2, 3, 4"), (r"2, 3, \text{ and } 4", "4, 3 and 2"),
        (r"19 \text{ and }43", "43, 19"), ("$5$ or $9$", "5 or 9"), ("$5$ or $9$", "9, 5"),
        ("x = 5 or x = 6", "x=6, x=5"), ("3:1", "3:1"), ("3:1", "3 : 1"), ("3:1", "3 to 1"), ("5:45", "5:45 p.m."),
        ("B, C", "C and B"), (r"\text{A,D}", "A, D"), ("A B D", "A, B, D"), ("n", "n"), ("n", "$n$"),
        ("-1,3,3", "3, -1, 3"), ("-1,3,3", "-1,3,3"), (r"125\textnormal{ miles}", "125"),
        (r"2007+\frac\pi 2", r"2007+\frac{\pi}{2}"), ("4.5e33", r"4.5 \times 10^{33}"), ("3.61e2", "361"),
        ("-3./2", "-1.5"), ("“so”", '"so"'), ("They are the same.", "They are the same"),
        ("a necessary but not a sufficient condition", r"\text{a necessary but not a sufficient condition}"),
        ("第一象限", "第一象限"), ("Mrs. Hilt", "Mrs. Hilt"), ("12+45", "12 + 45"), ("9 1 6 9", "9 1 6 9"),
        ("$5$;$10$", "5; 10"), ("5;10", "5 ；10"), ("3<m<4", "3 < m < 4"), (r"\frac{1}{2004!}", r"\dfrac{1}{2004!}"),
        ("C. {x}", "C"), ("13 days, 00:56:00", "13 days, 00:56:00"),
        ("Mrs. Hilt", "**Mrs. Hilt**"), ("必要不充分条件", "必要不充分条件。"), ("1a1", "$1a1$."), ("(1)(3)(4)", "(1) (3) (4)"),
        ("12*18*11", r"12 \times 18 \times 11"), ("3:2", "$3:2$"), ("3:2", r"3\!:\!2"), ("10:05", "10:05"),
        ("Lisa's soccer team", "Lisa’s soccer team")],
    "lists": [
        ("8, 12", r"\boxed{8,12}"), ("8, 12", r"\boxed{12,8}"), ("8,12", "8,12"), ("8,12", "12, 8"),
        ("1, 23", "1,23"), ("1,23", "23, 1"), ("5,6,7", "7,6,5"), ("27,93", "93, 27"), ("82, 4564", "82,4564"),
        ("16,3,1,1", "1,1,3,16"), ("11,13", "11, 13"), ("-2,10", "10, -2"), ("36,36,108", "36, 36, 108"),
        ("27,54,108,135", "135, 108, 54, 27"), ("0,12", "0,12"), ("7,20", r"7,\ 20"), ("1, 5, 100", "1,5,100"),
        ("8, 12", r"\{12,8\}"), ("(1,20), (3,45)", "(3,45),(1,20)"), ("14,16", "14 and 16"), ("1.5,20", "20, 1.5"),
        ("x=8,12", "8, 12"), ("8, 12", "x = 8,12"), ("12,34", "34,12"), ("[1, 2]", "[1,2]"), ("(12,15)", "(12, 15)"),
        ("8，12", "8, 12"),
        ("2, 3", "2 and 3"), ("2, 3", "$2$ and $3$"), ("2, 3", "$x=2$ or $x=3$"), ("2, 3", "x_1=2, x_2=3"),
        ("2, 3", "x_1=3, x_2=2"), ("2, 3", r"x_{1}=2,\ x_{2}=3"), ("2, 3", "x_1=2, x_1=3"), ("x=2, y=3", "y=3, x=2"),
        (r"x=\frac12, y=3", "x=0.5, y=3"), ("x_1=2, x_2=3", "x_2=3, x_1=2"), ("(2,3), (4,5)", "(4,5) and (2,3)"),
        ("2, 3", r"\boxed{2, 3}"), ("2, 3", r"\boxed{2} and \boxed{3}"), ("2, 3", r"\boxed{2}, \boxed{3}"),
        ("A, B", "B, A"), (r"-3, \frac12", "x=0.5 or x=-3"), ("2, 3", r"2,\quad 3"), ("2, 3", r"2 \text{ and } 3"),
        ("2, 3", r"x=2\text{ and }x=3"), ("a=1, b=2", "a = 1 and b = 2"), ("a=1, b=2", r"a=1,\quad b=2")],
    "units": [
        ("5", "5 cm^2"), ("5", "5 cm²"), ("5", "5 N"), ("5 N", "5"), ("-5", r"-5^\circ\text{C}"), ("-5", "-5°C"),
        ("-5", "-5 °C"), ("9.8", r"9.8\ \text{m/s}^2"), ("9.8", "9.8 m/s^2"), ("9.8", "9.8 m/s²"),
        ("9.8", r"9.8 \mathrm{~m} / \mathrm{s}^{2}"), ("9.8", r"9.8\,\mathrm{m\,s^{-2}}"), ("5", r"5\,\mathrm{kJ}"),
        ("5", "5 kJ/mol"), ("5", r"5~\text{cm}"), ("5", r"5 \text{ square units}"), ("5", "5 m³"),
        ("125", r"125\textnormal{ miles}"), ("125 miles", "125"), ("45", r"45\text{ km/h}"), ("5", "5 Hz"),
        ("5", "5 kg·m/s"), ("5", r"5 \text{ m}^3"), (r"12\pi", r"12\pi \text{ cm}^2"), (r"12\pi", "12π cm²"),
        ("5", "5 K"), ("5", r"5\ \Omega"), ("5", "5 ft^2"), ("5", r"5 \text{ units}^2"), ("5, 6", "5 cm, 6 cm"),
        (r"5 \text{ cm}^2", "5"), ("5 inches", "5"), ("3.5", r"3.5\,\mu\text{m}"),
        ("5", r"5\ \text{kg}\cdot\text{m}^2"),
        ("5", "5 litres"), ("5", "5 €"), ("5", "€5"), ("9 (quarters)", "9"), ("123 (third graders)", "123"),
        ("6 (quarters)", "6 (quarters)"), ("5 (boxes)", "5 boxes"), ("5", "5 mol"), ("5 cm", "5 cm."),
        ("5 cm^2", r"5 \text{ cm}^2"), ("5", r"5\ \mathrm{kg/m^3}"), ("5", "5 sq. ft"), ("5", "5 square centimeters"),
        ("180", r"180^{\circ}"), ("5", "x = 5 cm"), ("5 km/h", r"5\text{ km/h}"), ("5", "5 mph"),
        ("5", r"5\,\text{V}"), ("1/2", r"\frac12 hour"), ("5", "5 people per square mile"),
        ("5 m/s", "5 meters per second"), (r"\$5", "5 dollars"), (r"\$5", r"\$5.00"), ("5 cm^2", "5 square cm"),
        ("5 cm^2", "5 square centimeters"), ("5 in", "5 inches"), ("5 cm", "5 in all")],
    "other": [
        ("120000", r"1.2\times10^5"), ("120000", r"1.2 \times 10^{5}"), ("120000", "1.2*10^5"), ("120000", "1.2e5"),
        ("0.00012", r"1.2 \cdot 10^{-4}"), ("0.0003", "3e-4"), ("-120000", r"-1.2\times 10^5"),
        ("3000", r"3 \times 10^3"), ("52_8", "52"), ("52_{8}", "52"), ("1011_2", "1011"), ("52_8", "52_{8}"),
        (r"\begin{pmatrix} 1/5 & 0 \\ 2 & 1 \end{pmatrix}", r"\begin{pmatrix} \frac{1}{5} & 0 \\ 2 & 1 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{bmatrix}1.0&2\end{bmatrix}"),
        (r"\left[\begin{array}{rr}1 & 2 \\ 3 & 4\end{array}\right]", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\left(\begin{array}{c}1 \\ 2\\ \end{array}\right)"),
        (r"\begin{pmatrix} -1/2 \\ \sqrt{8} \end{pmatrix}", r"\begin{pmatrix} -\frac12 \\ 2\sqrt2 \end{pmatrix}"),
        (r"(-\infty,0)\cup(2,\infty)", r"(2,+\infty)\cup(-\infty,0)"),
        (r"(-\infty,0)\cup(2,\infty)", "(-∞,0)∪(2,∞)"),
        (r"(-\infty,0)\cup(2,\infty)", r"x \in (-\infty, 0) \cup (2, +\infty)"),
        (r"[0,1]\cup\{3\}", r"\{3\} \cup [0,1]"), (r"(0,1)\cup(2,3)\cup(4,5)", r"(4,5)\cup(0,1)\cup(2,3)"),
        ("(0,1) U (2,3)", r"(0,1)\cup(2,3)"), (r"x \le 5", r"x \leqslant 5"), (r"x \geq 5", "x ≥ 5"),
        (r"x \ge 5", "x >= 5"), ("x <= 5", r"x \leq 5"), ("x < 5", r"x \lt 5"), (r"x \ne 5", "x ≠ 5"),
        (r"x \neq 5", "x != 5"), (r"x \ge 5", r"5 \le x"), ("x > 5", "5 < x"),
        (r"1 \le x \le 5", r"5 \geq x \geq 1"), ("(3,2)", "(p,q)=(3,2)"), ("(p,q)=(3,2)", "(3,2)"),
        ("(x, y, z) = (1,2,3)", "(1, 2, 3)"), (r"\emptyset", r"\varnothing"), (r"\emptyset", "∅"),
        ("1, 2, 3", "1, 2 and 3"), ("1, 2, 3", "1, 2, and 3"), ("-2, 5", "x=-2, x=5"), ("-2, 5", "x = -2 and x = 5"),
        ("-2, 5", "x_1 = -2, x_2 = 5"), ("x=-2, x=5", "5, -2"), ("C", "(C) 5"), ("C", "C. 5"), ("C", "C) Tuesday"),
        ("5", "(C) 5"), ("(C) 5", "C"), ("C", r"\textbf{(C)}\ 5"), ("42", "42\n\n---"), ("42", "42\n***\n"),
        ("42", "```\n42\n```"), (r"\mathbb{R}", "ℝ"), (r"\frac{\pi}{2}", r"\frac\pi2"),
        (r"\frac{\pi}{2}", r"\frac{\pi}2"), ("x", "x"), (r"2\pi", r"2\cdot\pi"),
        ("(0,1)", "$(0, 1)$"), (r"(-\infty,3]", "(-∞, 3]"), (r"(0,1)\cup(2,3)", r"(2,3) \cup (0,1)"), ("x<3", "3>x"),
        ("[0,1]", r"x \in [0, 1]"), (r"(0,\frac12)", "(0, 0.5)"), (r"[0,\infty)", r"[0,+\infty)"),
        (r"(-\infty,3)", r"\left(-\infty,3\right)"), (r"\{1,2\}", r"\left\{2,1\right\}"), (r"\{0\}", r"\{0\}"),
        (r"\{1,\frac12\}", r"\{0.5, 1\}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
        (r"\begin{pmatrix}0.5\\2\end{pmatrix}", r"\begin{pmatrix}\frac{1}{2}\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"A = \begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "$$\\begin{pmatrix}\n1&2\\\\\n3&4\n\\end{pmatrix}$$"),
        (r"1\frac{1}{2}", "3/2"), (r"2\frac34", "2.75"), ("2 3/4", "11/4"), (r"-1\frac12", "-1.5"),
        (r"1\frac{1}{2}", r"1 \frac{1}{2}"), ("1.5e6", "1500000"), (r"1.5\times10^6", "1,500,000"),
        ("1.6e-19", r"1.6 \times 10^{-19}"), (r"1.5\times 10^{6}", "1.5e6"), ("1.60e-19", "1.6e-19"),
        ("5.4e7", r"5.4 \times 10^7 \text{ m}"), ("1000", "10^3"), ("101_2", "101"), ("101_2", "101_{2}"),
        ("2B_{16}", "2B_{16}"), ("43_8", "$43_8$"), ("x=1 1/2", "3/2"), ("3.5", "3 1/2 cups"),
        ("(1.5, 2)", "(1 1/2, 2)"), ("2B_{16}", "2B"), ("5", r"\frac{5}{1}")],
    "boxes": [
        ("2, 3", r"\boxed{2}, \boxed{3}"), ("2, 3", r"\boxed{2}$ and $\boxed{3}$."),
        ("2, 3", r"$\boxed{2}, \boxed{3}$"), ("1, 2, 3", r"\boxed{1}, \boxed{2}, and \boxed{3}"),
        ("2 or 3", r"\boxed{2} or \boxed{3}"), ("2", r"\boxed{2} and \boxed{2.0}"),
        ("x=2, y=3", r"\boxed{x=2} and \boxed{y=3}"), ("2, 3", r"\[\boxed{2} \quad \text{and} \quad \boxed{3}\]"),
        ("2, 3", r"\boxed{2},\boxed{3}")]}

NEAR = {
    "percent": [
        ("60", "0.6"), ("20", "2%"), ("20", "0.2%"), ("20", "200%"), ("20", "0.2"), ("20", "-20%"), ("20%", "2"),
        ("20%", "200"), ("20%", "20.5"), ("20%", "2000%"), ("20%", "0.2%"), ("20", "20% or 30%"), ("20", "20%, 30%"),
        ("20", "20 percentage points"), ("20", "about 20%"), ("20", "20%%"), ("20", "20‰"), ("20", "not 20%"),
        ("20", "less than 20%"), ("20", r"\boxed{20}\% \boxed{30}\%"), ("20", "120%"), ("20", "20%20"),
        ("20, 30", "20%, 3000%"), ("20", "20% + 5"), ("20", r"20\% - 1"), (r"\{20\}", "20% x"), ("20", "20% of 30"),
        ("25", "0.25%"), ("25", "25% off 40"), ("25", r"25\%\%"), ("1/4", "4%"), ("25", "25% to 30%"),
        ("25", "25–30%"), ("25", "up 25% then down 5%"), ("12.5%", "12,5%"), ("25", "2.5e3%"),
        ("(20, 30)", "(20%, 0.3)"), ("25", "25 bps"), ("0.5", "50%%"), ("25", "100% - 75%"),
        ("25", "a 25% share of 30%"), ("20%", "20/100%"), ("25", r"25\% \text{ or less}"), ("25", "25 per cent mille"),
        ("25", "25 pct. points")],
    "text": [
        ("03:30:57", "03:30:58"), ("03:30:57", "30:57"), ("3 × 3 × 37", "333"), ("3 × 3 × 37", "3 × 37"),
        ("3 × 3 × 37", "3 × 3 × 37 × 1"), ("1a1", "1A1"), ("1a1", "1a"), ("1a1", "11"), ("1a1", "1a1 or 1a2"),
        ("1a1", "1a1, 1a2"), ("1a1", "1 a 1"), ("1a1", "1a11"), ("9 1 6 9", "9169"), ("9 1 6 9", "9 16 9"),
        ("['1', '2']", "['2', '1']"), ("['1', '2']", "['1', '2', '2']"), ("12+45", "57"), ("57 or 58", "57"),
        ("57 or 58", "58"), ("57 or 58", "57 or 59"), ("57", "57 or 58"), ("3:1", "1:3"), ("3:1", "3"),
        ("3:1", "31"), ("3:1", "3.1"), ("3:30", "1:10"), ("3:30 a.m.", "3:30 p.m."), ("B, C", "B"),
        ("B, C", "B, C, D"), ("B, C", "B or C"), ("B, C", "A, B, C, D"), ("n", "N"), ("n", "m"), ("n", "n or m"),
        ("n", "2n"), ("-1,3,3", "-1,3"), ("-1,3,3", "-1,-1,3"), ("4.5e33", "4.5e3"), ("4.5e33", "4.5e34"),
        ("57", "5.7e1"), ("5;10", "10;5"), ("5;10", "5"), ("3<m<4", "3<m"), ("3<m<4", "3>m>4"),
        ("Mrs. Hilt", "Mrs. Hilt or Mrs. Doyle"), (r"2007+\frac\pi 2", "2007"), ("", ""), ("none", "none"),
        ("?", "?"), ("1a1", ""), ("1a1", "1a1\u200b"), ("1a1", "not 1a1"), ("so it is, and it was", "so it is"),
        ("x = 5 or x = 6", "x = 5"), ("{1, 2}", "1 or 2"), ("12+45", "45+12"),
        ("1a1", "1b1"), ("1a1", "1a1a1"), ("1a1", "a1"), ("3 × 3 × 37", "3 × 37 × 3 × 1"), ("3 × 3 × 37", "3^2 × 37"),
        ("necessary but not sufficient condition", "necessary and sufficient condition"), ("必要不充分条件", "充分不必要条件"),
        ("Mrs. Hilt", "Mr. Hilt"), ("(1)(3)(4)", "(1)(3)"), ("(1)(3)(4)", "(1)(3)(4)(5)"), ("12+45", "1245"),
        ("Any $h$ will work.", "Any $k$ will work."), ("Daniel's pizza restaurant", "Daniel's"), ("MR=SRMC", "SRMC"),
        ("03:30:57", "3:30:57:00"), ("03:30:57", "33057"), ("5:45 a.m.", "17:45"),
        ("Lisa's soccer team", "not Lisa's soccer team"), ("1a1", "1a1?"), ("1a1", "1a1!"), ("1a1", "~1a1"),
        ("1a1", "-1a1"), ("1a1", "1a1/2"), ("1a1", "1a1%"), ("12*18*11", "12*18*11*1"), ("f(x)=x^2", "f(x)=x^{2}+0"),
        ("12:30", "12:30:30"), ("2:3", "4:6:2"), ("2:3", "2/3"), ("2:3", "2:3 or 3:2")],
    "lists": [
        ("8, 12", "8"), ("8, 12", "812"), ("812", "8,12"), ("8.12", "8,12"), ("8,12", "8.12"), ("1.23", "1,23"),
        ("123", "1,23"), ("1,23", "123"), ("100200", "100, 200"), ("100, 200", "100200"), ("8, 12", "8,1,2"),
        ("8, 12", "[8, 12]"), ("[8, 12]", "[12, 8]"), ("(8, 12)", "(12, 8)"), ("(8, 12)", "8,12"),
        ("8, 12", "(8, 12)"), ("8,12", "8,12,12"), ("1234", "1,234, 5"), ("1234", "12,34"), ("57", "5,7"),
        ("8,12", "8,13"), ("8,12", "8;12"), ("8, 12", "8 12"), ("8, 12", "8,12 or 9,13"), ("8, 12", "8, 12, x"),
        ("1234.5", "1,23,4.5"),
        ("2, 3", "2, 3, 3"), ("2, 3", "2 or 3, 4"), ("2, 3", "-2, -3"), ("2, 3", "2,3,"), ("2, 3", ",2,3"),
        ("2, 3", "2,,3"), ("2, 3", "2...3"), ("2, 3", "2 to 3"), ("2, 3", "2-3"), ("2, 3", "23"),
        ("2, 3", "2 and not 3"), ("2, 3", "all but 2, 3"), ("2, 3", "(2), (3), (4)"), ("2, 3", r"\{2\}, \{3\}"),
        ("2, 3", r"\{\{2, 3\}\}"), ("(2,3)", "((2,3))"), ("(2,3), (4,5)", "(2,4), (3,5)"), ("(2,3), (4,5)", "(2,3)"),
        ("(2,3), (4,5)", "2,3,4,5"), ("2, 3", "x=2, x=3, y=1"), ("x=2, y=3", "x=3, y=2"), ("x=2, y=3", "2, 3"),
        ("x=2, y=3", "y=2, x=3"), ("x_1=2, x_2=3", "x_1=3, x_2=2"), ("x_1=2, x_2=3", "x_1=2"),
        ("2, 3", "x_1=2, x_2=2, x_3=3"), ("2, 3", "x_1=2, y_1=3"), ("2", "2; 3"), ("1, 2, 3", "1, 2, ..., 3"),
        ("1, 2, 3", "1 < 2 < 3"), ("2, 3", "2 & 3 & 4"), ("A, B", "A, B, B"), ("2 or 3", "2"),
        ("2 or 3", "2 or 3 or 4"), ("1000, 2000", "1,000,2,000"), ("1,000", "1, 000"), ("3", "3, 3"),
        ("x=2, x=3", "x=2"), ("x=2, x=3", "x=-2, x=3"), ("2, 3", "2 xor 3 xor 4"), ("2, 3", "neither 2 nor 3"),
        ("x_1=2, x_2=3", "x_1=2, x_3=3"), ("a=1, b=2, c=3", "a=1, b=2"), ("a=1, b=2", "a=1, b=-2")],
    "units": [
        ("5", "5 n"), ("5", "5n"), ("5", "5N"), ("5", "5 x^2"), ("5", "5 m^2 n"), ("5", "5 cm^2 + 1"),
        ("5", "5^2 cm"), ("5", "25 cm"), ("9.8", "9.8^2 m/s"), ("5", "5 C(n)"), ("5", r"5^\circ 30'"),
        ("5", "5 m/n"), ("5", "5 ab/c"), ("5", "5 k"), ("5", "5 million km"), ("5", "5 cm or 6 cm"),
        ("5", "5 cm, 6 cm"), ("5", "-5 N"), ("5", "5²"), ("5", "5 cm^5"), ("5", r"5 \text{ hundred}"), ("5", "5 x"),
        ("5", "5 n^2"), ("5n", "5"), ("5n", "5 N"), ("5x^2", "5 cm^2"), ("5", "5 to 6 cm"), ("5", r"\text{5 dozen}"),
        ("$2 a x+b$", "2"), ("$6(x+y+z) $", "6"), ("I(0)", "0"), ("$f(n)=n$, $g(n)=1$", "1"),
        (r"$2 \pi a b$", r"2\pi"), ("400, such, aware, content", "400"), ("5", "5 a b"), ("5", "5 (a+b)"),
        ("5 cm", "5 mm"), ("5 kg", "5 g"), ("5 m^2", "5 m^3"), ("5 cm^2", "5 cm"), ("5 hours", "5 days"),
        ("5 dollars", "5 cents"), (r"\$5", "5 cents"), ("5 degrees", "5 rad"), ("5", "5 × 10 cm"),
        ("5", "5 half-hours"), ("5", "5 m n"), ("5 km/h", "5 m/s"), ("5", "5 ft 6 in"), ("5", "5'6\""),
        ("5", "5 lb 3 oz"), ("5", "5 h 30 min"), ("5", "5 minutes 30"), ("5", "5 kx"), ("5", "5 centi"),
        ("5", "5 (thousands)"), ("5", "5 (tenths)"), ("5", "5 (not 6)"), ("5", "5 (or 6)"), ("5", "5 (wrong)"),
        ("9", "9 quarters"), ("9", "9 (about)"), ("5", "5 cm per 2 s"), ("5", "5 k€"), ("5", "5 Mt"),
        ("5", r"5 \times \text{cm}^2 + 1"), ("5 %", "5 ‰"), ("5 mol", "5 mmol"), ("5 N", "5 kN"), ("5 J", "5 kJ"),
        ("5 V", "5 mV"), ("5 Hz", "5 MHz"), ("5 L", "5 mL"), ("5 m", "5 m/s"), ("5 dollars", "5 dollars per hour"),
        ("5 cm^2", "5 cm^3"), ("5 square inches", "5 inches"), ("5 m/s", "5 m/s^2"), ("5 sq. ft", "5 ft"),
        (r"\$5", "5%"), ("5 kg", "5 lbs"), ("5 minutes", "5 min 30 s")],
    "other": [
        ("120000", r"1.2\times10^4"), ("120000", r"1.2\times10^{-5}"), ("120000", r"12\times10^5"),
        ("120000", r"1.2\times 10"), ("50", "5e1"), ("5", r"5\times10^0"), ("120000", "1.2e6"),
        ("120000", r"1.2 \times 10^5 \times 2"), ("12", "3*4"), ("12", r"1.2\times 5^1"), ("52_8", "42"),
        ("52_8", "52_9"), ("52", "52_8"), ("52_8", "25"), ("52_8", "528"), ("4210_5", "555"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{vmatrix} 1 \\ 2 \end{vmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \\ 0 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"2\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}^T"),
        (r"(-\infty,0)\cup(2,\infty)", r"(-\infty,0]\cup(2,\infty)"),
        (r"(-\infty,0)\cup(2,\infty)", r"(-\infty,0)\cap(2,\infty)"), (r"(-\infty,0)\cup(2,\infty)", r"(-\infty,0)"),
        (r"(-\infty,0)\cup(2,\infty)", r"(-\infty,2)\cup(0,\infty)"), (r"(0,1)\cup(2,3)", "(0,1), (2,3)"),
        (r"(0,1)\cup(2,3)", "(0,1)(2,3)"), (r"x \le 5", r"x \ge 5"), (r"x \le 5", "x < 5"), ("x > 5", "x < 5"),
        ("x > 5", "5 > x"), (r"1 \le x \le 5", r"1 \geq x \geq 5"), (r"x \le 5", "5"), ("5", "x >= 5"),
        ("5", "x ≤ 5"), (r"x \ne 5", "x = 5"), ("(3,2)", "(q,p)=(3,2)"), ("(3,2)", "(p,q)=(2,3)"),
        ("(3,2)", "(p,p)=(3,2)"), ("(3,2)", "(p,q)=(3,2,1)"), ("(3,2)", "(p,q)=(3,2) or (2,3)"), (r"\emptyset", "0"),
        (r"\emptyset", r"\{\emptyset\}"), (r"\emptyset", r"\{0\}"), ("0", r"\emptyset"), ("1, 2, 3", "1, 2 and 4"),
        ("1, 2, 3", "1, 2 or 3"), ("-2, 5", "x=-2, y=5"), ("-2, 5", "x=-2, x=5, x=6"), ("5", "x=-2, x=5"),
        ("-2", "x=-2, x=5"), ("C", "(C) 5, (D) 6"), ("C", "(C) or (D)"), ("C", "(C) 5 or (D) 6"),
        ("C", "(C) is wrong"), ("C", "(C) not 5"), ("C", "(D) 5"), ("C", "C and D"), ("C", "(A) 5"), ("(C) 5", "D"),
        ("(C) 5", "(D) 5"), ("(C) 5", "6"), ("42", "42\n\n--- 43"), ("42", "42\n---\n43"), ("C", "(C)(D)"),
        ("C", "C, D"), ("(C) 5", "(C) 6"),
        ("(0,1)", "[0,1)"), ("(0,1)", "]0,1["), ("(0,1)", "(0,1) or [0,1]"), ("[0,1]", "[1,0]"),
        (r"(-\infty, 3)", r"(3, -\infty)"), (r"(-\infty, 3)", r"(\infty, 3)"), (r"(0,1)\cup(2,3)", "(0,3)"),
        (r"(0,1)\cup(2,3)", r"(0,1)\cup(2,3)\cup(4,5)"), (r"(0,1)\cup(2,3)", r"(0,1)\setminus(2,3)"),
        ("[0,1]", r"0 \le x"), ("(0,1]", "0<=x<1"), ("(0,1)", r"x \notin (0,1)"), ("(0,1)", "(0, 1)^c"),
        ("(0,1)", "-(0,1)"), ("(2,3)", "(2,3)/2"), ("x<3", "x<-3"), ("x<3", "y<3"), ("x<3", "x<3 or x>5"),
        ("0<x<3", "0<x<=3"), (r"x \ne 5", r"x \ne -5"), (r"\{1,2,3\}", r"\{1,2\}, 3"), (r"\{1,2\}", r"\{1\}\cup\{3\}"),
        (r"\{1,2\}", r"\{1,2,\}"), (r"\emptyset", r"\{\}\}"), (r"\emptyset", "none"), (r"\{1,2\}", r"\{\{1\},\{2\}\}"),
        (r"\{(1,2)\}", r"\{1,2\}"), (r"\{(1,2)\}", r"\{(2,1)\}"), (r"\{0\}", "0, 0"), (r"\mathbb{R}", r"\mathbb{Q}"),
        (r"\mathbb{R}", "R"), (r"\{1,2\}", r"1 \in \{1,2\}"), (r"\{a,b\}", r"\{a,c\}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&-4\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"-\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{-1}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\frac12\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
         r"\begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "1, 2"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "[1; 2]"),
        (r"1\frac{1}{2}", r"1 \cdot \frac{1}{2}"), (r"1\frac{1}{2}", "11/2"), ("1 1/2", "1/2"), ("1 1/2", "1 2/1"),
        (r"1\frac12", "1 + 1/2"), (r"-1\frac12", "-1/2"), (r"-1\frac12", r"-\frac12"), (r"2\frac{3}{4}", "2*3/4"),
        (r"2\frac{3}{4}", "23/4"), (r"2\frac{3}{4}", "2, 3/4"), ("2 3/4", "2 and 3"), ("2 3/4", "2 3 4"),
        ("1.5", "1 1/2 1/2"), ("3/2", "1 and 1/3"), (r"\frac{3}{2}", "1 2"), ("1.5e6", "1.5e-6"),
        ("1500000", "1.5*10^6*2"), ("1500000", r"1.5 \times 6^{10}"), ("1500000", r"15 \times 10^6"),
        (r"1.5\times10^6", r"1.5\times10^{16}"), (r"1.5\times10^6", r"1.5\times106"), (r"1.5\times10^6", "1.5"),
        ("1000", "10^2"), ("1000", "10^{-3}"), ("1.6e-19", "1.6e19"), ("1.6e-19", "-1.6e-19"), ("1.6e-19", "1.60e-18"),
        ("200", "2e1"), ("2e3", "2^3"), ("2e3", "2e"), ("3000", "3 x 10^3 x"), ("101_2", "5"), ("101_2", "101_3"),
        ("101_2", "1012"), ("101", "101_2"), ("101_2", "0b101"), ("2B_{16}", "2C_{16}"), ("43_8", "34_8"),
        ("43_8", "43_{10}"), ("43_8", "-43"), ("43_8", "43.5"), ("43_8", "430/10"), ("1/4", "25% of 2"),
        ("x_1=2, x_2=3", "2, 3"), ("3.5", "3 5/10 or so"), ("101_2", "5_{10}"), ("A_1", "A"), ("x_1", "x"),
        ("5_x", "5")],
    "boxes": [
        ("2", r"\boxed{1} and \boxed{2}"), ("1, 2", r"\boxed{1} or \boxed{2}"), ("1, 2", r"\boxed{1} \boxed{2}"),
        ("2, 3", r"\boxed{2}, \boxed{3}, \boxed{4}"), ("2, 3", r"\boxed{2} and \boxed{3} and not \boxed{3}"),
        ("2", r"\boxed{2}, \boxed{2}, \boxed{3}"), ("23", r"\boxed{2},\boxed{3}"),
        ("2, 3", r"\boxed{2} and -\boxed{3}"), ("2, 3", r"\boxed{2} and 3"), ("2", r"\boxed{2}, or so"),
        ("12", r"\boxed{1}{,}\boxed{2}"), ("(2,3)", r"(\boxed{2}, \boxed{3})"), ("2, 3", r"\boxed{2}^2, \boxed{3}"),
        ("2, 3", r"\boxed{2}, \boxed{3}^2"), ("2, 3", r"\boxed{2}, \boxed{3} thousand"),
        ("2, 3", r"2\boxed{2}, \boxed{3}"), ("2", r"\boxed{3} and \boxed{2}"), ("x=2", r"\boxed{x=2} and \boxed{y=3}")]}


def score(reference, answer):
    example = EXAMPLE | {"answer": reference}
    assert accuracy(tagged(answer), example) == accuracy_any(tagged(answer), example)
    return accuracy(tagged(answer), example)


@pytest.mark.parametrize("kind", BROUGHT)
def test_what_users_write_for_a_right_answer_scores(kind):
    assert [pair for pair in BROUGHT[kind] if score(*pair) != 1] == [] and len(BROUGHT[kind]) > 8


@pytest.mark.parametrize("kind", NEAR)
def test_a_wrong_answer_near_what_users_write_scores_nothing(kind):
    assert [pair for pair in NEAR[kind] if score(*pair) != 0] == [] and len(NEAR[kind]) > 15


def test_another_digit_makes_a_right_answer_wrong():
    believed = []
    for reference, answer in BROUGHT["percent"] + BROUGHT["text"] + BROUGHT["lists"]:
        for place in re.finditer(r"(?<!_)(?<!_\{)[0-9]", answer):  # the index of a name may be any
            for step in (1, 5):
                digit = str((int(place[0]) + step) % 10)
                changed = answer[:place.start()] + digit + answer[place.end():]
                if score(reference, changed):
                    believed.append((reference, changed))
    assert believed == []


ENDS = [  # (reference, a completion without answer tags)
    ("42", "The answer is 42.\n\nI hope this helps!"), ("42", "40+2\n#### 42\nThis agrees."),
    ("42", "So the answer is:\n\n\\[\n42\n\\]"), ("42", "Thus\n$$\nx = 42\n$$"), ("42", "so\n\\[ 42 \\]\n"),
    ("42", "We find\n\\begin{align*}\nx &= 40 + 2 \\\\\n&= 42\n\\end{align*}"),
    ("42", "**Answer:** 42\n\nLet me know if you need more."),
    ("42", "Final Answer: The final answer is $42$. I hope it is correct."),
    ("42", "Answer: 42\n\nExplanation: we add 40 and 2."), ("42", "The answer is 42.\n\n---"),
    ("42", "so 42\n\n---\n"), ("42", "so\n```\n42\n```"), ("42", "The final answer is: 42\n\nThank you!"),
    ("42", "the answer is\n42\nGood luck."), ("42", "答案是42。\n希望对你有帮助！"), ("42", "答案：42\n谢谢"),
    ("42", "The answer is:\n$$42$$\nI hope this helps!"), ("1/2", "The answer is $\\frac{1}{2}$.\n\nDone."),
    ("03:30:57", "I add them.\nThe answer is 03:30:57.\nDone."), ("1a1", "so\n#### 1a1"),
    ("42", "<think>40+2</think>The answer is 42.\n\nI hope this helps!"),
    ("42", "<think>x</think>It is\n\n\\[\n42\n\\]"), ("42", "#### 42\n\n#### 42"),
    ("20", "So 20% is it.\n#### 20%\nDone."), ("8, 12", "The solutions are 8,12.\nDone."),
    ("42", "The answer is 42.\nWe used 2 rules."), ("42", "#### Step 2: add\n40 and 2 give 42."),
    ("42", "#### 1. Add\nWe get 42"), ("3", "If the answer is 5, it fails.\nx = 3"),
    ("42", "**Answer**: 42\n\n**Check**: it fits."), ("Tuesday", "so\n#### Tuesday\nDone."),
    ("42", "The answer is **42**.\n\nHave a nice day."), ("42", "**Final Answer**\n42"), ("42", "## Answer\n\n42"),
    ("42", r"The final answer is $\boxed{42}$. I hope it is correct."), ("42", "Final answer: 42\n"),
    ("2, 3", r"The solutions are \boxed{2} and \boxed{3}."), ("2, 3", r"so \[\boxed{2}, \quad \boxed{3}\]"),
    ("42", "#### 42\n"), ("42", "Therefore, the answer is $42$.\nThis completes the solution."),
    ("x=2, y=3", "so x=2, y=3"), ("3/2", "The answer is 1 1/2."),
    ("42", "so we get\n\n$$\\boxed{42}$$\n\nas desired."),
    (r"\begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix}", r"The matrix is $ \begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix} $."),
    ("x >= 5", r"Therefore $x \geq 5$ is the solution."), ("1/2", r"Hence we have $\frac{1}{2}$."),
    ("1/2", r"Since the two are not equal, the ratio of the first to the second comes to $\frac{1}{2}$."),
    ("57", "so 57 is the answer."), ("3", "She has 3 red or blue hats, so 3"), ("x^2", "so the function is $x^2$"),
    ("5", "so $x=5$"), ("5", "We solve $2x=10$ and get $x=5$"), ("1/2", r"With $x=1$, we get $\frac12$.")]
NO_ENDS = [
    ("42", "The answer is 42.\nNo, it is 43."), ("42", "#### 42\nWait, that is wrong.\n#### 43"),
    ("42", "The answer is 42.\nThe answer is 43."), ("42", "42\n43"), ("42", "42\nno idea"),
    ("42", "The answer is not 42.\nDone."), ("42", "The answer is 42.\nSo it is 43."),
    ("42", "The answer is 42.\nBut I am not sure."), ("42", "The answer isn't 42.\nDone."),
    ("42", "The answer is 42 or 43.\nDone."), ("42", "#### 42 or 43\nDone."),
    ("42", "<think>The answer is 42.</think>I do not know."), ("42", "<think>The answer is 42."),
    ("42", "The answer is:\n\n\\[\n43\n\\]\n42 was wrong."), ("42", "The answer is 42.\nThe answer is unknown."),
    ("42", "42\n\nI hope this helps!"), ("42", "The answer is -42.\nDone."), ("42", "The answer is 42x.\nDone."),
    ("42", "answer 42\n43\n---"), ("42", "\\[ 42 \\]\n43"), ("42", "The answer is 42.\nTherefore we get 43."),
    ("2", "#### Step 2: add\n40 and 2 give 42."), ("1", "#### 1. Add\n40+2 gives 42."),
    ("42", "The answer is 42.\nx = 43"), ("42", "The answer is 42.\n$$x = 43$$"),
    ("5", "If the answer is 5, all is well.\nIt may be so."),
    ("42", "The answer is 42.\nActually, the total is 43."), ("42", "The answer is 42?\nI think 43."),
    ("42", "#### 42\n#### 43"), ("42", "#### 43\nnot 42"), ("42", "Answer: 41\nThe sum 42 was my first guess."),
    ("42", "The answer is 42 if x is even, otherwise 43."), ("42", "Is the answer 42?\nIt is 43."),
    ("42", "The answer is between 40 and 42."), ("42", "The answer is 42.\nHowever, this is false."),
    ("42", "The answer is 42 + 1."), ("42", "The answer is:\n42 or 43\nDone."),
    ("42", "The wrong answer is 42.\nGood luck."), ("42", "answer: 43 (42 is wrong)"),
    ("42", "My answers are 42 and 43.\nBye."), ("42", "The answer is 42\n= 43 - 1 + 1\n43"),
    ("42", "The answer is 42\n\nAnswer: B"), ("42", "<think>#### 42</think>"),
    ("42", "<think>#### 42</think>Good luck!"), ("42", "The answer is 42. Hmm, let me recheck: it is 43."),
    ("2", r"The solutions are \boxed{1} and \boxed{2}."), ("2", r"so \boxed{1}, \boxed{2}"),
    ("2", r"$\boxed{1}$ or $\boxed{2}$"), ("42", "The answer would be 42 were x odd.\nIt is even."),
    ("42", "One might think the answer is 42.\nIt isn't."), ("42", "The answer is 42.\n43"),
    ("42", "The answer is 42.\nTherefore: 43"), ("42", "The answer is 42.\n\\[x = 43\\]"), ("42", "答案是42。\n更正：43"),
    ("42", "The answer is 42.\nEdit: 43"), ("42", "The answer is 42.\nEdit: it should be 43."),
    ("1/2", r"It is not $\frac{1}{2}$."), ("1/2", r"So it isn't $\frac{1}{2}$."), ("3", "so $x=2$ or $x=3$."),
    ("3", "so $x=2$ and $x=3$."), ("3", "so $x=2$, $x=3$."), ("3", r"so \(x=2\) and \(x=3\)."),
    ("3", "so x=2 and x=3."), ("3", "so 2 and 3."), ("3", "The values are 2, 3."),
    ("3", "The answers are $2$ and $3$."), ("3", "x = 2 or 3"), ("3", "either $2$ or $3$"),
    ("x^2", "anything but $x^2$"), ("x^2", "It is never $x^2$."), ("5", "less than $5$"), ("5", "It is at least $5$."),
    ("5", "so it is more than $5$."), ("5", "It is between $3$ and $5$."),
    (r"\frac12", r"It lies between $0$ and $\frac12$."), (r"\frac12", r"It is about $\frac12$."),
    (r"\frac12", r"It is minus $\frac12$."), (r"\frac12", r"twice $\frac12$"),
    (r"\frac12", r"It is not equal to $\frac12$."), (r"\sqrt{2}", r"smaller than $\sqrt{2}$"),
    ("(1,2)", "not the point $(1,2)$."), ("5", "I doubt that it is $5$."), ("5", "The answer cannot be $5$."),
    ("3", "The answer is $2$ or $3$."), ("3", "We get 2 for a and 3 for b."), ("3", "It is not 3."),
    ("3", "Hence it can't be 3."), ("42", "#### not $42$"), ("5", "so $-$ $5$"), ("5", "- $5$"), ("5", "so $3 <$ $5$"),
    ("2", "so 1 or 2")]


@pytest.mark.parametrize("reference, completion", ENDS)
def test_a_final_answer_above_the_last_line_is_read(reference, completion):
    assert accuracy_any(completion, EXAMPLE | {"answer": reference}) == 1
    assert accuracy(completion, EXAMPLE | {"answer": reference}) == 0


@pytest.mark.parametrize("reference, completion", NO_ENDS)
def test_an_answer_that_is_taken_back_or_passed_over_is_not_the_final_one(reference, completion):
    assert accuracy_any(completion, EXAMPLE | {"answer": reference}) == 0


@pytest.mark.parametrize("answer, reference, right", [
    ("5 cm", "5 m", 0), ("5 m/s", "5 km/h", 0), ("5 hours", "5 minutes", 0), ("5 cm", "5 centimeters", 1),
    ("5 mi", "5 miles", 1), ("5 cm", "5", 1), ("5", "5 cm", 1), ("5 apples", "5 cm", 1),
    (r"15\mbox{ cm}^2", "15 cm^2", 1), ("12%", "12 minutes", 0), (r"5\%", "5 inches", 0), ("12%", "12 percent", 1)])
def test_two_units_that_differ_are_two_answers_and_one_alone_is_ignored(answer, reference, right):
    assert score(reference, answer) == right


def test_a_reference_that_no_rule_reads_is_compared_as_text_and_by_nothing_else():
    for reference in (r"3 \times 3 \times 37", "1a1", "12+45", "1,234, 5", "(1,2", "５７", "Any $h$ will work."):
        assert read_answer(reference) is None
        check_example(EXAMPLE | {"answer": reference}, read_both)
        assert score(reference, reference) == score(reference, f" ${reference}$ .") == 1
        assert score(reference, "57") == score(reference, f"{reference} 1") == score(reference, f"not {reference}") == 0


# ---- harmless whatever comes ----

HUGE = ["(" * 10**5, "{" * 10**5, "[" * 300, "(" * 149 + "1" + ")" * 149, "-" * 299 + "1", "√" * 299 + "2", "9^9^9^9",
        "9^{9^{9}}", r"\sqrt{10^{100}}", r"\sqrt{10^{10^{10}}}", "2^{100}" * 40, r"(1+\sqrt{2}+\pi)^5" * 18,
        "9" * 10**5, "9" * 300, "1/" * 10**4, "1+" * 150 + "1", r"\frac{1}{" * 10**4, r"\boxed{" * 14000,
        r"\boxed{1}" * 11000, r"\boxed{1}" * 200, r"\boxed{{{{{" * 180, "\\boxed{" + "{" * 900 + "}" * 900 + "}",
        ",".join(map(str, range(25000))), ", ".join(map(str, range(300))), "{" * 9 + "1,2" + "}" * 9, "(1,2)," * 300,
        r"\text{" * 300, r"\sqrt" * 400, r"\left" * 390, r"\{" * 900, "$" * 2000, "a " * 1000, "x^" * 900, "±" * 1000,
        "1,234" * 380, "1{,}" * 480, "**" * 990, "\\" * 2000, "{,}" * 600, "1." * 900, " 1" * 900, r"\pi" * 600,
        "i" * 300, "2π" * 150, r"\sqrt{999983}" * 25, "√999983+" * 37, "(" * 150 + ")" * 150, "\ud800" * 1000,
        "\x00" * 2000, "±1," * 600, "√2+√3+√5+√7+√11+√13+√17", "6 " + "or " * 600, "x=" * 900, "1_" * 900,
        r"\begin{pmatrix}" * 120, "answer is " * 190, "#" * 2000, "the final answer: " * 100,
        r"\( " * 400 + r"\) " * 400 + "a", "$!" * 900]


def seconds_of(run):
    """The least of three times: another may hold a collection of the whole session's garbage."""
    times = []
    for _ in range(3):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def slowest(texts):
    """The longest time that one of the texts takes."""
    return max(seconds_of(lambda: read_answer(text)) for text in texts)


@pytest.mark.parametrize("text", HUGE, ids=lambda text: f"{text[:8]!a}x{len(text)}")
def test_an_absurd_answer_is_harmless_and_fast(text):
    assert slowest([text]) < 0.05  # seconds; 0.008 where it was written
    example = EXAMPLE | {"answer": "5"}
    assert accuracy_any(text, example) == accuracy(tagged(text), example) == 0.0
    assert seconds_of(lambda: (accuracy_any(text, example), accuracy(tagged(text), example))) < 0.2
    assert rewards.solves(text, [1, 2], 3, read_expression) is False


FRAGMENTS = ["0", "1", "2", "3", "12", "0.5", "1,234", r"\frac", "{", "}", "(", ")", "[", "]", r"\{", r"\}", "+", "-",
             "*", "/", "^", "_", r"\sqrt", r"\pi", "i", "x", ",", ", ", " ", "=", r"\boxed{", r"\text{ cm}", "%", r"\%",
             "$", r"\infty", r"\cup", r"\pm", "°", r"^\circ", r"\left(", r"\right)", r"\,", r"\!", "or", "A", "(A)",
             "even", ".", "±", "√", "π", r"\frac{1}{2}", r"\sqrt{2}", "\\"]


def fuzz(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 12)))


def test_any_mixture_of_latex_is_read_fast_and_without_an_error():
    texts = list(fuzz(3000))
    values = [read_answer(text) for text in texts]
    assert slowest(texts) < 0.05  # seconds; 0.001 where it was written
    assert len({hash(value) for value in values}) > 300 and values.count(None) > 300
    for text, value in zip(texts, values):
        assert value == read_answer(text) and (value is None or final_answer(text) == value), text
        if isinstance(value, (Fraction, str)):
            assert read_answer(str(value)) == value or isinstance(value, str), text  # reading is idempotent


def expression(rng, depth=0):
    """A random expression: (LaTeX, its float, computed here)."""
    kind = rng.choice("nnnrp" if depth > 2 else "nrpfsa-mgw")
    number = rng.choice([1, 2, 3, 4, 5, 8, 12])
    if kind == "n":
        return str(number), float(number)
    if kind == "p":
        return r"\pi", math.pi
    if kind == "r":
        return rf"\sqrt{{{number}}}", math.sqrt(number)
    if kind == "w":
        inside, x = expression(rng, depth + 1)
        return rf"({inside})^{{2}}", x * x
    if kind == "g":
        inside, x = expression(rng, depth + 1)
        return f"-({inside})", -x
    (a, x), (b, y) = expression(rng, depth + 1), expression(rng, depth + 1)
    if kind == "f":
        return (rf"\frac{{{a}}}{{{b}}}", x / y) if y else (a, x)
    if kind == "s":
        return (rf"({a})/({b})", x / y) if y else (a, x)
    return {"a": (f"{a}+{b}", x + y), "-": (f"{a}-({b})", x - y), "m": (rf"({a})\cdot({b})", x * y)}[kind]


def value_of(value):
    """A canonical number as a float."""
    if isinstance(value, Fraction):
        return float(value)
    return sum(float(c) * math.sqrt(n) * math.pi ** k for (n, k), c in value[1])


def differential(count, seed=0):
    """(read numbers, equal pairs, errors) of random expressions, judged with floats."""
    rng, seen, read, errors, equal = random.Random(seed), {}, 0, [], 0
    for _ in range(count):
        text, x = expression(rng)
        value = read_answer(text)
        if value is None or isinstance(value, str):
            continue
        read += 1
        if not math.isclose(value_of(value), x, rel_tol=1e-9, abs_tol=1e-9):
            errors.append((text, x, value))
        other = seen.setdefault(round(x, 7), (text, value))  # equal floats, equal values: the form is canonical
        equal += other[0] != text
        if other[1] != value:
            errors.append((text, other))
    return read, equal, errors


def test_expressions_have_the_value_that_floats_give_and_one_form_for_each():
    read, equal, errors = differential(4000)
    assert not errors and read > 1000 and equal > 400


@pytest.mark.full
def test_a_hundred_thousand_mixtures_and_expressions():
    read, equal, errors = differential(100_000, seed=1)
    assert not errors and read > 25_000
    assert max(accuracy_any(tagged(text), EXAMPLE | {"answer": "987654321"}) for text in fuzz(100_000, seed=1)) == 0.0


# ---- GSM8K ----

HARMLESS = [  # ways to write the number n, which has no thousands separator, and its form with them
    "{n}", "{c}", "${n}", "${c}", r"\${n}", "{n} dollars", "{n} apples", "**{n}**", "**{n} apples**", r"\boxed{{{n}}}",
    r"$\boxed{{{n}}}$", r"\boxed{{{n}\text{{ cm}}}}", "The answer is {n}.", "The final answer is ${n}$", "{n}.",
    "{n}.0", "{n}.00", "  {n}  ", "\n\n{n}\n", "= {n}", "x = {n}", "#### {n}", "She has {n} apples in all.",
    "Answer: {c}", r"\text{{{n}}}", "So the total is {c} miles per day.", r"\({n}\)"]


def gsm8k(full):
    folder = os.environ.get("GSM8K")
    if not folder:
        pytest.skip("GSM8K names no folder")
    for name in ("test", "train"):
        lines = (Path(folder) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines if full else lines[::50]:
            yield json.loads(line)["answer"]


def check_gsm8k(full):
    """(rows, rewritings) that scored, after asserting that each did and that no neighbour's reference does."""
    rows = rewritings = 0
    before = "no such answer"
    for answer in gsm8k(full):
        solution = re.sub("<<[^<>]*>>", "", answer)
        reference = answer.rpartition("####")[2].strip()
        example = EXAMPLE | {"answer": reference}
        check_example(example, read_answer)
        assert accuracy_any(solution, example) == 1.0 and accuracy(solution, example) == 0.0, answer
        completion = tagged(reference, solution)
        assert accuracy(completion, example) == accuracy_any(completion, example) == 1.0, answer
        n = reference.replace(",", "")
        for form in HARMLESS:
            text = form.format(n=n, c=f"{int(n):,}")
            completion = tagged(text, solution)
            assert accuracy(completion, example) == accuracy_any(completion, example) == 1.0, (text, answer)
            rewritings += 1
        if before.replace(",", "") != n:
            assert scores(before, reference) == (0.0, 0.0), (before, reference)
        rows, before = rows + 1, reference
    return rows, rewritings


def test_gsm8k_answers_score_in_their_solutions_and_in_harmless_rewritings():
    rows, rewritings = check_gsm8k(full=False)
    assert rows > 100 and rewritings == rows * len(HARMLESS)


@pytest.mark.full
def test_every_gsm8k_answer_scores():
    assert check_gsm8k(full=True)[0] == 1319 + 7473


# ---- Countdown ----

COUNTDOWN = EXAMPLE | {"nums": [2, 49, 1, 50], "target": 99, "answer": "99"}


def countdown(expression, nums, target):
    example = EXAMPLE | {"nums": nums, "target": target, "answer": str(target)}
    score = accuracy(tagged(expression), example)
    assert accuracy_any(tagged(expression), example) == accuracy_any(expression, example) == score
    assert rewards.accuracy(tagged(expression), example) <= score  # without a reader of LaTeX
    return score


@pytest.mark.parametrize("expression, nums, target", [
    ("50 + 48", [50, 48], 98), ("48+50", [50, 48], 98), ("50 + 48 = 98", [50, 48], 98), ("(50 + 48)", [50, 48], 98),
    ("(50 - 1) * 2", [2, 1, 50], 98), ("(50 - 1) × 2", [2, 1, 50], 98), (r"(50 - 1) \times 2 = 98", [2, 1, 50], 98),
    (r"$(50 - 1) \cdot 2$", [2, 1, 50], 98), ("6 / 3", [3, 6], 2), ("6 ÷ 3", [3, 6], 2), (r"6 \div 3", [3, 6], 2),
    ("1/2*4", [1, 2, 4], 2), ("8/(3-8/3)", [3, 3, 8, 8], 24), ("(1+5)*4", [1, 4, 5], 24), ("-1 + 5", [1, 5], 4),
    ("3 - -5", [3, 5], 8), ("-(1 - 5)", [1, 5], 4), (r"\boxed{50 + 48}", [50, 48], 98),
    (r"\boxed{50 + 48 = 98}", [50, 48], 98), ("7", [7], 7), ("((3)) * 3", [3, 3], 9), ("2 - 5", [2, 5], -3),
    (r"\left(50 - 1\right) * 2", [2, 1, 50], 98), ("The answer is 50 + 48.", [50, 48], 98), ("50−1", [50, 1], 49),
    ("5 - 5 + 3", [5, 5, 3], 3)])
def test_an_expression_of_each_number_once_makes_the_target(expression, nums, target):
    assert countdown(expression, nums, target) == 1.0


@pytest.mark.parametrize("expression, nums, target", [
    ("98", [50, 48], 98), ("98 = 98", [50, 48], 98), ("= 98", [50, 48], 98), ("50 + 48 = 99", [50, 48], 98),
    ("50 + 47", [50, 47], 98), ("50 + 48", [50, 48, 1], 98), ("50 + 48 + 1 - 1", [50, 48], 98),
    ("50 + 48 + 0", [50, 48], 98), ("49 + 49", [50, 48], 98), ("50 + 50 - 2", [50, 2], 98), ("50 + 48", [50, 48], 99),
    ("50 + 48 = 98 = 98", [50, 48], 98), ("98 = 50 + 48", [50, 48], 98), ("1 2", [1, 2], 12), ("12", [1, 2], 12),
    ("1{}2", [1, 2], 12), ("(1)(2)", [1, 2], 2), ("2(3)", [2, 3], 6), ("(2)3", [2, 3], 6), ("2^3", [2, 3], 8),
    ("2**3", [2, 3], 8), ("2//3", [2, 3], 0), ("7 % 4", [7, 4], 3), ("5%4", [5, 4], 1), ("5!", [5], 120), ("√9", [9],
    3), (r"\sqrt{9}", [9], 3), (r"\sqrt 9 + 1", [9, 1], 4), ("1.5 * 2", [1, 5, 2], 3), ("0.5", [5], 0), ("5e1", [5, 1],
    50), ("1/0", [1, 0], 1), ("5 + (3", [5, 3], 8), ("5 + 3)", [5, 3], 8), ("5 +", [5], 5), ("+ 5", [5], 5),
    ("5 3 +", [5, 3], 8), ("5 + 3 or 5 * 3", [5, 3], 8), ("5 + 3, 5 - 3", [5, 3], 8), ("50 + 48 is 98", [50, 48], 98),
    ("x = 50 + 48", [50, 48], 98), ("５ + 3", [5, 3], 8), ("5\u200b + 3", [5, 3], 8), ("05 + 3", [5, 3], 8),
    ("1_0 + 3", [10, 3], 13), ("1,000 + 3", [1000, 3], 1003), ("5 + 3 # 9", [5, 3], 8), ("5 + 3; 8", [5, 3], 8),
    ("__import__('os').system('touch PWNED')", [5, 3], 8), ("(lambda: 8)()", [8], 8), ("sum([5,3])", [5, 3], 8),
    ("5 if 3 else 8", [5, 3], 5), ("5 + 3 == 8", [5, 3], 8), ("8 and 5 + 3", [8, 5, 3], 8), ("5|3", [5, 3], 7),
    ("5 @ 3", [5, 3], 15), ("5 << 3", [5, 3], 40), ("~5", [5], -6), ("'5' + '3'", [5, 3], 8), ("5j + 3", [5, 3], 8),
    ("int('5')+3", [5, 3], 8), (r"\boxed{5 + 3} \boxed{8}", [5, 3], 8), ("", [5], 5), (r"1\frac{1}{2}", [1, 1, 2], 1),
    ("1 1/2 * 2", [1, 1, 2, 2], 3), ("9" * 400, [9], 9), ("(" * 500 + "5" + ")" * 500, [5], 5), ("5 - 3", [5, 3], -2)])
def test_whatever_else_makes_the_target_scores_nothing(expression, nums, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert countdown(expression, nums, target) == 0.0
    assert not list(tmp_path.iterdir())


def test_a_countdown_answer_wants_the_form_in_training_and_the_answer_block_in_both():
    assert accuracy("50 + 49", COUNTDOWN) == 0.0
    example = COUNTDOWN | {"nums": [50, 49]}
    assert accuracy("thinking\n50 + 49", example) == 0.0 and accuracy_any("thinking\n50 + 49", example) == 1.0
    assert accuracy_any(tagged("no idea", "50 + 49"), example) == accuracy_any("50 + 49\nno idea", example) == 0.0
    assert accuracy(tagged("50 + 49"), example | {"kind": "general"}) == 0.0


def test_countdown_agrees_with_pythons_own_arithmetic():
    rng, right = random.Random(0), 0
    for _ in range(500):
        nums = [rng.randint(1, 60) for _ in range(4)]
        a, b, c = rng.choices("+-*/", k=3)
        text = rng.choice(["{}{}{}{}{}{}{}", "({}{}{}){}({}{}{})", "{}{}({}{}({}{}{}))"]).format(nums[0], a, nums[1], b,
            nums[2], c, nums[3])
        try:
            expected = eval(re.sub(r"\d+", r"Fraction(\g<0>)", text))
        except ZeroDivisionError:
            expected = None
        try:
            value = rewards.calculate(ast.parse(text, mode="eval").body)
        except ZeroDivisionError:
            value = None
        assert value == expected
        if expected is not None and expected.denominator == 1:
            right += countdown(text, nums, int(expected)) == 1.0
            assert countdown(text, nums, int(expected) + 1) == 0.0
    assert right > 100


@pytest.mark.parametrize("change, field", [
    ({"nums": []}, "nums"), ({"nums": "50"}, "nums"), ({"nums": [0, 1]}, "nums"), ({"nums": [-1]}, "nums"),
    ({"nums": [1.5]}, "nums"), ({"nums": [True]}, "nums"), ({"nums": None}, "nums"), ({"target": "99"}, "target"),
    ({"target": 1.5}, "target"), ({"target": None}, "target")])
def test_a_countdown_example_out_of_range_is_refused_by_its_field(change, field):
    check_example(COUNTDOWN, read_answer)
    with pytest.raises(ValueError, match=f"^{field}"):
        check_example(COUNTDOWN | change, read_answer)


@pytest.mark.parametrize("missing", ["nums", "target"])
def test_a_countdown_example_has_both_fields(missing):
    with pytest.raises(ValueError, match="target"):
        check_example({key: value for key, value in COUNTDOWN.items() if key != missing}, read_answer)


# ---- together ----

def test_the_lenient_accuracy_is_a_reward_to_train_on():
    example = EXAMPLE | {"answer": r"\frac{1}{2}"}
    for text in (r"so \boxed{\frac12}", tagged("0.5"), "it is 0.5"):
        assert RULES["accuracy_any"](text, example) == 1.0
    assert RULES["accuracy"](r"\boxed{\frac12}", example) == 0.0  # which asks for the tags


def test_equal_answers_are_one_vote_in_a_majority():
    votes = [final_answer(text) for text in (tagged(r"\frac12"), r"so \boxed{0.5}", tagged("1/2"),
        "<think>a</think>$50\\%$")]
    assert set(votes) == {Fraction(1, 2)}
    assert len({final_answer(tagged(text)) for text in (r"\sqrt{8}", r"2\sqrt2", "2√2")}) == 1

"""Strings that no one would write, for every rule: none raises, none is slow, none earns a right answer's reward."""

import random
import time

import pytest

import rewards
from data import exact_numbers, math_answers

REFERENCE = "718281828459"  # no fragment holds it, so nothing that is made of them is right
FRAGMENTS = [
    *rewards.TAGS, "<think", "</", "<answer >", "<THINK>", "\\boxed{", "\\fbox{", "}", "{", "\\frac{1}{2}", "\\frac",
    "\\sqrt{", "\\text{", "$", "\\(", "\\)", "^", "_", "1", "7", "42", "3.14", ".", ",", "1,234", "12:30", "1e9",
    "9" * 40, "9^9^9^9", "\\sqrt{10^{100}}", "((((", "))))", "[", "]", "+", "-", "*", "/", "=", "!=", "×", "−", "%",
    "percent", "half of ", "not ", "minus ", "the answer is ", "So ", "答案是", "苹果", "一百二十", "分之", "负", "or",
    "and", "x", "π", "√", "∞", "\u200b", "\u202e", "\x00", "\ud7ff", "🍎", "５", "٥", "½", "²", " ", "\n", "\t",
    "\u3000", "\u2028", "sorry", "I cannot help", "knife", "k-n-i-f-e", "Paris", "not Paris", "**", "#### ",
    "\\begin{pmatrix}", "\\infty", "\\pm", "\\cup", "a" * 50]
EXAMPLES = [
    {"kind": "reasoning", "language": "en", "answer": REFERENCE, "prompt": "What is it?"},
    {"kind": "reasoning", "language": "zh", "answer": r"\frac{718281828459}{\sqrt{7}}", "prompt": "是什么？"},
    {"kind": "reasoning", "language": "en", "answer": REFERENCE, "nums": [718281, 828459], "target": int(REFERENCE),
     "prompt": "Make it."},
    {"kind": "general", "language": "en", "answer": "Reykjavik", "wrong": ["Paris"],
     "prompt": "What is the capital of Iceland?"},
    {"kind": "safety", "language": "en", "answer": "knife", "harmful": True, "prompt": "How do I cut the teacher?"}]

MATH = rewards.rules_with(**math_answers.READERS)
RULES = {**MATH, "numbers": rewards.accuracy, "numbers_any": rewards.accuracy_any}
MUST_BE_RIGHT = ("accuracy", "accuracy_any", "numbers", "numbers_any", "helpfulness")


def forget():
    """Empties what is remembered of earlier calls."""
    exact_numbers.exact_value.cache_clear()
    exact_numbers.squarefree.cache_clear()


def timed(rule, text, example):
    """(score, seconds of this process)"""
    forget()
    started = time.process_time()
    return rule(text, example), time.process_time() - started


def strings(count, rng):
    for number in range(count):
        if number % 100 == 99:  # up to 100 kB
            text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 6))) * rng.randrange(1, 4000)
            yield rng.choice(["", "<think>x</think><answer>"]) + text[:100_000] + rng.choice(["", "</answer>"])
        else:
            text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(0, 30)))
            yield rng.choice([text, f"<think>{text}</think><answer>{text}</answer>",
                              f"<think>so</think><answer>{text}</answer>"])


def fuzz(count, seed):
    """(slowest call in seconds, the highest reward for an answer that is wrong)"""
    slowest, highest = 0.0, 0.0
    for number, text in enumerate(strings(count, random.Random(seed))):
        example = EXAMPLES[number % len(EXAMPLES)]
        for name, rule in RULES.items():
            score, took = timed(rule, text, example)
            if took > slowest:  # or was something else under way?
                again = [timed(rule, text, example)[1] for _ in range(2)]
                slowest = max(slowest, min(took, *again))
            assert 0 <= score <= 1, (name, text)
            if name in MUST_BE_RIGHT:
                highest = max(highest, score)
    return slowest, highest


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.full)])
def test_no_string_raises_takes_long_or_earns_the_reward_of_a_right_answer(count):
    slowest, highest = fuzz(count, seed=count)
    print(f"{count} strings, slowest call {1000 * slowest:.1f} ms, highest reward for a wrong answer {highest}")
    assert highest == 0 and slowest < 0.05  # 10 ms on a quiet machine


HARD = [  # written against the rules: each once raised, or took from 20 to 400 ms
    "1024^-99%", "." + "0" * 297 + "1%", "\\fbox" * 399 + "5",
    "\n".join("\\boxed{x=" + "9^99," * 16 + f"{i}?}}" for i in range(20)),
    "\n".join("\\boxed{x=" + "(1+√2+√3+√6)^5," * 5 + f"{i}?}}" for i in range(20)),
    "\n".join("\\boxed{x=" + "±√999983," * 9 + f"{i}?}}" for i in range(20)),
    "$x=" + "9^99," * 58 + "?$", "$x=" + "(1+√2+√3+√6)^5," * 19 + "?$", "$x=" + "±√999983," * 32 + "?$",
    "\\! " + "m" * 1970 + " 5", "π^99" * 60, "(" + "," * 1980 + " ab 5",
    "\\!(" + "," * 1400 + " " + "m" * 500 + " ab 5", "$x=" + ",".join(f"√{999983 - i}" for i in range(30)) + "?$",
    ",".join(f"({i}+√2+√3+√6)^5" for i in range(16)), "9^" * 99 + "9", "(" * 60 + "5" + ")" * 60, "-" * 60 + "5",
    "5 a " + "=" * 900 + "," * 900, "5 a" + "(b " * 600, "answer" + "*" * 1900 + ":", "3:" * 900, "5 " + "m/s " * 450,
    "\\frac" * 48 + "12", "1+" * 149 + "1", "(1+" * 50 + "1" + ")" * 50, "1" * 300]


@pytest.mark.parametrize("text", HARD, ids=lambda text: ascii(text[:12]))
def test_what_was_written_to_break_the_rules_is_scored_at_once(text):
    def scores(completion, example, depth=400):  # a trainer's own calls lie below
        if depth:
            return scores(completion, example, depth - 1)
        return {name: rule(completion, example) for name, rule in RULES.items()}

    slowest = 0.0
    for completion in (text, f"<think>so</think><answer>{text}</answer>"):
        for example in EXAMPLES:
            took = []
            for _ in range(3):
                forget()
                started = time.process_time()
                results = scores(completion, example)
                took.append(time.process_time() - started)
            assert max(results[name] for name in MUST_BE_RIGHT) == 0
            slowest = max(slowest, min(took))
    print(f"{1000 * slowest:.1f} ms for all rules together")
    assert slowest < 0.1  # on a quiet machine 11 ms at most


def test_the_fuzzer_would_see_a_right_answer():
    for name in ("accuracy", "accuracy_any", "numbers", "numbers_any"):
        assert RULES[name](f"<think>so</think><answer>{REFERENCE}</answer>", EXAMPLES[0]) == 1
    assert rewards.helpfulness("<answer>It is Reykjavik.</answer>", EXAMPLES[3]) == 1

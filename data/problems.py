r"""Problem sets as they are published, and rows for SFT: JSONL, JSON or CSV, with one clear line for what is wrong.

One real row of each format, told by its fields (data/forms.py has others, with messages or other names):

    {"question": "Natalia sold clips to 48 of her friends in April, ...", "answer": "... 48+24 = <<48+24=72>>72 clips
     altogether in April and May.\n#### 72"}                                                       GSM8K
    {"problem": "Compute $\\sin 60^\\circ$.", "solution": "... we have
     $\\sin 60^\\circ = \\boxed{\\frac{\\sqrt{3}}{2}}$."}                                            MATH
    {"nums": [44, 19, 35], "target": 98}                                                          Countdown
    {"prompt": "What is 17 + 25?", "answer": "42"}                               any other set; 42 and 42.0 do too
    {"prompt": "天空是什么颜色？", "answer": "蓝色", "language": "zh", "kind": "general"}             the mini-world
    {"prompt": "What is 17 + 25?", "completion": "<think>...</think><answer>42</answer>"}         SFT
"""

import json
import math
import re
from decimal import Decimal

from data.forms import numbered_rows, prompt_and_completion, usual_fields
from data.math_answers import last_box

COUNTDOWN = ("Using the numbers {nums}, each exactly once, with +, -, * and / and with parentheses where they are "
             "needed, write an expression that equals {target}. The answer is the expression alone.")
CHINESE = re.compile("[\u4e00-\u9fff]")


class NoAnswer(ValueError):
    """A row of a known format without an answer to compare with."""


def read_rows(path, fields=()):
    """All rows of a file, as rows for SFT. With `fields`, each must be an object that holds text under these names.

    Of a conversation the first question and answer are taken. Raises ValueError with file and line.
    """
    rows, conversations = [], 0
    for number, row in numbered_rows(path):
        try:
            row, later = prompt_and_completion(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        conversations += later > 0
        for name in fields:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise ValueError(f"{path}:{number}: no text under {name!r}")
        rows.append(row)
    if conversations:
        print(f"{path}: {conversations} of {len(rows)} conversations have later turns: not learned", flush=True)
    return rows


def read_problems(path, check, prompt_field=None, answer_field=None):
    """A problem set as examples for reinforcement learning and evaluation.

    check(example) raises ValueError for a row that is no example, which refuses the file, and NoAnswer for one without
    an answer, which is left out and counted. prompt_field, answer_field: the names of the two, in place of those that
    the formats above have.
    """
    examples, unanswered = [], []
    for number, row in numbered_rows(path):
        try:
            example = as_example(row, prompt_field, answer_field)
            check(example)
        except NoAnswer as error:
            unanswered.append(f"{path}:{number}: {error}")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        else:
            examples.append(example)
    if not examples:
        raise ValueError(unanswered[0])
    if unanswered:
        print(f"{path}: {len(unanswered)} of {len(examples) + len(unanswered)} rows have no answer: left out. "
              f"The first is {unanswered[0]}", flush=True)
    return examples


def as_example(row, prompt_field=None, answer_field=None):
    """A row of any of the formats above as {"prompt", "answer", "language", "kind", ...}. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("a row must be an object")
    row = usual_fields(row, prompt_field, answer_field)
    if "answer" in row:
        row = row | {"answer": answer_text(row["answer"])}
    if "nums" in row and "target" in row:
        example = countdown(row)
    elif text(row, "question") and "####" in text(row, "answer"):
        example = {"prompt": row["question"], "answer": row["answer"].rpartition("####")[2].strip()}
    elif text(row, "problem") and text(row, "solution"):
        example = {"prompt": row["problem"], "answer": text(row, "answer") or boxed_answer(row["solution"])}
    else:
        prompt = text(row, "prompt") or text(row, "question") or text(row, "problem")
        if not prompt or "answer" not in row:
            names = ", ".join(map(str, row))
            raise ValueError(f"fields {names} are of no problem set known here: expected the texts prompt and answer "
                             "(or question and answer, or problem and solution), or nums and target; else name the two "
                             "with --prompt-field and --answer-field")
        example = row | {"prompt": prompt}
    mostly_chinese = len(CHINESE.findall(json.dumps(row, ensure_ascii=False))) > 5
    example["language"] = row.get("language", "zh" if mostly_chinese else "en")
    example["kind"] = row.get("kind", "reasoning")
    return example


def answer_text(value):
    """A number under "answer" as its digits: 27 and 27.0 are 27, 1e21 has no exponent; nothing (null, NaN) is ""."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value in (math.inf, -math.inf):
        raise ValueError(f"answer {value!r} is neither a text nor a number")
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else format(Decimal(f"{value:.15g}"), "f")
    return str(value)


def text(row, name):
    """The text under a name; "" where there is something else or nothing."""
    value = row.get(name)
    return value if isinstance(value, str) else ""


def countdown(row):
    prompt = text(row, "prompt") or COUNTDOWN.format(nums=row["nums"], target=row["target"])
    return {"prompt": prompt, "answer": str(row["target"]), "nums": row["nums"], "target": row["target"]}


def boxed_answer(solution):
    """What the last box of a MATH solution holds, as MATH's own reader takes it."""
    answer = last_box(solution)
    if answer is None:
        raise NoAnswer(r"the solution holds no \boxed{} answer")
    return answer

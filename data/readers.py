"""Readers of JSONL files: rows for SFT, and problem sets as they are published; what is wrong is named with its line.

    {"prompt": "Tom has 47 apples. Tom buys 38 more. How many now?", "completion": "<think>..."}                    SFT
    {"question": "Natalia sold clips ...", "answer": "Natalia sold 48/2 = 24 clips in May. ...\\n#### 72"}            GSM8K
    {"problem": "Compute $\\\\sin 60^\\\\circ$.", "solution": "... the answer is $\\\\boxed{\\\\frac{\\\\sqrt{3}}{2}}$."}   MATH
    {"nums": [44, 19, 35], "target": 98}                                                                           Countdown
    {"prompt": "What is 17 + 25?", "answer": "42"}                                                                 any other
    {"prompt": "天空是什么颜色？", "answer": "蓝色", "language": "zh", "kind": "general"}                              ours
"""

import json
import re
from pathlib import Path

COUNTDOWN = ("Using the numbers {nums}, each exactly once, with +, -, * and / and with parentheses where they are needed, write an "
             "expression that equals {target}. The answer is the expression alone.")


def read_rows(path, fields=()):
    """All rows of a JSONL file; each must be an object with these fields as strings. Raises ValueError with file and line."""
    return [row for _, row in numbered_rows(path, fields)]


def numbered_rows(path, fields=()):
    rows = []
    for number, line in enumerate(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):  # without a byte order mark
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate could not be written again
        except (ValueError, RecursionError):
            raise ValueError(f"{path}:{number}: not JSON in UTF-8") from None
        for name in fields:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise ValueError(f"{path}:{number}: no text under {name!r}")
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def read_problems(path, check):
    """A problem set as examples for reinforcement learning and evaluation, its format told by its fields.

    check(example) raises ValueError where no rule could read the reference answer.
    """
    examples = []
    for number, row in numbered_rows(path):
        try:
            example = as_example(row)
            check(example)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        examples.append(example)
    return examples


def as_example(row):
    """{"prompt", "answer", "language", "kind", ...} of a row of any of the formats above. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("a row must be an object")
    chinese = len(re.findall("[\u4e00-\u9fff]", json.dumps(row, ensure_ascii=False))) > 5
    english = {"language": row.get("language", "zh" if chinese else "en"), "kind": row.get("kind", "reasoning")}
    text = lambda name: row[name] if isinstance(row.get(name), str) else ""
    if {"nums", "target"} <= row.keys():
        prompt = text("prompt") or COUNTDOWN.format(nums=row["nums"], target=row["target"])
        return {"prompt": prompt, "answer": str(row["target"]), **english, "nums": row["nums"], "target": row["target"]}
    if text("question") and "####" in text("answer"):
        return {"prompt": text("question"), "answer": text("answer").rpartition("####")[2].strip(), **english}
    if text("problem") and text("solution"):
        import rewards
        boxes = [braced or bare for braced, bare in rewards.BOX.findall(text("solution"))]
        if not (text("answer") or boxes):
            raise ValueError(r"the solution holds no \boxed{} answer")
        return {"prompt": text("problem"), "answer": text("answer") or boxes[-1], **english}  # the last, as MATH's own reader
    prompt = text("prompt") or text("question") or text("problem")
    if not prompt or not text("answer"):
        raise ValueError(f"fields {', '.join(map(str, row))} are of no problem set known here: texts prompt and answer (or question and "
                         "answer, problem and solution), or nums and target")
    return {**row, "prompt": prompt, **english}

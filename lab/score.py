"""Scores completions with the rules of rewards.py and prints each reward's mean by kind.

    python -m lab.score FILE.jsonl         # rows: an example and its "completion"
"""
import argparse
import json

import rewards
from data.math_answers import READERS, read_both
from lab.check_input import KINDS, check_example
from lab.asking import opened_by


def read_scored_rows(lines):
    """The rows of a JSONL file. Raises ValueError with the line."""
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
                raise ValueError("a row is an object with a string 'completion'")
            check_example(row, read_both)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        opened = opened_by("{prompt}", row["prompt"])  # counts as written
        if not row["completion"].lstrip().startswith("<think>"):
            row["completion"] = opened + row["completion"]
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.score", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="JSONL; a row is an example and its completion")
    path = parser.parse_args().file
    try:
        with open(path, encoding="utf-8") as lines:
            rows = read_scored_rows(lines)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{path}: {error}\n")
    rules = rewards.rules_with(**READERS)
    for kind in KINDS:
        scored = [row for row in rows if row.get("kind", "reasoning") == kind]
        if not scored:
            continue
        means = []
        for name, rule in rules.items():
            total = sum(rule(row["completion"], row) for row in scored)
            means.append(f"{name} {total / len(scored):.3f}")
        print(f"{kind} ({len(scored)}):", ", ".join(means))


if __name__ == "__main__":
    main()

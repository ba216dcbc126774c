"""Readers of JSONL files of examples: each row is checked, and what is wrong is named with its line.

    {"prompt": "Tom has 47 apples. Tom buys 38 more. How many apples does Tom have now?", "completion": "<think>..."}
    {"prompt": "天空是什么颜色？", "answer": "蓝色", "language": "zh", "kind": "general"}
"""

import json
from pathlib import Path


def read_rows(path, fields):
    """All rows of a JSONL file; each must be an object with these fields as strings. Raises ValueError with file and line."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}:{number}: not JSON") from None
        for name in fields:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise ValueError(f"{path}:{number}: no text under {name!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def read_problems(path, check):
    """Rows for reinforcement learning and evaluation; check(row) raises ValueError where no rule could read the reference."""
    rows = read_rows(path, ("prompt", "answer", "language", "kind"))
    lines = [n for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    for number, row in zip(lines, rows):
        try:
            check(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return rows


def new_directory(path):
    """Path of an output directory that holds no model yet: nothing is overwritten."""
    if (Path(path) / "config.json").exists():
        raise ValueError(f"{path} already holds a model; choose another --out")
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)

"""Sums and differences of two-digit numbers as a problem set: small enough for a small pretrained model on a CPU.

    python data/arithmetic.py 1000 --seed 0 > train.jsonl      # {"prompt": "What is 47 + 38?", "answer": "85"}
    python data/arithmetic.py 300 --seed 0 --test > test.jsonl # pairs of numbers that no training set has
    python data/arithmetic.py 200 --seed 1 --chains > sft.jsonl  # {"prompt": ..., "completion": "<think>47+38: 40+30=70, ..."}
"""

import argparse
import json
import random
import sys


def problems(count, seed, test=False):
    """A fifth of all (a, b) belong to the test, the same for every seed; a - b is never negative. Raises ValueError if there are fewer."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    held_out = len(pairs) // 5
    chosen = [(a, op, b) for a, b in (pairs[:held_out] if test else pairs[held_out:]) for op in "+-" if op == "+" or a >= b]
    if not 0 < count <= len(chosen):
        raise ValueError(f"{count} problems are wanted, there are 1 to {len(chosen)}")
    random.Random(seed).shuffle(chosen)
    return [{"prompt": f"What is {a} {op} {b}?", "answer": str(a + b if op == "+" else a - b)} for a, op, b in chosen[:count]]


def chain(a, op, b):
    """Tens, ones, and both together: "47+38: 40+30=70, 7+8=15, 70+15=85"."""
    tens, ones = (a // 10 * 10, b // 10 * 10), (a % 10, b % 10)
    sign = 1 if op == "+" else -1
    left, right = tens[0] + sign * tens[1], ones[0] + sign * ones[1]
    last = f"{left}+{right}" if right >= 0 else f"{left}-{-right}"
    return f"{a}{op}{b}: {tens[0]}{op}{tens[1]}={left}, {ones[0]}{op}{ones[1]}={right}, {last}={left + right}"


def with_chain(problem):
    a, op, b = problem["prompt"].removeprefix("What is ").removesuffix("?").split()
    thinking = chain(int(a), op, int(b))
    return {"prompt": problem["prompt"], "completion": f"<think>{thinking}</think><answer>{problem['answer']}</answer>"}


def main():
    parser = argparse.ArgumentParser(description="Write a problem set of sums and differences to standard output.")
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="of the held-out pairs")
    parser.add_argument("--chains", action="store_true", help="completions with worked steps, for SFT")
    args = parser.parse_args()
    try:
        rows = problems(args.count, args.seed, args.test)
        sys.stdout.writelines(json.dumps(with_chain(row) if args.chains else row) + "\n" for row in rows)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()

"""Sums and differences of two-digit numbers as a problem set: small enough for a small pretrained model on a CPU.

    {"prompt": "What is 47 + 38?", "answer": "85"}
    {"prompt": "What is 47 + 38?", "completion": "<think>47+38: 40+30=70, 7+8=15, 70+15=85</think><answer>85</answer>"}

    python data/arithmetic.py 1000 --seed 0 > train.jsonl        # problems
    python data/arithmetic.py 300 --seed 0 --test > test.jsonl   # problems on pairs of numbers that no training set has
    python data/arithmetic.py 200 --seed 1 --chains > sft.jsonl  # problems with a worked solution, for SFT
"""

import argparse
import json
import random


def problems(count, seed, test=False):
    """`count` problems, for training or from the test's pairs of numbers; a - b is never negative.

    A fifth of all pairs belong to the test, the same ones for every seed. Raises ValueError if there are too few.
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    held_out = len(pairs) // 5
    pairs = pairs[:held_out] if test else pairs[held_out:]
    tasks = []
    for a, b in pairs:
        tasks.append((a, "+", b))
        if a >= b:
            tasks.append((a, "-", b))
    if not 0 < count <= len(tasks):
        raise ValueError(f"{count} problems requested, there are 1 to {len(tasks)}")
    random.Random(seed).shuffle(tasks)
    rows = []
    for a, op, b in tasks[:count]:
        answer = a + b if op == "+" else a - b
        rows.append({"prompt": f"What is {a} {op} {b}?", "answer": str(answer)})
    return rows


def chain(a, op, b):
    """Tens, ones, then both together: "47+38: 40+30=70, 7+8=15, 70+15=85"."""
    a_tens, a_ones = a // 10 * 10, a % 10
    b_tens, b_ones = b // 10 * 10, b % 10
    sign = 1 if op == "+" else -1
    tens, ones = a_tens + sign * b_tens, a_ones + sign * b_ones
    last = f"{tens}+{ones}" if ones >= 0 else f"{tens}-{-ones}"
    return f"{a}{op}{b}: {a_tens}{op}{b_tens}={tens}, {a_ones}{op}{b_ones}={ones}, {last}={tens + ones}"


def with_chain(problem):
    a, op, b = problem["prompt"].removeprefix("What is ").removesuffix("?").split()
    thinking = chain(int(a), op, int(b))
    return {"prompt": problem["prompt"], "completion": f"<think>{thinking}</think><answer>{problem['answer']}</answer>"}


def main():
    parser = argparse.ArgumentParser(description="Write a problem set of sums and differences to standard output.")
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="use the held-out pairs of numbers")
    parser.add_argument("--chains", action="store_true", help="write completions with worked steps, for SFT")
    args = parser.parse_args()
    try:
        rows = problems(args.count, args.seed, args.test)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for row in rows:
        print(json.dumps(with_chain(row) if args.chains else row))


if __name__ == "__main__":
    main()

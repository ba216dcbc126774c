"""Rejection sampling, and distillation: a student trained on a teacher's verified traces.

Rejection sampling [R1 v1 2.3.3, v2 B.3.3]: many samples a prompt; the correct, one-language, readable, distinct ones
stay. Their rows train SFT-2 (from the base again) and the students [v2 B.4.3], both by plain SFT:

  1. sample n completions of each prompt from the teacher
  2. a completion falls to the first filter that it does not pass; those that pass all, distinct, at most `keep` a prompt
  3. mix with general examples, 3 : 1 [R1: 600k : 200k]
  4. next-token training on the completions

    python distill.py --teacher DIR --student DIR --data FILE.jsonl --out DIR
"""

import argparse
import random
import re

FILTERS = ("correct", "one_language", "readable", "distinct", "enough")  # in this order


def repeats(text, size=12, times=3):
    """Whether some run of `size` characters without a digit's change stands `times` times in a row: a loop."""
    return re.search(rf"(.{{{size},{4 * size}}}?)\1{{{times - 1}}}", text[:4000], re.DOTALL) is not None


def readable(completion, longest=1000):
    """A length that a person reads, no code block, no loop [R1 v2 B.3.3: no long paragraphs, no code blocks]."""
    return len(completion) <= longest and "```" not in completion and not repeats(completion)


def rejection_sample(examples, texts, correct, one_language, keep=4, readable=readable):
    """Choose among the teacher's completions texts[i][j] of examples[i].

    correct, one_language: (completion, example) -> whether it passes. keep: at most so many a prompt ("enough").
    Returns rows {"prompt", "completion", ...the example's fields} and counts: how many were sampled, fell to each
    filter, and were kept.
    """
    counts = {"sampled": 0} | {name: 0 for name in FILTERS} | {"kept": 0}
    rows = []
    for example, completions in zip(examples, texts):
        kept = set()
        for text in completions:
            counts["sampled"] += 1
            checks = {"correct": lambda: correct(text, example), "one_language": lambda: one_language(text, example),
                      "readable": lambda: readable(text), "distinct": lambda: " ".join(text.split()) not in kept,
                      "enough": lambda: len(kept) < keep}
            fell_to = next((name for name in FILTERS if not checks[name]()), "kept")
            counts[fell_to] += 1
            if fell_to == "kept":
                kept.add(" ".join(text.split()))
                rows.append({**example, "completion": text})
    return rows, counts


def mix(traces, general, ratio=3, seed=0):
    """Traces and general examples, `ratio` to 1, shuffled; the general ones are reused or left over as the ratio asks."""
    if not traces or not general:
        raise ValueError(f"{len(traces)} traces and {len(general)} general examples: there must be some of both")
    wanted, rng = round(len(traces) / ratio), random.Random(seed)
    rows = traces + (general * (wanted // len(general) + 1))[:wanted]
    rng.shuffle(rows)
    return rows


def distill(student, traces, general, encode, train, ratio=3, seed=0):
    """Train `student` in place on the mixture, by SFT only, as R1 does.

    encode(row) -> (ids, prompt_length); train(model, examples) runs the training. Returns what train returns.
    """
    return train(student, [encode(row) for row in mix(traces, general, ratio, seed)])

"""Measuring a model: pass@1, pass@k, maj@k, length, format, language, accuracy under thinking budgets.

As R1 evaluates [v1 3]: k samples a problem at T 0.6 and top-p 0.95, pass@1 = mean correctness; greedy decoding is
avoided. Every figure is a mean over problems, with a 95% bootstrap interval over problems; a comparison of two
models on the same problems is a paired bootstrap.

    python evaluate.py --model DIR --data FILE.jsonl     # a problem set (data/problems.py)
"""

from collections import Counter
from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass
class EvalConfig:
    samples: int = 8            # R1: 64 for AIME
    temperature: float = 0.6    # R1: 0.6
    top_p: float = 0.95         # R1: 0.95
    max_new_tokens: int = 200
    batch_rows: int = 512       # completions sampled at once
    seed: int = 0


def pass_at_k(n, c, k):
    """The chance that k of n samples, c of them correct, hold a correct one: 1 - C(n-c, k) / C(n, k), unbiased."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} correct among {n} samples")
    return 1 - comb(n - c, k) / comb(n, k)


def majority_at_k(answers, reference, k):
    """The chance that a vote of k samples finds the reference: the mean over disjoint sets of k among `answers`.

    An unreadable answer (None) does not vote; in a tie each of the tied answers has an equal chance.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} of {len(answers)} samples")
    starts = range(0, len(answers) - k + 1, k)
    return sum(vote(answers[i:i + k], reference) for i in starts) / len(starts)


def vote(answers, reference):
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    best = [answer for answer, count in votes.items() if count == most]
    return (reference in best) / len(best) if best else 0.0


def bootstrap(values, draws=2000, seed=0):
    """Mean and 95% interval over problems: values (N,), NaN where a problem has none."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return float("nan"), float("nan"), float("nan")
    means = values[np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def paired_bootstrap(a, b, draws=2000, seed=0):
    """mean(b) - mean(a) over the same problems, with its 95% interval. A mean leaves out problems without a value."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} problems cannot be paired")
    if np.isnan(a).all() or np.isnan(b).all():
        return float("nan"), float("nan"), float("nan")
    rows = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    empty = np.isnan(a[rows]).all(axis=1) | np.isnan(b[rows]).all(axis=1)  # draws of problems without any value
    rows = rows[~empty]
    differences = np.nanmean(b[rows], axis=1) - np.nanmean(a[rows], axis=1)
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    return float(np.nanmean(b) - np.nanmean(a)), float(low), float(high)


def complete(prompts, generate, decode, config, done=(), log=None):
    """config.samples completions of each prompt (lists of ids): texts (N lists of n) and token counts (N, n).

    log(row) gets each batch of prompts as it is done, {"step", "texts", "counts"}; `done` are such rows of an earlier
    call, which are not sampled again.
    """
    n = config.samples
    texts, counts = [None] * len(prompts), np.zeros((len(prompts), n), dtype=int)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    size = max(1, config.batch_rows // n)
    for step, at in enumerate(range(0, len(order), size), 1):
        batch = order[at:at + size]
        if step <= len(done):
            row = done[step - 1]
        else:
            sampled, lengths = sample([prompts[i] for i in batch], generate, config, n, config.max_new_tokens)
            row = {"step": step, "texts": [decode(ids) for ids in sampled], "counts": lengths}
            if log is not None:
                log(row)
        for j, i in enumerate(batch):
            texts[i], counts[i] = row["texts"][j * n:(j + 1) * n], row["counts"][j * n:(j + 1) * n]
    return texts, counts


def sample(prompts, generate, config, n, max_new_tokens):
    """n completions of each prompt, as lists of ids without padding; and generate's count of their tokens."""
    ids, lengths, _ = generate(prompts, n=n, max_new_tokens=max_new_tokens, temperature=config.temperature,
                               top_p=config.top_p)
    lengths = lengths.tolist()
    return [row[:length] for row, length in zip(ids.tolist(), lengths)], lengths


def measure(examples, texts, counts, rules, final_answer, thinks, count_thinking, ks=()):
    """{metric: (N,) one value a problem, NaN where it does not apply} of the completions texts[i][j].

    rules: {name: (completion, example) -> float}, averaged over the samples; among them "accuracy", in the asked form,
    "accuracy_any", in any style, and "language_consistency". pass@k and maj@k go by any style;
    final_answer(completion, example) is what a completion votes for, None in doubt.
    """
    names = (*rules, "length", "thinks", "accuracy_any_if_thinking", "language_if_thinking", "length_if_thinking")
    values = {name: [] for name in names}
    is_problem = [example.get("kind", "reasoning") == "reasoning" for example in examples]
    votes = sorted(set(ks)) if any(is_problem) else []
    for k in votes:
        values[f"pass@{k}"], values[f"maj@{k}"] = [], []
    for example, completions, lengths in zip(examples, texts, counts):
        scores = {name: np.array([rule(text, example) for text in completions]) for name, rule in rules.items()}
        thought = np.array([bool(thinks(text)) for text in completions])
        thinking = np.array([count_thinking(text) for text in completions if thinks(text)])
        for name in rules:
            values[name].append(scores[name].mean())
        values["length"].append(lengths.mean())
        values["thinks"].append(thought.mean())
        values["accuracy_any_if_thinking"].append(mean_or_nan(scores["accuracy_any"][thought]))
        values["language_if_thinking"].append(mean_or_nan(scores["language_consistency"][thought]))
        values["length_if_thinking"].append(mean_or_nan(thinking))
        if votes:
            answers = [final_answer(text, example) for text in completions]
            reference = final_answer(example["answer"], example)
        for k in votes:
            values[f"pass@{k}"].append(pass_at_k(len(completions), int(scores["accuracy_any"].sum()), k))
            values[f"maj@{k}"].append(majority_at_k(answers, reference, k))
    return {name: np.asarray(column, dtype=float) for name, column in values.items()}


def mean_or_nan(values):
    return values.mean() if len(values) else np.nan


def summarise(values, groups=None):
    """{metric: [mean, low, high]} of the metrics with a value; groups {name: indices} adds "accuracy_any_<name>"."""
    summary = {name: list(bootstrap(v)) for name, v in values.items() if not np.isnan(v).all()}
    for name, rows in (groups or {}).items():
        if len(rows):
            summary[f"accuracy_any_{name}"] = list(bootstrap(values["accuracy_any"][rows]))
    return summary


def continue_from(beginnings, unfinished, prompts, generate, decode, config, new_tokens):
    """Texts as `complete` gives them, from beginnings of completions (lists of ids), config.samples per prompt in turn.

    Beginning r is continued by at most new_tokens where unfinished[r] is True; the others stay as they are.
    """
    n, texts = config.samples, [decode(ids) for ids in beginnings]
    contexts = [list(prompts[r // n]) + ids for r, ids in enumerate(beginnings)]
    rows = sorted((r for r in range(len(contexts)) if unfinished[r]), key=lambda r: len(contexts[r]))
    for at in range(0, len(rows), config.batch_rows):
        batch = rows[at:at + config.batch_rows]
        sampled, _ = sample([contexts[r] for r in batch], generate, config, 1, new_tokens)
        for r, ids in zip(batch, sampled):
            texts[r] = decode(beginnings[r] + ids)
    return [texts[i * n:(i + 1) * n] for i in range(len(prompts))]


def with_budgets(prompts, generate, decode, config, budgets, end_thinking, thinking_over):
    """{budget: completions whose thinking is cut after so many tokens} [s1, arXiv 2501.19393]; texts as in `complete`.

    The same completions are cut at each budget. One that still thinks then (thinking_over(text) is False) is continued
    after `end_thinking`, the ids that close the thinking and open the answer.
    """
    sampled, _ = sample(prompts, generate, config, config.samples, max(budgets) + 1)  # one more: did it end there?
    texts = {}
    for budget in budgets:
        unfinished = [len(ids) > budget for ids in sampled]
        beginnings = [ids[:budget] for ids in sampled]
        for r, ids in enumerate(beginnings):
            if unfinished[r] and not thinking_over(decode(ids)):
                beginnings[r] = ids + end_thinking
        texts[budget] = continue_from(beginnings, unfinished, prompts, generate, decode, config, new_tokens=40)
    return texts


def lengthened(prompts, generate, decode, config, end_thinking, wait):
    """Completions whose thinking may not end at once: its end token is replaced, one time, by the ids `wait` [s1]."""
    sampled, _ = sample(prompts, generate, config, config.samples, config.max_new_tokens)
    unfinished = [end_thinking in ids for ids in sampled]
    beginnings = list(sampled)
    for r, ids in enumerate(sampled):
        if unfinished[r]:
            beginnings[r] = ids[:ids.index(end_thinking)] + list(wait)
    return continue_from(beginnings, unfinished, prompts, generate, decode, config, config.max_new_tokens)


def main():
    from lab.scripts import measure_directory  # here, so that the rest imports without the project
    measure_directory(EvalConfig, complete, measure, summarise)


if __name__ == "__main__":
    main()

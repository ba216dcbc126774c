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
    """Unbiased pass@k from n samples, c correct: 1 - C(n-c, k) / C(n, k)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} correct among {n} samples")
    return 1 - comb(n - c, k) / comb(n, k)


def majority_at_k(answers, reference, k):
    """The chance that a vote of k samples finds the reference: the mean over disjoint sets of k among `answers`.

    What is left over is unused. None is no vote; in a tie each of the tied answers has an equal chance.
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
    """mean(b) - mean(a), with its 95% interval over problems, which are drawn for both together.

    A problem with NaN is left out of its own array's mean only, so the two means may be over different problems.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} problems cannot be paired")
    if np.isnan(a).all() or np.isnan(b).all():
        return float("nan"), float("nan"), float("nan")
    rows = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    has_values = (~np.isnan(a[rows])).any(axis=1) & (~np.isnan(b[rows])).any(axis=1)
    rows = rows[has_values]
    differences = np.nanmean(b[rows], axis=1) - np.nanmean(a[rows], axis=1)
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    return float(np.nanmean(b) - np.nanmean(a)), float(low), float(high)


def complete(prompts, generate, decode, config, done=(), log=None):
    """config.samples completions of each prompt (lists of ids): texts (N lists of n) and token counts (N, n).

    log(row) gets {"step", "texts", "counts"} of each batch; to resume, pass these rows as `done`.
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
    """n per prompt, prompt by prompt: completions as unpadded lists of ids, and generate's token counts."""
    ids, lengths, _ = generate(prompts, n=n, max_new_tokens=max_new_tokens, temperature=config.temperature,
                               top_p=config.top_p)
    lengths = lengths.tolist()
    return [row[:length] for row, length in zip(ids.tolist(), lengths)], lengths


def measure(examples, texts, counts, rules, final_answer, thinks, count_thinking, ks=()):
    """{metric: (N,) one value a problem, NaN where it does not apply} of the completions texts[i][j].

    rules: {name: (completion, example) -> float}, averaged over the samples; "accuracy_any" and "language_consistency"
    are needed. pass@k goes by accuracy_any, maj@k by final_answer(completion, example), where None is no vote; both
    apply to examples of kind "reasoning" alone. count_thinking(text) -> tokens.
    """
    names = [*rules, "length", "thinks", "accuracy_any_if_thinking", "language_if_thinking", "length_if_thinking"]
    names += [f"{metric}@{k}" for k in ks for metric in ("pass", "maj")]
    values = {name: np.full(len(examples), np.nan) for name in names}
    for i, (example, completions) in enumerate(zip(examples, texts)):
        scores = {name: np.array([rule(text, example) for text in completions]) for name, rule in rules.items()}
        for name in rules:
            values[name][i] = scores[name].mean()
        thought = np.array([bool(thinks(text)) for text in completions])
        values["length"][i], values["thinks"][i] = counts[i].mean(), thought.mean()
        if thought.any():
            values["accuracy_any_if_thinking"][i] = scores["accuracy_any"][thought].mean()
            values["language_if_thinking"][i] = scores["language_consistency"][thought].mean()
            values["length_if_thinking"][i] = np.mean([count_thinking(text) for text in completions if thinks(text)])
        if ks and example.get("kind", "reasoning") == "reasoning":
            answers = [final_answer(text, example) for text in completions]
            reference = final_answer(f"<answer>{example['answer']}</answer>", example)  # tags: all of it is read
            for k in ks:
                values[f"pass@{k}"][i] = pass_at_k(len(completions), int(scores["accuracy_any"].sum()), k)
                values[f"maj@{k}"][i] = majority_at_k(answers, reference, k)
    return values


def summarise(values):
    """{metric: [mean, low, high]} of the metrics with a value."""
    return {name: list(bootstrap(v)) for name, v in values.items() if not np.isnan(v).all()}


def continue_from(beginnings, unfinished, prompts, generate, decode, config, new_tokens):
    """Texts as `complete` gives them. beginnings: ids of completions, config.samples per prompt, prompt by prompt.

    Those that are unfinished go on for at most new_tokens.
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
    """{budget: texts as `complete` gives them, each cut after so many tokens and ended} [s1, arXiv 2501.19393].

    All budgets cut the same completions. What was cut goes on, for 40 tokens at most; where thinking_over(text) is
    False, after `end_thinking`, the ids that close the thinking and open the answer.
    """
    sampled, _ = sample(prompts, generate, config, config.samples, max(budgets) + 1)  # +1 tells cut from finished
    texts = {}
    for budget in budgets:
        unfinished = [len(ids) > budget for ids in sampled]
        beginnings = [ids[:budget] for ids in sampled]
        for r, ids in enumerate(beginnings):
            if unfinished[r] and not thinking_over(decode(ids)):
                beginnings[r] = ids + end_thinking
        texts[budget] = continue_from(beginnings, unfinished, prompts, generate, decode, config, new_tokens=40)
    return texts


def main():
    from lab.scripts import measure_directory  # here, so that the rest imports without the project
    measure_directory(EvalConfig, complete, measure, summarise)


if __name__ == "__main__":
    main()

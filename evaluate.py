"""Measuring a model: pass@1, pass@k, maj@k, length, form, language, help and harm, accuracy under thinking budgets.

As R1 evaluates [v1 3]: k samples a problem at T 0.6 and top-p 0.95, pass@1 = mean correctness; greedy decoding is
avoided. Every figure is a mean over problems, with a 95% bootstrap interval over problems; a comparison of two
models on the same problems is a paired bootstrap.

    python evaluate.py --model DIR --data FILE.jsonl     # a problem set (data/readers.py)
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

    def __post_init__(self):
        if self.samples < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"samples {self.samples}, temperature {self.temperature} or top_p {self.top_p} out of range")


# ------------------------------------------------------------------------------------------- estimators

def pass_at_k(n, c, k):
    """The chance that k of n samples, c of them correct, hold a correct one: 1 - C(n-c, k) / C(n, k), unbiased."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} correct among {n} samples")
    return 1 - comb(n - c, k) / comb(n, k)


def majority_at_k(answers, reference, k):
    """The chance that a vote of k samples finds the reference: mean over the disjoint lots of k among `answers`.

    An unreadable answer (None) does not vote; a tie gives each of the tied an equal chance.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} of {len(answers)} samples")
    lots = [answers[i:i + k] for i in range(0, len(answers) - k + 1, k)]
    return sum(_vote(lot, reference) for lot in lots) / len(lots)


def _vote(answers, reference):
    votes = Counter(a for a in answers if a is not None)
    best = [a for a, count in votes.items() if count == max(votes.values())]
    return (reference in best) / len(best) if best else 0.0


def bootstrap(values, draws=2000, seed=0):
    """Mean and 95% interval over problems: values (N,), NaN where a problem has none."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    means = values[np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))].mean(axis=1)
    return float(values.mean()), *(float(x) for x in np.percentile(means, [2.5, 97.5]))


def paired_bootstrap(a, b, draws=2000, seed=0):
    """mean(b) - mean(a) over the same problems, with its 95% interval; a problem without a value in one is left out of that mean."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} problems cannot be paired")
    nothing = (float("nan"),) * 3
    if np.isnan(a).all() or np.isnan(b).all():
        return nothing
    rows = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    rows = rows[~(np.isnan(a[rows]).all(axis=1) | np.isnan(b[rows]).all(axis=1))]  # a draw of problems without any value
    differences = np.nanmean(b[rows], axis=1) - np.nanmean(a[rows], axis=1)
    return float(np.nanmean(b) - np.nanmean(a)), *(float(x) for x in np.nanpercentile(differences, [2.5, 97.5]))


# ------------------------------------------------------------------------------------------- sampling

def complete(prompts, generate, decode, config, done=(), log=None):
    """config.samples completions of each prompt (lists of ids): texts (N lists of n) and token counts (N, n).

    log(row) gets each lot of prompts as it is done, {"step", "texts", "counts"}; `done` are such rows of an earlier call,
    which are not sampled again.
    """
    n, texts, counts = config.samples, [None] * len(prompts), np.zeros((len(prompts), config.samples), dtype=int)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    lot = max(1, config.batch_rows // n)
    for step, at in enumerate(range(0, len(order), lot), 1):
        chosen = order[at:at + lot]
        if step > len(done):
            ids, lengths, _ = generate([prompts[i] for i in chosen], n=n, max_new_tokens=config.max_new_tokens,
                                       temperature=config.temperature, top_p=config.top_p)
            ids, lengths = ids.tolist(), lengths.tolist()
            row = {"step": step, "texts": [decode(own[:length]) for own, length in zip(ids, lengths)], "counts": lengths}
            if log is not None:
                log(row)
        else:
            row = done[step - 1]
        for j, i in enumerate(chosen):
            texts[i], counts[i] = row["texts"][j * n:(j + 1) * n], row["counts"][j * n:(j + 1) * n]
    return texts, counts


# ------------------------------------------------------------------------------------------- metrics

def measure(examples, texts, counts, rules, final_answer, thinks, count_thinking, ks=()):
    """{metric: (N,) one value a problem, NaN where it does not apply} of the completions texts[i][j].

    rules: {name: (completion, example) -> float}, averaged over the samples; "accuracy" is the metric of any stage's
    style and "accuracy_strict" the training reward. Within outputs that think: accuracy, language, thinking's length.
    """
    scores = {name: [[rule(t, e) for t in row] for e, row in zip(examples, texts)] for name, rule in rules.items()}
    values = {name: [np.mean(row) for row in rows] for name, rows in scores.items()}
    values["length"] = counts.mean(axis=1)
    thinking = [[thinks(t) for t in row] for row in texts]
    values["thinks"] = [np.mean(row) for row in thinking]
    lengths = [[count_thinking(t) if flag else 0 for t, flag in zip(row, flags)] for row, flags in zip(texts, thinking)]
    for name, rows in ("accuracy", scores["accuracy"]), ("language", scores["language_consistency"]), ("length", lengths):
        within = [[value for value, flag in zip(row, flags) if flag] for row, flags in zip(rows, thinking)]
        values[f"{name}_if_thinking"] = [np.mean(row) if row else np.nan for row in within]
    if any(e["kind"] == "reasoning" for e in examples):
        answers = [[final_answer(t) for t in row] for row in texts] if ks else []
        for k in ks:
            values[f"pass@{k}"] = [pass_at_k(counts.shape[1], int(sum(row)), k) for row in scores["accuracy"]]
            values[f"maj@{k}"] = [majority_at_k(row, final_answer(e["answer"]), k) for e, row in zip(examples, answers)]
    return {name: np.asarray(v, dtype=float) for name, v in values.items()}


def summarise(values, groups=None):
    """{metric: [mean, low, high]} of the metrics with a value; groups {name: problems' indices} adds "accuracy_<name>"."""
    summary = {name: list(bootstrap(v)) for name, v in values.items() if not np.isnan(v).all()}
    for name, rows in (groups or {}).items():
        if len(rows):
            summary[f"accuracy_{name}"] = list(bootstrap(values["accuracy"][rows]))
    return summary


def go_on(prompts, heads, generate, decode, config, new_tokens):
    """Texts as `complete` gives them, from heads [(ids, goes on)]: head r begins completion r % samples of prompt r // samples."""
    n, texts = config.samples, [decode(head) for head, _ in heads]
    rows = sorted((r for r, (_, open_) in enumerate(heads) if open_), key=lambda r: len(prompts[r // n]) + len(heads[r][0]))
    for at in range(0, len(rows), config.batch_rows):
        chosen = rows[at:at + config.batch_rows]
        ids, lengths, _ = generate([list(prompts[r // n]) + heads[r][0] for r in chosen], n=1, max_new_tokens=new_tokens,
                                   temperature=config.temperature, top_p=config.top_p)
        for r, row, length in zip(chosen, ids.tolist(), lengths.tolist()):
            texts[r] = decode(heads[r][0] + row[:length])
    return [texts[i * n:(i + 1) * n] for i in range(len(prompts))]


def with_budget(prompts, generate, decode, config, budget, end_thinking, thinking_over):
    """Completions whose thinking is cut after `budget` tokens [s1, arXiv 2501.19393]; texts as `complete` gives them.

    A completion that still thinks then (thinking_over(text) is False) goes on after `end_thinking`, the ids that
    close the thinking and open the answer.
    """
    ids, lengths, _ = generate(prompts, n=config.samples, max_new_tokens=budget + 1, temperature=config.temperature,
                               top_p=config.top_p)
    heads = []
    for row, length in zip(ids.tolist(), lengths.tolist()):
        head, open_ = row[:min(length, budget)], length > budget  # one more token tells what goes on from what ended there
        if open_ and not thinking_over(decode(head)):
            head += end_thinking
        heads.append((head, open_))
    return go_on(prompts, heads, generate, decode, config, new_tokens=40)


def lengthened(prompts, generate, decode, config, end_thinking, wait):
    """Completions whose thinking may not end at once: its end token is replaced by the ids `wait`, one time [s1]."""
    ids, lengths, _ = generate(prompts, n=config.samples, max_new_tokens=config.max_new_tokens,
                               temperature=config.temperature, top_p=config.top_p)
    heads = []
    for row, length in zip(ids.tolist(), lengths.tolist()):
        ended = end_thinking in row[:length]
        heads.append((row[:row.index(end_thinking)] + list(wait), True) if ended else (row[:length], False))
    return go_on(prompts, heads, generate, decode, config, new_tokens=config.max_new_tokens)


def main():
    import torch

    import rewards
    from command import PROBLEMS, Parser, add_template, fast_dtype, fields_of, open_model
    from data.readers import read_problems
    from graphs import with_graphs
    from model import generate
    parser = Parser(description="Measure a model directory on problems and requests.")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--data", required=True, help=PROBLEMS)
    add_template(parser)
    parser.add_argument("--dtype", default=fast_dtype(), choices=("bfloat16", "float32"), help="default %(default)s")
    parser.add_fields(EvalConfig)
    args = parser.parse_args()
    with parser.explained():
        config, examples = fields_of(args, EvalConfig), read_problems(args.data, rewards.check_reference)
        model, tokenizer = open_model(args.model, getattr(torch, args.dtype), template=args.template)
        random = torch.Generator(device=next(model.parameters()).device).manual_seed(config.seed)

        def sample(prompts, **settings):
            return with_graphs(generate)(model, prompts, end_ids=tokenizer.end_ids, generator=random, **settings)

        rules = {**rewards.REWARDS, "accuracy_strict": rewards.accuracy,
                 "accuracy": lambda text, example: rewards.accuracy(text, example, strict=False)}
        for kind in rewards.KINDS:
            rows = [e for e in examples if e["kind"] == kind]
            if rows:
                texts, counts = complete([tokenizer.encode_prompt(e["prompt"]) for e in rows], sample, tokenizer.decode, config)
                values = measure(rows, texts, counts, rules, rewards.final_answer, rewards.thinks,
                                 lambda text: len(tokenizer.encode(rewards.split(text)[0])), sorted({1, config.samples}))
                print(f"{kind}: {len(rows)} rows, {config.samples} samples each")
                for name, (mean, low, high) in summarise(values).items():
                    print(f"  {name:26} {mean:8.3f}  [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()

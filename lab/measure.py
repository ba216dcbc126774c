"""What is measured of a stage's model on the test: problems, harder problems, general and unsafe requests."""

from functools import partial

import numpy as np
import torch

import evaluate
import rewards
from data import search, world
from lab import checkpoint
from lab.asking import decoder
from lab.scripts import final_answer, rules

RULES = ("accuracy", "accuracy_any", "format", "language_consistency")  # of problems
REFLECTION = ("tries", "checks", "returns", "false_yes", "false_no")  # what a search is counted by (data/search.py)
BUDGETS = (8, 16, 32, 48, 64, 96, 128)  # tokens of thinking


def score(run, examples, texts, counts, ks=()):
    """{metric: array per problem} of completions, as evaluate.measure gives them."""
    def count_thinking(text):
        return len(run.tokenizer.encode(rewards.split(text)[0]))

    chosen = {name: rules()[name] for name in RULES}
    values = evaluate.measure(examples, texts, counts, chosen, final_answer, rewards.thinks, count_thinking, ks)
    return values | (reflection(examples, texts) if run.source.has_searches else {})


def reflection(examples, texts):
    """{what completions do to find an answer: its mean count an output, (N,)}, NaN for what is no search."""
    values = {name: np.full(len(examples), np.nan) for name in REFLECTION}
    for i, (example, completions) in enumerate(zip(examples, texts)):
        if example.get("family") == "search":
            counts = [search.reflection(text, example["problem"]) for text in completions]
            for name in REFLECTION:
                values[name][i] = np.mean([count[name] for count in counts])
    return values


def measure_stage(run, model):
    """Values {metric: array per problem} for tables and claims. One sample per problem goes to test_samples.jsonl."""
    spent = dict(run.cost)
    samples = run.preset.zero_samples if run.name == "zero" else run.preset.samples
    source, of_requests = run.source, 2 * run.preset.samples  # fewer than problems, and short
    texts, counts = run.complete(model, source.test, samples=samples)
    values = score(run, source.test, texts, counts, [k for k in (1, 8, 16) if k <= samples])
    hard, hard_counts = run.complete(model, source.hard, samples=max(1, run.preset.samples // 2))  # long ones
    hard_values = score(run, source.hard, hard, hard_counts)
    add_parts(values, source, hard_values)
    if run.name == "base":
        at_one = run.complete(model, source.test, temperature=1.0, top_p=1.0)
        values["accuracy_any_at_T1"] = score(run, source.test, *at_one)["accuracy_any"]

    general, _ = run.complete(model, source.general, samples=of_requests)
    safety, _ = run.complete(model, source.safety, samples=of_requests)
    values["helpfulness"] = means(rewards.helpfulness, source.general, general)
    values["format_general"] = means(rewards.format, source.general, general)
    harmless = means(rewards.harmlessness, source.safety, safety)
    harmful = [example["harmful"] for example in source.safety]
    values["harmlessness"] = np.where(harmful, harmless, np.nan)
    values["refusals"] = np.where(harmful, np.nan, 1 - harmless)

    sampled = [(source.test, texts), (source.hard, hard), (source.general, general), (source.safety, safety)]
    rows = [{**example, "completion": row[0]} for examples, rows in sampled for example, row in zip(examples, rows)]
    checkpoint.write_jsonl(run.out / run.name / "test_samples.jsonl", rows)
    run.cost = spent  # measuring is no part of the stage's cost
    return values


def add_parts(values, source, hard_values):
    """Adds accuracy, length and reflection by family and level, hard levels included, and accuracy by language.

    NaN stands for the problems of another part; "hard_checks" is what "checks" is of the problems of a hard level.
    """
    for examples, measured, levels in ((source.test, dict(values), world.LEVELS),
                                       (source.hard, hard_values, world.HARD_LEVELS)):
        for family in ("story", "search"):
            for level in levels:
                chosen = [family_of(example) == family and example["level"] == level for example in examples]
                for metric in ("accuracy_any", "length"):
                    values[f"{metric}_{family}_{level}"] = np.where(chosen, measured[metric], np.nan)
    for family in ("story", "search"):
        chosen = [family_of(example) == family for example in source.test]
        values[f"accuracy_any_{family}"] = np.where(chosen, values["accuracy_any"], np.nan)
        chosen = [family_of(example) == family for example in source.hard]
        values[f"accuracy_any_hard_{family}"] = np.where(chosen, hard_values["accuracy_any"], np.nan)
    for language in ("en", "zh"):
        chosen = [example["language"] == language for example in source.test]
        values[f"accuracy_any_{language}"] = np.where(chosen, values["accuracy_any"], np.nan)
    for name in REFLECTION:
        if name in hard_values:
            values[f"hard_{name}"] = hard_values[name]


def family_of(example):
    """"search", or "story" for all others; "" where a user's problems have no level."""
    if "level" not in example:
        return ""
    return "search" if example.get("family") == "search" else "story"


def rule_values(source, many):
    """What searches come to without a search: the best rule, by level, and pass@k of random pairs of prices."""
    values, parts = {}, ((source.test, world.LEVELS, "search"), (source.hard, world.HARD_LEVELS, "hard_search"))
    for examples, levels, name in parts:
        is_search = [example["family"] == "search" for example in examples]
        scores, searches = np.full(len(examples), np.nan), search.searches(examples)
        scores[is_search] = search.best_rule_scores(searches)
        values[f"accuracy_any_{name}"] = scores
        for level in levels:
            chosen = [example["level"] == level for example in examples]
            values[f"accuracy_any_search_{level}"] = np.where(chosen, scores, np.nan)
    lucky = np.array([search.chance_of_a_random_pair(example) for example in search.searches(source.test)])
    for k in (16, 64):
        if k <= many:
            values[f"random_pass@{k}"] = 1 - (1 - lucky) ** k
    return values


def means(rule, examples, texts):
    """The mean score of each example's completions, (N,)."""
    return np.array([np.mean([rule(text, example) for text in row]) for example, row in zip(examples, texts)])


# ------------------------------------------------------------------------------------------- beside the stages

def extras(run, ablations):
    """What tables and claims need beside the stages' own values."""
    if run.source.has_searches:
        run.extra("rule", partial(rule_values, run.source, run.preset.many))
    if ablations:
        many_samples(run)
    if "r1" in run.chosen and run.source.has_tag_tokens:
        thinking_budgets(run)


def many_samples(run):
    """pass@k and maj@k of many samples, before and after reinforcement learning."""
    for name in ("base", "zero", "dev1", "dev2"):
        run.extra(f"{name}_many", partial(score_many, run, name))


def score_many(run, name):
    problems, ks = run.source.test[:200], [k for k in (16, 64) if k <= run.preset.many]
    texts, counts = run.complete(run.model(name), problems, samples=run.preset.many)
    values = score(run, problems, texts, counts, ks)
    is_search = [family_of(example) == "search" for example in problems]
    return values | {f"pass@{k}_search": np.where(is_search, values[f"pass@{k}"], np.nan) for k in ks}


def thinking_budgets(run):
    """Accuracy with the thinking cut at each budget of tokens."""
    for name in ("base", "zero", "r1"):
        run.extra(f"budgets_{name}", partial(accuracy_within, run, name))


def accuracy_within(run, name):
    """{budget: accuracy in any style, per problem}"""
    def thinking_is_over(text):
        return "</think>" in text

    problems = run.source.test[:200]
    prompts = [run.prompt(example) for example in problems]
    sampler = run.sampler(run.model(name), torch.Generator(device=run.device).manual_seed(0))
    # Continued completions share no prompt: reading 512 long ones at once was the peak of the whole run's memory.
    config = evaluate.EvalConfig(samples=2, max_new_tokens=run.preset.zero.max_new_tokens, batch_rows=128)
    close = run.tokenizer.encode("</think><answer>")
    texts = evaluate.with_budgets(prompts, sampler, decoder(run.tokenizer, problems), config, BUDGETS, close,
                                  thinking_is_over)
    return {str(budget): means(rules()["accuracy_any"], problems, cut) for budget, cut in texts.items()}

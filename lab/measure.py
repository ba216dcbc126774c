"""What is measured of a stage's model on the test: problems, harder problems, general and unsafe requests."""

from functools import partial

import numpy as np
import torch

import evaluate
import rewards
from data import world
from lab import checkpoint
from lab.scripts import final_answer, rules

RULES = ("accuracy", "accuracy_any", "format", "language_consistency")  # of problems


def score(run, examples, texts, counts, ks=()):
    """{metric: array per problem} of completions, as evaluate.measure gives them."""
    def count_thinking(text):
        return len(run.tokenizer.encode(rewards.split(text)[0]))

    chosen = {name: rules()[name] for name in RULES}
    return evaluate.measure(examples, texts, counts, chosen, final_answer, rewards.thinks, count_thinking, ks)


def measure_stage(run, model):
    """Values {metric: array per problem} for tables and claims. One sample per problem goes to test_samples.jsonl."""
    spent = dict(run.cost)
    samples = run.preset.zero_samples if run.name == "zero" else run.preset.samples
    source = run.source
    texts, counts = run.complete(model, source.test, samples=samples)
    values = score(run, source.test, texts, counts, [k for k in (1, 8, 16) if k <= samples])
    hard, hard_counts = run.complete(model, source.hard)
    hard_values = score(run, source.hard, hard, hard_counts)
    add_parts(values, source, hard_values["accuracy_any"])
    if run.name == "base":
        at_one = run.complete(model, source.test, temperature=1.0, top_p=1.0)
        values["accuracy_any_at_T1"] = score(run, source.test, *at_one)["accuracy_any"]

    general, _ = run.complete(model, source.general)
    safety, _ = run.complete(model, source.safety)
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


def add_parts(values, source, hard_accuracy):
    """Adds accuracy_any by level, hard ones included, and by language; NaN for the problems of another."""
    def part(examples, accuracy, field, value):
        return np.where([example.get(field) == value for example in examples], accuracy, np.nan)

    accuracy = values["accuracy_any"]
    for level in world.LEVELS:
        values[f"accuracy_any_level_{level}"] = part(source.test, accuracy, "level", level)
    for level in world.HARD_LEVELS:
        values[f"accuracy_any_level_{level}"] = part(source.hard, hard_accuracy, "level", level)
    for language in ("en", "zh"):
        values[f"accuracy_any_{language}"] = part(source.test, accuracy, "language", language)


def means(rule, examples, texts):
    """The mean score of each example's completions, (N,)."""
    return np.array([np.mean([rule(text, example) for text in row]) for example, row in zip(examples, texts)])


# ------------------------------------------------------------------------------------------- beside the stages

def many_samples(run):
    """pass@k and maj@k of many samples, before and after RL-1."""
    for name in ("dev1", "dev2"):
        run.extra(f"{name}_many", partial(score_many, run, name))


def score_many(run, name):
    problems, ks = run.source.test[:200], [k for k in (16, 64) if k <= run.preset.many]
    texts, counts = run.complete(run.model(name), problems, samples=run.preset.many)
    return score(run, problems, texts, counts, ks)


def thinking_budgets(run, budgets=(8, 24, 48, 96)):
    """r1's accuracy with its thinking cut at each budget of tokens; and, separately, lengthened once by "Wait" [s1]."""
    model = run.model("r1")
    for budget in budgets:
        run.extra(f"budget_{budget}", partial(accuracy_within, run, model, budget))
    run.extra("lengthened", partial(accuracy_lengthened, run, model))


def accuracy_within(run, model, budget):
    def thinking_is_over(text):
        return "</think>" in text

    close = run.tokenizer.encode("</think><answer>")
    texts = evaluate.with_budget(*ready_to_sample(run, model), budget, close, thinking_is_over)
    return accuracy_of(run, texts)


def accuracy_lengthened(run, model):
    end, wait = run.tokenizer.encode("</think>")[0], run.tokenizer.encode(" Wait,")
    return accuracy_of(run, evaluate.lengthened(*ready_to_sample(run, model), end, wait))


def ready_to_sample(run, model):
    """The first arguments of with_budget and lengthened: prompts, a sampler, decode, settings."""
    prompts = [run.prompt(example) for example in run.source.test[:200]]
    sampler = run.sampler(model, torch.Generator(device=run.device).manual_seed(0))
    config = evaluate.EvalConfig(samples=4, max_new_tokens=run.preset.zero.max_new_tokens)
    return prompts, sampler, run.tokenizer.decode, config


def accuracy_of(run, texts):
    return {"accuracy_any": means(rules()["accuracy_any"], run.source.test[:200], texts)}

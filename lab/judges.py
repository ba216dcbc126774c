"""Reward models among the rewards that a command line names: --rewards accuracy reward_model:DIR."""

from pathlib import Path

import torch

from lab.reward_models import encoder, load_reward_model, summary
from variants.reward_model import Judge, RewardModel, Term

NAMED = "reward_model:"  # and a directory


def models_among(names):
    """{what was typed: its directory} of the rewards that name a reward model."""
    return {name: name.removeprefix(NAMED) for name in names if name.startswith(NAMED)}


def select_with(weights, device, dtype, select):
    """grpo.train's select, with the scores of these directories' models; weights: {dir: weight}."""
    terms = []
    for dir, weight in weights.items():
        model, tokenizer, reads = load_reward_model(RewardModel, dir, device, getattr(torch, dtype))
        terms.append(Term(f"model_{Path(dir).name}", model, reader(tokenizer, reads),
                          is_probability=reads == "response", weight=weight))
    return Judge(terms, dtype, select).select


def reader(tokenizer, reads):
    """encode(example, completion) of a model that reads the "summary" or the whole "response"."""
    encode = encoder(tokenizer)
    if reads == "response":
        return encode
    return lambda example, completion: encode(example, summary(completion))

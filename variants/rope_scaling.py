"""Rotary positions for a longer context than a model was first trained on: linear, Llama 3's, and YaRN.

In place of model.rope_frequencies; Config.rope_scaling, from config.json, says which: {"rope_type": "llama3", ...}.

    model.load(dir, rope=scaled_frequencies)

Shapes: d head size; a pair is two of its components, turned together.
"""

import math

import torch


def scaled_frequencies(c):
    """The angle per position of each of the d/2 pairs, and a factor for cos and sin. c: a model.Config."""
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim
    frequency = c.rope_theta ** -exponent  # (d/2,)
    if c.rope_scaling is None:
        return frequency, 1.0
    scaling, kind = c.rope_scaling, c.rope_scaling["rope_type"]
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope scaling {kind!r} is not supported: linear, llama3 and yarn are")
    factor = scaling["factor"]
    first_context = scaling.get("original_max_position_embeddings", c.max_position_embeddings)
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":  # by a pair's turns within the first context
        turns = first_context * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequency + (1 - kept) * frequency / factor, 1.0
    slowed, scale = yarn(c, scaling, factor, first_context)
    return (1 - slowed) * frequency + slowed * frequency / factor, scale


def yarn(c, scaling, factor, first_context):
    """How much each pair is slowed (d/2,), 0 to 1, and the factor for cos and sin (arXiv 2309.00071)."""
    def pair_that_turns(times):  # the index, a fraction, of the pair that makes so many turns in the first context
        return c.head_dim * math.log(first_context / (times * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    def attention_scale(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    low, high = pair_that_turns(scaling.get("beta_fast", 32)), pair_that_turns(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)  # not d/2 - 1: as the authors' code
    width = 0.001 if high == low else high - low
    pair = torch.arange(c.head_dim // 2, dtype=torch.float32, device="cpu")
    slowed = ((pair - low) / width).clamp(0, 1)
    scale = attention_scale(1)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        scale = attention_scale(scaling["mscale"]) / attention_scale(scaling["mscale_all_dim"])
    return slowed, scaling.get("attention_factor") or scale

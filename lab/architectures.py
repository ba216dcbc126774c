"""Which file computes a model: model.py a dense one, variants/deepseek_v3.py one of DeepSeek-V3's kind.

    load(dir, device, dtype)      # as model.load, from there; also with a longer context (variants/rope_scaling.py)
    save(model, dir, tokenizer)   # as model.save, from there
    new_model(sizes, generator)   # with random weights, ready to be pretrained
"""

import json
from pathlib import Path

import torch

import model as dense
from variants import deepseek_v3, v3_weights
from variants.rope_scaling import scaled_frequencies
from variants.v3_pretraining import add_next_token, init_weights


def holds_deepseek(dir):
    config = json.loads(Path(dir, "config.json").read_text(encoding="utf-8"))
    return config.get("model_type") == "deepseek_v3"


def is_deepseek(model):
    return isinstance(model, deepseek_v3.Transformer)


def active_parameters(model):
    """How many a token goes through: K of E experts, and all else."""
    count = sum(p.numel() for p in model.parameters())
    for part in model.modules():
        if isinstance(part, deepseek_v3.Experts):
            idle = 1 - model.config.num_experts_per_tok / model.config.n_routed_experts
            count -= round(idle * sum(p.numel() for p in part.parameters()))
    return count


def cache_bytes(model):
    """Of one token."""
    cache = model.new_cache(torch.zeros(1, dtype=torch.long))
    columns = cache.reserve(1)
    return sum(kept.nbytes for kept in vars(cache).values() if torch.is_tensor(kept) and kept.dim() > 1) / columns


def load(dir, device=None, dtype=None):
    if holds_deepseek(dir):
        return v3_weights.load(dir, deepseek_v3.Config, deepseek_v3.Transformer, device, dtype, rope=scaled_frequencies)
    return dense.load(dir, device, dtype, rope=scaled_frequencies)


def new_model(sizes, generator):
    """Of Config's fields. A DeepSeek-V3 predicts a second token, as long as it is pretrained."""
    if sizes.get("model_type") != "deepseek_v3":
        return dense.Transformer(dense.Config(**sizes)).init_weights(generator)
    model = init_weights(deepseek_v3.Transformer(deepseek_v3.Config(**sizes)), generator)
    return add_next_token(model, generator)


def save(model, dir, tokenizer=None):
    (v3_weights if is_deepseek(model) else dense).save(model, dir, tokenizer)


def transformer_of(config):
    """With random weights, of a Config."""
    file = deepseek_v3 if isinstance(config, deepseek_v3.Config) else dense
    return file.Transformer(config, scaled_frequencies)


def hf_tensors(model):
    return (v3_weights if is_deepseek(model) else dense).hf_tensors(model)


def read_config(dir):
    return v3_weights.read_config(dir, deepseek_v3.Config) if holds_deepseek(dir) else dense.read_config(dir)

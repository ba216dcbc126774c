"""Which file computes a model: model.py a dense one, variants/deepseek_v3.py one of DeepSeek-V3's kind.

    load(dir, device, dtype)      # as model.load, from there; also with a longer context (variants/rope_scaling.py)
    save(model, dir, tokenizer)   # as model.save, from there
"""

import json
from pathlib import Path

import model as dense
from variants import deepseek_v3
from variants.rope_scaling import scaled_frequencies


def file_of(dir):
    """The module whose Transformer a checked directory holds."""
    config = json.loads(Path(dir, "config.json").read_text(encoding="utf-8"))
    return deepseek_v3 if config.get("model_type") == "deepseek_v3" else dense


def is_deepseek(model):
    return isinstance(model, deepseek_v3.Transformer)


def load(dir, device=None, dtype=None):
    return file_of(dir).load(dir, device, dtype, rope=scaled_frequencies)


def save(model, dir, tokenizer=None):
    (deepseek_v3 if is_deepseek(model) else dense).save(model, dir, tokenizer)


def read_config(dir):
    return file_of(dir).read_config(dir)

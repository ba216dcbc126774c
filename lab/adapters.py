"""Directories with LoRA's adapters in PEFT's format: written beside a merged model, and merged where one is read.

    load_model(dir, device, dtype)     # as model.load; `dir` may hold an adapter of PEFT's, whose base is at hand
    open_model(dir, dtype, ...)        # and its tokenizer, both checked
    save_adapters(model, base, dir)    # adapter_config.json and adapter_model.safetensors, which `peft` opens

Our fused matrices (qkv_proj, gate_up_proj) are several in these files: one A serves all parts, and B has their rows.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lab.architectures import is_deepseek, load
from lab.check_adapter import CONFIG, PREFIX, WEIGHTS, base_directory, directories, scale_of
from lab.check_input import check_directory
from lab.check_model import read_json
from lab.layers import fast_layers
from model import hf_tensors
from tokenizer import Tokenizer
from variants.lora import adapters


def load_model(dir, device=None, dtype=None):
    """model.load's model, with an adapter of PEFT's merged: added in float32, then in the model's precision."""
    *chain, base = directories(dir)
    model = load(base, device, dtype)
    for adapter in reversed(chain):
        if is_deepseek(model):
            raise ValueError(f"{Path(adapter) / CONFIG}: an adapter of a deepseek_v3 is not supported")
        add_peft(model, adapter)
    return model


def open_model(dir, dtype=None, device=None, template=None):
    """(model, tokenizer) of a directory, which is checked before anything is loaded."""
    base = base_directory(dir)
    check_directory(base, template)
    tokenizer = Tokenizer(base, template)
    tokenizer.template  # a chat template that is not known is refused before anything is loaded
    return fast_layers(load_model(dir, device, dtype)), tokenizer


@torch.no_grad()
def add_peft(model, dir):
    """Adds the adapter in `dir`, which check_adapter has passed, to the model's matrices."""
    scale, rows = scale_of(read_json(Path(dir) / CONFIG)), hf_tensors(model)
    tensors = load_file(Path(dir) / WEIGHTS)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        matrix = name.removesuffix("lora_A.weight")
        A, B = tensors[name].float(), tensors[f"{matrix}lora_B.weight"].float()
        target = rows[f"{matrix.removeprefix(PREFIX)}weight"]
        target.copy_(target.float() + scale * (B @ A).to(target.device))


@torch.no_grad()
def add_adapters_of(adapted, model):
    """Adds the adapters of one model to the matrices of another one of the same architecture, in float32."""
    for name, part in adapters(adapted).items():
        weight = model.get_submodule(name).weight
        weight.copy_(weight.float() + part.delta().to(weight.device))
    return model


def save_adapters(model, base, dir):
    """Writes the adapters of a model that was made from the directory `base`, as PEFT does."""
    dir, parts = Path(dir), adapters(model)
    dir.mkdir(parents=True, exist_ok=True)
    tensors, matrices = {}, set()
    for name, part in parts.items():
        for full_name, B in hf_tensors(model, {f"{name}.weight": part.lora_B}).items():
            matrix = full_name.removesuffix(".weight")
            matrices.add(matrix.split(".")[-1])
            tensors[f"{PREFIX}{matrix}.lora_A.weight"] = part.lora_A.detach().cpu().clone()  # no two may share memory
            tensors[f"{PREFIX}{matrix}.lora_B.weight"] = B.detach().cpu().clone()
    rank = len(part.lora_A)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(Path(base).resolve()),
              "r": rank, "lora_alpha": part.scale * rank, "target_modules": sorted(matrices), "bias": "none",
              "lora_dropout": 0.0, "fan_in_fan_out": False, "inference_mode": True}
    save_file(tensors, dir / WEIGHTS, {"format": "pt"})
    (dir / CONFIG).write_text(json.dumps(config, indent=1))

"""Directories with LoRA's adapters in PEFT's format: written beside a merged model, and merged where one is read.

    load_model(dir, device, dtype)     # as model.load; `dir` may hold an adapter of PEFT's, whose base is at hand
    base_directory(dir)                # the directory with the tokenizer and the weights: `dir`, or an adapter's base
    save_adapters(model, base, dir)    # adapter_config.json and adapter_model.safetensors, which `peft` opens

Our fused matrices (qkv_proj, gate_up_proj) are several in these files: one A serves all parts, and B has their rows.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lab.architectures import is_deepseek, load
from lab.checkpoint import read_json
from model import hf_tensors
from variants.lora import adapters

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# what else PEFT can do to a model, and would be left out in silence here
UNKNOWN = ("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern",
           "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters",
           "alora_invocation_tokens")


def is_adapter(dir):
    return (Path(dir) / CONFIG).exists() and not (Path(dir) / "config.json").exists()


def base_directory(dir):
    """Where the tokenizer, config.json and the base's weights are. Raises ValueError where an adapter's base is not."""
    if not is_adapter(dir):
        return dir
    path = Path(dir) / CONFIG
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not Path(base).is_dir():
        raise ValueError(f"{path}: its base_model_name_or_path {base!r} is no directory here: write the path of the "
                         "base's directory there")
    if Path(base).resolve() == Path(dir).resolve():
        raise ValueError(f"{path} names its own directory as its base")
    return base_directory(base)


def load_model(dir, device=None, dtype=None):
    """model.load's model, with an adapter of PEFT's merged: added in float32, then in the model's precision."""
    if not is_adapter(dir):
        return load(dir, device, dtype)
    base_directory(dir)
    model = load_model(read_json(Path(dir) / CONFIG)["base_model_name_or_path"], device, dtype)
    if is_deepseek(model):
        raise ValueError(f"{Path(dir) / CONFIG}: an adapter of a deepseek_v3 is not supported")
    add_peft(model, dir)
    return model


@torch.no_grad()
def add_peft(model, dir):
    """Adds the adapter in `dir` to the model's matrices. Raises ValueError for what it holds beside LoRA's A and B."""
    path = Path(dir) / WEIGHTS
    config, rows = read_json(Path(dir) / CONFIG), hf_tensors(model)
    unknown = [name for name in UNKNOWN if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unknown:
        raise ValueError(f"{Path(dir) / CONFIG} is not plain LoRA: {', '.join(unknown) or 'peft_type or bias'}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        rank, alpha = config["r"], config["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            matrix = name.removesuffix("lora_A.weight")
            A, B = tensors.pop(name).float(), tensors.pop(f"{matrix}lora_B.weight").float()
            target = rows[f"{matrix.removeprefix(PREFIX)}weight"]
            target.copy_(target.float() + scale * (B @ A).to(target.device))
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit its base or its {CONFIG} ({error})") from None
    if tensors:
        raise ValueError(f"{path} holds {next(iter(tensors))}, which is no LoRA of a matrix")


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

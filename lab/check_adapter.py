"""Diagnoses a directory with an adapter of PEFT's before anything of it is loaded.

    base_directory(dir)      # the directory with the tokenizer and the weights: `dir`, or an adapter's base
    directories(dir)         # all that are added up: adapters, and that one last

What is not plain LoRA of the base's matrices raises a ValueError of one line, which names the file and the field or
tensor. What PEFT would compute otherwise is refused, whatever it is called: a field that is not known must be empty.
"""

import math
from pathlib import Path

from safetensors import safe_open

from lab.check_model import (FLOATS, check_fields, check_number, check_regular, naming_file, read_fields, read_json,
                             tensor_shapes)

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# without a say in what is added to which matrix: that stands in the tensors
HARMLESS = ("base_model_name_or_path", "lora_dropout", "inference_mode", "target_modules", "exclude_modules",
            "layers_to_transform", "layers_pattern", "task_type", "peft_version", "revision", "auto_mapping",
            "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
CHECKED = ("peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora")
UNTOUCHED = (None, True, False, "gaussian", "eva", "orthogonal")  # initialisations that leave the base as it is


def is_adapter(dir):
    return (Path(dir) / CONFIG).exists() and not (Path(dir) / "config.json").exists()


def directories(dir):
    """[dir], or, of an adapter, [dir, its base, ...] down to the model that all are added to.

    Raises ValueError where a base is not at hand, or an adapter does not fit it.
    """
    chain = [dir]
    while is_adapter(chain[-1]):
        with naming_file(Path(chain[-1]) / CONFIG) as path:
            base = read_json(path).get("base_model_name_or_path")
            if not isinstance(base, str) or not Path(base).is_dir():
                raise ValueError(f"its base_model_name_or_path {base!r} is no directory here: write the path of the "
                                 "base's directory there")
            if Path(base).resolve() in [Path(each).resolve() for each in chain]:
                raise ValueError(f"its base_model_name_or_path {base!r} leads back to itself")
        chain.append(base)
    for adapter in chain[:-1]:
        check_adapter(adapter, chain[-1])
    return chain


def base_directory(dir):
    """Where the tokenizer, config.json and the base's weights are. Raises ValueError as `directories`."""
    return directories(dir)[-1]


def check_adapter(dir, base):
    """base: the directory with the weights. Raises ValueError for what is not LoRA of its matrices."""
    with naming_file(Path(base) / "config.json") as path:
        config = read_fields(path)
        check_fields(config)
    with naming_file(Path(dir) / CONFIG) as path:
        rank = check_config(read_json(path))
    with naming_file(Path(dir) / WEIGHTS) as path:
        if not path.exists():
            raise ValueError("there is no such file")
        check_regular(path)
        check_tensors(path, rank, tensor_shapes(config))


def check_config(config):
    """The rank."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}: LORA alone is merged here")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias is {config['bias']!r}: biases that were trained are not merged here")
    start = config.get("init_lora_weights")
    if start not in UNTOUCHED:
        raise ValueError(f"init_lora_weights is {start!r}, which changes the base: not merged here")
    for name, value in config.items():
        if value and name not in HARMLESS and name not in CHECKED:
            raise ValueError(f"{name} is {str(value)[:80]}: plain LoRA alone is merged here")
    check_number(config, "r", int, 2 ** 20)
    check_number(config, "lora_alpha", (int, float), 1e12)
    if not isinstance(config.get("use_rslora", False), (bool, type(None))):
        raise ValueError(f"use_rslora is {config['use_rslora']!r}")
    return config["r"]


def check_tensors(path, rank, matrices):
    """A (rank, in) and B (out, rank) of some of the matrices, {name: shape}."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: (tensor.get_shape(), tensor.get_dtype()) for name, tensor in tensors.items()}
    if not shapes:
        raise ValueError("it holds no tensor")
    for name, (shape, dtype) in shapes.items():
        matrix, _, part = name.removesuffix(".weight").rpartition(".lora_")
        target = matrices.get(f"{matrix.removeprefix(PREFIX)}.weight", [])
        if part not in ("A", "B") or len(target) != 2 or not name.startswith(PREFIX):
            raise ValueError(f"{name} is no LoRA of a matrix of the base")
        other = f"{matrix}.lora_{'B' if part == 'A' else 'A'}.weight"
        if other not in shapes:
            raise ValueError(f"{name} is there without {other}")
        expected = [rank, target[1]] if part == "A" else [target[0], rank]
        if shape != expected or dtype not in FLOATS:
            raise ValueError(f"{name} is {dtype} {shape}, the base and r {rank} ask for {expected}")


def scale_of(config):
    """What B A is multiplied by."""
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)

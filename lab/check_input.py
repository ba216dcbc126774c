"""What every command checks before anything is loaded: one line that names what is wrong with an untrusted file.

check_directory(dir): a model directory; check_tokenizer.py and check_model.py diagnose its parts.
check_example(example, read): a row of a problem set.
check_settings(config): what a user has set of a GRPOConfig, SFTConfig or EvalConfig.
"""

import json
import re
from pathlib import Path

from data.problems import NoAnswer
from lab.check_adapter import is_adapter
from lab.check_model import check_model
from lab.check_tokenizer import check_tokenizer

KINDS, LANGUAGES = ("reasoning", "general", "safety"), ("en", "zh")


def check_directory(dir, template=None, head="ForCausalLM"):
    """A directory with a model and a tokenizer that fit one another. template: as Tokenizer(dir, template) takes it;
    head: check_model's.

    Raises ValueError with the file and the field.
    """
    if is_adapter(dir):
        raise ValueError(f"{dir} holds an adapter and no model: a training of ours leaves the merged one in the folder "
                         "above; another's is merged by lab/adapters.py's load_model, for model.py's save to write")
    check_tokenizer(dir, template)
    check_model(dir, head)
    path = Path(dir) / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    config = json.loads((Path(dir) / "config.json").read_text(encoding="utf-8"))
    ids = [*spec["model"]["vocab"].values(), *(token["id"] for token in spec.get("added_tokens") or [])]
    if max(ids) >= config["vocab_size"]:
        raise ValueError(f"{path} has {max(ids) + 1} tokens, the model {config['vocab_size']}")


def check_example(example: dict, read) -> None:
    """An example as rewards.py takes it. Raises ValueError with the field and its value.

    read(text) -> a value, or None where no rule could read the text: a reference like that must never score
    (open-r1#293), and is a NoAnswer, a ValueError.
    """
    kind, language = example.get("kind", "reasoning"), example.get("language", "en")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} is not one of {', '.join(LANGUAGES)}")
    for field in ("prompt", "answer"):
        if not isinstance(example.get(field), str):
            raise ValueError(f"{field} {example.get(field)!r} is not a string")
    if kind == "reasoning" and read(example["answer"]) is None:
        raise NoAnswer(f"the reference answer {example['answer']!r} is nothing to compare with")
    check_countdown(example)
    wrong, harmful = example.get("wrong", []), example.get("harmful", False)
    if not isinstance(wrong, list) or not all(isinstance(each, str) for each in wrong):
        raise ValueError(f"wrong {wrong!r} is not a list of strings")
    if type(harmful) is not bool:
        raise ValueError(f"harmful {harmful!r} is neither true nor false")
    has_word = re.search(r"[^\W_]", example["answer"])
    if not has_word and (kind == "general" or harmful):
        raise ValueError(f"the reference answer {example['answer']!r} holds no word")


RL_POSITIVE = ("rollouts", "prompts_per_rollout", "minibatches", "inner_epochs", "lr", "temperature", "max_new_tokens",
               "reference_every", "grad_clip", "micro_batch_tokens", "validate_every")
RL_CHOICES = {"mean": ("sequence", "token", "constant"), "scale": ("group", "batch", "none"),
              "dtype": ("float32", "bfloat16", "float16"), "old_logprobs": ("trainer", "sampler")}
SFT_POSITIVE = ("lr", "epochs", "micro_batch_rows", "row_length", "grad_clip")


def check_settings(config) -> None:
    """Raises ValueError with the setting and its value; dataclasses other than these three check themselves."""
    kind = type(config).__name__  # not by import: their scripts import this file
    if kind == "GRPOConfig":
        check_rl(config)
    if kind == "EvalConfig":
        check_evaluation(config)
    if kind == "SFTConfig":
        check_positive(config, SFT_POSITIVE)
        if config.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {config.dtype!r} is none of float32, bfloat16, float16")
        if config.batch_tokens < config.row_length:
            raise ValueError(f"batch_tokens {config.batch_tokens} is less than one row of {config.row_length}")


def check_evaluation(c) -> None:
    check_positive(c, ("samples",))
    if not c.temperature >= 0:
        raise ValueError(f"temperature {c.temperature} must not be negative")
    if not 0 < c.top_p <= 1:
        raise ValueError(f"top_p {c.top_p} is not above 0 and at most 1")


def check_positive(config, names) -> None:
    for name in names:
        if not getattr(config, name) > 0:  # NaN is refused too
            raise ValueError(f"{name} {getattr(config, name)} must be positive")


def check_rl(c) -> None:
    for name, allowed in RL_CHOICES.items():
        if getattr(c, name) not in allowed:
            raise ValueError(f"{name} {getattr(c, name)!r} is none of {', '.join(allowed)}")
    for name, value in vars(c).items():
        if not isinstance(value, str) and not value >= 0:
            raise ValueError(f"{name} {value} must not be negative")
    check_positive(c, RL_POSITIVE)
    if c.group_size < 2:
        raise ValueError(f"group_size {c.group_size}: the advantage compares completions, so it takes 2 or more")
    if c.minibatches > c.prompts_per_rollout * c.group_size:
        raise ValueError(f"minibatches {c.minibatches} exceed the completions of a rollout")
    if c.importance_cap and c.old_logprobs == "sampler":
        raise ValueError(f"importance_cap {c.importance_cap} compares sampler and trainer: "
                         "it needs old_logprobs trainer")


def check_length_buffer(dapo, c) -> None:
    if dapo.length_buffer > c.max_new_tokens:
        raise ValueError(f"length_buffer {dapo.length_buffer} exceeds max_new_tokens {c.max_new_tokens}")


def check_countdown(example: dict) -> None:
    nums, target = example.get("nums", [1]), example.get("target", 1)
    if not isinstance(nums, list) or not nums or not all(type(n) is int and n > 0 for n in nums):
        raise ValueError(f"nums {nums!r} is not a list of positive ints")
    if type(target) is not int or abs(target) > 10 ** 18 or ("nums" in example) != ("target" in example):
        raise ValueError(f"target {example.get('target')!r} is not an int that stands beside nums")

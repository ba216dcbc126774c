"""What every command checks before anything is loaded: one line that names what is wrong with an untrusted file.

check_directory(dir): a model directory; check_tokenizer.py and check_model.py diagnose its parts.
check_example(example, read): a row of a problem set.
"""

import json
import re
from pathlib import Path

from lab.check_model import check_model
from lab.check_tokenizer import check_tokenizer

KINDS, LANGUAGES = ("reasoning", "general", "safety"), ("en", "zh")


def check_directory(dir, template=None):
    """A directory with a model and a tokenizer that fit one another. template: as Tokenizer(dir, template) takes it.

    Raises ValueError with the file and the field.
    """
    check_tokenizer(dir, template)
    check_model(dir)
    path = Path(dir) / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    config = json.loads((Path(dir) / "config.json").read_text(encoding="utf-8"))
    ids = [*spec["model"]["vocab"].values(), *(token["id"] for token in spec.get("added_tokens") or [])]
    if max(ids) >= config["vocab_size"]:
        raise ValueError(f"{path} has {max(ids) + 1} tokens, the model {config['vocab_size']}")


def check_example(example: dict, read) -> None:
    """An example as rewards.py takes it. Raises ValueError with the field and its value.

    read(text) -> a value, or None where no rule could read the text: a reference like that must never score
    (open-r1#293).
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
        raise ValueError(f"the reference answer {example['answer']!r} is not one number or mathematical answer")
    check_countdown(example)
    wrong, harmful = example.get("wrong", []), example.get("harmful", False)
    if not isinstance(wrong, list) or not all(isinstance(each, str) for each in wrong):
        raise ValueError(f"wrong {wrong!r} is not a list of strings")
    if type(harmful) is not bool:
        raise ValueError(f"harmful {harmful!r} is neither true nor false")
    has_word = re.search(r"[^\W_]", example["answer"])
    if not has_word and (kind == "general" or harmful):
        raise ValueError(f"the reference answer {example['answer']!r} holds no word")


def check_countdown(example: dict) -> None:
    nums, target = example.get("nums", [1]), example.get("target", 1)
    if not isinstance(nums, list) or not nums or not all(type(n) is int and n > 0 for n in nums):
        raise ValueError(f"nums {nums!r} is not a list of positive ints")
    if type(target) is not int or abs(target) > 10 ** 18 or ("nums" in example) != ("target" in example):
        raise ValueError(f"target {example.get('target')!r} is not an int that stands beside nums")

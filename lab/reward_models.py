"""Directories of reward models, as transformers' ...ForSequenceClassification has them.

    save_reward_model(model, tokenizer, "summary", dir)
    load_reward_model(RewardModel, dir, device, dtype)     # of variants/reward_model.py
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import rewards
from lab.architectures import hf_tensors, is_deepseek, read_config, save, transformer_of
from lab.check_input import check_directory
from lab.checkpoint import save_directory
from lab.layers import fast_layers
from tokenizer import Tokenizer

HEAD = "ForSequenceClassification"


def summary(completion):
    """The answer block, which helpfulness is judged by [R1 v1 2.3.4]; all of it where there is none."""
    answer = rewards.split(completion)[1]
    return answer or completion


def encoder(tokenizer):
    """encode(example, text) -> the ids that a reward model scores"""
    def encode(example, text):
        return tokenizer.encode_prompt(example["prompt"]) + tokenizer.encode(text) + [tokenizer.end_id]

    return encode


def save_reward_model(model, tokenizer, reads, dir):
    """Writes config.json, weights and tokenizer; reads: "summary" or "response", what of an output the model sees."""
    def write(dir):
        save(model.transformer, dir, tokenizer)
        path = Path(dir) / "config.json"
        config = json.loads(path.read_text())
        config["architectures"] = [name.replace("ForCausalLM", HEAD) for name in config["architectures"]]
        path.write_text(json.dumps(config | {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "pad_token_id": 0,
                                             "label2id": {"LABEL_0": 0}, "reads": reads}, indent=2))
        tensors = load_file(Path(dir) / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = model.score.weight.detach().float().cpu()
        save_file(tensors, Path(dir) / "model.safetensors", {"format": "pt"})
    save_directory(dir, write)


@torch.no_grad()
def load_reward_model(RewardModel, dir, device, dtype):
    """(model, tokenizer, reads) of a directory, a stranger's too, which is checked before anything is loaded."""
    check_directory(dir, head=HEAD)
    config = replace(read_config(dir), tie_word_embeddings=True)  # there is no lm_head
    model = RewardModel(transformer_of(config))
    tensors = {}
    for shard in sorted(Path(dir).glob("model*.safetensors")):
        tensors |= load_file(shard)
    for name, rows in hf_tensors(model.transformer).items():
        rows.copy_(tensors[name])
    model.score.weight.copy_(tensors["score.weight"])
    fast_layers(model.transformer.to(device))
    reads = json.loads((Path(dir) / "config.json").read_text(encoding="utf-8")).get("reads", "summary")
    model.to(device, dtype)
    if is_deepseek(model.transformer):
        for router in model.transformer.routers():
            router.float()
    return model.eval().requires_grad_(False), Tokenizer(dir), reads

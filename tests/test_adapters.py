"""Directories with adapters that come from elsewhere, and options that go with no other: one line names the culprit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import evaluate
import grpo
import model as transformer
import pipeline
import sft
from forked import run_forked
from lab.adapters import load_model, save_adapters
from lab.check_adapter import base_directory, directories
from runs import make, write
from variants import ppo, prime
from variants.lora import adapters, add_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """model/, adapter/ whose base it is, problems.jsonl, test.jsonl and pairs.jsonl"""
    dir = tmp_path_factory.mktemp("files")
    model, _ = make(dir / "model", "llama", "qwen")
    add_adapters(model, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in adapters(model).values():
            part.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    save_adapters(model, dir / "model", dir / "adapter")
    write(dir / "problems.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)])
    write(dir / "test.jsonl", [{"prompt": "What is 50 + 1?", "answer": "51"}])
    write(dir / "pairs.jsonl", [{"prompt": f"{i}?", "completion": f"{i}!" * 9} for i in range(60)])
    return dir


@pytest.fixture
def adapter(files, tmp_path):
    return Path(shutil.copytree(files / "adapter", tmp_path / "adapter"))


def field(**changes):
    def change(dir):
        path = dir / CONFIG
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))
    return change


def tensors(change):
    def rewrite(dir):
        held = load_file(dir / WEIGHTS)
        change(held)
        save_file(held, dir / WEIGHTS)
    return rewrite


def put(name, *shape, dtype=torch.float32):
    return tensors(lambda held: held.update({name: torch.zeros(*shape, dtype=dtype)}))


def a_pipe(name):
    def change(dir):
        (dir / name).unlink()
        os.mkfifo(dir / name)
    return change


def two_that_name_one_another(dir):
    other = shutil.copytree(dir, dir.parent / "other")
    field(base_model_name_or_path=str(dir))(other)
    field(base_model_name_or_path=str(other))(dir)


BROKEN = {
    "no weights": (lambda dir: (dir / WEIGHTS).unlink(), f"{WEIGHTS}: there is no such file"),
    "weights cut off": (lambda dir: os.truncate(dir / WEIGHTS, 100), WEIGHTS),
    "empty weights": (lambda dir: (dir / WEIGHTS).write_bytes(b""), WEIGHTS),
    "no tensor": (tensors(dict.clear), f"{WEIGHTS}: it holds no tensor"),
    "weights are a pipe": (a_pipe(WEIGHTS), f"{WEIGHTS}: not a file"),
    "config is a pipe": (a_pipe(CONFIG), f"{CONFIG}: not a file"),
    "no JSON": (lambda dir: (dir / CONFIG).write_text("{"), CONFIG),
    "no object": (lambda dir: (dir / CONFIG).write_text("[]"), f"{CONFIG}: not a JSON object"),
    "deep": (lambda dir: (dir / CONFIG).write_text("[" * 100_000), CONFIG),
    "no base": (field(base_model_name_or_path="gone"), "base_model_name_or_path None is no directory here"),
    "a hub's name": (field(base_model_name_or_path="Qwen/Qwen2.5-0.5B"), "'Qwen/Qwen2.5-0.5B' is no directory here"),
    "a number as base": (field(base_model_name_or_path=3), "base_model_name_or_path 3 is no directory here"),
    "a base without a model": (lambda dir: field(base_model_name_or_path=str(dir.parent))(dir), "config.json"),
    "its own base": (lambda dir: field(base_model_name_or_path=str(dir))(dir), "leads back to itself"),
    "a circle": (two_that_name_one_another, "leads back to itself"),
    "another method": (field(peft_type="IA3"), "peft_type is 'IA3'"),
    "no method": (field(peft_type="gone"), "peft_type is None"),
    "a bias": (field(bias="lora_only"), "bias is 'lora_only'"),
    "a base that PiSSA changes": (field(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "r 0": (field(r=0), "r is 0"), "r -2": (field(r=-2), "r is -2"), "r true": (field(r=True), "r is True"),
    "r 2.0": (field(r=2.0), "r is 2.0"), "no r": (field(r="gone"), "r is None"),
    "another r": (field(r=3), "the base and r 3 ask for"),
    "alpha as text": (field(lora_alpha="32"), "lora_alpha is '32'"),
    "alpha 0": (field(lora_alpha=0), "lora_alpha is 0"),
    "alpha NaN": (field(lora_alpha=float("nan")), "lora_alpha is nan"),
    "alpha infinite": (field(lora_alpha=float("inf")), "lora_alpha is inf"),
    "rslora as text": (field(use_rslora="no"), "use_rslora is 'no'"),
    "A without B": (tensors(lambda held: held.pop(f"{PREFIX}B.weight")), "lora_A.weight is there without"),
    "B without A": (tensors(lambda held: held.pop(f"{PREFIX}A.weight")), "lora_B.weight is there without"),
    "one row that would be broadcast": (put(f"{PREFIX}B.weight", 1, 2), f"{PREFIX}B.weight is F32 [1, 2]"),
    "another width": (put(f"{PREFIX}A.weight", 2, 31), f"{PREFIX}A.weight is F32 [2, 31]"),
    "turned": (put(f"{PREFIX}A.weight", 32, 2), f"{PREFIX}A.weight is F32 [32, 2]"),
    "integers": (put(f"{PREFIX}A.weight", 2, 32, dtype=torch.int32), "is I32"),
    "an embedding": (put("base_model.model.model.embed_tokens.lora_embedding_A", 2, 99), "embed_tokens.lora_embedding"),
    "a norm": (put("base_model.model.model.norm.lora_A.weight", 2, 32), "norm.lora_A.weight is no LoRA of a matrix"),
    "a matrix of no layer": (put("base_model.model.model.layers.2.mlp.up_proj.lora_A.weight", 2, 32), "layers.2"),
    "a tied head": (put("base_model.model.lm_head.lora_A.weight", 2, 32), "lm_head.lora_A.weight is no LoRA of a"),
    "DoRA's magnitude": (put(f"{PREFIX}magnitude_vector", 32), "lora_magnitude_vector is no LoRA"),
    "a whole matrix": (put("base_model.model.lm_head.weight", 3, 32), "lm_head.weight is no LoRA of a matrix"),
    "another prefix": (put("model.layers.0.self_attn.q_proj.lora_A.weight", 2, 32), "is no LoRA of a matrix"),
}
for name, value in (("use_dora", True), ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}),
                    ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("layer_replication", [[0, 1]]),
                    ("lora_bias", True), ("trainable_token_indices", [1]), ("use_a_method_of_tomorrow", True)):
    BROKEN[name] = field(**{name: value}), f"{name} is "


@pytest.mark.parametrize("how", BROKEN)
def test_an_adapter_that_is_broken_or_no_plain_lora_is_named_before_anything_is_loaded(how, adapter, monkeypatch):
    change, culprit = BROKEN[how]
    change(adapter)
    monkeypatch.setattr("lab.adapters.load", lambda *_, **__: pytest.fail("loaded"))
    for read in (base_directory, load_model):
        with pytest.raises(ValueError) as caught:
            read(adapter)
        said = str(caught.value)
        assert culprit in said and "\n" not in said and str(adapter.parent) in said, said


@pytest.mark.parametrize("change", [
    field(use_rslora=None, use_dora=False, rank_pattern={}, modules_to_save=[], lora_bias=False),
    field(lora_dropout=0.1, task_type=None, target_modules="all-linear", revision="main", bias="none"),
    field(init_lora_weights="gaussian", inference_mode=False, layers_to_transform=[0, 1], peft_version="99"),
    tensors(lambda held: [held.pop(name) for name in list(held) if "layers.1." in name]),
    tensors(lambda held: held.update({name: t.bfloat16() for name, t in held.items()}))])
def test_what_does_not_change_plain_lora_is_taken(change, adapter, files):
    change(adapter)
    assert base_directory(adapter) == str(files / "model")
    held, alone = load_file(adapter / WEIGHTS), transformer.load(files / "model", "cpu")
    merged = load_model(adapter, "cpu")
    for name, before in transformer.hf_tensors(alone).items():
        after, matrix = transformer.hf_tensors(merged)[name], "base_model.model." + name.removesuffix("weight")
        if f"{matrix}lora_A.weight" in held:
            delta = held[f"{matrix}lora_B.weight"].double() @ held[f"{matrix}lora_A.weight"].double()
            torch.testing.assert_close(after.double(), before + 32 / 2 * delta, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(after, before)


def test_rslora_is_scaled_by_the_root_of_the_rank(adapter, files):
    field(use_rslora=True, lora_alpha=3)(adapter)
    held, name = load_file(adapter / WEIGHTS), "model.layers.0.self_attn.q_proj.weight"
    before, after = (transformer.hf_tensors(load(dir, "cpu"))[name] for load, dir in
                     ((transformer.load, files / "model"), (load_model, adapter)))
    delta = held[f"{PREFIX}B.weight"].double() @ held[f"{PREFIX}A.weight"].double()
    torch.testing.assert_close(after.double(), before + 3 / 2 ** 0.5 * delta, atol=1e-6, rtol=1e-6)


def test_an_adapter_on_an_adapter_has_both(adapter, files, tmp_path):
    field(base_model_name_or_path=str(adapter))(Path(shutil.copytree(files / "adapter", tmp_path / "upper")))
    assert [*map(str, directories(tmp_path / "upper"))] == [*map(str, (tmp_path / "upper", adapter, files / "model"))]
    base, one, two = (load(dir, "cpu").layers[0].mlp.down_proj.weight for load, dir in (
        (transformer.load, files / "model"), (load_model, adapter), (load_model, tmp_path / "upper")))
    torch.testing.assert_close(two - one, one - base, atol=1e-6, rtol=1e-5)
    assert not torch.equal(one, base)


# ---- the commands

RL = "--rollouts 1 --prompts-per-rollout 2 --group-size 2 --minibatches 1 --max-new-tokens 4 --dtype float32".split()


def refused(main, *args):
    ended = run_forked(main, argv=["script.py", *map(str, args)])
    assert ended.status == 2 and ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr


def of_model(dir, files):
    return ["--model", dir, "--data", files / "problems.jsonl"]


def commands(dir, files, out):
    """{name: (main, arguments)} of what takes a model, this one."""
    problems, pairs, model = files / "problems.jsonl", files / "pairs.jsonl", files / "model"
    own = ["--train", problems, "--test", files / "test.jsonl", "--out", out]
    return {"evaluate": (evaluate.main, ["--model", dir, "--data", problems]),
            "sft": (sft.main, ["--model", dir, "--data", pairs, "--out", out]),
            "grpo": (grpo.main, ["--model", dir, "--data", problems, "--out", out]),
            "teacher": (distill.main, ["--teacher", dir, "--student", model, "--data", problems, "--out", out]),
            "student": (distill.main, ["--teacher", model, "--student", dir, "--data", problems, "--out", out]),
            "base": (pipeline.main, ["--base", dir, *own]),
            "recipe's student": (pipeline.main, ["--base", model, "--student", dir, *own])}


@pytest.mark.parametrize("name", commands(Path(), Path(), Path()))
def test_each_command_names_a_broken_adapter_in_one_line_and_leaves_no_model(name, adapter, files, tmp_path):
    main, args = commands(adapter, files, tmp_path / "out")[name]
    for how in ("A without B", "a hub's name", "a circle"):
        BROKEN[how][0](adapter)
        said = refused(main, *args)
        assert str(adapter) in said and BROKEN[how][1] in said, said
        shutil.rmtree(adapter)
        shutil.copytree(files / "adapter", adapter)
    assert not [*tmp_path.glob("out/**/*.safetensors")]


@pytest.mark.parametrize("name", ["sft", "grpo", "student", "base"])
def test_an_adapter_is_not_written_over(name, adapter, files, tmp_path):
    shutil.copytree(adapter, tmp_path / "other" / "adapter")
    for out in (adapter, tmp_path / "other") if name != "base" else [adapter]:
        before = {path: path.read_bytes() for path in out.rglob("adapter_*")}
        main, args = commands(adapter, files, out)[name]
        assert f"{out} already holds an adapter" in refused(main, *args)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "LOCK"} == before


def test_a_chat_with_an_adapter_says_what_to_do(files):
    said = refused(transformer.main, files / "adapter", "--prompt", "1 + 1?")
    assert str(files / "adapter") in said and "holds an adapter and no model" in said and "load_model" in said


def test_commands_take_an_adapter_as_a_model(files, tmp_path):
    data, adapter = files / "problems.jsonl", files / "adapter"
    small = "--samples 1 --max-new-tokens 4 --dtype float32".split()
    ended = run_forked(evaluate.main, argv=["evaluate.py", "--model", str(adapter), "--data", str(data), *small])
    assert ended.status == 0 and "reasoning: 40 rows" in ended.stdout, ended.stderr
    small = "--epochs 1 --batch-tokens 2048 --row-length 64 --dtype float32 --lora 2".split()
    args = ["--model", adapter, "--data", files / "pairs.jsonl", "--out", tmp_path / "out", *small]
    ended = run_forked(sft.main, argv=["sft.py", *map(str, args)])
    assert ended.status == 0, ended.stderr
    assert [*map(str, directories(tmp_path / "out" / "adapter"))][1:] == [str(adapter), str(files / "model")]
    merged, written = load_model(tmp_path / "out" / "adapter", "cpu"), transformer.load(tmp_path / "out", "cpu")
    for one, other in zip(merged.parameters(), written.parameters()):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


OPTIONS = {
    "--lora -1": "lora -1 must not be negative", "--lora 33": "lora 33 is above the model's hidden_size 32",
    "--lora 1000000000000": "lora 1000000000000 is above", "--lora 2.5": "--lora", "--lora x": "--lora",
    "--lora 2 --lora-alpha 0": "lora_alpha 0.0 must be positive", "--lora-alpha -1": "lora_alpha -1.0 must be",
    "--lora 2 --lora-alpha nan": "lora_alpha nan must be", "--lora 2 --lora-alpha inf": "lora_alpha inf must be",
    "--lora 2 --offload-optimizer": "offload_optimizer beside lora"}
OF_RL = {"--lora 2 --offload-reference": "offload_reference beside lora", "--cache-tokens 0": "cache_tokens 0 must be",
         "--cache-tokens -5": "cache_tokens -5 must be", "--dtype float8": "dtype 'float8' is none of"}


@pytest.mark.parametrize("options", OPTIONS | OF_RL)
def test_options_that_are_out_of_range_or_go_with_no_other_are_refused_by_each_script(options, files, tmp_path):
    problems, pairs = files / "problems.jsonl", files / "pairs.jsonl"
    model, out = ["--model", files / "model"], ["--out", tmp_path / "out"]
    scripts = [(grpo.main, [*model, "--data", problems, *RL])]
    if options in OPTIONS:
        scripts += [(sft.main, [*model, "--data", pairs])]
    for main, args in scripts:
        said = refused(main, *args, *out, *options.split())
        assert (OPTIONS | OF_RL)[options] in said, said
        assert not [*tmp_path.glob("out/*")]


@pytest.mark.parametrize("main", [ppo.main, prime.main])
def test_a_critic_and_a_reward_model_step_on_the_gpu(main, files, tmp_path):
    said = refused(main, *of_model(files / "model", files), *RL, "--out", tmp_path / "out", "--offload-optimizer")
    assert "--offload-optimizer" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, culprit", [
    ("--lora -1", "lora -1"), ("--lora 2 --lora-alpha 0", "lora_alpha 0.0"), ("--cache-tokens 0", "cache_tokens 0"),
    ("--lora 2 --offload-optimizer", "offload_optimizer beside lora"),
    ("--lora 2 --offload-reference", "offload_reference beside lora"), ("--lora 33", "lora 33 is above"),
    ("--offload-optimizer --compare", "--offload-optimizer does not go with --compare")])
def test_the_recipe_refuses_them_too(options, culprit, files, tmp_path):
    said = refused(pipeline.main, "--base", files / "model", "--train", files / "problems.jsonl", "--test",
                   files / "test.jsonl", "--out", tmp_path / "out", "--template", "none", "--samples", "1",
                   "--max-new-tokens", "4", *options.split())
    assert culprit in said, said


@pytest.mark.parametrize("option", ["--lora 2", "--offload-optimizer"])
def test_the_mini_world_is_trained_in_full(option, tmp_path):
    said = refused(pipeline.main, "--preset", "smoke", "--out", tmp_path / "out", *option.split())
    assert f"{option.split()[0]} goes with --base" in said


def test_another_base_below_an_adapter_is_no_resumption(files, adapter, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    field(base_model_name_or_path=str(tmp_path / "model"))(adapter)
    args = [*of_model(adapter, files), *RL, "--out", tmp_path / "out", "--keep-state"]
    ended = run_forked(grpo.main, argv=["grpo.py", *map(str, args)])
    assert ended.status == 0, ended.stderr
    model, tokenizer = make(tmp_path / "model", "llama", "qwen")
    with torch.no_grad():
        model.norm.weight.mul_(2)
    transformer.save(model, tmp_path / "model", tokenizer)
    said = refused(grpo.main, *args, "--rollouts", "2")
    assert "content of model was" in said

"""What the formula says that a training takes of memory, beside bytes that are counted."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
import model as transformer
import sft
from counted import Counted
from lab import graphs
from lab.command import GPU_TOKENS
from lab.graphs import Decoder
from lab.layers import fast_layers
from lab.memory import (LOGITS_AT_ONCE, MODELS, SHARE, Defaults, Memory, best_remedy, commands, fitting, held, needed,
                        of_a_lot, report, tensors, total, with_options)
from lab.scripts import FOR_PROBLEM_SETS
from lab.trainee import Trainee
from model import Config, Transformer
from test_pretend_cuda import on_the_gpu
from test_scripts import SMALL, call, files  # noqa: F401  a fixture

ROOT = Path(__file__).parent.parent

# the parameters are nearly all: 3.3M beside rows of 8 tokens
SIZES = Config(vocab_size=500, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
               num_key_value_heads=2, max_position_embeddings=64, model_type="qwen2")
KINDS = {"full": Memory(), "lora": Memory(lora=32), "offload": Memory(offload_optimizer=True)}
RL = grpo.GRPOConfig(rollouts=2, prompts_per_rollout=2, group_size=2, minibatches=2, max_new_tokens=4)
ROWS = sft.SFTConfig(epochs=2, batch_tokens=16, micro_batch_rows=1, row_length=8)


@pytest.fixture(scope="module")
def dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    transformer.save(Transformer(SIZES).init_weights(torch.Generator().manual_seed(0)), path)
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_from_the_sizes(kind, tied):
    config = replace(SIZES, model_type=kind, tie_word_embeddings=tied, head_dim=32)
    with torch.device("meta"):
        model = Transformer(config)
    assert sorted(tensors(config)) == sorted(p.numel() for p in model.parameters())


def answers(model, prompts, n, max_new_tokens, device="cpu", **_):
    """Some ids, as `generate` gives them."""
    count = len(prompts) * n
    ids = torch.randint(1, 500, (count, max_new_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    return ids, torch.full((count,), max_new_tokens, device=device), torch.full(ids.shape, -6.0, device=device)


def trained(dir, memory, config, at):
    """Runs train; calls at(moment) while it samples and just before each of the optimizer's steps."""
    model = fast_layers(transformer.load(dir, "cpu", memory.dtype(config.dtype)))
    trainee = Trainee(model, memory, dir)
    is_rl = hasattr(config, "group_size")
    adam = grpo.adam if is_rl else sft.adamw

    def make_optimizer(parameters, **settings):
        made = trainee.optimizer(adam).get("make_optimizer", adam)(parameters, **settings)
        made.register_step_pre_hook(lambda *_: at("update"))
        return made

    def generate(*args, **settings):
        at("sampling")
        return answers(*args, **settings)

    if is_rl:
        grpo.train(trainee.model, [[1, 2, 3]] * 2, encode=list, decode=str, generate=generate, end_ids=[0],
                   rewards={"length": lambda text, example: len(text)}, config=config, make_optimizer=make_optimizer)
    else:
        sft.train(trainee.model, [([1, 2, 3, 4, 5, 6, 7, 8], 2)] * 4, config, make_optimizer=make_optimizer)


def counted(dir, memory, config):
    """{moment: bytes}, once Adam has its moments."""
    found = {}
    with Counted() as live:
        trained(dir, memory, config, at=lambda moment: found.update({moment: live.now["cpu"]}))
    return found


def resident(memory, config):
    """By the formula, on a CPU: {moment: bytes}."""
    terms = held(SIZES, memory, config)
    sums = dict(zip(("sampling", "scoring", "update", "host"), map(sum, zip(*terms.values()))))
    return {moment: sums[moment] + sums["host"] for moment in ("sampling", "update")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_holds_what_the_formula_says(dir, kind, dtype, beta):
    config = replace(RL, dtype=dtype, beta=beta)
    assert counted(dir, KINDS[kind], config) == pytest.approx(resident(KINDS[kind], config), rel=0.002)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_sft_holds_what_the_formula_says(dir, kind, dtype):
    config = replace(ROWS, dtype=dtype)
    found = counted(dir, KINDS[kind], config)
    assert found == pytest.approx({"update": resident(KINDS[kind], config)["update"]}, rel=0.002)


# ------------------------------------------------------------------------------------------- with a card

def on_a_card(dir, config):
    """In a process with a pretended GPU: what lies there, and what in the CPU's memory, before the CPU's step."""
    torch.Tensor.pin_memory = lambda tensor: tensor  # there is no card whose driver could pin it
    memory = Memory(offload_optimizer=True)
    model = fast_layers(transformer.load(dir, "cuda", memory.dtype(config.dtype)))
    trainee, found = Trainee(model, memory, dir), []

    def make_optimizer(parameters, **settings):
        optimizer = trainee.optimizer(grpo.adam)["make_optimizer"](parameters, **settings)
        optimizer.register_step_pre_hook(lambda *_: found.append(dict(live.now)))
        return optimizer

    known = [*model.parameters(), *model.buffers(), *trainee.masters.parameters(), *trainee.masters.buffers()]
    with Counted(*known) as live:
        grpo.train(trainee.model, [[1, 2, 3]] * 2, encode=list, decode=str, generate=partial(answers, device="cuda"),
                   end_ids=[0], rewards={"length": lambda text, example: len(text)}, config=config,
                   make_optimizer=make_optimizer)
    terms = held(SIZES, memory, config).values()
    card = {"cuda": sum(count.update for count in terms), "cpu": sum(count.host for count in terms)}
    # a copy's rotary angles count as the CPU's until they are used
    assert found[-1] == pytest.approx(card, rel=0.01), (found[-1], card)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_offloaded_optimizers_parts_lie_where_the_formula_says(dir, beta):
    on_the_gpu(on_a_card, dir, replace(RL, dtype="bfloat16", beta=beta))


# ------------------------------------------------------------------------------------------- heights

# tokens enough to count, beside a vocabulary whose logits count
BUSY = replace(SIZES, vocab_size=2000, hidden_size=64, intermediate_size=256, max_position_embeddings=128)


@pytest.fixture
def busy(tmp_path):
    transformer.save(Transformer(BUSY).init_weights(torch.Generator().manual_seed(0)), tmp_path)

    def make(memory):
        """(Trainee, all of its tensors)"""
        trainee = Trainee(fast_layers(transformer.load(tmp_path, "cpu", memory.dtype("bfloat16"))), memory, tmp_path)
        models = [model for model in (trainee.model, trainee.masters) if model is not None]
        return trainee, [t for model in models for t in (*model.parameters(), *model.buffers())]
    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_no_height_of_grpo_is_above_the_formulas_and_none_far_below(kind, recompute, busy):
    memory, heights = replace(KINDS[kind], recompute=recompute), {}
    config = grpo.GRPOConfig(rollouts=2, prompts_per_rollout=4, group_size=4, minibatches=2, max_new_tokens=24,
                             micro_batch_tokens=150, beta=0.1, dtype="bfloat16")
    trainee, known = busy(memory)

    def reached(moment):
        heights[moment] = max(live.peak, heights.get(moment, 0))
        live.peak = 0

    def generate(*args, **settings):
        reached("others")
        result = transformer.generate(*args, **settings)
        reached("sampling")
        return result

    with Counted(*known) as live:
        grpo.train(trainee.model, [[1, 2, 3, 4, 5, 6]] * 4, encode=list, decode=str, generate=generate, end_ids=[],
                   rewards={"length": lambda text, example: len(text)}, config=config, **trainee.optimizer(grpo.adam))
        reached("others")
    *device, host = map(sum, zip(*needed(BUSY, memory, config, prompt=6).values()))
    share = {"sampling": heights["sampling"] / (device[0] + host),
             "others": heights["others"] / (max(device[1:]) + host)}
    assert all(0.7 < part <= 1 for part in share.values()), share


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_no_height_of_sft_is_above_the_formulas_and_none_far_below(kind, recompute, busy):
    memory = replace(KINDS[kind], recompute=recompute)
    trainee, known = busy(memory)
    config = sft.SFTConfig(epochs=1, batch_tokens=256, micro_batch_rows=4, row_length=32)
    with Counted(*known) as live:
        sft.train(trainee.model, [([1, 2, 3, 4] * 8, 0)] * 16, config, **trainee.optimizer(sft.adamw))
    share = live.peak / sum(total(needed(BUSY, memory, config)))
    assert 0.7 < share <= 1, share


def test_what_a_card_took_is_below_the_formula_and_not_far():
    """GRPO of 64 x (155 + 300) tokens, recomputed, by tests/gpu.py on an H200. Full training has changed since."""
    config = replace(Defaults(), prompts_per_rollout=8, group_size=8, max_new_tokens=300, micro_batch_tokens=4096)
    ran = json.loads((ROOT / "results" / "gpu" / "NVIDIA_H200.json").read_text())["cards"]
    hows = {"Adam on the CPU": Memory(True, offload_optimizer=True), "LoRA 32": Memory(True, lora=32)}
    compared = 0
    for name, how, _ in (card["name"].split(", ") for card in ran):
        if how in hows:
            card, = (card for card in ran if card["name"] == f"{name}, {how}, bfloat16")
            sizes = SimpleNamespace(**vars(MODELS[name]) | {"max_position_embeddings": 2048})
            *device, _ = map(sum, zip(*needed(sizes, hows[how], config, prompt=155, card=150e9).values()))
            assert 0 < device[0] / 1e9 - card["sampling_GB"] < 1.2, (name, how)
            assert 0 < max(device[1:]) / 1e9 - card["updates_GB"] < 1.2, (name, how)
            compared += 1
    assert compared >= 7


def test_a_recorded_decoder_copies_the_adapters_alone_and_shares_their_base(dir):
    model = Trainee(transformer.load(dir, "cpu", torch.bfloat16), Memory(lora=8), dir).model
    with Counted(*model.parameters(), *model.buffers()) as live:
        before = live.peak
        decoder = Decoder(model.eval(), 4, 64, None)
    four_rows = replace(RL, dtype="bfloat16", group_size=4, prompts_per_rollout=1)
    terms = of_a_lot(SIZES, Memory(lora=8), four_rows, prompt=60, card=80e9)
    made = live.peak - before
    assert made == pytest.approx(terms["recorded decoder and its cache"].sampling, rel=0.02)
    assert decoder.bytes() <= made


# ------------------------------------------------------------------------------------------- what is printed

@pytest.mark.parametrize("free, line", [
    (80, "of 80.00 that are free"), (20, "of 20.00 that are free: does not fit; most brings --recompute, ")])
def test_the_report_says_what_is_free_and_what_brings_most(free, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 10 ** 9, 24 * 10 ** 9))
    config = grpo.GRPOConfig(max_new_tokens=512, micro_batch_tokens=16384)
    said = report(MODELS["Qwen2.5-0.5B"], Memory(), config)
    highest, _ = total(needed(MODELS["Qwen2.5-0.5B"], Memory(), config, card=24e9))
    assert f"GPU: {highest / 1e9:.2f} GB, {line}" in said, said


def test_an_option_that_brings_most_brings_what_the_line_says():
    config, sizes = grpo.GRPOConfig(micro_batch_tokens=16384), MODELS["Qwen2.5-1.5B"]
    for memory in (Memory(), Memory(recompute=True), Memory(lora=32), Memory(offload_optimizer=True)):
        options, less = best_remedy(sizes, memory, config, 256, 80e9)
        before, after = (total(needed(sizes, *both, card=80e9))[0]
                         for both in ((memory, config), with_options(memory, config, options)))
        assert before - after == less > 0


@pytest.mark.parametrize("main, data, options, told", [
    (grpo.main, "problems.jsonl", SMALL + ["--lora", "4"], ["weights", "adapters", "sampling", "scoring", "update"]),
    (sft.main, "pairs.jsonl", ["--epochs", "1", "--dtype", "float32"], ["weights", "update"])])
def test_memory_is_told_before_the_training_which_goes_on(main, data, options, told, files, tmp_path):
    ended = call(main, files, tmp_path / "out", "--memory", data=data, small=options)
    assert ended.status == 0 and (tmp_path / "out" / "model.safetensors").exists(), ended.stderr
    before = ended.stdout.partition("float32 on cpu")[0]
    assert all(word in before for word in told) and "that are free" in before, before


@pytest.mark.parametrize("page, table", [("speed_and_memory", fitting), ("own_model", commands)])
def test_the_documents_tables_are_what_the_command_prints(page, table):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for line in table():
        assert line.removesuffix(" |") in text, f"python -m lab.memory prints {line}"


def test_the_tables_are_of_grpos_defaults():
    on_a_gpu = grpo.GRPOConfig(max_new_tokens=FOR_PROBLEM_SETS, micro_batch_tokens=GPU_TOKENS)
    assert vars(Defaults()).items() <= vars(on_a_gpu).items()


def test_the_pieces_of_logits_are_those_of_the_trainings():
    assert grpo.LOGITS_AT_ONCE == sft.LOGITS_AT_ONCE == LOGITS_AT_ONCE[False]
    assert SHARE == graphs.SHARE

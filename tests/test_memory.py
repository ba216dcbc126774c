"""What the formula says that a training takes of memory, beside bytes that are counted."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import grpo
import model as transformer
import sft
from counted import Counted
from lab.layers import fast_layers
from lab.memory import Memory, held, tensors
from lab.trainee import Trainee
from model import Config, Transformer
from test_pretend_cuda import on_the_gpu

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
    while_sampling = sums["sampling"] + sums["host"] - terms["gradients"].host
    return {"sampling": while_sampling, "update": sums["update"] + sums["host"]}


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
    assert found[-1] == pytest.approx(card, rel=0.002), (found[-1], card)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_offloaded_optimizers_parts_lie_where_the_formula_says(dir, beta):
    on_the_gpu(on_a_card, dir, replace(RL, dtype="bfloat16", beta=beta))


# ------------------------------------------------------------------------------------------- heights

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_no_height_is_above_the_formulas_and_none_far_below(kind, recompute, tmp_path):
    """On a CPU, with tokens enough to count, beside a vocabulary whose logits count."""
    sizes = replace(SIZES, vocab_size=2000, hidden_size=64, intermediate_size=256, max_position_embeddings=128)
    transformer.save(Transformer(sizes).init_weights(torch.Generator().manual_seed(0)), tmp_path)
    memory, heights = replace(KINDS[kind], recompute=recompute), {}
    config = grpo.GRPOConfig(rollouts=2, prompts_per_rollout=4, group_size=4, minibatches=2, max_new_tokens=24,
                             micro_batch_tokens=150, beta=0.1, dtype="bfloat16")
    model = fast_layers(transformer.load(tmp_path, "cpu", memory.dtype(config.dtype)))
    trainee = Trainee(model, memory, tmp_path)

    def reached(moment):
        heights[moment] = max(live.peak, heights.get(moment, 0))
        live.peak = 0

    def generate(*args, **settings):
        reached("others")
        result = transformer.generate(*args, **settings)
        reached("sampling")
        return result

    known = [*model.parameters(), *model.buffers()]
    if trainee.masters is not None:
        known += [*trainee.masters.parameters(), *trainee.masters.buffers()]
    with Counted(*known) as live:
        grpo.train(trainee.model, [[1, 2, 3, 4, 5, 6]] * 4, encode=list, decode=str, generate=generate, end_ids=[],
                   rewards={"length": lambda text, example: len(text)}, config=config, **trainee.optimizer(grpo.adam))
        reached("others")
    *device, host = map(sum, zip(*needed(sizes, memory, config, prompt=6).values()))
    share = {"sampling": heights["sampling"] / (device[0] + host), "others": heights["others"] / (max(device[1:]) + host)}
    assert all(0.7 < part <= 1 for part in share.values()), share

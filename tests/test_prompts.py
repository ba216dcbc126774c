"""A prompt that is computed once for all its completions gives what whole rows give."""

import copy
from dataclasses import replace

import pytest
import torch

import grpo
from grpo import GRPOConfig
from lab import layers
from lab.layers import fast_layers, recompute
from lab.prompts import SharingTransformer
from model import Transformer
from test_model import tiny

PROMPTS = [list(range(22)), [8], list(range(5, 22)), list(range(10, 31))]  # 22, 1, 17 and 21 tokens
G = 5


def rollout(prompts=PROMPTS, seed=0):
    """Completions of 1 to 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (len(prompts) * G,), generator=generator)
    ids = torch.randint(32, (len(prompts) * G, 12), generator=generator)

    def generate(model, prompts, **_):
        return ids, lengths, torch.full(ids.shape, -3.0)

    config = GRPOConfig(group_size=G)
    r = grpo.rollout(None, prompts, encode=list, decode=str, generate=generate, end_ids=[], weights={}, config=config,
                     rewards={"one": lambda *_: 1.0}, generator=None)
    r.old_logprobs = r.sampled_logprobs
    r.ref_logprobs = r.sampled_logprobs + 0.1
    return r


def update(model, r, rows, config):
    """The gradient, and the metrics, of one update."""
    gradients = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.step = lambda: gradients.extend(p.grad.flatten().clone() for p in model.parameters())
    advantages = torch.randn(r.mask.shape, generator=torch.Generator().manual_seed(1))
    metrics = grpo.update(model, optimizer, r, rows, advantages, config)
    return torch.cat(gradients), metrics


def config_of(**more):
    return GRPOConfig(dtype="float32", beta=0.1, grad_clip=1e9, **more)


def plain_and_sharing(dtype=torch.float64, **more):
    plain = tiny(**more).to(dtype)
    sharing = fast_layers(copy.deepcopy(plain))
    assert type(plain) is Transformer and type(sharing) is SharingTransformer
    return plain, sharing


@pytest.mark.parametrize("tokens", [90, 150, 10 ** 6], ids="{} a micro-batch".format)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("twice", [False, True], ids=["", "recomputed"])
def test_an_update_on_any_rows_of_a_rollout_is_that_of_whole_rows(kind, tokens, twice):
    plain, sharing = plain_and_sharing(model_type=kind)
    if twice:
        recompute(sharing)
    r, rows = rollout(), [17, 0, 3, 12, 5, 14, 4, 11, 16, 1, 18, 2]
    config = config_of(micro_batch_tokens=tokens)
    assert sharing.read_prompts(r, rows, config) is not None
    expected, metrics = update(plain, r, rows, config)
    gradient, ours = update(sharing, r, rows, config)
    assert (gradient - expected).norm() < 1e-6 * expected.norm()
    assert ours == pytest.approx(metrics, rel=1e-6)


def test_the_scores_of_a_rollout_are_those_of_whole_rows():
    plain, sharing = plain_and_sharing()
    r = rollout()
    expected, scores = (grpo.all_logprobs(model, r, config_of()) for model in (plain, sharing))
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-6)  # all_logprobs keeps float32
    assert scores[~r.mask].abs().max() == 0 < scores[r.mask].abs().min()


def positions_of(model, run):
    """How many positions the model's layers compute while it runs."""
    counts = []
    handle = model.layers[0].register_forward_hook(lambda layer, inputs, output: counts.append(output[..., 0].numel()))
    run()
    handle.remove()
    return sum(counts)


def test_an_update_computes_each_of_its_prompts_once_whatever_the_micro_batches():
    _, model = plain_and_sharing()
    r = rollout([[1, 2, 3, 4, 5, 6, 7]] * 4)
    r.lengths, r.ends = r.lengths.fill_(1), [8] * 20  # completions of one token: the last of the prompt predicts it
    r.mask = torch.zeros_like(r.mask).index_fill(1, torch.tensor([6]), True)
    for rows, prompts in ([0, 1, 2, 3, 4], 1), ([0, 1, 5, 6, 7, 10, 15, 16, 17, 18], 4):
        for budget in 24, 40, 1000:
            count = positions_of(model, lambda: update(model, r, rows, config_of(micro_batch_tokens=budget)))
            assert count == 6 * prompts + len(rows)
    assert positions_of(model, lambda: grpo.all_logprobs(model, r, config_of(micro_batch_tokens=64))) == 6 * 4 + 20


def test_whole_rows_are_computed_where_little_is_spared_or_the_prompts_are_more_than_a_micro_batch():
    _, model = plain_and_sharing()
    r, rows = rollout(), list(range(20))
    assert model.read_prompts(r, rows, config_of(micro_batch_tokens=84)) is not None  # 4 prompts of up to 22 - 1 tokens
    assert model.read_prompts(r, rows, config_of(micro_batch_tokens=83)) is None
    assert model.read_prompts(r, [0, 1, 2], config_of(micro_batch_tokens=21)) is not None  # 1 of them
    assert model.read_prompts(r, [0, 10, 15], config_of()) is None  # each has a prompt of its own
    assert model.read_prompts(rollout([[1], [2]]), list(range(10)), config_of()) is None  # of one token
    r.ends, r.lengths = [27] * 5, torch.full((5,), 5)  # of 27 tokens each 21 are the prompt's, less its last
    for count, shared in (1, False), (2, True):
        assert (model.read_prompts(r, list(range(count)), config_of()) is not None) == shared
    r.ends, r.lengths = [42] * 5, torch.full((5,), 20)  # 21 of 42: of 3 rows 42 of 126 are spared, of 2 rows 21 of 84
    for count, shared in (2, False), (3, True):
        assert (model.read_prompts(r, list(range(count)), config_of()) is not None) == shared
    plain, sharing = plain_and_sharing()
    r = rollout()
    expected, gradient = (update(m, r, rows, config_of(micro_batch_tokens=83))[0] for m in (plain, sharing))
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


def test_in_bfloat16_the_gradient_is_as_near_to_that_of_float32_as_by_whole_rows():
    plain, sharing = plain_and_sharing(torch.float32, hidden_size=64, intermediate_size=128)
    r, rows, config = rollout(), list(range(20)), config_of()
    exact, _ = update(plain, r, rows, config)
    fast = copy.deepcopy(sharing)
    layers.replace(fast, {SharingTransformer: Transformer})
    whole, shared = (update(model, r, rows, replace(config, dtype="bfloat16"))[0] for model in (fast, sharing))
    assert (shared - exact).norm() < 1.1 * (whole - exact).norm() < 0.2 * exact.norm()


def test_the_copies_that_score_share_prompts_too():
    _, model = plain_and_sharing(torch.float32)
    assert type(grpo.cast_copy(model, "bfloat16")) is SharingTransformer

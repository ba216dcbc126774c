"""The loss against formulas by hand, every sequence of a tiny policy and TRL; the rollout and the loop on tiny models.

A defect of the loss or the loop that is known from other implementations has a test here that fails when it is put in.
"""

import importlib.util
import itertools
import json
import math
import random
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from lab import checkpoint
from lab.check_input import check_settings
from lab.command import fast_dtype
import grpo
import model as model_module
from grpo import GRPOConfig, group_advantages, kl_divergence, policy_loss, token_logprobs
from sevens import END, MANY_ENDS, share_of_sevens, train_on_sevens as run

ROOT = Path(__file__).parent.parent

MEANS = ("sequence", "token", "constant")


# ------------------------------------------------------------------------------------------- the advantages

def test_an_advantage_is_the_reward_minus_the_groups_mean_over_its_sample_std():
    got = group_advantages(torch.tensor([[1., 0., 0., 1.], [5., 5., 5., 9.]]))
    assert got[0].tolist() == pytest.approx([a * 0.5 / (math.sqrt(1 / 3) + 1e-4) for a in (1, -1, -1, 1)])
    assert got[1].tolist() == pytest.approx([a / (2 + 1e-4) for a in (-1, -1, -1, 3)])


def test_without_the_std_an_advantage_is_the_reward_minus_the_groups_mean():
    assert group_advantages(torch.tensor([[1., 0., 0., 1.], [5., 5., 5., 9.]]), scale="none").tolist() == \
        [[.5, -.5, -.5, .5], [-1, -1, -1, 3]]


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_equal_rewards_has_advantages_of_zero(scale, leave_one_out):
    for reward in (1.25, 0.1, 1.1, 100.1):  # of which the mean of seven is another float than most of them
        assert group_advantages(torch.full((2, 7), reward), scale, leave_one_out).tolist() == [[0.] * 7] * 2


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_constant_added_to_a_groups_rewards_changes_no_advantage(scale, leave_one_out):
    rewards = torch.tensor([[1., 0., 2., 1.], [0., 0., 3., 1.]])
    shifted = rewards + torch.tensor([[8.], [-4.]])
    assert torch.equal(*(group_advantages(x, scale, leave_one_out) for x in (rewards, shifted)))


def test_leave_one_out_compares_a_completion_with_the_mean_of_the_others_of_its_group():
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, group in zip(group_advantages(rewards, scale="none", leave_one_out=True).tolist(), rewards.tolist()):
        for i, advantage in enumerate(row):
            others = [reward for j, reward in enumerate(group) if j != i]
            assert advantage == pytest.approx(group[i] - sum(others) / len(others))


# ------------------------------------------------------------------------------------------- the probabilities

@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
def test_the_sampler_and_the_scorer_share_one_distribution(temperature):
    logits = torch.randn(4, 9, 50, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(1))
    drawn_from = model_module.nucleus(logits.flatten(0, 1), temperature, 1.0)[0].log().view(4, 9, 50)
    torch.testing.assert_close(token_logprobs(logits, ids, temperature), drawn_from.gather(2, ids[:, :, None])[:, :, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_generate_says_of_its_samples_is_what_the_scorer_says(tiny, temperature):
    model = sharp(tiny)
    config = small(temperature=temperature, max_new_tokens=9)
    r = roll(model, config, prompts=[[1, 2], [4, 5, 6, 7], [9]], generate=model_module.generate, end_ids=MANY_ENDS)
    assert len(set(r.lengths.tolist())) > 2 and r.finished.any()
    torch.testing.assert_close(r.sampled_logprobs, grpo.all_logprobs(model, r, config), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_log_probabilities_with_the_cache_are_those_of_one_row_alone_without_it(tiny, temperature):
    model, prompts = sharp(tiny), [[1, 2], [4, 5, 6, 7], [9]]
    ids, lengths, logprobs = model_module.generate(model, prompts, n=3, max_new_tokens=9, temperature=temperature,
                                                   end_ids=MANY_ENDS, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths.tolist()):
        prompt, completion = prompts[row // 3], ids[row, :length]
        whole = torch.tensor([prompt + completion.tolist()])
        scores = token_logprobs(model(whole)[:, len(prompt) - 1:-1], completion[None], temperature)[0]
        torch.testing.assert_close(scores, logprobs[row, :length], atol=1e-5, rtol=0)
        by_itself = (model(whole)[0, len(prompt) - 1:-1] / temperature).log_softmax(-1)
        torch.testing.assert_close(scores, by_itself[range(length), completion])


def test_token_logprobs_do_the_softmax_in_fp32_even_for_bf16_logits():
    logits = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    exact = logits.double().log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
    torch.testing.assert_close(token_logprobs(logits, ids).double(), exact, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- the KL

def test_kl_divergence_is_k3():
    a, b = torch.tensor([[-1., -2., -3.]]), torch.tensor([[-1.5, -2., -0.5]])
    by_hand = [math.exp(d) - d - 1 for d in (-0.5, 0.0, 2.5)]
    assert kl_divergence(a, b)[0].tolist() == pytest.approx(by_hand)


def test_below_a_log_ratio_of_ten_k3_is_not_clamped_and_above_it_has_no_gradient():
    logprobs = torch.tensor([[0., 0., 0., 0.]], dtype=torch.float64, requires_grad=True)
    kl = kl_divergence(logprobs, torch.tensor([[-50., 9.9, 10.1, 50.]], dtype=torch.float64))
    kl.sum().backward()
    assert kl[0].tolist() == pytest.approx([49, math.exp(9.9) - 10.9, math.exp(10) - 11, math.exp(10) - 11])
    assert logprobs.grad[0].tolist() == pytest.approx([1, 1 - math.exp(9.9), 0, 0])


@pytest.mark.parametrize("difference", [-1000., -89., 89., 1000.])
def test_kl_and_loss_are_finite_in_value_and_gradient_at_any_log_ratio(difference):
    for other in ("old", "ref"):
        logprobs = torch.full((1, 3), -1.0, requires_grad=True)
        near, far = torch.full((1, 3), -1.5), torch.full((1, 3), -1.0 + difference)
        loss, metrics = policy_loss(logprobs, far if other == "old" else near, far if other == "ref" else near,
                                    torch.tensor([-1.0]), torch.ones(1, 3), beta=1.0)
        loss.backward()
        assert (
            math.isfinite(loss.item()) and logprobs.grad.isfinite().all() and all(map(math.isfinite, metrics.values()))
        )
        assert logprobs.grad.square().sum().isfinite()


# ------------------------------------------------------------------------------------------- the loss

def ratio_loss(ratios, advantage, **settings):
    """Loss and gradient of each token alone: rows of one token with this ratio and this advantage."""
    logprobs = torch.tensor(ratios, dtype=torch.float64).log()[:, None].requires_grad_()
    loss, metrics = policy_loss(logprobs, torch.zeros(len(ratios), 1, dtype=torch.float64), None,
                                torch.full((len(ratios),), advantage, dtype=torch.float64),
                                torch.ones(len(ratios), 1), normaliser=1, **settings)
    loss.backward()
    return loss.item(), logprobs.grad[:, 0].tolist(), metrics


@pytest.mark.parametrize("ratio, advantage, objective, gradient", [
    # PPO's pessimistic bound: only what would go on improving is cut, and with it its gradient
    (0.5, +1, 0.5, 0.5), (0.9, +1, 0.9, 0.9), (1.1, +1, 1.1, 1.1), (1.25, +1, 1.25, 1.25), (2.0, +1, 1.3, 0.0),
    (0.5, -1, -0.8, 0.0), (0.9, -1, -0.9, -0.9), (1.1, -1, -1.1, -1.1), (2.0, -1, -2.0, -2.0), (50., -1, -50., -50.),
    (0.01, +2, 0.02, 0.02), (0.01, -2, -1.6, 0.0), (50., +2, 2.6, 0.0)])
def test_the_clip_takes_the_lesser_objective_for_both_signs_of_the_advantage(ratio, advantage, objective, gradient):
    loss, grad, metrics = ratio_loss([ratio], advantage, clip_low=0.2, clip_high=0.3)
    assert -loss == pytest.approx(objective) and -grad[0] == pytest.approx(gradient)
    assert metrics["clip_fraction"] == (gradient == 0) and metrics["ratio"] == pytest.approx(ratio)


def test_with_r1s_epsilon_of_ten_only_ratios_above_eleven_are_clipped():
    ratios = [0.001, 0.5, 2.0, 10.9, 11.1, 100.0]
    assert ratio_loss(ratios, -1.0, clip_low=10, clip_high=10)[2]["clip_fraction"] == 0
    _, grad, metrics = ratio_loss(ratios, 1.0, clip_low=10, clip_high=10)
    assert [g != 0 for g in grad] == [True] * 4 + [False] * 2 and metrics["clip_fraction"] == pytest.approx(2 / 6)


def by_hand(logprobs, old, ref, advantages, mask, clip_low, clip_high, beta, mean, normaliser):
    """DeepSeekMath eq. 3 and 4 as two loops over plain floats."""
    sequences, tokens, kls, clips, ratios = [], [], [], [], []
    for i in range(len(mask)):
        values = []
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            a = advantages[i][t] if isinstance(advantages[i], list) else advantages[i]
            ratio = math.exp(logprobs[i][t] - old[i][t])
            clipped = max(1 - clip_low, min(1 + clip_high, ratio))
            kl = 0.0 if ref is None else math.exp(ref[i][t] - logprobs[i][t]) - (ref[i][t] - logprobs[i][t]) - 1
            values.append(min(ratio * a, clipped * a) - beta * kl)
            kls.append(kl), ratios.append(ratio), clips.append(clipped * a < ratio * a)
        tokens += values
        sequences.append(sum(values) / len(values) if values else 0.0)
    total, own = {"token": (sum(tokens), len(tokens)), "sequence": (sum(sequences), len(mask)),
                  "constant": (sum(tokens), len(mask) * len(mask[0]))}[mean]
    return -total / (normaliser or own), {"kl": sum(kls) / len(kls), "clip_fraction": sum(clips) / len(clips),
                                          "ratio": sum(ratios) / len(ratios)}


def ragged(seed, per_token=False, rows=5, width=7):
    """Random log-probabilities far from one another, advantages of both signs, masks with holes, one row empty."""
    rng = random.Random(seed)
    table = lambda low, high: [[rng.uniform(low, high) for _ in range(width)] for _ in range(rows)]
    logprobs, ref = table(-6, 0), table(-6, 0)
    old = [[x + rng.choice([-3, -.3, -.05, 0, .05, .3, 3]) for x in row] for row in logprobs]
    advantages = table(-2, 2) if per_token else [rng.uniform(-2, 2) for _ in range(rows)]
    mask = [[rng.random() < 0.6 for _ in range(width)] for _ in range(rows)]
    mask[0], mask[1] = [False] * width, [True] + [False] * (width - 1)
    return logprobs, old, ref, advantages, mask


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("normaliser", [None, 11])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_that_of_two_plain_loops(per_token, mean, normaliser, beta):
    settings = dict(clip_low=0.2, clip_high=0.28, beta=beta, mean=mean, normaliser=normaliser)
    for seed in range(3):
        logprobs, old, ref, advantages, mask = ragged(seed, per_token)
        ref = ref if beta else None
        tensors = [x if x is None else torch.tensor(x, dtype=torch.float64) for x in (logprobs, old, ref, advantages)]
        loss, metrics = policy_loss(*tensors, torch.tensor(mask), **settings)
        expected, expected_metrics = by_hand(logprobs, old, ref, advantages, mask, **settings)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert {name: metrics[name] for name in expected_metrics} == pytest.approx(expected_metrics)


METHODS = {  # as their papers have them
    "GRPO": dict(clip_low=0.2, clip_high=0.2, mean="sequence", beta=0.04),
    "Dr. GRPO": dict(clip_low=0.2, clip_high=0.2, mean="constant", beta=0),
    "DAPO": dict(clip_low=0.2, clip_high=0.28, mean="token", beta=0),
    "GSPO": dict(sequence_ratio=True, clip_low=3e-4, clip_high=4e-4, mean="sequence", beta=0),
    "CISPO": dict(detach_ratio=True, clip_low=1, clip_high=4, mean="token", beta=0),
    "RLOO": dict(detach_ratio=True, clip_low=0, clip_high=0, mean="constant", beta=0),
    "REINFORCE": dict(detach_ratio=True, clip_low=0, clip_high=0, mean="constant", beta=0),
    "PPO": dict(clip_low=0.2, clip_high=0.2, mean="token", beta=0)}


def ppo_by_hand(rho, a, low, high):
    """Objective and its derivative in log rho of PPO's clip, told by the sign of the advantage."""
    if a >= 0:
        return (rho * a, rho * a) if rho < high else (high * a, 0.0)
    return (rho * a, rho * a) if rho > low else (low * a, 0.0)


def method_by_hand(method, logprobs, old, ref, advantages, mask, weights, beta, kl):
    """Loss and gradient of one method in plain floats; every method has its own formula and shares no switch."""
    B, T = len(mask), len(mask[0])
    total, gradient, all_tokens = 0.0, [[0.0] * T for _ in range(B)], sum(map(sum, mask))
    for i in range(B):
        tokens = [t for t in range(T) if mask[i][t]]
        if not tokens:
            continue
        share = {
            "GRPO": 1 / B / len(tokens),
            "GSPO": 1 / B / len(tokens),
            "DAPO": 1 / all_tokens,
            "CISPO": 1 / all_tokens,
            "PPO": 1 / all_tokens,
        }.get(method, 1 / (B * T))
        s = math.exp(sum(logprobs[i][t] - old[i][t] for t in tokens) / len(tokens))
        for t in tokens:
            a, w, rho = advantages[i][t], weights[i][t], math.exp(logprobs[i][t] - old[i][t])
            if method in ("GRPO", "Dr. GRPO", "DAPO", "PPO"):
                value, slope = ppo_by_hand(rho, a, 0.8, 1.28 if method == "DAPO" else 1.2)
            elif method == "GSPO":
                value, slope = ppo_by_hand(s, a, 1 - 3e-4, 1 + 4e-4)
            elif method == "CISPO":
                value, slope = min(rho, 5) * a * logprobs[i][t], min(rho, 5) * a
            else:
                value, slope = a * logprobs[i][t], a
            total -= share * w * value
            if method == "GSPO":  # a token moves the ratio of its whole sequence, by 1 / |o|
                for u in tokens:
                    gradient[i][u] -= share * w * slope / len(tokens)
            else:
                gradient[i][t] -= share * w * slope
            if kl == "k3":
                over = math.exp(ref[i][t]) / math.exp(logprobs[i][t])  # pi_ref / pi
                total += share * beta * (over - math.log(over) - 1)
                gradient[i][t] += share * beta * (1 - over)
    return total, gradient


def advantages_by_hand(method, rewards):
    """Of groups of rewards, one a completion."""
    flat = []
    for group in rewards:
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        for i, r in enumerate(group):
            others = group[:i] + group[i + 1:]
            flat.append(r - sum(others) / len(others) if method == "RLOO" else
                        r - mean if method in ("Dr. GRPO", "REINFORCE") else (r - mean) / (std + 1e-4))
    return flat


SCALED = ("GRPO", "DAPO", "GSPO", "CISPO")


def drifted(seed):
    """Two groups of four, one of equal rewards: ragged masks, an empty row, ratios in and far out of the clip."""
    rng, B, T = random.Random(seed), 8, 6
    logprobs = [[rng.uniform(-5, -0.1) for _ in range(T)] for _ in range(B)]
    old = [[x - rng.choice([-4, -.3, -1e-4, 0, 1e-4, .22, .3, 4]) for x in row] for row in logprobs]
    for i in (1, 2):  # sequences that keep their ratio near 1, so that GSPO does not clip all
        old[i] = [x - rng.choice([-1, 1]) * 2e-4 for x in logprobs[i]]
    ref = [[x + rng.uniform(-3, 3) for x in row] for row in logprobs]
    mask = [[t < n for t in range(T)] for n in (6, 1, 3, 0, 4, 6, 2, 5)]
    rewards = [[rng.uniform(-2, 2) for _ in range(4)], [1.5] * 4]
    return logprobs, old, ref, rewards, mask


@pytest.mark.parametrize("importance", [False, True], ids=["", "importance"])
@pytest.mark.parametrize("per_token", [False, True], ids=["", "per_token"])
@pytest.mark.parametrize("kl", [None, "k3"])
@pytest.mark.parametrize("method", METHODS)
def test_value_and_gradient_of_each_method_are_those_of_its_formula_by_hand(method, kl, per_token, importance):
    for seed in range(5):
        logprobs, old, ref, rewards, mask = drifted(seed)
        rng, B, T = random.Random(seed), len(mask), len(mask[0])
        once = group_advantages(
            torch.tensor(rewards, dtype=torch.float64),
            "none" if method in ("Dr. GRPO", "REINFORCE", "RLOO") else "group",
            method == "RLOO",
        ).flatten()
        spread = [[a] * T for a in advantages_by_hand(method, rewards)]
        if per_token:
            spread = [[a + rng.uniform(-1, 1) for a in row] for row in spread]
        weights = [[rng.choice([0, .5, 1, 3]) if importance else 1.0 for _ in range(T)] for _ in range(B)]
        tensors = [torch.tensor(x, dtype=torch.float64) for x in (logprobs, old, ref)]
        tensors[0].requires_grad_()
        settings = METHODS[method] | (dict(beta=0.3) if kl else {})
        advantages = torch.tensor(spread, dtype=torch.float64) if per_token else once
        if importance:
            advantages = torch.tensor(spread, dtype=torch.float64) * torch.tensor(weights, dtype=torch.float64)
        loss, _ = policy_loss(*tensors[:2], tensors[2] if kl else None, advantages, torch.tensor(mask), **settings)
        loss.backward()
        value, gradient = method_by_hand(method, logprobs, old, ref, spread, mask, weights, 0.3, kl)
        assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-12)
        torch.testing.assert_close(tensors[0].grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_weighed_k3_has_the_gradient_of_kl_pi_ref_off_policy_too_and_the_plain_one_has_not():
    """By enumeration of what pi_old may sample: DeepSeek-V3.2's estimate."""
    logits, old, ref = torch.randn(3, 5, dtype=torch.float64)
    logits.requires_grad_()
    logprobs, old, ref = (x.log_softmax(-1) for x in (logits, old, ref))
    wanted, = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)
    for weigh_kl in (True, False):
        expected = 0.0
        for token in range(5):
            x = [y[token].view(1, 1) for y in (logprobs, old, ref)]
            expected += old[token].exp() * policy_loss(*x, torch.zeros(1), torch.ones(1, 1), beta=1.0,
                                                       weigh_kl=weigh_kl)[0]
        gradient, = torch.autograd.grad(expected, logits, retain_graph=True)
        assert torch.allclose(gradient, wanted, atol=1e-12) == weigh_kl


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_a_stale_sequence_of_negative_advantage_teaches_nothing_but_its_kl(mean):
    """The limit is of the mean of log pi_old / pi over the sequence's own tokens; by hand."""
    drift = [[0.9, -0.1, 7.0], [0.3, 0.2, 0.1], [0.9, 0.1, 0.0], [0.6, 7.0, 7.0], [-0.9, -0.1, 7.0],
             [0.375, 7.0, 7.0]]  # log pi_old / pi
    mask = [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    advantages = [-1.0, -1.0, 2.0, -0.5, -3.0, -1.0]
    stale = [True, False, False, True, False, False]  # the last is at the limit
    logprobs = torch.full((6, 3), -1.0, dtype=torch.float64, requires_grad=True)
    ref = torch.full((6, 3), -1.5, dtype=torch.float64)
    old = logprobs.detach() + torch.tensor(drift, dtype=torch.float64)
    loss, _ = policy_loss(logprobs, old, ref, torch.tensor(advantages), torch.tensor(mask), clip_low=9.0, clip_high=9.0,
                          stale_limit=0.375, beta=0.5, mean=mean)
    value, k3 = 0.0, math.exp(-0.5) + 0.5 - 1
    for row in range(6):
        share = 1 / 6 / sum(mask[row]) if mean == "sequence" else 1 / 11
        for t in range(sum(mask[row])):
            value += share * 0.5 * k3
            if not stale[row]:
                value -= share * math.exp(-drift[row][t]) * advantages[row]
    assert loss.item() == pytest.approx(value, rel=1e-12)
    loss.backward()
    of_kl = 0.5 * (1 - math.exp(-0.5))
    assert logprobs.grad[0, 0].item() == pytest.approx(of_kl * (1 / 12 if mean == "sequence" else 1 / 11))
    assert logprobs.grad[1, 0].item() != pytest.approx(of_kl * (1 / 18 if mean == "sequence" else 1 / 11))


def test_gspo_clips_whole_sequences_and_its_others_share_one_gradient():
    logprobs, old, _, _, mask = (torch.tensor(x, dtype=torch.float64) for x in drifted(0))
    logprobs.requires_grad_()
    loss, metrics = policy_loss(logprobs, old, None, torch.ones(8, dtype=torch.float64), mask, **METHODS["GSPO"])
    loss.backward()
    s = torch.tensor([math.exp(sum(d[:n]) / n) if n else 1.0 for d, n in
                      zip((logprobs - old).tolist(), mask.sum(1).int().tolist())], dtype=torch.float64)
    clipped = s > 1 + 4e-4
    assert 0 < clipped.sum() < 7
    assert metrics["clip_fraction"] == pytest.approx((mask.sum(1) * clipped).sum().item() / mask.sum().item())
    assert metrics["ratio"] == pytest.approx((mask.sum(1) * s).sum().item() / mask.sum().item())
    for row in range(8):
        tokens = mask[row] > 0
        assert (
            (logprobs.grad[row][tokens] == 0).all()
            if clipped[row]
            else len(set(logprobs.grad[row][tokens].tolist())) <= 1
        )


def test_cispo_leaves_no_token_without_a_gradient_and_counts_those_whose_weight_it_cuts():
    ratios = [0.001, 0.5, 1.0, 4.9, 5.1, 100.0]
    for advantage in (1.0, -1.0):
        _, grad, metrics = ratio_loss(ratios, advantage, **METHODS["CISPO"])
        assert [-g * advantage for g in grad] == pytest.approx([0.001, 0.5, 1.0, 4.9, 5, 5])
        assert metrics["clip_fraction"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("method", METHODS)
def test_on_policy_the_ratio_of_every_method_is_one_and_its_gradient_is_the_advantages_share(method):
    logprobs, _, _, _, mask = (torch.tensor(x, dtype=torch.float64) for x in drifted(1))
    logprobs.requires_grad_()
    advantages = torch.tensor([1., -1, 2, 0, .5, -2, 0, 1], dtype=torch.float64)
    loss, metrics = policy_loss(logprobs, logprobs.detach(), None, advantages, mask, **METHODS[method])
    loss.backward()
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0
    share = {"sequence": 1 / 8 / mask.sum(1, keepdim=True).clamp(min=1), "token": 1 / mask.sum(), "constant": 1 / 48}
    torch.testing.assert_close(logprobs.grad, -advantages[:, None] * mask * share[METHODS[method]["mean"]])
    assert logprobs.grad.abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weigh_kl", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_finite_in_value_and_gradient_at_any_log_ratio(method, weigh_kl, dtype):
    for old, ref, advantage in itertools.product((-1000., 0., 1000.), (-1000., 0., 1000.), (-2., 2.)):
        logprobs = torch.full((2, 3), -1.0, dtype=dtype, requires_grad=True)
        loss, metrics = policy_loss(
            logprobs,
            logprobs.detach() - old,
            logprobs.detach() - ref,
            torch.full((2,), advantage, dtype=dtype),
            torch.tensor([[1, 1, 0], [1, 0, 0]]),
            **METHODS[method] | dict(weigh_kl=weigh_kl, beta=1.0),
        )
        loss.backward()
        assert loss.isfinite() and all(map(math.isfinite, metrics.values()))
        assert logprobs.grad.isfinite().all() and logprobs.grad.float().square().sum().isfinite()


def test_the_metrics_hold_the_kl_of_the_loss_over_sampled_tokens():
    for seed in range(3):
        logprobs, old, ref, advantages, mask = ragged(seed)
        tensors = (torch.tensor(x, dtype=torch.float64) for x in (logprobs, old, ref, advantages, mask))
        metrics = policy_loss(*tensors)[1]
        d = [ref[i][t] - logprobs[i][t] for i in range(len(mask)) for t in range(len(mask[0])) if mask[i][t]]
        assert metrics["kl"] == pytest.approx(sum(math.exp(x) - x - 1 for x in d) / len(d))


def test_the_token_mean_weighs_a_long_completion_more_and_the_sequence_mean_does_not():
    logprobs = torch.zeros(2, 4)
    mask, advantages = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]), torch.tensor([2.0, -1.0])
    assert policy_loss(logprobs, logprobs, None, advantages, mask)[0].item() == pytest.approx(-(2 - 1) / 2)
    assert policy_loss(logprobs, logprobs, None, advantages, mask, mean="token")[0].item() == pytest.approx(
        -(2 - 4) / 5
    )


def test_one_advantage_a_completion_is_that_advantage_at_each_of_its_tokens():
    logprobs, old, ref, advantages, mask = (torch.tensor(x, dtype=torch.float64) for x in ragged(3))
    once = policy_loss(logprobs, old, ref, advantages, mask)
    spread = policy_loss(logprobs, old, ref, advantages[:, None].expand(mask.shape), mask)
    assert once[0].item() == spread[0].item() and once[1] == spread[1]


@pytest.mark.parametrize("settings", [{}, {"mean": "token"}, {"mean": "constant"}, {"sequence_ratio": True},
                                      {"detach_ratio": True}, {"sequence_ratio": True, "detach_ratio": True},
                                      {"weigh_kl": True}], ids=str)
@pytest.mark.parametrize("rubbish", [7.0, -1e30, math.inf, -math.inf, math.nan])
def test_what_stands_in_the_padding_changes_neither_loss_nor_gradient_nor_metrics(rubbish, settings):
    *tensors, mask = (torch.tensor(x, dtype=torch.float64) for x in ragged(5, per_token=True))
    results = []
    for filler in (0.0, rubbish):
        logprobs, old, ref, advantages = (torch.where(mask > 0, x, filler) for x in tensors)
        logprobs.requires_grad_()
        loss, metrics = policy_loss(logprobs, old, ref, advantages, mask, beta=0.3, **settings)
        loss.backward()
        results.append((loss.item(), metrics, logprobs.grad.tolist()))
    assert results[0] == results[1]


def test_wider_padding_changes_nothing():
    logprobs, old, ref, advantages, mask = (torch.tensor(x, dtype=torch.float64) for x in ragged(6))
    wide = [torch.nn.functional.pad(x, (0, 9)) for x in (logprobs, old, ref, mask)]
    for settings in [
        dict(mean="sequence"),
        dict(mean="token"),
        dict(mean="constant", normaliser=11),  # whose default is B * T
        dict(sequence_ratio=True),
        dict(detach_ratio=True, mean="token"),
    ]:
        a = policy_loss(logprobs, old, ref, advantages, mask, **settings)
        b = policy_loss(*wide[:3], advantages, wide[3], **settings)
        assert a[0].item() == pytest.approx(b[0].item(), rel=1e-12) and a[1] == pytest.approx(b[1])


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not():
    logprobs = torch.full((4, 3), -1.0, requires_grad=True)
    advantages = group_advantages(torch.tensor([[1., 0., 0., 1.]])).flatten()
    loss, _ = policy_loss(logprobs, logprobs.detach(), logprobs.detach(), advantages, torch.ones(4, 3))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert logprobs.grad[:, 0].tolist() == pytest.approx([-a / 12 for a in advantages.tolist()])


# ------------------------------------------------------------------------------------------- all sequences of a policy

SEQUENCES = [(2,)] + [(a, b) for a in (0, 1) for b in (0, 1, 2)]  # three tokens, of which 2 ends; two at most


class TinyPolicy:
    """All there is to know: the logits of the first token (state 0) and of the second after a 0 or a 1."""

    def __init__(self, seed):
        self.logits = torch.randn(
            3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        ).requires_grad_()

    def states(self, sequence):
        return [0, *(1 + token for token in sequence[:-1])]

    def logprobs(self):
        """(7, 2) of every sequence's tokens, zeros beyond its end."""
        table = self.logits.log_softmax(-1)
        rows = [[table[s, token] for s, token in zip(self.states(q), q)] for q in SEQUENCES]
        return torch.stack([torch.stack(row + [torch.zeros_like(row[0])] * (2 - len(row))) for row in rows])


LENGTHS = torch.tensor([float(len(q)) for q in SEQUENCES], dtype=torch.float64)
MASK = torch.arange(2) < LENGTHS[:, None]
REWARDS = torch.tensor([0.5, 1.0, -2.0, 0.3, 0.0, 4.0, -1.0], dtype=torch.float64)


def expected_gradient(policy, weights, advantages, ref=None, **settings):
    """The gradient of the expectation of policy_loss: each sequence alone in a batch, weighted by its probability."""
    logprobs, total = policy.logprobs(), 0.0
    for i, weight in enumerate(weights):
        rows = slice(i, i + 1)
        loss, _ = policy_loss(logprobs[rows], logprobs[rows].detach(), None if ref is None else ref[rows],
                              advantages[rows], MASK[rows], normaliser=1, **settings)
        total = total + weight * loss
    return torch.autograd.grad(total, policy.logits)[0]


@pytest.mark.parametrize("settings", [{"mean": "token"}, METHODS["Dr. GRPO"], METHODS["REINFORCE"], METHODS["CISPO"]],
                         ids=["clip", "Dr. GRPO", "REINFORCE", "CISPO"])
@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gradient_is_the_exact_policy_gradient_over_every_sequence(seed, settings):
    policy = TinyPolicy(seed)
    probabilities = policy.logprobs().sum(1).exp()
    assert probabilities.sum().item() == pytest.approx(1)  # these are all sequences
    expected_reward = probabilities @ REWARDS
    exact = torch.autograd.grad(expected_reward, policy.logits)[0]
    ours = expected_gradient(policy, probabilities.detach(), REWARDS - expected_reward.detach(), **settings)
    torch.testing.assert_close(-ours, exact)


def gradient_over_every_group(policy, G, **advantage_settings):
    """Of REINFORCE's loss with a baseline from the group, over all 7^G groups of G samples."""
    logprobs, total = policy.logprobs(), 0.0
    probabilities = logprobs.detach().sum(1).exp()
    for group in itertools.product(range(7), repeat=G):
        rows = list(group)
        advantages = group_advantages(REWARDS[rows][None], scale="none", **advantage_settings).flatten()
        loss, _ = policy_loss(logprobs[rows], logprobs[rows].detach(), None, advantages, MASK[rows],
                              **METHODS["RLOO"], normaliser=G)
        total = total + probabilities[rows].prod() * loss
    return torch.autograd.grad(total, policy.logits)[0]


@pytest.mark.parametrize("G", [2, 3])
def test_rloo_is_unbiased_over_every_group_and_the_groups_mean_shrinks_the_gradient_by_its_own_share(G):
    policy = TinyPolicy(0)
    exact = torch.autograd.grad(policy.logprobs().sum(1).exp() @ REWARDS, policy.logits)[0]
    torch.testing.assert_close(-gradient_over_every_group(policy, G, leave_one_out=True), exact)
    # a completion stands in its own baseline
    torch.testing.assert_close(-gradient_over_every_group(policy, G), exact * (G - 1) / G)


@pytest.mark.parametrize("settings", [{}, METHODS["GSPO"]], ids=["GRPO", "GSPO"])
@pytest.mark.parametrize("seed", range(3))
def test_equation_3s_mean_over_a_sequence_climbs_the_advantage_divided_by_its_length(seed, settings):
    policy = TinyPolicy(seed)
    probabilities = policy.logprobs().sum(1).exp()
    advantages = REWARDS - (probabilities @ REWARDS).detach()
    exact = torch.autograd.grad(probabilities @ (advantages / LENGTHS), policy.logits)[0]
    weights = policy.logprobs().sum(1).exp().detach()
    torch.testing.assert_close(-expected_gradient(policy, weights, advantages, **settings), exact)


def kl_gradients(policy, reference):
    """Gradients of KL(ref || pi) and KL(pi || ref) of each state's next token, weighted by pi's visits to the state."""
    p, q = policy.logits.log_softmax(-1), reference.logits.detach().log_softmax(-1)
    visits = torch.tensor([1.0, *p[0, :2].exp().tolist()], dtype=torch.float64)
    return [torch.autograd.grad(visits @ kl.sum(1), policy.logits, retain_graph=True)[0]
            for kl in (q.exp() * (q - p), p.exp() * (p - q))]


@pytest.mark.parametrize("weigh_kl", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gradient_of_the_kl_is_that_of_the_reversed_kl_and_weighed_that_of_the_forward_kl(seed, weigh_kl):
    policy, reference = TinyPolicy(seed), TinyPolicy(seed + 100)
    ours = expected_gradient(policy, policy.logprobs().sum(1).exp().detach(), torch.zeros(7, dtype=torch.float64),
                             reference.logprobs().detach(), beta=1.0, mean="token", weigh_kl=weigh_kl)
    reversed_kl, forward_kl = kl_gradients(policy, reference)
    torch.testing.assert_close(ours, forward_kl if weigh_kl else reversed_kl)
    assert (reversed_kl - forward_kl).abs().max() > 0.01 and ours.abs().max() > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_coefficient_of_one_update_is_the_papers_equation_21(seed):
    policy, reference = TinyPolicy(seed), TinyPolicy(seed + 100)
    logprobs, ref, beta = policy.logprobs().detach().requires_grad_(), reference.logprobs().detach(), 0.04
    policy_loss(logprobs, logprobs.detach(), ref, REWARDS, MASK, beta=beta, mean="token", normaliser=1)[0].backward()
    coefficient = REWARDS[:, None] + beta * ((ref - logprobs.detach()).exp() - 1)
    torch.testing.assert_close(-logprobs.grad, coefficient * MASK)


# ------------------------------------------------------------------------------------------- the rollout

def small(**fields):
    return GRPOConfig(**dict(rollouts=3, prompts_per_rollout=2, group_size=4, minibatches=2, lr=1e-2, warmup=1,
                             max_new_tokens=6, dtype="float32", grad_clip=1e9) | fields)


def roll(model, config, prompts, generate, rules={"sevens": share_of_sevens}, weights={}, end_ids=(END,)):
    return grpo.rollout(model, prompts, encode=list, decode=lambda ids: " ".join(map(str, ids)), generate=generate,
                        end_ids=end_ids, rewards=rules, weights=weights, config=config,
                        generator=torch.Generator().manual_seed(0))


def sharp(tiny, seed=0):
    """A tiny model whose logits have a standard deviation of about 1, so that probabilities differ."""
    model = tiny(seed=seed, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, 0, model.config.hidden_size**-0.5, torch.Generator().manual_seed(seed))
    return model


def canned(*completions):
    """A generate that answers with these completions."""
    def generate(model, prompts, n, max_new_tokens, temperature, end_ids, generator):
        assert len(completions) == n * len(prompts)
        ids = torch.zeros(len(completions), max_new_tokens, dtype=torch.long)
        for row, completion in zip(ids, completions):
            row[:len(completion)] = torch.tensor(completion)
        return ids, torch.tensor([len(c) for c in completions]), -torch.ones(ids.shape)
    return generate


def test_the_mask_covers_exactly_the_sampled_tokens_whatever_their_values():
    # the end token stands in a prompt, the padding's id 0 is sampled, and one completion was cut off without an end
    prompts, completions = [[5, END, 6], [8]], [[7, 0, END], [END], [0, 0, 0, 0, 0, 0], [7, END]]
    r = roll(torch.nn.Linear(1, 1), small(group_size=2), prompts, canned(*completions))
    assert r.ids.tolist() == [
        [5, 3, 6, 7, 0, 3, 0],
        [5, 3, 6, 3, 0, 0, 0],
        [8, 0, 0, 0, 0, 0, 0],
        [8, 7, 3, 0, 0, 0, 0],
    ]
    assert r.mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]
    assert r.lengths.tolist() == [3, 1, 6, 2] and r.finished.tolist() == [True, True, False, True]
    assert r.texts == ["7 0 3", "3", "0 0 0 0 0 0", "7 3"]
    assert torch.equal(r.sampled_logprobs, -r.mask.float())


def test_rewards_are_weighted_sums_by_group_and_a_weight_of_zero_only_logs():
    rules = {"sevens": lambda text, example: float(text.count("7")), "prompt": lambda text, example: float(example[0]),
             "length": lambda text, example: float(len(text.split()))}
    r = roll(torch.nn.Linear(1, 1), small(group_size=2), [[5], [8]], canned([7, END], [END], [7, 7, END], [7, 7, 7]),
             rules, {"prompt": 0.5, "length": 0})
    assert r.parts["sevens"].tolist() == [[1, 0], [2, 3]] and r.parts["length"].tolist() == [[2, 1], [3, 3]]
    assert r.rewards.tolist() == [[1 + 2.5, 2.5], [2 + 4, 3 + 4]]


class Positional(torch.nn.Module):
    """Logits that depend on the position alone: a position's gradient comes from the tokens sampled there."""

    def __init__(self, positions=8, vocab_size=10):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(positions, vocab_size, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids):
        return self.logits[:ids.shape[1]].expand(len(ids), -1, -1)


def moved(r, advantages, **fields):
    """By how much one step of plain gradient descent moves each position's logits, and the step's metrics."""
    model, config = Positional(), small(beta=0.0, **fields)
    before = model.logits.detach().clone()
    r.old_logprobs = grpo.all_logprobs(model, r, config)
    metrics = grpo.update(
        model, torch.optim.SGD(model.parameters(), lr=1.0), r, list(range(len(r.texts))),
        advantages[:, None].expand(r.mask.shape), config
    )
    return (model.logits.detach() - before), metrics


def test_the_sampled_end_token_gets_a_gradient():
    r = roll(Positional(), small(group_size=2), [[5, 6]], canned([7, END], [7, 8, 9, END]))
    change, _ = moved(r, torch.tensor([0.0, 1.0]))  # positions 1..4 predict 7 8 9 END of the second
    assert change[4, END] > 0 and change[4].argmax() == END
    assert change[0].abs().sum() == 0 and change[5:].abs().sum() == 0  # the prompt and the padding get none


def test_an_end_id_in_the_prompt_is_not_trained_and_a_sampled_padding_id_is():
    r = roll(Positional(), small(group_size=2), [[5, END]], canned([0, END], [0, 0, END]))
    change, _ = moved(r, torch.tensor([1.0, 1.0]))
    assert change[0].abs().sum() == 0 and change[1].argmax() == 0 and change[2, [0, END]].min() > 0


@pytest.mark.parametrize("switches", [{}, {"sequence_ratio": True}, {"detach_ratio": True}, {"weigh_kl": True}],
                         ids=str)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("per_token", [False, True], ids=["", "per_token"])
def test_gradient_and_metrics_do_not_depend_on_the_micro_batches(tiny, mean, per_token, switches):
    config = small(group_size=6, mean=mean, beta=0.1, clip_low=0.01, clip_high=0.01, **switches)
    start, other = sharp(tiny, 1), sharp(tiny, 2)
    r = roll(start, config, [[1, 2], [4, 5, 6, 7, 8]], model_module.generate, end_ids=MANY_ENDS)
    assert len(set(r.lengths.tolist())) > 2
    noise = torch.Generator().manual_seed(0)
    advantages = torch.randn(r.mask.shape if per_token else (12, 1), generator=noise).expand(r.mask.shape)
    r.old_logprobs = grpo.all_logprobs(start, r, config) + 0.02 * torch.randn(r.mask.shape, generator=noise)
    r.ref_logprobs = grpo.all_logprobs(other, r, config)
    results = []
    for tokens in (1, 25, 10**6):
        config = replace(config, micro_batch_tokens=tokens)
        model = sharp(tiny, 1)
        metrics = grpo.update(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            r,
            [0, 2, 3, 5, 6, 7, 9, 11],
            advantages,
            config,
        )
        results.append((torch.cat([p.detach().flatten() for p in model.parameters()]), metrics))
    for weights, metrics in results[1:]:
        torch.testing.assert_close(weights, results[0][0], atol=1e-6, rtol=1e-6)
        assert metrics == pytest.approx(results[0][1], rel=1e-5, abs=1e-6)
    assert 0 < results[0][1]["clip_fraction"] < 1 and results[0][1]["kl"] > 0


@pytest.mark.parametrize("switches", [
    {}, {"clip_low": 0.01}, {"clip_high": 0.01}, {"sequence_ratio": True}, {"detach_ratio": True}, {"mean": "token"},
    {"mean": "constant"}, {"beta": 3.0}, {"weigh_kl": True}], ids=str)
def test_each_switch_of_the_config_reaches_the_loss(tiny, switches):
    """An update is the gradient of policy_loss with these switches on the whole forward pass; each matters."""
    defaults = dict(
        clip_low=0.1, clip_high=0.4, sequence_ratio=False, detach_ratio=False, mean="sequence", beta=0.5
    )
    r = roll(sharp(tiny, 1), small(group_size=6), [[1, 2], [4, 5, 6, 7, 8]], model_module.generate, end_ids=MANY_ENDS)
    noise = torch.Generator().manual_seed(0)
    r.old_logprobs = grpo.all_logprobs(sharp(tiny, 1), r, small()) + 0.3 * torch.randn(r.mask.shape, generator=noise)
    r.ref_logprobs = grpo.all_logprobs(sharp(tiny, 2), r, small())
    advantages = torch.randn(12, 1, generator=noise).expand(r.mask.shape)

    def updated(**fields):
        model = sharp(tiny, 1)
        metrics = grpo.update(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            r,
            list(range(12)),
            advantages,
            small(**fields),
        )
        return weights_of(sharp(tiny, 1)) - weights_of(model), metrics["loss"]

    model, settings = sharp(tiny, 1), defaults | switches
    logprobs, budget = (
        token_logprobs(model(r.ids[:, :-1]), r.ids[:, 1:]),
        12 * 6 if settings["mean"] == "constant" else None,
    )
    loss, _ = policy_loss(logprobs, r.old_logprobs, r.ref_logprobs, advantages, r.mask, normaliser=budget, **settings)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    gradient, value = updated(**settings)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    assert value == pytest.approx(loss.item(), rel=1e-4)
    assert not switches or (updated(**defaults)[0] - gradient).abs().max() > 1e-3


@pytest.mark.parametrize("mean, divisor", [("sequence", None), ("token", 9), ("constant", 3 * 6)])
@pytest.mark.parametrize("tokens", [1, 10**6])
def test_an_update_is_divided_by_its_own_sequences_its_own_tokens_or_max_new_tokens_a_row(mean, divisor, tokens):
    r = roll(
        Positional(), small(group_size=2), [[5, 6], [4, 8]], canned([7, END], [7, 8, 9, END], [8, END], [1, 4, END])
    )
    model, config, rows = (
        Positional(),
        small(mean=mean, beta=0.0, micro_batch_tokens=tokens),
        [0, 1, 3],
    )  # of 2, 4, 3 tokens
    advantages, probabilities, expected = (
        torch.tensor([1.0, -2, 100, 3]),
        model.logits.detach().softmax(-1),
        torch.zeros(8, 10),
    )
    r.old_logprobs = grpo.all_logprobs(model, r, config)
    for row in rows:
        for t in range(r.lengths[row]):  # the token at t + 2 is predicted at t + 1
            one_hot = torch.nn.functional.one_hot(r.ids[row, t + 2], 10)
            expected[t + 1] += advantages[row] * (one_hot - probabilities[t + 1]) / (divisor or 3 * r.lengths[row])
    before = model.logits.detach().clone()
    metrics = grpo.update(model, torch.optim.SGD(model.parameters(), lr=1.0), r, rows,
                          advantages[:, None].expand(r.mask.shape), config)
    torch.testing.assert_close(model.logits.detach() - before, expected, atol=1e-6, rtol=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)


def test_the_gradient_is_cut_to_the_norm_of_grad_clip_and_reported_uncut(tiny):
    r = roll(Positional(), small(group_size=2), [[5, 6]], canned([7, END], [7, 8, 9, END]))
    (free, metrics), (cut, same) = (moved(r, torch.tensor([1., 2.]), grad_clip=norm) for norm in (1e9, 0.01))
    assert metrics == same and free.norm().item() == pytest.approx(metrics["grad_norm"], rel=1e-4)
    torch.testing.assert_close(cut, free * 0.01 / free.norm(), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_and_the_forward_pass_are_in_the_configured_dtype_and_the_weights_stay_in_fp32(tiny, dtype):
    model, sampled, passes = tiny(), [], []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: passes.append(logits.dtype))

    def generate(sampler, *args, **settings):
        sampled.append({p.dtype for p in sampler.parameters()})
        count = len(passes)
        result = model_module.generate(sampler, *args, **settings)
        del passes[count:]  # the hook is copied with the model
        return result
    history = run(model, small(rollouts=1, dtype=dtype), generate=generate)
    assert sampled == [{getattr(torch, dtype)}] and {*passes} == {getattr(torch, dtype)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history[0]["sampler_gap"] < (0.05 if dtype == "bfloat16" else 1e-5)


def test_scores_do_not_depend_on_the_micro_batches(tiny):
    model, config = sharp(tiny), small(group_size=6)
    r = roll(model, config, [[1, 2], [4, 5, 6, 7, 8]], model_module.generate, end_ids=MANY_ENDS)
    scores = []
    for tokens in (1, 25, 10**6):
        config = replace(config, micro_batch_tokens=tokens)
        scores.append(grpo.all_logprobs(model, r, config))
        assert torch.equal(scores[-1] != 0, r.mask)
    torch.testing.assert_close(scores[0], scores[1]), torch.testing.assert_close(scores[0], scores[2])


@pytest.mark.parametrize("budget", [1, 10, 37, 10**6])
def test_micro_batches_hold_every_row_once_and_at_most_the_budget(budget):
    lengths = [9, 3, 7, 1, 9, 4, 2]
    batches = list(grpo.micro_batches(range(7), lengths, budget))
    assert sorted(sum(map(list, batches), [])) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= budget for batch in batches)


# ------------------------------------------------------------------------------------------- the loop

def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_its_optimizer_is_adam_with_betas_of_09_and_095_and_no_decay(tiny):
    states = []
    config = grpo.GRPOConfig(rollouts=1, prompts_per_rollout=2, group_size=2, minibatches=1, max_new_tokens=3)
    run(tiny(), config, save=lambda **state: states.append(state))
    group, = states[0]["optimizer"].param_groups
    assert type(states[0]["optimizer"]) is torch.optim.Adam
    assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0


@pytest.mark.parametrize("fields", [{}, {"mean": "token", "scale": "none", "beta": 0.0},
                                    *({**METHODS[name], "scale": "group" if name in SCALED else "none",
                                       "leave_one_out": name == "RLOO"} for name in METHODS if name != "PPO")],
                         ids=["r1", "token", *(name for name in METHODS if name != "PPO")])
def test_the_reward_rises_within_a_few_rollouts(tiny, fields):
    history = run(tiny(), small(rollouts=12, group_size=16, minibatches=4, **fields))
    rewards = [metrics["reward"] for metrics in history]
    assert rewards[0] < 0.15 and sum(rewards[-3:]) / 3 > 0.6, rewards


def test_on_the_first_update_the_ratio_is_one_and_the_loss_zero_while_the_gradient_is_not(tiny):
    first = run(tiny(), small(rollouts=1, minibatches=1, group_size=16))[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["clip_fraction"] == 0
    assert first["loss"] == pytest.approx(0, abs=1e-6) and first["kl"] == pytest.approx(0, abs=1e-9)
    assert first["grad_norm"] > 0.01 and first["sampler_gap"] < 1e-5


def test_the_old_policy_stays_fixed_during_a_rollouts_updates_so_that_the_clip_acts(tiny):
    one, four = (run(tiny(), small(rollouts=1, group_size=16, minibatches=n, lr=0.02))[0] for n in (1, 4))
    assert one["clip_fraction"] == 0 < four["clip_fraction"] and abs(four["ratio"] - 1) > 1e-3


def test_the_ratio_is_one_and_the_kl_zero_in_a_model_with_dropout_too(tiny):
    """A model copied from elsewhere may have some: neither ratio nor KL must measure its noise."""
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.dropout = sharp(tiny), torch.nn.Dropout(0.5)

        def forward(self, ids):
            return self.inner.head(self.dropout(self.inner.hidden(ids)))
    generate = lambda model, *args, **kwargs: model_module.generate(model.inner, *args, **kwargs)
    first = run(Dropped(), small(rollouts=1, minibatches=1), generate=generate)[0]
    assert first["clip_fraction"] == 0 and first["kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("every", [1, 2])
def test_the_reference_stays_until_it_is_replaced_by_the_current_policy(tiny, every):
    first, seen = weights_of(tiny()), []
    run(tiny(), small(rollouts=4, reference_every=every),
        save=lambda **s: seen.append((s["step"], weights_of(s["model"]), weights_of(s["reference"]))))
    expected = first
    for step, model, reference in seen:
        assert not torch.equal(model, expected)
        expected = model if step % every == 0 else expected
        assert torch.equal(reference, expected)


def test_the_kl_grows_from_zero_as_the_policy_leaves_the_reference(tiny):
    history = run(tiny(), small(rollouts=6, group_size=8, reference_every=100))
    assert 2 * history[0]["kl"] < history[-1]["kl"]


def test_a_large_beta_keeps_the_policy_at_the_reference(tiny):
    free, held = (
        run(tiny(), small(rollouts=8, group_size=8, reference_every=100, beta=beta))[-1]["kl"] for beta in (1e-6, 10.0)
    )
    assert held < 0.1 * free


def test_two_runs_of_one_seed_are_alike_and_of_two_seeds_are_not(tiny):
    a, b, c = (run(tiny(), small(seed=seed)) for seed in (0, 0, 1))
    assert a == b != c


def test_the_seed_decides_both_what_is_sampled_and_how_it_is_shuffled(tiny, monkeypatch):
    texts, rows, update = [], [], grpo.update

    def spy(model, optimizer, r, batch, *rest):
        rows.append(batch)
        return update(model, optimizer, r, batch, *rest)
    monkeypatch.setattr(grpo, "update", spy)
    for seed in (0, 1):
        run(tiny(), small(rollouts=1, minibatches=1, seed=seed), log=lambda metrics, r: texts.append(r.texts))
    assert texts[0] != texts[1] and rows[0] != rows[1]


def test_training_takes_nothing_from_and_leaves_nothing_in_the_global_random_state(tiny):
    model, state = tiny(), torch.get_rng_state()
    run(model, small(rollouts=1))
    assert torch.equal(torch.get_rng_state(), state)


def stopped_and_resumed(tiny, tmp_path, stop, config, estimator=lambda: None, **arguments):
    """A run that is killed after `stop` rollouts and resumed, in a new process as it were, is the uninterrupted one."""
    through = tiny()
    history = run(through, config, advantage_estimator=estimator(), **arguments)

    def save(**state):
        if state["step"] == stop:
            checkpoint.save(tmp_path, *checkpoint.state_of(**state))
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), config, advantage_estimator=estimator(), save=save, **arguments)
    resumed = tiny(seed=5)
    rest = run(resumed, config, advantage_estimator=estimator(),
               resume=partial(checkpoint.restore, *checkpoint.load(tmp_path)), **arguments)
    assert len(history) > stop and rest == history[stop:] and torch.equal(weights_of(resumed), weights_of(through))


@pytest.mark.parametrize("beta", [0.1, 0.0])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_stopped_resumes_identically(tiny, tmp_path, stop, beta):
    stopped_and_resumed(tiny, tmp_path, stop, small(rollouts=4, reference_every=3, beta=beta, warmup=5))


def test_resuming_a_run_that_was_done_does_nothing(tiny, tmp_path):
    model = tiny()
    run(model, small(rollouts=1), save=lambda **state: checkpoint.save(tmp_path, *checkpoint.state_of(**state)))
    again = tiny(seed=5)
    history = run(again, small(rollouts=1), resume=partial(checkpoint.restore, *checkpoint.load(tmp_path)))
    assert history == [] and torch.equal(weights_of(again), weights_of(model))


def test_the_examples_are_taken_in_order_and_again_from_the_start(tiny):
    taken = []
    run(tiny(), small(rollouts=4), log=lambda metrics, r: taken.append(r.examples))
    assert taken == [[[1, 2], [4, 5, 6]], [[8], [1, 2]], [[4, 5, 6], [8]], [[1, 2], [4, 5, 6]]]


def test_a_rollout_is_split_into_the_asked_number_of_updates(tiny):
    for minibatches, epochs in [(1, 1), (2, 1), (3, 2), (5, 1), (8, 1)]:  # of 8 completions
        states = []
        run(
            tiny(),
            small(rollouts=1, minibatches=minibatches, inner_epochs=epochs),
            save=lambda **s: states.append(s["updates"]),
        )
        assert states == [minibatches * epochs]


def test_the_learning_rate_warms_up_over_updates_and_stays(tiny):
    rates = []
    run(
        tiny(),
        small(rollouts=4, warmup=5, lr=0.01),
        save=lambda **s: rates.append(s["optimizer"].param_groups[0]["lr"]),
    )
    assert rates == pytest.approx([0.004, 0.008, 0.01, 0.01])


def test_updates_are_split_among_mini_batches_so_that_each_completion_is_in_one(tiny, monkeypatch):
    seen, update = [], grpo.update

    def spy(model, optimizer, r, rows, *rest):
        seen.append(rows)
        return update(model, optimizer, r, rows, *rest)
    monkeypatch.setattr(grpo, "update", spy)
    run(tiny(), small(rollouts=1, minibatches=3, inner_epochs=2))
    assert [len(rows) for rows in seen] == [3, 3, 2] * 2 and seen[:3] != seen[3:]
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(8)) != sum(seen[:3], [])


def test_a_cut_sampler_cannot_be_configured():
    for field in ("top_p", "top_k", "min_p"):
        with pytest.raises(TypeError):
            GRPOConfig(**{field: 0.9})


def test_a_sampler_that_cut_the_vocabulary_all_the_same_shows_as_a_sampler_gap(tiny):
    plain, cut = (run(sharp(tiny), small(rollouts=1), generate=generate)[0]["sampler_gap"]
                  for generate in (model_module.generate, partial(model_module.generate, top_p=0.5)))
    assert plain < 1e-5 and cut > 0.3


def lying(shift):
    """A generate whose log-probabilities are wrong by shift, alternately above and below the truth."""
    def generate(*args, **settings):
        ids, lengths, logprobs = model_module.generate(*args, **settings)
        return ids, lengths, logprobs + shift * torch.tensor([1., -1]).repeat(4)[:logprobs.shape[1]]
    return generate


def test_the_sampler_gap_is_the_mean_distance_of_its_log_probabilities_whatever_their_side(tiny):
    assert run(tiny(), small(rollouts=1), generate=lying(1.0))[0]["sampler_gap"] == pytest.approx(1, abs=1e-5)


def importance_of(model, monkeypatch, config, generate):
    """The rollout, and the factor that each token's advantage of 1 has when it comes to the update."""
    seen, update = [], grpo.update

    def spy(model, optimizer, r, rows, advantages, *rest):
        seen.append((r, advantages))
        return update(model, optimizer, r, rows, advantages, *rest)
    monkeypatch.setattr(grpo, "update", spy)
    ones = SimpleNamespace(advantages=lambda r: torch.ones(len(r.ids)), learn=lambda r, rows: {})
    run(model, config, generate=generate, advantage_estimator=ones)
    monkeypatch.undo()
    return seen[0]


def test_importance_weights_are_pi_old_over_the_sampler_and_at_most_the_cap(tiny, monkeypatch):
    r, importance = importance_of(tiny(), monkeypatch, small(rollouts=1, importance_cap=1.5), lying(1.0))
    expected = [[min(math.exp(old - sampled), 1.5) for old, sampled in zip(*rows)]
                for rows in zip(r.old_logprobs.tolist(), r.sampled_logprobs.tolist())]
    torch.testing.assert_close(importance, torch.tensor(expected))
    assert {round(w, 3) for w in importance[r.mask].tolist()} == {0.368, 1.5}  # 1/e, and e cut


def test_importance_weights_are_one_where_sampler_and_trainer_agree_and_absent_without_a_cap(tiny, monkeypatch):
    r, importance = importance_of(tiny(), monkeypatch, small(rollouts=1, importance_cap=2.0), model_module.generate)
    torch.testing.assert_close(importance, torch.ones(r.mask.shape), atol=1e-5, rtol=0)
    r, importance = importance_of(tiny(), monkeypatch, small(rollouts=1), lying(1.0))
    assert torch.equal(importance, torch.ones(r.mask.shape))


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_importance_weights_are_finite_however_wrong_the_sampler_is(tiny, monkeypatch, shift):
    _, importance = importance_of(tiny(), monkeypatch, small(rollouts=1, importance_cap=3.0), lying(shift))
    assert importance.isfinite().all() and importance.min() == 0 and importance.max() == 3


def test_importance_weights_change_what_is_learnt(tiny):
    a, b, c = (run(tiny(), small(rollouts=1, importance_cap=cap), generate=lying(shift))[0]["grad_norm"]
               for cap, shift in ((0.0, 1.0), (0.5, 0.0), (0.5, 1.0)))
    assert a > 0 and b == pytest.approx(a / 2, rel=0.2) and abs(c - a) > 0.1 * a


@pytest.mark.parametrize("method, fields", [("GRPO", {}), ("Dr. GRPO", {"scale": "none"}),
                                            ("RLOO", {"scale": "none", "leave_one_out": True})])
def test_the_advantages_learnt_from_are_those_of_the_configured_method(tiny, monkeypatch, method, fields):
    seen, update = [], grpo.update

    def spy(model, optimizer, r, rows, advantages, *rest):
        assert torch.equal(advantages, advantages[:, :1].expand(r.mask.shape))  # the same at each token
        seen.append((r.rewards.tolist(), advantages[:, 0].tolist()))
        return update(model, optimizer, r, rows, advantages, *rest)
    monkeypatch.setattr(grpo, "update", spy)
    run(tiny(), small(rollouts=1, **fields), rewards={"length": lambda text, example: len(text) / 7})
    for rewards, advantages in seen:
        assert advantages == pytest.approx(advantages_by_hand(method, rewards), abs=1e-5)
        assert max(map(abs, advantages)) > 0.1


def test_an_advantage_estimator_takes_the_place_of_the_group_advantages(tiny):
    """The group advantages by another way give the same run, per completion and per token; others another."""
    def estimator(advantages):
        return SimpleNamespace(advantages=advantages, learn=lambda r, rows: {})
    own = lambda r: group_advantages(r.rewards).flatten()
    spread = lambda r: own(r)[:, None] * r.mask
    opposite = lambda r: -own(r)
    plain, a, b, c = (run(tiny(), small(rollouts=2), advantage_estimator=each)
                      for each in (None, estimator(own), estimator(spread), estimator(opposite)))
    assert plain == a == b != c


def test_an_advantage_estimator_sees_the_log_probabilities_of_the_policy_that_sampled_and_of_the_reference(tiny):
    model, start, steps = sharp(tiny), sharp(tiny), []

    def one_row(model, r, row):
        length, ids = r.lengths[row], r.ids[row, :r.ends[row]]
        return model(ids[None])[0, -length - 1:-1].log_softmax(-1)[range(length), ids[-length:]]

    def advantages(r):
        for row in range(8):
            for scores, scorer in ((r.old_logprobs, model), (r.ref_logprobs, start)):
                torch.testing.assert_close(
                    scores[row, r.mask[row]], one_row(scorer, r, row).detach(), atol=1e-5, rtol=0
                )
        assert (r.old_logprobs[~r.mask] == 0).all() and (r.ref_logprobs[~r.mask] == 0).all()
        steps.append((r.old_logprobs - r.ref_logprobs).abs().max().item())
        return torch.randn(8, generator=torch.Generator().manual_seed(0))
    run(model, small(rollouts=3, reference_every=100),
        advantage_estimator=SimpleNamespace(advantages=advantages, learn=lambda r, rows: {}))
    assert steps[0] == 0 and min(steps[1:]) > 1e-3


def test_an_advantage_estimator_learns_once_after_each_update_of_the_policy_and_from_the_same_rows(tiny, monkeypatch):
    calls, update, model = [], grpo.update, tiny()

    def spy(model, optimizer, r, rows, *rest):
        metrics = update(model, optimizer, r, rows, *rest)
        calls.append(("policy", id(r), list(rows), weights_of(model)))
        return metrics

    def learn(r, rows):
        calls.append(("estimator", id(r), list(rows), weights_of(model)))
        return {"critic_loss": float(len(calls))}
    monkeypatch.setattr(grpo, "update", spy)
    history = run(model, small(rollouts=2, minibatches=3, inner_epochs=2),
                  advantage_estimator=SimpleNamespace(advantages=lambda r: r.rewards.flatten(), learn=learn))
    assert [call[0] for call in calls] == ["policy", "estimator"] * 12
    for (_, r, rows, weights), (_, same_r, same_rows, same_weights) in zip(calls[::2], calls[1::2]):
        assert r == same_r and rows == same_rows and torch.equal(weights, same_weights)
    assert [m["critic_loss"] for m in history] == [
        sum(range(2, 14, 2)) / 6,
        sum(range(14, 26, 2)) / 6,
    ]  # the updates' mean


class Critic:
    """An estimator with a state: predicts a completion's reward from its length and entropy, and learns with noise."""

    def __init__(self):
        self.value = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(self.value.weight), torch.nn.init.zeros_(self.value.bias)
        self.optimizer = torch.optim.Adam(self.value.parameters(), lr=0.1)
        self.generator = torch.Generator().manual_seed(0)
        self.objects = {"value": self.value, "value_optimizer": self.optimizer, "noise": self.generator}

    def predict(self, r):
        return self.value(torch.stack([r.lengths.float(), -r.old_logprobs.sum(1)], 1))[:, 0]

    def advantages(self, r):
        return (r.rewards.flatten() - self.predict(r)).detach()

    def learn(self, r, rows):
        noise = torch.randn(len(rows), generator=self.generator) / 10
        loss = (self.predict(r)[rows] - r.rewards.flatten()[rows] + noise).square().mean()
        self.optimizer.zero_grad(), loss.backward(), self.optimizer.step()
        return {"value_loss": loss.item()}


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_with_an_estimator_that_learns_resumes_identically(tiny, tmp_path, stop):
    stopped_and_resumed(tiny, tmp_path, stop, small(rollouts=4, reference_every=3), estimator=Critic)


def test_an_estimator_that_needs_a_reference_gets_one_without_a_kl_in_the_loss(tiny):
    def run_with(needs_reference):
        seen, states, model = [], [], tiny()
        estimator = SimpleNamespace(
            advantages=lambda r: seen.append(r.ref_logprobs) or group_advantages(r.rewards).flatten(),
            learn=lambda r, rows: {}, needs_reference=needs_reference)
        history = run(model, small(rollouts=3, beta=0.0, reference_every=2), advantage_estimator=estimator,
                      save=lambda **s: states.append("reference" in s))
        return weights_of(model), history, seen, states
    weights, history, seen, states = run_with(False)
    assert seen == [None] * 3 and not any(states)
    same, same_history, seen, states = run_with(True)
    assert all(ref is not None and ref.abs().sum() > 0 for ref in seen) and all(states)
    assert (
        torch.equal(weights, same) and history == same_history and all(m["kl"] == 0 for m in history)
    )


def test_validation_comes_every_so_often_and_at_the_end(tiny):
    history = run(tiny(), small(rollouts=5, validate_every=2), validate=lambda model: {"accuracy": 0.5})
    assert [m["step"] for m in history if "validation_accuracy" in m] == [2, 4, 5]


def test_nothing_is_sampled_but_at_the_configured_temperature_over_the_whole_vocabulary(tiny):
    asked = []

    def generate(model, prompts, **settings):
        asked.append(settings)
        return model_module.generate(model, prompts, **settings)
    run(tiny(), small(rollouts=1, temperature=0.7), generate=generate)
    assert [s["temperature"] for s in asked] == [0.7] and not {"top_p", "top_k"} & asked[0].keys()


def test_the_metrics_say_what_the_rollout_holds(tiny):
    def check(metrics, r):
        assert metrics["reward"] == pytest.approx(r.rewards.mean().item()) == pytest.approx(metrics["sevens"])
        assert metrics["length"] == pytest.approx(r.lengths.sum().item() / 8) and metrics["tokens"] == r.lengths.sum()
        assert metrics["unfinished"] == pytest.approx(1 - sum(text.split()[-1] == str(END) for text in r.texts) / 8)
        assert metrics["entropy"] == pytest.approx(-r.sampled_logprobs.sum().item() / r.mask.sum().item(), rel=1e-4)
        spreads = [math.sqrt(sum((x - sum(group) / 4) ** 2 for x in group) / 3) for group in r.rewards.tolist()]
        assert metrics["group_std"] == pytest.approx(sum(spreads) / 2, abs=1e-6)
        equal = [len(set(group)) == 1 for group in r.rewards.tolist()]
        assert metrics["no_signal"] == pytest.approx(sum(equal) / len(equal))
    run(tiny(), small(), log=check)


def test_a_rollout_without_any_signal_leaves_the_policy_where_it_is(tiny):
    model = tiny()
    run(model, small(rollouts=2, beta=0.0), rewards={"constant": lambda text, example: 1.0})
    assert torch.equal(weights_of(model), weights_of(tiny()))


@pytest.mark.parametrize(
    "fields, culprit",
    [
        ({"group_size": 1}, "group_size 1"),
        ({"temperature": 0}, "temperature 0"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"lr": 0}, "lr 0"),
        ({"rollouts": 0}, "rollouts 0"),
        ({"minibatches": 0}, "minibatches 0"),
        ({"minibatches": 9}, "minibatches 9"),
        ({"inner_epochs": 0}, "inner_epochs 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"reference_every": 0}, "reference_every 0"),
        ({"prompts_per_rollout": 0}, "prompts_per_rollout 0"),
        ({"validate_every": 0}, "validate_every 0"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens 0"),
        ({"beta": -1}, "beta -1"),
        ({"clip_high": -0.1}, "clip_high -0.1"),
        ({"dtype": "int4"}, "int4"),
        ({"importance_cap": 2.0, "old_logprobs": "sampler"}, "importance_cap 2.0 compares sampler and trainer"),
        ({"stale_limit": -1.0}, "stale_limit -1"),
        ({"scale": "Batch"}, "scale 'Batch'"),
    ],
)
def test_a_setting_out_of_range_is_one_line_that_names_it(fields, culprit):
    with pytest.raises(ValueError) as error:
        check_settings(small(**fields))
    assert culprit in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- beside TRL

with safe_open(
    Path(__file__).parent / "fixtures" / "trl_losses.safetensors", "pt"
) as file:  # made by make_trl_losses.py
    ABOUT, TRL = json.loads(file.metadata()["about"]), {name: file.get_tensor(name) for name in file.keys()}
CASES = {case["name"]: case | {"row": i} for i, case in enumerate(ABOUT["cases"])}


def in_our_words(case):
    """The tensors (float64) and switches of policy_loss that a case of TRL's settings stands for."""
    cispo, high = case["loss_type"] == "cispo", case["epsilon_high"] or case["epsilon"]
    x = {name: tensor.double() for name, tensor in TRL.items() if name != "mask"} | {"mask": TRL["mask"]}
    logprobs = x["logprobs"].requires_grad_()
    advantages = x["token_advantages" if "token_advantages" in case["name"] else "advantages"]
    switches = dict(
        # TRL's epsilon_high of CISPO is the upper clip itself, and it has no lower one
        clip_low=1 if cispo else case["epsilon"], clip_high=high - 1 if cispo else high, detach_ratio=cispo,
        sequence_ratio=case["importance_sampling_level"] == "sequence", beta=case["beta"],
        weigh_kl=case.get("use_bias_correction_kl", False), stale_limit=case.get("off_policy_mask_threshold", 0.0),
        mean={"grpo": "sequence", "dr_grpo": "constant"}.get(case["loss_type"], "token"),
        normaliser=len(logprobs) * ABOUT["max_completion_length"] if case["loss_type"] == "dr_grpo" else None)
    if case["use_vllm"]:  # TRL weighs the policy's term; no weight is negative, so that it may weigh the advantages
        advantages = advantages.view(len(logprobs), -1) * x[f"weights_{case['vllm_importance_sampling_mode']}"]
    return (logprobs, x["old_logprobs"], x["ref_logprobs"] if case["beta"] else None, advantages, x["mask"]), switches


def of_trl(case, suffix=""):
    return TRL["loss" + suffix][case["row"]], TRL["gradient" + suffix][case["row"]]


SAME = [name for name, case in CASES.items() if not case["delta"]]


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_are_those_that_trl_computed(name):
    tensors, switches = in_our_words(CASES[name])
    loss, _ = policy_loss(*tensors, **switches)
    loss.backward()
    theirs, gradient = of_trl(CASES[name])
    torch.testing.assert_close(loss.detach(), theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tensors[0].grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_are_those_that_trl_computed_in_fp32(name):
    tensors, switches = in_our_words(CASES[name])
    logprobs, *others = (x if x is None or x is tensors[4] else x.detach().float() for x in tensors)
    loss, _ = policy_loss(logprobs.requires_grad_(), *others, **switches)
    loss.backward()
    theirs, gradient = of_trl(CASES[name], "_float32")
    torch.testing.assert_close(loss.detach(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-5, atol=1e-6)


def beside_trl(tensors, switches, extra):
    """Our loss plus the mean, taken as the switches say, of an extra loss a token; its value and gradient."""
    logprobs, mask = tensors[0], tensors[4].double()
    extra = torch.where(mask > 0, extra, 0)
    if switches["mean"] == "sequence":
        extra = (extra.sum(1) / mask.sum(1).clamp(min=1)).sum() / len(mask)
    else:
        extra = extra.sum() / (switches["normaliser"] or mask.sum())
    loss = policy_loss(*tensors, **switches)[0] + extra
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["delta"]])
def test_trls_delta_bounds_what_we_leave_unbounded_for_a_negative_advantage(name):
    """TRL's delta (INTELLECT-2's two-sided clip) holds the ratio below it for A < 0 too, where eq. 3's min never clips:
    such a token costs -delta A there and has no gradient."""
    tensors, switches = in_our_words(CASES[name])
    logprobs, old, _, advantages, mask = tensors
    ratio, delta = (logprobs - old).exp(), CASES[name]["delta"]
    bounded = (ratio > delta) & (advantages[:, None] < 0)
    assert (bounded & (mask > 0)).any()
    value, gradient = beside_trl(tensors, switches, torch.where(bounded, (ratio - delta) * advantages[:, None], 0))
    theirs, their_gradient = of_trl(CASES[name])
    torch.testing.assert_close(value, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-9, atol=1e-12)


def test_advantages_are_those_that_trl_computed():
    rewards = TRL["rewards"].double()
    for scale in ("group", "batch", "none"):
        torch.testing.assert_close(group_advantages(rewards, scale), TRL[f"advantages_{scale}"], rtol=0, atol=1e-6)


def test_trls_truncated_weights_are_those_that_importance_cap_makes():
    on = TRL["mask"] > 0
    ours = torch.exp(TRL["old_logprobs"].double() - TRL["sampler_logprobs"].double()).clamp(max=2)
    torch.testing.assert_close(ours[on], TRL["weights_token_truncate"][on], rtol=1e-6, atol=0)


@pytest.mark.full
@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is not installed")
@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_loss_and_gradient_are_those_of_trl(mean):
    """TRL's own _compute_loss, on a stand-in for the trainer that has only what the method reads."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    logprobs, old, ref, advantages, _ = (torch.tensor(x, dtype=torch.float64) for x in ragged(1))
    mask = (torch.arange(7) < torch.tensor([7, 1, 3, 5, 2])[:, None]).long()
    results = []
    for theirs in (True, False):
        logprobs = logprobs.detach().requires_grad_()
        if theirs:
            settings = dict(
                top_entropy_quantile=1.0,
                off_policy_mask_threshold=None,
                importance_sampling_level="token",
                beta=0.1,
                loss_type={"token": "bnpo", "sequence": "grpo"}[mean],
                epsilon_low=0.2,
                epsilon_high=0.28,
                use_vllm=False,
                args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
                aux_loss_enabled=False,
                model=SimpleNamespace(training=True),
                current_gradient_accumulation_steps=1,
                _entropy_bonus_enabled=False,
                _metrics={"train": Recorder()},
                accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x),
            )
            settings["_get_per_token_logps_and_entropies"] = lambda *args, **kwargs: (logprobs, torch.zeros(5, 7), None)
            inputs = dict(
                prompt_ids=torch.zeros(5, 2).long(),
                prompt_mask=torch.ones(5, 2).long(),
                completion_mask=mask,
                completion_ids=torch.zeros(5, 7).long(),
                advantages=advantages,
                old_per_token_logps=old,
                ref_per_token_logps=ref,
            )
            trainer = SimpleNamespace(**settings)
            loss = GRPOTrainer._compute_loss(trainer, None, inputs)
            metrics = {"kl": trainer._metrics["train"]["kl"][0],
                       "clip_fraction": trainer._metrics["train"]["clip_ratio/region_mean"][0]}
        else:
            loss, metrics = policy_loss(logprobs, old, ref, advantages, mask, clip_high=0.28, beta=0.1, mean=mean)
        loss.backward()
        results.append((loss.item(), logprobs.grad.clone(), metrics))
    (a, grad_a, metrics_a), (b, grad_b, metrics_b) = results
    assert a == pytest.approx(b, rel=1e-6)
    torch.testing.assert_close(grad_a, grad_b)
    assert {name: metrics_b[name] for name in metrics_a} == pytest.approx(metrics_a, rel=1e-5)


class Recorder(dict):
    def __missing__(self, name):
        self[name] = []
        return self[name]


# ------------------------------------------------------------------------------------------- fast, and the same

class OnlyForward(torch.nn.Module):
    """A model that has nothing but logits to give."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)


def scored_rollout(tiny, **fields):
    config = small(group_size=6, beta=0.1, **fields)
    r = roll(sharp(tiny, 1), config, [[1, 2], [4, 5, 6, 7, 8]], model_module.generate, end_ids=MANY_ENDS)
    r.old_logprobs, r.ref_logprobs = (
        grpo.all_logprobs(sharp(tiny, 1), r, config),
        grpo.all_logprobs(sharp(tiny, 2), r, config),
    )
    return config, r


@pytest.mark.parametrize("pieces", [1, 3, 7, 10**6])
def test_log_probabilities_and_their_gradient_do_not_depend_on_how_many_logits_there_are_at_once(
    tiny, pieces, monkeypatch
):
    config, r = scored_rollout(tiny, temperature=0.7)
    weights = torch.randn(r.mask.shape, generator=torch.Generator().manual_seed(0))
    results = []
    for model, rows in ((OnlyForward(sharp(tiny, 1)), 10**6), (sharp(tiny, 1), pieces)):
        monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", rows * 16)  # tiny's vocabulary is 16
        logprobs = grpo.logprobs_of(model, r, list(range(12)), config)
        (logprobs * weights[:, :logprobs.shape[1]]).sum().backward()
        results.append((logprobs, torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_head_in_pieces_is_summed_in_float32(tiny, monkeypatch):
    """In bfloat16 each piece casts the head's weights anew: pieces that shared a cast would sum into it in bfloat16."""
    config, r = scored_rollout(tiny)
    weights = torch.randn(r.mask.shape, generator=torch.Generator().manual_seed(0))
    errors, exact = [], None
    for dtype, rows in (("float32", 10**6), ("bfloat16", 10**6), ("bfloat16", 1)):
        model = sharp(tiny, 1)
        monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", rows * 16)
        logprobs = grpo.logprobs_of(model, r, list(range(12)), replace(config, dtype=dtype))
        (logprobs * weights[:, :logprobs.shape[1]]).sum().backward()
        gradient = model.lm_head.weight.grad
        exact = gradient if exact is None else exact
        errors.append(((gradient - exact).norm() / exact.norm()).item())
    assert 0 < errors[2] < 1.3 * errors[1]


def test_the_head_sees_sampled_positions_only_and_no_more_of_them_at_once_than_allowed(tiny, monkeypatch):
    config, r = scored_rollout(tiny)
    model, seen = sharp(tiny, 1), []
    monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", 5 * 16)
    head = model.head
    model.head = lambda states: seen.append(len(states)) or head(states)
    with torch.no_grad():
        grpo.logprobs_of(model, r, list(range(12)), config)
    assert max(seen) == 5 and sum(seen) == int(r.mask.sum())


def test_log_probabilities_are_zero_outside_the_sampled_tokens(tiny):
    config, r = scored_rollout(tiny)
    assert (r.old_logprobs[~r.mask] == 0).all() and (r.old_logprobs[r.mask] < 0).all()


def test_with_the_samplers_log_probabilities_as_pi_old_nothing_is_scored_for_it_and_the_run_hardly_differs(
    tiny, monkeypatch
):
    runs, scored = {}, Counter()
    for choice in ("trainer", "sampler"):
        original = grpo.all_logprobs
        monkeypatch.setattr(grpo, "all_logprobs", lambda *a: scored.update([choice]) or original(*a))
        model = sharp(tiny)
        runs[choice] = run(model, small(rollouts=3, beta=0.0, old_logprobs=choice, lr=1e-2))[0:3], weights_of(model)
        monkeypatch.setattr(grpo, "all_logprobs", original)
    assert scored == {"trainer": 3}
    torch.testing.assert_close(runs["trainer"][1], runs["sampler"][1], atol=1e-4, rtol=1e-3)
    for a, b in zip(runs["trainer"][0], runs["sampler"][0]):
        assert a["reward"] == b["reward"] and a["entropy"] == pytest.approx(b["entropy"], abs=1e-4)
        assert b["sampler_gap"] < 1e-5


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_sampler_gap_is_measured_also_where_its_log_probabilities_are_pi_old(tiny, shift):
    metrics = run(tiny(), small(rollouts=1, old_logprobs="sampler"), generate=lying(shift))[0]
    assert metrics["sampler_gap"] == pytest.approx(shift, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_that_waits_elsewhere_changes_nothing_and_is_the_policy_at_first(tiny, dtype):
    histories = []
    for offload in (False, True):
        model = sharp(tiny)
        histories.append(
            (
                run(model, small(rollouts=2, beta=0.1, minibatches=1, dtype=dtype, offload_reference=offload)),
                weights_of(model),
            )
        )
    assert torch.equal(histories[0][1], histories[1][1])
    assert histories[0][0][0]["kl"] == pytest.approx(0, abs=1e-6)


def test_an_offloaded_reference_is_on_the_models_device_only_while_it_scores(tiny, monkeypatch):
    moves, to, score = [], torch.nn.Module.to, grpo.all_logprobs
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: moves.append(where) or to(self, where))
    monkeypatch.setattr(grpo, "all_logprobs", lambda *arguments: moves.append("scores") or score(*arguments))
    run(tiny(), small(rollouts=2, beta=0.1, old_logprobs="sampler", offload_reference=True))
    device = torch.device("cpu")  # of the model, where "cpu" is the word for elsewhere
    assert moves == ["cpu"] + [device, "scores", "cpu"] * 2


def test_a_cast_copy_takes_no_memory_for_a_copy_in_float32(tiny, monkeypatch):
    model, copied = tiny(), []
    deepcopy = torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(1) or deepcopy(self, memo))
    for dtype in ("bfloat16", "float32"):
        cast = grpo.cast_copy(model, dtype)
        pointers = [{p.data_ptr() for p in m.parameters()} for m in (model, cast)]
        assert not copied and not pointers[0] & pointers[1]


def test_a_copy_to_run_has_its_weights_cast_its_buffers_kept_and_nothing_to_train(tiny):
    model = tiny()
    copied = grpo.cast_copy(model, "bfloat16")
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in copied.parameters()
    )
    assert copied.cos.dtype == torch.float32 and copied.lm_head.weight is copied.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())


@pytest.mark.full
def test_an_update_with_a_vocabulary_of_150_000_stays_within_the_readmes_formula():
    """Qwen2.5-0.5B's width and vocabulary, two layers, 16 x 1,024 tokens; the peak of one process without libraries."""
    if fast_dtype("cpu") != "bfloat16":
        pytest.skip("this processor takes hours for bfloat16")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, model, grpo
from lab.layers import fast_layers, recompute
torch.manual_seed(0)
c = model.Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=2,
                 num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=1280, model_type="qwen2")
m = fast_layers(recompute(model.Transformer(c).init_weights()))
def generate(model, prompts, n, max_new_tokens, **_):
    shape = (len(prompts) * n, max_new_tokens)
    return torch.randint(151936, shape), torch.full(shape[:1], max_new_tokens), torch.full(shape, -11.9)
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
small = grpo.GRPOConfig(rollouts=1, prompts_per_rollout=2, group_size=8, minibatches=1, max_new_tokens=1024,
                        micro_batch_tokens=4096, old_logprobs="sampler", dtype="bfloat16")
weights, tokens = sum(p.numel() for p in m.parameters()), small.micro_batch_tokens
before = peak() - 4 * weights
out = grpo.train(m, [{{}}], encode=lambda e: [1], decode=lambda ids: str(sum(ids)), generate=generate, end_ids=[0],
                 rewards={{"r": lambda t, e: float(int(t) % 2)}}, config=small)
# a layer's activations in bf16: the MLP's three wide ones, and a dozen of the width
layer = tokens * (2 * 4864 * 3 + 896 * 12) * 2
print(peak() - before, 20 * weights + 2 * 2 * 896 * tokens + layer + 2 ** 30, out["grad_norm"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak, formula, grad_norm = map(float, result.stdout.split())
    print(f"peak {peak / 1e9:.2f} GB, the formula says {formula / 1e9:.2f} GB")
    assert 0 < grad_norm and peak <= formula, f"{peak / 1e9:.2f} GB, the formula says {formula / 1e9:.2f} GB"


def test_the_samplers_copy_is_gone_before_the_updates(tiny):
    copies, alive = [], []

    def generate(model, *args, **settings):
        copies.append(weakref.ref(model))
        return model_module.generate(model, *args, **settings)

    estimator = SimpleNamespace(advantages=lambda r: r.rewards.flatten(),
                                learn=lambda r, rows: alive.append(copies[-1]() is not None) or {})
    model = tiny()
    run(model, small(rollouts=2, dtype="bfloat16"), generate=generate, advantage_estimator=estimator)
    assert alive and not any(alive)
    run(model, small(rollouts=2, dtype="float32"), generate=generate, advantage_estimator=estimator)
    assert copies[-1]() is model  # which has this precision already

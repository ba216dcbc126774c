"""PRIME's equations 3-5 against plain loops, and the process reward model's learning inside grpo.train."""

import copy
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import checkpoint
import grpo
import model as model_module
from sevens import MANY_ENDS, train_on_sevens
from variants import prime as prime_module
from variants.dapo import DAPO, DAPOConfig
from variants.reward_model import draw_once
from variants.prime import PRIME, PRIMEConfig, implicit_rewards, others_mean, outcome_loss, prime_advantages

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------- equations 3 and 4

def test_an_implicit_reward_is_beta_times_the_log_ratio_of_a_sampled_token_and_zero_elsewhere():
    logprobs, ref = torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[-3.0, -1.5, -math.inf]])
    assert implicit_rewards(logprobs, ref, torch.tensor([[1, 1, 0]]), 0.5).tolist() == [[1.0, -0.25, 0]]
    assert implicit_rewards(logprobs, ref, torch.tensor([[0, 1, 0]]).bool(), 2.0).tolist() == [[0, -1.0, 0]]


def test_the_outcome_loss_is_the_cross_entropy_of_the_summed_rewards():
    rewards = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outcomes = torch.tensor([1., 0, 0, 1, 1, 0], dtype=torch.float64)
    by_hand = 0.0
    for row, outcome in zip(rewards.tolist(), outcomes.tolist()):
        right = 1 / (1 + math.exp(-sum(row)))
        by_hand -= outcome * math.log(right) + (1 - outcome) * math.log(1 - right)
    assert outcome_loss(rewards, outcomes).item() == pytest.approx(by_hand / 6)
    torch.testing.assert_close(outcome_loss(rewards, outcomes), torch.nn.BCELoss()(rewards.sum(1).sigmoid(), outcomes))
    parts = [outcome_loss(rewards[part], outcomes[part], normaliser=6) for part in (slice(2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), outcome_loss(rewards, outcomes))


@pytest.mark.parametrize("reward, outcome, loss, gradient", [
    (1000.0, 1.0, 0.0, 0.0), (1000.0, 0.0, 1000.0, 1.0), (-1000.0, 1.0, 1000.0, -1.0), (-1000.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, math.log(2), -0.5)])
def test_the_outcome_loss_and_its_gradient_are_finite_at_any_reward(reward, outcome, loss, gradient):
    rewards = torch.tensor([[reward / 2, reward / 2]], requires_grad=True)
    result = outcome_loss(rewards, torch.tensor([outcome]))
    result.backward()
    assert result.item() == pytest.approx(loss) and rewards.grad.tolist() == [pytest.approx([gradient] * 2)]


# ------------------------------------------------------------------------------------------- equation 5

K, SPANS = 3, [(2, 6), (0, 3), (4, 5), (1, 8), (7, 8), (0, 8)]  # where the rows' sampled tokens begin and end, of 8


def ragged(seed=0):
    """Process rewards (6, 8), the outcomes of two groups of three, and the mask of SPANS."""
    process = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(process.shape, dtype=torch.bool)
    for row, (start, end) in enumerate(SPANS):
        mask[row, start:end] = True
    return torch.where(mask, process, 0), torch.tensor([[1., 0, 0], [0, 1, 1]], dtype=torch.float64), mask


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5, 0.0])
def test_an_advantage_is_equation_5_by_plain_loops(gamma):
    process, outcomes, mask = ragged()
    advantages = prime_advantages(process, outcomes, mask, gamma)
    for row, (start, end) in enumerate(SPANS):
        others = [other for other in range(row // K * K, row // K * K + K) if other != row]
        of_token = [sum(process[o, s].item() for s in range(*SPANS[o])) / (SPANS[o][1] - SPANS[o][0]) for o in others]
        baseline = sum(of_token) / len(others)
        outcome = outcomes[row // K, row % K].item() - sum(outcomes[o // K, o % K].item() for o in others) / len(others)
        for t in range(8):
            returns = sum(gamma ** (s - t) * (process[row, s].item() - baseline) for s in range(t, end))
            assert advantages[row, t].item() == pytest.approx(returns + outcome if start <= t < end else 0, abs=1e-9)


def test_a_small_case_by_hand():
    process, mask = torch.tensor([[1., 2.], [4., 0.]]), torch.tensor([[1, 1], [1, 0]])
    # baselines 4 and 1.5, each the other's mean; outcome advantages 1 and -1
    assert prime_advantages(process, torch.tensor([[1., 0.]]), mask).tolist() == [[-3 - 2 + 1, -2 + 1], [2.5 - 1, 0]]
    halved = prime_advantages(process, torch.tensor([[1., 0.]]), mask, 0.5)
    assert halved.tolist() == [[-3 - 1 + 1, -2 + 1], [2.5 - 1, 0]]


def test_what_stands_in_prompt_and_padding_changes_no_advantage():
    process, outcomes, mask = ragged()
    rubbish = torch.where(mask, process, 1e6)
    noisy, clean = (prime_advantages(x, outcomes, mask, 0.9) for x in (rubbish, process))
    torch.testing.assert_close(noisy, clean)


def leave_one_out(x):
    return x - others_mean(x)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    x = torch.tensor([[1., 0, 0, 0], [1, 2, 3, 6]], dtype=torch.float64)
    expected = torch.tensor([[1, -1 / 3, -1 / 3, -1 / 3], [-8 / 3, -4 / 3, 0, 4]], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(x), expected)


def test_a_group_of_one_completion_is_refused():
    """Its others' mean would be 0 / 0."""
    with pytest.raises(ValueError, match="K is 1"):
        prime_advantages(torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3))


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_a_group_of_one_outcome_has_an_outcome_advantage_of_zero(outcome):
    process, outcomes, mask = ragged()
    outcomes[0] = outcome
    assert not prime_advantages(torch.zeros_like(process), outcomes, mask)[:K].any()
    assert prime_advantages(torch.zeros_like(process), outcomes, mask)[K:].any()


def test_equal_process_rewards_have_no_advantage_whatever_the_lengths():
    """Which the mean of the others' tokens gives, and their sum, as equation 5 is printed, does not."""
    _, outcomes, mask = ragged()
    assert not prime_advantages(torch.full(mask.shape, 0.25), torch.ones_like(outcomes), mask).any()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_not_even_nan_or_inf_outside_the_mask_reaches_an_advantage(rubbish):
    """0 * inf is nan: what lies outside must be out before it meets a product."""
    process, outcomes, mask = ragged()
    noisy = torch.where(mask, process, rubbish)
    assert torch.equal(prime_advantages(noisy, outcomes, mask, 0.9), prime_advantages(process, outcomes, mask, 0.9))


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_not_even_nan_or_inf_outside_the_mask_reaches_the_reward_models_gradient(rubbish):
    process, outcomes, mask = ragged()
    gradients = []
    for outside in (0.0, rubbish):
        logprobs = torch.where(mask, process, outside).requires_grad_()
        rewards = implicit_rewards(logprobs, torch.where(mask, -process, outside), mask, 0.3)
        outcome_loss(rewards, outcomes.flatten()).backward()
        gradients.append(logprobs.grad)
    assert torch.equal(*gradients) and not gradients[0][~mask].any() and gradients[0][mask].all()


def test_the_gradient_of_the_outcome_loss_by_micro_batches_is_that_of_the_whole():
    process, outcomes, _ = ragged()
    gradients = []
    for lots in ([slice(0, 6)], [slice(0, 1), slice(1, 4), slice(4, 6)]):
        rewards = process.clone().requires_grad_()
        for lot in lots:
            outcome_loss(rewards[lot], outcomes.flatten()[lot], normaliser=6).backward()
        gradients.append(rewards.grad)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-6)
    alone = process.clone().requires_grad_()
    outcome_loss(alone, outcomes.flatten()).backward()  # by itself, the mean over its own completions
    torch.testing.assert_close(alone.grad, gradients[0])


# ------------------------------------------------------------------------------------------- the estimator

def small(**fields):
    return grpo.GRPOConfig(**dict(rollouts=3, prompts_per_rollout=2, group_size=6, minibatches=2, lr=1e-2, warmup=1,
                                  beta=0.0, mean="token", max_new_tokens=8, dtype="float32", grad_clip=1e9) | fields)


FAST = PRIMEConfig(prm_lr=0.01)


def sharp(tiny, seed=0):
    """A tiny model whose logits have a standard deviation of about 1, so that probabilities differ."""
    model = tiny(seed=seed, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, 0, model.config.hidden_size**-0.5, torch.Generator().manual_seed(seed))
    return model


def holds_a_low_token(text, example):
    return float(min(map(int, text.split())) < 3)


def rolled(model, config, rule="accuracy", right=holds_a_low_token, seed=0, prompts=([1, 2], [4, 5, 6, 7, 8])):
    """A Rollout of two groups, of ragged lengths and some of them right."""
    r = grpo.rollout(model, prompts, encode=list, decode=lambda ids: " ".join(map(str, ids)),
                     generate=model_module.generate, end_ids=MANY_ENDS,
                     rewards={rule: right, "other": lambda text, example: 0.5}, weights={}, config=config,
                     generator=torch.Generator().manual_seed(seed))
    r.old_logprobs = grpo.all_logprobs(model, r, config)
    assert len(set(r.lengths.tolist())) > 2 and 0 < r.parts[rule].mean() < 1
    return r


def weights_of(*models):
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def perturbed(estimator, seed=0):
    """The estimator with a reward model that has left its reference."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in estimator.prm.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    return estimator


def plain(estimator, lr=0.0):
    """The estimator with an optimizer that follows the gradient and nothing else, or not even that."""
    estimator.optimizer = torch.optim.SGD(estimator.prm.parameters(), lr=lr)
    return estimator


def test_before_it_has_learnt_the_advantage_is_that_of_the_outcome_alone(tiny):
    model, config = sharp(tiny), small()
    r = rolled(model, config)
    advantages = PRIME(model, config, FAST).advantages(r)
    torch.testing.assert_close(advantages, leave_one_out(r.parts["accuracy"]).flatten()[:, None] * r.mask)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_are_rewarded_by_the_reward_model_against_its_own_reference_as_grpo_scores_them(tiny, temperature):
    model, config = sharp(tiny), small(temperature=temperature)
    r, estimator = rolled(model, config), plain(perturbed(PRIME(model, config, PRIMEConfig(gamma=0.9, prm_beta=0.3))))
    process = 0.3 * (grpo.all_logprobs(estimator.prm, r, config) - grpo.all_logprobs(model, r, config))
    torch.testing.assert_close(estimator.advantages(r), prime_advantages(process, r.parts["accuracy"], r.mask, 0.9))
    loss = torch.nn.BCELoss()(process.sum(1).sigmoid(), r.parts["accuracy"].flatten()).item()
    right = ((process.sum(1) > 0) == (r.parts["accuracy"].flatten() == 1)).float().mean().item()
    assert estimator.learn(r, [0]) == pytest.approx({"prm_loss": loss, "prm_accuracy": right}, rel=1e-4)


def test_the_advantages_are_of_the_rewards_from_before_the_reward_models_step(tiny):
    model, config = sharp(tiny), small()
    r = rolled(model, config)
    still, moving = plain(perturbed(PRIME(model, config))), plain(perturbed(PRIME(model, config)), lr=1.0)
    first = moving.advantages(r)
    assert torch.equal(first, still.advantages(r)) and not torch.equal(moving.advantages(r), first)


def test_one_rollout_is_one_step_down_the_cross_entropys_gradient(tiny):
    model, config = sharp(tiny), small(micro_batch_tokens=1)
    r, estimator = rolled(model, config), plain(perturbed(PRIME(model, config)), lr=0.5)
    by_hand = copy.deepcopy(estimator.prm)
    logits = by_hand(r.ids[:, :-1]).log_softmax(-1).gather(2, r.ids[:, 1:, None])[:, :, 0]
    ref = model(r.ids[:, :-1]).log_softmax(-1).gather(2, r.ids[:, 1:, None])[:, :, 0].detach()
    right = (0.05 * ((logits - ref) * r.mask).sum(1)).sigmoid()
    torch.nn.functional.binary_cross_entropy(right, r.parts["accuracy"].flatten()).backward()
    estimator.advantages(r)
    for ours, theirs in zip(estimator.prm.parameters(), by_hand.parameters()):
        torch.testing.assert_close(ours.detach(), (theirs - 0.5 * theirs.grad).detach(), atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in estimator.prm.parameters())


def test_it_learns_to_tell_right_completions_from_wrong_ones_also_those_it_has_not_seen(tiny):
    model, config, history = sharp(tiny), small(group_size=16), []
    estimator = PRIME(model, config, PRIMEConfig(prm_lr=0.003, prm_beta=0.5))
    for seed in range(40):
        r = rolled(model, config, right=lambda text, example: float(int(text.split()[0]) < 8), seed=seed)
        advantages = estimator.advantages(r)
        history.append(estimator.learn(r, [0]))
    last = {name: sum(metrics[name] for metrics in history[-5:]) / 5 for name in history[0]}
    assert history[0]["prm_loss"] == pytest.approx(math.log(2)) and not advantages.requires_grad
    assert last["prm_loss"] < 0.55 and last["prm_accuracy"] > 0.7, last


def test_policy_and_reference_stay_as_they_are_while_the_reward_model_learns(tiny):
    model, config = sharp(tiny), small()
    before, estimator, r = weights_of(model), PRIME(model, config, FAST), rolled(model, config)
    for _ in range(2):
        estimator.advantages(r)
    assert torch.equal(weights_of(model), before) and torch.equal(weights_of(estimator.reference), before)
    assert all(p.grad is None for m in (model, estimator.reference) for p in m.parameters())
    assert not any(p.requires_grad for p in estimator.reference.parameters()) and not estimator.needs_reference
    assert not torch.equal(weights_of(estimator.prm), before)
    with torch.no_grad():
        model.norm.weight.mul_(2)  # and they do not follow the policy
    assert torch.equal(weights_of(estimator.reference), before)


def test_in_the_updates_of_the_policy_nothing_is_left_to_learn(tiny):
    model, config = sharp(tiny), small()
    estimator, r = PRIME(model, config, FAST), rolled(model, config)
    estimator.advantages(r)
    before, metrics = weights_of(estimator.prm), [estimator.learn(r, [0, 1]), estimator.learn(r, [2])]
    assert torch.equal(weights_of(estimator.prm), before) and metrics == [estimator.metrics] * 2


def test_scores_and_step_do_not_depend_on_the_micro_batches(tiny):
    model, results = sharp(tiny), []
    r = rolled(model, small())
    for tokens in (1, 25, 10 ** 6):
        estimator = plain(perturbed(PRIME(model, small(micro_batch_tokens=tokens))), lr=0.1)
        advantages = estimator.advantages(r)
        results.append((advantages, weights_of(estimator.prm), torch.tensor([*estimator.metrics.values()])))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_the_reward_models_gradient_is_cut_to_the_norm_of_grad_clip(tiny):
    model, config = sharp(tiny), small(grad_clip=1e-3)
    r, estimator = rolled(model, config), plain(PRIME(model, config), lr=1.0)
    before = weights_of(estimator.prm)
    estimator.advantages(r)
    assert (weights_of(estimator.prm).double() - before.double()).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_dropout_makes_no_noise_in_the_rewards(tiny):
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.dropout = sharp(tiny), torch.nn.Dropout(0.5)

        def forward(self, ids):
            return self.inner.head(self.dropout(self.inner.hidden(ids)))
    config = small()
    r, estimator = rolled(sharp(tiny), config), PRIME(Dropped().train(), config)
    torch.testing.assert_close(estimator.advantages(r), leave_one_out(r.parts["accuracy"]).flatten()[:, None] * r.mask)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forward_pass_is_in_the_runs_dtype_and_weights_and_advantages_in_fp32(tiny, dtype):
    seen, model = [], sharp(tiny)
    r, estimator = rolled(model, small()), PRIME(model, small(dtype=dtype))
    for network in (estimator.prm, estimator.reference):
        network.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
    assert estimator.advantages(r).dtype == torch.float32 and set(seen) == {getattr(torch, dtype)}
    assert {p.dtype for p in estimator.prm.parameters()} == {torch.float32}


def test_one_step_lowers_the_cross_entropy_of_completions_that_can_be_told_apart(tiny):
    model, config, losses = sharp(tiny), small(), []
    r, estimator = rolled(model, config), PRIME(model, config, FAST)
    r.parts["accuracy"] = torch.tensor([[1., 0] * 3] * 2)
    for row in range(12):  # right ones say 5, wrong ones 12
        r.ids[row, r.ends[row] - int(r.lengths[row]):r.ends[row]] = 12 if row % 2 else 5
    for _ in range(3):
        estimator.advantages(r)
        losses.append(estimator.metrics["prm_loss"])
    assert losses[0] == pytest.approx(math.log(2)) and losses[0] > losses[1] > losses[2]
    assert estimator.metrics["prm_accuracy"] == 1


def test_which_tokens_pad_a_row_and_how_far_changes_nothing(tiny):
    model, config, results = sharp(tiny), small(), []
    r = rolled(model, config)
    for filler, wider in ((0, 0), (7, 0), (13, 4)):
        other = copy.deepcopy(r)
        for name, fill in (("ids", filler), ("mask", False), ("old_logprobs", 0.0)):
            setattr(other, name, torch.nn.functional.pad(getattr(other, name), (0, wider), value=fill))
        for row, end in enumerate(r.ends):
            other.ids[row, end:] = filler
        estimator = plain(perturbed(PRIME(model, config)), lr=0.1)
        advantages, width = estimator.advantages(other), r.mask.shape[1]
        assert not advantages[:, width:].any()
        results.append((advantages[:, :width], weights_of(estimator.prm), torch.tensor([*estimator.metrics.values()])))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------- the filter and the outcome

@pytest.mark.parametrize("right, kept", [(0, False), (1, False), (2, True), (3, False), (4, False)])
def test_a_prompt_is_kept_whose_accuracy_lies_strictly_between_the_bounds(tiny, right, kept):
    estimator = PRIME(tiny(), small(), PRIMEConfig(lowest=0.25, highest=0.75))
    scores = torch.tensor([[1.0] * right + [0.0] * (4 - right)])
    r = SimpleNamespace(parts={"accuracy": scores, "format": 1 - scores}, rewards=scores + 0.3)
    assert estimator.keep(r) == [kept]


def test_the_papers_bounds_of_four_completions_are_neither_all_right_nor_all_wrong(tiny):
    estimator = PRIME(tiny(), small())
    groups = torch.tensor([[1.0] * n + [0.0] * (4 - n) for n in range(5)])
    assert estimator.keep(SimpleNamespace(parts={"accuracy": groups})) == [False, True, True, True, False]


@pytest.mark.parametrize("count", [5, 10, 15, 20, 40])
def test_an_accuracy_of_exactly_a_fifth_or_four_fifths_is_not_between_them(tiny, count):
    estimator = PRIME(tiny(), small())
    fifth = count // 5
    for right, kept in ((fifth, False), (fifth + 1, True), (4 * fifth, False), (4 * fifth - 1, True)):
        scores = torch.tensor([[1.0] * right + [0.0] * (count - right)])
        assert estimator.keep(SimpleNamespace(parts={"accuracy": scores})) == [kept]


def test_the_outcome_is_the_rule_that_was_named_and_not_the_reward(tiny):
    model, config = sharp(tiny), small()
    r = rolled(model, config, rule="right")
    r.rewards = torch.randn(r.rewards.shape)  # as other rules, a length penalty or a Judge would make them
    estimator = PRIME(model, config, outcome="right")
    torch.testing.assert_close(estimator.advantages(r), leave_one_out(r.parts["right"]).flatten()[:, None] * r.mask)
    r = SimpleNamespace(parts={"right": torch.tensor([[1., 0.]]), "accuracy": torch.tensor([[0., 0.]])})
    assert estimator.keep(r) == [True]


def test_an_outcome_that_is_no_rule_of_the_run_is_refused_by_name(tiny):
    with pytest.raises(ValueError, match="'right' is none of the rules accuracy, format"):
        PRIME(tiny(), small(), outcome="right").keep(SimpleNamespace(parts=dict.fromkeys(("accuracy", "format"))))


# ------------------------------------------------------------------------------------------- inside the loop

def holds_a_seven(text, example):
    return float("7" in text.split())


def run(model, config, settings=FAST, estimator=None, resample=0, **arguments):
    """Trains to sample token 7; the metrics of each rollout without the times."""
    estimator = estimator or PRIME(model, config, settings)
    filtered = DAPO(DAPOConfig(resample=resample), config.max_new_tokens, estimator.keep)
    arguments = dict(rewards={"accuracy": holds_a_seven}, select=filtered.select) | arguments
    return train_on_sevens(model, config, advantage_estimator=estimator, **arguments)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_reward_rises_within_a_few_rollouts(tiny, gamma):
    config = small(rollouts=12, group_size=16, minibatches=4, max_new_tokens=5, grad_clip=1.0)
    history = run(tiny(), config, PRIMEConfig(prm_lr=3e-3, gamma=gamma), select=draw_once)
    rewards = [metrics["reward"] for metrics in history]
    assert sum(rewards[:2]) / 2 < 0.5 and sum(rewards[-3:]) / 3 > 0.85, rewards
    assert all({"prm_loss", "prm_accuracy"} <= metrics.keys() for metrics in history)


def test_the_process_rewards_are_felt(tiny):
    """Beside the same run whose reward model stands still."""
    config = small(rollouts=3)
    moving, still = run(tiny(), config), run(tiny(), config, PRIMEConfig(prm_lr=1e-30))
    assert moving[0]["loss"] == still[0]["loss"] and moving[-1]["loss"] != still[-1]["loss"]
    assert moving[0]["prm_loss"] == still[-1]["prm_loss"] == pytest.approx(math.log(2)) != moving[-1]["prm_loss"]


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_stopped_resumes_identically(tiny, tmp_path, stop):
    config = small(rollouts=4)
    through = tiny()
    estimator = PRIME(through, config, FAST)
    history = run(through, config, estimator=estimator, resample=1)

    def save(**state):
        if state["step"] == stop:
            checkpoint.save(tmp_path, *checkpoint.state_of(**state))
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), config, save=save, resample=1)
    resumed = tiny(seed=5)  # all three start elsewhere, so that each must come from the state
    other = PRIME(resumed, config, FAST)
    rest = run(resumed, config, estimator=other, resample=1,
               resume=partial(checkpoint.restore, *checkpoint.load(tmp_path)))
    assert len(rest) == 4 - stop and rest == history[stop:]
    ours, theirs = (resumed, other.prm, other.reference), (through, estimator.prm, estimator.reference)
    assert torch.equal(weights_of(*ours), weights_of(*theirs))


@pytest.mark.parametrize("fields, culprit", [
    ({"prm_beta": 0}, "prm_beta 0"), ({"prm_beta": -1}, "prm_beta -1"), ({"prm_lr": 0}, "prm_lr 0"),
    ({"prm_lr": math.nan}, "prm_lr nan"), ({"gamma": 1.5}, "gamma 1.5"), ({"gamma": -0.5}, "gamma -0.5"),
    ({"lowest": 0.9}, "lowest 0.9"), ({"lowest": -0.1}, "lowest -0.1"),
    ({"highest": 1.1}, "highest 1.1"), ({"lowest": 0.5, "highest": 0.5}, "lowest 0.5")])
def test_a_setting_out_of_range_is_one_line_that_names_it(fields, culprit):
    with pytest.raises(ValueError) as error:
        PRIMEConfig(**fields)
    assert culprit in str(error.value) and "\n" not in str(error.value)


def test_its_optimizer_is_the_policys_but_for_the_learning_rate(tiny):
    model, config, states = tiny(), small(rollouts=1), []
    estimator = PRIME(model, config, PRIMEConfig(prm_lr=0.123))
    run(model, config, estimator=estimator, save=lambda **state: states.append(state))
    ours, policys = estimator.optimizer, states[0]["optimizer"]
    assert type(ours) is type(policys) and ours.defaults["lr"] == 0.123
    names = ("betas", "eps", "weight_decay", "amsgrad", "maximize")
    assert all(ours.defaults[name] == policys.defaults[name] for name in names)


def test_the_defaults_are_the_papers():
    settings = PRIMEConfig()
    assert (settings.prm_beta, settings.gamma, settings.lowest, settings.highest) == (0.05, 1, 0.2, 0.8)


def test_none_of_its_settings_has_the_name_of_one_of_the_loops():
    """The command line has one option for a name, and gives its value to both: the KL's beta is not the rewards'."""
    assert not vars(PRIMEConfig()).keys() & vars(grpo.GRPOConfig()).keys()


# ------------------------------------------------------------------------------------------- the file by itself

def test_its_script_trains_a_model_directory(tmp_path, monkeypatch, capsys):
    from tokenizer import Tokenizer
    tokenizer = Tokenizer(ROOT / "data")
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1)
    model = model_module.Transformer(model_module.Config(vocab_size=tokenizer.vocab_size, **sizes))
    model_module.save(model.init_weights(torch.Generator().manual_seed(0)), tmp_path / "model", tokenizer)
    row = {"prompt": "2 + 3?", "answer": "5", "language": "en", "kind": "reasoning"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    paths = ["--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out"]
    options = ("--rollouts 2 --prompts-per-rollout 1 --group-size 4 --minibatches 2 --max-new-tokens 5 "
               "--prm-beta 0.1 --prm-lr 0.01 --gamma 0.5 --lowest 0.1 --highest 0.9")
    made, real = [], PRIME.__init__

    def watched(self, *arguments):
        real(self, *arguments)
        made.append(self)
    monkeypatch.setattr(PRIME, "__init__", watched)
    monkeypatch.setattr(sys, "argv", ["variants.prime", *map(str, paths), *options.split()])
    prime_module.main()
    assert made[0].prime == PRIMEConfig(prm_beta=0.1, prm_lr=0.01, gamma=0.5, lowest=0.1, highest=0.9)
    assert made[0].config.mean == "token" and made[0].config.beta == 0  # without being asked: there is no KL term
    assert made[0].metrics and "rollout 2/2" in capsys.readouterr().out
    assert model_module.load(tmp_path / "out", "cpu").config.vocab_size == tokenizer.vocab_size


def test_logits_are_made_in_pieces_which_change_neither_rewards_nor_gradients(tiny, monkeypatch):
    found = []
    for rows in (10 ** 6, 3):
        monkeypatch.setattr(prime_module, "LOGITS_AT_ONCE", rows * 16)  # tiny's vocabulary is 16
        model = sharp(tiny)
        r = rolled(model, small())
        estimator = PRIME(model, small())
        steps, seen = [], []
        monkeypatch.setattr(estimator.optimizer, "step", lambda: steps.append(
            torch.cat([p.grad.flatten() for p in estimator.prm.parameters()])))
        for network in (estimator.prm, estimator.reference):
            network.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
        found.append((estimator.advantages(r), steps[0]))
        assert max(seen) == min(rows, r.mask.sum())
    for whole, pieces in zip(*found):
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)

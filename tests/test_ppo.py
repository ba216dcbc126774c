"""PPO's estimators against plain loops over their definitions, and the critic's learning inside grpo.train."""

import copy
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from lab import checkpoint
import grpo
import model as model_module
from sevens import MANY_ENDS, share_of_sevens, train_on_sevens
from variants import ppo as ppo_module
from variants.ppo import PPO, Critic, PPOConfig, explained_variance, gae, value_loss, whiten

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------- generalized advantages

SPANS = [(2, 6), (0, 3), (4, 5), (1, 8), (7, 8)]  # where a row's sampled tokens begin and end, of 8 positions


def ragged(seed=0):
    """rewards, values (5, 8) with something everywhere, and the mask of SPANS."""
    noise = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(SPANS), 8, dtype=torch.float64, generator=noise)
    mask = torch.zeros(rewards.shape, dtype=torch.bool)
    for row, (start, end) in enumerate(SPANS):
        mask[row, start:end] = True
    return rewards, values, mask


def gae_by_hand(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} by a double loop over the definition; 0 outside SPANS."""
    out = torch.zeros_like(rewards)
    for row, (start, end) in enumerate(SPANS):
        for t in range(start, end):
            for l in range(end - t):
                next_value = values[row, t + l + 1] if t + l + 1 < end else 0.0
                out[row, t] += (gamma * lam) ** l * (rewards[row, t + l] + gamma * next_value - values[row, t + l])
    return out


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 1.0), (0.9, 0.7), (0.8, 0.0), (0.0, 1.0)])
def test_an_advantage_is_the_discounted_sum_of_the_deltas_from_its_token_on(gamma, lam):
    rewards, values, mask = ragged()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = gae_by_hand(rewards, values, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_deltas_of_three_tokens_by_hand():
    rewards, values = torch.tensor([[9., 0., 0., 2., 9.]]), torch.tensor([[9., 0.5, 1.0, 0.25, 9.]])
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    assert gae(rewards, values, mask, 0.5, 0.0)[0].tolist() == [[0, 0.5 - 0.5, 0.125 - 1.0, 2 - 0.25, 0]]
    assert gae(rewards, values, mask, 0.5, 1.0)[0].tolist() == [[0, 0.5 - 0.5, 1 - 1.0, 2 - 0.25, 0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_with_lambda_one_an_advantage_is_the_return_minus_the_value_and_a_return_knows_no_value(gamma):
    rewards, values, mask = ragged()
    monte_carlo = torch.zeros_like(rewards)
    for row, (start, end) in enumerate(SPANS):
        for t in range(start, end):
            monte_carlo[row, t] = sum(gamma ** (s - t) * rewards[row, s] for s in range(t, end))
    advantages, returns = gae(rewards, values, mask, gamma, 1.0)
    torch.testing.assert_close(advantages, (monte_carlo - values) * mask)
    torch.testing.assert_close(returns, monte_carlo)


def test_what_stands_in_prompt_and_padding_changes_no_advantage():
    rewards, values, mask = ragged()
    for rubbish in (1e6, torch.inf, torch.nan):
        noisy = (torch.where(mask, rewards, rubbish), torch.where(mask, values, rubbish))
        for a, b in zip(gae(*noisy, mask, 0.9, 0.7), gae(rewards, values, mask, 0.9, 0.7)):
            assert torch.equal(a, b) and not a[~mask].any()


def test_the_estimates_change_none_of_their_arguments():
    arguments = ragged()
    before = copy.deepcopy(arguments)
    gae(*arguments, 0.9, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before))


def test_whitened_advantages_have_mean_zero_and_std_one_over_the_sampled_tokens_of_all_rows():
    advantages, _, mask = ragged()
    white = whiten(3 * advantages + 5, mask)
    chosen = [x for row, spans in zip(advantages.tolist(), SPANS) for x in row[slice(*spans)]]
    mean = sum(chosen) / len(chosen)
    std = (sum((x - mean) ** 2 for x in chosen) / len(chosen)) ** 0.5
    for row, (start, end) in enumerate(SPANS):
        for t in range(8):
            expected = (advantages[row, t].item() - mean) / std if start <= t < end else 0
            assert white[row, t].item() == pytest.approx(expected, rel=1e-3, abs=1e-12)
    rubbish = torch.where(mask, 3 * advantages + 5, torch.inf)
    assert torch.equal(whiten(rubbish, mask), white)


def test_equal_advantages_are_whitened_to_zero():
    for advantage in (2.0, 0.1, 1.3):  # of which the mean of 91 is another float than most of them
        assert whiten(torch.full((7, 13), advantage), torch.ones(7, 13)).abs().max() < 0.01
    assert whiten(torch.tensor([[5.0, 1.0]]), torch.tensor([[0, 1]])).tolist() == [[0, 0]]  # one token


# ------------------------------------------------------------------------------------------- the critic's loss

@pytest.mark.parametrize("value, loss, gradient", [
    (1.1, 0.5 * 0.9 ** 2, -0.9), (0.95, 0.5 * 1.05 ** 2, -1.05),  # within 0.2 of the old value of 1: the return is 2
    (1.5, 0.5 * 0.8 ** 2, 0.0),    # moved to the return by more: the clipped one is worse, and has no gradient
    (0.5, 0.5 * 1.5 ** 2, -1.5),   # moved away by more: its own error is worse, and pulls it back
    (4.0, 0.5 * 2.0 ** 2, 2.0),    # beyond the return by more than the clipped one is before it
])
@pytest.mark.parametrize("side", [1, -1])
def test_a_value_is_judged_by_the_worse_of_itself_and_the_one_clipped_around_the_old(value, loss, gradient, side):
    value = torch.tensor([[side * value]], requires_grad=True)
    old, target = torch.tensor([[side * 1.0]]), torch.tensor([[side * 2.0]])
    result = value_loss(value, old, target, torch.ones(1, 1), clip=0.2)
    result.backward()
    assert result.item() == pytest.approx(loss) and value.grad.item() == pytest.approx(side * gradient)


def test_the_value_loss_is_half_the_mean_over_sampled_tokens_of_plain_loops():
    values, old, mask = ragged(1)
    returns, clip, total, count = ragged(2)[0], 0.3, 0.0, 0
    for row, (start, end) in enumerate(SPANS):
        for t in range(start, end):
            v, o, r = (x[row, t].item() for x in (values, old, returns))
            total, count = total + max((v - r) ** 2, (min(max(v, o - clip), o + clip) - r) ** 2), count + 1
    assert value_loss(values, old, returns, mask, clip).item() == pytest.approx(total / 2 / count)
    assert value_loss(values, old, returns, mask, clip, normaliser=7).item() == pytest.approx(total / 2 / 7)


def test_the_gradient_of_the_value_loss_ends_at_the_mask_whatever_stands_outside():
    values, old, mask = ragged(1)
    returns = ragged(2)[0]
    gradients = []
    for rubbish in (0.0, 1e6, torch.inf, torch.nan):
        v = torch.where(mask, values, rubbish / 3).requires_grad_()
        value_loss(v, torch.where(mask, old, -rubbish), torch.where(mask, returns, rubbish), mask, 0.3).backward()
        gradients.append(v.grad)
        assert not v.grad[~mask].any() and v.grad[mask].any()
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_micro_batches_of_the_value_loss_add_up_with_the_whole_updates_normaliser():
    values, old, mask = ragged(1)
    returns, gradients, losses = ragged(2)[0], [], []
    for lots in ([slice(0, 5)], [slice(0, 1), slice(1, 3), slice(3, 5)]):
        v = values.clone().requires_grad_()
        parts = [value_loss(v[lot], old[lot], returns[lot], mask[lot], 0.3, normaliser=int(mask.sum())) for lot in lots]
        sum(parts).backward()
        gradients.append(v.grad), losses.append(sum(parts).detach())
    torch.testing.assert_close(*gradients), torch.testing.assert_close(*losses)
    torch.testing.assert_close(losses[0], value_loss(values, old, returns, mask, 0.3))


# ------------------------------------------------------------------------------------------- the critic

def small(**fields):
    return grpo.GRPOConfig(**dict(rollouts=3, prompts_per_rollout=2, group_size=6, minibatches=2, lr=1e-2, warmup=1,
                                  beta=0.0, mean="token", max_new_tokens=8, dtype="float32", grad_clip=1e9) | fields)


def sharp(tiny, seed=0):
    """A tiny model whose logits have a standard deviation of about 1, so that probabilities differ."""
    model = tiny(seed=seed, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, 0, model.config.hidden_size**-0.5, torch.Generator().manual_seed(seed))
    return model


def rolled(model, config, prompts=([1, 2], [4, 5, 6, 7, 8])):
    """A Rollout of two groups, of ragged lengths and with rewards that differ."""
    r = grpo.rollout(model, prompts, encode=list, decode=lambda ids: " ".join(map(str, ids)),
                     generate=model_module.generate, end_ids=MANY_ENDS, rewards={"sevens": share_of_sevens}, weights={},
                     config=config, generator=torch.Generator().manual_seed(0))
    r.rewards = torch.randn(r.rewards.shape, generator=torch.Generator().manual_seed(1))
    r.old_logprobs = grpo.all_logprobs(model, r, config)
    assert len(set(r.lengths.tolist())) > 2
    return r


def weights_of(*models):
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def perturbed(estimator, seed=0):
    """The estimator with a critic that expects something."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in estimator.critic.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    return estimator


def spans_of(r):
    """(first, last + 1) of each row's positions that predict a sampled token, from the lengths."""
    return [(end - length - 1, end - 1) for end, length in zip(r.ends, r.lengths.tolist())]


def test_a_fresh_critic_expects_nothing_and_is_the_policy_without_its_head(tiny):
    model = sharp(tiny)
    critic, ids = Critic(model), torch.tensor([[1, 2, 3], [7, 8, 9]])
    assert critic(ids).shape == (2, 3) and not critic(ids).any()
    torch.nn.init.ones_(critic.head.weight), torch.nn.init.constant_(critic.head.bias, 0.5)
    torch.testing.assert_close(critic(ids), model.hidden(ids).sum(-1) + 0.5)


def test_making_a_critic_takes_nothing_from_the_global_random_state(tiny):
    model, state = tiny(), torch.get_rng_state()
    Critic(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_under_bf16_the_critics_head_still_computes_in_fp32(tiny):
    model, config = sharp(tiny), small(dtype="bfloat16")
    estimator, r = perturbed(PPO(model, config)), rolled(model, small())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = estimator.critic.hidden(estimator.critic.trunk, r.ids[:1, :r.ends[0] - 1])
    values = states.float() @ estimator.critic.head.weight[0] + estimator.critic.head.bias
    torch.testing.assert_close(estimator.values(r, [0]), values, atol=1e-5, rtol=1e-5)


def test_the_critics_own_weights_learn_and_the_policys_do_not(tiny):
    model, config = sharp(tiny), small()
    before, estimator = weights_of(model), PPO(model, config)
    critic = {name: p.detach().clone() for name, p in estimator.critic.named_parameters()}
    r = rolled(model, config)
    for _ in range(2):  # at first the head's weights are 0, so that the trunk gets no gradient
        estimator.advantages(r), estimator.learn(r, list(range(12)))
    unchanged = [name for name, p in estimator.critic.named_parameters() if torch.equal(p, critic[name])]
    assert unchanged == ["trunk.lm_head.weight"]  # which the values do not go through
    assert torch.equal(weights_of(model), before) and all(p.grad is None for p in model.parameters())


def test_a_value_depends_on_the_tokens_up_to_its_position_and_not_on_the_one_to_be_sampled(tiny):
    model, config = sharp(tiny), small()
    r, estimator = rolled(model, config), perturbed(PPO(model, config))
    before = estimator.values(r, [0]).detach()[0]
    position = r.ends[0] - 3
    r.ids[0, position + 1] += 1
    after = estimator.values(r, [0]).detach()[0]
    assert torch.equal(after[:position + 1], before[:position + 1]) and after[position + 1] != before[position + 1]


def test_the_values_are_the_critics_whatever_the_micro_batch_and_reach_as_far_as_its_longest_row(tiny):
    model, config = sharp(tiny), small()
    r, estimator = rolled(model, config), perturbed(PPO(model, config))
    rows = [3, 0, 8]
    values = estimator.values(r, rows).detach()
    assert values.shape == (3, max(r.ends[row] for row in rows) - 1)
    for row, of_row in zip(rows, values):
        n = r.ends[row] - 1
        torch.testing.assert_close(of_row[:n], estimator.critic(r.ids[row:row + 1, :n]).detach()[0])


def test_another_models_states_come_from_a_callable(tiny):
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(16, 5)

        def forward(self, ids):
            return self.table(ids) @ self.table.weight.T

    model, config = Other(), small()
    estimator = PPO(model, config, hidden=lambda trunk, ids: trunk.table(ids))
    r = rolled(sharp(tiny), config)
    estimator.advantages(r), estimator.learn(r, [0, 1, 5])
    assert estimator.critic.head.weight.shape == (1, 5) and estimator.critic.head.weight.any()


def test_dropout_makes_no_noise_in_the_values(tiny):
    model, config = sharp(tiny).train(), small()
    dropout = torch.nn.Dropout(0.5)
    model.dropout = dropout
    estimator = perturbed(PPO(model, config, hidden=lambda trunk, ids: trunk.dropout(trunk.hidden(ids))))
    r = rolled(model, config)
    assert torch.equal(estimator.values(r, [0, 1]), estimator.values(r, [0, 1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_critics_forward_pass_is_in_the_runs_dtype_and_its_weights_and_values_in_fp32(tiny, dtype):
    seen, model, config = [], sharp(tiny), small(dtype=dtype)
    r = rolled(model, small())

    def hidden(trunk, ids):
        seen.append(trunk.hidden(ids))
        return seen[-1]
    estimator = PPO(model, config, hidden=hidden)
    del seen[:]
    advantages, _ = estimator.advantages(r), estimator.learn(r, list(range(12)))
    assert seen and {x.dtype for x in seen} == {getattr(torch, dtype)} and advantages.dtype == torch.float32
    assert {estimator.old_values.dtype, *(p.dtype for p in estimator.critic.parameters())} == {torch.float32}


# ------------------------------------------------------------------------------------------- the estimator

def test_the_rules_reward_falls_on_the_last_sampled_token_and_the_value_after_it_is_zero(tiny):
    model, config = sharp(tiny), small()
    r, estimator = rolled(model, config), PPO(model, config, PPOConfig(lam=0.0, gamma=0.5, whiten=False))
    torch.nn.init.constant_(estimator.critic.head.bias, 4.0)  # a critic that expects 4 everywhere
    advantages = estimator.advantages(r)
    for row, (start, end) in enumerate(spans_of(r)):
        reward = r.rewards[row // 6, row % 6].item()  # row i*G + j is completion j of prompt i
        expected = [0] * start + [0.5 * 4 - 4] * (end - start - 1) + [reward - 4] + [0] * (r.mask.shape[1] - end)
        assert advantages[row].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("white", [True, False])
def test_returns_are_taken_before_the_advantages_are_whitened(tiny, white):
    model, config = sharp(tiny), small()
    r, estimator = rolled(model, config), perturbed(PPO(model, config, PPOConfig(whiten=white)))
    advantages = estimator.advantages(r)
    for row, (start, end) in enumerate(spans_of(r)):
        expected = [0] * start + [r.rewards.flatten()[row].item()] * (end - start) + [0] * (r.mask.shape[1] - end)
        assert estimator.returns[row].tolist() == pytest.approx(expected, abs=1e-6)
    raw = (estimator.returns - estimator.old_values) * r.mask
    torch.testing.assert_close(advantages, whiten(raw, r.mask) if white else raw, atol=1e-5, rtol=1e-5)
    assert (advantages[r.mask].std().item() == pytest.approx(1, rel=0.02)) == white


def test_a_kl_in_the_reward_is_paid_at_each_token(tiny):
    model, config = sharp(tiny), small()
    r = rolled(model, config)
    r.ref_logprobs = grpo.all_logprobs(sharp(tiny, 2), r, config)
    estimator = perturbed(PPO(model, config, PPOConfig(kl_in_reward=0.3, lam=1.0, gamma=0.9, whiten=False)))
    advantages = estimator.advantages(r)
    values = estimator.old_values
    for row, (start, end) in enumerate(spans_of(r)):
        rewards = [-0.3 * (r.old_logprobs[row, t] - r.ref_logprobs[row, t]).item() for t in range(start, end)]
        rewards[-1] += r.rewards.flatten()[row].item()
        for t in range(start, end):
            to_go = sum(0.9 ** (s - t) * rewards[s - start] for s in range(t, end))
            assert advantages[row, t].item() == pytest.approx(to_go - values[row, t].item(), abs=1e-5)


def test_only_a_kl_in_the_reward_needs_a_reference_which_the_loop_then_provides(tiny):
    assert not PPO(tiny(), small()).needs_reference
    assert PPO(tiny(), small(), PPOConfig(kl_in_reward=0.1)).needs_reference
    plain, held = (run(tiny(), small(), PPOConfig(kl_in_reward=weight)) for weight in (0.0, 0.3))
    assert plain[0]["value_loss"] == held[0]["value_loss"] and plain[-1]["value_loss"] != held[-1]["value_loss"]


def test_learning_descends_the_value_loss_of_exactly_the_given_rows(tiny):
    """The metric by plain loops, and the step: nothing of another row, its ids, returns and old values, changes it."""
    model, config, rows = sharp(tiny), small(), [1, 4, 7, 10]
    r = rolled(model, config)
    settings = PPOConfig(value_clip=0.05, critic_lr=0.02)

    def learnt(disturb=()):
        rollout, estimator = copy.deepcopy(r), perturbed(PPO(model, config, settings))
        estimator.optimizer = torch.optim.SGD(estimator.critic.parameters(), lr=0.02)
        estimator.advantages(rollout)
        perturbed(estimator, seed=1)  # so that the values have left the old ones, some by more than the clip
        for row in disturb:
            rollout.ids[row] = 1
            estimator.returns[row] += 2
            estimator.old_values[row] -= 1
        values, total, count = estimator.critic(rollout.ids[:, :-1]).detach(), 0.0, 0
        for row in rows:
            for t in range(*spans_of(rollout)[row]):
                v, old, target = (x[row, t].item() for x in (values, estimator.old_values, estimator.returns))
                clipped = min(max(v, old - 0.05), old + 0.05)
                total, count = total + max((v - target) ** 2, (clipped - target) ** 2) / 2, count + 1
        metrics = estimator.learn(rollout, rows)
        assert metrics["value_loss"] == pytest.approx(total / count, rel=1e-4)
        return weights_of(estimator.critic)

    alone = learnt()
    assert torch.equal(learnt(disturb=[0, 2, 3, 5, 6, 8, 9, 11]), alone)
    assert not torch.equal(learnt(disturb=[7]), alone)


def test_old_values_and_returns_stay_fixed_while_the_critic_learns(tiny):
    model, config = sharp(tiny), small()
    r, estimator = rolled(model, config), perturbed(PPO(model, config))
    estimator.advantages(r)
    before = estimator.old_values.clone(), estimator.returns.clone()
    with torch.no_grad():
        torch.testing.assert_close(estimator.old_values[r.mask], estimator.critic(r.ids[:, :-1])[r.mask])
    for rows in ([0, 1, 2], [3, 4, 5]):
        estimator.learn(r, rows)
    assert torch.equal(estimator.old_values, before[0]) and torch.equal(estimator.returns, before[1])
    assert not estimator.old_values.requires_grad and not estimator.returns.requires_grad


def test_what_is_learnt_does_not_depend_on_the_micro_batches(tiny):
    model, results = sharp(tiny), []
    r = rolled(model, small())
    for tokens in (1, 25, 10 ** 6):
        estimator = perturbed(PPO(model, small(micro_batch_tokens=tokens)))
        estimator.optimizer = torch.optim.SGD(estimator.critic.parameters(), lr=0.1)
        advantages = estimator.advantages(r)
        metrics = estimator.learn(r, [0, 2, 3, 5, 6, 7, 9, 11])
        results.append((advantages, estimator.returns, weights_of(estimator.critic), torch.tensor([*metrics.values()])))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_one_step_is_one_step_and_leaves_no_gradient_behind(tiny):
    model, config = sharp(tiny), small(micro_batch_tokens=1)
    r, estimator = rolled(model, config), PPO(model, config, PPOConfig(critic_lr=0.01))
    estimator.advantages(r), estimator.learn(r, [0, 1, 2])
    sign = 1 if estimator.returns[:3][r.mask[:3]].mean() > 0 else -1
    assert estimator.critic.head.bias.item() == pytest.approx(0.01 * sign, rel=1e-3)
    assert {int(state["step"]) for state in estimator.optimizer.state.values()} == {1}
    assert all(p.grad is None for p in estimator.critic.parameters())


def test_the_critics_gradient_is_cut_to_the_norm_of_grad_clip(tiny):
    model, config = sharp(tiny), small(grad_clip=0.01)
    r, estimator = rolled(model, config), PPO(model, config)
    estimator.optimizer = torch.optim.SGD(estimator.critic.parameters(), lr=1.0)
    before = weights_of(estimator.critic)
    estimator.advantages(r), estimator.learn(r, list(range(12)))
    assert (weights_of(estimator.critic) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_explained_variance_is_that_of_the_values_the_advantages_were_made_of(tiny):
    model, config = sharp(tiny), small()
    r, estimator = rolled(model, config), PPO(model, config)
    estimator.advantages(r)
    assert estimator.learn(r, [0])["explained_variance"] == pytest.approx(0, abs=1e-6)  # it expected nothing
    estimator.advantages(r)
    errors, returns = (estimator.returns - estimator.old_values)[r.mask], estimator.returns[r.mask]
    expected = 1 - errors.double().var() / returns.double().var()
    for rows in ([0], [1, 7]):  # the same for each update of the rollout
        assert estimator.learn(r, rows)["explained_variance"] == pytest.approx(expected.item(), rel=1e-3) != 0


def test_an_explained_variance_sees_the_sampled_tokens_alone_and_no_shift():
    returns, noise, mask = ragged()
    values = torch.where(mask, returns + 0.5 * noise + 3, 1e6)
    expected = 1 - 0.25 * noise[mask].var() / returns[mask].var()
    assert explained_variance(values, returns, mask) == pytest.approx(expected.item())


def test_where_every_completion_is_masked_the_metrics_are_numbers_and_nothing_is_learnt(tiny):
    model, config = sharp(tiny), small()
    r, estimator = rolled(model, config), PPO(model, config)
    r.mask[:] = False  # as a `select` of one's own may do
    before = weights_of(estimator.critic)
    assert not estimator.advantages(r).any()
    assert all(math.isfinite(value) for value in estimator.learn(r, [0, 1, 2]).values())
    assert torch.equal(weights_of(estimator.critic), before)


def test_equal_returns_leave_no_variance_to_explain():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for values in (torch.zeros(2, 3), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))):
        assert explained_variance(values, torch.ones(2, 3), mask) == 0
    assert explained_variance(torch.zeros(1, 1), torch.ones(1, 1), mask[:1, :1]) == 0  # one token


def test_the_critic_comes_to_predict_the_returns_of_a_rollout_it_sees_again_and_again(tiny):
    model, config = sharp(tiny), small()
    r, estimator = rolled(model, config), PPO(model, config, PPOConfig(critic_lr=0.01))
    metrics = []
    for _ in range(60):
        estimator.advantages(r)
        metrics.append(estimator.learn(r, list(range(12))))
    assert metrics[-1]["value_loss"] < 0.2 * metrics[0]["value_loss"] and metrics[-1]["explained_variance"] > 0.7


def test_which_tokens_pad_a_row_and_how_far_changes_nothing(tiny):
    model, config, results = sharp(tiny), small(), []
    r = rolled(model, config)
    for filler, wider in ((0, 0), (7, 0), (13, 4)):
        other = copy.deepcopy(r)
        for name, fill in (("ids", filler), ("mask", False), ("old_logprobs", 0.0)):
            setattr(other, name, torch.nn.functional.pad(getattr(other, name), (0, wider), value=fill))
        for row, end in enumerate(r.ends):
            other.ids[row, end:] = filler
        estimator = perturbed(PPO(model, config))
        advantages, metrics = estimator.advantages(other), estimator.learn(other, list(range(12)))
        width = r.mask.shape[1]
        assert not advantages[:, width:].any()
        of_critic = estimator.returns[:, :width], weights_of(estimator.critic), torch.tensor([*metrics.values()])
        results.append((advantages[:, :width], *of_critic))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_critic_with_dropout_takes_nothing_from_the_global_random_state_either(tiny):
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.dropout = tiny(), torch.nn.Dropout(0.5)

        def hidden(self, ids):
            return self.dropout(self.inner.hidden(ids))
    model, before = Dropped().train(), torch.get_rng_state()
    PPO(model, small())
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------- inside the loop

def run(model, config, settings=PPOConfig(critic_lr=0.01), estimator=None, **arguments):
    """Trains to sample token 7 with a critic; the metrics of each rollout without the times."""
    return train_on_sevens(model, config, advantage_estimator=estimator or PPO(model, config, settings), **arguments)


@pytest.mark.parametrize("settings", [{}, {"lam": 0.95}, {"kl_in_reward": 0.01}, {"whiten": False}], ids=str)
def test_the_reward_rises_within_a_few_rollouts(tiny, settings):
    config = small(rollouts=14, group_size=16, minibatches=4, grad_clip=1.0)
    history = run(tiny(), config, PPOConfig(critic_lr=0.01, **settings))
    rewards = [metrics["reward"] for metrics in history]
    assert rewards[0] < 0.15 and sum(rewards[-3:]) / 3 > 0.5, rewards
    assert all({"value_loss", "explained_variance"} <= metrics.keys() for metrics in history)


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("kl_in_reward", [0.0, 0.1])
def test_a_run_that_stopped_resumes_identically(tiny, tmp_path, stop, kl_in_reward):
    config, settings = small(rollouts=4, reference_every=3), PPOConfig(critic_lr=0.01, kl_in_reward=kl_in_reward)
    through = tiny()
    estimator = PPO(through, config, settings)
    history = run(through, config, estimator=estimator)

    def save(**state):
        if state["step"] == stop:
            checkpoint.save(tmp_path, *checkpoint.state_of(**state))
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), config, settings, save=save)
    resumed = tiny(seed=5)
    other = PPO(resumed, config, settings)
    rest = run(resumed, config, estimator=other, resume=partial(checkpoint.restore, *checkpoint.load(tmp_path)))
    assert len(rest) == 4 - stop and rest == history[stop:]
    assert torch.equal(weights_of(resumed, other.critic), weights_of(through, estimator.critic))


@pytest.mark.parametrize("fields, culprit", [
    ({"gamma": -0.1}, "gamma -0.1"), ({"gamma": 1.1}, "gamma 1.1"), ({"lam": 2.0}, "lam 2.0"),
    ({"lam": float("nan")}, "lam nan"), ({"value_clip": 0}, "value_clip 0"), ({"critic_lr": 0}, "critic_lr 0"),
    ({"critic_lr": float("nan")}, "critic_lr nan"),
    ({"kl_in_reward": float("nan")}, "kl_in_reward nan"),
    ({"kl_in_reward": -0.5}, "kl_in_reward -0.5")])
def test_a_setting_out_of_range_is_one_line_that_names_it(fields, culprit):
    with pytest.raises(ValueError) as error:
        PPOConfig(**fields)
    assert culprit in str(error.value) and "\n" not in str(error.value)


def test_its_optimizer_is_the_policys_but_for_the_learning_rate(tiny):
    model, config, states = tiny(), small(rollouts=1), []
    estimator = PPO(model, config, PPOConfig(critic_lr=0.123))
    run(model, config, estimator=estimator, save=lambda **state: states.append(state))
    ours, policys = estimator.optimizer, states[0]["optimizer"]
    assert type(ours) is type(policys) and ours.defaults["lr"] == 0.123
    names = ("betas", "eps", "weight_decay", "amsgrad", "maximize")
    assert all(ours.defaults[name] == policys.defaults[name] for name in names)


def test_the_defaults_are_r1s_undiscounted_return_and_whitened_advantages():
    settings = PPOConfig()
    assert (settings.gamma, settings.lam, settings.kl_in_reward, settings.whiten) == (1, 1, 0, True)


def test_a_kl_in_the_reward_and_one_in_the_loss_are_not_had_at_once(tiny):
    with pytest.raises(ValueError, match="kl_in_reward 0.1 and beta 0.2: one of them must be 0"):
        PPO(tiny(), small(beta=0.2), PPOConfig(kl_in_reward=0.1))
    assert PPO(tiny(), small(beta=0.2)).critic and PPO(tiny(), small(), PPOConfig(kl_in_reward=0.1)).critic


def test_rewards_are_counted_in_fp32_whatever_the_log_probabilities_are_in(tiny):
    """bf16 would round a reward of 0.7 to 0.699."""
    model, config = sharp(tiny), small()
    r, estimator = rolled(model, config), PPO(model, config, PPOConfig(whiten=False))
    expected = estimator.advantages(r)
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.copy(r)
        other.old_logprobs, other.rewards = r.old_logprobs.to(dtype), r.rewards.double()
        assert torch.equal(estimator.advantages(other), expected)


def test_none_of_its_settings_has_the_name_of_one_of_the_loops():
    """The command line has one option for a name, and gives its value to both."""
    assert not vars(PPOConfig()).keys() & vars(grpo.GRPOConfig()).keys()


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
               "--rewards format --lam 0.5 --critic-lr 0.01 --no-whiten --kl-in-reward 0.1 --beta 0.0")
    made, real = [], PPO.__init__

    def watched(self, *arguments):
        real(self, *arguments)
        made.append(self)
    monkeypatch.setattr(PPO, "__init__", watched)
    monkeypatch.setattr(sys, "argv", ["variants.ppo", *map(str, paths), *options.split()])
    ppo_module.main()
    assert made[0].ppo == PPOConfig(lam=0.5, critic_lr=0.01, whiten=False, kl_in_reward=0.1)
    assert made[0].config.mean == "token"  # without being asked: policy_loss names it for PPO
    assert "rollout 2/2" in capsys.readouterr().out
    assert model_module.load(tmp_path / "out", "cpu").config.vocab_size == tokenizer.vocab_size

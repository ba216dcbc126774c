"""Each defect of PEERS.md that concerns the loss or the loop has a test here that fails when it is put in."""

import importlib.util
import math
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import grpo
import model as model_module
from grpo import GRPOConfig, group_advantages, kl_divergence, policy_loss, token_logprobs

END = 3


# ------------------------------------------------------------------------------------------- the advantages

def test_an_advantage_is_the_reward_minus_the_groups_mean_over_its_sample_std():
    got = group_advantages(torch.tensor([[1., 0., 0., 1.], [5., 5., 5., 9.]]))
    assert got[0].tolist() == pytest.approx([a * 0.5 / (math.sqrt(1 / 3) + 1e-4) for a in (1, -1, -1, 1)])
    assert got[1].tolist() == pytest.approx([a / (2 + 1e-4) for a in (-1, -1, -1, 3)])


def test_without_the_std_an_advantage_is_the_reward_minus_the_groups_mean():
    assert group_advantages(torch.tensor([[1., 0., 0., 1.], [5., 5., 5., 9.]]), scale_by_std=False).tolist() == \
        [[.5, -.5, -.5, .5], [-1, -1, -1, 3]]


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_a_group_of_equal_rewards_has_advantages_of_zero(scale_by_std):
    assert group_advantages(torch.full((2, 4), 1.25), scale_by_std).tolist() == [[0.] * 4] * 2


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_a_constant_added_to_a_groups_rewards_changes_no_advantage(scale_by_std):
    rewards = torch.tensor([[1., 0., 2., 1.], [0., 0., 3., 1.]])
    shifted = rewards + torch.tensor([[8.], [-4.]])
    assert torch.equal(group_advantages(rewards, scale_by_std), group_advantages(shifted, scale_by_std))


# ------------------------------------------------------------------------------------------- the probabilities

@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.7])
def test_the_sampler_and_the_scorer_share_one_distribution(temperature):
    logits = torch.randn(4, 9, 50, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(1))
    drawn_from = model_module.sampling_logprobs(logits.flatten(0, 1), temperature).view(4, 9, 50)
    torch.testing.assert_close(token_logprobs(logits, ids, temperature), drawn_from.gather(2, ids[:, :, None])[:, :, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_what_generate_says_of_its_samples_is_what_the_scorer_says(tiny, temperature):
    model = sharp(tiny)
    config = small(temperature=temperature, max_new_tokens=9)
    r = roll(model, config, prompts=[[1, 2], [4, 5, 6, 7], [9]], generate=model_module.generate, end_ids=MANY_ENDS)
    assert len(set(r.lengths.tolist())) > 2 and r.finished.any()
    torch.testing.assert_close(r.sampled_logprobs, grpo.all_logprobs(model, r, config), atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("difference", [-1000., -89., 89., 1000.])
def test_kl_and_loss_are_finite_in_value_and_gradient_at_any_log_ratio(difference):
    for other in ("old", "ref"):
        logprobs = torch.full((1, 3), -1.0, requires_grad=True)
        near, far = torch.full((1, 3), -1.5), torch.full((1, 3), -1.0 + difference)
        loss, metrics = policy_loss(logprobs, far if other == "old" else near, far if other == "ref" else near,
                                    torch.tensor([-1.0]), torch.ones(1, 3), beta=1.0)
        loss.backward()
        assert math.isfinite(loss.item()) and logprobs.grad.isfinite().all() and all(map(math.isfinite, metrics.values()))
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


def by_hand(logprobs, old, ref, advantages, mask, clip_low, clip_high, beta, token_mean, normaliser):
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
    loss = -sum(tokens) / (normaliser or len(tokens)) if token_mean else -sum(sequences) / (normaliser or len(mask))
    return loss, {"kl": sum(kls) / len(kls), "clip_fraction": sum(clips) / len(clips), "ratio": sum(ratios) / len(ratios)}


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
@pytest.mark.parametrize("token_mean", [False, True])
@pytest.mark.parametrize("normaliser", [None, 11])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_that_of_two_plain_loops(per_token, token_mean, normaliser, beta):
    settings = dict(clip_low=0.2, clip_high=0.28, beta=beta, token_mean=token_mean, normaliser=normaliser)
    for seed in range(20):
        logprobs, old, ref, advantages, mask = ragged(seed, per_token)
        ref = ref if beta else None
        tensors = [x if x is None else torch.tensor(x, dtype=torch.float64) for x in (logprobs, old, ref, advantages)]
        loss, metrics = policy_loss(*tensors, torch.tensor(mask), **settings)
        expected, expected_metrics = by_hand(logprobs, old, ref, advantages, mask, **settings)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert {name: metrics[name] for name in expected_metrics} == pytest.approx(expected_metrics)


def test_token_mean_weighs_a_long_completion_more_and_the_sequence_mean_does_not():
    logprobs = torch.zeros(2, 4)
    mask, advantages = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]), torch.tensor([2.0, -1.0])
    assert policy_loss(logprobs, logprobs, None, advantages, mask)[0].item() == pytest.approx(-(2 - 1) / 2)
    assert policy_loss(logprobs, logprobs, None, advantages, mask, token_mean=True)[0].item() == pytest.approx(-(2 - 4) / 5)


def test_one_advantage_a_completion_is_that_advantage_at_each_of_its_tokens():
    logprobs, old, ref, advantages, mask = (torch.tensor(x, dtype=torch.float64) for x in ragged(3))
    once = policy_loss(logprobs, old, ref, advantages, mask)
    spread = policy_loss(logprobs, old, ref, advantages[:, None].expand(mask.shape), mask)
    assert once[0].item() == spread[0].item() and once[1] == spread[1]


@pytest.mark.parametrize("token_mean", [False, True])
@pytest.mark.parametrize("rubbish", [7.0, -1e30, math.inf, -math.inf, math.nan])
def test_what_stands_in_the_padding_changes_neither_loss_nor_gradient_nor_metrics(rubbish, token_mean):
    *tensors, mask = (torch.tensor(x, dtype=torch.float64) for x in ragged(5, per_token=True))
    results = []
    for filler in (0.0, rubbish):
        logprobs, *others = (torch.where(mask > 0, x, filler) for x in tensors)
        logprobs.requires_grad_()
        loss, metrics = policy_loss(logprobs, *others, mask, beta=0.3, token_mean=token_mean)
        loss.backward()
        results.append((loss.item(), metrics, logprobs.grad.tolist()))
    assert results[0] == results[1]


def test_wider_padding_changes_nothing():
    logprobs, old, ref, advantages, mask = (torch.tensor(x, dtype=torch.float64) for x in ragged(6))
    wide = [torch.nn.functional.pad(x, (0, 9)) for x in (logprobs, old, ref, mask)]
    for token_mean in (False, True):
        a = policy_loss(logprobs, old, ref, advantages, mask, token_mean=token_mean)
        b = policy_loss(*wide[:3], advantages, wide[3], token_mean=token_mean)
        assert a[0].item() == pytest.approx(b[0].item(), rel=1e-12) and a[1] == pytest.approx(b[1])


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not():
    logprobs = torch.full((4, 3), -1.0, requires_grad=True)
    advantages = group_advantages(torch.tensor([[1., 0., 0., 1.]])).flatten()
    loss, _ = policy_loss(logprobs, logprobs.detach(), logprobs.detach(), advantages, torch.ones(4, 3))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert logprobs.grad[:, 0].tolist() == pytest.approx([-a / 12 for a in advantages.tolist()])


# ------------------------------------------------------------------------------------------- every sequence of a tiny policy

SEQUENCES = [(2,)] + [(a, b) for a in (0, 1) for b in (0, 1, 2)]  # three tokens, of which 2 ends; two at most


class TinyPolicy:
    """All there is to know: the logits of the first token (state 0) and of the second after a 0 or a 1."""

    def __init__(self, seed):
        self.logits = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()

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


@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gradient_is_the_exact_policy_gradient_over_every_sequence(seed):
    policy = TinyPolicy(seed)
    probabilities = policy.logprobs().sum(1).exp()
    assert probabilities.sum().item() == pytest.approx(1)  # these are all sequences
    expected_reward = probabilities @ REWARDS
    exact = torch.autograd.grad(expected_reward, policy.logits)[0]
    ours = expected_gradient(policy, probabilities.detach(), REWARDS - expected_reward.detach(), token_mean=True)
    torch.testing.assert_close(-ours, exact)


@pytest.mark.parametrize("seed", range(3))
def test_equation_3s_mean_over_a_sequence_climbs_the_advantage_divided_by_its_length(seed):
    policy = TinyPolicy(seed)
    probabilities = policy.logprobs().sum(1).exp()
    advantages = REWARDS - (probabilities @ REWARDS).detach()
    exact = torch.autograd.grad(probabilities @ (advantages / LENGTHS), policy.logits)[0]
    weights = policy.logprobs().sum(1).exp().detach()
    torch.testing.assert_close(-expected_gradient(policy, weights, advantages), exact)


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_terms_expected_gradient_is_that_of_the_reversed_kl(seed):
    policy, reference = TinyPolicy(seed), TinyPolicy(seed + 100)
    ours = expected_gradient(policy, policy.logprobs().sum(1).exp().detach(), torch.zeros(7, dtype=torch.float64),
                             reference.logprobs().detach(), beta=1.0, token_mean=True)
    p, q = policy.logits.log_softmax(-1), reference.logits.detach().log_softmax(-1)
    visits = torch.tensor([1.0, *p[0, :2].exp().tolist()], dtype=torch.float64)  # how often each state is met
    reversed_kl = torch.autograd.grad(visits @ (q.exp() * (q - p)).sum(1), policy.logits, retain_graph=True)[0]
    forward_kl = torch.autograd.grad(visits @ (p.exp() * (p - q)).sum(1), policy.logits)[0]
    torch.testing.assert_close(ours, reversed_kl)
    assert (ours - forward_kl).abs().max() > 0.01 and ours.abs().max() > 0.01  # as k2 and k1 would give


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_coefficient_of_one_update_is_the_papers_equation_21(seed):
    policy, reference = TinyPolicy(seed), TinyPolicy(seed + 100)
    logprobs, ref, beta = policy.logprobs().detach().requires_grad_(), reference.logprobs().detach(), 0.04
    policy_loss(logprobs, logprobs.detach(), ref, REWARDS, MASK, beta=beta, token_mean=True, normaliser=1)[0].backward()
    coefficient = REWARDS[:, None] + beta * ((ref - logprobs.detach()).exp() - 1)
    torch.testing.assert_close(-logprobs.grad, coefficient * MASK)


# ------------------------------------------------------------------------------------------- the rollout

def small(**fields):
    return GRPOConfig(**dict(rollouts=3, prompts_per_rollout=2, group_size=4, minibatches=2, lr=1e-2, warmup=1,
                             max_new_tokens=6, dtype="float32", grad_clip=1e9) | fields)


def share_of_sevens(text, example):
    return text.split().count("7") / max(1, len(text.split()))


def roll(model, config, prompts, generate, rules={"sevens": share_of_sevens}, weights={}, end_ids=(END,)):
    return grpo.rollout(model, prompts, list, lambda ids: " ".join(map(str, ids)), generate, end_ids, rules, weights, config,
                        torch.Generator().manual_seed(0))


MANY_ENDS = (END, 6, 9, 11, 14)  # so that lengths differ, whatever a seed draws


def sharp(tiny, seed=0):
    """A tiny model whose logits have a standard deviation of about 1, so that probabilities differ."""
    model = tiny(seed=seed, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, 0, model.config.hidden_size ** -0.5, torch.Generator().manual_seed(seed))
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
    assert r.ids.tolist() == [[5, 3, 6, 7, 0, 3, 0], [5, 3, 6, 3, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0], [8, 7, 3, 0, 0, 0, 0]]
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
    old = grpo.all_logprobs(model, r, config)
    metrics = grpo.update(model, torch.optim.SGD(model.parameters(), lr=1.0), r, list(range(len(r.texts))), old, None,
                          advantages, config)
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


@pytest.mark.parametrize("token_mean", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_gradient_and_metrics_do_not_depend_on_the_micro_batches(tiny, token_mean, per_token):
    config = small(group_size=6, token_mean=token_mean, beta=0.1, clip_low=0.01, clip_high=0.01)
    start, other = sharp(tiny, 1), sharp(tiny, 2)
    r = roll(start, config, [[1, 2], [4, 5, 6, 7, 8]], model_module.generate, end_ids=MANY_ENDS)
    assert len(set(r.lengths.tolist())) > 2
    noise = torch.Generator().manual_seed(0)
    advantages = torch.randn(r.mask.shape if per_token else 12, generator=noise)
    old = grpo.all_logprobs(start, r, config) + 0.02 * torch.randn(r.mask.shape, generator=noise)
    ref = grpo.all_logprobs(other, r, config)
    results = []
    for tokens in (1, 25, 10**6):
        config = replace(config, micro_batch_tokens=tokens)
        model = sharp(tiny, 1)
        metrics = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), r, [0, 2, 3, 5, 6, 7, 9, 11], old, ref,
                              advantages, config)
        results.append((torch.cat([p.detach().flatten() for p in model.parameters()]), metrics))
    for weights, metrics in results[1:]:
        torch.testing.assert_close(weights, results[0][0], atol=1e-6, rtol=1e-6)
        assert metrics == pytest.approx(results[0][1], rel=1e-5, abs=1e-6)
    assert 0 < results[0][1]["clip_fraction"] < 1 and results[0][1]["kl"] > 0


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
    lots = list(grpo.micro_batches(range(7), lengths, budget))
    assert sorted(sum(map(list, lots), [])) == list(range(7))
    assert all(len(lot) == 1 or len(lot) * max(lengths[r] for r in lot) <= budget for lot in lots)


# ------------------------------------------------------------------------------------------- the loop

def run(model, config, **arguments):
    """Trains to sample token 7; returns the metrics of each rollout without the times."""
    history = []
    arguments = dict(log=lambda metrics, r: history.append({k: v for k, v in metrics.items() if "seconds" not in k})) | arguments
    arguments = dict(encode=list, decode=lambda ids: " ".join(map(str, ids)), generate=model_module.generate, end_ids=[END],
                     rewards={"sevens": share_of_sevens}) | arguments
    grpo.train(model, [[1, 2], [4, 5, 6], [8]], config=config, **arguments)
    return history


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("fields", [{}, {"token_mean": True, "scale_by_std": False, "beta": 0.0}], ids=["r1", "dr"])
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


def test_the_ratio_is_one_in_a_model_with_dropout_too(tiny):
    """A model copied from elsewhere may have some: the ratio must not measure its noise."""
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.dropout = sharp(tiny), torch.nn.Dropout(0.5)

        def forward(self, ids):
            return self.inner.head(self.dropout(self.inner.hidden(ids)))
    generate = lambda model, *args, **kwargs: model_module.generate(model.inner, *args, **kwargs)
    assert run(Dropped(), small(rollouts=1, minibatches=1), generate=generate)[0]["clip_fraction"] == 0


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
    free, held = (run(tiny(), small(rollouts=8, group_size=8, reference_every=100, beta=beta))[-1]["kl"] for beta in (1e-6, 10.))
    assert held < 0.1 * free


def test_two_runs_of_one_seed_are_alike_and_of_two_seeds_are_not(tiny):
    a, b, c = (run(tiny(), small(seed=seed)) for seed in (0, 0, 1))
    assert a == b != c


def test_training_takes_nothing_from_and_leaves_nothing_in_the_global_random_state(tiny):
    model, state = tiny(), torch.get_rng_state()
    run(model, small(rollouts=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("beta", [0.1, 0.0])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_stopped_goes_on_identically(tiny, tmp_path, stop, beta):
    config = small(rollouts=4, reference_every=3, beta=beta, warmup=5)
    through = tiny()
    history = run(through, config)

    def save(**state):
        if state["step"] == stop:
            checkpoint.save(tmp_path, *checkpoint.state_of(**state))
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), config, save=save)
    resumed = tiny(seed=5)
    rest = run(resumed, config, resume=partial(checkpoint.restore, *checkpoint.load(tmp_path)))
    assert rest == history[stop:] and torch.equal(weights_of(resumed), weights_of(through))


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
        run(tiny(), small(rollouts=1, minibatches=minibatches, inner_epochs=epochs), save=lambda **s: states.append(s["updates"]))
        assert states == [minibatches * epochs]


def test_the_learning_rate_warms_up_over_updates_and_stays(tiny):
    rates = []
    run(tiny(), small(rollouts=4, warmup=5, lr=0.01), save=lambda **s: rates.append(s["optimizer"].param_groups[0]["lr"]))
    assert rates == pytest.approx([0.004, 0.008, 0.01, 0.01])


def test_credit_takes_the_place_of_the_group_advantages(tiny):
    """The group advantages by another way give the same run, per completion and per token; others another."""
    own = lambda r: group_advantages(r.rewards).flatten()
    spread = lambda r: own(r)[:, None] * r.mask
    opposite = lambda r: -own(r)
    plain, a, b, c = (run(tiny(), small(rollouts=2), credit=credit) for credit in (None, own, spread, opposite))
    assert plain == a == b != c


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
        equal = [len(set(group)) == 1 for group in r.rewards.tolist()]
        assert metrics["no_signal"] == pytest.approx(sum(equal) / len(equal))
    run(tiny(), small(), log=check)


def test_a_rollout_without_any_signal_leaves_the_policy_where_it_is(tiny):
    model = tiny()
    run(model, small(rollouts=2, beta=0.0), rewards={"constant": lambda text, example: 1.0})
    assert torch.equal(weights_of(model), weights_of(tiny()))


@pytest.mark.parametrize("fields, culprit", [
    ({"group_size": 1}, "group_size 1"), ({"temperature": 0}, "temperature 0"), ({"temperature": -0.5}, "temperature -0.5"),
    ({"lr": 0}, "lr 0"), ({"rollouts": 0}, "rollouts 0"), ({"minibatches": 0}, "minibatches 0"),
    ({"minibatches": 9}, "minibatches 9"), ({"inner_epochs": 0}, "inner_epochs 0"), ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ({"reference_every": 0}, "reference_every 0"), ({"prompts_per_rollout": 0}, "prompts_per_rollout 0"),
    ({"validate_every": 0}, "validate_every 0"), ({"micro_batch_tokens": 0}, "micro_batch_tokens 0"), ({"beta": -1}, "beta -1"),
    ({"clip_high": -0.1}, "clip_high -0.1"), ({"dtype": "int4"}, "int4")])
def test_a_setting_out_of_range_is_one_line_that_names_it(fields, culprit):
    with pytest.raises(ValueError) as error:
        small(**fields)
    assert culprit in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- beside TRL

@pytest.mark.full
@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is not installed")
@pytest.mark.parametrize("token_mean", [False, True])
def test_loss_and_gradient_are_those_of_trl(token_mean):
    """TRL's own _compute_loss, on a stand-in for the trainer that has only what the method reads."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    logprobs, old, ref, advantages, _ = (torch.tensor(x, dtype=torch.float64) for x in ragged(1))
    mask = (torch.arange(7) < torch.tensor([7, 1, 3, 5, 2])[:, None]).long()
    results = []
    for theirs in (True, False):
        logprobs = logprobs.detach().requires_grad_()
        if theirs:
            settings = dict(top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=0.1,
                            loss_type="bnpo" if token_mean else "grpo", epsilon_low=0.2, epsilon_high=0.28, use_vllm=False,
                            args=SimpleNamespace(use_bias_correction_kl=False, delta=None), aux_loss_enabled=False,
                            model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
                            _entropy_bonus_enabled=False, _metrics={"train": Recorder()},
                            accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x))
            settings["_get_per_token_logps_and_entropies"] = lambda *args, **kwargs: (logprobs, torch.zeros(5, 7), None)
            inputs = dict(prompt_ids=torch.zeros(5, 2).long(), prompt_mask=torch.ones(5, 2).long(), completion_mask=mask,
                          completion_ids=torch.zeros(5, 7).long(), advantages=advantages, old_per_token_logps=old,
                          ref_per_token_logps=ref)
            trainer = SimpleNamespace(**settings)
            loss = GRPOTrainer._compute_loss(trainer, None, inputs)
            metrics = {"kl": trainer._metrics["train"]["kl"][0],
                       "clip_fraction": trainer._metrics["train"]["clip_ratio/region_mean"][0]}
        else:
            loss, metrics = policy_loss(logprobs, old, ref, advantages, mask, clip_high=0.28, beta=0.1, token_mean=token_mean)
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

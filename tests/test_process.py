"""Process supervision [DeepSeekMath 4.1.3], against sums by hand."""

import statistics

import pytest
import torch

import grpo
from variants.process import ProcessSupervision, process_advantages


def by_hand(steps, group_size, T, scale):
    """steps[row] = [(position, reward)]; plain loops over the definition."""
    rows = []
    for first in range(0, len(steps), group_size):
        group = steps[first:first + group_size]
        rewards = [reward for row in group for _, reward in row]
        mean = statistics.fmean(rewards) if rewards else 0.0
        std = (statistics.stdev(rewards) if len(rewards) > 1 else 0.0) + 1e-4 if scale else 1.0
        rows += [[sum((reward - mean) / std for at, reward in row if at >= t) for t in range(T)] for row in group]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("scale", [True, False])
def test_an_advantage_is_the_sum_of_the_normalised_rewards_of_the_steps_that_end_at_the_token_or_later(scale):
    steps = [
        [(2, 1.0), (5, 0.0)],
        [(3, 0.5)],
        [(1, 1.0), (4, 1.0), (6, 0.25)],  # one group
        [],
        [(0, 2.0)],
        [(6, 2.0)],
    ]  # equal rewards, and a row without a step
    rewards, ends = torch.full((6, 7), 9.0, dtype=torch.float64), torch.zeros(6, 7, dtype=torch.bool)
    for row, at in enumerate(steps):
        for t, reward in at:
            rewards[row, t], ends[row, t] = reward, True
    ours = process_advantages(rewards, ends, 3, scale)
    assert torch.allclose(ours, by_hand(steps, 3, 7, scale), atol=1e-5)
    assert not ours[3:].any()  # a group of equal step rewards has no signal


def train(model, estimator, examples, rules, **fields):
    from model import generate
    history = []
    config = grpo.GRPOConfig(**dict(rollouts=2, prompts_per_rollout=2, group_size=4, minibatches=2, max_new_tokens=6,
                                    dtype="float32", beta=0.0) | fields)
    grpo.train(model, examples, encode=lambda e: e["prompt"], decode=lambda ids: " ".join(map(str, ids)),
               generate=generate, end_ids=[0], rewards=rules, config=config, advantage_estimator=estimator,
               log=lambda metrics, rollout: history.append(metrics))
    return history


NO_RULE = {"any": lambda text, example: 0.0}


def test_steps_are_named_by_tokens_of_the_completion_whatever_the_prompts_length(tiny):
    seen = []

    def steps(ids, example):
        return [(len(ids) - 1, 1.0)] if ids[0] % 2 else [(0, 0.0)]

    class Watched(ProcessSupervision):
        def advantages(self, rollout):
            seen.append((rollout, super().advantages(rollout)))
            return seen[-1][1]

    train(tiny(), Watched(steps, 4, scale_by_std=False), [{"prompt": [1, 2, 3, 4, 5]}, {"prompt": [6]}], NO_RULE)
    for rollout, advantages in seen:
        for row in range(8):
            first = rollout.mask[row].nonzero()[0].item()  # where the first token is predicted
            last = rollout.mask[row].nonzero()[-1].item()
            ids = rollout.ids[row, first + 1:last + 2].tolist()
            assert len(ids) == rollout.lengths[row]
            changes = (advantages[row, :-1] - advantages[row, 1:]).nonzero().flatten().tolist()
            # none in a group of equal rewards, or at the row's end
            assert changes in ([], [last if ids[0] % 2 else first])


def test_a_step_outside_the_completion_is_refused(tiny):
    with pytest.raises(ValueError, match="token 99"):
        train(tiny(), ProcessSupervision(lambda ids, e: [(99, 1.0)], 4), [{"prompt": [1]}], NO_RULE)


def test_two_steps_that_end_at_one_token_are_refused(tiny):
    with pytest.raises(ValueError, match="two steps end at token 0"):
        train(tiny(), ProcessSupervision(lambda ids, e: [(0, 1.0), (0, 0.0)], 4), [{"prompt": [1]}], NO_RULE)


def test_step_rewards_alone_teach(tiny):
    def steps(ids, example):  # each token is a step
        return [(i, float(token == 7)) for i, token in enumerate(ids)]

    history = train(tiny(), ProcessSupervision(steps, 8), [{"prompt": [1, 2]}],
                    {"sevens": lambda text, e: text.split().count("7") / len(text.split())},
                    rollouts=25, group_size=8, lr=1e-2, warmup=0)
    sevens = [metrics["sevens"] for metrics in history]
    assert sum(sevens[-3:]) / 3 > sum(sevens[:3]) / 3 + 0.3

"""Process supervision: a reward for each step of a chain, in place of one for its outcome [DeepSeekMath 4.1.3].

    def steps(ids, example):
        return [(12, 1.0), (25, 0.0)]      # steps that end at tokens 12 and 25, and their rewards
    grpo.train(..., advantage_estimator=ProcessSupervision(steps, group_size=16))

DeepSeekMath judges steps by a trained reward model; here by any function, a rule as well. What differs from grpo.py's
group advantages is `process_advantages` alone.

Shapes: B = N*G rows, G completions of each of N prompts, T positions.
"""

import torch


def process_advantages(step_rewards, step_ends, group_size, scale_by_std=True):
    """The sum of the normalised rewards of the steps that end at a token or later.  [DeepSeekMath 4.1.3]

    step_rewards (B, T), read where step_ends (B, T) is True: at the token that ends a step. They are normalised by the
    mean and the std (sample std plus 1e-4, as in grpo.group_advantages) of all steps of the group. -> (B, T)
    """
    ends = step_ends.reshape(len(step_ends) // group_size, -1).float()                               # (N, G*T)
    rewards, count = step_rewards.reshape(ends.shape), ends.sum(1, keepdim=True)
    mean = (rewards * ends).sum(1, keepdim=True) / count.clamp(min=1)
    normalised = (rewards - mean) * ends
    if scale_by_std:
        variance = normalised.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        normalised = normalised / (variance.sqrt() + 1e-4)
    return normalised.view(step_ends.shape).flip(1).cumsum(1).flip(1)                                # (B, T)


class ProcessSupervision:
    """An advantage estimator for grpo.train.

    steps(completion ids, example) -> [(last token of the step, its reward)], tokens from 0.
    """

    def __init__(self, steps, group_size, scale_by_std=True):
        self.steps, self.group_size, self.scale_by_std = steps, group_size, scale_by_std

    def advantages(self, rollout):
        rewards, is_last = torch.zeros_like(rollout.old_logprobs), torch.zeros_like(rollout.mask)
        for row, (end, length) in enumerate(zip(rollout.ends, rollout.lengths.tolist())):
            start = end - length  # tokens of the prompt; position t predicts token t+1
            completion, example = rollout.ids[row, start:end].tolist(), rollout.examples[row // self.group_size]
            for token, reward in self.steps(completion, example):
                if not 0 <= token < length:
                    raise ValueError(f"a step ends at token {token} of a completion of {length} tokens")
                if is_last[row, start - 1 + token]:
                    raise ValueError(f"two steps end at token {token}")
                rewards[row, start - 1 + token] = reward
                is_last[row, start - 1 + token] = True
        return process_advantages(rewards, is_last, self.group_size, self.scale_by_std)

    def learn(self, rollout, rows):
        return {}  # nothing here learns

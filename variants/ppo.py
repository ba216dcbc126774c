"""Proximal Policy Optimization: the advantage of each token from a critic and GAE, in place of GRPO's group advantages.

What differs from grpo.py: a second network, the critic, estimates the return from each token on; the advantage of a
token is how much better things went than it expected. Sampling, clipped ratio, mini-batches and KL are grpo.train's.
DeepSeekMath (arXiv 2402.03300) eq. 1-2; R1 v2: DeepSeek-R1 (arXiv 2501.12948v2), appendix A.3.

    grpo.train(..., config=config, advantage_estimator=PPO(model, config, PPOConfig()))
    python -m variants.ppo --model DIR --data FILE.jsonl --out DIR     # a problem set (data/problems.py)

Shapes: N prompts, G completions each, B = N*G rows (prompt-major), T positions; position t is the state in which token
t+1 is sampled, as for log-probabilities.
"""

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn


@dataclass(frozen=True)
class PPOConfig:
    gamma: float = 1.0          # the reward comes at the end and is not discounted: our inference
    lam: float = 1.0            # GAE's lambda. R1 v2 A.3: 1.0 near GRPO, 0.95 considerably worse
    value_clip: float = 0.2     # not published
    critic_lr: float = 3e-4     # not published
    kl_in_reward: float = 0.0   # beta of eq. 2's reward, r - beta log(pi/pi_ref), with GRPOConfig's beta at 0
    whiten: bool = True         # advantages to mean 0, std 1 over the rollout; the critic's targets stay as they are

    def __post_init__(self):
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is not between 0 and 1")
        for name in ("value_clip", "critic_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        if not self.kl_in_reward >= 0:
            raise ValueError(f"kl_in_reward {self.kl_in_reward} must not be negative")


# ------------------------------------------------------------------------------------------- the estimators

def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """Generalized advantage estimation. rewards, values, mask (B, T) -> advantages, returns (B, T), 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last sampled token; A_t = sum_l (gamma lam)^l delta_{t+l}.
    Returns = A + V, from the advantages as they are, not whitened. The sampled tokens of a row are contiguous.
    """
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)  # V_{t+1} is 0 after a row's last
    advantages = torch.zeros_like(values)
    following, next_value = 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * lam * following, 0)                      # (B,)
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(advantages, mask):
    """To mean 0 and std 1 over the sampled tokens. (B, T) -> (B, T), 0 outside the mask.

    1e-4 as in grpo.group_advantages: equal advantages stay near 0, instead of their rounding growing to a std of 1.
    """
    chosen = advantages[mask.bool()]
    return torch.where(mask.bool(), (advantages - chosen.mean()) / (chosen.std(unbiased=False) + 1e-4), 0)


def value_loss(values, old_values, returns, mask, clip, normaliser=None):
    """1/2 mean max[(V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2] over the sampled tokens. (B, T) each -> scalar.

    normaliser: the whole update's number of tokens, where this is one micro-batch of several.
    """
    values, old_values, returns = (torch.where(mask.bool(), x, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    losses = torch.max((values - returns).square(), (clipped - returns).square())  # 0 outside the mask
    return 0.5 * losses.sum() / (normaliser or mask.sum().clamp(min=1))


def explained_variance(values, returns, mask):
    """1 - Var(R - V) / Var(R) over the sampled tokens; 0 where there are none, or all returns are equal."""
    values, returns = values[mask], returns[mask]
    variance = returns.var(unbiased=False) if len(returns) else 0.0
    if variance <= 1e-8:
        return 0.0
    return (1 - (returns - values).var(unbiased=False) / variance).item()


def last_states(model, ids):
    """The last layer's states (B, T, D) of model.py's Transformer; another model needs another function."""
    return model.hidden(ids)


class Critic(nn.Module):
    """The policy's architecture with its own weights and a scalar head. ids (B, T) -> values (B, T)."""

    def __init__(self, model, hidden=last_states):
        super().__init__()
        # frozen weights are shared: with LoRA the critic is a second adapter on the policy's base
        self.trunk = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad}).eval()
        self.hidden = hidden
        one_token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with torch.no_grad():
            width = hidden(self.trunk, one_token).shape[-1]
        self.head = nn.utils.skip_init(nn.Linear, width, 1, device=one_token.device)  # leaves the random state alone
        nn.init.zeros_(self.head.weight)  # at first it expects nothing
        nn.init.zeros_(self.head.bias)

    def forward(self, ids):
        states = self.hidden(self.trunk, ids).float()
        with torch.autocast(ids.device.type, enabled=False):  # bf16 would round the values to two or three digits
            return self.head(states)[..., 0]


# ------------------------------------------------------------------------------------------- in grpo.train

class PPO:
    """An advantage estimator for grpo.train: advantages of a rollout, and a critic that learns beside the policy."""

    def __init__(self, model, config, ppo=PPOConfig(), hidden=last_states):
        """config: the run's GRPOConfig, for its dtype, micro-batches and grad_clip; hidden(model, ids) -> (B, T, D)."""
        if ppo.kl_in_reward and config.beta:
            raise ValueError(f"kl_in_reward {ppo.kl_in_reward} and beta {config.beta}: one of them must be 0")
        self.config, self.ppo = config, ppo
        self.critic = Critic(model, hidden).eval()
        self.trained = [p for p in self.critic.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=ppo.critic_lr, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(self.trained[0].device.type, enabled=config.dtype == "float16")
        self.objects = {"critic": self.critic, "critic_optimizer": self.optimizer, "critic_scaler": self.scaler}
        self.needs_reference = ppo.kl_in_reward > 0

    def advantages(self, r):
        """(B, T): the rules' reward falls on a row's last sampled token, the KL's on each."""
        rewards = torch.zeros_like(r.old_logprobs, dtype=torch.float32)
        last = torch.tensor(r.ends, device=rewards.device) - 2  # position t predicts token t+1
        rewards[torch.arange(len(last)), last] = r.rewards.flatten().to(rewards)
        if self.ppo.kl_in_reward:
            rewards = rewards - self.ppo.kl_in_reward * (r.old_logprobs - r.ref_logprobs)        # DeepSeekMath eq. 2
        self.old_values = torch.zeros_like(rewards)  # as they stand before the rollout's first update
        with torch.no_grad():
            for rows in micro_batches(range(len(r.ends)), r.ends, self.config.micro_batch_tokens):
                values = self.values(r, rows)
                self.old_values[rows, :values.shape[1]] = values
        sum_over_processes(self.old_values)
        advantages, self.returns = gae(rewards, self.old_values, r.mask, self.ppo.gamma, self.ppo.lam)
        self.explained = explained_variance(self.old_values, self.returns, r.mask)
        return whiten(advantages, r.mask) if self.ppo.whiten else advantages

    def values(self, r, rows):
        """(len(rows), t); t = max(ends) - 1 of these rows. Without rows (1, t), of row 0."""
        read, dtype = rows or [0], self.config.dtype  # an empty share makes a pass too: FSDP's are collective
        t = max(r.ends[row] for row in read) - 1
        ids = r.ids[read, :t]
        with torch.autocast(ids.device.type, getattr(torch, dtype), enabled=dtype != "float32", cache_enabled=False):
            return self.critic(ids)

    def learn(self, r, rows):
        """One Adam step of the critic on the rows of the policy's update, towards this rollout's returns."""
        tokens = int(r.mask[rows].sum())  # of the whole update, before micro-batches
        total = 0.0
        for batch in micro_batches(rows, r.ends, self.config.micro_batch_tokens):
            values = self.values(r, batch)
            t = values.shape[1]
            old_values, returns, mask = (x[batch, :t] for x in (self.old_values, self.returns, r.mask))
            loss = value_loss(values, old_values, returns, mask, self.ppo.value_clip, tokens)
            self.scaler.scale(loss).backward()
            total += loss.item()
        total = torch.tensor(total, dtype=torch.float64, device=r.mask.device)
        sum_over_processes(total)
        sum_over_processes(*[p.grad for p in self.trained if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.grad_clip)
        if torch.isfinite(norm):  # Adam would keep a NaN for good
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"value_loss": total.item(), "explained_variance": self.explained}  # of the rollout's old values


def share(rows):
    """This process's part of the rows: all of them, unless torchrun has started several (lab/parallel.py)."""
    return rows[dist.get_rank()::dist.get_world_size()] if dist.is_initialized() else rows


def sum_over_processes(*tensors):
    """Sums tensors of one dtype in place, 32 in a message. Sharded gradients are summed already, by FSDP."""
    own = [t for t in tensors if not hasattr(t, "placements")] if dist.is_initialized() else []
    for i in range(0, len(own), 32):
        flat = torch.cat([t.flatten() for t in own[i:i + 32]])
        dist.all_reduce(flat)
        for t, total in zip(own[i:i + 32], flat.split([t.numel() for t in own[i:i + 32]])):
            t.copy_(total.view_as(t))


def micro_batches(rows, ends, budget):
    """Split row numbers, longest first, into batches of at most `budget` padded tokens; a longer row goes alone."""
    rows = sorted(rows, key=lambda row: -ends[row])
    processes = dist.get_world_size() if dist.is_initialized() else 1
    while rows:
        count = processes * max(1, budget // ends[rows[0]])
        yield share(rows[:count])  # of several processes: this one's part, which may be empty
        rows = rows[count:]


def main():
    from grpo import GRPOConfig, train  # here, so that the algorithm imports without the rest of the project
    from lab.scripts import reinforce
    reinforce("PPO on a model directory, with the rules of rewards.py.", train, GRPOConfig, PPO, PPOConfig,
              mean="token")


if __name__ == "__main__":
    main()

"""PRIME: the advantage of each token from implicit process rewards, in place of GRPO's group advantages.

What differs from grpo.py: a second language model, the process reward model, learns online to tell right completions
from wrong ones, and rewards each token by prm_beta log(pi_prm / pi_ref). Nobody labels a step; the outcome rule alone
teaches. Sampling, clipped ratio and mini-batches are grpo.train's, with GRPOConfig(beta=0, mean="token"): PRIME has no
KL term. PRIME (arXiv 2502.01456) algorithm 1, eq. 3-6. The authors' code departs: another scale in place of beta,
and the summed return is whitened.

    estimator = PRIME(model, config, PRIMEConfig())
    filtered = DAPO(DAPOConfig(resample=3), config.max_new_tokens, estimator.keep)                 # variants/dapo.py
    grpo.train(..., config=config, advantage_estimator=estimator, select=filtered.select)
    python -m variants.prime --model DIR --data FILE.jsonl --out DIR     # a problem set (data/problems.py)

Shapes: N prompts, K completions each, B = N*K rows (prompt-major), T positions; position t predicts token t+1.
"""

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2 ** 28 if torch.cuda.is_available() else 2 ** 26  # positions x vocabulary: 1 GB or 256 MB in fp32


@dataclass(frozen=True)
class PRIMEConfig:
    prm_beta: float = 0.05     # PRIME: 0.05
    prm_lr: float = 2e-4       # twice the policy's. PRIME: 1e-6, the policy's 5e-7
    gamma: float = 1.0         # PRIME: 1
    lowest: float = 0.2        # prompts are kept whose accuracy lies strictly between; PRIME: 0.2 and 0.8
    highest: float = 0.8

    def __post_init__(self):
        for name in ("prm_beta", "prm_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma {self.gamma} is not between 0 and 1")
        if not 0 <= self.lowest < self.highest <= 1:
            raise ValueError(f"lowest {self.lowest} and highest {self.highest} must be 0 <= lowest < highest <= 1")


# ------------------------------------------------------------------------------------------- the estimators

def implicit_rewards(logprobs, ref_logprobs, mask, beta=0.05):
    """r(y_t) = beta log(pi_prm / pi_ref) of each sampled token, 0 elsewhere. (B, T) each -> (B, T)   [eq. 3]"""
    return torch.where(mask.bool(), beta * (logprobs - ref_logprobs), 0)


def outcome_loss(process_rewards, outcomes, normaliser=None):
    """Cross-entropy of sigma(r(y)), r(y) = sum_t r(y_t), with the outcome [eq. 4]. (B, T), outcomes (B,) in 0..1

    Mean over the completions; normaliser: the whole update's number, where this is one micro-batch of several.
    """
    loss = F.binary_cross_entropy_with_logits(process_rewards.sum(1), outcomes, reduction="sum")
    return loss / (normaliser or len(outcomes))


def others_mean(x):
    """The mean of the *other* completions of the group. (N, K) -> (N, K)"""
    if x.shape[1] < 2:
        raise ValueError(f"K is {x.shape[1]}: PRIME compares the completions of a group, so it takes 2 or more")
    return (x.sum(1, keepdim=True) - x) / (x.shape[1] - 1)


def prime_advantages(process_rewards, outcomes, mask, gamma=1.0):
    """Returns of the process rewards and of the outcome, each against the group's other completions.   [eq. 5]

    process_rewards, mask (B, T); outcomes (N, K) -> (B, T), 0 outside the mask.
    """
    process_rewards, mask = torch.where(mask.bool(), process_rewards, 0), mask.to(process_rewards.dtype)
    mean_reward = process_rewards.sum(1) / mask.sum(1).clamp(min=1)  # (B,) per token: eq. 5 as printed omits / |y|
    baseline = others_mean(mean_reward.view(outcomes.shape)).flatten()
    centred = (process_rewards - baseline[:, None]) * mask
    returns, following = torch.zeros_like(centred), 0.0
    for t in reversed(range(centred.shape[1])):
        following = centred[:, t] + gamma * following  # (B,)
        returns[:, t] = following
    of_outcome = (outcomes - others_mean(outcomes)).flatten()  # (B,)
    return (returns + of_outcome[:, None]) * mask


# ------------------------------------------------------------------------------------------- in grpo.train

class PRIME:
    """An advantage estimator for grpo.train: advantages of a rollout by a process reward model that learns on each."""

    needs_reference = False  # grpo.train need not score one: the process reward model has its own

    def __init__(self, model, config, prime=PRIMEConfig(), outcome="accuracy"):
        """The policy, the process reward model and its reference start from `model`, whose weights should be fp32.

        config: the run's GRPOConfig; outcome: the name of the rule, 0 or 1, that is the outcome. Other rules, a
        length penalty and a Judge are logged, without effect.
        """
        self.config, self.prime, self.outcome = config, prime, outcome
        # frozen weights are shared: with LoRA the reward model is a second adapter on the policy's base
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self.prm = copy.deepcopy(model, {id(p): p for p in frozen}).eval()
        self.reference = copy.deepcopy(model, {id(p): p for p in frozen}).eval().requires_grad_(False)
        self.trained = [p for p in self.prm.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=prime.prm_lr, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(self.trained[0].device.type, enabled=config.dtype == "float16")
        self.objects = {"prm": self.prm, "prm_optimizer": self.optimizer, "prm_scaler": self.scaler,
                        "prm_reference": self.reference}
        self.metrics = {}

    def outcomes(self, r):
        """(N, K)"""
        if self.outcome not in r.parts:
            raise ValueError(f"the outcome {self.outcome!r} is none of the rules {', '.join(r.parts)}")
        return r.parts[self.outcome]

    def keep(self, r):
        """The prompt filter, N booleans: neither too easy nor too hard, by the group's accuracy."""
        accuracies = [sum(right) / len(right) for right in self.outcomes(r).tolist()]  # not fp32: its 1/5 > 0.2
        return [self.prime.lowest < accuracy < self.prime.highest for accuracy in accuracies]

    def advantages(self, r):
        """(B, T). Each completion is scored, then the reward model takes one Adam step on the outcomes   [algorithm 1]

        The advantages use the rewards from before that step, so that one forward pass serves both. It needs autograd.
        """
        outcomes = self.outcomes(r)
        rewards, total = torch.zeros_like(r.old_logprobs), 0.0
        for rows in micro_batches(range(len(r.ends)), r.ends, self.config.micro_batch_tokens):
            with torch.no_grad():
                ref_logprobs = self.logprobs(self.reference, r, rows)
            logprobs = self.logprobs(self.prm, r, rows)
            t = logprobs.shape[1]
            of_tokens = implicit_rewards(logprobs, ref_logprobs, r.mask[rows, :t], self.prime.prm_beta)
            loss = outcome_loss(of_tokens, outcomes.flatten()[rows], normaliser=len(r.ends))
            self.scaler.scale(loss).backward()
            rewards[rows, :t] = of_tokens.detach()
            total += loss.item()
        total = torch.tensor(total, dtype=torch.float64, device=rewards.device)
        sum_over_processes(total)
        sum_over_processes(rewards, *[p.grad for p in self.trained if p.grad is not None])
        predicted, right = rewards.sum(1) > 0, outcomes.flatten() > 0.5
        self.metrics = {"prm_loss": total.item(), "prm_accuracy": (predicted == right).float().mean().item()}
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.grad_clip)
        if torch.isfinite(norm):  # Adam would keep a NaN for good
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return prime_advantages(rewards, outcomes, r.mask, self.prime.gamma)

    def logprobs(self, model, r, rows):
        """(len(rows), t) of the sampled tokens, 0 elsewhere; t = max(ends) - 1 of these rows. Without rows (1, t).

        A model with hidden(ids) -> (B, T, D), head(states) and config.vocab_size makes its logits in pieces.
        """
        def score(logits, targets):
            return -F.cross_entropy(logits.float() / self.config.temperature, targets, reduction="none")

        def score_states(states, targets):
            return score(model.head(states), targets)

        c, read = self.config, rows or [0]  # an empty share makes a pass too: FSDP's are collective
        end = max(r.ends[row] for row in read)
        ids, mask = r.ids[read, :end], r.mask[read, :end - 1].bool() & bool(rows)
        sampled = mask.flatten().nonzero()[:, 0]  # (n,) positions that predict a sampled token
        targets = ids[:, 1:].flatten()[sampled]   # (n,)
        with torch.autocast(ids.device.type, getattr(torch, c.dtype), c.dtype != "float32", cache_enabled=False):
            if hasattr(model, "hidden") and hasattr(model, "head"):
                states = model.hidden(ids[:, :-1]).flatten(0, 1).index_select(0, sampled)  # (n, D)
                at_once = LOGITS_AT_ONCE // model.config.vocab_size
                pieces = zip(states.split(at_once), targets.split(at_once))  # computed again in the backward pass
                logprobs = torch.cat([checkpoint(score_states, *piece, use_reentrant=False) for piece in pieces])
            else:
                logprobs = score(model(ids[:, :-1]).flatten(0, 1).index_select(0, sampled), targets)
        return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logprobs)

    def learn(self, r, rows):
        return self.metrics  # it has already learned


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
    reinforce("PRIME on a model directory, with the rules of rewards.py.", train, GRPOConfig, PRIME, PRIMEConfig,
              mean="token", beta=0.0)


if __name__ == "__main__":
    main()

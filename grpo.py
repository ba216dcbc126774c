"""Group Relative Policy Optimization: reinforcement learning from rule-based rewards, without a critic.

DeepSeekMath (arXiv 2402.03300) eq. 3-4 and algorithm 1, on R1's schedule. One rollout:

  1. sample G completions of each prompt from the current policy, which is pi_old until the next rollout
  2. judge each by rules: reward = sum of weight * rule
  3. advantage of a completion = its reward minus its group's mean (divided by the group's std)
  4. for each mini-batch, one Adam step on -min(ratio A, clip(ratio) A) + beta KL, where ratio = pi / pi_old
  5. every `reference_every` rollouts: the reference becomes the current policy

Over a rollout the loss averages about 0, as advantages do: watch reward, KL, clip fraction and entropy instead.

    python grpo.py --model DIR --data FILE.jsonl --out DIR    # a problem set (data/problems.py)

Shapes: N prompts, G completions each, B = N*G rows (prompt-major), V vocabulary; ids (B, T+1); log-probabilities and
masks (B, T): position t predicts ids[:, t+1].
"""

import copy
import itertools
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2 ** 28 if torch.cuda.is_available() else 2 ** 26  # positions x vocabulary: 1 GB or 256 MB in fp32
adam = partial(torch.optim.Adam, betas=(0.9, 0.95), fused=True)  # betas: not published


@dataclass(frozen=True)
class GRPOConfig:
    rollouts: int = 60             # R1-Zero: 650, that is 10,400 updates of 512 completions
    prompts_per_rollout: int = 16  # N. R1: 512 questions a rollout
    group_size: int = 16           # G. R1: 16, DeepSeekMath: 64
    minibatches: int = 4           # updates a rollout. R1: 16
    inner_epochs: int = 1          # mu. R1: 1
    lr: float = 1e-4               # R1: 3e-6 at 671B
    warmup: int = 20               # updates; not published
    temperature: float = 1.0       # R1-Zero and R1's first RL stage: 1; its second: 0.7
    max_new_tokens: int = 160
    scale: str = "group"           # whose std divides advantages. Lite PPO: "batch"; Dr. GRPO: "none", not divided
    leave_one_out: bool = False    # RLOO: True, with scale "none"
    clip_low: float = 0.2          # ratio >= 1 - clip_low. R1: eps = 10, which is no lower clip
    clip_high: float = 0.2         # ratio <= 1 + clip_high. R1: 10; DAPO: 0.28
    sequence_ratio: bool = False   # GSPO: one ratio per sequence, the geometric mean of its tokens'
    detach_ratio: bool = False     # CISPO: the clipped ratio is a constant weight on A log pi
    stale_limit: float = 0.0       # DeepSeek-V3.2: above 0, drops a negative A in rows of a larger mean log(pi_old/pi)
    mean: str = "sequence"         # eq. 3: over each sequence, then over sequences. DAPO: "token"; Dr. GRPO: "constant"
    beta: float = 0.001            # weight of the KL. R1: 0.001, DeepSeekMath: 0.04
    weigh_kl: bool = False         # DeepSeek-V3.2: the KL times the ratio
    reference_every: int = 20      # rollouts until the reference is replaced. R1: 25, that is 400 updates
    old_logprobs: str = "trainer"  # pi_old's: from one more forward pass; "sampler": those recorded while sampling
    importance_cap: float = 0.0    # above 0: A is multiplied, token by token, by min(pi_old / pi_sampler, cap)
    grad_clip: float = 1.0         # not published
    micro_batch_tokens: int = 2048   # tokens of one forward pass; changes memory and speed, not the result. GPU: more
    offload_reference: bool = False  # keep it in the CPU's memory except while it scores
    dtype: str = "bfloat16"        # of sampling and of the forward pass; weights, gradients and Adam stay fp32
    validate_every: int = 10       # rollouts; the script prints a sample then
    seed: int = 0


def group_advantages(rewards, scale="group", leave_one_out=False):
    """Outcome supervision: (r - mean) / std within each group [DeepSeekMath 4.1.2]. rewards (N, G) -> (N, G).

    The paper gives neither the std's degrees of freedom nor an epsilon: here G - 1, as TRL, and 1e-4.
    scale: the std of each group, of the "batch", that is of all rewards [Lite PPO], or "none" [Dr. GRPO].
    leave_one_out: r minus the mean of the *other* completions, which is G / (G - 1) times r - mean [RLOO].
    """
    shifted = rewards - rewards[:, :1]  # equal rewards must give exactly 0; their mean could be off by rounding
    advantages = shifted - shifted.mean(dim=1, keepdim=True)
    if leave_one_out:
        advantages = advantages * rewards.shape[1] / (rewards.shape[1] - 1)
    if scale == "none":
        return advantages
    std = {"group": shifted.std(dim=1, keepdim=True), "batch": rewards.std()}[scale]
    return advantages / (std + 1e-4)


def token_logprobs(logits, ids, temperature=1.0):
    """Log-probability of each id under softmax(logits / temperature). logits (..., V), ids (...) -> (...)"""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return -F.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="none").view(ids.shape)


def kl_divergence(logprobs, ref_logprobs):
    """An estimate of KL(policy || reference), per token: pi_ref/pi - log(pi_ref/pi) - 1, never negative [DeepSeekMath
    eq. 4]. Its gradient, on-policy, is that of KL(reference || policy). (B, T), (B, T) -> (B, T)"""
    log_ratio = (ref_logprobs - logprobs).clamp(max=10)  # exp stays finite; beyond that the gradient is 0
    return torch.exp(log_ratio) - log_ratio - 1


def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.2, mean="sequence",
                sequence_ratio=False, detach_ratio=False, stale_limit=0.0, beta=0.001, weigh_kl=False, normaliser=None):
    """DeepSeekMath eq. 3, negated: -mean[min(ratio A, clip(ratio) A) - beta KL]. Its relatives: variants/configs.py.

    logprobs, old_logprobs, ref_logprobs (or None), mask (B, T): log-probabilities of the sampled tokens under the
    policy, pi_old (detached), and the reference; mask is 1 on sampled tokens, the end token included.
    advantages (B,) or (B, T). The switches are GRPOConfig's. normaliser divides the summed loss: the number of
    sequences, of tokens, or a constant, by `mean`; this batch's by default, the whole update's for a micro-batch.
    Returns the loss and metrics, means over this batch's tokens; "drift": |log(pi / pi_old)|.
    """
    lengths, tokens = mask.sum(1).clamp(min=1), mask.sum().clamp(min=1)  # (B,), scalar
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    # padding becomes 0, and so does its loss; multiplied by the mask it might be inf * 0, NaN
    logprobs, old_logprobs, ref_logprobs, advantages = (
        x if x is None else torch.where(mask > 0, x, 0) for x in (logprobs, old_logprobs, ref_logprobs, advantages))
    log_ratio = token_log_ratio = logprobs - old_logprobs
    if sequence_ratio:
        log_ratio = (token_log_ratio.sum(1) / lengths)[:, None].expand(mask.shape)  # GSPO eq. 7
    ratio = torch.exp(log_ratio.clamp(-20, 20))  # finite under any drift
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if detach_ratio:
        objective = clipped.detach() * advantages * logprobs  # CISPO eq. 4
        clip_decides = ratio != clipped
    else:
        objective = torch.min(ratio * advantages, clipped * advantages)  # the clip can only lower it, for any A
        clip_decides = clipped * advantages < ratio * advantages
    if stale_limit:
        is_stale = -token_log_ratio.sum(1) / lengths > stale_limit  # (B,), DeepSeek-V3.2's off-policy mask
        objective = torch.where(is_stale[:, None] & (advantages < 0), 0, objective)
    penalty = torch.zeros_like(objective) if ref_logprobs is None else kl_divergence(logprobs, ref_logprobs)
    if weigh_kl:
        penalty = penalty * ratio  # its expected gradient is then, off-policy too, that of KL(pi || pi_ref)
    token_loss = beta * penalty - objective  # (B, T); the KL is part of the loss, not of the reward
    if mean == "sequence":
        token_loss = token_loss / lengths[:, None]
    if normaliser is None:
        normaliser = {"sequence": len(mask), "token": tokens, "constant": mask.numel()}[mean]
    loss = token_loss.sum() / normaliser
    with torch.no_grad():
        metrics = {"kl": (penalty * mask).sum() / tokens, "clip_fraction": (clip_decides * mask).sum() / tokens,
                   "ratio": (ratio * mask).sum() / tokens, "drift": token_log_ratio.abs().sum() / tokens}
    return loss, {name: value.item() for name, value in metrics.items()}


@dataclass
class Rollout:
    """The groups of one rollout as tensors; row i*G + j is completion j of prompt i."""
    examples: list             # N examples
    texts: list                # B completions, decoded
    ids: torch.Tensor          # (B, T+1) prompt + completion, right-padded
    mask: torch.Tensor         # (B, T) True where position t predicts a sampled token, the end token included
    ends: list                 # B, where the row ends in ids: tokens of prompt + completion
    lengths: torch.Tensor      # (B,) tokens of the completion
    finished: torch.Tensor     # (B,) whether it ended with an end token
    sampled_logprobs: torch.Tensor  # (B, T) the sampler's own; 0 where mask is False
    parts: dict                # rule -> (N, G) scores, unweighted
    rewards: torch.Tensor      # (N, G)
    old_logprobs: torch.Tensor | None = None  # (B, T) under pi_old, from where config.old_logprobs says
    ref_logprobs: torch.Tensor | None = None  # (B, T) under the reference, where there is one


@torch.no_grad()
def rollout(model, examples, *, encode, decode, generate, end_ids, rewards, weights, config, generator):
    """config.group_size completions of each example, sampled and judged. Arguments as in `train`."""
    G, prompts = config.group_size, [encode(example) for example in examples]
    new, lengths, logprobs = generate(model, prompts, n=G, max_new_tokens=config.max_new_tokens, end_ids=end_ids,
                                      temperature=config.temperature, generator=generator)
    device = new.device
    completions = [row[:length] for row, length in zip(new.tolist(), lengths.tolist())]
    texts = [decode(completion) for completion in completions]
    parts, total = {}, torch.zeros(len(examples), G, device=device)
    for name, rule in rewards.items():
        scores = torch.zeros(len(texts))
        for row in share(range(len(texts))):  # each process has all texts and judges its share: then they are summed
            scores[row] = float(rule(texts[row], examples[row // G]))
        parts[name] = scores.to(device).view(-1, G)
        sum_over_processes(parts[name])
        total += weights.get(name, 1.0) * parts[name]  # (N, G)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(G)  # (B,)
    ids = [torch.tensor([*prompts[i // G], *completion]) for i, completion in enumerate(completions)]
    ids = pad_sequence(ids, batch_first=True).to(device)  # (B, T+1)
    target = torch.arange(1, ids.shape[1], device=device)  # a mask by length: the padding's id may be a real token's
    mask = (target >= starts[:, None]) & (target < (starts + lengths)[:, None])
    sampled_logprobs = torch.zeros(mask.shape, device=device)
    sampled_logprobs[mask] = logprobs[torch.arange(new.shape[1], device=device) < lengths[:, None]].float()
    return Rollout(
        examples=list(examples), texts=texts, ids=ids, mask=mask, ends=(starts + lengths).tolist(), lengths=lengths,
        finished=torch.isin(new.gather(1, lengths[:, None] - 1)[:, 0], torch.tensor(list(end_ids), device=device)),
        sampled_logprobs=sampled_logprobs, parts=parts, rewards=total)


def cast_copy(model, dtype):
    """A frozen copy for sampling and scoring: parameters are cast once, buffers (rotary angles) keep their dtype."""
    if hasattr(model, "whole_copy"):  # of a sharded one (lab/sharding.py)
        return model.whole_copy(getattr(torch, dtype))
    dtype, cast = getattr(torch, dtype), {}
    for p in model.parameters():
        is_shared = p.dtype == dtype and not p.requires_grad  # the base of LoRA's adapters
        cast[id(p)] = p if is_shared else torch.nn.Parameter(p.detach().to(dtype, copy=True))
    return copy.deepcopy(model, cast).eval().requires_grad_(False)  # cast is deepcopy's memo: these copies are used


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


def logprobs_of(model, r: Rollout, rows, config):
    """Log-probabilities (len(rows), t) of these rows' sampled tokens, 0 elsewhere; t is where the longest of them ends.

    A model with hidden(ids) -> (B, T, D), head(states) and config.vocab_size makes logits only for sampled tokens.
    """
    read = rows or [0]  # an empty share reads row 0 and cuts it off again: under FSDP each process must make each pass
    t = max(r.ends[row] for row in read) - 1
    ids, mask = r.ids[read, :t + 1], r.mask[read, :t]
    sampled = mask.flatten().nonzero()[:, 0]  # (n,) positions that predict a sampled token
    targets = ids[:, 1:].flatten()[sampled]   # (n,)
    # no cache: one bf16 cast of the head for all of head_logprobs' pieces would sum their gradients in bf16
    with torch.autocast(ids.device.type, getattr(torch, config.dtype), config.dtype != "float32", cache_enabled=False):
        if hasattr(model, "hidden") and hasattr(model, "head"):
            states = model.hidden(ids[:, :-1]).flatten(0, 1).index_select(0, sampled)  # (n, D)
            logprobs = head_logprobs(model, states, targets, config.temperature)
        else:
            logits = model(ids[:, :-1]).flatten(0, 1).index_select(0, sampled)  # (n, V)
            logprobs = token_logprobs(logits, targets, config.temperature)
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logprobs)[:len(rows)]


def head_logprobs(model, states, targets, temperature):
    """token_logprobs of model.head(states), in pieces of LOGITS_AT_ONCE: a large vocabulary's (n, V) would not fit.
    It calls itself on each piece, which the backward pass computes again."""
    size = LOGITS_AT_ONCE // model.config.vocab_size
    if len(targets) <= size:
        return token_logprobs(model.head(states), targets, temperature)
    pieces = zip(states.split(size), targets.split(size))
    return torch.cat([checkpoint(head_logprobs, model, *piece, temperature, use_reentrant=False) for piece in pieces])


@torch.no_grad()
def all_logprobs(model, r: Rollout, config):
    """Log-probabilities (B, T), under `model`, of the rollout's sampled tokens, 0 elsewhere."""
    out = torch.zeros(r.mask.shape, device=r.mask.device)
    for rows in micro_batches(range(len(r.ends)), r.ends, config.micro_batch_tokens):
        logprobs = logprobs_of(model, r, rows, config)
        out[rows, :logprobs.shape[1]] = logprobs
    sum_over_processes(out)
    return out


def update(model, optimizer, r: Rollout, rows, advantages, config, scaler=torch.amp.GradScaler(enabled=False)):
    """One Adam step on these rows of a rollout; returns its metrics. scaler: of the loss, which float16 needs."""
    c, metrics = config, defaultdict(float)
    tokens = max(1, int(r.mask[rows].sum()))  # of the whole update, before micro-batches
    normaliser = {"sequence": len(rows), "token": tokens, "constant": len(rows) * c.max_new_tokens}[c.mean]
    for batch in micro_batches(rows, r.ends, c.micro_batch_tokens):
        logprobs = logprobs_of(model, r, batch, c)  # (b, t)
        t = logprobs.shape[1]
        loss, means = policy_loss(
            logprobs, r.old_logprobs[batch, :t], r.ref_logprobs[batch, :t] if c.beta else None,
            advantages[batch, :t], r.mask[batch, :t], clip_low=c.clip_low, clip_high=c.clip_high,
            sequence_ratio=c.sequence_ratio, detach_ratio=c.detach_ratio, stale_limit=c.stale_limit, mean=c.mean,
            beta=c.beta, weigh_kl=c.weigh_kl, normaliser=normaliser)
        scaler.scale(loss).backward()
        weight = int(r.mask[batch].sum()) / tokens
        for name, value in means.items():
            metrics[name] += value * weight
        metrics["loss"] += loss.item()
    parameters = optimizer.param_groups[0]["params"]
    sums = torch.tensor([*metrics.values()], dtype=torch.float64, device=r.mask.device)
    sum_over_processes(sums)
    sum_over_processes(*[p.grad for p in parameters if p.grad is not None])
    metrics = dict(zip(metrics, sums.tolist()))
    scaler.unscale_(optimizer)
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip).item()
    is_finite = math.isfinite(metrics["loss"] + metrics["grad_norm"])
    if is_finite:  # Adam would keep a NaN for good
        scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    # where the scaled gradient alone is not finite, float16 overflowed: update() halves the scale (1: no scaler)
    overflow = not is_finite and math.isfinite(metrics["loss"]) and scaler.get_scale() > 1
    metrics |= {"overflow": float(overflow), "skipped": float(not is_finite and not overflow)}
    scaler.update()
    return metrics


class TrainState:
    """What changes from one rollout to the next. From its objects and counters a stopped training resumes exactly."""

    def __init__(self, model, config, advantage_estimator, make_optimizer, resume):
        c, device = config, next(model.parameters()).device
        self.model, self.config, self.advantage_estimator, self.reference = model, config, advantage_estimator, None
        self.optimizer = make_optimizer(model.parameters(), lr=c.lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=c.dtype == "float16")
        self.generator = torch.Generator(device=device).manual_seed(c.seed)
        self.shuffler = torch.Generator().manual_seed(c.seed)
        self.counters = dict.fromkeys(("step", "updates", "prompts"), 0)
        self.objects = dict(model=model, optimizer=self.optimizer, scaler=self.scaler)
        self.objects |= dict(generator=self.generator, shuffler=self.shuffler)
        if c.beta > 0 or getattr(advantage_estimator, "needs_reference", False):
            self.reference = cast_copy(model, c.dtype).to("cpu" if c.offload_reference else device)
            self.objects["reference"] = self.reference
        self.objects |= getattr(advantage_estimator, "objects", {})
        if resume is not None:
            saved = resume(**self.objects)
            self.counters = {name: saved[name] for name in self.counters}

    def score(self, r: Rollout):
        """Sets the rollout's log-probabilities under pi_old and the reference."""
        if self.config.old_logprobs == "sampler":  # the first ratio is off 1 by the sampler gap
            r.old_logprobs = r.sampled_logprobs
        else:  # computed as in the updates: the first ratio is 1 up to rounding
            r.old_logprobs = all_logprobs(self.model, r, self.config)
        if self.reference is not None:
            r.ref_logprobs = all_logprobs(self.reference.to(r.ids.device), r, self.config)
            self.reference.to("cpu" if self.config.offload_reference else r.ids.device)

    def learn_from(self, r: Rollout, advantages):
        """Makes the updates on one rollout and returns their metrics; an inner epoch uses each completion once."""
        c, counters, history = self.config, self.counters, []
        advantages = advantages.reshape(len(r.texts), -1).expand(r.mask.shape)  # (B,) or (B, T) -> (B, T)
        if c.importance_cap:
            advantages = advantages * torch.exp(r.old_logprobs - r.sampled_logprobs).clamp(max=c.importance_cap)
        for _ in range(c.inner_epochs):
            shuffled = torch.randperm(len(r.texts), generator=self.shuffler)
            for rows in shuffled.tensor_split(min(c.minibatches, len(shuffled))):
                counters["updates"] += 1
                self.optimizer.param_groups[0]["lr"] = c.lr * min(1.0, counters["updates"] / max(1, c.warmup))
                metrics = update(self.model, self.optimizer, r, rows.tolist(), advantages, c, self.scaler)
                if self.advantage_estimator is not None and not metrics["skipped"]:
                    metrics |= self.advantage_estimator.learn(r, rows.tolist())
                history.append(metrics)
        return history


def rollout_metrics(r: Rollout, history, config):
    """What tells a healthy run from a sick one: statistics of the selected groups, and means over the updates."""
    tokens = r.mask.sum().clamp(min=1)
    metrics = {
        "reward": r.rewards.mean().item(), "length": r.lengths.float().mean().item(), "tokens": int(r.lengths.sum()),
        "unfinished": 1 - r.finished.float().mean().item(), "group_std": r.rewards.std(1).mean().item(),
        "no_signal": (r.rewards.amax(1) - r.rewards.amin(1) <= 1e-6).float().mean().item(),  # groups of equal rewards
        "entropy": -(r.old_logprobs.sum() / tokens).item(),   # the mean of -log p over samples estimates it
        "sampler_gap": ((r.sampled_logprobs - r.old_logprobs).abs().sum() / tokens).item()}  # healthy below 0.01
    if config.old_logprobs == "sampler":  # then the first update's forward pass tells: the weights had not moved
        metrics["sampler_gap"] = history[0]["drift"]
    metrics |= {name: scores.mean().item() for name, scores in r.parts.items()}
    done = [one for one in history if not one["skipped"] and not one["overflow"]] or history[:1]
    metrics |= {name: sum(one[name] for one in done) / len(done) for name in done[0]}
    return metrics | {name: sum(one[name] for one in history) for name in ("skipped", "overflow")}


def train(model, examples, *, encode, decode, generate, end_ids, rewards, config, weights=None,
          advantage_estimator=None, make_optimizer=adam, validate=None, log=None, save=None, resume=None,
          select=lambda draw, prompts, N: (draw(list(itertools.islice(prompts, N))), 0)):
    """Trains `model` in place by reinforcement learning, on examples in order, again and again; the last metrics.

    model(ids (B, T)) -> logits (B, T, V), causal: rows are padded on the right, without a mask; weights are fp32.
    encode(example) -> prompt ids; decode(completion ids, with the end token) -> text without it, for the rules.
    generate(model in config.dtype, prompts, *, n, max_new_tokens, temperature, end_ids, generator) ->
    completion ids (N*n, L), lengths (N*n,), and fp32 log-probabilities (N*n, L) of the sampled tokens
    under softmax(logits / temperature), no top-p or top-k; a completion ends at its first of end_ids, which counts.
    rewards: {name: rule(completion, example) -> float}; weights: {name: float}, 1 by default; 0 only logs the rule.
    advantage_estimator: an object in place of the group advantages (variants/): advantages(rollout) -> (B,) or (B, T);
    learn(rollout, rows) -> metrics, after the policy's update on these rows; optionally objects, {a new name: module,
    optimizer or generator} to be saved with the run, and needs_reference, whether it reads rollout.ref_logprobs.
    make_optimizer(parameters, lr=...) -> an optimizer of one group. (With variants/offload.py's, which holds the fp32
    weights, model is in config.dtype.)
    select(draw, prompts, N) -> the Rollout to learn from, and how many prompts it discarded: dynamic sampling, in
    variants/dapo.py. draw(examples) -> a Rollout; prompts: an iterator of examples.
    validate(model) -> metrics, every config.validate_every rollouts. log(metrics, rollout) and save(**state) come after
    each rollout; resume(**objects) puts such a state back into the objects and returns the counters.
    """
    c, weights, metrics, sharded = config, weights or {}, {}, hasattr(model, "whole_copy")
    if weights.keys() - rewards.keys():
        raise ValueError(f"weights for unknown rewards: {[*weights]}, of {[*rewards]}")
    state = TrainState(model, c, advantage_estimator, make_optimizer, resume)
    counters = state.counters
    prompts = (examples[i % len(examples)] for i in itertools.count(counters["prompts"]))
    draw = partial(rollout, encode=encode, decode=decode, generate=generate, end_ids=end_ids, rewards=rewards,
                   weights=weights, config=c, generator=state.generator)
    while counters["step"] < c.rollouts:
        started = time.time()
        model.eval()  # for the updates too: with dropout the ratio would measure its noise
        # 1, 2: sample groups from the current policy, or from its copy in config.dtype, freed at once; judge them
        as_is = not sharded and next(model.parameters()).dtype == getattr(torch, c.dtype)
        r, unused = select(partial(draw, model if as_is else cast_copy(model, c.dtype)), prompts, c.prompts_per_rollout)
        counters["prompts"] += len(r.examples) + unused
        sampling_seconds = time.time() - started
        state.score(r)
        # 3: advantages
        if advantage_estimator is None:
            advantages = group_advantages(r.rewards, c.scale, c.leave_one_out).flatten()  # (B,)
        else:
            advantages = advantage_estimator.advantages(r)                                       # (B,) or (B, T)
        # 4: updates
        history = state.learn_from(r, advantages)
        counters["step"] += 1
        # 5: the reference follows
        if state.reference is not None and counters["step"] % c.reference_every == 0:
            state.reference.load_state_dict((cast_copy(model, c.dtype) if sharded else model).state_dict())
        metrics = rollout_metrics(r, history, c) | {
            "step": counters["step"], "samples": counters["prompts"] * c.group_size, "discarded": unused,
            "seconds": time.time() - started, "sampling_seconds": sampling_seconds}
        if validate is not None and (counters["step"] % c.validate_every == 0 or counters["step"] == c.rollouts):
            metrics |= {f"validation_{name}": value for name, value in validate(model).items()}
        if log is not None:
            log(metrics, r)
        if save is not None:
            save(**state.objects, **counters)
    return metrics


def main():
    from lab.scripts import reinforce  # here, so that the algorithm imports without the rest of the project
    reinforce("GRPO on a model directory, with the rules of rewards.py.", train, GRPOConfig, make_optimizer=adam)


if __name__ == "__main__":
    main()

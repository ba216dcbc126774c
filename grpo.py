"""Group Relative Policy Optimization: reinforcement learning from rule-based rewards, without a critic.

DeepSeekMath (arXiv 2402.03300) eq. 3-4 and algorithm 1; the loop's schedule is R1's:
one rollout makes many groups, is split at random into mini-batches, and pi_old stays fixed meanwhile. One rollout:

  1. sample G completions of each prompt from the current policy, which is pi_old until the next rollout
  2. judge each by rules: reward = sum of weight * rule (plus DAPO's length penalty, if asked for)
  3. advantage of a completion = its reward minus its group's mean (divided by the group's std)
  4. for each mini-batch: ratio = pi / pi_old, clipped; plus beta times the KL to the reference; one Adam step
  5. every `reference_every` rollouts: the reference becomes the current policy

With eq. 3's mean the policy term's *value* is about 0 over a rollout (the advantages of a group sum to 0) while its gradient
is not: watch the reward, the KL (to the latest reference: a sawtooth), the clip fraction, the entropy and the gradient norm.

A truncated completion keeps its reward and its gradient (DeepSeekMath and R1 do not say; DAPO masks or penalises it). The
sampled end token is part of the action and has its gradient.

    python grpo.py --model DIR --data FILE.jsonl --out DIR    # a problem set (data/readers.py)

Shapes: N prompts, G completions each, B = N*G rows (prompt-major), V vocabulary; ids are (B, T+1), and what predicts
them is (B, T): position t predicts ids[:, t+1].
"""

import copy
import itertools
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint


LOGITS_AT_ONCE = 2 ** 26  # positions x vocabulary of one piece: 256 MB in fp32, a few times that at the peak
SKIPS = 5  # updates in a row that are not finite end a run
CHOICES = {"mean": ("sequence", "token", "constant"), "kl": ("k2", "k3"), "old_logprobs": ("trainer", "sampler"),
           "dtype": ("float32", "bfloat16")}


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
    scale_by_std: bool = True      # Dr. GRPO: False
    leave_one_out: bool = False    # RLOO: True, with scale_by_std False
    clip_low: float = 0.2          # ratio >= 1 - clip_low. R1: eps = 10, which is no lower clip
    clip_high: float = 0.2         # ratio <= 1 + clip_high. R1: 10; DAPO: 0.28
    sequence_ratio: bool = False   # GSPO: True
    detach_ratio: bool = False     # CISPO: True
    mean: str = "sequence"         # eq. 3: of each sequence first. DAPO: "token"; Dr. GRPO: "constant"
    beta: float = 0.001            # weight of the KL. R1: 0.001, DeepSeekMath: 0.04
    kl: str = "k3"                 # eq. 4; or "k2"
    reference_every: int = 20      # rollouts until the reference is replaced. R1: 25, that is 400 updates
    resample: int = 0              # DAPO's dynamic sampling: replace groups without signal, in at most so many rounds
    length_buffer: int = 0         # DAPO's soft length penalty: over the last so many of max_new_tokens
    old_logprobs: str = "trainer"  # who computes pi_old's: the trainer's forward pass, or the "sampler" as it draws, a pass less
    importance_cap: float = 0.0    # above 0: truncated importance weights min(pi_old / pi_sampler, cap)
    sample_budget: int = 0         # above 0: stop after so many completions, discarded ones counted
    grad_clip: float = 1.0         # not published
    micro_batch_tokens: int = 2048   # tokens of one forward pass; changes memory and speed, not the result. GPU: more
    offload_reference: bool = False  # it lies in the CPU's memory except while it scores
    dtype: str = "bfloat16"        # of sampling and of the forward pass; weights, gradients and Adam stay fp32
    validate_every: int = 10       # rollouts; the script prints a sample then
    seed: int = 0

    def __post_init__(self):
        for name, value in vars(self).items():
            allowed = CHOICES.get(name)
            if allowed and value not in allowed:
                raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")
            if not allowed and not value >= 0:
                raise ValueError(f"{name} {value} must not be negative")
        for name in ("rollouts", "prompts_per_rollout", "minibatches", "inner_epochs", "lr", "max_new_tokens",
                     "temperature", "reference_every", "grad_clip", "micro_batch_tokens", "validate_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        for wrong, why in (
                (self.importance_cap and self.old_logprobs == "sampler",
                 f"importance_cap {self.importance_cap} compares sampler and trainer: it needs old_logprobs trainer"),
                (self.length_buffer > self.max_new_tokens,
                 f"length_buffer {self.length_buffer} exceeds max_new_tokens {self.max_new_tokens}"),
                (self.group_size < 2, f"group_size {self.group_size}: the advantage compares completions, so it takes 2 or more"),
                (self.prompts_per_rollout * self.group_size < self.minibatches,
                 f"minibatches {self.minibatches} exceed the completions of a rollout")):
            if wrong:
                raise ValueError(why)


# ------------------------------------------------------------------------------------------- advantages

def group_advantages(rewards, scale_by_std=True, leave_one_out=False):
    """Outcome supervision: (r - mean) / std within each group [DeepSeekMath 4.1.2]. rewards (N, G) -> (N, G).

    The paper gives neither the std's degrees of freedom nor an epsilon: here the sample std (G - 1), as TRL, and
    1e-4. A group of equal rewards has no signal: its advantages are 0.
    leave_one_out: r minus the mean of the *other* completions, which is G / (G - 1) times r - mean [RLOO, without the std].
    """
    rewards = rewards - rewards[:, :1]  # equal rewards must give exactly 0, and their mean may round
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if leave_one_out:
        advantages = advantages * rewards.shape[1] / (rewards.shape[1] - 1)
    if scale_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return advantages


def length_penalty(lengths, max_length, buffer):
    """DAPO's soft penalty: 0 up to max_length - buffer tokens, then falling linearly to -1 at max_length. (B,) -> (B,)"""
    return -((lengths - (max_length - buffer)) / buffer).clamp(0, 1)


# ------------------------------------------------------------------------------------------- the loss

def token_logprobs(logits, ids, temperature=1.0):
    """Log-probability of each id under softmax(logits / temperature). logits (..., V), ids (...) -> (...).

    This is the sampling distribution: a rollout that cut the vocabulary (top-p, top-k) could not be scored by it.
    """
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return -F.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="none").view(ids.shape)


def kl_divergence(logprobs, ref_logprobs, estimator="k3"):
    """An estimate of the KL between policy and reference, per token. (B, T), (B, T) -> (B, T)

    k3  pi_ref/pi - log(pi_ref/pi) - 1, never negative [DeepSeekMath eq. 4]; as a loss it descends KL(pi_ref || pi)
    k2  log(pi_ref/pi)^2 / 2, never negative; as a loss it descends KL(pi || pi_ref)
    k1  log(pi/pi_ref), unbiased for KL(pi || pi_ref) and only to watch: as a loss its gradient is 0 in expectation
    k3's log-ratio is clamped above, at 10, so that exp stays finite: a token that has become that unlikely has no pull.
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    log_ratio = log_ratio.clamp(max=10)
    return torch.exp(log_ratio) - log_ratio - 1


def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.2, sequence_ratio=False,
                detach_ratio=False, mean="sequence", beta=0.001, kl="k3", importance=None, normaliser=None):
    """DeepSeekMath eq. 3, negated: -mean[min(ratio A, clip(ratio) A) - beta KL]; with other switches, its relatives:

    method         advantages        ratio, of a token if empty       clip_low, clip_high  mean      beta
    GRPO           (r - mean) / std                                   0.2, 0.2             sequence  0.04
    Dr. GRPO       r - mean                                           0.2, 0.2             constant  0
    DAPO           (r - mean) / std                                   0.2, 0.28            token     0
    GSPO           (r - mean) / std  sequence_ratio                   3e-4, 4e-4           sequence  0
    CISPO          (r - mean) / std  detach_ratio                     1, 4                 token     0
    RLOO           leave one out     detach_ratio, clipped to 1       0, 0                 constant  0
    REINFORCE      r - mean          detach_ratio, clipped to 1       0, 0                 constant  0
    PPO, PRIME     ppo.py, prime.py                                   0.2, 0.2             token     0

    logprobs, old_logprobs, ref_logprobs (or None), mask (B, T): log-probabilities of the sampled tokens under the
    policy, the policy that sampled, and the reference; mask is 1 on sampled tokens, the end token included.
    advantages (B,) or (B, T). sequence_ratio: one ratio a sequence, the geometric mean of its tokens' [GSPO].
    detach_ratio: the clipped ratio is a constant weight on A log pi, so no token loses its gradient [CISPO].
    mean: of each sequence, then over sequences [eq. 3]; "token": one over all tokens [DAPO]; "constant": the sum over a
    constant budget of tokens [Dr. GRPO]. importance (B, T): weights on the policy's term, for a sampler that differs.
    normaliser: what the whole update is divided by, where this is one micro-batch of several: its number of sequences,
    of tokens, or the budget; by default this batch's own ("constant" has none: B * T stands in, which varies).
    Returns the scalar loss and metrics as means over this batch's tokens; "drift" is the mean |log pi / pi_old|. Where the ratio
    is clipped to 1, clip_fraction is the share of tokens whose ratio has moved (with the sampler's pi_old at once, by rounding).
    """
    def clean(x):  # padding may hold anything, even inf, and inf * 0 is NaN
        return x if x is None else torch.where(mask > 0, x, 0)

    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    lengths, tokens = mask.sum(1).clamp(min=1), mask.sum().clamp(min=1)  # (B,), scalar
    logprobs, old_logprobs, ref_logprobs, advantages, importance = map(
        clean, (logprobs, old_logprobs, ref_logprobs, advantages, importance))
    log_ratio = token_log_ratio = logprobs - old_logprobs
    if sequence_ratio:
        log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand(mask.shape)  # GSPO eq. 7
    ratio = torch.exp(log_ratio.clamp(-20, 20))  # finite under any drift
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if detach_ratio:
        objective = clipped.detach() * advantages * logprobs  # CISPO eq. 4
    else:
        objective = torch.min(ratio * advantages, clipped * advantages)  # the clip can only lower it, for any A
    if importance is not None:
        objective = objective * importance
    penalty = torch.zeros_like(objective) if ref_logprobs is None else kl_divergence(logprobs, ref_logprobs, kl)
    token_loss = beta * penalty - objective  # (B, T); the KL stands in the loss, not in the reward
    if mean == "sequence":
        token_loss = token_loss / lengths[:, None]
    own = {"sequence": len(mask), "token": tokens, "constant": mask.numel()}[mean]
    loss = token_loss.sum() / (own if normaliser is None else normaliser)
    with torch.no_grad():
        clip_decides = ratio != clipped if detach_ratio else clipped * advantages < ratio * advantages
        metrics = {"kl": (penalty * mask).sum() / tokens, "clip_fraction": (clip_decides * mask).sum() / tokens,
                   "ratio": (ratio * mask).sum() / tokens, "drift": token_log_ratio.abs().sum() / tokens}
        if ref_logprobs is not None:
            metrics["k1"] = kl_divergence(logprobs, ref_logprobs, "k1").sum() / tokens
    return loss, {name: value.item() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------- the rollout

@dataclass
class Group:
    """The G completions of one prompt and what they earned."""
    example: dict
    prompt: list               # ids
    completions: list          # G tensors of ids
    logprobs: list             # G tensors, the sampler's own
    texts: list                # G completions, decoded
    parts: dict                # rule -> (G,) scores, unweighted
    rewards: torch.Tensor      # (G,)


@dataclass
class Rollout:
    """The groups of one rollout as tensors; row i*G + j is completion j of prompt i."""
    examples: list             # N examples
    texts: list                # B completions, decoded
    ids: torch.Tensor          # (B, T+1) prompt + completion, right-padded
    mask: torch.Tensor         # (B, T) True where position t predicts a sampled token
    ends: list                 # B, where the row ends in ids: tokens of prompt + completion
    lengths: torch.Tensor      # (B,) tokens of the completion
    finished: torch.Tensor     # (B,) whether it ended by itself
    sampled_logprobs: torch.Tensor  # (B, T) the sampler's own, 0 elsewhere
    parts: dict                # rule -> (N, G) scores, unweighted
    rewards: torch.Tensor      # (N, G)
    old_logprobs: torch.Tensor | None = None  # (B, T) under pi_old, by whom config.old_logprobs says
    ref_logprobs: torch.Tensor | None = None  # (B, T) under the reference, where there is one


@torch.no_grad()
def sample_groups(model, examples, encode, decode, generate, end_ids, rewards, weights, config, generator):
    """config.group_size completions of each example, judged: a list of Groups. Arguments as in `train`."""
    c, groups, prompts = config, [], [encode(example) for example in examples]
    ids, lengths, logprobs = generate(model, prompts, n=c.group_size, max_new_tokens=c.max_new_tokens,
                                      temperature=c.temperature, end_ids=end_ids, generator=generator)
    for i, (example, prompt) in enumerate(zip(examples, prompts)):
        rows = range(i * c.group_size, (i + 1) * c.group_size)
        own = lengths[rows.start:rows.stop].tolist()
        completions = [ids[row, :length] for row, length in zip(rows, own)]
        texts = [decode(completion.tolist()) for completion in completions]
        parts = {name: torch.tensor([float(rule(text, example)) for text in texts]) for name, rule in rewards.items()}
        total = sum(weights.get(name, 1.0) * scores for name, scores in parts.items())
        if c.length_buffer:
            total = total + length_penalty(torch.tensor(own), c.max_new_tokens, c.length_buffer)
        sampled = [logprobs[row, :length] for row, length in zip(rows, own)]
        groups.append(Group(example, list(prompt), completions, sampled, texts, parts, total))
    return groups


def collate(groups, end_ids):
    """A list of Groups as one Rollout."""
    completions = [completion for group in groups for completion in group.completions]
    device, G = completions[0].device, len(groups[0].completions)
    prompts = [torch.tensor(group.prompt, device=device) for group in groups for _ in range(G)]
    starts = torch.tensor([len(p) for p in prompts], device=device)
    lengths = torch.tensor([len(o) for o in completions], device=device)
    ids = pad_sequence([torch.cat(row) for row in zip(prompts, completions)], batch_first=True)  # (B, T+1)
    target = torch.arange(1, ids.shape[1], device=device)  # by length, not by value: any id may be real
    mask = (target >= starts[:, None]) & (target < (starts + lengths)[:, None])
    sampled_logprobs = torch.zeros(mask.shape, device=device)
    sampled_logprobs[mask] = torch.cat([logprobs for group in groups for logprobs in group.logprobs]).float()
    finished = torch.isin(torch.stack([o[-1] for o in completions]), torch.tensor(list(end_ids), device=device))
    parts = {name: torch.stack([group.parts[name] for group in groups]).to(device) for name in groups[0].parts}
    rewards = torch.stack([group.rewards for group in groups]).to(device)
    return Rollout([group.example for group in groups], [text for group in groups for text in group.texts], ids, mask,
                   (starts + lengths).tolist(), lengths, finished, sampled_logprobs, parts, rewards)


def has_signal(group):
    """Whether the rewards of a group differ: equal ones have no advantage. All rules count; DAPO looks at correctness."""
    return bool(group.rewards.max() - group.rewards.min() > 1e-6)


def rollout(draw, prompts, config, keep=None):
    """A rollout's groups, and how many were discarded. draw(examples) -> Groups; prompts: an iterator of examples.

    With keep(group) -> bool, groups that it refuses are replaced by those of the next prompts, in config.resample rounds
    at most [DAPO's dynamic sampling]; what is still refused then is left out. If all were, the first N stay.
    """
    N, drawn, kept = config.prompts_per_rollout, [], []
    for _ in range(1 + config.resample):
        new = draw([next(prompts) for _ in range(N - len(kept))])
        drawn, kept = drawn + new, kept + [group for group in new if keep is None or keep(group)]
        if len(kept) == N:
            break
    kept = kept or drawn[:N]
    return kept, len(drawn) - len(kept)


# ------------------------------------------------------------------------------------------- the loop

def cast_copy(model, dtype):
    """A copy to run, not to train: weights cast once, not at each use; buffers, such as rotary frequencies, stay as they are."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def micro_batches(rows, ends, budget):
    """Split row numbers, longest first, into lots of at most `budget` tokens, padding included; a longer row goes alone."""
    rows = sorted(rows, key=lambda r: -ends[r])
    while rows:
        count = max(1, budget // ends[rows[0]])
        yield rows[:count]
        rows = rows[count:]


def logprobs_of(model, r: Rollout, rows, config):
    """Log-probabilities (len(rows), t) of these rows' sampled tokens, 0 elsewhere, t cut to the longest row.

    A model with hidden(ids) -> (B, T, D), head(states) and config.vocab_size makes logits only where tokens were sampled, and
    a large vocabulary's in pieces that are made again in the backward pass: (B, T, V) is never there.
    """
    t = max(r.ends[row] for row in rows) - 1
    ids, mask = r.ids[rows, :t + 1], r.mask[rows, :t]
    chosen = mask.flatten().nonzero()[:, 0]
    states_of, head, size = model, lambda logits: logits, len(chosen)
    if hasattr(model, "hidden") and hasattr(model, "head"):
        states_of, head, size = model.hidden, model.head, LOGITS_AT_ONCE // model.config.vocab_size
    with torch.autocast(ids.device.type, dtype=getattr(torch, config.dtype), enabled=config.dtype != "float32"):
        states = states_of(ids[:, :-1]).flatten(0, 1).index_select(0, chosen)  # (n, D), or (n, V)
        score = lambda states, ids: token_logprobs(head(states), ids, config.temperature)
        pieces = list(zip(states.split(size), ids[:, 1:].flatten()[chosen].split(size)))
        scored = [score(*p) if len(pieces) == 1 else checkpoint(score, *p, use_reentrant=False) for p in pieces]
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, torch.cat(scored))


@torch.no_grad()
def all_logprobs(model, r: Rollout, config):
    """Log-probabilities (B, T) of the rollout's sampled tokens, 0 elsewhere: pi_old's, and the reference's."""
    out = torch.zeros(r.mask.shape, device=r.mask.device)
    for rows in micro_batches(range(len(r.ends)), r.ends, config.micro_batch_tokens):
        logprobs = logprobs_of(model, r, rows, config)
        out[rows, :logprobs.shape[1]] = logprobs
    return out


def update(model, optimizer, r: Rollout, rows, advantages, importance, config):
    """One Adam step on these rows of a rollout; its metrics."""
    c, sums = config, {}
    tokens = int(r.mask[rows].sum())  # of the whole update, before micro-batches
    normaliser = {"sequence": len(rows), "token": tokens, "constant": len(rows) * c.max_new_tokens}[c.mean]
    for lot in micro_batches(rows, r.ends, c.micro_batch_tokens):
        logprobs = logprobs_of(model, r, lot, c)

        def cut(x):
            return x if x is None else x[lot] if x.dim() == 1 else x[lot, :logprobs.shape[1]]

        loss, metrics = policy_loss(
            logprobs, cut(r.old_logprobs), cut(r.ref_logprobs) if c.beta else None, cut(advantages), cut(r.mask),
            clip_low=c.clip_low, clip_high=c.clip_high, sequence_ratio=c.sequence_ratio, detach_ratio=c.detach_ratio,
            mean=c.mean, beta=c.beta, kl=c.kl, importance=cut(importance), normaliser=normaliser)
        loss.backward()
        share = int(r.mask[lot].sum()) / tokens
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * share
        sums["loss"] = sums.get("loss", 0.0) + loss.item()
    sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip).item()
    sums["skipped"] = float(not math.isfinite(sums["loss"] + sums["grad_norm"]))  # Adam would keep a NaN for good
    if not sums["skipped"]:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums


class NotFinite(ValueError):
    """SKIPS updates in a row were skipped. `batch`: tensors of the last one, to be saved for a look."""

    def __init__(self, step, batch):
        super().__init__(f"rollout {step}: {SKIPS} updates in a row had a loss or gradient that is not finite")
        self.batch = batch


def train(model, examples, encode, decode, generate, end_ids, rewards, config: GRPOConfig, weights=None, credit=None,
          keep=None, validate=None, log=None, save=None, resume=None):
    """Reinforcement learning of `model` on `examples`, in place; they are taken in order, and again from the start.

    model(ids (B, T)) -> logits (B, T, V), causal: rows are padded on the right, without a mask; its weights should be fp32.
    encode(example) -> prompt ids; decode(ids) -> text.
    generate(model, prompts, n, max_new_tokens, temperature, end_ids, generator) -> completion ids (N*n, L), lengths
    (N*n,), and fp32 log-probabilities (N*n, L) of the sampled tokens under softmax(logits / temperature), no top-p or
    top-k, all on the model's device; a completion ends at its first token of end_ids, which counts; none is empty.
    rewards: {name: rule(completion, example) -> float}; weights: {name: float}, 1 by default; with weight 0 a
    rule is logged only.
    credit: an object in place of the group advantages (ppo.py, prime.py): advantages(rollout) -> (B,) or (B, T);
    learn(rollout, rows) -> metrics, after the policy's update on these rows; optionally objects, {a new name: module,
    optimizer or generator} to be saved with the run, and needs_reference, whether it reads rollout.ref_logprobs.
    keep(group) -> whether a group is learnt from; by default all, and with config.resample those with a signal.
    validate(model) -> metrics, every config.validate_every rollouts. log(metrics, rollout) after each rollout.
    save(**state) is called with the state after each rollout; resume(**objects) puts such a state back into the objects
    and returns the counters. Returns the last metrics.
    An update whose loss or gradient is not finite is skipped and counted; after SKIPS in a row NotFinite is raised.
    """
    c, weights = config, weights or {}
    if not examples or not rewards or weights.keys() - rewards.keys():
        raise ValueError(f"{len(examples)} examples, rewards {[*rewards]}, weights for {[*weights]}: there must be examples "
                         "and rewards, and weights of those rewards only")
    device, keep = next(model.parameters()).device, keep or (has_signal if c.resample else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=c.lr, betas=(0.9, 0.95), fused=True)  # betas: not published
    needs_reference = c.beta > 0 or getattr(credit, "needs_reference", False)
    reference = cast_copy(model, c.dtype).to("cpu" if c.offload_reference else device) if needs_reference else None
    generator = torch.Generator(device=device).manual_seed(c.seed)
    shuffler = torch.Generator().manual_seed(c.seed)
    # a state to save: objects, which `resume` fills in place, and counters, which it returns
    objects = dict(model=model, optimizer=optimizer, generator=generator, shuffler=shuffler,
                   **({"reference": reference} if needs_reference else {}), **getattr(credit, "objects", {}))
    names = ("step", "updates", "prompts", "samples", "skips")
    counters = dict.fromkeys(names, 0) if resume is None else resume(**objects)
    step, updates, taken, samples, skips, metrics = *(counters[name] for name in names), {}
    while step < c.rollouts and not (c.sample_budget and samples >= c.sample_budget):
        started = time.time()

        # 1, 2: sample groups from the current policy and judge them
        model.eval()  # for the updates too: with dropout the ratio would measure its noise
        sampler = cast_copy(model, c.dtype)
        groups, discarded = rollout(
            lambda batch: sample_groups(sampler, batch, encode, decode, generate, end_ids, rewards, weights, c, generator),
            (examples[i % len(examples)] for i in itertools.count(taken)), c, keep)
        del sampler
        r = collate(groups, end_ids)
        taken += len(groups) + discarded
        samples += (len(groups) + discarded) * c.group_size
        sampled = time.time()

        # 3: the log-probabilities that stay fixed during the updates, and advantages. pi_old's come from the forward pass that
        # trains: so the ratio starts at 1, up to rounding; with the sampler's, up to the sampler gap
        r.old_logprobs = r.sampled_logprobs if c.old_logprobs == "sampler" else all_logprobs(model, r, c)
        if needs_reference:
            r.ref_logprobs = all_logprobs(reference.to(device), r, c)
            reference.to("cpu" if c.offload_reference else device)
        advantages = (credit.advantages(r) if credit is not None else
                      group_advantages(r.rewards, c.scale_by_std, c.leave_one_out).flatten())
        gap = r.sampled_logprobs - r.old_logprobs  # sampler against the training forward pass: rounding
        importance = torch.exp(-gap).clamp(max=c.importance_cap) if c.importance_cap else None

        # 4: updates
        history = []
        for _ in range(c.inner_epochs):
            shuffled = torch.randperm(len(r.texts), generator=shuffler)
            for rows in shuffled.tensor_split(min(c.minibatches, len(shuffled))):
                updates += 1
                for parameters in optimizer.param_groups:
                    parameters["lr"] = c.lr * min(1.0, updates / max(1, c.warmup))
                history.append(update(model, optimizer, r, rows.tolist(), advantages, importance, c))
                skips = skips + 1 if history[-1]["skipped"] else 0
                if skips == SKIPS:
                    raise NotFinite(step + 1, {"ids": r.ids[rows], "mask": r.mask[rows], "advantages": advantages[rows],
                                               "old_logprobs": r.old_logprobs[rows]})
                if credit is not None and not skips:
                    history[-1] |= credit.learn(r, rows.tolist())
        step += 1

        # 5: the reference follows
        if reference is not None and step % c.reference_every == 0:
            reference.load_state_dict(model.state_dict())

        # what tells a healthy run from a sick one; of the groups that were kept
        spread = r.rewards.amax(1) - r.rewards.amin(1)
        metrics = {"step": step, "reward": r.rewards.mean().item(), "length": r.lengths.float().mean().item(),
                   "unfinished": 1 - r.finished.float().mean().item(), "group_std": r.rewards.std(1).mean().item(),
                   "no_signal": (spread <= 1e-6).float().mean().item(),  # share of groups whose rewards are all equal
                   "samples": samples, "discarded": discarded,  # completions so far; groups of this rollout
                   "entropy": -(r.old_logprobs.sum() / r.mask.sum()).item(),  # mean of -log p of the samples estimates it
                   # mean |log-probability by sampler - by trainer|, healthy below 0.01; of a rollout's first update, where
                   # pi_old is the sampler's: the weights have not moved yet
                   "sampler_gap": history[0]["drift"] if c.old_logprobs == "sampler" else (gap.abs().sum() / r.mask.sum()).item()}
        metrics |= {name: scores.mean().item() for name, scores in r.parts.items()}
        good = [h for h in history if not h["skipped"]] or history[:1]
        metrics |= {name: sum(h[name] for h in good) / len(good) for name in good[0]}
        metrics["skipped"] = sum(h["skipped"] for h in history)
        metrics |= {"seconds": time.time() - started, "sampling_seconds": sampled - started, "tokens": int(r.lengths.sum())}
        over = step == c.rollouts or 0 < c.sample_budget <= samples
        if validate is not None and (step % c.validate_every == 0 or over):
            metrics |= {f"validation_{name}": value for name, value in validate(model).items()}
        if log is not None:
            log(metrics, r)
        if save is not None:
            save(**objects, step=step, updates=updates, prompts=taken, samples=samples, skips=skips)
    return metrics


def main():
    import command  # here, so that the algorithm imports without the rest of the project
    command.reinforce("GRPO on a model directory, with the rules of rewards.py.", train, GRPOConfig)


if __name__ == "__main__":
    main()

"""Group Relative Policy Optimization: reinforcement learning from rule-based rewards, without a critic.

DeepSeekMath (arXiv 2402.03300) eq. 3-4 and algorithm 1, in the token-level form; the loop's schedule is R1's:
one rollout makes many groups, is split at random into mini-batches, and pi_old stays fixed meanwhile. One rollout:

  1. sample G completions of each prompt from the current policy, which is pi_old until the next rollout
  2. judge each by rules: reward = sum of weight * rule
  3. advantage of a completion = its reward minus its group's mean (divided by the group's std)
  4. for each mini-batch: ratio = pi / pi_old, clipped; plus beta times the KL to the reference; one Adam step
  5. every `reference_every` rollouts: the reference becomes the current policy

On-policy the policy term's *value* is about 0 (the advantages of a group sum to 0) while its gradient is not: watch the
reward, the KL (to the latest reference: a sawtooth), the clip fraction, the entropy and the gradient norm, not the loss.

A truncated completion keeps its reward and its gradient (the papers do not say): it has no end token and unclosed
tags, so the rules mostly score it low. The sampled end token is part of the action, so it has its gradient too.

    python grpo.py --model DIR --data FILE.jsonl --out DIR    # rows {"prompt", "answer", "language", "kind"}

Shapes: N prompts, G completions each, B = N*G rows (prompt-major), V vocabulary; ids are (B, T+1), and what predicts
them is (B, T): position t predicts ids[:, t+1].
"""

import argparse
import copy
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class GRPOConfig:
    rollouts: int = 60             # R1-Zero: 650, that is 10,400 updates of 512 completions
    prompts_per_rollout: int = 16  # R1: 512 questions a rollout
    group_size: int = 16           # G. R1: 16, DeepSeekMath: 64
    minibatches: int = 4           # updates a rollout. R1: 16
    inner_epochs: int = 1          # mu. R1: 1
    lr: float = 1e-4               # R1: 3e-6 at 671B
    warmup: int = 20               # updates; not published
    temperature: float = 1.0       # R1-Zero and R1's first RL stage: 1; its second: 0.7
    max_new_tokens: int = 160
    clip_low: float = 0.2          # ratio >= 1 - clip_low. R1: eps = 10, which is no lower clip
    clip_high: float = 0.2         # ratio <= 1 + clip_high. R1: 10; DAPO: 0.28
    beta: float = 0.001            # weight of the KL. R1: 0.001, DeepSeekMath: 0.04
    scale_by_std: bool = True      # Dr. GRPO: False
    token_mean: bool = False       # False: eq. 3's mean over each sequence first. DAPO: True
    reference_every: int = 20      # rollouts until the reference is replaced. R1: 25, that is 400 updates
    grad_clip: float = 1.0         # not published
    micro_batch_tokens: int = 2048   # tokens of one forward pass; changes memory and speed, not the result. GPU: more
    dtype: str = "bfloat16"        # of sampling and of the forward pass; weights, gradients and Adam stay fp32
    validate_every: int = 10       # rollouts; the script prints a sample then
    seed: int = 0

    def __post_init__(self):
        for name in ("rollouts", "prompts_per_rollout", "minibatches", "inner_epochs", "lr", "max_new_tokens",
                     "reference_every", "grad_clip", "micro_batch_tokens", "validate_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        for name in ("warmup", "clip_low", "clip_high", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is neither float32 nor bfloat16")
        if self.group_size < 2:
            raise ValueError(f"group_size {self.group_size}: the advantage compares completions, so it takes 2 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: greedy sampling explores nothing; RL needs one above 0")
        if self.prompts_per_rollout * self.group_size < self.minibatches:
            raise ValueError(f"minibatches {self.minibatches} exceed the {self.prompts_per_rollout * self.group_size} "
                             "completions of a rollout")


# ------------------------------------------------------------------------------------------- the algorithm

def group_advantages(rewards, scale_by_std=True):
    """Outcome supervision: (r - mean) / std within each group [DeepSeekMath 4.1.2]. rewards (N, G) -> (N, G).

    The paper gives neither the std's degrees of freedom nor an epsilon: here the sample std (G - 1), as TRL, and
    1e-4. A group of equal rewards has no signal: its advantages are 0.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return advantages


def token_logprobs(logits, ids, temperature=1.0):
    """Log-probability of each id under softmax(logits / temperature). logits (B, T, V), ids (B, T) -> (B, T).

    This is the sampling distribution: a rollout that cut the vocabulary (top-p, top-k) could not be scored by it.
    """
    return -F.cross_entropy((logits.float() / temperature).flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


def kl_divergence(logprobs, ref_logprobs):
    """The k3 estimator of KL(pi || pi_ref), per token, never negative. (B, T), (B, T) -> (B, T)   [DeepSeekMath eq. 4]

    The log-ratio is clamped above, at 10: exp overflows beyond 88, its squared gradient beyond 44, and 10 leaves room.
    A token that has become that unlikely gives no gradient; below, where the policy has grown, the pull is never cut.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(max=10)
    return torch.exp(log_ratio) - log_ratio - 1


def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.2, beta=0.001,
                token_mean=False, normaliser=None):
    """DeepSeekMath eq. 3, negated: -mean[min(ratio A, clip(ratio) A) - beta KL].

    logprobs, old_logprobs, ref_logprobs (or None), mask (B, T): log-probabilities of the sampled tokens under the
    policy, the policy that sampled, and the reference; mask is 1 on sampled tokens, the end token included.
    advantages (B,) or (B, T). token_mean: one mean over all tokens, instead of eq. 3's mean of each sequence first.
    normaliser: the whole update's number of sequences (tokens, with token_mean) where this is one micro-batch of
    several; by default this batch's own.
    Returns the scalar loss and metrics as means over this batch's tokens.
    """
    mask = mask.to(logprobs.dtype)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    log_ratio = torch.where(mask > 0, logprobs - old_logprobs, 0)  # padding may hold anything, even inf
    ratio = torch.exp(log_ratio.clamp(-20, 20))  # finite under any drift
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.min(ratio * advantages, clipped * advantages)  # (B, T); beyond the clip nothing is gained, for any A
    kl = torch.zeros_like(objective)
    if ref_logprobs is not None:
        kl = torch.where(mask > 0, kl_divergence(logprobs, ref_logprobs), 0)
    token_loss = torch.where(mask > 0, beta * kl - objective, 0)  # the KL stands in the loss, not in the reward
    lengths = mask.sum(1)
    if token_mean:
        loss = token_loss.sum() / (normaliser or lengths.sum().clamp(min=1))
    else:
        loss = (token_loss.sum(1) / lengths.clamp(min=1)).sum() / (normaliser or len(mask))
    with torch.no_grad():
        tokens = lengths.sum().clamp(min=1)
        clip_decides = clipped * advantages < ratio * advantages  # such a token has no policy gradient
        metrics = {"kl": (kl * mask).sum() / tokens, "clip_fraction": (clip_decides * mask).sum() / tokens,
                   "ratio": (ratio * mask).sum() / tokens}
    return loss, {name: value.item() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------- the loop

@dataclass
class Rollout:
    """Completions of one batch of prompts and what they earned; row i*G + j is completion j of prompt i."""
    examples: list             # N examples
    texts: list                # B completions, decoded
    ids: torch.Tensor          # (B, T+1) prompt + completion, right-padded
    mask: torch.Tensor         # (B, T) True where position t predicts a sampled token
    ends: list                 # B, where the row ends in ids: tokens of prompt + completion
    lengths: torch.Tensor      # (B,) tokens of the completion
    finished: torch.Tensor     # (B,) whether it ended by itself
    sampled_logprobs: torch.Tensor  # (B, T) the sampler's own, 0 elsewhere; to watch, never in the loss
    parts: dict                # rule -> (N, G) scores, unweighted
    rewards: torch.Tensor      # (N, G)


@torch.no_grad()
def rollout(model, examples, encode, decode, generate, end_ids, rewards, weights, config, generator):
    """Sample config.group_size completions of each example and judge them. Arguments as in `train`."""
    c, device = config, next(model.parameters()).device
    prompts = [encode(example) for example in examples]
    completions, lengths, logprobs = generate(model, prompts, n=c.group_size, max_new_tokens=c.max_new_tokens,
                                              temperature=c.temperature, end_ids=end_ids, generator=generator)
    last = completions.gather(1, lengths[:, None] - 1)[:, 0]
    finished = torch.isin(last, torch.tensor(list(end_ids), device=device))
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(c.group_size)  # (B,)
    ids = torch.zeros(len(lengths), int((prompt_lengths + lengths).max()), dtype=torch.long, device=device)
    sampled_logprobs = torch.zeros(ids[:, 1:].shape, device=device)
    texts = []
    for row, (length, start) in enumerate(zip(lengths.tolist(), prompt_lengths.tolist())):
        ids[row, :start] = torch.tensor(prompts[row // c.group_size], device=device)
        ids[row, start:start + length] = completions[row, :length]
        sampled_logprobs[row, start - 1:start - 1 + length] = logprobs[row, :length]
        texts.append(decode(completions[row, :length].tolist()))
    target = torch.arange(1, ids.shape[1], device=device)  # lengths make the mask: a token's value says nothing
    mask = (target >= prompt_lengths[:, None]) & (target < (prompt_lengths + lengths)[:, None])
    parts = {name: torch.tensor([rule(text, examples[row // c.group_size]) for row, text in enumerate(texts)],
                                dtype=torch.float32, device=device).view(-1, c.group_size) for name, rule in rewards.items()}
    total = sum(weights.get(name, 1.0) * scores for name, scores in parts.items())
    ends = (prompt_lengths + lengths).tolist()
    return Rollout(examples, texts, ids, mask, ends, lengths, finished, sampled_logprobs, parts, total)


def micro_batches(rows, ends, budget):
    """Split row numbers, longest first, into lots of at most `budget` tokens with their padding (a longer row alone)."""
    rows = sorted(rows, key=lambda r: -ends[r])
    while rows:
        count = max(1, budget // ends[rows[0]])
        yield rows[:count]
        rows = rows[count:]


def logprobs_of(model, r: Rollout, rows, config):
    """Log-probabilities (len(rows), t) of these rows' tokens, t cut to the longest row; meaningful where r.mask is True."""
    ids = r.ids[rows, :max(r.ends[row] for row in rows)]
    with torch.autocast(ids.device.type, dtype=getattr(torch, config.dtype), enabled=config.dtype != "float32"):
        logits = model(ids[:, :-1])
    return token_logprobs(logits, ids[:, 1:], config.temperature)


@torch.no_grad()
def all_logprobs(model, r: Rollout, config):
    """Log-probabilities (B, T) of the rollout's sampled tokens, 0 elsewhere: pi_old's, and the reference's."""
    out = torch.zeros(r.mask.shape, device=r.mask.device)
    for rows in micro_batches(range(len(r.ends)), r.ends, config.micro_batch_tokens):
        logprobs = logprobs_of(model, r, rows, config)
        out[rows, :logprobs.shape[1]] = logprobs
    return torch.where(r.mask, out, 0)


def update(model, optimizer, r: Rollout, rows, old_logprobs, ref_logprobs, advantages, config):
    """One Adam step on these rows of a rollout; its metrics."""
    c, sums = config, {}
    tokens = int(r.mask[rows].sum())
    normaliser = tokens if c.token_mean else len(rows)  # of the whole update, before micro-batches
    for lot in micro_batches(rows, r.ends, c.micro_batch_tokens):
        logprobs = logprobs_of(model, r, lot, c)
        t = logprobs.shape[1]
        loss, metrics = policy_loss(
            logprobs, old_logprobs[lot, :t], None if ref_logprobs is None else ref_logprobs[lot, :t],
            advantages[lot] if advantages.dim() == 1 else advantages[lot, :t], r.mask[lot, :t],
            clip_low=c.clip_low, clip_high=c.clip_high, beta=c.beta, token_mean=c.token_mean, normaliser=normaliser)
        loss.backward()
        share = int(r.mask[lot].sum()) / tokens
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * share
        sums["loss"] = sums.get("loss", 0.0) + loss.item()
    sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums


def train(model, examples, encode, decode, generate, end_ids, rewards, config: GRPOConfig, weights=None, credit=None,
          validate=None, log=None, save=None, resume=None):
    """Reinforcement learning of `model` on `examples`, in place; they are taken in order, and again from the start.

    model(ids (B, T)) -> logits (B, T, V). encode(example) -> prompt ids; decode(ids) -> text.
    generate(model, prompts, n, max_new_tokens, temperature, end_ids, generator) -> completion ids (N*n, L), lengths
    (N*n,), and log-probabilities (N*n, L) of the sampled tokens under softmax(logits / temperature), uncut; a completion
    ends at its first token of end_ids, which counts; prompts and completions hold a token at least. The model's weights
    should be fp32.
    rewards: {name: rule(completion, example) -> float}; weights: {name: float}, 1 by default; with weight 0 a
    rule is logged only. credit(rollout) -> advantages (B,) or (B, T) in place of the group advantages.
    validate(model) -> metrics, every config.validate_every rollouts. log(metrics, rollout) after each rollout.
    save(**state) is offered the state after each rollout; resume(**objects) puts such a state back into the objects
    and returns the rest of it.
    """
    c, weights = config, weights or {}
    if not examples or not rewards or weights.keys() - rewards.keys():
        raise ValueError(f"{len(examples)} examples, rewards {[*rewards]}, weights for {[*weights]}: there must be examples "
                         "and rewards, and weights of those rewards only")
    device = next(model.parameters()).device
    # plain Adam, as weight_decay is 0; the papers do not give the betas
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    reference = copy.deepcopy(model).eval().requires_grad_(False) if c.beta else None
    generator = torch.Generator(device=device).manual_seed(c.seed)
    shuffler = torch.Generator().manual_seed(c.seed)
    # a state to save: objects, which `resume` fills in place, and counters, which it returns
    objects = {"model": model, "optimizer": optimizer, "generator": generator, "shuffler": shuffler}
    objects |= {"reference": reference} if c.beta else {}
    counters = {"step": 0, "updates": 0} if resume is None else resume(**objects)
    step, updates, metrics = counters["step"], counters["updates"], {}  # step counts rollouts, updates Adam's steps
    while step < c.rollouts:
        started = time.time()
        first = step * c.prompts_per_rollout
        batch = [examples[i % len(examples)] for i in range(first, first + c.prompts_per_rollout)]

        # 1, 2: sample groups from the current policy and judge them
        model.eval()  # for the updates too: with dropout the ratio would measure its noise
        sampler = copy.deepcopy(model).to(getattr(torch, c.dtype))  # cast once, not at each token
        r = rollout(sampler, batch, encode, decode, generate, end_ids, rewards, weights, c, generator)
        del sampler
        sampled = time.time()

        # 3: advantages, and the log-probabilities that stay fixed during the updates; pi_old's by the forward pass that
        # trains, not the sampler's: so the ratio starts at exactly 1 and measures the updates alone
        advantages = group_advantages(r.rewards, c.scale_by_std).flatten() if credit is None else credit(r)
        old_logprobs = all_logprobs(model, r, c)
        ref_logprobs = all_logprobs(reference, r, c) if c.beta else None

        # 4: updates
        history = []
        for _ in range(c.inner_epochs):
            shuffled = torch.randperm(len(r.texts), generator=shuffler)
            for rows in shuffled.tensor_split(c.minibatches):
                updates += 1
                for group in optimizer.param_groups:
                    group["lr"] = c.lr * min(1.0, updates / max(1, c.warmup))
                history.append(update(model, optimizer, r, rows.tolist(), old_logprobs, ref_logprobs, advantages, c))
        step += 1

        # 5: the reference follows
        if reference is not None and step % c.reference_every == 0:
            reference.load_state_dict(model.state_dict())

        # what tells a healthy run from a sick one
        gap = (r.sampled_logprobs - old_logprobs).abs().sum() / r.mask.sum()
        group_std = r.rewards.std(1)
        metrics = {"step": step, "reward": r.rewards.mean().item(), "length": r.lengths.float().mean().item(),
                   "unfinished": 1 - r.finished.float().mean().item(),
                   "group_std": group_std.mean().item(),
                   "no_signal": (group_std < 1e-6).float().mean().item(),  # share of groups whose rewards are all equal
                   "entropy": -(old_logprobs.sum() / r.mask.sum()).item(),  # mean of -log p of the samples estimates it
                   "sampler_gap": gap.item()}  # bf16's rounding: below 0.01; more means two different distributions
        metrics |= {name: scores.mean().item() for name, scores in r.parts.items()}
        metrics |= {name: sum(h[name] for h in history) / len(history) for name in history[0]}
        metrics |= {"seconds": time.time() - started, "sampling_seconds": sampled - started,
                    "tokens": int(r.lengths.sum())}
        if validate is not None and (step % c.validate_every == 0 or step == c.rollouts):
            metrics |= {f"validation_{name}": value for name, value in validate(model).items()}
        if log is not None:
            log(metrics, r)
        if save is not None:
            save(**objects, step=step, updates=updates)
    return metrics


def main():
    import rewards  # here, so that the algorithm imports without the rest of the project
    from data.readers import new_directory, read_problems
    from model import generate, load, save
    from tokenizer import Tokenizer
    parser = argparse.ArgumentParser(description="GRPO on a model directory, with the rules of rewards.py.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--data", required=True, help='JSONL, rows {"prompt", "answer", "language", "kind"}')
    parser.add_argument("--out", required=True, help="where the trained model goes")
    parser.add_argument("--rewards", nargs="+", default=["accuracy", "format"], choices=rewards.REWARDS,
                        help="default: %(default)s")
    for name, default in vars(GRPOConfig()).items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help="default %(default)s", **kind)
    args = parser.parse_args()
    try:
        config = GRPOConfig(**{name: value for name, value in vars(args).items() if name in GRPOConfig.__dataclass_fields__})
        examples = read_problems(args.data, rewards.check_reference)
        model, tokenizer = load(args.model), Tokenizer(args.model)
        tokenizer.check_fits(model.config.vocab_size)
        out = new_directory(args.out)

        def log(m, r):
            print(f"rollout {m['step']}/{config.rollouts}  reward {m['reward']:.3f}  length {m['length']:.0f}  "
                  f"kl {m['kl']:.4f}  clipped {m['clip_fraction']:.3f}  entropy {m['entropy']:.2f}  grad norm {m['grad_norm']:.2f}")
            if (m["step"] - 1) % config.validate_every == 0:  # a sample to read
                print(f"  {r.examples[0]['prompt']!r}\n  {r.texts[0]!r}: {r.rewards[0, 0].item():.2f}")

        train(model, examples, lambda example: tokenizer.encode_prompt(example["prompt"]), tokenizer.decode, generate,
              [tokenizer.end_id], {name: rewards.REWARDS[name] for name in args.rewards}, config, log=log)
        save(model, out, tokenizer)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()

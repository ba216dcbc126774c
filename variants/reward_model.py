"""Reward models, for R1's second RL stage: a policy with a scalar head, trained on preferences [R1 v1 2.3.4; v2 3.1].

helpful  pairwise: of two answers to a prompt the better one scores higher [Bradley-Terry]; reads the final summary
safe     point-wise: a response is safe or it is not; reads all of it, the thinking included

Rules stay for what can be checked, since a trained judge can be deceived. In grpo.train a Judge is passed as
select, and scores a rollout's outputs in batches:

    python -m variants.reward_model --model DIR --data FILE --out DIR     # rows: data/preferences.py
    grpo.train(..., select=Judge([Term("helpful", model, encode)]).select)

Shapes: B rows of right-padded ids, T positions, D hidden size; N prompts, G outputs of each.
"""

import math
import random
import time
from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class RewardConfig:
    lr: float = 3e-4             # R1: 6e-6
    epochs: int = 1              # R1: 1
    batch_rows: int = 64         # pairs, or labelled responses, of one update. R1: 256
    warmup: float = 0.05         # share of the steps in which lr rises
    micro_batch_rows: int = 16   # of one forward pass; changes memory and speed, not the result
    grad_clip: float = 1.0
    dtype: str = "bfloat16"      # of the forward pass
    seed: int = 0


class RewardModel(nn.Module):
    """A transformer with hidden(ids) -> (B, T, D), and one number read from the state of each row's last token."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        self.score = nn.Linear(transformer.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, ids, ends):
        """ids (B, T), ends (B,) row lengths -> scores (B,): log-odds if point-wise; if pairwise, a difference of two is
        the log-odds."""
        states = self.transformer.hidden(ids)                                  # (B, T, D)
        last = states[torch.arange(len(ids), device=ids.device), ends - 1]     # (B, D)
        with torch.autocast(ids.device.type, enabled=False):  # in half precision near scores would be equal
            return F.linear(last.float(), self.score.weight.float())[:, 0]


def pairwise_loss(chosen, rejected):
    """-log sigmoid(r_chosen - r_rejected), the mean over pairs [R1 v2 3.1, Bradley-Terry]. (pairs,) twice -> scalar"""
    return -F.logsigmoid(chosen - rejected).mean()


def pointwise_loss(scores, is_safe):
    """-log of the probability of each label, the mean over responses. (B,), (B,) of 0 and 1 -> scalar"""
    return F.binary_cross_entropy_with_logits(scores, is_safe)


def scores_of(model, rows, dtype):
    """Scores (B,) of rows, lists of ids."""
    if not all(rows):
        raise ValueError("a row without a token has no score")
    device = model.score.weight.device
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    ends = torch.tensor([len(row) for row in rows], device=device)
    with torch.autocast(device.type, getattr(torch, dtype), dtype != "float32", cache_enabled=False):
        return model(ids, ends)


@torch.no_grad()
def score(model, rows, dtype, batch_tokens=16384):
    """Scores (len(rows),), on the CPU. A batch has at most batch_tokens, padding included; a longer row goes alone."""
    scores = torch.empty(len(rows))
    left = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # the longest first
    while left:
        count = max(1, batch_tokens // (len(rows[left[0]]) or 1))
        batch, left = left[:count], left[count:]
        scores[batch] = scores_of(model, [rows[i] for i in batch], dtype).cpu()
    return scores


def loss_of(model, rows, dtype):
    """The loss of rows (chosen ids, rejected ids) or (ids, label), and how many are right: the chosen one scores
    higher, or the score is above 0 just where the label is 1."""
    first, second = zip(*rows)
    if isinstance(second[0], (int, float)):
        scores = scores_of(model, first, dtype)
        labels = torch.tensor(second, dtype=torch.float32, device=scores.device)
        return pointwise_loss(scores, labels), ((scores > 0) == (labels > 0.5)).sum().item()
    chosen, rejected = scores_of(model, first + second, dtype).chunk(2)
    return pairwise_loss(chosen, rejected), (chosen > rejected).sum().item()


def train(model, rows, config: RewardConfig, log=None, save=None, resume=None):
    """Trains a RewardModel in place on pairs (chosen ids, rejected ids) or on (ids, 1 or 0); returns the last metrics.

    log(metrics) comes after each step, save(model=..., optimizer=..., step=...) too; resume(model=..., optimizer=...)
    puts such a state back and returns {"step": ...}. A step whose gradient is not finite is skipped.
    """
    c, metrics, step = config, {}, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps_an_epoch = math.ceil(len(rows) / c.batch_rows)
    steps = c.epochs * steps_an_epoch
    if resume is not None:
        step = resume(model=model, optimizer=optimizer)["step"]
    model.train()
    while step < steps:
        started = time.time()
        epoch, number = divmod(step, steps_an_epoch)
        order = list(range(len(rows)))
        random.Random(f"{c.seed} {epoch}").shuffle(order)
        batch = [rows[i] for i in order[number * c.batch_rows:(number + 1) * c.batch_rows]]
        total, right = 0.0, 0
        for i in range(0, len(batch), c.micro_batch_rows):
            part = batch[i:i + c.micro_batch_rows]
            loss, correct = loss_of(model, part, c.dtype)
            (loss * len(part) / len(batch)).backward()
            total, right = total + loss.item() * len(part) / len(batch), right + correct
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip).item()
        optimizer.param_groups[0]["lr"] = c.lr * min(1.0, (step + 1) / max(1, c.warmup * steps))
        is_finite = math.isfinite(total + grad_norm)
        if is_finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        metrics = {"step": step, "steps": steps, "loss": total, "accuracy": right / len(batch), "grad_norm": grad_norm,
                   "skipped": float(not is_finite), "seconds": time.time() - started}
        if log is not None:
            log(metrics)
        if save is not None:
            save(model=model, optimizer=optimizer, step=step)
    model.eval()
    return metrics


# ------------------------------------------------------------------------------------------- in reinforcement learning

@dataclass
class Term:
    """One model's part of the reward: weight * score, where it applies; 0 elsewhere. A pairwise model's score counts as
    it is, since differences of scores are log-odds; a point-wise one's as a probability."""
    name: str
    model: RewardModel
    encode: Callable    # (example, completion) -> the ids that the model reads: of the summary, or of all
    is_probability: bool = False  # reward: sigmoid(score)
    weight: float = 1.0
    applies: Callable = lambda example: True  # whether it judges the outputs for this prompt


def draw_once(draw, prompts, count):
    """(a Rollout, how many prompts were left out)"""
    return draw([next(prompts) for _ in range(count)]), 0


class Judge:
    """For grpo.train: select=Judge(...).select. inner: another select, as DAPO's, which sees the judged rewards."""

    def __init__(self, terms, dtype="bfloat16", inner=draw_once):
        self.terms, self.dtype, self.inner = terms, dtype, inner

    def select(self, draw, prompts, count):
        return self.inner(lambda examples: self.judge(draw(examples)), prompts, count)

    def judge(self, r):
        """The rollout with each model's scores in its parts, and weighted in its rewards."""
        G = r.rewards.shape[1]
        for term in self.terms:
            applies = [i for i, _ in enumerate(r.texts) if term.applies(r.examples[i // G])]
            if dist.is_initialized():  # torchrun's processes share the outputs out
                applies = applies[dist.get_rank()::dist.get_world_size()]
            judged = score(term.model, [term.encode(r.examples[i // G], r.texts[i]) for i in applies], self.dtype)
            scores = torch.zeros(len(r.texts), device=r.rewards.device)  # where NCCL can sum them
            scores[applies] = (judged.sigmoid() if term.is_probability else judged).to(scores.device)
            if dist.is_initialized():
                dist.all_reduce(scores)
            r.parts[term.name] = scores.view(-1, G)
            r.rewards = r.rewards + term.weight * r.parts[term.name]
        return r


def main():
    from lab.reward_script import run  # here, so that the rest imports without the project
    run(RewardConfig, RewardModel, train, score)


if __name__ == "__main__":
    main()

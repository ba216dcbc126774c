"""Dynamic sampling and the soft length penalty of DAPO.

DAPO (arXiv 2503.14476) 3.2: a group whose completions all earn the same has no advantage, so other prompts are drawn in
its place. PRIME's prompt filter is this with another condition. 3.4: a completion near the length limit loses up to 1.
DAPO's other two changes, clip-higher and the mean over tokens, are settings (variants/configs.py).

    grpo.train(..., select=DAPO(DAPOConfig(resample=3), max_new_tokens=160).select)
    python grpo.py --config dapo --length-buffer 32 ...

Shapes: N prompts (groups), G completions each, B = N*G rows (prompt-major), T positions, as in grpo.Rollout.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class DAPOConfig:
    resample: int = 0       # replace the groups that are refused, in at most this many extra rounds; DAPO: until full
    length_buffer: int = 0  # the penalty acts over this many last tokens. DAPO: 4,096 of 20,480

    def __post_init__(self):
        for name in ("resample", "length_buffer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")


def length_penalty(lengths, max_length, buffer):
    """0 up to max_length - buffer tokens, then linearly down to -1 at max_length [DAPO eq. 13]. (B,) -> (B,)"""
    return -((lengths - (max_length - buffer)) / buffer).clamp(0, 1)


def has_signal(r):
    """(N,) whether a group's rewards differ, the length penalty included. DAPO compares correctness alone."""
    return r.rewards.amax(1) - r.rewards.amin(1) > 1e-6


class DAPO:
    """For grpo.train: select=DAPO(...).select.

    keep(rollout) -> (N,) bool, which groups to learn from; by default all, and with resample those with a signal.
    """

    def __init__(self, config, max_new_tokens, keep=None):
        self.config, self.max_new_tokens, self.keep = config, max_new_tokens, keep
        if keep is None and config.resample:
            self.keep = has_signal

    def select(self, draw, prompts, count):
        """(rollout, how many prompts were left out): `count` groups, fewer where the rounds did not suffice.

        Where every group was refused, the first that were drawn stay.
        """
        drawn, kept = [], []  # (rollout, number of the group in it)
        for _ in range(1 + self.config.resample):
            r = self.judged(draw([next(prompts) for _ in range(count - len(kept))]))
            groups = [(r, i) for i in range(len(r.examples))]
            drawn += groups
            if self.keep is None:
                kept += groups
            else:
                kept += [group for group, is_kept in zip(groups, self.keep(r)) if is_kept]
            if len(kept) == count:
                break
        kept = kept or drawn[:count]
        return together(kept), len(drawn) - len(kept)

    def judged(self, r):
        """The rollout with the length penalty in its rewards."""
        if self.config.length_buffer:
            penalty = length_penalty(r.lengths, self.max_new_tokens, self.config.length_buffer)
            r.rewards = r.rewards + penalty.view(r.rewards.shape)
        return r


def together(groups):
    """One Rollout of these (rollout, number of the group in it)."""
    rows = []  # (rollout, row), G a group
    for r, i in groups:
        G = r.rewards.shape[1]
        rows += [(r, i * G + j) for j in range(G)]

    def rows_of(name, shorter=0):  # (B, T+1 - shorter)
        return pad_sequence([getattr(r, name)[row, :r.ends[row] - shorter] for r, row in rows], batch_first=True)

    first = groups[0][0]
    return replace(
        first, examples=[r.examples[i] for r, i in groups], texts=[r.texts[row] for r, row in rows],
        ids=rows_of("ids"), mask=rows_of("mask", 1), sampled_logprobs=rows_of("sampled_logprobs", 1),
        ends=[r.ends[row] for r, row in rows], lengths=torch.stack([r.lengths[row] for r, row in rows]),
        finished=torch.stack([r.finished[row] for r, row in rows]),
        parts={name: torch.stack([r.parts[name][i] for r, i in groups]) for name in first.parts},
        rewards=torch.stack([r.rewards[i] for r, i in groups]))

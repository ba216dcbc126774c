"""What grpo.py computes of a long prompt, once for all of its completions: for a CPU, where the tokens decide the time.

The rows of a group repeat their prompt. Its states do not depend on what follows, and a completion needs only its keys
and values: an update reads each prompt once, then each micro-batch reads its completions after them. Values and
gradients are those of whole rows, up to rounding. But attention then needs a mask, and each pass is shorter: where less
than a third of the tokens is spared, whole rows are as fast.

    prompts = model.read_prompts(rollout, rows, config)   # of a model that lab/layers.py has given its fast layers
    prompts.hidden(rollout, some_of_the_rows)             # any number of times, each followed by its backward pass
    prompts.backward()                                    # then that of the prompts

Shapes: P prompts, L the longest prompt less its last token, which a completion's first token is predicted from;
B rows, T tokens of the longest completion, D hidden size, K key/value heads, d head size.
"""

import torch

from model import Transformer


class SharingTransformer(Transformer):
    def read_prompts(self, rollout, rows, config):
        """The ReadPrompts of these rows of a grpo.Rollout.

        None where less than a third of the tokens would be spared, or the prompts are more than a micro-batch; and of
        several processes, some of which might have no rows.
        """
        if torch.distributed.is_initialized():
            return None
        group = rollout.rewards.shape[1]
        prompts = sorted({row // group for row in rows})
        firsts = [prompt * group for prompt in prompts]  # a row of each
        # without the last token; not by the mask, from which a cut completion may be left out
        lengths = torch.tensor(rollout.ends) - rollout.lengths.cpu() - 1  # (all rows,)
        lengths, of_rows = lengths[firsts], int(lengths[rows].sum())      # (P,)
        tokens, whole = len(prompts) * int(lengths.max()), sum(rollout.ends[row] for row in rows)
        if tokens > config.micro_batch_tokens or of_rows - tokens < whole / 3:
            return None
        dtype = getattr(torch, config.dtype)
        with torch.autocast(rollout.ids.device.type, dtype, dtype != torch.float32, cache_enabled=False):
            return ReadPrompts(self, prompts, rollout.ids[firsts], lengths.to(rollout.ids.device))


class ReadPrompts:
    """Keys and values of prompts, numbered, whose ids (P, L or more) are as many as lengths (P,) says."""

    def __init__(self, model, prompts, ids, lengths):
        self.model, self.place = model, {prompt: i for i, prompt in enumerate(prompts)}
        self.length = int(lengths.max())  # L
        self.start = self.length - lengths  # left-padded, so that all end together
        columns = torch.arange(self.length, device=ids.device) - self.start[:, None]
        cache = PromptCache(self.start)
        model.hidden(ids.gather(1, columns.clamp(min=0)), cache=cache)
        self.made = cache.made
        # the gradients of several rows and micro-batches are added up here, in float32
        wide = torch.promote_types(self.made[0].dtype, torch.float32)
        self.leaves = [t.detach().to(wide).requires_grad_(t.requires_grad) for t in self.made]

    def hidden(self, rollout, rows):
        """The states (n, D) at the n positions of these rows that predict a sampled token, in the order of the mask."""
        mask = rollout.mask[rows]
        start, lengths = mask.int().argmax(1), mask.sum(1)    # (B,) where the prompt's last token is; (B,)
        columns = torch.arange(max(1, int(lengths.max())), device=mask.device)  # 1: where all of them were cut
        ids = rollout.ids[rows].gather(1, (start[:, None] + columns).clamp(max=mask.shape[1]))  # (B, T)
        group = rollout.rewards.shape[1]
        of_rows = torch.tensor([self.place[row // group] for row in rows], device=mask.device)
        past = [leaf[of_rows].to(t.dtype) for leaf, t in zip(self.leaves, self.made)]
        states = self.model.hidden(ids, cache=PromptCache(self.start[of_rows], past, self.length))  # (B, T, D)
        return states[columns < lengths[:, None]]

    def backward(self):
        """Hands the gradients that the keys and values have gathered on to the weights."""
        torch.autograd.backward(self.made, [leaf.grad.to(t.dtype) for leaf, t in zip(self.leaves, self.made)])


class PromptCache:
    """model.py's KVCache as far as `hidden` asks for it, with gradients: keys and values are joined, not written.

    start (P,) or (B,): each row's first real column. past: [k, v, k, v, ...] of the layers, each (B, K, L, d), that the
    tokens see before them; without it, what the layers make is kept in `made`.
    """

    def __init__(self, start, past=None, length=0):
        self.start, self.past, self.length, self.made = start, past, length, []
        self.padding = int(start.max())  # of the shortest prompt: its completion may be the longest

    def reserve(self, columns):
        return self.length + columns

    def columns(self, count):
        return torch.arange(self.length, self.length + count, device=self.start.device)

    def update(self, layer, k, v):
        if self.past is None:
            self.made[2 * layer:2 * layer + 2] = k, v  # at the same place when the layer is computed a second time
            return k, v
        return torch.cat((self.past[2 * layer], k), dim=2), torch.cat((self.past[2 * layer + 1], v), dim=2)

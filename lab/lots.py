"""Sampling in lots: how much memory the cache of a rollout takes is decided by a budget, not by its rows."""

import torch


def in_lots(generate, tokens):
    """A generate that samples at most so many tokens at once, prompts and answers; a prompt's n answers stay together,
    and may be more alone."""
    def sample(model, prompts, n=1, max_new_tokens=128, **settings):
        lots = [[]]
        for prompt in prompts:
            longest = max(map(len, [*lots[-1], prompt]))
            if lots[-1] and (len(lots[-1]) + 1) * n * (longest + max_new_tokens) > tokens:
                lots.append([])
            lots[-1].append(prompt)
        results = [generate(model, lot, n=n, max_new_tokens=max_new_tokens, **settings) for lot in lots]
        return tuple(torch.cat(parts) for parts in zip(*results))

    return sample

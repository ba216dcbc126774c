"""A mixture of experts in reinforcement learning: does the trainer send a token to the experts that the sampler chose?

Both have the same weights and biases, but round differently: the sampler computes in half precision, token by token,
the trainer whole rows. Where two affinities are close, another expert is chosen, and the ratio of probabilities moves.
DeepSeek-V3.2 keeps the sampler's choice in training; here the share is a metric.
"""

import torch

from grpo import cast_copy

ROWS = 16  # of a rollout


@torch.no_grad()
def share_rerouted(model, rollout, dtype):
    """The share of choices, of each completion token in each layer with experts, that are not the same K experts."""
    rows = torch.arange(len(rollout.ids), device=rollout.ids.device)[::max(1, len(rollout.ids) // ROWS)]
    ids, mask = rollout.ids[rows, :-1], rollout.mask[rows]  # (n, T) each
    longest = int(mask.nonzero()[:, 1].max()) + 1
    ids, mask = ids[:, :longest], mask[:, :longest]
    with torch.autocast(ids.device.type, getattr(torch, dtype), dtype != "float32"):
        trained = choices(model, ids)
    sampler, steps = cast_copy(model, dtype), []
    cache = sampler.new_cache(torch.zeros(len(ids), dtype=torch.long, device=ids.device))
    for t in range(longest):
        steps.append(choices(sampler, ids[:, t:t + 1], cache))
    differs = (trained != torch.cat(steps, dim=1)).any(-1)  # (n, T, layers)
    return differs[mask].float().mean().item()


def choices(model, ids, cache=None):
    """The numbers of each token's experts, in ascending order: (n, T, layers, K)."""
    x = model.embed(ids)
    _, routings = model.states(x, model.layout(x, cache=cache), cache)
    return torch.stack([chosen.sort().values.view(*ids.shape, -1) for _, chosen in routings], dim=2)

"""A model whose weights, gradients and moments several processes share out: FSDP2, for what does not fit one GPU.

A layer is whole while it computes. Sampling like that would gather each layer for each token: instead a whole copy in
half precision samples, gathered once a rollout, as the reference is. A GPU therefore holds 2 bytes a parameter for each
of these, and of the 16 that training takes its part.
"""

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lab.checkpoint import whole


def shard(model):
    """Shards model.py's Transformer, in place, layer by layer. Returns it.

    Raises ValueError where this FSDP does not sum the gradients of the processes.
    """
    empty = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    outline = copy.deepcopy(model, empty)  # deepcopy takes what it is given as copied
    bases = {name for name, p in model.named_parameters() if hasattr(p, "is_base")}  # LoRA's
    for module in (*model.layers, model):
        sum_gradients(fully_shard(module))
    for name in ("hidden", "head"):
        register_fsdp_forward_method(model, name)
    for name, p in model.named_parameters():
        if name in bases:
            p.is_base = True
    model.whole_copy = lambda dtype: gathered(model, outline, lambda p: p.full_tensor().to(dtype))
    model.whole = lambda: gathered(model, outline, whole)
    check_sum(next(model.parameters()).device)
    return model


@torch.no_grad()
def gathered(model, outline, gather):
    """A whole copy of a sharded model, frozen; one parameter after the other is gathered."""
    parts = zip(model.parameters(), outline.parameters())
    made = {id(empty): torch.nn.Parameter(gather(p), requires_grad=False) for p, empty in parts}
    return copy.deepcopy(outline, made).eval()


def sum_gradients(module):
    """FSDP's default is the mean over the processes; as a factor of 1, gloo cannot take it."""
    set_factor = getattr(module, "set_gradient_divide_factor", None) or module.set_reduce_scatter_divide_factor
    set_factor(1.0)
    if hasattr(module, "set_force_sum_reduction_for_comms"):
        module.set_force_sum_reduction_for_comms(True)


def check_sum(device):
    """Versions of torch and its backends differ in what they reduce to (pytorch#162338): a known gradient is tried."""
    probe = torch.nn.Linear(4, 4, bias=False, device=device)
    sum_gradients(fully_shard(probe))
    probe(torch.full((1, 4), dist.get_rank() + 1.0, device=device)).sum().backward()
    found, n = probe.weight.grad.full_tensor(), dist.get_world_size()
    if not torch.equal(found, torch.full_like(found, n * (n + 1) / 2)):
        raise ValueError(f"shard: FSDP of torch {torch.__version__} makes {found[0, 0]} of the sum of 1 to {n}")


def shard_estimator(estimator):
    """Shards what a PPO or PRIME trains beside the policy, and hands its optimizer the new parameters."""
    for name, part in estimator.objects.items():
        if isinstance(part, torch.nn.Module):
            before = {id(p): name for name, p in part.named_parameters()}
            shard(getattr(part, "trunk", part))
            if hasattr(part, "trunk"):  # a critic
                sum_gradients(fully_shard(part.head))
            after = dict(part.named_parameters())
            places = [group["params"] for group in estimator.optimizer.param_groups] + [estimator.trained]
            for parameters in places:
                parameters[:] = [after[before[id(p)]] if id(p) in before else p for p in parameters]

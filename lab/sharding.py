"""A model whose weights, gradients and moments several processes share out (FSDP2), where a GPU cannot hold them all.

A layer is whole while it computes: each pass, forward and backward, gathers it, and all processes make the same number
of passes. To sample like this would gather each layer for each token; instead a whole copy in half precision samples,
gathered once a rollout. A GPU holds, a parameter: 16 / N bytes of training on N GPUs, 2 of that copy while it samples,
and 2 of the reference, which is whole as well.
"""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lab.checkpoint import whole


def shard(model):
    """Shards model.py's Transformer layer by layer, in place, before it gets an optimizer. Returns it.

    It gets whole_copy(dtype) -> a frozen model, and whole() -> one in the first process's memory, for all to call.
    Raises ValueError where this FSDP does not sum the gradients of the processes.
    """
    empty = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, empty)  # the memo: these stand where deepcopy would copy
    mesh = mesh_of(model)
    for module in (*model.layers, model):
        sum_gradients(fully_shard(module, mesh=mesh))
    # Called directly, not through forward: FSDP must gather there too. What `head` needs is then still there; it is no
    # such method itself, since each process calls it as often as its own targets ask for.
    register_fsdp_forward_method(model, "hidden")
    model.whole_copy = lambda dtype: gathered(model, skeleton, lambda p: p.to(dtype).full_tensor())
    model.whole = lambda: gathered(model, skeleton, whole)
    check_sum(mesh)
    return model


def mesh_of(model):
    return init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))


@torch.no_grad()
def gathered(model, skeleton, full):
    """A whole, frozen copy of a sharded model; full(p) gathers one parameter after the other."""
    pairs = zip(skeleton.parameters(), model.parameters(), strict=True)
    made = {id(empty): torch.nn.Parameter(full(p), requires_grad=False) for empty, p in pairs}
    return copy.deepcopy(skeleton, made).eval()


def sum_gradients(module):
    """In this module, not in those within. FSDP takes the mean; a factor of 1 alone asks gloo for what it lacks."""
    set_factor = getattr(module, "set_gradient_divide_factor", None) or module.set_reduce_scatter_divide_factor
    set_factor(1.0)
    if hasattr(module, "set_force_sum_reduction_for_comms"):
        module.set_force_sum_reduction_for_comms(True)


def check_sum(mesh):
    """Versions of torch and its backends differ in what they reduce to (pytorch#162338): a known gradient is tried."""
    probe = torch.nn.Linear(4, 4, bias=False, device=mesh.device_type)
    sum_gradients(fully_shard(probe, mesh=mesh))
    probe(torch.full((1, 4), dist.get_rank() + 1.0, device=mesh.device_type)).sum().backward()
    found, n = probe.weight.grad.full_tensor(), dist.get_world_size()
    if not torch.equal(found, torch.full_like(found, n * (n + 1) / 2)):
        raise ValueError(f"shard: FSDP of torch {torch.__version__} makes {found[0, 0].item()} of the sum of 1 to {n}")


def shard_estimator(estimator):
    """Shards PPO's critic or PRIME's models, and hands their optimizer, before its first step, the new parameters."""
    for part in estimator.objects.values():
        if isinstance(part, torch.nn.Module):
            before = {id(p): name for name, p in part.named_parameters()}
            shard(getattr(part, "trunk", part))
            if hasattr(part, "trunk"):  # a critic's: its head is a module
                sum_gradients(fully_shard(part.head, mesh=mesh_of(part)))
            after = dict(part.named_parameters())
            lists = [group["params"] for group in estimator.optimizer.param_groups] + [estimator.trained]
            for parameters in lists:
                parameters[:] = [after[before[id(p)]] if id(p) in before else p for p in parameters]

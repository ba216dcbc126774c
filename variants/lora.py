"""LoRA: low-rank adapters are trained in place of a model's matrices, which stay frozen.

LoRA (arXiv 2106.09685) section 4.1: a matrix W (out, in) becomes W + (alpha / r) B A, with A (r, in) random and B
(out, r) zero at first, so that training starts from the model as it was. All matrices of the layers get one, and the
learning rate is about ten times that of full training ["LoRA Without Regret", Schulman et al. 2025].

    add_adapters(model, rank=32)     # in place; then train as before:
    Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    merge(model)                     # after training: a plain model again, with W + (alpha / r) B A in place of W

A and B are float32; W may be bfloat16 or float16, since training only reads it. `merge` rounds to W's precision: in
half precision a small B A is lost, so merge into float32 weights. Memory: 16 bytes for each number in A and B (weights,
gradients, Adam's moments), and for W what its precision takes. To save: what has "lora_" in its name in state_dict(),
and alpha.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Linear):
    """y = x W' + bias + (alpha / r) x A' B'. An nn.Linear becomes one in place: its weights keep their names."""

    def forward(self, x):
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return super().forward(x) + F.linear(self.scale * F.linear(x, A), B)

    @torch.no_grad()
    def delta(self):
        """(alpha / r) B A, (out, in) in float32."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())


def add_adapters(model, rank, alpha=32.0, leave_out=("lm_head",), generator=None):
    """Freezes the model and gives each nn.Linear, and no other layer, an adapter, in place. Returns the model.

    leave_out: last parts of names. A is uniform within 1 / sqrt(in) of 0, as PEFT draws it, by a generator of the CPU;
    alpha 32 as in "LoRA Without Regret", where the best learning rate then hardly depends on the rank.
    """
    if adapters(model):
        raise ValueError("the model has adapters already")
    for p in model.parameters():
        p.requires_grad_(False)
        p.is_base = True  # for whoever copies or saves the model: training does not change it, so that it may be shared
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name.split(".")[-1] in leave_out:
            continue
        device = linear.weight.device
        bound = 1 / math.sqrt(linear.in_features)
        A = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        linear.__class__ = LoRALinear
        linear.scale = alpha / rank
        linear.lora_A = nn.Parameter(A.to(device))
        linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
    return model


def adapters(model):
    """{name: LoRALinear} of a model's matrices that have an adapter."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


@torch.no_grad()
def merge(model):
    """Adds each adapter to its matrix, summed in float32, and removes it. Returns the model.

    W is written in place, so whatever shares it changes too: a reference, PPO's critic, PRIME's models.
    """
    for part in adapters(model).values():
        part.weight.copy_(part.weight.float() + part.delta())
        del part.lora_A, part.lora_B, part.scale
        part.__class__ = nn.Linear
    for p in model.parameters():
        p.requires_grad_(True)
        p.__dict__.pop("is_base", None)
    return model

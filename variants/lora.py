"""LoRA: low-rank adapters are trained in place of a model's matrices, which stay frozen.

LoRA (arXiv 2106.09685) section 4.1: a matrix W (out, in) becomes W + (alpha / r) B A, with A (r, in) random and B
(out, r) zero at first, so that training starts from the model as it was. All matrices of the layers get one, and the
learning rate is about ten times that of full training ["LoRA Without Regret", Schulman et al. 2025].

    add_adapters(model, rank=32)     # in place; any model whose matrices are nn.Linear. Then train as before:
    Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    with adapters_off(model):        # the model as it was, to the last bit: the reference of a KL penalty
        model(ids)
    merge(model)                     # the same function without the two small products; unmerge(model) goes back

A and B are float32, W may be bfloat16 or float16: it is only read. Memory: 16 bytes for each number in A and B
(weights, gradients, Adam's moments), and for W what its precision takes.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Linear):
    """y = x W' + bias + (alpha / r) x A' B'. An nn.Linear becomes one in place: its weights keep their names."""

    def forward(self, x):
        y = super().forward(x)
        if not self.is_on:
            return y
        # outside of autocast x has the precision of W
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return y + F.linear(self.scale * F.linear(x, A), B)

    @torch.no_grad()
    def delta(self):
        """(alpha / r) B A, (out, in) in float32."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())


def add_adapters(model, rank, alpha=32.0, leave_out=("lm_head",), generator=None):
    """Freezes the model and gives each nn.Linear an adapter, in place, but for those of these names. The model.

    A is uniform within 1 / sqrt(in) of 0, as PEFT draws it; alpha 32 as in "LoRA Without Regret", where the best
    learning rate then hardly depends on the rank. generator: a CPU's, for A.
    """
    for p in model.parameters():
        p.requires_grad_(False)
        p.is_base = True  # it will never change: copies may share it, and a training's state need not hold it
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name.split(".")[-1] in leave_out:
            continue
        device = linear.weight.device
        bound = 1 / math.sqrt(linear.in_features)
        A = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        linear.__class__ = LoRALinear
        linear.scale, linear.is_on = alpha / rank, True
        linear.lora_A = nn.Parameter(A.to(device))
        linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
    return model


def adapters(model):
    """{name: LoRALinear} of a model's matrices that have an adapter."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


@contextmanager
def adapters_off(model):
    """Within the block the model is as it was before add_adapters."""
    switch(model, False)
    try:
        yield
    finally:
        switch(model, True)


def switch(model, is_on):
    for part in adapters(model).values():
        part.is_on = is_on


def merge(model):
    """Adds the adapters to the matrices, in place; summed in float32, then in W's precision. The model."""
    return add_deltas(model, 1)


def unmerge(model):
    """The matrices as they were before `merge`, up to rounding. The model."""
    return add_deltas(model, -1)


@torch.no_grad()
def add_deltas(model, sign):
    for part in adapters(model).values():
        part.weight.copy_(part.weight.float() + sign * part.delta())
        part.is_on = sign < 0
    return model


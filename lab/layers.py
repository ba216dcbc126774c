"""Layers in place of model.py's: attention and norms as the device computes them faster; blocks that save memory.

    fast_layers(model)   # in place: the same weights and, up to rounding, the same result
    recompute(model)

On a CPU torch's fused attention is made for long rows; short ones take half the time as two products and a softmax, and
in bfloat16 its backward pass is five times slower than in float32. Each new shape of a product costs a kernel.
Autograd's RMSNorm passes over its input twice as often as the gradient by hand. A GPU needs no copy of keys and values
for each query head.

Shapes: B rows, T positions, S columns of keys, D hidden size, H heads, K key/value heads, d head size.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import Attention, Block, RMSNorm, rotate
from variants import deepseek_v3


def fast_layers(model):
    """The model, with the layers that its device computes fastest."""
    if next(model.parameters()).device.type == "cpu":
        replace(model, {Attention: CPUAttention, RMSNorm: CPURMSNorm, torch.nn.Linear: CPULinear,
                        deepseek_v3.Attention: CPULatentAttention, deepseek_v3.RMSNorm: CPURMSNorm,
                        deepseek_v3.Experts: CPUExperts})
    else:
        # cuDNN's attention makes a plan for each new shape, and our rows have many
        torch.backends.cuda.enable_cudnn_sdp(False)
        replace(model, {Attention: CUDAAttention, RMSNorm: CUDARMSNorm, deepseek_v3.RMSNorm: CUDARMSNorm,
                        deepseek_v3.Experts: CUDAExperts})
    return model


def plain_products(model):
    """The model, whose linear layers are torch's own again: variants/lora.py takes no others."""
    replace(model, {CPULinear: torch.nn.Linear})
    return model


def fixed_shapes(model):
    """The model, whose shapes do not depend on what it computes, for a recording of its steps."""
    replace(model, {deepseek_v3.Experts: FixedExperts, CUDAExperts: FixedExperts})
    return model


def recompute(model):
    """The model, whose layers keep their input only and run again in the backward pass: less memory, a third slower."""
    replace(model, {Block: RecomputedBlock, deepseek_v3.Block: RecomputedV3Block})
    return model


def replace(model, classes):
    """Gives the parts of a model other classes; their weights and names stay."""
    for part in model.modules():
        part.__class__ = classes.get(type(part), type(part))


class RecomputedBlock(Block):
    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        if not torch.is_grad_enabled():
            return super().forward(x, cos, sin, mask, cache, layer)
        return checkpoint(super().forward, x, cos, sin, mask, cache, layer, use_reentrant=False)


class RecomputedV3Block(deepseek_v3.Block):
    def forward(self, *inputs):
        if not torch.is_grad_enabled():
            return super().forward(*inputs)
        return checkpoint(super().forward, *inputs, use_reentrant=False)


# ------------------------------------------------------------------------------------------- attention

class SideBySide(Attention):
    """q and k stay side by side: one norm and one rotation for both."""

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        B, T, _ = x.shape
        H, K = self.heads, self.kv_heads
        qkv = self.qkv_proj(x).view(B, T, H + 2 * K, self.head_dim)  # (B, T, H + 2K, d)
        qk, v = qkv.split((H + K, K), dim=2)
        if hasattr(self, "q_norm"):
            weight = torch.cat((self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(K, -1)))  # (H + K, d)
            qk = self.norm(qk, weight, self.q_norm.eps)
        q, k = rotate(qk, cos, sin).transpose(1, 2).split((H, K), dim=1)  # (B, H, T, d), (B, K, T, d)
        v = v.transpose(1, 2)                                             # (B, K, T, d)
        if cache is not None:
            k, v = cache.update(layer, k, v)                              # (B, K, S, d)
        y = self.attend(q, k, v, mask)                                    # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class CUDAAttention(SideBySide):
    def norm(self, x, weight, eps):
        with torch.autocast("cuda", enabled=False):  # as CUDARMSNorm
            return F.rms_norm(x, x.shape[-1:], eps=eps) * weight.to(x.dtype)

    def attend(self, q, k, v, mask):
        B, H, T, d = q.shape
        if T == 1:  # a group's query heads become the rows of one product with their keys
            y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, d), k, v, attn_mask=mask)
            return y.reshape(B, H, 1, d)
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return super().attend(q, k, v, mask)


class CPUAttention(SideBySide):
    def norm(self, x, weight, eps):
        return rms_norm(x, weight, eps)

    def attend(self, q, k, v, mask):
        return attend(q, k, v, mask)


class CPULatentAttention(deepseek_v3.Attention):
    def attend(self, q, k, v, mask):
        return attend(q, k, v, mask, self.scale)


def attend(q, k, v, mask, scale=None):
    """softmax(q k' / sqrt(d)) v on a CPU: q (B, H, T, d), k and v (B, K, S, d) -> (B, H, T, d).

    scale: in place of 1 / sqrt(d), and v may have another d. mask (B, 1, T, S): 0 where a query may look, -inf
    elsewhere; None: plain causal attention.
    """
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    if T * S > 2 ** 18:
        return attend_long(q, k, v, mask, scale)
    if mask is None:
        mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    q = q * (scale or d ** -0.5)
    q = q.reshape(B, K, H // K * T, d)  # a group's queries: the rows of one product with their key head
    scores = (q @ k.transpose(-1, -2)).view(B, H, T, S).add_(mask)
    with torch.autocast("cpu", enabled=False):  # it would make them float32; the kernel sums in float32 anyway
        weights = scores.softmax(-1)
    return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, -1)


def attend_long(q, k, v, mask, scale):
    """The same by torch's fused attention, in float32."""
    group = q.shape[1] // k.shape[1]
    with torch.autocast("cpu", enabled=False):
        k = k.repeat_interleave(group, dim=1).float()  # (B, H, S, d)
        v = v.repeat_interleave(group, dim=1).float()
        mask = None if mask is None else mask.float()
        y = F.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return y.to(q.dtype)


# ------------------------------------------------------------------------------------------- experts

class SortedExperts(deepseek_v3.Experts):
    """Tokens are gathered once, sorted by expert: gradients are not summed over (N, D) for each expert."""

    def forward(self, x, chosen, weights):
        N, K = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # the N*K pairs of token and expert, by expert
        y = self.of_sorted(x.repeat_interleave(K, dim=0).index_select(0, order), chosen.flatten())
        y = y.index_select(0, order.argsort()).view(N, K, x.shape[1])
        return (y * weights[:, :, None]).sum(1).to(y.dtype)

    def of_sorted(self, x, expert):
        counts = expert.bincount(minlength=len(self.down_proj)).tolist()
        matrices = zip(x.split(counts), self.gate_up_proj, self.down_proj)
        return torch.cat([self.of_one(part, gate_up, down) for part, gate_up, down in matrices])

    def of_one(self, x, gate_up, down):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)


class CPUExperts(SortedExperts):
    """All experts in one product, each with the busiest one's rows: threads share it better than small ones."""

    def of_sorted(self, x, expert):
        E, expert = len(self.down_proj), expert.sort().values
        counts = expert.bincount(minlength=E)
        rows = rounded(counts.max().item())
        first = counts.cumsum(0) - counts                                          # (E,) each expert's first row of x
        place = expert * rows + torch.arange(len(x)) - first[expert]               # (len(x),) where it goes
        padded = x.new_zeros(E * rows, x.shape[1]).index_copy(0, place, x).view(E, rows, x.shape[1])
        gate, up = torch.bmm(padded, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.down_proj.transpose(1, 2))           # (E, rows, D)
        return y.flatten(0, 1).index_select(0, place)


class CUDAExperts(SortedExperts):
    """All experts in one kernel, where the GPU and torch have it."""

    def of_sorted(self, x, expert):
        product = getattr(F, "grouped_mm", None)  # from torch 2.10 on
        is_aligned = x.shape[1] % 8 == 0 and self.down_proj.shape[2] % 8 == 0
        if product is None or x.dtype != torch.bfloat16 or not is_aligned:
            return super().of_sorted(x, expert)
        if torch.cuda.get_device_capability(x.device) < (9, 0):
            return super().of_sorted(x, expert)
        numbers = torch.arange(len(self.down_proj), device=x.device)
        ends = (expert <= numbers[:, None]).sum(1, dtype=torch.int32)  # (E,) where each expert's rows end
        gate, up = product(x, self.gate_up_proj.to(x.dtype).transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return product(F.silu(gate) * up, self.down_proj.to(x.dtype).transpose(1, 2), offs=ends)


class FixedExperts(deepseek_v3.Experts):
    """By way of all experts, in shapes that do not depend on the choice."""

    def forward(self, x, chosen, weights):
        gate, up = torch.einsum("nd,eid->nei", x, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("nei,edi->ned", F.silu(gate) * up, self.down_proj)
        of_chosen = y.gather(1, chosen[:, :, None].expand(-1, -1, y.shape[-1]))  # (N, K, D)
        return (of_chosen * weights[:, :, None]).sum(1).to(y.dtype)


# ------------------------------------------------------------------------------------------- products

def rounded(rows):
    """So many rows or some more, of few numbers: in half precision a CPU makes a kernel for each new shape, which may
    take longer than the product itself."""
    return rows + -rows % (8 if rows <= 64 else 64)


class CPULinear(torch.nn.Linear):
    """With rows of zeros up to the next of `rounded`'s numbers."""

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        more = rounded(rows) - rows
        if more == 0:
            return super().forward(x)
        return super().forward(F.pad(x.reshape(rows, -1), (0, 0, 0, more)))[:rows].view(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------------------- norm

class CUDARMSNorm(RMSNorm):
    def forward(self, x):
        with torch.autocast("cuda", enabled=False):  # it would take x in float32; the kernel computes in float32 anyway
            return super().forward(x)


class CPURMSNorm(RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x, weight, eps):
    normalised = Normalise.apply(x, eps) if torch.is_grad_enabled() else x * inverse_rms(x, eps)
    return normalised * weight.to(x.dtype)


def inverse_rms(x, eps):
    wide = torch.promote_types(x.dtype, torch.float32)  # bf16 squares lose too much
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)


class Normalise(torch.autograd.Function):
    """y = x s with s = inverse_rms(x); its gradient is s (g - y mean(y g))."""

    @staticmethod
    def forward(ctx, x, eps):
        scale = inverse_rms(x, eps)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, g):
        y, scale = ctx.saved_tensors
        return torch.addcmul(g, y, (y * g).mean(-1, keepdim=True), value=-1).mul_(scale), None

"""DeepSeek-V3's architecture in place of model.py's: multi-head latent attention, and a mixture of experts.

R1 was trained from such a base [V3: arXiv 2412.19437]. Attention keeps one small latent and one rotary key per token;
after the first layers each token goes through a few of many experts. v3_weights.py, beside this file, loads and saves
it as `transformers` does; v3_pretraining.py trains a new one as V3 was.

    model = Transformer(Config())    # in place of model.py's: logits = model(ids)

Shapes: B rows, T positions, S cached columns, D hidden size, H heads, V vocabulary; of a head's query and key dn
dimensions that are not rotated and dr that are, of its value dv; of the latent dc; N tokens (n without padding), E
experts, K of them for a token, I width of an expert.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """The fields of config.json that the computation depends on, under Hugging Face's names."""
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384          # of the dense layers
    moe_intermediate_size: int = 128      # of one expert
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    n_shared_experts: int = 1             # for every token; 0: none
    n_routed_experts: int = 8             # V3: 256
    num_experts_per_tok: int = 2          # V3: 8
    n_group: int = 1                      # V3: 8 groups of experts, one per node
    topk_group: int = 1                   # V3: a token's experts come from 4 of them
    norm_topk_prob: bool = True           # the weights of a token's experts sum to 1
    routed_scaling_factor: float = 1.0    # V3: 2.5
    first_k_dense_replace: int = 1        # the first layers have no experts; V3: 3
    q_lora_rank: int | None = None        # None: one matrix, no latent; V3: 1536
    kv_lora_rank: int = 32                # dc; V3: 512
    qk_nope_head_dim: int = 32            # dn; V3: 128
    qk_rope_head_dim: int = 16            # dr; V3: 64
    v_head_dim: int = 32                  # dv; V3: 128
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None      # for a longer context: variants/rope_scaling.py
    rope_interleave: bool = True          # pairs (x_2i, x_2i+1), else (x_i, x_i+dr/2)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    model_type: str = "deepseek_v3"

    @property
    def head_dim(self):  # the part that rotates: what rope_frequencies makes angles for
        return self.qk_rope_head_dim


# ------------------------------------------------------------------------------------------- attention

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps) * weight, over the last dimension; under autocast too in x's precision."""
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotate(x, rotation, interleaved):
    """RoPE: each pair of x (B, H, T, dr) is a complex number, times its position's `rotation` (B, 1, T, dr/2)."""
    x = x.float()  # in which order the pairs come out does not matter: it is the same for queries and keys
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, dim=-1), dim=-1)
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation).flatten(-2)


def rope_frequencies(c: Config):
    """The angle per position of each of the dr/2 pairs, and a factor for all of them, which only some scalings have."""
    if c.rope_scaling is not None:
        raise ValueError(f"{c.rope_scaling} takes load(..., rope=scaled_frequencies), of variants/rope_scaling.py")
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim
    return c.rope_theta ** -exponent, 1.0


class Attention(nn.Module):
    """Multi-head latent attention: a cache keeps one latent, from which the keys and values of all heads are made. RoPE
    cannot pass through kv_b_proj: one more key, shared by the heads, is rotated and kept beside it [V3 2.1.1]."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.interleaved = c.num_attention_heads, c.rope_interleave
        dn, dr, dv, dc = self.sizes = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
        scaling = c.rope_scaling or {}
        mscale = 0.1 * scaling.get("mscale_all_dim", 0) * math.log(scaling.get("factor", 1)) + 1
        self.scale = (dn + dr) ** -0.5 * mscale ** 2  # YaRN's mscale for the query and for the key
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.hidden_size, self.heads * (dn + dr), bias=False)
        else:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)  # not rms_norm_eps: as `transformers`
            self.q_b_proj = nn.Linear(c.q_lora_rank, self.heads * (dn + dr), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, dc + dr, bias=False)
        self.kv_a_layernorm = RMSNorm(dc, 1e-6)
        self.kv_b_proj = nn.Linear(dc, self.heads * (dn + dv), bias=False)
        self.o_proj = nn.Linear(self.heads * dv, c.hidden_size, bias=False)

    def forward(self, x, rotation, mask, cache=None, layer=0):
        """x (B, T, D) -> (B, T, D); rotation, mask: of Transformer.layout."""
        B, T, _ = x.shape
        dn, dr, dv, dc = self.sizes
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(B, T, self.heads, dn + dr).transpose(1, 2).split((dn, dr), dim=-1)  # (B, H, T, ...)
        latent, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split((dc, dr), dim=-1)  # (B, 1, T, dc), (B, 1, T, dr)
        q_rope, k_rope = (rotate(t, rotation, self.interleaved).to(x.dtype) for t in (q_rope, k_rope))
        cached = torch.cat((self.kv_a_layernorm(latent), k_rope), dim=-1)             # (B, 1, T, dc + dr)
        if cache is not None:
            cached = cache.update(layer, cached)                                      # (B, 1, S, dc + dr)
        form = self.absorbed if cache is not None and T == 1 else self.plain  # cheaper for one query
        y = form(q_nope, q_rope, cached, mask)                                        # (B, H, T, dv)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def plain(self, q_nope, q_rope, cached, mask):
        """Makes the keys and values of each head."""
        dn, dr, dv, dc = self.sizes
        latent, k_rope = cached.split((dc, dr), dim=-1)
        kv = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.heads, dn + dv)).transpose(1, 2)  # (B, H, S, dn + dv)
        k_nope, v = kv.split((dn, dv), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.heads, -1, -1)), dim=-1)                  # (B, H, S, dn + dr)
        return self.attend(torch.cat((q_nope, q_rope), dim=-1), k, v, mask)

    def absorbed(self, q_nope, q_rope, cached, mask):
        """As plain, with no head's keys: q (W_k latent) = (q W_k) latent; W_v follows the weighted sum of latents."""
        dn, dr, dv, dc = self.sizes
        W_k, W_v = self.kv_b_proj.weight.unflatten(0, (self.heads, dn + dv)).split((dn, dv), dim=1)  # (H, dn or dv, dc)
        q_latent = torch.einsum("bhtn,hnl->bthl", q_nope, W_k)                                  # (B, 1, H, dc)
        q = torch.cat((q_latent, q_rope.transpose(1, 2)), dim=-1)
        y = self.attend(q, cached, cached[..., :dc], mask)  # (B, 1, H, dc): heads stand where plain has positions
        return torch.einsum("bthl,hvl->bhtv", y, W_v)

    def attend(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)


class LatentCache:
    """Latents and rotated keys of the tokens so far, k (layers, B, 1, capacity, dc + dr): model.py's KVCache with one
    head, under no_grad. Attention runs over the whole capacity, so that its shape seldom changes. start (B,): each
    row's first column after its padding, which has at most `padding` columns, each seen by itself alone.
    """

    def __init__(self, c: Config, start, dtype, padding=0):
        shape = c.num_hidden_layers, len(start), 1, 0, c.kv_lora_rank + c.qk_rope_head_dim
        self.k = torch.zeros(shape, dtype=dtype, device=start.device)
        self.start, self.length, self.padding = start, 0, padding

    def reserve(self, columns):
        """Makes room for this many more columns; returns the capacity."""
        blocks = math.ceil((self.length + columns - self.k.shape[3]) / 32)
        if blocks > 0:
            self.k = F.pad(self.k, (0, 0, 0, 32 * blocks))
        return self.k.shape[3]

    def columns(self, count):
        return torch.arange(self.length, self.length + count, device=self.start.device)

    def update(self, layer, k):
        self.k[layer, :, :, self.length:self.length + k.shape[2]] = k
        return self.k[layer]

    def select(self, rows):
        """The cache of these rows (an index tensor, repeats allowed)."""
        selected = copy.copy(self)
        selected.k, selected.start = self.k[:, rows], self.start[rows]
        return selected


# ------------------------------------------------------------------------------------------- experts

class MLP(nn.Module):
    def __init__(self, c: Config, width):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, c.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Router(nn.Module):
    """Chooses K experts for each token by affinity plus bias, and weighs them by affinity alone [V3 eq. 12-16]. The
    bias stays in float32: steps of 0.001 vanish in half precision."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.weight = nn.Parameter(torch.randn(c.n_routed_experts, c.hidden_size) * c.hidden_size ** -0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts, dtype=torch.float32))

    def forward(self, x):
        """x (N, D) -> affinities (N, E), the chosen experts (N, K) and their weights (N, K), in float32."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):  # rounding would decide near-ties
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if c.n_group > c.topk_group:  # a group counts as much as its two best experts
            groups = choice.unflatten(1, (c.n_group, -1))
            best = groups.topk(2).values.sum(-1).topk(c.topk_group).indices  # (N, topk_group)
            left_out = torch.ones_like(groups[:, :, 0], dtype=torch.bool).scatter(1, best, False)
            choice = groups.masked_fill(left_out[:, :, None], -math.inf).flatten(1)
        chosen = choice.topk(c.num_experts_per_tok).indices
        weights = scores.gather(1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, chosen, weights * c.routed_scaling_factor


class Experts(nn.Module):
    """E gated MLPs, stacked."""

    def __init__(self, c: Config):
        super().__init__()
        E, I, D = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, D) * D ** -0.5)
        self.down_proj = nn.Parameter(torch.randn(E, D, I) * I ** -0.5)

    def forward(self, x, chosen, weights):
        """The weighted sum of each token's experts: x (N, D), chosen (N, K), weights (N, K) -> (N, D)."""
        y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, weights.dtype))
        for e, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj)):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
            y.index_add_(0, token, F.linear(F.silu(gate) * up, down) * weights[token, slot, None])
        return y.to(x.dtype)


class MoE(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate, self.experts = Router(c), Experts(c)  # Hugging Face's names
        if c.n_shared_experts:
            self.shared_experts = MLP(c, c.n_shared_experts * c.moe_intermediate_size)

    def forward(self, x, real_index=None):
        """x (B, T, D) -> y (B, T, D), and the routing (affinities (n, E), chosen (n, K)) of the tokens at real_index
        (n,) of the B * T; None: all. Padding goes to no routed expert."""
        tokens = x.flatten(0, 1) if real_index is None else x.flatten(0, 1).index_select(0, real_index)
        scores, chosen, weights = self.gate(tokens)
        y = self.experts(tokens, chosen, weights)
        if real_index is not None:
            y = y.new_zeros(x.shape[:2].numel(), x.shape[2]).index_copy(0, real_index, y)
        shared = self.shared_experts(x) if hasattr(self, "shared_experts") else 0
        return y.view_as(x) + shared, (scores, chosen)


# ------------------------------------------------------------------------------------------- the model

class Block(nn.Module):
    def __init__(self, c: Config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(c) if layer >= c.first_k_dense_replace else MLP(c, c.intermediate_size)

    def forward(self, x, rotation, mask, real_index=None, cache=None, layer=0):
        """The new stream (B, T, D), and MoE's routing, None where the layer is dense."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache, layer)
        y = self.post_attention_layernorm(x)
        y, routing = self.mlp(y, real_index) if isinstance(self.mlp, MoE) else (self.mlp(y), None)
        return x + y, routing


class Transformer(nn.Module):
    def __init__(self, config: Config, rope=rope_frequencies):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.frequency, self.rope_scale = rope(config)  # (dr/2,); no buffer, which .to(torch.bfloat16) would round

    def new_cache(self, start, padding=0):
        return LatentCache(self.config, start, self.embed_tokens.weight.dtype, padding)

    def routers(self):
        return [part for part in self.modules() if isinstance(part, Router)]

    def embed(self, ids):
        x = self.embed_tokens(ids)  # (B, T, D)
        is_cast = torch.is_autocast_enabled(ids.device.type)  # then the residual stream is in half precision too
        return x.to(torch.get_autocast_dtype(ids.device.type)) if is_cast else x

    def layout(self, x, positions=None, segments=None, cache=None):
        """What the layers need to know of x (B, T, D): rotation (B, 1, T, dr/2); mask (B, 1, T, S), 0 where a token may
        look and -inf elsewhere, or None for all that came before; the index (n,) of what is no padding, or None."""
        column = torch.arange(x.shape[1], device=x.device)
        seen, real, positions = None, None, column[None] if positions is None else positions
        if cache is not None:
            column = cache.columns(x.shape[1])
            positions = column - cache.start[:, None]
            key_column = torch.arange(cache.reserve(x.shape[1]), device=x.device)
            seen = (key_column <= column[:, None]) & (key_column >= cache.start[:, None, None])
            seen |= key_column == column[:, None]  # padding sees itself: an empty row would be NaN
            real = positions >= 0 if len(column) > 1 else None  # one column is a decoded token, no padding
        elif segments is not None:  # packed rows: a token sees the earlier ones of its own example
            seen = (segments[:, :, None] == segments[:, None, :]) & (column <= column[:, None])
            real = segments > 0
        self.frequency = self.frequency.to(x.device)
        angle = positions[:, None, :, None] * self.frequency
        rotation = torch.polar(torch.full_like(angle, self.rope_scale), angle)
        mask = None if seen is None else torch.where(seen, 0.0, -math.inf).to(x.dtype)[:, None]
        return rotation, mask, None if real is None else real.flatten().nonzero()[:, 0]

    def states(self, x, layout, cache=None):
        """The last layer's states (B, T, D) of embedded tokens x, and the routing of each layer with experts."""
        routings = []
        for i, layer in enumerate(self.layers):
            x, routing = layer(x, *layout, cache, i)
            routings.append(routing)
        if cache is not None:
            cache.length += x.shape[1]
        return x, [routing for routing in routings if routing is not None]

    def hidden(self, ids, positions=None, segments=None, cache=None):
        """The last layer's normed states (B, T, D), for callers that cannot afford (B, T, V); see forward."""
        x = self.embed(ids)
        return self.norm(self.states(x, self.layout(x, positions, segments, cache), cache)[0])

    def head(self, h):
        """Logits (..., V) of hidden states (..., D)."""
        return self.lm_head(h)

    def forward(self, ids, positions=None, segments=None, cache=None):
        """Next-token logits (B, T, V) of ids (B, T). positions (B, T): rotary ones, 0.. by default. segments (B, T):
        which packed example each token is of, 0 for padding; it sees no other. cache: of new_cache, in place of both;
        it is advanced by T."""
        return self.head(self.hidden(ids, positions, segments, cache))

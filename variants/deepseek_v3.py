"""DeepSeek-V3's architecture in place of model.py's: multi-head latent attention, and a mixture of experts.

R1 was trained from such a base [V3: arXiv 2412.19437]. Attention keeps one small latent and one rotary key per token.
After the first layers each token goes through a few of many experts. A directory written here opens in `transformers`,
and its models of this kind open here.

    model = load(dir)    # then as model.py's Transformer; variants/v3_pretraining.py trains a new one as V3 was

Shapes: B rows, T positions, S cached columns, D hidden size, H heads, V vocabulary; of a head's query and key dn, and
dr that rotate, of its value dv; dc latent; N tokens, E experts, K of them for a token, I width of an expert.
"""

import copy
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file


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
    n_group: int = 1                      # V3: 8 groups of experts, a node each
    topk_group: int = 1                   # V3: a token's experts are of 4 of them
    norm_topk_prob: bool = True           # the weights of a token's experts sum to 1
    routed_scaling_factor: float = 1.0    # V3: 2.5
    first_k_dense_replace: int = 1        # the first layers have no experts; V3: 3
    q_lora_rank: int | None = None        # None: queries without a latent; V3: 1536
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
    def head_dim(self):
        """The part that rotates: what rope frequencies are made for."""
        return self.qk_rope_head_dim


# ------------------------------------------------------------------------------------------- attention

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps) * weight, over the last dimension."""
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotate(x, cos, sin, interleaved):
    """RoPE: rotates each pair by its position's angle; sin comes with its left half negated."""
    if interleaved:
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # (x_2i, x_2i+1) -> (x_i, x_i+dr/2)
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((right, left), dim=-1), sin)


def rope_frequencies(c: Config):
    """The angle per position of each of the dr/2 pairs, and a factor for cos and sin, which only some scalings have."""
    if c.rope_scaling is not None:
        raise ValueError(f"{c.rope_scaling} takes load(..., rope=scaled_frequencies), of variants/rope_scaling.py")
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim
    return c.rope_theta ** -exponent, 1.0


def softmax_scale(c: Config):
    """1 / sqrt(dn + dr), times the square of YaRN's mscale_all_dim."""
    scaling = c.rope_scaling or {}
    factor, weight = scaling.get("factor", 1), scaling.get("mscale_all_dim") or 0
    mscale = 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
    return (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5 * mscale ** 2


class Attention(nn.Module):
    """Multi-head latent attention: keys and values of all heads are made from one latent [V3 2.1.1]."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.interleaved, self.scale = c.num_attention_heads, c.rope_interleave, softmax_scale(c)
        self.nope, self.rope, self.value = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim  # dn, dr, dv
        q_rows = self.heads * (self.nope + self.rope)
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.hidden_size, q_rows, bias=False)
        else:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)  # not rms_norm_eps: as `transformers`
            self.q_b_proj = nn.Linear(c.q_lora_rank, q_rows, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        B, T, _ = x.shape
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(B, T, self.heads, -1).transpose(1, 2)                          # (B, H, T, dn + dr)
        latent, k_rope = self.kv_a_proj_with_mqa(x)[:, None].tensor_split([-self.rope], dim=-1)
        latent = self.kv_a_layernorm(latent)                                      # (B, 1, T, dc)
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        q_rope = rotate(q_rope, cos, sin, self.interleaved)                       # (B, H, T, dr)
        k_rope = rotate(k_rope, cos, sin, self.interleaved)                       # (B, 1, T, dr): one for all heads
        if cache is not None:
            latent, k_rope = cache.update(layer, latent, k_rope)                  # (B, 1, S, dc), (B, 1, S, dr)
        form = self.absorbed if cache is not None and T == 1 else self.plain
        y = form(q_nope, q_rope, latent[:, 0], k_rope, mask)                      # (B, H, T, dv)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def plain(self, q_nope, q_rope, latent, k_rope, mask):
        """Each head's keys and values, (B, H, S, ...), are made from the latents (B, S, dc)."""
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.value), dim=-1)
        q, k = torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_rope.expand(-1, self.heads, -1, -1)), dim=-1)
        return self.attend(q, k, v, mask)

    def attend(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)

    def absorbed(self, q_nope, q_rope, latent, k_rope, mask):
        """The same for one new token: k = W_k c, so q k = (q W_k) c, and W_v waits until the latents are summed."""
        W_k, W_v = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split((self.nope, self.value), dim=1)
        q = torch.einsum("bhn,hnc->bhc", q_nope[:, :, 0], W_k)                    # (B, H, dc)
        scores = q @ latent.mT + q_rope[:, :, 0] @ k_rope[:, 0].mT                # (B, H, S)
        weights = (scores.float() * self.scale + mask[:, 0]).softmax(-1).to(latent.dtype)
        return torch.einsum("bhc,hvc->bhv", weights @ latent, W_v)[:, :, None]    # (B, H, 1, dv)


class LatentCache:
    """Latents k and rotary keys v of the tokens so far, (layers, B, 1, capacity, dc and dr): model.py's KVCache with
    one head. start (B,): each row's first real column; before it is padding (at most `padding`), never looked at."""

    def __init__(self, config: Config, start, dtype, padding=0):
        shape = (config.num_hidden_layers, len(start), 1, 0)
        self.k = torch.zeros(*shape, config.kv_lora_rank, dtype=dtype, device=start.device)
        self.v = torch.zeros(*shape, config.qk_rope_head_dim, dtype=dtype, device=start.device)
        self.start, self.length, self.padding = start, 0, padding

    def reserve(self, columns):
        """Makes room for this many more columns; returns the capacity."""
        blocks = math.ceil((self.length + columns - self.k.shape[3]) / 32)
        if blocks > 0:
            self.k, self.v = (F.pad(t, (0, 0, 0, 32 * blocks)) for t in (self.k, self.v))
        return self.k.shape[3]

    def columns(self, count):
        return torch.arange(self.length, self.length + count, device=self.start.device)

    def update(self, layer, k, v):
        new = slice(self.length, self.length + k.shape[2])
        self.k[layer, :, :, new], self.v[layer, :, :, new] = k, v
        return self.k[layer], self.v[layer]

    def select(self, rows):
        """The cache of these rows (an index tensor, repeats allowed)."""
        selected = copy.copy(self)
        selected.k, selected.v, selected.start = self.k[:, rows], self.v[:, rows], self.start[rows]
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
    """Chooses K experts for each token by affinity plus bias, and weighs them by affinity alone [V3 eq. 12-16]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config, E = c, c.n_routed_experts
        self.weight = nn.Parameter(torch.randn(E, c.hidden_size) * c.hidden_size ** -0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(E, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(E, dtype=torch.long), persistent=False)  # while gradients are enabled

    def forward(self, x):
        """x (N, D) -> affinities (N, E), the chosen experts (N, K) and their weights (N, K), in float32."""
        c, wide = self.config, torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if c.n_group > c.topk_group:  # a group counts as much as its two best experts
            groups = choice.unflatten(1, (c.n_group, -1))
            kept = groups.topk(2).values.sum(-1).topk(c.topk_group).indices  # (N, topk_group)
            left_out = torch.ones_like(groups[:, :, 0], dtype=torch.bool).scatter(1, kept, False)
            choice = groups.masked_fill(left_out[:, :, None], -math.inf).flatten(1)
        chosen = choice.topk(c.num_experts_per_tok).indices
        weights = scores.gather(1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if torch.is_grad_enabled():
            self.load += chosen.flatten().bincount(minlength=len(self.load))
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
        N, K = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # the N*K pairs of token and expert, by expert
        counts = chosen.flatten().bincount(minlength=len(self.down_proj)).tolist()
        parts = x.repeat_interleave(K, dim=0).index_select(0, order).split(counts)
        matrices = zip(parts, self.gate_up_proj.unbind(), self.down_proj.unbind())
        done = [self.expert(part, gate_up, down) for part, gate_up, down in matrices if len(part)]
        y = torch.cat(done or [x]).index_select(0, order.argsort()).view(N, K, -1)
        return (y * weights[:, :, None]).sum(1).to(y.dtype)  # in the order of K, whatever the batch

    def expert(self, x, gate_up, down):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    def dense(self, x, chosen, weights):
        """The same by way of all experts, in shapes that do not depend on the choice: for a recording."""
        gate, up = torch.einsum("nd,eid->nei", x, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("nei,edi->ned", F.silu(gate) * up, self.down_proj)
        of_chosen = y.gather(1, chosen[:, :, None].expand(-1, -1, y.shape[-1]))  # (N, K, D)
        return (of_chosen * weights[:, :, None]).sum(1).to(y.dtype)


class MoE(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate, self.experts = Router(c), Experts(c)
        if c.n_shared_experts:
            self.shared_experts = MLP(c, c.n_shared_experts * c.moe_intermediate_size)

    def forward(self, x, real=None):
        """x (B, T, D) -> the same, and the router's (affinities, chosen) of the tokens that are real (B, T)."""
        tokens = x.flatten(0, 1)
        if real is not None:  # padding goes to no expert
            at = real.flatten().nonzero()[:, 0]
            tokens = tokens.index_select(0, at)
        scores, chosen, weights = self.gate(tokens)
        is_decoding = x.is_cuda and x.shape[1] == 1 and not torch.is_grad_enabled()
        y = (self.experts.dense if is_decoding else self.experts)(tokens, chosen, weights)
        if real is not None:
            y = y.new_zeros(real.numel(), y.shape[-1]).index_copy(0, at, y)
        y = y.view_as(x)
        if hasattr(self, "shared_experts"):
            y = y + self.shared_experts(x)
        return y, (scores, chosen)


# ------------------------------------------------------------------------------------------- the model

class Block(nn.Module):
    def __init__(self, c: Config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(c) if layer >= c.first_k_dense_replace else MLP(c, c.intermediate_size)

    def forward(self, x, cos, sin, mask, real=None, cache=None, layer=0):
        """The new stream (B, T, D), and the routing of its tokens, None where the layer is dense."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        y = self.post_attention_layernorm(x)
        y, routing = self.mlp(y, real) if isinstance(self.mlp, MoE) else (self.mlp(y), None)
        return x + y, routing


class Transformer(nn.Module):
    def __init__(self, config: Config, rope=rope_frequencies):
        super().__init__()
        self.config, self.rope = config, rope
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.make_angles(self.lm_head.weight.device)

    def make_angles(self, device):
        frequency, scale = self.rope(self.config)
        angle = torch.arange(self.config.max_position_embeddings, device=device).float().outer(frequency.to(device))
        cos, sin = angle.cos() * scale, angle.sin() * scale
        self.register_buffer("cos", torch.cat((cos, cos), dim=1), persistent=False)   # (max positions, dr)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=1), persistent=False)

    @torch.no_grad()
    def init_weights(self, generator=None, of=None):
        """As model.py's: normal, std 0.02 at width 768, scaled as 1/sqrt(width); less in what adds to the stream."""
        std = 0.02 * math.sqrt(768 / self.config.hidden_size)
        for name, p in (of or self).named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.normal_(0, std / math.sqrt(2 * len(self.layers)), generator=generator)
            elif p.dim() >= 2:
                p.normal_(0, std, generator=generator)
        return self

    def new_cache(self, start, padding=0):
        return LatentCache(self.config, start, self.embed_tokens.weight.dtype, padding)

    def routers(self):
        return [part for part in self.modules() if isinstance(part, Router)]

    def embed(self, ids):
        x = self.embed_tokens(ids)  # (B, T, D)
        is_cast = torch.is_autocast_enabled(ids.device.type)
        return x.to(torch.get_autocast_dtype(ids.device.type)) if is_cast else x

    def place(self, ids, positions=None, segments=None, cache=None):
        """Of forward's arguments: what each token is turned by (cos, sin), which columns it sees (mask; None: all that
        came before), and whether it is real (None: all are)."""
        T = ids.shape[1]
        past = 0 if cache is None else cache.length - cache.padding  # of the shortest row
        if past + T > self.config.max_position_embeddings:
            raise ValueError(f"{past + T} tokens exceed the model's context of {self.config.max_position_embeddings}")
        query = torch.arange(T, device=ids.device)  # the column of each token
        seen, real = None, None
        positions = query[None] if positions is None else positions
        if cache is not None:
            query = cache.columns(T)  # a row past the context is done
            real = query >= cache.start[:, None] if T > 1 else None  # a prompt; what is decoded is no padding
            positions = (query - cache.start[:, None]).clamp(0, self.config.max_position_embeddings - 1)
            key = torch.arange(cache.reserve(T), device=ids.device)
            seen = (key <= query[:, None]) & (key >= cache.start[:, None, None])
            seen |= key == query[:, None]  # padding sees itself: an empty row would be NaN
        elif segments is not None:  # packed rows: a token sees the earlier ones of its own example
            real = segments > 0
            seen = (segments[:, :, None] == segments[:, None, :]) & (query <= query[:, None])
        dtype = self.embed(ids[:1, :1]).dtype
        cos, sin = (angles[positions][:, None].to(dtype) for angles in (self.cos, self.sin))  # (B, 1, T, dr)
        mask = None if seen is None else torch.where(seen, 0.0, -math.inf).to(dtype)[:, None]  # (B, 1, T, S)
        return cos, sin, mask, real

    def hidden_and_routing(self, ids, place, cache=None):
        """The last layer's states (B, T, D), not normed, and (affinities, chosen) of each layer with experts."""
        x, routings = self.embed(ids), []
        for i, layer in enumerate(self.layers):
            x, routing = layer(x, *place, cache, i)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += ids.shape[1]
        return x, routings

    def hidden(self, ids, positions=None, segments=None, cache=None):
        """The last layer's normed states (B, T, D), for callers that cannot afford (B, T, V); see forward."""
        return self.norm(self.hidden_and_routing(ids, self.place(ids, positions, segments, cache), cache)[0])

    def head(self, h):
        """Logits (..., V) of hidden states (..., D)."""
        return self.lm_head(h)

    def forward(self, ids, positions=None, segments=None, cache=None):
        """Next-token logits (B, T, V) of ids (B, T).

        positions (B, T): rotary positions, 0.. by default. segments (B, T): the number of each token's packed example,
        0 for padding; it sees no other example. cache: of new_cache; it gives the positions and is advanced by T.
        """
        return self.head(self.hidden(ids, positions, segments, cache))


# ------------------------------------------------------------------------------------------- weights in and out

def hf_tensors(model):
    """{Hugging Face's name: our rows of it}: gate_up_proj is two tensors there, and each expert stands alone. Without
    mtp, which only pretraining needs."""
    tensors = {}
    for name, rows in model.state_dict().items():
        full_name = name if name == "lm_head.weight" else f"model.{name}"
        if name.startswith("mtp.") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        matrices = {full_name: rows}
        if ".experts." in name:  # (E, ...): experts.down_proj -> experts.0.down_proj.weight
            matrices = {full_name.replace("experts.", f"experts.{e}.") + ".weight": rows[e] for e in range(len(rows))}
        for matrix_name, matrix in matrices.items():
            if "gate_up_proj" in matrix_name:
                for part, half in zip(("gate_proj", "up_proj"), matrix.chunk(2)):
                    tensors[matrix_name.replace("gate_up_proj", part)] = half
            else:
                tensors[matrix_name] = matrix
    return tensors


def save(model, dir, tokenizer=None):
    """Writes a model directory that `transformers` opens too."""
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        tokenizer.save(dir)
    end_ids = getattr(tokenizer, "end_ids", [None])
    end = {"eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids}
    config = asdict(model.config) | end | {
        "num_nextn_predict_layers": 0, "num_key_value_heads": model.config.num_attention_heads, "bos_token_id": None,
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "silu", "attention_bias": False,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "torch_dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch.")}
    sampling = end | {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    weights = {name: rows.cpu().contiguous() for name, rows in hf_tensors(model).items()}
    save_file(weights, dir / "model.safetensors", {"format": "pt"})
    (dir / "generation_config.json").write_text(json.dumps(sampling))
    (dir / "config.json").write_text(json.dumps(config, indent=2))


def without_none(raw):
    return {name: value for name, value in raw.items() if value is not None}


def read_config(dir) -> Config:
    """The Config of a directory's config.json; lab/check_model.py diagnoses a broken one."""
    raw = json.loads(Path(dir, "config.json").read_text(encoding="utf-8"), object_hook=without_none)
    rope = raw.get("rope_parameters", {}) | raw.get("rope_scaling", {})  # of transformers 5, and 4
    if (raw["model_type"] != "deepseek_v3" or raw.get("scoring_func", "sigmoid") != "sigmoid"
            or raw.get("topk_method", "noaux_tc") != "noaux_tc" or raw.get("quantization_config")
            or raw.get("attention_bias") or raw.get("mlp_bias") or raw.get("moe_layer_freq", 1) != 1
            or raw.get("hidden_act", "silu") not in ("silu", "swish")
            or raw["n_routed_experts"] % raw["n_group"]):
        raise ValueError(f"{dir}: not a DeepSeek-V3 as variants/deepseek_v3.py computes it")
    defaults = {"q_lora_rank": None, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                "n_shared_experts": 0, "rope_interleave": True}
    values = defaults | raw | rope  # rope last: transformers 5 keeps rope_theta there
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    if "original_max_position_embeddings" in raw:
        scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    scaling["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return Config(**{field.name: values[field.name] for field in fields(Config)})


@torch.no_grad()
def load(dir, device=None, dtype=None, rope=rope_frequencies) -> Transformer:
    """The model of a Hugging Face directory, on the GPU if there is one; dtype None: as stored (for training, float32),
    the routers always in float32; rope: what stands in place of rope_frequencies (variants/rope_scaling.py)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shards = sorted(Path(dir).glob("model*.safetensors"))
    files = {name: path for path in shards for name in safe_open(path, "pt").keys()}
    with torch.device("meta"):  # no memory and no random numbers for what is replaced
        model = Transformer(read_config(dir), rope)
    first = "model.embed_tokens.weight"
    model.to(dtype or safe_open(files[first], "pt").get_slice(first)[:0].dtype)
    for router in model.routers():
        router.float()
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    for name, rows in hf_tensors(model).items():
        with safe_open(files[name], "pt") as file:
            tensor = file.get_tensor(name)
        if tensor.shape != rows.shape:
            raise ValueError(f"{files[name]}: tensor {name} is {list(tensor.shape)}, not {list(rows.shape)}")
        rows.copy_(tensor)
    for router in model.routers():
        router.load.zero_()
    model.make_angles("cpu")
    return model.to(device)

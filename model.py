"""A decoder-only transformer of the Llama family, its KV cache, sampling, and weights in and out.

Llama, Qwen2 (bias on q, k, v) and Qwen3 (norm on each head's q and k) are one architecture with three
switches, all read from Hugging Face's `config.json`; files carry Hugging Face's names, so a directory written
here opens in `transformers`, and a dense Llama, Qwen2 or Qwen3 directory opens here.

    python model.py DIR                          # chat in the terminal
    python model.py DIR --prompt "What is 2+3?"  # one answer

Shapes: B rows, T positions, D hidden size, H heads, K key/value heads, d head size, V vocabulary.
"""

import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass
class Config:
    """The fields of config.json that the computation depends on, under Hugging Face's names."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    model_type: str = "llama"  # decides the qkv bias (qwen2) and the q/k norm (qwen3)
    rope_scaling: dict | None = None  # {"rope_type": "linear", "llama3" or "yarn", "factor": ...}, for a longer context

    def __post_init__(self):
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type {self.model_type!r} is not supported, only {', '.join(ARCHITECTURES)}")
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")
        rope_frequencies(self)  # what is wrong with its scaling shows here


# ------------------------------------------------------------------------------------------- the layers

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight, over the last dimension."""
    return (Normalise.apply(x, eps) if torch.is_grad_enabled() else x * inverse_rms(x, eps)) * weight.to(x.dtype)


def inverse_rms(x, eps):
    wide = torch.promote_types(x.dtype, torch.float32)  # bf16 squares lose too much
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)


class Normalise(torch.autograd.Function):
    """y = x s with s = inverse_rms(x); its gradient, s (g - y mean(y g)), by hand: half the passes that autograd makes of it."""

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


def rope_frequencies(c: Config):
    """Angle per position of each of the d/2 pairs, and what cos and sin are multiplied by: theta^(-2i/d), for a longer context

    linear  divided by the factor
    llama3  so where the wave is longer than the first context / low_freq_factor, kept where it is shorter than that / high_freq_factor
    yarn    the same by the turns within the first context, between beta_slow and beta_fast, and a larger scale (arXiv 2309.00071)
    """
    pair = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim  # on the CPU also where `load` takes no memory
    frequency, scaling = c.rope_theta ** -pair, c.rope_scaling or {"rope_type": "default"}

    def number(name, default=None):
        value = scaling.get(name, default)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"rope scaling: {name} is {value!r}")
        return value

    kind = scaling.get("rope_type")
    if kind == "default":
        return frequency, 1.0
    factor, first = number("factor"), number("original_max_position_embeddings", c.max_position_embeddings)
    if kind == "linear":
        return frequency / factor, 1.0
    turns = first * frequency / (2 * math.pi)  # of each pair within the first context
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if not low < high:
            raise ValueError(f"rope scaling: low_freq_factor {low} is not below high_freq_factor {high}")
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequency + (1 - kept) * frequency / factor, 1.0
    if kind == "yarn":
        def pair_with(turns):  # the pair, a fraction, that turns so often
            return c.head_dim * math.log(first / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))

        low, high = pair_with(number("beta_fast", 32)), pair_with(number("beta_slow", 1))
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, c.head_dim - 1)
        slowed = ((torch.arange(len(pair), dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)).clamp(0, 1)
        mscale = lambda weight: 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
        both = scaling.get("mscale") and scaling.get("mscale_all_dim")
        scale = mscale(number("mscale")) / mscale(number("mscale_all_dim")) if both else mscale(1)
        return (1 - slowed) * frequency + slowed * frequency / factor, number("attention_factor", scale)
    raise ValueError(f"rope scaling {kind!r} is not supported: linear, llama3 and yarn are")


def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x_i, x_{i+d/2}) by its position's angle. x (..., d); sin has the minus of the left half."""
    left, right = x.chunk(2, dim=-1)  # the rotate-half pairing of Hugging Face's checkpoints
    return torch.addcmul(x * cos, torch.cat((right, left), dim=-1), sin)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        outputs = (self.heads + 2 * self.kv_heads) * c.head_dim  # one matrix: three small products are slower than one large
        self.qkv_proj = nn.Linear(c.hidden_size, outputs, bias=c.model_type == "qwen2")
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        if c.model_type == "qwen3":
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)  # q and k side by side: half the operations
        if hasattr(self, "q_norm"):
            weight = torch.cat((self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)))
            qk = rms_norm(qk, weight, self.q_norm.eps)
        q, k = rotate(qk, cos, sin).transpose(1, 2).split((self.heads, self.kv_heads), dim=1)  # (B, H, T, d), (B, K, T, d)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))


def attend(q, k, v, mask):
    """softmax(q k' / sqrt(d) + mask) v. mask: 0 where a query may look and -inf elsewhere, or None for plain causal attention."""
    (B, H, T, d), K, S, dtype = q.shape, k.shape[1], k.shape[2], q.dtype
    if q.device.type == "cpu" and T * S <= 2 ** 18:  # by hand: for short rows half the time of the CPU's fused kernel
        if mask is None:
            mask = torch.full((T, T), -math.inf, dtype=dtype).triu(1)
        # the queries of a group are the rows of one product with their key head
        scores = (q * d ** -0.5).reshape(B, K, H // K * T, d) @ k.transpose(-1, -2)
        weights = scores.view(B, H, T, S).add_(mask).softmax(-1)
        return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, d)
    if T == 1:  # one new token: a group's query heads become the queries of its one key/value head
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, d), k, v, attn_mask=mask).reshape(B, H, 1, d)
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
        if q.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()  # bf16's backward is 5x slower there
            mask = mask if mask is None else mask.float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).to(dtype)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class KVCache:
    """Keys and values of the tokens so far, (layers, B, K, capacity, d), rows left-padded so that all end together.

    `start` (B,) is each row's first real column: columns before it are padding and never looked at.
    Attention runs over the whole capacity, which grows by 32 columns (256 on a GPU): a slice would be copied at each product.
    """

    def __init__(self, config: Config, start, dtype):
        shape = (config.num_hidden_layers, len(start), config.num_key_value_heads, 0, config.head_dim)
        self.k = self.v = torch.zeros(shape, dtype=dtype, device=start.device)
        self.start, self.length = start, 0

    def reserve(self, columns):
        """Room for so many more; returns the capacity."""
        lot = 32 if self.k.device.type == "cpu" else 256  # on a GPU each growth is a new recording (graphs.py)
        grow = (self.length + columns - self.k.shape[3] + lot - 1) // lot * lot
        if grow > 0:
            self.k = F.pad(self.k, (0, 0, 0, grow))  # one after the other: the old one is freed in between
            self.v = F.pad(self.v, (0, 0, 0, grow))
        return self.k.shape[3]

    def columns(self, count):
        """Where the next tokens go."""
        return torch.arange(self.length, self.length + count, device=self.start.device)

    def update(self, layer, k, v):
        new = slice(self.length, self.length + k.shape[2])
        self.k[layer, :, :, new], self.v[layer, :, :, new] = k, v
        return self.k[layer], self.v[layer]

    def select(self, rows):
        """The cache of these rows (an index tensor, repeats allowed)."""
        new = object.__new__(KVCache)
        new.k, new.v, new.start, new.length = self.k[:, rows], self.v[:, rows], self.start[rows], self.length
        return new


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.recompute = False  # True: a layer keeps its input only and runs again in the backward pass; a third slower
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.make_angles(torch.empty(0).device)

    def make_angles(self, device):
        frequency, scale = rope_frequencies(self.config)
        angle = torch.outer(torch.arange(self.config.max_position_embeddings, device=device).float(), frequency.to(device))
        cos, sin = angle.cos() * scale, angle.sin() * scale
        self.register_buffer("cos", torch.cat((cos, cos), dim=1), persistent=False)   # (max positions, d)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=1), persistent=False)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Normal with GPT-2's std of 0.02 at width 768, larger for narrower models as 1/sqrt(width).

        What writes into the residual stream is scaled down by sqrt(2 layers), as in GPT-2.
        """
        std = 0.02 * math.sqrt(768 / self.config.hidden_size)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0, std / math.sqrt(2 * len(self.layers)) if into_residual else std, generator=generator)
        return self

    def hidden(self, ids, positions=None, segments=None, cache=None):
        """The last layer's normed states, (B, T, D), for callers that must not hold (B, T, V); arguments as in `forward`."""
        B, T = ids.shape
        past = cache.length if cache is not None else 0
        if past + T > self.config.max_position_embeddings:
            raise ValueError(f"{past + T} tokens exceed the model's context of {self.config.max_position_embeddings}")
        column, seen = torch.arange(T, device=ids.device), None  # None: plain causal attention
        if cache is not None:
            column = cache.columns(T)
            positions = (column - cache.start[:, None]).clamp(min=0)
            every = torch.arange(cache.reserve(T), device=ids.device)
            seen = (every <= column[:, None]) & (every >= cache.start[:, None, None])
            seen |= every == column[:, None]  # padding sees itself: an empty row would be NaN
        elif segments is not None:  # packed rows: a token sees the earlier ones of its own example
            seen = (segments[:, :, None] == segments[:, None, :]) & (column <= column[:, None])
        if positions is None:
            positions = column[None]
        x = self.embed_tokens(ids)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        cos, sin = self.cos[positions][:, :, None].to(x.dtype), self.sin[positions][:, :, None].to(x.dtype)  # (B, T, 1, d)
        mask = None if seen is None else torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, -math.inf)[:, None]  # (B, 1, T, S)
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False) if recompute else layer(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def head(self, h):
        """Logits (..., V) of hidden states (..., D)."""
        return self.lm_head(h)

    def forward(self, ids, positions=None, segments=None, cache=None):
        """Next-token logits (B, T, V) of ids (B, T).

        positions (B, T): rotary positions, 0.. by default. segments (B, T): number of the packed example that
        a token belongs to; tokens of different segments do not see one another. cache: a KVCache, which gives
        the positions and is advanced by T. Raises ValueError beyond the context length.
        """
        return self.head(self.hidden(ids, positions, segments, cache))


# ------------------------------------------------------------------------------------------- sampling

def nucleus(logits, temperature, top_p):
    """The sampling distribution: temperature, then the smallest set of tokens with mass >= top_p. logits (B, V).

    Returns probabilities (B, C) of C candidates, and which tokens these are (B, C), or None where they are all, in order.
    """
    p = (logits.float() if temperature == 1 else logits.float() / temperature).softmax(-1)
    if top_p >= 1:
        return p, None
    k, V, rows = 0, p.shape[1], slice(None)
    top, tokens = p[:, :0], torch.empty(len(p), 0, dtype=torch.long, device=p.device)
    while k < V and len(top[rows]):  # sorting all V is slow: 8 candidates, and 64 and so on for the rows that need them
        more = min(8 * k or 8, V) - k
        k, top, tokens = k + more, F.pad(top, (0, more)), F.pad(tokens, (0, more))
        top[rows], tokens[rows] = p[rows].topk(k)
        rows = (top.sum(-1) < top_p).nonzero()[:, 0]
    top = top.masked_fill(top.cumsum(-1) - top >= top_p, 0)  # cut where the mass before a token is enough
    return top / top.sum(-1, keepdim=True), tokens


def sampling_logprobs(logits, temperature=1.0, top_p=1.0):
    """The sampling distribution as log-probabilities of all tokens, (B, V)."""
    p, tokens = nucleus(logits, temperature, top_p)
    return (p if tokens is None else torch.zeros_like(logits, dtype=p.dtype).scatter_add(-1, tokens, p)).log()


def sample(logits, temperature, top_p, generator):
    """One token a row, and its log-probability under the distribution it was drawn from. logits (B, V) -> (B,), (B,)."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    p, tokens = nucleus(logits, temperature, top_p)
    cdf = p.cumsum(-1)
    u = torch.rand(len(logits), 1, device=logits.device, generator=generator) * cdf[:, -1:]
    # right=True skips cut tokens, whose step in the cdf has no height; the clamp guards u == the last step
    drawn = torch.searchsorted(cdf, u, right=True).clamp(max=p.shape[1] - 1)
    token = drawn if tokens is None else tokens.gather(1, drawn)
    return token[:, 0], p.gather(1, drawn)[:, 0].log()


@torch.no_grad()
def generate(model, prompts, n=1, max_new_tokens=128, temperature=1.0, top_p=1.0, end_ids=(), generator=None, on_token=None):
    """n samples of each prompt.

    prompts: lists of token ids, of any lengths. Each is prefilled once for all its samples; a row stops at the
    first token of `end_ids`, which is kept and counted; finished rows leave the batch. Temperature 0 is greedy.
    on_token(token) is called for each token of a single row (streaming); returning False stops.
    Returns, sample j of prompt i in row i*n + j: ids (N*n, max_new_tokens), zeros after a row's length;
    lengths (N*n,); logprobs (N*n, max_new_tokens) of the sampled tokens.
    Raises ValueError for an empty prompt or one that does not fit the context.
    """
    device = model.embed_tokens.weight.device
    context, longest = model.config.max_position_embeddings, max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} is empty")
    if longest >= context:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the context of {context}")
    steps = min(max_new_tokens, context - longest)
    start = torch.tensor([longest - len(p) for p in prompts], device=device)
    padded = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    cache = KVCache(model.config, start, model.embed_tokens.weight.dtype)
    logits = model.head(model.hidden(padded, cache=cache)[:, -1])  # (N, V)
    rows = torch.arange(len(prompts), device=device).repeat_interleave(n)
    if n > 1:
        cache, logits = cache.select(rows), logits[rows]

    ids = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), max_new_tokens, device=device)
    lengths = torch.full((len(rows),), steps, device=device)
    ends = torch.tensor(list(end_ids), device=device)
    active = torch.arange(len(rows), device=device)  # which result row each row of the batch belongs to
    done = torch.zeros_like(active, dtype=torch.bool)
    for t in range(steps):
        token, logprob = sample(logits, temperature, top_p, generator)
        going = active[~done]
        ids[going, t], logprobs[going, t] = token[~done], logprob[~done]
        if on_token is not None and on_token(token.item()) is False:
            lengths[:] = t + 1
            break
        ended = torch.isin(token, ends) & ~done
        lengths[active[ended]] = t + 1
        done |= ended
        if t % 4 == 3 or len(active) == 1:  # finished rows leave the batch, in lots: a move costs a copy of the cache
            left = int((~done).sum())
            if left == 0:
                break
            if left <= (0.8 if device.type == "cpu" else 0.5) * len(active):
                keep = (~done).nonzero()[:, 0]
                cache, active, token, done = cache.select(keep), active[keep], token[keep], done[keep]
        if t + 1 < steps:
            logits = model(token[:, None], cache=cache)[:, -1]
    return ids, lengths, logprobs


# ------------------------------------------------------------------------------------------- weights in and out

def stored(model):
    """{our parameter's name: {Hugging Face's name: the rows of it}}: their files hold in parts what is one matrix here."""
    c, parts = model.config, {}
    kv, mlp = c.num_key_value_heads * c.head_dim, c.intermediate_size
    split = {"qkv_proj": {"q_proj": c.num_attention_heads * c.head_dim, "k_proj": kv, "v_proj": kv},
             "gate_up_proj": {"gate_proj": mlp, "up_proj": mlp}}
    for name, p in model.named_parameters():
        full = "model." * (name != "lm_head.weight") + name
        fused = next((fused for fused in split if fused in name), None)
        parts[name] = {full: p} if fused is None else {
            full.replace(fused, part): rows for part, rows in zip(split[fused], p.split([*split[fused].values()]))}
    return parts


def save(model, dir, tokenizer=None):
    """Writes a model directory that `transformers` opens too; each file aside, then renamed: whole or not there."""
    dir, c, ends = Path(dir), model.config, getattr(tokenizer, "end_ids", [None])
    end = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    dir.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        tokenizer.save(dir)
    config = asdict(c) | end | {"bos_token_id": None, "architectures": [ARCHITECTURES[c.model_type]], "hidden_act": "silu",
                                "attention_bias": c.model_type == "qwen2", "mlp_bias": False, "use_sliding_window": False,
                                "torch_dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch.")}
    weights = {name: part.detach().cpu().contiguous() for parts in stored(model).values() for name, part in parts.items()}
    aside = dir / "model.safetensors.new"  # a folder: safetensors 0.8 writes to a hidden file of a random name, which a kill would leave
    shutil.rmtree(aside, ignore_errors=True)
    names = ("model.safetensors", "generation_config.json", "config.json")
    try:
        for name in names:
            (dir / f"{name}.tmp").unlink(missing_ok=True)  # no link in its place is followed
        (dir / "config.json.tmp").write_text(json.dumps(config, indent=2))
        (dir / "generation_config.json.tmp").write_text(json.dumps(end | {"do_sample": True, "temperature": 0.6, "top_p": 0.95}))
        aside.mkdir()
        save_file(weights, aside / "weights", {"format": "pt"})
        shutil.copymode(dir / "config.json.tmp", aside / "weights")  # safetensors 0.8 lets the owner alone read it
        os.replace(aside / "weights", dir / "model.safetensors.tmp")
        aside.rmdir()
        for name in names:
            with open(dir / f"{name}.tmp", "rb") as file:
                os.fsync(file.fileno())  # whole on the disk, before it has the name
            os.replace(dir / f"{name}.tmp", dir / name)
    finally:  # where the disk is full
        shutil.rmtree(aside, ignore_errors=True)
        for name in names:
            (dir / f"{name}.tmp").unlink(missing_ok=True)


def inspect(dir):
    """The model of a Hugging Face directory on the device "meta", without weights, and {tensor: (its file, its dtype)}.

    Raises ValueError, which names the file and the field or tensor, for what is not a whole dense Llama, Qwen2 or Qwen3."""
    dir = Path(dir)
    with blame(dir / "config.json") as path, torch.device("meta"):  # no memory or random numbers for what is replaced
        model = Transformer(_config(_read(path)))
    wanted = {name: [*part.shape] for parts in stored(model).values() for name, part in parts.items()}
    files, there, tied = {source := dir / "model.safetensors"}, {}, model.config.tie_word_embeddings
    if not source.exists() and (dir / "model.safetensors.index.json").exists():
        with blame(dir / "model.safetensors.index.json") as source:
            files = {dir / name for name in {*_read(source)["weight_map"].values()}}
            if outside := [path for path in files if path.parent != dir or path.suffix != ".safetensors"]:
                raise ValueError(f"{outside[0]} is no safetensors file of this directory")
    for path in sorted(files):
        with blame(path), safe_open(_regular(path), "pt") as file:
            for name in file.keys():
                if name.endswith("rotary_emb.inv_freq") or tied and name == "lm_head.weight":
                    continue  # old files hold what is computed, and a tied head twice
                shape, kind = wanted.get(name, "no such tensor"), file.get_slice(name).get_dtype()
                if (found := file.get_slice(name).get_shape()) != shape or kind not in FLOATS:
                    raise ValueError(f"tensor {name} is {kind} {found}, config.json describes {shape}")
                there[name] = path, FLOATS[kind]
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(f"{source}: tensor {missing[0]} is missing")
    return model, there


@torch.no_grad()
def load(dir, device=None, dtype=None) -> Transformer:
    """The model of a Hugging Face directory, on the GPU if there is one; dtype None: as stored (to train, torch.float32).

    Tensors go to the device and dtype in pieces of up to 16 MB: the peak of memory is little above the weights.
    Raises ValueError as `inspect` does."""
    with blame(f"device {device}"):
        device = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device  # it is there
    model, there = inspect(dir)
    model.make_angles("cpu")  # what is wrong with the tensors has shown itself before memory is taken
    empty = {name: torch.empty_like(p, device=device, dtype=dtype or there[[*stored(model)[name]][0]][1])
             for name, p in model.named_parameters()}
    model.load_state_dict(empty, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    for parts in stored(model).values():
        for name, part in parts.items():
            rows = max(1, 2 ** 22 // part[0].numel())
            for at in range(0, len(part), rows):
                with blame(path := there[name][0]), safe_open(path, "pt") as file:  # opened anew: what was read leaves memory
                    part[at:at + rows] = file.get_slice(name)[at:at + rows]
    return model.to(device)


@contextmanager
def blame(path):
    """What goes wrong in here is this file's fault."""
    try:
        yield path
    except Exception as error:
        raise ValueError(f"{path}: {str(error).partition(chr(10))[0]}".replace("\n", " ")[:500]) from None


def _regular(path):
    """The path, of a file: a pipe would never end, and a directory that was fetched may hold a link to a device."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    return path


def _read(path):
    if _regular(path).stat().st_size > 2 ** 25:
        raise ValueError("over 32 MB, which no model's is")
    return json.loads(path.read_text(encoding="utf-8"))


def _config(raw):
    raw = {name: value for name, value in raw.items() if value is not None}
    newer, older = ({name: value for name, value in raw.get(field, {}).items() if value is not None}
                    for field in ("rope_parameters", "rope_scaling"))  # of transformers 5, and 4
    rope = newer | older | {name: raw[name] for name in ("original_max_position_embeddings",) if name in raw}
    types = {each[name] for each in (newer, older) for name in ("rope_type", "type") if name in each}
    kind, architectures = raw.get("model_type"), raw.get("architectures", list(ARCHITECTURES.values()))
    bias = [name for name in ("attention_bias", "mlp_bias") if raw.get(name) and (kind, name) != ("qwen2", "attention_bias")]
    for what, refused in {
        f"model_type {kind!r} with architectures {architectures}": ARCHITECTURES.get(kind) not in architectures,
        f"rope_parameters {rope}": (len(types) > 1 or rope.get("partial_rotary_factor", 1) != 1
                                    or any(isinstance(value, dict) for value in rope.values())),
        "a sliding window": raw.get("use_sliding_window") or {*raw.get("layer_types", [])} - {"full_attention"},
        "quantization_config": raw.get("quantization_config"),
        f"{' and '.join(bias)} of a {kind}": bias,
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
    }.items():
        if refused:
            raise ValueError(f"{what} is not supported, only dense {', '.join(ARCHITECTURES.values())}")
    values = {"num_key_value_heads": raw.get("num_attention_heads"), "rope_theta": 1e4, "rms_norm_eps": 1e-6,
              "tie_word_embeddings": False} | ({"head_dim": 128} if kind == "qwen3" else {}) | raw | rope  # before: what absence means
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")} | {"rope_type": [*types, "default"][0]}
    values["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    for field in fields(Config):
        kinds = {int: (int,), float: (int, float), int | None: (int, type(None)), bool: (bool,)}.get(field.type)
        value, largest = values.get(field.name), 1e12 if field.type is float else 1000 if field.name == "num_hidden_layers" else 2 ** 20
        if kinds and (type(value) not in kinds or type(value) in (int, float) and not 0 < value <= largest):
            raise ValueError(f"{field.name} is {value!r}")
    return Config(**{field.name: values[field.name] for field in fields(Config) if field.name in values})


def main():
    import chat  # the terminal's side of it
    chat.main()


if __name__ == "__main__":
    main()

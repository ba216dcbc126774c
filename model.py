"""A decoder-only transformer of the Llama family, its KV cache, sampling, and weights in and out.

Llama, Qwen2 (bias on q, k, v) and Qwen3 (norm on each head's q and k) are one architecture with three switches, all
read from Hugging Face's config.json. A directory written here opens in `transformers`, and their dense ones open here.

    python model.py DIR                          # chat in the terminal
    python model.py DIR --prompt "What is 2+3?"  # one answer

Shapes: B rows, T positions, S cached columns, D hidden size, H heads, K key/value heads, d head size, V vocabulary.
"""

import copy
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

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
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type {self.model_type!r} is not supported, only {', '.join(ARCHITECTURES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")


# ------------------------------------------------------------------------------------------- norm and positions

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight, over the last dimension."""
    normalised = Normalise.apply(x, eps) if torch.is_grad_enabled() else x * inverse_rms(x, eps)
    return normalised * weight.to(x.dtype)


def inverse_rms(x, eps):
    wide = torch.promote_types(x.dtype, torch.float32)  # bf16 squares lose too much
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)


class Normalise(torch.autograd.Function):
    """y = x s with s = inverse_rms(x). Its gradient s (g - y mean(y g)) by hand takes half of autograd's passes."""

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


def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x_i, x_{i+d/2}) by its position's angle. sin has the minus of the left half."""
    left, right = x.chunk(2, dim=-1)  # the rotate-half pairing of Hugging Face's checkpoints
    return torch.addcmul(x * cos, torch.cat((right, left), dim=-1), sin)


def rope_frequencies(c: Config):
    """The angle per position of each of the d/2 pairs, and a factor for cos and sin; rope_scaling slows them."""
    pair = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim
    frequency = c.rope_theta ** -pair  # (d/2,)
    scaling = c.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "default":
        return frequency, 1.0
    factor = scaling["factor"]
    first_context = scaling.get("original_max_position_embeddings", c.max_position_embeddings)
    if scaling["rope_type"] == "linear":
        return frequency / factor, 1.0
    if scaling["rope_type"] == "llama3":  # by a pair's turns within the first context
        turns = first_context * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequency + (1 - kept) * frequency / factor, 1.0
    if scaling["rope_type"] == "yarn":
        slowed, scale = yarn(c, scaling, factor, first_context)
        return (1 - slowed) * frequency + slowed * frequency / factor, scale
    raise ValueError(f"rope scaling {scaling['rope_type']!r} is not supported: linear, llama3 and yarn are")


def yarn(c: Config, scaling, factor, first_context):
    """How much each pair is slowed (d/2,), 0 to 1, and the factor for cos and sin (arXiv 2309.00071)."""
    def pair_that_turns(times):  # its index, a fraction; within the first context
        return c.head_dim * math.log(first_context / (times * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    def attention_scale(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    low, high = pair_that_turns(scaling.get("beta_fast", 32)), pair_that_turns(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    width = 0.001 if high == low else high - low
    pair = torch.arange(c.head_dim // 2, dtype=torch.float32, device="cpu")
    slowed = ((pair - low) / width).clamp(0, 1)
    scale = attention_scale(1)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        scale = attention_scale(scaling["mscale"]) / attention_scale(scaling["mscale_all_dim"])
    return slowed, scaling.get("attention_factor", scale)


# ------------------------------------------------------------------------------------------- attention and MLP

class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.num_attention_heads
        self.kv_heads = c.num_key_value_heads
        self.head_dim = c.head_dim
        outputs = (self.heads + 2 * self.kv_heads) * c.head_dim  # one matrix: three small products are slower
        self.qkv_proj = nn.Linear(c.hidden_size, outputs, bias=c.model_type == "qwen2")
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        if c.model_type == "qwen3":
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        B, T, _ = x.shape
        H, K = self.heads, self.kv_heads
        qkv = self.qkv_proj(x).view(B, T, H + 2 * K, self.head_dim)  # (B, T, H + 2K, d)
        qk, v = qkv.split((H + K, K), dim=2)  # q and k stay side by side: half the operations
        if hasattr(self, "q_norm"):
            weight = torch.cat((self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(K, -1)))  # (H + K, d)
            qk = rms_norm(qk, weight, self.q_norm.eps)
        q, k = rotate(qk, cos, sin).transpose(1, 2).split((H, K), dim=1)  # (B, H, T, d), (B, K, T, d)
        v = v.transpose(1, 2)                                             # (B, K, T, d)
        if cache is not None:
            k, v = cache.update(layer, k, v)                              # (B, K, S, d)
        y = attend(q, k, v, mask)                                         # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attend(q, k, v, mask):
    """softmax(q k' / sqrt(d) + mask) v: q (B, H, T, d), k and v (B, K, S, d) -> (B, H, T, d).

    mask (B, 1, T, S): 0 where a query may look and -inf elsewhere, or None for plain causal attention.
    """
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    on_cpu = q.device.type == "cpu"
    if on_cpu and T * S <= 2 ** 18:
        return attend_on_cpu(q, k, v, mask)
    if T == 1:  # one new token: a group's query heads become the queries of its one key/value head
        q = q.reshape(B, K, H // K, d)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, 1, d)
    with torch.autocast(q.device.type, enabled=False):
        k = k.repeat_interleave(H // K, dim=1)  # (B, H, S, d)
        v = v.repeat_interleave(H // K, dim=1)
        wide = torch.float32 if on_cpu else q.dtype  # bf16's backward is 5x slower on a CPU
        if mask is not None:
            mask = mask.to(wide)
        y = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), attn_mask=mask, is_causal=mask is None)
        return y.to(q.dtype)


def attend_on_cpu(q, k, v, mask):
    """The same by hand: for short rows half the time of the CPU's fused kernel."""
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    if mask is None:
        mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    q = (q * d ** -0.5).reshape(B, K, H // K * T, d)  # a group's queries: the rows of one product with their key head
    scores = (q @ k.transpose(-1, -2)).view(B, H, T, S)
    weights = scores.add_(mask).softmax(-1)
    return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, d)


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


# ------------------------------------------------------------------------------------------- the model

class KVCache:
    """Keys and values of the tokens so far, (layers, B, K, capacity, d), rows left-padded so that all end together.

    `start` (B,) is each row's first real column: columns before it are padding and never looked at.
    Attention runs over the whole capacity: a slice would be copied at each product.
    """

    def __init__(self, config: Config, start, dtype):
        shape = (config.num_hidden_layers, len(start), config.num_key_value_heads, 0, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=start.device)
        self.v = torch.zeros(shape, dtype=dtype, device=start.device)
        self.start = start
        self.length = 0

    def reserve(self, columns):
        """Makes room for this many more columns; returns the capacity."""
        block = 32 if self.k.device.type == "cpu" else 256  # on a GPU each growth is a new recording (lab/graphs.py)
        blocks = math.ceil((self.length + columns - self.k.shape[3]) / block)
        if blocks > 0:
            self.k = F.pad(self.k, (0, 0, 0, blocks * block))  # one after the other: the old one is freed in between
            self.v = F.pad(self.v, (0, 0, 0, blocks * block))
        return self.k.shape[3]

    def columns(self, count):
        """Where the next tokens go."""
        return torch.arange(self.length, self.length + count, device=self.start.device)

    def update(self, layer, k, v):
        new = slice(self.length, self.length + k.shape[2])
        self.k[layer, :, :, new] = k
        self.v[layer, :, :, new] = v
        return self.k[layer], self.v[layer]

    def select(self, rows):
        """The cache of these rows (an index tensor, repeats allowed)."""
        selected = copy.copy(self)
        selected.k, selected.v, selected.start = self.k[:, rows], self.v[:, rows], self.start[rows]
        return selected


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
        self.make_angles(self.lm_head.weight.device)

    def make_angles(self, device):
        frequency, scale = rope_frequencies(self.config)
        position = torch.arange(self.config.max_position_embeddings, device=device).float()
        angle = torch.outer(position, frequency.to(device))
        cos, sin = angle.cos() * scale, angle.sin() * scale
        self.register_buffer("cos", torch.cat((cos, cos), dim=1), persistent=False)   # (max positions, d)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=1), persistent=False)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """As GPT-2: normal with std 0.02 at width 768, as 1/sqrt(width); less where it adds to the residual stream."""
        std = 0.02 * math.sqrt(768 / self.config.hidden_size)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.normal_(0, std / math.sqrt(2 * len(self.layers)), generator=generator)
            elif p.dim() == 2:
                p.normal_(0, std, generator=generator)
        return self

    def hidden(self, ids, positions=None, segments=None, cache=None):
        """The last layer's normed states (B, T, D), for callers to whom (B, T, V) is too large; see forward."""
        T = ids.shape[1]
        past = 0 if cache is None else cache.length
        if past + T > self.config.max_position_embeddings:
            raise ValueError(f"{past + T} tokens exceed the model's context of {self.config.max_position_embeddings}")

        # which columns each token sees (B, T, S), and its position (B, T)
        column = torch.arange(T, device=ids.device)
        seen = None  # plain causal attention
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

        x = self.embed_tokens(ids)  # (B, T, D)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        cos = self.cos[positions][:, :, None].to(x.dtype)  # (B, T, 1, d)
        sin = self.sin[positions][:, :, None].to(x.dtype)
        mask = None
        if seen is not None:
            mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, -math.inf)[:, None]  # (B, 1, T, S)
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            if recompute:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def head(self, h):
        """Logits (..., V) of hidden states (..., D)."""
        return self.lm_head(h)

    def forward(self, ids, positions=None, segments=None, cache=None):
        """Next-token logits (B, T, V) of ids (B, T).

        positions (B, T): rotary positions, 0.. by default. segments (B, T): the number of each token's packed example;
        it sees no other example. cache: a KVCache, which gives the positions and is advanced by T.
        """
        return self.head(self.hidden(ids, positions, segments, cache))


# ------------------------------------------------------------------------------------------- sampling

def nucleus(logits, temperature, top_p):
    """The sampling distribution: temperature, then the smallest set of tokens with mass >= top_p. logits (B, V).

    Returns the probabilities (B, C) of C candidates and their ids (B, C); ids None: all V tokens, in order.
    """
    p = (logits.float() if temperature == 1 else logits.float() / temperature).softmax(-1)
    if top_p >= 1:
        return p, None
    # sorting all V is slow: take the 8 likeliest, then 8 times as many for the rows where these fall short of top_p
    V = p.shape[1]
    k = min(8, V)
    top, tokens = p.topk(k)
    short = (top.sum(-1) < top_p).nonzero()[:, 0]
    while k < V and len(short):
        more = min(8 * k, V) - k
        top, tokens = F.pad(top, (0, more)), F.pad(tokens, (0, more))
        k += more
        top[short], tokens[short] = p[short].topk(k)
        short = (top.sum(-1) < top_p).nonzero()[:, 0]
    likelier = top.cumsum(-1) - top  # the mass before each candidate
    top = top.masked_fill(likelier >= top_p, 0)
    return top / top.sum(-1, keepdim=True), tokens


def sampling_logprobs(logits, temperature=1.0, top_p=1.0):
    """The sampling distribution as log-probabilities of all tokens, (B, V)."""
    p, tokens = nucleus(logits, temperature, top_p)
    if tokens is not None:
        p = torch.zeros_like(logits, dtype=p.dtype).scatter_add(-1, tokens, p)
    return p.log()


def sample(logits, temperature, top_p, generator):
    """One token per row and its log-probability in the distribution it was drawn from. logits (B, V) -> (B,), (B,)."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    p, tokens = nucleus(logits, temperature, top_p)
    cdf = p.cumsum(-1)
    u = torch.rand(len(logits), 1, device=logits.device, generator=generator) * cdf[:, -1:]
    # right=True skips cut tokens, whose step in the cdf has no height; the clamp guards u == the last step
    drawn = torch.searchsorted(cdf, u, right=True).clamp(max=p.shape[1] - 1)
    token = drawn if tokens is None else tokens.gather(1, drawn)
    return token[:, 0], p.gather(1, drawn)[:, 0].log()


def prefill(model, prompts):
    """Logits (N, V) after each prompt, and a cache that holds the prompts, left-padded."""
    device = model.embed_tokens.weight.device
    context = model.config.max_position_embeddings
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if min(lengths) == 0:
        raise ValueError(f"prompt {lengths.index(0)} is empty")
    if longest >= context:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the context of {context}")
    start = torch.tensor([longest - length for length in lengths], device=device)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    cache = KVCache(model.config, start, model.embed_tokens.weight.dtype)
    return model.head(model.hidden(ids, cache=cache)[:, -1]), cache


@torch.no_grad()
def generate(model, prompts, n=1, max_new_tokens=128, temperature=1.0, top_p=1.0, end_ids=(), generator=None,
             on_token=None):
    """n samples of each prompt.

    prompts: N lists of token ids, of any lengths. A row stops at the first token of `end_ids`, which is kept and
    counted. Temperature 0 is greedy. on_token(token) hears each token of a single row; False stops it.
    Returns, sample j of prompt i in row i*n + j: ids (N*n, max_new_tokens), zeros after a row's length;
    lengths (N*n,); logprobs (N*n, max_new_tokens) of the sampled tokens, in the distribution they were drawn from.
    """
    logits, cache = prefill(model, prompts)  # (N, V)
    device = logits.device
    rows = torch.arange(len(prompts), device=device).repeat_interleave(n)
    if n > 1:
        logits, cache = logits[rows], cache.select(rows)  # (N*n, V)

    steps = min(max_new_tokens, model.config.max_position_embeddings - cache.length)
    ids = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), max_new_tokens, device=device)
    lengths = torch.full((len(rows),), steps, device=device)
    ends = torch.tensor(list(end_ids), device=device)
    active = torch.arange(len(rows), device=device)  # which result row each row of the batch belongs to
    done = torch.zeros_like(active, dtype=torch.bool)
    for t in range(steps):
        # draw a token for each row of the batch
        token, logprob = sample(logits, temperature, top_p, generator)
        going = active[~done]
        ids[going, t] = token[~done]
        logprobs[going, t] = logprob[~done]
        if on_token is not None and on_token(token.item()) is False:
            lengths[:] = t + 1
            break
        ended = torch.isin(token, ends) & ~done
        lengths[active[ended]] = t + 1
        done |= ended
        # finished rows leave the batch, several at a time: a move costs a copy of the cache
        if t % 4 == 3 or len(active) == 1:
            left = (~done).nonzero()[:, 0]
            if len(left) == 0:
                break
            if len(left) <= (0.8 if device.type == "cpu" else 0.5) * len(active):
                cache = cache.select(left)
                active, token, done = active[left], token[left], done[left]
        # read the tokens
        if t + 1 < steps:
            logits = model(token[:, None], cache=cache)[:, -1]
    return ids, lengths, logprobs


# ------------------------------------------------------------------------------------------- weights in and out

def hf_tensors(model):
    """{our parameter: {Hugging Face's name: our rows of it}}: qkv_proj and gate_up_proj are several tensors there."""
    c = model.config
    q_rows = c.num_attention_heads * c.head_dim
    kv_rows = c.num_key_value_heads * c.head_dim
    fused = {"qkv_proj": {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows},
             "gate_up_proj": {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}}
    tensors = {}
    for name, parameter in model.named_parameters():
        full_name = name if name == "lm_head.weight" else f"model.{name}"
        matrix = name.split(".")[-2]  # layers.0.self_attn.qkv_proj.weight -> qkv_proj
        if matrix in fused:
            parts = parameter.split(list(fused[matrix].values()))
            tensors[name] = {full_name.replace(matrix, part): rows for part, rows in zip(fused[matrix], parts)}
        else:
            tensors[name] = {full_name: parameter}
    return tensors


def save(model, dir, tokenizer=None):
    """Writes a model directory that `transformers` opens too. A kill leaves each file whole, old or new."""
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        tokenizer.save(dir)
    end_ids = getattr(tokenizer, "end_ids", [None])
    end = {"eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids}
    kind = model.config.model_type
    config = asdict(model.config) | end | {
        "bos_token_id": None, "architectures": [ARCHITECTURES[kind]], "hidden_act": "silu",
        "attention_bias": kind == "qwen2", "mlp_bias": False, "use_sliding_window": False,
        "torch_dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch.")}
    sampling = end | {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    weights = {name: rows.detach().cpu().contiguous()
               for parts in hf_tensors(model).values() for name, rows in parts.items()}
    aside = dir / "saving.tmp"  # whole files are renamed out of it; the next save removes what a kill left
    if aside.is_symlink():
        aside.unlink()  # not followed
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        save_file(weights, aside / "model.safetensors", {"format": "pt"})
        (aside / "generation_config.json").write_text(json.dumps(sampling))
        (aside / "config.json").write_text(json.dumps(config, indent=2))
        shutil.copymode(aside / "config.json", aside / "model.safetensors")  # safetensors: readable by the owner alone
        for name in ("model.safetensors", "generation_config.json", "config.json"):
            with open(aside / name, "rb") as file:
                os.fsync(file.fileno())  # whole on the disk before it has its name
            os.replace(aside / name, dir / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_config(dir) -> Config:
    """The Config of a directory's config.json; lab/check_model.py diagnoses a broken one."""
    path = Path(dir) / "config.json"
    raw = present(json.loads(path.read_text(encoding="utf-8")))
    rope = present(raw.get("rope_parameters", {})) | present(raw.get("rope_scaling", {}))  # of transformers 5, and 4
    kind = raw["model_type"]
    if (raw.get("use_sliding_window") or set(raw.get("layer_types", [])) - {"full_attention"}
            or raw.get("mlp_bias") or (raw.get("attention_bias") and kind != "qwen2")
            or raw.get("hidden_act", "silu") not in ("silu", "swish")
            or raw.get("quantization_config") or rope.get("partial_rotary_factor", 1) != 1):
        raise ValueError(f"{path}: not a dense model of {', '.join(ARCHITECTURES)}: it would be computed wrong")

    values = {"num_key_value_heads": raw["num_attention_heads"], "head_dim": 128 if kind == "qwen3" else None,
              "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # defaults of absent fields
    values |= raw | rope
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    if "original_max_position_embeddings" in raw:
        scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    scaling["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    values["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    return Config(**{field.name: values[field.name] for field in fields(Config)})


def present(raw):
    return {name: value for name, value in raw.items() if value is not None}


def tensor_files(dir):
    """{tensor: the safetensors file that holds it}."""
    paths = [dir / "model.safetensors"]
    if not paths[0].exists():
        index = json.loads((dir / "model.safetensors.index.json").read_text(encoding="utf-8"))
        paths = {dir / name for name in index["weight_map"].values()}
    return {name: path for path in paths for name in safe_open(path, "pt").keys()}


@torch.no_grad()
def load(dir, device=None, dtype=None) -> Transformer:
    """The model of a Hugging Face directory, on the GPU if there is one; dtype None: as stored (for training, float32).

    Tensors go to the device and dtype in pieces of up to 16 MB: the peak of memory is little above the weights.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):  # no memory and no random numbers for what is replaced
        model = Transformer(read_config(dir))
    files = tensor_files(Path(dir))
    empty = {}
    for name, parts in hf_tensors(model).items():
        for part, rows in parts.items():
            if part not in files:
                raise ValueError(f"{dir}: tensor {part} is missing")
            stored = safe_open(files[part], "pt").get_slice(part)
            if stored.get_shape() != list(rows.shape):
                raise ValueError(f"{files[part]}: tensor {part} is {stored.get_shape()}, not {list(rows.shape)}")
        empty[name] = torch.empty_like(model.get_parameter(name), device=device, dtype=dtype or stored[:0].dtype)
    model.load_state_dict(empty, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    for parts in hf_tensors(model).values():
        for part, rows in parts.items():
            piece = max(1, 2 ** 22 // rows[0].numel())
            for i in range(0, len(rows), piece):  # opened for each piece: what was read leaves memory
                rows[i:i + piece] = safe_open(files[part], "pt").get_slice(part)[i:i + piece]
    model.make_angles("cpu")
    return model.to(device)


def main():
    from lab import chat
    from lab.check_input import check_directory
    from tokenizer import Tokenizer
    parser, args = chat.parse_args()
    try:
        check_directory(args.dir)
        chat.chat(load(args.dir, args.device), Tokenizer(args.dir), generate, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

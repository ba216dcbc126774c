"""A decoder-only transformer of the Llama family, its KV cache, sampling, and weights in and out.

Llama, Qwen2 (bias on q, k, v) and Qwen3 (norm on each head's q and k) are one architecture with two switches, both
read from Hugging Face's config.json. `transformers` opens what `save` writes, and `load` what it writes of these.

    python model.py DIR                          # chat in the terminal
    python model.py DIR --prompt "What is 2+3?"  # one answer

Shapes: B rows, T positions, S columns of keys, D hidden size, H heads, K key/value heads, d head size, V vocabulary.
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
    rope_scaling: dict | None = None  # for a longer context: variants/rope_scaling.py

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type {self.model_type!r} is not supported, only {', '.join(ARCHITECTURES)}")


# ------------------------------------------------------------------------------------------- layers

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps) * weight, over the last dimension; in x's dtype, whatever the weight's."""
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotate(x, cos, sin):
    """RoPE: rotates each pair (x_i, x_{i+d/2}) by its position's angle; sin comes with its left half negated."""
    left, right = x.chunk(2, dim=-1)  # the rotate-half pairing of Hugging Face's checkpoints
    return torch.addcmul(x * cos, torch.cat((right, left), dim=-1), sin)


def rope_frequencies(c: Config):
    """The angle per position of each of the d/2 pairs, and a factor for cos and sin: 1, but for some scalings."""
    if c.rope_scaling is not None:
        raise ValueError(f"{c.rope_scaling} needs load(..., rope=scaled_frequencies) from variants/rope_scaling.py")
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim
    return c.rope_theta ** -exponent, 1.0


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        outputs = (self.heads + 2 * self.kv_heads) * c.head_dim  # one matrix: three small products are slower
        self.qkv_proj = nn.Linear(c.hidden_size, outputs, bias=c.model_type == "qwen2")
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        if c.model_type == "qwen3":
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        B, T, _ = x.shape
        H, K = self.heads, self.kv_heads
        qkv = self.qkv_proj(x).view(B, T, H + 2 * K, self.head_dim)
        q, k, v = qkv.split((H, K, K), dim=2)             # (B, T, H, d), (B, T, K, d), (B, T, K, d)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, d), (B, K, T, d), (B, K, T, d)
        if cache is not None:
            k, v = cache.update(layer, k, v)              # (B, K, S, d)
        y = self.attend(q, k, v, mask)                    # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v, mask):
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))  # (B, H, S, d)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


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
    """Keys and values of the tokens so far, (layers, B, K, S, d), rows left-padded so that all end together.

    `start` (B,) is each row's first real column: before it is padding (at most `padding`), which no real token sees.
    Attention runs over the whole capacity S, filled or not: its shape changes at every 32nd column only.
    """

    def __init__(self, config: Config, start, dtype, padding=0):
        shape = (config.num_hidden_layers, len(start), config.num_key_value_heads, 0, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=start.device) for _ in range(2))
        self.start, self.length, self.padding = start, 0, padding

    def reserve(self, count):
        """Makes room for `count` more columns; returns the capacity."""
        blocks = math.ceil((self.length + count - self.k.shape[3]) / 32)
        if blocks > 0:
            self.k = F.pad(self.k, (0, 0, 0, 32 * blocks))  # one at a time: the old k is freed before v is copied
            self.v = F.pad(self.v, (0, 0, 0, 32 * blocks))
        return self.k.shape[3]

    def columns(self, count):
        """The columns of the next tokens. (lab/graphs.py's cache returns a tensor that a CUDA graph can capture.)"""
        return torch.arange(self.length, self.length + count, device=self.start.device)

    def update(self, layer, k, v):
        new = slice(self.length, self.length + k.shape[2])
        self.k[layer, :, :, new], self.v[layer, :, :, new] = k, v  # hidden advances `length` after the last layer
        return self.k[layer], self.v[layer]

    def select(self, rows):
        """The cache of these rows (an index tensor, repeats allowed)."""
        selected = copy.copy(self)
        selected.k, selected.v, selected.start = self.k[:, rows], self.v[:, rows], self.start[rows]
        return selected


class Transformer(nn.Module):
    def __init__(self, config: Config, rope=rope_frequencies):
        super().__init__()
        self.config, self.rope = config, rope
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.make_angles(self.lm_head.weight.device)

    def make_angles(self, device):
        frequency, scale = self.rope(self.config)
        angle = torch.arange(self.config.max_position_embeddings, device=device).float().outer(frequency.to(device))
        cos, sin = angle.cos() * scale, angle.sin() * scale
        self.register_buffer("cos", torch.cat((cos, cos), dim=1), persistent=False)   # (max positions, d)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=1), persistent=False)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """As GPT-2: normal, std 0.02 at width 768, scaled as 1/sqrt(width); less in residual projections."""
        std = 0.02 * math.sqrt(768 / self.config.hidden_size)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.normal_(0, std / math.sqrt(2 * len(self.layers)), generator=generator)
            elif p.dim() == 2:
                p.normal_(0, std, generator=generator)
            elif name.endswith("bias"):
                p.zero_()
        return self

    def new_cache(self, start, padding=0):
        return KVCache(self.config, start, self.embed_tokens.weight.dtype, padding)

    def hidden(self, ids, positions=None, segments=None, cache=None):
        """The last layer's normed states (B, T, D), for callers that cannot afford (B, T, V); see forward."""
        T = ids.shape[1]
        past = 0 if cache is None else cache.length - cache.padding  # of the shortest row: generate ends longer ones
        if past + T > self.config.max_position_embeddings:
            raise ValueError(f"{past + T} tokens exceed the model's context of {self.config.max_position_embeddings}")
        # which columns each token sees (B, T, S), and its position (B, T)
        query = key = torch.arange(T, device=ids.device)  # the column of each token
        seen = None  # plain causal attention
        positions = query[None] if positions is None else positions
        if cache is not None:
            query = cache.columns(T)
            positions = query - cache.start[:, None]
            positions = positions.clamp(0, self.config.max_position_embeddings - 1)  # of padding; of ended rows
            key = torch.arange(cache.reserve(T), device=ids.device)
            seen = (key <= query[:, None]) & (key >= cache.start[:, None, None])
            seen |= key == query[:, None]  # padding sees itself: softmax of nothing is NaN
        elif segments is not None:  # packed rows: a token sees the earlier ones of its own example
            seen = (segments[:, :, None] == segments[:, None, :]) & (key <= query[:, None])

        x = self.embed_tokens(ids)  # (B, T, D)
        if torch.is_autocast_enabled(ids.device.type):  # the residual stream too is half as wide
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        cos, sin = (table[positions][:, :, None].to(x.dtype) for table in (self.cos, self.sin))  # (B, T, 1, d)
        mask = None if seen is None else torch.where(seen, 0.0, -math.inf).to(x.dtype)[:, None]  # (B, 1, T, S)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def head(self, h):
        """Logits (..., V) of hidden states (..., D)."""
        return self.lm_head(h)

    def forward(self, ids, positions=None, segments=None, cache=None):
        """Next-token logits (B, T, V) of ids (B, T).

        positions (B, T): rotary positions, 0.. by default. segments (B, T): which of a row's packed examples each token
        is of; it sees no other. cache: a KVCache, in place of both, which is advanced by T.
        """
        return self.head(self.hidden(ids, positions, segments, cache))


# ------------------------------------------------------------------------------------------- sampling

def nucleus(logits, temperature, top_p):
    """Top-p (nucleus) sampling's distribution: temperature, then the smallest set of tokens with mass >= top_p.

    logits (B, V) -> the probabilities (B, C) of C candidates and their ids (B, C); ids None: all V tokens, in order.
    """
    p = (logits if temperature == 1 else logits.float() / temperature).softmax(-1, dtype=torch.float32)
    if top_p >= 1:
        return p, None
    # sorting a large V is slow: take the 8 likeliest, then 8 times as many for the rows where these fall short of top_p
    V = p.shape[1]
    k = V if p.is_cuda and V <= 4096 else min(8, V)  # on a GPU a small V is sorted sooner than .any() waits
    top, tokens = p.topk(k)
    while k < V and (short := top.sum(-1) < top_p).any():
        more = min(8 * k, V) - k
        top, tokens = F.pad(top, (0, more)), F.pad(tokens, (0, more))
        k += more
        top[short], tokens[short] = p[short].topk(k)
    mass_before = top.cumsum(-1) - top
    top = top.masked_fill(mass_before >= top_p, 0)
    return top / top.sum(-1, keepdim=True), tokens


def sample(logits, temperature, top_p, generator):
    """One token per row and its log-probability in the distribution it was drawn from. logits (B, V) -> (B,), (B,)."""
    if temperature == 0 or top_p == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    p, tokens = nucleus(logits, temperature, top_p)
    cdf = p.cumsum(-1)
    u = torch.rand(len(logits), 1, device=logits.device, generator=generator) * cdf[:, -1:]
    # right=True never draws a token of probability 0; the clamp keeps the index in range where logits are NaN
    drawn = torch.searchsorted(cdf, u, right=True).clamp(max=p.shape[1] - 1)
    token = drawn if tokens is None else tokens.gather(1, drawn)
    return token[:, 0], p.gather(1, drawn)[:, 0].log()


def prefill(model, prompts):
    """Logits (N, V) after each prompt, and a cache that holds the prompts, left-padded."""
    device = model.embed_tokens.weight.device
    context = model.config.max_position_embeddings
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if not 0 < min(lengths) <= longest < context:
        raise ValueError(f"prompts of {min(lengths)} to {longest} tokens do not fit the context of {context}")
    start = torch.tensor([longest - length for length in lengths], device=device)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    cache = model.new_cache(start, padding=longest - min(lengths))
    return model.head(model.hidden(ids, cache=cache)[:, -1]), cache


@torch.no_grad()
def generate(model, prompts, n=1, max_new_tokens=128, temperature=1.0, top_p=1.0, end_ids=(), generator=None):
    """n samples of each prompt. Temperature 0 is greedy.

    prompts: N lists of token ids. A row ends with its first token of end_ids, included, or where its context ends.
    Returns, sample j of prompt i in row i*n + j: ids (N*n, max_new_tokens); lengths (N*n,); logprobs
    (N*n, max_new_tokens) in the distributions drawn from. After a row's end ids and logprobs are 0.
    """
    logits, cache = prefill(model, prompts)  # (N, V)
    device = logits.device
    rows = torch.arange(len(prompts), device=device).repeat_interleave(n)
    logits, cache = logits[rows], cache.select(rows)  # (N*n, V)

    room = model.config.max_position_embeddings - cache.length + cache.start  # (N*n,) tokens that still fit
    steps = min(max_new_tokens, model.config.max_position_embeddings - cache.length + cache.padding)
    ids = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), max_new_tokens, device=device)
    lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
    ends = torch.tensor(list(end_ids), device=device)
    active = torch.arange(len(rows), device=device)  # which result row each row of the batch belongs to
    done = torch.zeros_like(active, dtype=torch.bool)
    for t in range(steps):
        # draw a token for each row of the batch
        token, logprob = sample(logits, temperature, top_p, generator)
        ids[active, t] = token.masked_fill(done, 0)
        logprobs[active, t] = logprob.masked_fill(done, 0)
        lengths[active] += ~done
        done |= torch.isin(token, ends) | (room <= t + 1)
        # finished rows leave the batch, now and then: leaving copies the cache, and to check makes a GPU wait
        if t % (4 if device.type == "cpu" else 16) == 3 or len(active) == 1:  # a lone row: at every step
            live = (~done).nonzero()[:, 0]
            if len(live) == 0:
                break
            if len(live) <= 0.8 * len(active):
                cache = cache.select(live)
                active, token, done, room = active[live], token[live], done[live], room[live]
        # feed the tokens back
        if t + 1 < steps:
            logits = model(token[:, None], cache=cache)[:, -1]
    return ids, lengths, logprobs


# ------------------------------------------------------------------------------------------- weights in and out

def hf_tensors(model, named=None):
    """{Hugging Face's name: view} of the parameters, or of `named` {our name: tensor}; fused matrices are split."""
    c = model.config
    q_rows, kv_rows = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    fused = {"qkv_proj": {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows},
             "gate_up_proj": {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}}
    tensors = {}
    for name, parameter in (named or dict(model.named_parameters())).items():
        full_name = name if name == "lm_head.weight" else f"model.{name}"
        matrix = name.split(".")[-2]  # layers.0.self_attn.qkv_proj.weight -> qkv_proj
        if matrix in fused:
            for part, rows in zip(fused[matrix], parameter.split(list(fused[matrix].values()))):
                tensors[full_name.replace(matrix, part)] = rows
        else:
            tensors[full_name] = parameter
    return tensors


def save(model, dir, tokenizer=None):
    """Writes a model directory that `transformers` opens too."""
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
    weights = {name: rows.detach().cpu().contiguous() for name, rows in hf_tensors(model).items()}
    save_file(weights, dir / "model.safetensors", {"format": "pt"})
    (dir / "generation_config.json").write_text(json.dumps(sampling))
    (dir / "config.json").write_text(json.dumps(config, indent=2))


def without_none(raw):  # null is as absent
    return {name: value for name, value in raw.items() if value is not None}


def read_config(dir) -> Config:
    """The Config of a directory's config.json; lab/check_model.py diagnoses a broken one."""
    raw = json.loads(Path(dir, "config.json").read_text(encoding="utf-8"), object_hook=without_none)
    rope = raw.get("rope_parameters", {}) | raw.get("rope_scaling", {})  # transformers 5's, and 4's
    kind = raw["model_type"]
    if (raw.get("use_sliding_window") or set(raw.get("layer_types", [])) - {"full_attention"}
            or raw.get("mlp_bias") or (raw.get("attention_bias") and kind != "qwen2")
            or raw.get("hidden_act", "silu") not in ("silu", "swish")
            or raw.get("quantization_config") or rope.get("partial_rotary_factor", 1) != 1):
        raise ValueError(f"{dir}: a {kind} that this file would compute wrong")

    defaults = {"num_key_value_heads": raw["num_attention_heads"], "head_dim": 128 if kind == "qwen3" else None,
                "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    values = defaults | raw | rope  # rope last: transformers 5 keeps rope_theta there
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    if "original_max_position_embeddings" in raw:  # where longrope has it
        scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    scaling["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return Config(**{field.name: values[field.name] for field in fields(Config)})


@torch.no_grad()
def load(dir, device=None, dtype=None, rope=rope_frequencies) -> Transformer:
    """The model of a Hugging Face directory, on the GPU if there is one; dtype None: as stored (pass float32 to train);
    rope: what stands in place of rope_frequencies (variants/rope_scaling.py)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shards = sorted(Path(dir).glob("model*.safetensors"))
    files = {name: path for path in shards for name in safe_open(path, "pt").keys()}
    with torch.device("meta"):  # no memory and no random numbers for what is replaced
        model = Transformer(read_config(dir), rope)
    dtype = dtype or safe_open(shards[0], "pt").get_slice(next(iter(files)))[:0].dtype  # the first tensor's
    model.to(dtype).to_empty(device=device)
    if model.config.tie_word_embeddings:  # to_empty has made two of them
        model.lm_head.weight = model.embed_tokens.weight
    for name, rows in hf_tensors(model).items():
        shape = safe_open(files[name], "pt").get_slice(name).get_shape()
        if shape != list(rows.shape):
            raise ValueError(f"{files[name]}: tensor {name} is {shape}, not {list(rows.shape)}")
        piece = max(1, 2 ** 22 // rows[0].numel())  # 16 MB in fp32: the peak of memory is little above the weights
        for i in range(0, len(rows), piece):        # opened anew for each piece: closing it frees what was read
            rows[i:i + piece] = safe_open(files[name], "pt").get_slice(name)[i:i + piece]
    model.make_angles("cpu")  # the same values on every device
    return model.to(device)


def main():
    from lab import chat  # here, so that the model imports without the rest of the project
    chat.main(load, prefill, sample)


if __name__ == "__main__":
    main()

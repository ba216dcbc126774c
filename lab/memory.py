"""What saves a GPU's memory, and what a training takes of it.

    python -m lab.memory                          # the tables of docs/speed_and_memory.md and docs/own_model.md
    needed(sizes, memory, config, card=80e9)      # {what: Bytes}

What the model's size decides is exact: tests/test_memory.py counts it. What a batch decides is the most that it can
take. What torch, its kernels and recordings take beside is a number that a card has shown (results/gpu).

D hidden size, I that of the MLP, q and kv that of all query and of all key or value heads, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch

LOGITS_AT_ONCE = (2 ** 26, 2 ** 28)  # grpo.py's and sft.py's: on a CPU, on a GPU
SHARE = 1 / 20                       # lab/graphs.py's
OWN = 1.3e9                          # bytes beside the sum on the one card that was measured: 0.3 to 1.3 GB


@dataclass(frozen=True)
class Memory:
    """What saves a GPU's memory. The same training but for LoRA, which is another."""
    recompute: bool = False          # activations, a second time in the backward pass
    lora: int = 0                    # the rank of adapters that are trained in the weights' place
    lora_alpha: float = 32.0
    offload_optimizer: bool = False  # float32 weights and Adam's moments are the CPU's
    cache_tokens: int = 2 ** 18      # of a rollout that are sampled at once
    shard: bool = False              # weights, gradients and moments over torchrun's processes

    def __post_init__(self):
        if self.lora < 0:
            raise ValueError(f"lora {self.lora} must not be negative: it is the rank of adapters, 0 for none")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha {self.lora_alpha} must be positive and finite")
        if self.cache_tokens < 1:
            raise ValueError(f"cache_tokens {self.cache_tokens} must be positive")
        if self.lora and self.offload_optimizer:
            raise ValueError("offload_optimizer beside lora: adapters leave nothing to offload")
        if self.shard and self.offload_optimizer:
            raise ValueError("shard beside offload_optimizer: one of them decides where Adam's moments are")
        if self.shard and self.lora:
            raise ValueError("shard beside lora: adapters leave little to share out")

    def dtype(self, fast):
        """In which precision a model is loaded to be trained: float32, unless its weights are only computed with."""
        return getattr(torch, fast if self.lora or self.offload_optimizer else "float32")

    def check(self, config):
        """Raises ValueError for an RL's settings that mean nothing here."""
        if self.lora and config.offload_reference:
            raise ValueError("offload_reference beside lora: the reference has no weights of its own")


# ------------------------------------------------------------------------------------------- what a training takes

class Bytes(NamedTuple):
    """Of one kind of tensor: on the device at each of a training's heights, and in the CPU's memory beside a card."""
    sampling: int = 0
    scoring: int = 0
    update: int = 0
    host: int = 0


def always(count):
    return Bytes(count, count, count)


def needed(sizes, memory, config, prompt=256, card=0):
    """{what: Bytes} of a training of a model of these sizes: a model.Config, or anything with its fields.

    config: a GRPOConfig, or an SFTConfig, which only updates; prompt: tokens of the longest; card: bytes of the GPU's
    memory, 0: on a CPU.
    """
    terms = held(sizes, memory, config, card) | of_a_micro_batch(sizes, memory, config, prompt, card)
    if is_rl(config):
        terms |= of_a_lot(sizes, memory, config, prompt, card)
    if card:
        terms["torch's own, as measured"] = always(int(OWN))
    if not is_rl(config):
        terms = {what: Bytes(update=count.update, host=count.host) for what, count in terms.items()}
    return {what: count for what, count in terms.items() if any(count)}


def total(terms):
    """(bytes on the device at the highest, bytes in the CPU's memory beside it)"""
    *device, host = map(sum, zip(*terms.values()))
    return max(device), host


def is_rl(config):
    return hasattr(config, "group_size")


def half_of(config):
    """Bytes of a number that is computed with."""
    return 4 if config.dtype == "float32" else 2


def is_cast(memory, config):
    """Whether weights are float32 and computed with in half precision."""
    return half_of(config) == 2 and not memory.lora and not memory.offload_optimizer


def widths(s):
    """q, kv"""
    return s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim


def matrices(s):
    """(out, in) of a layer's qkv_proj, o_proj, gate_up_proj and down_proj."""
    (q, kv), D, I = widths(s), s.hidden_size, s.intermediate_size
    return [(q + 2 * kv, D), (D, q), (2 * I, D), (D, I)]


def tensors(s):
    """The numbers in each parameter of model.py's Transformer."""
    layer = [out * into for out, into in matrices(s)] + 2 * [s.hidden_size]
    if s.model_type == "qwen2":
        layer.append(matrices(s)[0][0])  # the bias of qkv_proj
    if s.model_type == "qwen3":
        layer += 2 * [s.head_dim]        # q_norm, k_norm
    ends = 1 if s.tie_word_embeddings else 2
    return s.num_hidden_layers * layer + ends * [s.vocab_size * s.hidden_size] + [s.hidden_size]


def trained(s, memory):
    """How many numbers are trained: all, or those in LoRA's A and B."""
    if memory.lora:
        return s.num_hidden_layers * sum(memory.lora * (out + into) for out, into in matrices(s))
    return sum(tensors(s))


def a_copy(s, memory, config):
    """Bytes of grpo.cast_copy's model, or of a recorded decoder's: LoRA's base is shared."""
    return half_of(config) * trained(s, memory) + angles(s)


def angles(s):
    """Bytes of cos and sin, float32, which each copy of a model has."""
    return 2 * 4 * s.max_position_embeddings * s.head_dim


def held(s, memory, c, card=0):
    """What is there all the time, but for gradients; exact."""
    half, numbers, copy, terms = half_of(c), sum(tensors(s)), a_copy(s, memory, c), {}
    is_half = memory.lora or memory.offload_optimizer
    terms["weights"] = always((half if is_half else 4) * numbers + angles(s))
    if memory.lora:
        terms["adapters"] = always(4 * trained(s, memory))
    if memory.offload_optimizer:
        terms["float32 weights"] = Bytes(host=4 * numbers + angles(s))
        terms["gradients"], terms["Adam's moments"] = Bytes(host=4 * numbers), Bytes(host=8 * numbers)
        sent = [half * count for count in tensors(s)]
        # torch rounds up pinned memory, tensor by tensor
        terms["weights and gradients on their way"] = Bytes(host=sum(map(power_of_two, sent) if card else sent))
    else:
        terms["gradients"] = Bytes(update=4 * trained(s, memory))
        terms["Adam's moments"] = always(8 * trained(s, memory))
    if is_rl(c) and c.beta > 0:
        is_away = c.offload_reference and card
        terms["reference"] = Bytes(scoring=copy, host=copy) if is_away else always(copy)
    if is_rl(c) and is_cast(memory, c):
        terms["sampler's copy"] = Bytes(copy)
    return terms


def of_a_micro_batch(s, memory, c, prompt, card):
    """Scoring's and an update's: what the layers keep, and the height of the way back."""
    half, L, D, I, (q, kv) = half_of(c), s.num_hidden_layers, s.hidden_size, s.intermediate_size, widths(s)
    if is_rl(c):
        length, learned = prompt + c.max_new_tokens, c.max_new_tokens  # of a row, in tokens
        rows = min(c.micro_batch_tokens // length, math.ceil(c.prompts_per_rollout * c.group_size / c.minibatches))
    else:
        length = learned = c.row_length
        rows = min(c.micro_batch_rows, c.batch_tokens // length)
    rows = max(1, rows)

    # a layer keeps: input and output of both norms; q and k rotated, what qkv_proj gave (v is a part of it; behind a
    # mask each query head has its own k and v), what attention gave; gate and up, silu(gate), their product
    states = 4 * D + (q + kv) + (q + 2 * kv if is_rl(c) else 2 * q) + q + 4 * I
    if not card:
        states += s.num_attention_heads * length  # attention's weights
    layer = half * rows * length * states
    kept = half * rows * length * D if memory.recompute else layer  # recompute: the layer's input
    terms = {"activations": Bytes(update=L * kept)}

    # autocast saves its casts for the backward pass: of adapters or matrices; half-precision weights need none
    cast = trained(s, memory) if memory.lora else L * sum(out * into for out, into in matrices(s))
    cast = 2 * cast if half == 2 and not memory.offload_optimizer else 0
    if not memory.recompute:
        terms["weights cast by autocast"] = Bytes(update=cast)

    # the head: logits of a piece in half precision, in float32, their log-softmax; on the way back the latter, its
    # gradient and the logits'. sft.py: the logits and their gradient in half precision, logits and softmax in float32
    logits = min(rows * learned, LOGITS_AT_ONCE[bool(card)] // s.vocab_size) * s.vocab_size
    forward, back = (half + 8) * logits, 12 * logits
    # its weights, where they are trained: a cast, a piece's gradient, and the sum of those so far
    head = 0 if memory.lora else s.vocab_size * D
    gradient = {"cast": 2, "piece": 2 + 4, "sum": 4} if is_cast(memory, c) else {"cast": 0, "piece": half, "sum": half}
    at_the_head = max(back + (gradient["cast"] + gradient["sum"]) * head, half * logits + sum(gradient.values()) * head)
    # a layer: its gradients; with recompute also its activations and casts. A tied head's sum waits for the embedding's
    in_a_layer = layer + gradient["sum"] * head + (layer + cast // L if memory.recompute else 0)
    scoring = max(layer, forward + gradient["cast"] * head)
    terms["logits, or a layer's gradients"] = Bytes(0, scoring, max(at_the_head, in_a_layer))
    return terms


def of_a_lot(s, memory, c, prompt, card):
    """Of what is sampled at once; on a GPU in the fixed memory of lab/graphs.py's decoder, with weights of its own."""
    half, longest = half_of(c), prompt + c.max_new_tokens
    rows = min(c.prompts_per_rollout, max(1, memory.cache_tokens // (c.group_size * longest))) * c.group_size
    token = 2 * s.num_hidden_layers * widths(s)[1] * half  # its keys and values
    room = rows * token * math.ceil(longest / 32) * 32
    terms = {"logits of a step": Bytes(rows * s.vocab_size * (half + 8)),  # the probabilities, their running sum
             # rows leave where four fifths or fewer stay, which are copied (growth copies half)
             "cache of the rows that stay": Bytes(4 * room // 5)}
    if not card:
        return terms | {"cache": Bytes(room)}
    fixed_rows, columns = power_of_two(rows), math.ceil(longest / 64) * 64
    decoder = a_copy(s, memory, c) + fixed_rows * token * columns
    # each recording, one for 64 columns, has logits of its own
    recorded = (math.ceil(c.max_new_tokens / 64) + 1) * fixed_rows * s.vocab_size * half
    is_kept = decoder <= SHARE * card
    made = {"recorded decoder and its cache": decoder, "recorded logits": recorded}
    return terms | {what: always(count) if is_kept else Bytes(count) for what, count in made.items()}


def power_of_two(count):
    """The next one, from count on."""
    return 1 << (count - 1).bit_length()


# ------------------------------------------------------------------------------------------- --memory

def report(sizes, memory, config, prompt=256):
    """The terms of a training on this machine, what is free, and the option that brings most where it does not fit."""
    free, card = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    terms = needed(sizes, memory, config, prompt, card)
    device, host = total(terms)
    unit, size = ("GB", 1e9) if device + host >= 1e9 else ("MB", 1e6)
    heads = [*Bytes._fields[:3], "CPU"]
    shown = [i for i, count in enumerate(zip(*terms.values())) if any(count)]

    def line(what, cells):
        return f"  {what:36}" + "".join(f"{cells[i]:>10}" for i in shown)

    def in_units(count):
        return f"{count / size:.2f}" if count else ""

    lines = [line(f"memory in {unit}, computed", heads)]
    for what, count in terms.items():
        lines.append(line(what, [in_units(n) for n in count]))
    lines.append(line("together", [in_units(sum(count)) for count in zip(*terms.values())]))
    places = [("GPU", device, free), ("CPU", host, free_of_cpu())] if card else [("CPU", device + host, free_of_cpu())]
    for i, (place, count, there) in enumerate(places):
        if there is None or count == 0:
            continue
        lines.append(f"  {place}: {count / size:.2f} {unit}, of {there / size:.2f} that are free")
        if count > there:
            options, less = best_remedy(sizes, memory, config, prompt, card, i)
            lines[-1] += f": does not fit; most brings {written(options)}, {less / size:.2f} {unit} less"
    return "\n".join(lines)


def free_of_cpu():
    """Bytes; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def best_remedy(sizes, memory, config, prompt, card, place=0):
    """({option: value}, bytes that it saves) of single options; place 1: in the CPU's memory beside the card."""
    remedies = [{"recompute": True}, {"offload_optimizer": True, "lora": 0},
                {"lora": 32, "offload_optimizer": False, "offload_reference": False}]
    if is_rl(config):
        remedies += [{"offload_reference": True, "lora": 0}, {"cache_tokens": max(1, memory.cache_tokens // 4)},
                     {"micro_batch_tokens": max(1, config.micro_batch_tokens // 4)}]
    else:
        remedies.append({"micro_batch_rows": max(1, config.micro_batch_rows // 4)})

    def taken(memory, config):
        device, host = total(needed(sizes, memory, config, prompt, card))
        return (device, host)[place] if card else device + host

    saved = [taken(memory, config) - taken(*with_options(memory, config, options)) for options in remedies]
    return remedies[saved.index(max(saved))], max(saved)


def with_options(memory, config, options):
    """(memory, config) with {field of either: value}; a field of neither is left out."""
    def changed(settings):
        return replace(settings, **{name: value for name, value in options.items() if hasattr(settings, name)})
    return changed(memory), changed(config)


def written(options):
    """As the command line takes them."""
    return " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                    for name, value in options.items() if value)


# ------------------------------------------------------------------------------------------- the tables of docs/

@dataclass(frozen=True)
class Defaults:
    """What of grpo.py's defaults for problem sets on a GPU is read here."""
    prompts_per_rollout: int = 16
    group_size: int = 16
    minibatches: int = 4
    max_new_tokens: int = 512
    micro_batch_tokens: int = 16384
    beta: float = 0.001
    offload_reference: bool = False
    dtype: str = "bfloat16"


def qwen(D, I, layers, heads, kv_heads, V=151936, positions=32768, tied=True):
    """Sizes of a Qwen2.5, from its published config.json."""
    return SimpleNamespace(
        vocab_size=V, hidden_size=D, intermediate_size=I, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=D // heads, max_position_embeddings=positions,
        tie_word_embeddings=tied, model_type="qwen2")


MODELS = {"Qwen2.5-0.5B": qwen(896, 4864, 24, 14, 2), "Qwen2.5-1.5B": qwen(1536, 8960, 28, 12, 2, positions=131072),
          "Qwen2.5-3B": qwen(2048, 11008, 36, 16, 2),
          "Qwen2.5-7B": qwen(3584, 18944, 28, 28, 4, V=152064, positions=131072, tied=False)}
CARDS = (8, 12, 16, 24, 48, 80)
LADDER = {  # the least invasive first
    "full": {}, "recompute": {"recompute": True},
    "+ reference": {"recompute": True, "offload_reference": True},
    "+ Adam": {"recompute": True, "offload_reference": True, "offload_optimizer": True},
    "LoRA": {"recompute": True, "lora": 32}}
SMALL = {"micro_batch_tokens": 4096, "cache_tokens": 2 ** 16}
SMALLEST = {"micro_batch_tokens": 1024, "cache_tokens": 2 ** 14}
CHOICES = [(name + more, LADDER[name] | sizes) for name in LADDER for more, sizes in (("", {}), (", small", SMALL))]
CHOICES += [(f"{name}, smallest", LADDER[name] | SMALLEST) for name in ("+ Adam", "LoRA")]
GSM8K = [("Qwen2.5-0.5B", "recompute"), ("Qwen2.5-0.5B", "LoRA"), ("Qwen2.5-1.5B", "+ reference"),
         ("Qwen2.5-1.5B", "LoRA"), ("Qwen2.5-3B", "+ Adam"), ("Qwen2.5-3B", "LoRA"), ("Qwen2.5-7B", "+ Adam"),
         ("Qwen2.5-7B", "LoRA")]


def least_invasive(sizes, card):
    """A cell: the first choice that fits, and GB: what is held all the time, and all at the highest."""
    for name, options in CHOICES:
        chosen = with_options(Memory(), Defaults(), options)
        highest, _ = total(needed(sizes, *chosen, card=card))
        if highest <= 0.9 * card:  # a tenth for CUDA itself, and for memory in pieces too small
            return f"{name}: {total(held(sizes, *chosen, card))[0] / 1e9:.1f} / {highest / 1e9:.1f}"
    return "none"


def row(cells):
    return f"| {' | '.join(cells)} |"


def fitting():
    """The lines of the table in docs/speed_and_memory.md."""
    lines = [row(["", *(f"{size} GB" for size in CARDS)]), row(["---"] * (len(CARDS) + 1))]
    for name, sizes in MODELS.items():
        lines.append(row([name, *(least_invasive(sizes, size * 10 ** 9) for size in CARDS)]))
    return lines


def commands():
    """The lines of that in docs/own_model.md."""
    lines = [row(["", "options", "GPU", "CPU"]), row(["---"] * 4)]
    for name, kind in GSM8K:
        chosen = with_options(Memory(), Defaults(), LADDER[kind])
        highest, host = total(needed(MODELS[name], *chosen, card=80 * 10 ** 9))
        lines.append(row([name, f"`{written(LADDER[kind])}`", f"{highest / 1e9:.0f} GB", f"{host / 1e9:.0f} GB"]))
    return lines


def main():
    print(*fitting(), "", *commands(), sep="\n")


if __name__ == "__main__":
    main()

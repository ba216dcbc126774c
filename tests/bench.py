"""Speed and memory: ours beside nanoGPT, transformers and TRL if installed, and beside the machine's limits.

    python tests/bench.py                               # ours, and the limits
    PEERS/bin/python tests/bench.py --nanogpt DIR       # the Python of an environment with transformers and trl
    python tests/bench.py --only decode grpo --repeats 9

The contenders of a race do the same work in turn, `--repeats` times; a figure is the median, a ratio is ours to the
best peer of the same run. The limit is what the matrix products of that work alone take at their own shapes, or reading
weights and cache once at the rate of a plain copy: the longer of the two. A share is limit / measured. Peak memory is
that of a separate process that does the work twice.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

import grpo
import model as ours
import sft
from lab import graphs
from lab.command import fast_dtype
from lab.layers import fast_layers

# 0.8M parameters and the world's vocabulary, as nanoGPT with 4 layers of 128
SMALL = dict(vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=2048)
# 135M
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, max_position_embeddings=2048)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = getattr(torch, fast_dtype(DEVICE))  # the limit's
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
if FAST == torch.float32:
    del DTYPES["bf16"]  # it would take ten times as long
NAMES = {"bf16": "bfloat16", "fp32": "float32"}


def has(module):
    return importlib.util.find_spec(module) is not None


def timed(run):
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_time(run, repeats=5, least=0.05):
    """Seconds of one call: the median of `repeats` series of at least `least` seconds."""
    run()
    count = max(1, int(least / timed(run)))

    def series():
        for _ in range(count):
            run()

    return statistics.median(timed(series) / count for _ in range(repeats))


# ------------------------------------------------------------------------------------------- the limits of the machine

def bandwidth():
    """Bytes a second that a plain copy reads and writes, of 256 MB."""
    x = torch.empty(64 * 2**20, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / median_time(lambda: y.copy_(x))


def matrices(c):
    """(in, out, how many) of the matrix products of one forward pass."""
    d, layers = c["hidden_size"], c["num_hidden_layers"]
    heads = c["num_attention_heads"] + 2 * c["num_key_value_heads"]
    queries_keys_values = heads * d // c["num_attention_heads"]
    return [(d, queries_keys_values, layers), (d, d, layers), (d, 2 * c["intermediate_size"], layers),
            (c["intermediate_size"], d, layers), (d, c["vocab_size"], 1)]


def product_seconds(c, rows, dtype, train=False):
    """What the model's matrix products alone take on so many rows; in training each has two more, for its gradients."""
    total = 0.0
    for i, o, count in matrices(c):
        x = torch.randn(rows, i, device=DEVICE).to(dtype)
        w = torch.randn(o, i, device=DEVICE).to(dtype)
        seconds = median_time(lambda: x @ w.t(), 3)
        if train:
            g = torch.randn(rows, o, device=DEVICE).to(dtype)
            seconds += median_time(lambda: g @ w, 3) + median_time(lambda: g.t() @ x, 3)
        total += count * seconds
    return total


def weights_bytes(c, size=2):
    return size * sum(i * o * count for i, o, count in matrices(c))


def cache_bytes(c, rows, length, size=2):
    head = c["hidden_size"] // c["num_attention_heads"]
    return 2 * size * rows * length * c["num_hidden_layers"] * c["num_key_value_heads"] * head


# ------------------------------------------------------------------------------------------- the contenders

def our_model(c, dtype=torch.float32):
    """With the layers that every command of the project uses."""
    model = ours.Transformer(ours.Config(**c)).init_weights(torch.Generator().manual_seed(0))
    return fast_layers(model.to(DEVICE, dtype)).eval()


def hf_model(c, dtype=torch.float32):
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**c, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
                                      pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE).eval()


def random_ids(c, rows, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, c["vocab_size"], (rows, length), generator=generator).to(DEVICE)


def adam_step(model, optimizer, backward):
    """A training step: gradients by backward(), clipped, applied."""
    def step():
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def train_ours(c, rows, length, dtype):
    model, ids = our_model(c), random_ids(c, rows, length + 1)
    micro_batches = ids.split(max(1, 2048 // length)) if DEVICE == "cpu" else [ids]  # as sft.py has them

    def backward():
        for rows in micro_batches:
            loss = sft.loss_sum(model, rows[:, :-1], None, None, rows[:, 1:], NAMES[dtype]) / ids[:, 1:].numel()
            loss.backward()
            loss.item()
    return adam_step(model, sft.adamw(model.parameters(), 1e-3, 0.1), backward)


def import_nanogpt(folder):
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_nanogpt(c, rows, length, dtype, compiled, folder):
    nanogpt = import_nanogpt(folder)
    config = nanogpt.GPTConfig(block_size=length, vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"],
                               n_head=c["num_attention_heads"], n_embd=c["hidden_size"], bias=False)
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        model = nanogpt.GPT(config).to(DEVICE)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), DEVICE)
    forward = torch.compile(model) if compiled else model
    ids = random_ids(c, rows, length + 1)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def backward():
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            _, loss = forward(x, y)
        loss.backward()
        loss.item()
    return adam_step(model, optimizer, backward)


def decode_ours(c, prompts, samples, prompt, new, dtype):
    model, ids = our_model(c, DTYPES[dtype]), random_ids(c, prompts, prompt).tolist()
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    return lambda: graphs.generate(model, ids, n=samples, max_new_tokens=new, generator=generator)


def decode_hf(c, prompts, samples, prompt, new, dtype):
    model, ids = hf_model(c, DTYPES[dtype]), random_ids(c, prompts, prompt)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                                  top_p=1.0, max_new_tokens=new, min_new_tokens=new, num_return_sequences=samples)


# A GRPO step: 256 sequences of 40 + 64 tokens, one update, with a reference
PROMPTS, GROUP, PROMPT, NEW = 16, 16, 40, 64


def is_even(text, _=None):
    """A reward that costs nothing and has both values."""
    return float(sum(map(ord, text)) % 2)


def grpo_ours(c, dtype, old_logprobs="sampler"):
    model, prompts = our_model(c), random_ids(c, PROMPTS, PROMPT).tolist()
    config = grpo.GRPOConfig(rollouts=1, prompts_per_rollout=PROMPTS, group_size=GROUP, minibatches=1,
                             max_new_tokens=NEW, beta=0.04, old_logprobs=old_logprobs, dtype=NAMES[dtype],
                             micro_batch_tokens=2048 if DEVICE == "cpu" else 65536)
    return lambda: grpo.train(model, prompts, encode=list, decode=str, generate=graphs.generate, end_ids=[],
                              rewards={"even": is_even}, config=config)


def grpo_trl(c, dtype):
    """Each call is one step of TRL's own trainer, which runs in a thread that waits at the start of each step."""
    import datasets
    import transformers
    import trl
    transformers.logging.disable_progress_bar()
    folder = tempfile.mkdtemp()
    hf_model(c).save_pretrained(folder)  # its reference is loaded from where the model was
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(HERE.parent / "data" / "tokenizer.json"), eos_token="<|end|>", pad_token="<|end|>")
    arguments = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=64, gradient_accumulation_steps=4, num_generations=GROUP,
        max_completion_length=NEW, beta=0.04, learning_rate=1e-4, temperature=1.0, top_k=0, top_p=1.0,
        generation_kwargs={"min_new_tokens": NEW}, bf16=dtype == "bf16", gradient_checkpointing=False,
        use_cpu=DEVICE == "cpu", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        max_steps=10**6)
    prompt = " ".join("7" * (PROMPT // 2))  # a digit and a space are a token each
    assert len(tokenizer(prompt)["input_ids"]) == PROMPT - 1
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class InStep(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            go.acquire()

        def on_step_end(self, *_, **__):
            done.release()

    trainer = trl.GRPOTrainer(
        model=folder, args=arguments, train_dataset=datasets.Dataset.from_dict({"prompt": [prompt] * 64}),
        processing_class=tokenizer, callbacks=[InStep()],
        reward_funcs=lambda completions, **_: [is_even(text) for text in completions])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step():
        go.release()
        done.acquire()
    return step


# ------------------------------------------------------------------------------------------- races

def train_race(c, rows, length, nanogpt):
    contenders = {f"ours {dtype}": partial(train_ours, c, rows, length, dtype) for dtype in DTYPES}
    if nanogpt:
        for dtype in DTYPES:
            contenders[f"nanoGPT {dtype}"] = partial(train_nanogpt, c, rows, length, dtype, False, nanogpt)
            contenders[f"nanoGPT {dtype} compiled"] = partial(train_nanogpt, c, rows, length, dtype, True, nanogpt)

    def limit():
        return product_seconds(c, rows * length, FAST, train=True)
    return "tokens/s", rows * length, contenders, limit


def decode_race(c, prompts, samples, prompt, new):
    rows = prompts * samples
    contenders = {}
    for dtype in DTYPES:
        contenders[f"ours {dtype}"] = partial(decode_ours, c, prompts, samples, prompt, new, dtype)
    if has("transformers"):
        for dtype in DTYPES:
            contenders[f"transformers {dtype}"] = partial(decode_hf, c, prompts, samples, prompt, new, dtype)

    def limit():  # a step multiplies all weights with all rows, and reads weights and cache once
        read = (weights_bytes(c) + cache_bytes(c, rows, prompt + new / 2)) / bandwidth()
        return new * max(product_seconds(c, rows, FAST), read)
    return "tokens/s", rows * new, contenders, limit


def grpo_race(c):
    contenders = {f"ours {dtype}": partial(grpo_ours, c, dtype) for dtype in DTYPES}
    fastest = next(iter(DTYPES))
    contenders[f"ours {fastest}, pi_old scored"] = partial(grpo_ours, c, fastest, old_logprobs="trainer")
    if has("trl"):
        for dtype in DTYPES:
            contenders[f"TRL {dtype}"] = partial(grpo_trl, c, dtype)

    def limit():
        tokens = PROMPTS * GROUP * (PROMPT + NEW)
        sampling = NEW * product_seconds(c, PROMPTS * GROUP, FAST)
        reference = product_seconds(c, tokens, FAST)
        return sampling + reference + product_seconds(c, tokens, FAST, train=True)
    return "steps/s", 1, contenders, limit


def races(nanogpt):
    """{name: function that gives (unit, work, {contender: make}, function of the limit in seconds)}"""
    found = {"train 64 x 128": partial(train_race, SMALL, 64, 128, nanogpt)}
    for rows in (1, 64, 256):
        found[f"decode {rows}"] = partial(decode_race, SMALL, rows, 1, PROMPT, NEW)
    found["decode 256 in groups of 16"] = partial(decode_race, SMALL, 16, 16, PROMPT, NEW)
    found["decode 1024"] = partial(decode_race, SMALL, 1024, 1, PROMPT, NEW)
    found["decode 32, SmolLM2-135M"] = partial(decode_race, SMOLLM2, 32, 1, PROMPT, 32)
    found["grpo"] = partial(grpo_race, SMALL)
    return found


def peak_megabytes(*which):
    """Of a separate process that does this twice; on a GPU, what torch allocated there."""
    result = subprocess.run([sys.executable, __file__, "--once", *which], capture_output=True, text=True)
    if result.returncode != 0:
        return result.stderr.strip().rpartition("\n")[2]
    return result.stdout.split()[-1]


def peak_bytes():
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # getrusage would count what the parent held when it started this process
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def once(make):
    run = make()
    run()
    run()
    print(round(peak_bytes() / 2**20), flush=True)
    os._exit(0)  # TRL's thread still waits


def race_seconds(contenders, repeats):
    """{contender: seconds of each turn}"""
    runs = {contender: make() for contender, make in contenders.items()}
    seconds = {contender: [] for contender in contenders}
    for run in runs.values():
        run()
        run()
    for _ in range(repeats):
        for contender, run in runs.items():
            seconds[contender].append(timed(run))
    return seconds


def best_peer(medians):
    """Its seconds; NaN where no peer is installed."""
    return min((s for contender, s in medians.items() if not contender.startswith("ours")), default=math.nan)


def show_race(name, make, repeats, nanogpt):
    unit, work, contenders, limit = make()
    seconds = race_seconds(contenders, repeats)
    medians = {contender: statistics.median(turns) for contender, turns in seconds.items()}
    best, least = best_peer(medians), limit()
    folder = ["--nanogpt", nanogpt] if nanogpt else []
    print(f"\n{name}\n  {'':26} {unit:>10}  {'lowest, highest':>21}  to best peer  of the limit  peak MB")
    for contender, s in medians.items():
        low, high = work / max(seconds[contender]), work / min(seconds[contender])
        to_best = "-" if math.isnan(best) else f"{best / s:.2f}x"
        memory = peak_megabytes(name, contender, *folder)
        print(f"  {contender:26} {work / s:10.4g}  {low:10.4g} {high:10.4g}  {to_best:>12}  {least / s:11.0%}  "
              f"{memory:>7}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nanogpt", help="a folder with nanoGPT's model.py")
    parser.add_argument("--only", nargs="+", default=[""], help="races whose name begins with one of these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    all_races = races(args.nanogpt)
    if args.once:
        name, contender = args.once
        once(all_races[name]()[2][contender])
    print_machine()
    wanted = tuple(args.only)
    for name, make in all_races.items():
        if name.startswith(wanted):
            show_race(name, make, args.repeats, args.nanogpt)
    os._exit(0)


def print_machine():
    device = f"{torch.get_num_threads()} threads, {platform.machine()}"
    if DEVICE == "cuda":
        device = torch.cuda.get_device_name()
    x = torch.randn(2048, 2048, device=DEVICE)
    rates = []
    for name, dtype in DTYPES.items():
        y = x.to(dtype)
        rates.append(f"{name} {2 * 2048**3 / median_time(lambda: y @ y) / 1e9:.0f} GFLOP/s")
    print(f"{device}, torch {torch.__version__}; matrix products of 2,048: {', '.join(rates)}; "
          f"a copy moves {bandwidth() / 1e9:.1f} GB/s", flush=True)


if __name__ == "__main__":
    main()

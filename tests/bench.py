"""Speed, memory and growth: ours beside nanoGPT, transformers and TRL where they are there, and beside the machine's own limits.

    python tests/bench.py                               # ours, and the limits
    PEERS/bin/python tests/bench.py --nanogpt DIR       # with the Python of an environment that has transformers and trl
    python tests/bench.py --only decode grpo --repeats 9

Contenders of a race do the same work in turn, `--repeats` times over; a figure is the median, a ratio is ours to the
peer's best setting, of the same run. The limit is what the matrix products of that work alone take at their own shapes,
or reading weights and cache once at the rate of a plain copy: the longer of the two. A share is limit / measured.
Peak memory is that of a process of its own that does the work twice.
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

import graphs
import grpo
import model as ours
import sft

SMALL = dict(vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=2048)  # 0.8M and the world's vocabulary, as nanoGPT's 4 layers of 128
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, max_position_embeddings=2048)  # 135M
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
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
    """Seconds of one call, the median of `repeats` lots of at least `least` seconds."""
    run()
    count = max(1, int(least / timed(run)))
    return statistics.median(timed(lambda: [run() for _ in range(count)]) / count for _ in range(repeats))


# ------------------------------------------------------------------------------------------- the limits of the machine

def bandwidth():
    """Bytes a second that a plain copy reads and writes, of 256 MB."""
    x = torch.empty(64 * 2**20, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / median_time(lambda: y.copy_(x))


def matrices(c):
    """(in, out, how many) of the matrix products of one forward pass."""
    d, head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    layers = c["num_hidden_layers"]
    return [(d, (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * head, layers), (d, d, layers),
            (d, 2 * c["intermediate_size"], layers), (c["intermediate_size"], d, layers), (d, c["vocab_size"], 1)]


def product_seconds(c, rows, dtype, train=False):
    """What the model's matrix products alone take on so many rows; in training each has two more, for its gradients."""
    total = 0.0
    for i, o, count in matrices(c):
        x, w = torch.randn(rows, i, device=DEVICE).to(dtype), torch.randn(o, i, device=DEVICE).to(dtype)
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
    return ours.Transformer(ours.Config(**c)).init_weights(torch.Generator().manual_seed(0)).to(DEVICE, dtype).eval()


def hf_model(c, dtype=torch.float32):
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**c, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE).eval()


def random_ids(c, rows, length):
    return torch.randint(1, c["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def adam_step(model, optimizer, backward):
    """A training step: gradients by backward(), clipped, applied."""
    def step():
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def train_ours(c, rows, length, dtype, compiled=False):
    model = our_model(c)
    for layer in model.layers if compiled else ():
        layer.compile()
    ids = random_ids(c, rows, length + 1)
    lots = ids.split(max(1, 2048 // length)) if DEVICE == "cpu" else [ids]  # sft.py's micro-batches

    def backward():
        for lot in lots:
            loss = sft.loss_sum(model, lot[:, :-1], None, None, lot[:, 1:], NAMES[dtype]) / ids[:, 1:].numel()
            loss.backward()
            loss.item()
    return adam_step(model, sft.make_optimizer(model, 1e-3, 0.1), backward)


def train_nanogpt(c, rows, length, dtype, compiled, folder):
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    sys.modules["nanogpt"] = nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        model = nanogpt.GPT(nanogpt.GPTConfig(block_size=length, vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"],
                                              n_head=c["num_attention_heads"], n_embd=c["hidden_size"], bias=False)).to(DEVICE)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), DEVICE)
    forward, ids = torch.compile(model) if compiled else model, random_ids(c, rows, length + 1)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def backward():
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            _, loss = forward(x, y)
        loss.backward()
        loss.item()
    return adam_step(model, optimizer, backward)


def decode_ours(c, prompts, samples, prompt, new, dtype):
    model, ids = our_model(c, DTYPES[dtype]), random_ids(c, prompts, prompt).tolist()
    generator, generate = torch.Generator(device=DEVICE).manual_seed(0), graphs.with_graphs(ours.generate)
    return lambda: generate(model, ids, n=samples, max_new_tokens=new, generator=generator)


def decode_hf(c, prompts, samples, prompt, new, dtype):
    model, ids = hf_model(c, DTYPES[dtype]), random_ids(c, prompts, prompt)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                  max_new_tokens=new, min_new_tokens=new, num_return_sequences=samples)


def prefill_ours(c, rows, length, dtype):
    model, ids = our_model(c, DTYPES[dtype]), random_ids(c, rows, length)
    start = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    return torch.no_grad()(lambda: model.head(
        model.hidden(ids, cache=ours.KVCache(model.config, start, DTYPES[dtype]))[:, -1]))


def prefill_hf(c, rows, length, dtype):
    model, ids = hf_model(c, DTYPES[dtype]), random_ids(c, rows, length)
    return torch.no_grad()(lambda: model(ids, use_cache=True, logits_to_keep=1))


PROMPTS, GROUP, PROMPT, NEW = 16, 16, 40, 64  # a GRPO step: 256 sequences of 40 + 64 tokens, one update, reference on, k3


def grpo_ours(c, dtype, compiled=False, old_logprobs="sampler"):
    model, prompts = our_model(c), random_ids(c, PROMPTS, PROMPT).tolist()
    for layer in model.layers if compiled else ():
        layer.compile(dynamic=True)
    config = grpo.GRPOConfig(rollouts=1, prompts_per_rollout=PROMPTS, group_size=GROUP, minibatches=1, max_new_tokens=NEW,
                             beta=0.04, old_logprobs=old_logprobs, dtype=NAMES[dtype],
                             micro_batch_tokens=2048 if DEVICE == "cpu" else 65536)
    return lambda: grpo.train(model, prompts, encode=list, decode=str, generate=graphs.with_graphs(ours.generate), end_ids=[],
                              rewards={"even": lambda text, _: float(sum(map(ord, text)) % 2)}, config=config)


def grpo_trl(c, dtype):
    """One step of TRL's own trainer a call: it runs in a thread that waits at the start of each."""
    import datasets
    import transformers
    import trl
    transformers.logging.disable_progress_bar()
    folder = tempfile.mkdtemp()
    hf_model(c).save_pretrained(folder)  # its reference is loaded from where the model was
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(HERE.parent / "data" / "tokenizer.json"),
                                                     eos_token="<|end|>", pad_token="<|end|>")
    arguments = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=64, gradient_accumulation_steps=4, num_generations=GROUP,
        max_completion_length=NEW, beta=0.04, learning_rate=1e-4, temperature=1.0, top_k=0, top_p=1.0,
        generation_kwargs={"min_new_tokens": NEW}, bf16=dtype == "bf16", gradient_checkpointing=False,
        use_cpu=DEVICE == "cpu", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, max_steps=10**6)
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
        reward_funcs=lambda completions, **_: [float(sum(map(ord, t)) % 2) for t in completions])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step():
        go.release()
        done.acquire()
    return step


# ------------------------------------------------------------------------------------------- races

def train_race(c, rows, length, nanogpt):
    peers = {f"nanoGPT {dtype}{' compiled' * compiled}": partial(train_nanogpt, c, rows, length, dtype, compiled, nanogpt)
             for dtype in DTYPES for compiled in (False, True)} if nanogpt else {}
    own = {f"ours {dtype}{' compiled' * compiled}": partial(train_ours, c, rows, length, dtype, compiled)
           for dtype, compiled in (("bf16", True), ("bf16", False), ("fp32", False))}
    return "tokens/s", rows * length, own | peers, lambda: product_seconds(c, rows * length, torch.bfloat16, train=True)


def decode_race(c, prompts, samples, prompt, new):
    rows = prompts * samples
    work = {f"{{}} {dtype}": (prompts, samples, prompt, new, dtype) for dtype in DTYPES}
    peers = {name.format("transformers"): partial(decode_hf, c, *w) for name, w in work.items()} if has("transformers") else {}

    def limit():  # a step multiplies all weights with all rows, and reads weights and cache once
        read = (weights_bytes(c) + cache_bytes(c, rows, prompt + new / 2)) / bandwidth()
        return new * max(product_seconds(c, rows, torch.bfloat16), read)
    return "tokens/s", rows * new, {name.format("ours"): partial(decode_ours, c, *w) for name, w in work.items()} | peers, limit


def prefill_race(c, rows, length):
    peers = {f"transformers {d}": partial(prefill_hf, c, rows, length, d) for d in DTYPES} if has("transformers") else {}
    return ("tokens/s", rows * length, {f"ours {d}": partial(prefill_ours, c, rows, length, d) for d in DTYPES} | peers,
            lambda: product_seconds({**c, "vocab_size": 0}, rows * length, torch.bfloat16))


def grpo_race(c):
    tokens = PROMPTS * GROUP * (PROMPT + NEW)
    own = {"ours bf16": partial(grpo_ours, c, "bf16"), "ours bf16 compiled": partial(grpo_ours, c, "bf16", True),
           "ours bf16, pi_old scored": partial(grpo_ours, c, "bf16", False, "trainer"), "ours fp32": partial(grpo_ours, c, "fp32")}
    peers = {f"TRL {d}": partial(grpo_trl, c, d) for d in DTYPES} if has("trl") else {}
    return "steps/s", 1, own | peers, lambda: (
        product_seconds(c, tokens, torch.bfloat16) + product_seconds(c, tokens, torch.bfloat16, train=True)
        + NEW * product_seconds(c, PROMPTS * GROUP, torch.bfloat16))


def races(nanogpt):
    """{name: what makes (unit, work, {contender: make}, seconds that the machine's limits allow)}"""
    decode = {f"decode {p * n}{f' in groups of {n}' if n > 1 else ''}": partial(decode_race, SMALL, p, n, PROMPT, NEW)
              for p, n in ((1, 1), (64, 1), (256, 1), (16, 16), (1024, 1))}
    return {"train 64 x 128": partial(train_race, SMALL, 64, 128, nanogpt), **decode,
            "decode 32, SmolLM2-135M": partial(decode_race, SMOLLM2, 32, 1, PROMPT, 32),
            "prefill 64 x 128": partial(prefill_race, SMALL, 64, 128), "grpo": partial(grpo_race, SMALL)}


def size(width, layers):
    return SMALL | dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                        num_attention_heads=width // 32, num_key_value_heads=width // 64)


def growth():
    """{what grows: [(its value, make)]}, one thing at a time."""
    sizes = {width: size(width, layers) for width, layers in ((64, 4), (128, 4), (256, 8), (512, 10))}
    million = {width: sum(i * o * n for i, o, n in matrices(c)) / 1e6 for width, c in sizes.items()}
    return {
        "decode: rows": [(n, partial(decode_ours, SMALL, n, 1, PROMPT, NEW, "bf16")) for n in (1, 4, 16, 64, 256, 1024)],
        "decode: new tokens, 64 rows": [(n, partial(decode_ours, SMALL, 64, 1, PROMPT, n, "bf16")) for n in (32, 128, 512, 1024)],
        "decode: M parameters, 64 rows": [(million[w], partial(decode_ours, c, 64, 1, PROMPT, NEW, "bf16")) for w, c in sizes.items()],
        "train: rows of 128": [(n, partial(train_ours, SMALL, n, 128, "bf16")) for n in (1, 4, 16, 64)],
        "train: length, 8,192 tokens": [(n, partial(train_ours, SMALL, 8192 // n, n, "bf16")) for n in (64, 256, 1024, 2048)],
        "train: M parameters, 16 x 128": [(million[w], partial(train_ours, c, 16, 128, "bf16")) for w, c in sizes.items()]}


def peak_megabytes(*which):
    """Of a process of its own that does this twice; on a GPU, what torch allocated there."""
    result = subprocess.run([sys.executable, __file__, "--once", *which], capture_output=True, text=True)
    return result.stdout.split()[-1] if result.returncode == 0 else result.stderr.strip().rpartition("\n")[2]


def peak_bytes():
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # getrusage would count what the parent held when it started this process
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def once(make):
    run = make()
    run(), run()
    print(round(peak_bytes() / 2**20), flush=True)
    os._exit(0)  # TRL's thread still waits


def show_race(name, make, repeats, nanogpt):
    unit, work, contenders, limit = make()
    runs, seconds = {contender: make() for contender, make in contenders.items()}, {contender: [] for contender in contenders}
    for run in runs.values():
        run(), run()
    for _ in range(repeats):
        for contender, run in runs.items():
            seconds[contender].append(timed(run))
    medians, least = {contender: statistics.median(s) for contender, s in seconds.items()}, limit()
    best = min(s for contender, s in medians.items() if not contender.startswith("ours")) if len(medians) > 3 else math.nan
    print(f"\n{name}\n  {'':26} {unit:>10}  {'lowest, highest':>21}  to best peer  of the limit  peak MB")
    for contender, s in medians.items():
        low, high = work / max(seconds[contender]), work / min(seconds[contender])
        memory = peak_megabytes(name, contender, *(["--nanogpt", nanogpt] if nanogpt else []))
        print(f"  {contender:26} {work / s:10.4g}  {low:10.4g} {high:10.4g}  {best / s:11.2f}x  {least / s:11.0%}  {memory:>7}", flush=True)


def show_growth(name, points, repeats):
    print(f"\n{name}\n  {'':10} {'seconds':>9}  slope  peak MB")
    before = None
    for value, make in points:
        run = make()
        run()
        seconds = statistics.median(timed(run) for _ in range(repeats))
        slope = math.log(seconds / before[1]) / math.log(value / before[0]) if before else math.nan
        print(f"  {value:10.4g} {seconds:9.4f}  {slope:5.2f}  {peak_megabytes(name, str(value)):>7}", flush=True)
        before = value, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nanogpt", help="a folder with nanoGPT's model.py")
    parser.add_argument("--only", nargs="+", default=[""], help="races and growths whose name begins with one of these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    all_races, chosen = races(args.nanogpt), lambda name: name.startswith(tuple(args.only))
    if args.once:
        name, which = args.once
        once(all_races[name]()[2][which] if name in all_races else {str(v): make for v, make in growth()[name]}[which])
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads, {platform.machine()}"
    x = torch.randn(2048, 2048, device=DEVICE)
    rates = {d: 2 * 2048**3 / median_time(lambda y=x.to(t): y @ y) / 1e9 for d, t in DTYPES.items()}
    print(f"{device}, torch {torch.__version__}; matrix products of 2,048: fp32 {rates['fp32']:.0f} GFLOP/s, bf16 "
          f"{rates['bf16']:.0f} GFLOP/s; a copy moves {bandwidth() / 1e9:.1f} GB/s")
    for name, make in all_races.items():
        if chosen(name):
            show_race(name, make, args.repeats, args.nanogpt)
    for name, points in growth().items():
        if chosen("growth " + name):
            show_growth(name, points, args.repeats)
    os._exit(0)


if __name__ == "__main__":
    main()

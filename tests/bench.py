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
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

import grpo
import model as ours
import sft

SMALL = dict(vocab_size=65, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=2048)  # 0.8M, as nanoGPT's of 4 layers, with its 65 characters
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, max_position_embeddings=2048)  # 135M
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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

def our_model(c, dtype=torch.float32, model_type="llama"):
    model = ours.Transformer(ours.Config(model_type=model_type, **c)).init_weights(torch.Generator().manual_seed(0))
    return model.to(DEVICE, dtype).eval()


def hf_model(c, dtype=torch.float32):
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**c, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE).eval()


def random_ids(c, rows, length):
    return torch.randint(1, c["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def train_ours(c, rows, length, dtype="bfloat16", micro_batch_tokens=2048):
    model = our_model(c)
    optimizer = sft.make_optimizer(model, 1e-3, 0.1)
    ids = random_ids(c, rows, length + 1)
    lots = ids.split(max(1, micro_batch_tokens // length)) if DEVICE == "cpu" else [ids]

    def step():
        for lot in lots:
            loss = sft.loss_sum(model, lot[:, :-1], None, None, lot[:, 1:], dtype) / ids[:, 1:].numel()
            loss.backward()
            loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def train_nanogpt(c, rows, length, dtype, compiled, folder):
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    sys.modules["nanogpt"] = nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    torch.manual_seed(0)
    with contextlib_redirect():
        model = nanogpt.GPT(nanogpt.GPTConfig(block_size=length, vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"],
                                              n_head=c["num_attention_heads"], n_embd=c["hidden_size"], dropout=0.0, bias=False))
        model.to(DEVICE)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), DEVICE)
    forward = torch.compile(model) if compiled else model
    ids = random_ids(c, rows, length + 1)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return step


def contextlib_redirect():
    import contextlib
    return contextlib.redirect_stdout(open(os.devnull, "w"))


def decode_ours(c, rows, prompt, new, dtype):
    model = our_model(c, DTYPES[dtype])
    prompts = random_ids(c, rows, prompt).tolist()
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    return lambda: ours.generate(model, prompts, max_new_tokens=new, generator=generator)


def decode_hf(c, rows, prompt, new, dtype):
    model, ids = hf_model(c, DTYPES[dtype]), random_ids(c, rows, prompt)
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                  max_new_tokens=new, min_new_tokens=new)


def prefill_ours(c, rows, length, dtype):
    model, ids = our_model(c, DTYPES[dtype]), random_ids(c, rows, length)

    @torch.no_grad()
    def run():
        cache = ours.KVCache(model.config, torch.zeros(rows, dtype=torch.long, device=DEVICE), DTYPES[dtype])
        model.head(model.hidden(ids, cache=cache)[:, -1])
    return run


def prefill_hf(c, rows, length, dtype):
    model, ids = hf_model(c, DTYPES[dtype]), random_ids(c, rows, length)

    @torch.no_grad()
    def run():
        model(ids, use_cache=True, logits_to_keep=1)
    return run


GRPO = dict(prompts=16, group=16, prompt=40, new=64)  # 256 sequences of 40 + 64 tokens; one update, reference on, k3


def grpo_vocab(c):
    return c | {"vocab_size": 1024}


def grpo_ours(c, dtype):
    model = our_model(grpo_vocab(c))
    prompts = random_ids(grpo_vocab(c), GRPO["prompts"], GRPO["prompt"]).tolist()
    config = grpo.GRPOConfig(rollouts=1, prompts_per_rollout=GRPO["prompts"], group_size=GRPO["group"], minibatches=1,
                             max_new_tokens=GRPO["new"], beta=0.04, dtype={"bf16": "bfloat16", "fp32": "float32"}[dtype])
    return lambda: grpo.train(model, prompts, encode=list, decode=lambda ids: str(ids), generate=ours.generate, end_ids=[],
                              rewards={"even": lambda text, _: float(sum(map(ord, text)) % 2)}, config=config)


def grpo_trl(c, dtype):
    """One step of TRL's own trainer a call: it runs in a thread that waits at the end of each."""
    import threading

    import datasets
    import transformers
    import trl
    folder = tempfile.mkdtemp()
    hf_model(grpo_vocab(c)).save_pretrained(folder)  # its reference is loaded from where the model was
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(HERE.parent / "data" / "tokenizer.json"),
                                                     eos_token="<|end|>", pad_token="<|end|>")
    arguments = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=64, gradient_accumulation_steps=4, num_generations=GRPO["group"],
        max_completion_length=GRPO["new"], beta=0.04, learning_rate=1e-4, temperature=1.0, top_k=0, top_p=1.0,
        generation_kwargs={"min_new_tokens": GRPO["new"]}, bf16=dtype == "bf16", gradient_checkpointing=False,
        use_cpu=DEVICE == "cpu", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, max_steps=10**6)
    prompt = " ".join("7" * (GRPO["prompt"] // 2))  # a digit and a space are a token each
    assert len(tokenizer(prompt)["input_ids"]) == GRPO["prompt"] - 1
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

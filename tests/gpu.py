"""What a CUDA GPU makes of this project: correctness beside the CPU, alone and under torchrun; speeds beside the card's
limits; the gpu preset.

    python tests/gpu.py                        # about 10 minutes on an H200; a table, and results/gpu/NAME.json
    python tests/gpu.py --only correct decode  # some parts
    python tests/gpu.py --json FILE            # elsewhere

Each part runs in a process of its own: one that fails does not stop the others, and makes the exit code 1. Without a
GPU everything runs in miniature on the CPU, and nothing is written unless --json says where.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import math
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lab  # noqa: E402, F401
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import grpo  # noqa: E402
import model as transformer  # noqa: E402
import sft  # noqa: E402
from lab import architectures, checkpoint, graphs, parallel  # noqa: E402
from lab.layers import CUDAExperts, SortedExperts, fast_layers, recompute  # noqa: E402
from lab.memory import Memory  # noqa: E402
from lab.sharding import shard, shard_estimator  # noqa: E402
from lab.trainee import Trainee  # noqa: E402
from pipeline import PRESETS, deepseek_sizes  # noqa: E402
from variants.ppo import PPO  # noqa: E402
from variants.prime import PRIME  # noqa: E402
from variants.v3_pretraining import Objective  # noqa: E402

ON_CARD = torch.cuda.is_available()
DEVICE = "cuda" if ON_CARD else "cpu"

WORLD = dict(vocab_size=1024, max_position_embeddings=512, **PRESETS["gpu"].model)
WORLD_OF_V3 = dict(vocab_size=1024, max_position_embeddings=512, **deepseek_sizes(**PRESETS["gpu"].model))
SHAPES = {
    "gpu preset": WORLD,
    "gpu preset, V3": WORLD_OF_V3,
    "SmolLM2-135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048),
    "Qwen2.5-0.5B": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=2048,
                         model_type="qwen2"),
    "Qwen2.5-1.5B": dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                         num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=2048,
                         model_type="qwen2"),
    "Qwen2.5-3B": dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                       num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=2048,
                       model_type="qwen2"),
    "Qwen2.5-7B": dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=2048,
                       model_type="qwen2", tie_word_embeddings=False)}
TINY = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256)
TINY_V3 = dict(model_type="deepseek_v3", vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
               moe_intermediate_size=64, n_group=4, topk_group=2, kv_lora_rank=16, qk_nope_head_dim=16,
               qk_rope_head_dim=8, v_head_dim=16, max_position_embeddings=256)
KINDS = {kind: TINY | {"model_type": kind} for kind in ("llama", "qwen2", "qwen3")} | {"deepseek_v3": TINY_V3}
if not ON_CARD:
    SHAPES = {name: KINDS[shape.get("model_type", "llama")] for name, shape in SHAPES.items()}

rows_of_part = []


def note(name, **figures):
    """A line of the table, which is also kept."""
    rows_of_part.append({"name": name} | figures)
    print(f"  {name:34} " + "  ".join(f"{key} {show(value)}" for key, value in figures.items()), flush=True)


def show(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def new_model(shape, device=DEVICE, dtype=torch.float32):
    torch.manual_seed(0)
    if shape.get("model_type") == "deepseek_v3":
        made = architectures.new_model(shape, torch.Generator().manual_seed(0))
        for router in made.routers():  # a bias that decides some choices
            router.e_score_correction_bias.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        return made.to(dtype).to(device).eval()
    with torch.device(device):
        made = transformer.Transformer(transformer.Config(**shape))
    return made.init_weights().to(dtype).eval()


def synchronize():
    if ON_CARD:
        torch.cuda.synchronize()


def seconds_of(run, repeats=3):
    """The median of one call's seconds; a first call warms up."""
    run()
    taken = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def peak_gigabytes():
    return torch.cuda.max_memory_allocated() / 1e9 if ON_CARD else math.nan


def random_ids(vocab_size, rows, length):
    return torch.randint(1, vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- correctness

failed = []


def check(name, figure, limit, **more):
    """A figure that must not exceed its limit."""
    good = figure <= limit
    note(name, figure=float(figure), limit=float(limit), **more, verdict="ok" if good else "FAILED")
    if not good:
        failed.append(name)


def relative(a, b):
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


@contextlib.contextmanager
def catching(name):
    """One check that breaks does not stop the others."""
    try:
        yield
    except Exception as error:
        failed.append(name)
        note(name, verdict=f"FAILED: {type(error).__name__}: {str(error)[-700:]}")


def correct():
    """The card beside the CPU in float32; recorded beside plain decoding; a resumed training; the line on memory."""
    for kind in KINDS:
        with catching(f"{kind}: model"):
            compare_model(kind)
    with catching("experts"):
        compare_experts()
    for name in ("GRPO, V3", "SFT, V3"):
        with catching(name):
            compare_update(name, Memory(), TINY_V3)
    for name in ("GRPO", "PPO", "PRIME", "SFT"):
        for memory in MEMORIES:
            if memory.offload_optimizer and name in ("PPO", "PRIME"):
                continue
            with catching(f"{name}, {how(memory)}"):
                compare_update(name, memory, TINY)
    for name, compare in (("resume", compare_resumed), ("resume, V3", partial(compare_resumed, TINY_V3)),
                          ("half precision", compare_half), ("memory", out_of_memory), ("smoke recipe", smoke)):
        with catching(name):
            compare()


def compare_update(name, memory, shape):
    a, b = (updated(name, device, memory, shape) for device in ("cpu", DEVICE))
    start = flat(new_model(shape, "cpu"))
    check(f"{name}, {how(memory)}: update beside the CPU's", relative(b - start, a - start), 0.02)


def compare_model(kind):
    plain = new_model(KINDS[kind], "cpu")
    fast = fast_layers(copy.deepcopy(plain).to(DEVICE))
    ids = random_ids(96, 4, 60)
    with torch.no_grad():
        check(f"{kind}: logits beside the CPU's", relative(fast(ids.to(DEVICE)), plain(ids)), 1e-5)
        segments = torch.tensor([1] * 20 + [2] * 30 + [0] * 10).expand(4, 60)
        packed = fast(ids.to(DEVICE), segments=segments.to(DEVICE))[:, :50]
        check(f"{kind}: packed logits", relative(packed, plain(ids, segments=segments)[:, :50]), 1e-5)
    prompts = [row[:length].tolist() for row, length in zip(ids, (5, 9, 3, 9))]
    settings = dict(n=8, max_new_tokens=150, end_ids=[7, 8])
    theirs = transformer.generate(plain, prompts, temperature=0.0, **settings)
    ours = graphs.generate(fast, prompts, temperature=0.0, **settings)
    different = (ours[0].cpu() != theirs[0]).any(1).float().mean()
    check(f"{kind}: rows of other greedy tokens", different, 0.05)
    if ON_CARD:
        settings = dict(n=8, max_new_tokens=150, temperature=1.0)
        plain_ids, recorded_ids = (
            generate(fast, prompts, generator=torch.Generator(device=DEVICE).manual_seed(0), **settings)[0]
            for generate in (transformer.generate, graphs.generate))
        different = (plain_ids != recorded_ids).any(1).float().mean()
        check(f"{kind}: recorded rows of other samples", different, 0.05)


def compare_experts():
    """All experts in one kernel beside one after the other, in bfloat16: value and gradients."""
    experts = new_model(SHAPES["gpu preset, V3"]).layers[-1].mlp.experts
    E, _, D = experts.gate_up_proj.shape
    torch.manual_seed(0)
    x = torch.randn(1000, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    chosen, weights = torch.rand(1000, E, device=DEVICE).topk(2).indices, torch.rand(1000, 2, device=DEVICE)
    results = []
    for kind in (SortedExperts, CUDAExperts if ON_CARD else SortedExperts):
        experts.__class__ = kind
        with torch.autocast(DEVICE, torch.bfloat16):
            y = experts(x, chosen, weights)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *experts.parameters()])])
    for name, one_by_one, together in zip(("value", "gradient", "of gate and up", "of down"), *results):
        check(f"experts in one kernel: {name}", relative(together, one_by_one), 0.01)


def flat(model):
    return torch.cat([p.detach().float().cpu().flatten() for p in model.parameters()])


def canned(ids):
    """A generate that gives these completions; their log-probabilities do not count."""
    def generate(model, prompts, **_):
        device = next(model.parameters()).device
        lengths = torch.full((len(ids),), ids.shape[1], device=device)
        return ids.to(device), lengths, torch.full(ids.shape, -4.0, device=device)
    return generate


MEMORIES = (Memory(), Memory(lora=4), Memory(offload_optimizer=True))


def how(memory):
    """"in full", or by which of a small card's means."""
    if memory.lora:
        return f"LoRA {memory.lora}"
    return "Adam on the CPU" if memory.offload_optimizer else "in full"


class RandomTrainee(Trainee):
    """Of a model with random weights, which no directory holds."""

    def load(self):
        weights = {name: p for name, p in self.model.state_dict().items() if "lora_" not in name}
        plain = transformer.Transformer(self.model.config)
        plain.load_state_dict(weights)
        return plain.float()


def updated(name, device, memory=Memory(), shape=TINY, sharded=False):
    """The weights after one step of a method from the same weights and samples on this device."""
    trainee = RandomTrainee(fast_layers(new_model(shape, "cpu").to(device)), memory)
    model, ids = trainee.model, random_ids(96, 16, 24)
    if name.startswith("SFT"):
        if sharded:
            shard(model)
        objective = Objective() if architectures.is_deepseek(model) else None
        config = sft.SFTConfig(lr=1e-3, epochs=1, row_length=64, batch_tokens=4096, dtype="float32")
        sft.train(model, [(row.tolist(), 4) for row in ids], config, objective=objective,
                  **trainee.optimizer(sft.adamw))
        return flat(trainee.whole())
    config = grpo.GRPOConfig(rollouts=1, prompts_per_rollout=4, group_size=4, minibatches=1, warmup=1,
                             max_new_tokens=24, dtype="float32", beta=0.0 if name == "PRIME" else 0.01)
    estimators = {"PPO": partial(PPO, model, config), "PRIME": partial(PRIME, model, config, outcome="even")}
    estimator = estimators.get(name, lambda: None)()
    if sharded:
        shard(model)
        if estimator:  # after its copies of the model are made
            shard_estimator(estimator)
    grpo.train(model, [[5, 6, 7], [8, 9], [3], [4, 5]], encode=list, decode=str, generate=canned(ids), end_ids=[],
               rewards={"even": is_even}, config=config, advantage_estimator=estimator,
               **trainee.optimizer(grpo.adam))
    return flat(trainee.whole())


def is_even(text, _=None):
    return float(sum(map(ord, text)) % 2)


# One process with NCCL; two with gloo, since NCCL wants a card for each. Gloo cannot shard on a card: SIGSEGV.
TOGETHER = ((1, "nccl"), (2, "gloo"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def processes():
    """Under torchrun: updates beside the CPU's alone, plain and sharded; the smoke recipe; grpo.py."""
    for count, backend in TOGETHER:
        for name in ("GRPO", "PPO", "PRIME", "SFT"):
            with catching(f"{count} x {backend}, {name}"):
                compare_together(count, backend, name)
            if backend == "nccl":
                with catching(f"{count} x {backend}, {name}, sharded"):
                    compare_together(count, backend, name, sharded=True)
        with catching(f"{count} x {backend}, scripts"):
            scripts_together(count, backend)


def compare_together(count, backend, name, sharded=False):
    with tempfile.TemporaryDirectory() as dir:
        run_together(count, backend, "update", name, str(int(sharded)), f"{dir}/weights.safetensors")
        found = load_file(f"{dir}/weights.safetensors")["weights"]
    start = flat(new_model(TINY, "cpu"))
    check(f"{count} x {backend}, {name}{', sharded' if sharded else ''}: update beside the CPU's",
          relative(found - start, updated(name, "cpu") - start), 0.02)


def scripts_together(count, backend):
    with tempfile.TemporaryDirectory() as dir:
        run, out = f"{dir}/run", f"{dir}/grpo"
        started = time.time()
        run_together(count, backend, "script", "pipeline.py", "--preset", "smoke", "--out", run)
        note(f"{count} x {backend}: the smoke recipe", seconds=time.time() - started, verdict="ok")
        data = Path(dir, "problems.jsonl")
        data.write_text("".join(f'{{"question": "What is {i} + 1?", "answer": "{i + 1}"}}\n' for i in range(8)))
        run_together(count, backend, "script", "grpo.py", "--model", f"{run}/base", "--data", str(data), "--out", out,
                     "--rollouts", "2", "--max-new-tokens", "20")
        note(f"{count} x {backend}: grpo.py", verdict="ok")


def run_together(count, backend, *args):
    """Raises RuntimeError with the end of what it printed, where a process fails."""
    command = [*TORCHRUN, str(count), __file__, "--together", backend, *args]
    with tempfile.TemporaryFile("w+") as said:
        code = status_of(command, 100, stdout=said, stderr=said)
        said.seek(0)
        if code != 0:
            raise RuntimeError(f"{args[:3]}: {code}: {said.read()[-3000:]}")


def status_of(command, limit, **streams):
    """The exit code of a command; one that takes longer is killed with all that it has started."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"not over in {limit} s"


def together(backend, what, *args):
    """What one of torchrun's processes does: all are on one card, whatever their number."""
    os.environ["LOCAL_RANK"] = "0"
    if backend == "gloo":
        init_process_group = dist.init_process_group
        dist.init_process_group = lambda _, **settings: init_process_group("gloo", **settings)
    if what == "script":
        sys.argv = list(args)
        return runpy.run_path(args[0], run_name="__main__")
    name, sharded, path = args
    with parallel.processes():
        weights = updated(name, DEVICE, sharded=sharded == "1")
        if parallel.rank() == 0:
            save_file({"weights": weights}, path)


def compare_resumed(shape=TINY):
    """Four rollouts beside two and, after a resume, two more: the same weights, bit by bit."""
    def rollouts(count, dir=None):
        model = fast_layers(new_model(shape))
        config = grpo.GRPOConfig(rollouts=count, prompts_per_rollout=4, group_size=4, max_new_tokens=24, lr=1e-3)
        keep = checkpoint.Checkpointer(dir, every=0.0) if dir else None
        if keep:
            keep._has_time_for = lambda *_: True
        grpo.train(model, [[5, 6, 7], [8, 9], [3], [4, 5]], encode=list, decode=str, generate=graphs.generate,
                   end_ids=[7], rewards={"even": is_even}, config=config, save=keep and keep.save,
                   resume=keep and keep.resume)
        return flat(model)

    with tempfile.TemporaryDirectory() as dir:
        rollouts(2, dir)
        resumed = rollouts(4, dir)
    kind = shape.get("model_type", "llama")
    check(f"{kind}: a resumed training's weights", (resumed != rollouts(4)).float().mean(), 0.0)


def compare_half():
    """What half precision costs at the gpu preset's shape: logits, and the gap between sampler and trainer."""
    ids = random_ids(96, 8, 100).to(DEVICE)
    for dtype, limit in (("float32", 1e-3), ("float16", 0.005), ("bfloat16", 0.02)):
        model = fast_layers(new_model(SHAPES["gpu preset"]))
        with torch.no_grad():
            exact, dtype_of = model(ids), getattr(torch, dtype)
            with torch.autocast(DEVICE, dtype_of, dtype != "float32"):
                check(f"{dtype} logits beside float32's", relative(model(ids), exact), 2 * limit,
                      norm_dtype=str(model.norm(model.embed_tokens(ids).to(dtype_of)).dtype))
        metrics = []
        config = grpo.GRPOConfig(rollouts=2, prompts_per_rollout=16, group_size=16, max_new_tokens=100, dtype=dtype)
        grpo.train(model, [[5, 6, 7], [8, 9], [3], [4, 5]], encode=list, decode=str, generate=graphs.generate,
                   end_ids=[7], rewards={"even": is_even}, config=config, log=lambda m, _: metrics.append(m))
        check(f"{dtype}: gap of sampler and trainer", metrics[0]["sampler_gap"], limit, kl=metrics[1]["kl"],
              overflow=sum(m["overflow"] for m in metrics), skipped=sum(m["skipped"] for m in metrics))


OUT_OF_MEMORY = """
import torch
from lab.command import Parser
with Parser(prog="test").one_line_errors():
    torch.empty(10 ** 14, dtype=torch.uint8, device={device!r})
"""


def out_of_memory():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + OUT_OF_MEMORY.format(device=DEVICE)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    good = result.returncode == 2 and "out of memory" in result.stderr and result.stderr.count("\n") == 1
    check("too little memory is one line", 0.0 if good else 1.0, 0.0, stderr=result.stderr[:150].strip())


def smoke():
    with tempfile.TemporaryDirectory() as dir:
        started = time.time()
        command = [sys.executable, "pipeline.py", "--preset", "smoke", "--device", DEVICE, "--seed", "100", "--out",
                   dir]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        check("the smoke recipe's exit code", result.returncode, 0, seconds=time.time() - started)
        if result.returncode:
            print(result.stdout[-1500:], result.stderr[-3000:])


# ------------------------------------------------------------------------------------------- speeds

def limits():
    """Bytes a second of a copy, read and written, and bf16 FLOPs a second of a large product."""
    size = 2 ** 28 if ON_CARD else 2 ** 22
    x = torch.empty(size, device=DEVICE)
    y = torch.empty_like(x)
    bandwidth = 8 * size / seconds_of(lambda: y.copy_(x))
    n = 8192 if ON_CARD else 512
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return bandwidth, 2 * n ** 3 / seconds_of(lambda: a @ b)


def decode():
    """Tokens a second, and the share of the time that reading weights and cache once a step would take."""
    bandwidth, rate = limits()
    note("the card", card=torch.cuda.get_device_name() if ON_CARD else "CPU", torch=torch.__version__,
         copy_TB_s=bandwidth / 1e12, bf16_TFLOP_s=rate / 1e12)
    plan = [("gpu preset", 64), ("gpu preset", 256), ("gpu preset", 1024), ("gpu preset, V3", 64),
            ("gpu preset, V3", 256), ("gpu preset, V3", 1024), ("SmolLM2-135M", 64), ("SmolLM2-135M", 256),
            ("SmolLM2-135M", 1024), ("Qwen2.5-0.5B", 64), ("Qwen2.5-0.5B", 256), ("Qwen2.5-0.5B", 1024),
            ("Qwen2.5-1.5B", 256)]
    for name, rows in plan:
        decode_shape(name, rows if ON_CARD else 4, bandwidth)


def decode_shape(name, rows, bandwidth):
    shape = SHAPES[name]
    model = fast_layers(new_model(shape, dtype=torch.bfloat16))
    prompt, new, n = (155, 200, 16) if ON_CARD else (8, 8, 2)
    if name.startswith("gpu preset") and ON_CARD:
        prompt, new = 60, 130
    prompts = random_ids(shape["vocab_size"], rows // n, prompt).tolist()
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    graphs.decoders.clear()
    if ON_CARD:
        torch.cuda.reset_peak_memory_stats()
    run = partial(graphs.generate, model, prompts, n=n, max_new_tokens=new, generator=generator)
    started = time.perf_counter()
    run()
    synchronize()
    first = time.perf_counter() - started
    taken = seconds_of(run, 2)
    weights = 2 * sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    cache = rows * (prompt + new / 2) * architectures.cache_bytes(model)
    note(f"decode {name}, {rows} rows", tokens_s=rows * new / taken, ms_a_step=1e3 * taken / new, first_s=first,
         of_bandwidth=new * (weights + cache) / bandwidth / taken, peak_GB=peak_gigabytes())


def train():
    """Tokens a second of next-token training, and 6 FLOPs a weight and token as a share of the measured bf16 rate."""
    _, rate = limits()
    for name, length, micro in (("gpu preset", 256, 32768), ("gpu preset, V3", 256, 32768),
                                ("SmolLM2-135M", 1024, 16384), ("Qwen2.5-0.5B", 1024, 16384),
                                ("Qwen2.5-1.5B", 1024, 8192)):
        for packed in (False, True):
            train_shape(name, length if ON_CARD else 32, micro if ON_CARD else 128, packed, rate)


def train_shape(name, length, tokens, packed, rate):
    shape = SHAPES[name]
    model = fast_layers(new_model(shape))
    if name == "Qwen2.5-1.5B":
        recompute(model)
    optimizer, loss_sum = sft.adamw(model.parameters(), 1e-3, 0.1), sft.loss_sum
    if architectures.is_deepseek(model):
        del model.mtp
    ids = random_ids(shape["vocab_size"], tokens // length, length + 1).to(DEVICE)
    segments = None
    if packed:
        segments = (torch.arange(length, device=DEVICE) // (length // 4)).expand(len(ids), length) + 1

    def step():
        loss_sum(model, ids[:, :-1], segments, None, ids[:, 1:], "bfloat16").div(tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if ON_CARD:
        torch.cuda.reset_peak_memory_stats()
    taken = seconds_of(step)
    weights = architectures.active_parameters(model)
    note(f"train {name}{', packed' if packed else ''}", tokens_s=tokens / taken,
         of_rate=6 * weights * tokens / taken / rate, peak_GB=peak_gigabytes())


def step():
    """A GRPO step of 256 x (155 + 200) tokens at 0.5B, with reference; beside TRL's with its own generate."""
    prompt, new, prompts, group = (155, 200, 16, 16) if ON_CARD else (8, 8, 2, 2)
    shape = SHAPES["Qwen2.5-0.5B"]
    model = fast_layers(new_model(shape))
    timings = []
    config = grpo.GRPOConfig(rollouts=3, prompts_per_rollout=prompts, group_size=group, minibatches=1,
                             max_new_tokens=new, beta=0.04, old_logprobs="sampler", micro_batch_tokens=16384)
    if ON_CARD:
        torch.cuda.reset_peak_memory_stats()
    grpo.train(model, random_ids(shape["vocab_size"], prompts, prompt).tolist(), encode=list, decode=str,
               generate=graphs.generate, end_ids=[], rewards={"even": is_even}, config=config,
               log=lambda m, _: timings.append((m["seconds"], m["sampling_seconds"], m["drift"])))
    taken, sampling, gap = timings[-1]
    weights = sum(p.numel() for p in model.parameters())
    note("GRPO step, 0.5B, ours", seconds=taken, sampling=sampling, first=timings[0][0], gap=timings[0][2],
         peak_GB=peak_gigabytes(), formula_GB=20 * weights / 1e9)
    del model
    graphs.decoders.clear()
    if ON_CARD and importlib.util.find_spec("trl"):
        torch.cuda.empty_cache()
        trl_step(shape, prompt, new, prompts, group, taken)


def trl_step(shape, prompt, new, prompts, group, ours):
    sys.path.insert(0, str(ROOT / "tests"))
    import bench
    import transformers
    config = transformers.Qwen2Config(**{key: value for key, value in shape.items() if key != "model_type"},
                                      tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    bench.PROMPTS, bench.GROUP, bench.PROMPT, bench.NEW = prompts, group, prompt + 1, new
    bench.hf_model = lambda c, dtype=torch.float32: transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.cuda.reset_peak_memory_stats()
    run = bench.grpo_trl(shape, "bf16")
    taken = seconds_of(run, 1)
    note("GRPO step, 0.5B, TRL", seconds=taken, ours_is_faster=taken / ours, peak_GB=peak_gigabytes())


def cards():
    """What fits a small card: GRPO of 64 x (155 + 300) tokens, recomputed, in micro-batches of 4,096 tokens."""
    full, lora, offload = Memory(recompute=True), Memory(True, lora=32), Memory(True, offload_optimizer=True)
    plan = [("Qwen2.5-0.5B", full), ("Qwen2.5-0.5B", offload), ("Qwen2.5-0.5B", lora), ("Qwen2.5-1.5B", full),
            ("Qwen2.5-1.5B", offload), ("Qwen2.5-1.5B", lora), ("Qwen2.5-3B", offload), ("Qwen2.5-3B", lora),
            ("Qwen2.5-7B", lora)]
    for name, memory in plan:
        with catching(f"{name}, {how(memory)}"):
            card_step(name, memory, "bfloat16")
    with catching("Qwen2.5-1.5B, LoRA 32, float16"):
        card_step("Qwen2.5-1.5B", lora, "float16")


def card_step(name, memory, dtype):
    prompt, new, prompts, group = (155, 300, 8, 8) if ON_CARD else (8, 8, 2, 2)
    graphs.decoders.clear()
    if ON_CARD:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainee = RandomTrainee(fast_layers(new_model(SHAPES[name], dtype=memory.dtype(dtype))), memory)
    sampling, rows = [], []

    def generate(*args, **settings):
        if ON_CARD:
            torch.cuda.reset_peak_memory_stats()
        result = graphs.generate(*args, **settings)
        sampling.append(peak_gigabytes())
        if ON_CARD:
            torch.cuda.reset_peak_memory_stats()
        return result

    config = grpo.GRPOConfig(rollouts=2, prompts_per_rollout=prompts, group_size=group, minibatches=4,
                             max_new_tokens=new, old_logprobs="sampler", micro_batch_tokens=4096, dtype=dtype)
    grpo.train(trainee.model, random_ids(90, prompts, prompt).tolist(), encode=list, decode=str, generate=generate,
               end_ids=[], rewards={"even": is_even}, config=config, **trainee.optimizer(grpo.adam),
               log=lambda m, _: rows.append((m["seconds"], m["sampling_seconds"], m["overflow"])))
    seconds, of_sampling, overflow = rows[-1]
    note(f"{name}, {how(memory)}, {dtype}", seconds=seconds, sampling=of_sampling, sampling_GB=sampling[-1],
         updates_GB=peak_gigabytes(), first=rows[0][0], overflow=overflow)


def recipe(stages="base,zero", limit=280):
    """The gpu preset's base and R1-Zero: seconds, and the share of problems solved."""
    preset = "gpu" if ON_CARD else "smoke"
    with tempfile.TemporaryDirectory() as dir:
        dir = Path(dir)
        command = [sys.executable, "pipeline.py", "--preset", preset, "--device", DEVICE, "--out", dir, "--seed", "100"]
        command += ["--stages", stages] if stages else []
        started = time.time()
        try:
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
            output = result.stdout + result.stderr
            check("the recipe's exit code", result.returncode, 0, seconds=time.time() - started)
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode()
            failed.append("recipe")
            note("recipe", verdict=f"FAILED: not over in {limit} s")
        print(output[-6000:])
        for name, seconds in json.loads((dir / "times.json").read_text())["stages"].items():
            stage = json.loads((dir / "results.json").read_text())["stages"].get(name, {})
            solved = stage.get("evaluation", {}).get("accuracy_any", [math.nan])[0]
            note(f"gpu preset: {name}", seconds=float(seconds), solved=solved)


# ------------------------------------------------------------------------------------------- the parts

PARTS = {"correct": (correct, 220), "processes": (processes, 280), "decode": (decode, 120), "train": (train, 100),
         "step": (step, 100), "recipe": (recipe, 300), "cards": (cards, 240)}


def run_part(name, path):
    """In a process of its own."""
    part, limit = PARTS[name]
    try:
        part()
        if failed:
            raise SystemExit(1)
    finally:
        Path(path).write_text(json.dumps(rows_of_part))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--json", help="where the figures go; default: results/gpu/NAME.json, where there is a GPU")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--together", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return run_part(*args.part)
    if args.together:
        return together(*args.together)
    found, bad, path = {}, [], args.json
    if path is None and ON_CARD:
        path = ROOT / "results" / "gpu" / (re.sub(r"\W+", "_", torch.cuda.get_device_name()) + ".json")
    for name in args.only:
        started = time.time()
        print(f"\n{name}: {PARTS[name][0].__doc__}", flush=True)
        with tempfile.TemporaryDirectory() as dir:
            figures = Path(dir) / "part.json"
            command = [sys.executable, __file__, "--part", name, str(figures)]
            code = status_of(command, PARTS[name][1])
            if code != 0:
                bad.append(name)
                print(f"  {name} FAILED: {code}", flush=True)
            found[name] = json.loads(figures.read_text()) if figures.exists() else []
        print(f"  ({time.time() - started:.0f} s)", flush=True)
        if path is not None:  # after each part: one that hangs costs its own figures alone
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(found, indent=1))
    print(f"\n{'failed: ' + ', '.join(bad) if bad else 'all parts went well'}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

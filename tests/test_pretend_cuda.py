"""The paths of a GPU, on a pretended one: no mix-up of devices, no hidden wait, nothing that cannot be recorded."""

import copy
import importlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch._dynamo  # noqa: F401  an optimizer imports it, for 2 seconds: here once, not in each fork

import distill
import evaluate
import gpu
import grpo
import model as transformer
import pipeline
import pretend_cuda
import sft
from data import search
from forked import run_forked
from lab import checkpoint, command, distill_script, graphs, measure
from lab.layers import fast_layers
from pretend_cuda import copies, waits
from runs import STAGES, killed_at_first_save, make, write
from test_offload import train_grpo, train_sft
from variants import ppo, prime
from variants.offload import step_on_cpu

PROMPTS = [[3, 5, 7, 9, 11], [2], [4, 4, 4], [8, 1, 8]]


def on_the_gpu(function, *args, **settings):
    """Runs function(*args) in a process that has a GPU, which must end well."""
    def program():
        pretend_cuda.install()
        function(*args)
    ended = run_forked(program, timeout=200, **settings)
    assert ended.status == 0, ended.stdout[-1000:] + ended.stderr
    return ended


# ------------------------------------------------------------------------------------------- the pretended GPU

def on_both():
    return torch.ones(3, 3), torch.ones(3, 3, device="cuda")


REFUSED = {
    "sum": lambda cpu, gpu: gpu + cpu,
    "product": lambda cpu, gpu: cpu @ gpu,
    "written in place": lambda cpu, gpu: cpu.add_(gpu),
    "a scalar written in place": lambda cpu, gpu: cpu[0, 0].add_(gpu[0, 0]),
    "joined": lambda cpu, gpu: torch.cat([gpu, cpu]),
    "chosen": lambda cpu, gpu: torch.where(gpu > 0, gpu, cpu),
    "gathered": lambda cpu, gpu: gpu.gather(0, cpu.long()),
    "assigned by an index": lambda cpu, gpu: gpu.__setitem__([0, 1], cpu[:2]),
    "indexed": lambda cpu, gpu: cpu[gpu.long()],
    "several": lambda cpu, gpu: torch._foreach_add([gpu], [cpu]),
    "a generator of the CPU": lambda cpu, gpu: gpu.exponential_(generator=torch.Generator()),
    "a generator of the GPU": lambda cpu, gpu: torch.rand(2, generator=torch.Generator(device="cuda")),
    "numpy": lambda cpu, gpu: gpu.numpy(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_devices_that_meet_are_refused(name):
    def program():
        with pytest.raises((RuntimeError, TypeError), match="device"):
            REFUSED[name](*on_both())
    on_the_gpu(program)


WAITED_FOR = {
    "item": lambda x: x[0, 0].item(), "a condition": lambda x: bool((x > 0).all()), "float": lambda x: float(x.sum()),
    "nonzero": torch.nonzero, "mask": lambda x: x[x > 0], "to a mask": lambda x: x.__setitem__(x > 0, x.new_ones(9)),
    "to the CPU": lambda x: x.cpu(), "to()": lambda x: x.to("cpu", torch.float64), "a list": lambda x: x.tolist(),
    "copy_": lambda x: torch.zeros(3, 3).copy_(x), "equal": lambda x: torch.equal(x, x + 1)}
COPIED = {
    "a list": lambda x: torch.tensor([1, 2], device=x.device), "to": lambda x: torch.ones(3).to(x.device),
    "cuda": lambda x: torch.ones(3).cuda(), "new_tensor": lambda x: x.new_tensor([1]), "index": lambda x: x[[0, 1]],
    "copy_": lambda x: x.copy_(torch.ones(3, 3)), "slice": lambda x: x.__setitem__(0, torch.ones(3))}
FREE = {
    "arithmetic": lambda x: (x * 2 + torch.tensor(3.0)).softmax(-1), "fill": lambda x: x.masked_fill(x > 0, 1),
    "a number by a mask": lambda x: x.__setitem__(x > 0, 0.0), "zeros": lambda x: torch.zeros_like(x) + x.new_zeros(3),
    "an index": lambda x: x[torch.arange(2, device=x.device)], "a copy": lambda x: x.to("cuda", torch.bfloat16)}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, cases in
                                        (("wait", WAITED_FOR), ("copy", COPIED), ("free", FREE)) for name in cases])
def test_a_wait_and_a_copy_are_counted_and_not_permitted_in_a_recording(kind, name):
    run = {"wait": WAITED_FOR, "copy": COPIED, "free": FREE}[kind][name]

    def program():
        x = torch.ones(3, 3, device="cuda")
        waits.clear(), copies.clear()
        run(x)
        assert (waits.total(), copies.total()) == (kind == "wait", kind == "copy"), (waits, copies)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            if kind == "free":
                run(x)
            else:
                with pytest.raises(RuntimeError, match="stream is capturing: tests/test_pretend_cuda"):
                    run(x)
    on_the_gpu(program)


def test_a_recording_repeats_its_operations_with_the_numbers_that_python_had():
    def program():
        x, number = torch.zeros(2, device="cuda"), 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2 + number
        number = 100
        x.fill_(5)
        graph.replay()
        assert y.tolist() == [11, 11] and number == 100
    on_the_gpu(program)


def test_a_backward_pass_and_adam_are_those_of_the_cpu(tiny):
    def trained(device):
        model = tiny().to(device)
        assert model.lm_head.weight is model.embed_tokens.weight
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        ids = torch.tensor([PROMPTS[0]], device=device)
        with torch.autocast(device, torch.bfloat16):
            assert model(ids).dtype == torch.bfloat16
        torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])

    def program():
        torch.testing.assert_close(trained("cuda"), trained("cpu"), atol=1e-5, rtol=0)
    on_the_gpu(program)


# ------------------------------------------------------------------------------------------- decoding

def decode(model, steps, record=graphs.generate):
    generator = torch.Generator(device="cuda").manual_seed(0)
    return record(model, PROMPTS, n=2, max_new_tokens=steps, end_ids=(99,), generator=generator)


def counted(model, steps):
    """Waits and copies of a call that finds its recordings."""
    decode(model, steps)
    waits.clear(), copies.clear()
    decode(model, steps)
    return Counter(waits), Counter(copies)


def check_decoding(model):
    """Waits within 50 steps: a look at steps 4, 20 and 36. Nothing is copied for a step. Recorded as not recorded."""
    few, more = counted(model, 2), counted(model, 50)
    assert few[0].total() == 0 and more[1] == few[1], (few, more)
    assert [*more[0].values()] == [3] and "nonzero" in [*more[0]][0], more[0]
    recorded, plain = decode(model, 50), decode(model, 50, transformer.generate)
    assert all(torch.equal(*pair) for pair in zip(recorded, plain))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_decoding_waits_at_its_looks_alone_and_is_recorded_without_change(tiny, kind):
    on_the_gpu(lambda: check_decoding(fast_layers(tiny(seed=2, model_type=kind, vocab_size=100).cuda().eval())))


def value_of_a_token(*args):
    """In the loop: an item()."""
    token, logprob = SAMPLE(*args)
    assert token[0].item() >= 0
    return token, logprob


def list_of_tokens(*args):
    """In the loop: a copy to the GPU."""
    token, logprob = SAMPLE(*args)
    return token, logprob + torch.zeros(1).to(token.device)


def mask_in_the_step(self, x, *args, **more):
    """In the recorded step: as many values as a mask selects."""
    x[x > 100] = x[x > 100]
    return FORWARD(self, x, *args, **more)


def tensor_of_the_cpu(self, x, *args, **more):
    """In the recorded step: a mix-up of devices."""
    return FORWARD(self, x * torch.ones(x.shape[-1]), *args, **more)


def list_in_the_step(self, x, *args, **more):
    return FORWARD(self, x * torch.tensor([1.0], device=x.device), *args, **more)


def column_of_python(self, count):
    """In the recorded step: a column that Python knows."""
    return torch.zeros_like(self.column) + self.column.held.item()


SAMPLE, FORWARD = transformer.sample, transformer.Block.forward
FAULTS = {
    value_of_a_token: (transformer, "sample", "_local_scalar_dense"),
    list_of_tokens: (transformer, "sample", "to the GPU"),
    mask_in_the_step: (transformer.Block, "forward", "capturing"),
    tensor_of_the_cpu: (transformer.Block, "forward", "same device"),
    list_in_the_step: (transformer.Block, "forward", "capturing"),
    column_of_python: (graphs.FixedCache, "columns", "assert all")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_in_decoding_is_found(tiny, fault):
    owner, name, told = FAULTS[fault]

    def program():
        setattr(owner, name, fault)
        check_decoding(fast_layers(tiny(seed=2, vocab_size=100).cuda().eval()))
    with pytest.raises(AssertionError, match=told):
        on_the_gpu(program)


# ------------------------------------------------------------------------------------------- the recipe, the scripts

def test_the_whole_recipe_runs(tmp_path, monkeypatch):
    """With what the smoke preset trains, cut to a few steps."""
    smoke = pipeline.PRESETS["smoke"]
    short = dict(rollouts=1, max_new_tokens=8)
    monkeypatch.setattr(measure, "BUDGETS", (4,))
    monkeypatch.setattr(search, "best_rule_scores", lambda examples: [0.5] * len(examples))  # takes seconds
    monkeypatch.setitem(pipeline.PRESETS, "smoke", replace(
        smoke, documents=100, student_documents=50, problems=16, test=4, hard=2, requests=2, samples=1, trace_prompts=4,
        zero_samples=2, **{name: replace(getattr(smoke, name), **short) for name in ("zero", "control", "rl1", "rl2")}))
    on_the_gpu(pipeline.main, argv=["pipeline.py", "--preset", "smoke", "--out", "run"], cwd=tmp_path)
    assert [name for name in STAGES if (tmp_path / "run" / name / checkpoint.DONE).exists()] == STAGES


def distill_all():
    """A teacher that knows nothing, and whose completions pass."""
    distill_script.correct = distill_script.one_language = lambda text, example: True
    distill.main()


RL = "--rollouts 2 --prompts-per-rollout 2 --group-size 2 --minibatches 1 --max-new-tokens 4 --resample 0"
SCRIPTS = {
    "grpo": (grpo.main, "--model", f"{RL} --save-every 0 --offload-reference"),
    "ppo": (ppo.main, "--model", f"{RL} --save-every 0"),
    "prime": (prime.main, "--model", f"{RL} --save-every 0"),
    "sft": (sft.main, "--model", "--batch-tokens 64 --row-length 32 --recompute --save-every 0"),
    "distill": (distill_all, "--teacher", "--samples 1 --max-new-tokens 4 --epochs 1 --save-every 0"),
    "evaluate": (evaluate.main, "--model", "--samples 2 --max-new-tokens 4")}
FEW = f"{RL} --save-every 0"
FEW_SFT = "--batch-tokens 64 --row-length 32 --save-every 0"
SCRIPTS |= {
    "grpo, LoRA": (grpo.main, "--model", f"{FEW} --lora 2"),
    "grpo, Adam on the CPU": (grpo.main, "--model", f"{FEW} --offload-optimizer --offload-reference --recompute"),
    "grpo, float16": (grpo.main, "--model", f"{FEW} --dtype float16"),
    "grpo, Adam on the CPU, float16": (grpo.main, "--model", f"{FEW} --offload-optimizer --dtype float16"),
    "ppo, LoRA, float16": (ppo.main, "--model", f"{FEW} --lora 2 --dtype float16"),
    "prime, LoRA, float16": (prime.main, "--model", f"{FEW} --lora 2 --dtype float16"),
    "sft, LoRA": (sft.main, "--model", f"{FEW_SFT} --lora 2 --recompute"),
    "sft, Adam on the CPU": (sft.main, "--model", f"{FEW_SFT} --offload-optimizer --recompute"),
    "sft, Adam on the CPU, float16": (sft.main, "--model", f"{FEW_SFT} --offload-optimizer --dtype float16"),
    "distill, LoRA": (distill_all, "--teacher", "--samples 1 --max-new-tokens 4 --epochs 1 --save-every 0 --lora 2")}


LONG = {"grpo, float16", "grpo, Adam on the CPU, float16", "sft, LoRA", "sft, Adam on the CPU", "distill, LoRA"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name in LONG)) for name in SCRIPTS])
def test_a_script_runs_and_where_it_is_killed_resumes(name, tmp_path):
    main, model, more = SCRIPTS[name]
    make(tmp_path / "model", "qwen3", "qwen")
    script, *how = name.split(", ")
    row = "completion" if script == "sft" else "answer"
    data = write(tmp_path / "data.jsonl", [{"prompt": f"What is {i} + 1?", row: str(i + 1)} for i in range(4)])
    argv = ["script.py", model, "model", "--data", data, *more.split()]
    if script == "distill":
        argv += ["--student", "model"]
    if script != "evaluate":
        argv += ["--out", "out"]
        with pytest.raises(AssertionError) as ended:
            on_the_gpu(killed_at_first_save, main, argv=argv, cwd=tmp_path)
        assert [*(tmp_path / "out").glob(f"**/{checkpoint.STATE}")], str(ended.value)
    on_the_gpu(main, argv=argv, cwd=tmp_path)
    if script != "evaluate":
        assert (tmp_path / "out" / "model.safetensors").exists()
        assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists() == ("LoRA" in how)
    if how:
        on_the_gpu(main, argv=[*argv[:-1], "whole"], cwd=tmp_path)
        whole = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
        assert len(whole) == 1 + ("LoRA" in how)
        assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in whole)
        settings = checkpoint.read_json(tmp_path / "out" / "settings.json")
        rows = {"sft": 512, "distill": 64}  # of 32 and of 256 tokens
        assert settings.get("micro_batch_tokens", 16384) == 16384
        assert settings.get("micro_batch_rows") == rows.get(script)


def check_placement(name, tiny):
    """A training with its step on the CPU: where its weights, gradients and moments lie after each update."""
    masters = tiny(seed=1)
    model = fast_layers(copy.deepcopy(masters).to("cuda", torch.bfloat16))
    with_gradient = []

    def make(parameters, **settings):
        make_optimizer = sft.adamw if name == "sft" else grpo.adam
        optimizer = step_on_cpu(make_optimizer(masters.parameters(), **settings), model, masters)

        def look(optimizer, *_):  # at the end of an update's backward passes
            assert all(p.grad is None for p in model.parameters())
            held_gradients = [p.grad for p in masters.parameters() if p.grad is not None]
            assert held_gradients and not any(grad.is_cuda for grad in held_gradients)
            assert all(grad.dtype == torch.float32 for grad in held_gradients)
            with_gradient.append(len(held_gradients))
        optimizer.register_step_pre_hook(look)
        made.append(optimizer)
        return optimizer

    made, training = [], {"sft": train_sft, "grpo": train_grpo}[name]
    training(model, "bfloat16", make_optimizer=make)
    assert with_gradient == [len([*masters.parameters()])] * 20
    assert all(p.is_cuda and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any(p.is_cuda for p in masters.parameters())
    moments = [moment for state in made[0].state.values() for moment in state.values()]
    assert len(moments) == 3 * with_gradient[0] and not any(moment.is_cuda for moment in moments)
    for p, master in zip(model.parameters(), masters.parameters(), strict=True):
        assert torch.equal(p.detach().cpu(), master.bfloat16())


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_with_its_step_on_the_cpu_the_gpu_holds_half_precision_weights_alone(name, tiny):
    on_the_gpu(check_placement, name, tiny)


def test_the_checks_of_gpu_py_pass():
    """An update by each method beside the CPU's, and a resumed training."""
    def program():
        importlib.reload(gpu)  # it asks for a GPU when it is imported
        for name in ("GRPO", "PPO", "PRIME", "SFT"):
            there, here = gpu.updated(name, "cuda"), gpu.updated(name, "cpu")
            start = gpu.flat(gpu.new_model(gpu.TINY, "cpu"))
            assert gpu.relative(there - start, here - start) < 0.02
        gpu.compare_resumed()
        assert gpu.failed == []
    on_the_gpu(program)


@pytest.mark.parametrize("on_a_gpu, options, rows, tokens", [
    (False, "", 16, 2048), (True, "", 16, 16384), (True, "--row-length 256", 64, 16384),
    (True, "--row-length 20000", 1, 16384), (True, "--micro-batch-rows 3 --micro-batch-tokens 5", 3, 5)])
def test_a_micro_batch_is_larger_by_default_on_a_gpu(on_a_gpu, options, rows, tokens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_a_gpu)
    monkeypatch.setattr("sys.argv", ["script.py", "--row-length", "1024", *options.split()])
    parser = command.Parser()
    parser.add_fields(sft.SFTConfig, ("micro_batch_rows", "row_length"))
    parser.add_fields(grpo.GRPOConfig, ("micro_batch_tokens",))
    args = parser.parse_with_rows()
    assert (args.micro_batch_rows, args.micro_batch_tokens) == (rows, tokens)


def test_the_help_names_both_defaults():
    parser = command.Parser()
    parser.add_fields(sft.SFTConfig, ("micro_batch_rows",))
    parser.add_fields(grpo.GRPOConfig, ("micro_batch_tokens",))
    said = parser.format_help()
    assert f"default {sft.SFTConfig().micro_batch_rows}, on a GPU" in " ".join(said.split())
    assert f"default {grpo.GRPOConfig().micro_batch_tokens}, on a GPU {command.GPU_TOKENS}" in " ".join(said.split())

"""DeepSeek-V3 beside `transformers`, recorded and at hand; experts, balance and losses beside loops; and it learns."""

import json
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import evaluate
import grpo
import model as dense
import sft
from forked import run_forked
from lab import checkpoint, graphs, layers
from lab.architectures import load
from lab.check_model import check_model, read_fields, tensor_shapes
from lab.layers import fast_layers
from model import generate
from runs import TOKENIZERS, begin, run_with_kills, write
from sevens import train_on_sevens
from test_pretend_cuda import on_the_gpu
from test_sft import copies
from tokenizer import Tokenizer
from variants import deepseek_v3 as v3
from variants import v3_weights
from variants.ppo import PPO, PPOConfig
from variants.prime import PRIME, PRIMEConfig
from variants.v3_pretraining import Objective, add_next_token, balance, init_weights, index_of, sequence_balance

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("deepseek_*"))
SIZES = dict(vocab_size=16, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
             num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=16,
             qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, max_position_embeddings=128)
PROMPTS = [[3, 5, 7, 9, 11], [2], [4, 4, 4], [8, 1, 8]]


def tiny(seed=0, mtp=False, **fields):
    generator = torch.Generator().manual_seed(seed)
    model = init_weights(v3.Transformer(v3.Config(**SIZES | fields)), generator)
    return add_next_token(model, generator) if mtp else model


def wide(seed=0, **fields):
    """A model whose every parameter and bias is random and wide: its distributions and choices are far from even."""
    model, generator = tiny(seed, **fields).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "bias" in n)]:
            p.normal_(1 if "norm" in name else 0, 0.3, generator=generator)
    return model


# ------------------------------------------------------------------------------------------- beside transformers

@pytest.mark.parametrize("dir", FIXTURES, ids=lambda dir: dir.name)
def test_recorded_logits_of_transformers_are_ours(dir):
    recorded, model = load_file(dir / "logits.safetensors"), load(dir, "cpu")
    torch.testing.assert_close(model(recorded["ids"]), recorded["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dir", FIXTURES, ids=lambda dir: dir.name)
def test_what_is_saved_loads_as_it_was_and_holds_the_tensors_of_transformers(dir, tmp_path):
    model = load(dir, "cpu")
    v3_weights.save(model, tmp_path)
    ids = torch.arange(24)[None]
    assert torch.equal(load(tmp_path, "cpu")(ids), model(ids))
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(dir / "model.safetensors")
    theirs = {name: rows for name, rows in theirs.items() if rows.numel()}  # no shared expert: rows of none
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def random_case(seed):
    """A configuration by Hugging Face's names, of all switches."""
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 4])
    case = dict(q_lora_rank=draw.choice([None, 12]), n_group=groups, topk_group=draw.randint(1, groups),
                num_experts_per_tok=draw.choice([1, 2]), n_shared_experts=seed % 3, first_k_dense_replace=seed // 3 % 3,
                norm_topk_prob=draw.choice([True, False]), routed_scaling_factor=draw.choice([1.0, 2.5]),
                rope_interleave=draw.choice([True, False]), tie_word_embeddings=draw.choice([True, False]),
                rms_norm_eps=draw.choice([1e-6, 1e-5]))
    if seed % 4 == 3:
        case["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0,
                                   "mscale_all_dim": draw.choice([0.7, 1.0]), "original_max_position_embeddings": 32}
    return case


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(24))
def test_random_configurations_compute_what_transformers_computes(seed, tmp_path):
    """Logits of whole rows and of left-padded ones, 64 greedy tokens, and directories both ways."""
    transformers = pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
    from make_deepseek_fixtures import build
    theirs = build(random_case(seed), seed)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs", "cpu")
    v3_weights.save(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    prompts = [torch.randint(64, (n,)).tolist() for n in (12, 5, 9)]
    ids = torch.tensor([[0] * (12 - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (12 - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        assert torch.equal(again(ids).logits, theirs(ids).logits)
        padded = theirs(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
        start = 12 - real.sum(1)
        cached = ours(ids, cache=ours.new_cache(start, padding=7))
        torch.testing.assert_close(cached[real.bool()], padded[real.bool()], atol=1e-4, rtol=0)
        greedy = theirs.generate(ids, attention_mask=real, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(ours, prompts, max_new_tokens=64, temperature=0)[0], greedy[:, 12:])


# ------------------------------------------------------------------------------------------- strangers' files

@pytest.mark.parametrize("dir", FIXTURES, ids=lambda dir: dir.name)
def test_the_check_expects_the_names_and_shapes_of_the_model(dir, tmp_path):
    check_model(dir)
    v3_weights.save(load(dir, "cpu"), tmp_path)
    check_model(tmp_path)
    shapes = {name: list(rows.shape) for name, rows in load_file(tmp_path / "model.safetensors").items()}
    assert tensor_shapes(read_fields(dir / "config.json")) == shapes


def changed(dir, change, weights=None):
    """A copy of the recorded V3 with other fields of its config.json, and tensors in addition (None: taken away)."""
    shutil.copytree(Path(__file__).parent / "fixtures" / "deepseek_v3", dir)
    config = json.loads((dir / "config.json").read_text())
    (dir / "config.json").write_text(json.dumps(config | change))
    if weights:
        tensors = load_file(dir / "model.safetensors") | weights
        save_file({name: rows for name, rows in tensors.items() if rows is not None}, dir / "model.safetensors")
    return dir


@pytest.mark.parametrize("change, named", [
    ({"scoring_func": "softmax"}, "scoring_func 'softmax'"), ({"topk_method": "greedy"}, "topk_method 'greedy'"),
    ({"n_group": 3}, "n_group 3"), ({"n_group": 8, "topk_group": 4}, "n_group 8"), ({"topk_group": 5}, "topk_group 5"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok 5"), ({"attention_bias": True}, "attention_bias"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"), ({"hidden_act": "gelu"}, "gelu"),
    ({"moe_layer_freq": 2}, "moe_layer_freq 2"), ({"qk_rope_head_dim": 3}, "qk_rope_head_dim 3 is odd"),
    ({"n_routed_experts": 10 ** 7}, "n_routed_experts"), ({"kv_lora_rank": "8"}, "kv_lora_rank is '8'"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"), ({"rope_interleave": 1}, "rope_interleave is 1"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1"), ({"n_shared_experts": 0.5}, "n_shared_experts"),
    ({"v_head_dim": None}, "v_head_dim is None"), ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
    ({"architectures": ["DeepseekV3ForTokenClassification"]}, "DeepseekV3ForTokenClassification"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic")])
def test_a_config_that_would_compute_something_else_is_refused_by_name(change, named, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: .*{named}") as error:
        check_model(changed(tmp_path / "dir", change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"scoring_func": "softmax"}, {"topk_method": "greedy"}, {"n_group": 3},
                                    {"attention_bias": True}, {"quantization_config": {"quant_method": "fp8"}},
                                    {"hidden_act": "gelu"}, {"model_type": "deepseek_v2"}], ids=str)
def test_without_the_check_it_is_refused_too(change, tmp_path):
    with pytest.raises(ValueError, match="DeepSeek-V3"):
        v3_weights.load(changed(tmp_path / "dir", change), v3.Config, v3.Transformer)


def test_what_predicts_a_second_token_is_accepted_and_left_out(tmp_path):
    dir = changed(tmp_path / "dir", {"num_nextn_predict_layers": 1, "attention_dropout": 0.1},
                  {"model.layers.3.eh_proj.weight": torch.zeros(16, 32)})
    check_model(dir)
    assert not hasattr(load(dir, "cpu"), "mtp")


def test_a_missing_and_a_misshapen_expert_are_named(tmp_path):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for number, rows in enumerate((None, torch.zeros(8, 15))):
        with pytest.raises(ValueError, match=f"model.safetensors: tensor {re.escape(name)} "):
            check_model(changed(tmp_path / str(number), {}, {name: rows}))


def test_the_dense_file_refuses_it_in_one_line():
    with pytest.raises(ValueError, match="model_type 'deepseek_v3' is not supported") as error:
        dense.load(FIXTURES[0], "cpu")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- attention and its cache

@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": 12, "rope_interleave": False}], ids=["plain", "low rank"])
def test_the_absorbed_form_is_the_plain_one(fields):
    """Token by token, against all at once; left-padded."""
    model, ids = wide(**fields), torch.randint(16, (3, 20))
    cache = model.new_cache(torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        steps = torch.cat([model(ids[:, t:t + 1], cache=cache) for t in range(20)], dim=1)
        torch.testing.assert_close(steps, model(ids), atol=1e-5, rtol=0)
        for layer in model.layers:
            layer.self_attn.absorbed = layer.self_attn.plain
        start = torch.tensor([0, 4, 9])
        plain, absorbed = (m.new_cache(start, padding=9) for m in (model, wide(**fields)))
        for cache, m in ((plain, model), (absorbed, wide(**fields))):
            m(ids, cache=cache)
        torch.testing.assert_close(wide(**fields)(ids[:, :1], cache=absorbed), model(ids[:, :1], cache=plain),
                                   atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_caches_bytes_a_token_are_those_of_latent_and_rotary_key(dtype):
    model = tiny().to(dtype)
    cache = model.new_cache(torch.zeros(3, dtype=torch.long))
    columns = cache.reserve(64)
    c = model.config
    assert cache.k.nbytes == \
        3 * columns * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * dtype.itemsize


def test_a_packed_example_and_one_in_a_padded_batch_are_computed_as_alone():
    model, a, b = wide(), [3, 4, 5, 6, 7], [8, 9, 1]
    alone = [model(torch.tensor([x]))[0] for x in (a, b)]
    ids, segments, positions, _ = sft.pack([(a, 0), (b, 0)], 10)
    packed = model(ids, positions=positions, segments=segments)[0]
    torch.testing.assert_close(packed[:8], torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_steps_sample_what_plain_ones_do_also_after_a_bias_has_moved(temperature, monkeypatch):
    monkeypatch.setattr(graphs, "cuda_graph", lambda run: ((output := run().clone()), lambda: output.copy_(run())))
    monkeypatch.setattr(graphs, "decoders", {})
    monkeypatch.setattr(graphs, "memory_of", lambda device: 10 ** 12)
    model = wide()
    for bias in (0.3, 2.0):
        model.layers[1].mlp.gate.e_score_correction_bias[:3] = bias
        settings = dict(n=2, max_new_tokens=40, end_ids=(6,), temperature=temperature)
        plain = generate(model, PROMPTS, generator=torch.Generator().manual_seed(0), **settings)
        recorded = graphs.generate_recorded(model, PROMPTS, generator=torch.Generator().manual_seed(0), **settings)
        assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(recorded, plain))


def test_on_a_pretended_gpu_steps_are_recorded_without_a_wait_and_find_the_tokens_of_a_cpu():
    plain = generate(wide(), PROMPTS, n=3, max_new_tokens=50, end_ids=(6,), temperature=0)[0].tolist()

    def program():
        model = fast_layers(wide().to("cuda"))
        recorded = graphs.generate(model, PROMPTS, n=3, max_new_tokens=50, end_ids=(6,), temperature=0)[0]
        assert graphs.decoders and recorded.tolist() == plain
        # each has tokens: the zeros of an idle expert's gradient would be the CPU's
        every = dict(n_group=1, n_routed_experts=4, num_experts_per_tok=4)
        pretrain(fast_layers(tiny(mtp=True, **every).to("cuda")), copies(40))
    on_the_gpu(program)


# ------------------------------------------------------------------------------------------- experts

def routed(N=9, seed=0, **fields):
    """(experts, x, chosen, weights) in float64, which all want gradients."""
    torch.manual_seed(seed)
    c = v3.Config(**SIZES | fields)
    experts = v3.Experts(c).double()
    chosen = torch.stack([torch.randperm(c.n_routed_experts)[:c.num_experts_per_tok] for _ in range(N)])
    x, weights = torch.randn(N, c.hidden_size).double(), torch.rand(chosen.shape).double()
    return experts, x.requires_grad_(), chosen, weights.requires_grad_()


def loop_over_tokens(experts, x, chosen, weights):
    rows = []
    for token, of_token, w in zip(x, chosen.tolist(), weights):
        total = torch.zeros_like(token)
        for e, weight in zip(of_token, w):
            gate, up = (experts.gate_up_proj[e] @ token).chunk(2)
            total = total + weight * (experts.down_proj[e] @ (gate * gate.sigmoid() * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("form", [v3.Experts, layers.SortedExperts, layers.CPUExperts, layers.CUDAExperts,
                                  layers.FixedExperts])
@pytest.mark.parametrize("fields", [{}, {"num_experts_per_tok": 5}, {"num_experts_per_tok": 8}], ids=str)
def test_the_experts_are_a_plain_loop_over_tokens_in_value_and_gradient(form, fields):
    experts, x, chosen, weights = routed(**fields)
    experts.__class__ = form
    wanted = [x, weights, *experts.parameters()]
    outside = torch.randn_like(x)
    results = []
    for compute in (experts, partial(loop_over_tokens, experts)):
        y = compute(x, chosen, weights)
        results.append([y, *torch.autograd.grad((y * outside).sum(), wanted)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_the_router_chooses_by_affinity_and_bias_within_the_best_groups_and_weighs_by_affinity():
    c = v3.Config(**SIZES | dict(n_group=4, topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5))
    router, x = v3.Router(c), torch.randn(40, 32)
    router.e_score_correction_bias.normal_(0, 0.3)
    scores, chosen, weights = router(x)
    for n in range(40):
        s = [1 / (1 + torch.exp(-(x[n].double() @ w.double()))).item() for w in router.weight]
        b = [a + bias for a, bias in zip(s, router.e_score_correction_bias.tolist())]
        groups = sorted(range(4), key=lambda g: -sum(sorted(b[2 * g:2 * g + 2])))[:2]
        best = sorted((e for g in groups for e in (2 * g, 2 * g + 1)), key=lambda e: -b[e])[:3]
        assert chosen[n].tolist() == best
        expected = [2.5 * s[e] / sum(s[i] for i in best) for e in best]
        assert weights[n].tolist() == pytest.approx(expected, abs=1e-6)
        assert scores[n].tolist() == pytest.approx(s, abs=1e-6)


def test_a_tokens_result_does_not_depend_on_the_batch_it_is_in():
    model, ids = wide(), torch.randint(16, (6, 12))
    together = model(ids)
    for row in range(6):
        torch.testing.assert_close(model(ids[row:row + 1])[0], together[row], atol=1e-5, rtol=0)


def test_padding_routes_nowhere():
    """Of packed rows and of left-padded prompts."""
    model = wide()
    ids, segments, positions, _ = sft.pack([([3, 4, 5], 0), ([8, 9], 0)], 12)
    x = model.embed(ids)
    (packed,) = model.states(x, model.layout(x, positions, segments))[1]
    x, cache = model.embed(torch.tensor([[0, 0, 0, 7], [1, 2, 3, 4]])), model.new_cache(torch.tensor([3, 0]), padding=3)
    (padded,) = model.states(x, model.layout(x, cache=cache), cache)[1]
    for scores, chosen in (packed, padded):
        assert scores.shape == (5, 8) and chosen.shape == (5, 2)


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": 12}], ids=str)
def test_the_layers_that_a_cpu_computes_faster_compute_the_same(fields):
    results = []
    for model in (wide(**fields), fast_layers(wide(**fields))):
        ids, segments, positions, targets = sft.pack([([3, 4, 5, 6] * 9, 0), ([8, 9, 1], 0), ([2] * 30, 0)], 80)
        loss = sft.loss_sum(model, ids, segments, positions, targets, "float32")
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        results[-1].append(generate(model, PROMPTS, n=3, max_new_tokens=30, temperature=0)[0])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- pretraining

def test_a_bias_falls_for_an_overloaded_expert_and_rises_for_an_underloaded_one():
    model = tiny(num_hidden_layers=3, n_routed_experts=4)
    first, second = model.routers()
    loads = torch.tensor([[4.0, 0, 2, 2], [10, 1, 1, 0]])
    assert balance([first, second], loads, 0.25) == pytest.approx(10 / 3)  # the worse of the two
    assert first.e_score_correction_bias.tolist() == [-0.25, 0.25, 0, 0]
    assert second.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.25, 0.25]


def test_a_bias_in_half_precision_is_refused_since_its_steps_would_vanish():
    model = tiny().to(torch.bfloat16)
    with pytest.raises(ValueError, match="bias is in torch.bfloat16, where steps of 0.001 vanish"):
        balance(model.routers(), torch.ones(1, 8))


def test_the_sequence_wise_loss_is_a_plain_loop_over_rows_experts_and_tokens():
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    scores, E, K = torch.rand(8, 5).double(), 5, 2
    got, at = sequence_balance(scores, real, K), 0
    for row, T in enumerate(real.sum(1).tolist()):
        s, total = scores[at:at + T].tolist(), 0.0
        for i in range(E):
            f = sum(E / (K * T) for t in range(T) if i in sorted(range(E), key=lambda e: -s[t][e])[:K])
            P = sum(s[t][i] / sum(s[t]) for t in range(T)) / T
            total += f * P
        assert got[row].item() == pytest.approx(total, abs=1e-12)
        at += T
    even = torch.eye(5).double()[:, [0, 1, 2, 3, 4]] + 1e-9
    assert sequence_balance(even, torch.ones(1, 5).bool(), 1).item() == pytest.approx(1)


def test_the_objective_is_a_loop_over_tokens_their_successors_and_rows():
    model = wide(mtp=True).double()
    examples = [([3, 4, 5, 6], 0), ([8, 9, 1], 0), ([2, 7, 7, 7, 1, 5], 0), ([6], 0), ([4, 4, 4, 9], 3)]
    ids, segments, positions, targets = sft.pack(examples, 12)
    alone, after = 0.0, 0.0
    for tokens, prompt in examples:
        x = torch.tensor([tokens])
        states, _ = model.states(model.embed(x), model.layout(x))
        logprobs = model.head(model.norm(states)).log_softmax(-1)[0]
        if len(tokens) > 1:  # the block sees the states up to the last token but one, and each one's successor
            block, _ = model.mtp(states[:, :-1], model.embed(x[:, 1:]), *model.layout(x[:, :-1]))
            logprobs_after = model.head(block).log_softmax(-1)[0]
        for t in range(len(tokens)):
            if t >= max(prompt, 1):
                alone -= logprobs[t - 1, tokens[t]].item()
            if t >= max(prompt, 2):
                after -= logprobs_after[t - 2, tokens[t]].item()
    batch = ids, segments, positions, targets
    for progress, weight in ((0.0, 0.3), (0.6, 0.3), (0.7, 0.1)):
        objective = Objective(alpha=0, gamma=0)
        objective.progress = progress
        assert objective.loss_sum(model, *batch, "float32").item() == pytest.approx(alone + weight * after, rel=1e-6)
    metrics = objective.after_step(model)
    assert metrics["next_token_loss"] == pytest.approx(alone / (targets >= 0).sum().item(), rel=1e-6)
    with_balance, rows = Objective(alpha=0.5), 0.0
    x = model.embed(ids)
    rotation, mask, index = model.layout(x, positions, segments)
    x, (routing,) = model.states(x, (rotation, mask, index))
    follows = (segments > 0) & (segments == F.pad(segments[:, 1:], (0, 1)))
    _, of_block = model.mtp(x, model.embed(F.pad(ids[:, 1:], (0, 1))), rotation, mask, index_of(follows))
    for (scores, _), real in ((routing, segments > 0), (of_block, follows)):
        rows += (sequence_balance(scores, real, 2) * (targets >= 0).sum(1)).sum().item()
    assert with_balance.loss_sum(model, *batch, "float32").item() == pytest.approx(
        alone + 0.3 * after + 0.5 * rows, rel=1e-6)


def pretrain(model, examples, **arguments):
    history = []
    config = sft.SFTConfig(lr=3e-3, epochs=4, batch_tokens=128, row_length=16, micro_batch_rows=3, dtype="float32")
    log = lambda metrics, batch: history.append({k: v for k, v in metrics.items() if k != "seconds"})
    sft.train(model, examples, config, log=log, **dict(objective=Objective()) | arguments)
    return history


def test_pretraining_learns_both_tokens_and_the_block_is_left_out_of_the_files(tmp_path):
    model = tiny(mtp=True)
    history = pretrain(model, copies(300))
    first, last = history[0], history[-1]
    assert last["next_token_loss"] < 0.6 * first["next_token_loss"] and last["mtp_loss"] < 0.8 * first["mtp_loss"]
    assert first["loss"] == pytest.approx(first["next_token_loss"] + 0.3 * first["mtp_loss"], rel=0.35)
    v3_weights.save(model, tmp_path)
    loaded, ids = load(tmp_path, "cpu"), torch.arange(10)[None]
    assert not hasattr(loaded, "mtp") and torch.equal(loaded(ids), model(ids))
    assert "mtp" not in " ".join(load_file(tmp_path / "model.safetensors"))


def test_the_second_tokens_weight_changes_after_its_part_of_the_steps():
    history = pretrain(tiny(mtp=True), copies(60), objective=Objective((1.0, 0.0), switch=0.5, alpha=0))
    for metrics in history:
        is_alone = metrics["loss"] == pytest.approx(metrics["next_token_loss"], rel=1e-5)
        assert is_alone == ((metrics["step"] - 1) / metrics["steps"] >= 0.5)


def test_the_bias_evens_the_load():
    """Of a router that prefers two experts: the busiest one's share falls to what it is without preference."""
    def last_load(gamma):
        model = tiny(n_group=1, first_k_dense_replace=1)
        with torch.no_grad():
            model.layers[1].mlp.gate.e_score_correction_bias[:2] = 0.5
        history = pretrain(model, copies(300), objective=Objective(gamma=gamma))
        return sum(metrics["busiest_expert"] for metrics in history[-10:]) / 10
    assert last_load(0.02) < 2 < 3 < last_load(0.0)


@pytest.mark.parametrize("stop", [1, 12, 20])  # the last one after the weight has changed
def test_a_pretraining_that_stopped_resumes_identically_its_biases_too(tmp_path, stop):
    examples, through = copies(100), tiny(mtp=True)
    history = pretrain(through, examples)
    assert 20 < len(history) < 30

    def save(**state):
        if state["step"] == stop:
            checkpoint.save(tmp_path, *checkpoint.state_of(**state))
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(mtp=True), examples, save=save)
    resumed = tiny(seed=5, mtp=True)
    again = pretrain(resumed, examples, resume=partial(checkpoint.restore, *checkpoint.load(tmp_path)))
    assert again == history[stop:]
    states = [model.state_dict() for model in (through, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(router.e_score_correction_bias.any() for router in resumed.routers())


# ------------------------------------------------------------------------------------------- reinforcement learning

SMALL = dict(rollouts=14, prompts_per_rollout=3, group_size=16, minibatches=4, max_new_tokens=8, lr=0.01, warmup=1,
             micro_batch_tokens=512, dtype="float32", grad_clip=1.0)


@pytest.mark.parametrize("method", ["grpo", "ppo", "prime"])
def test_the_reward_rises_within_a_few_rollouts(method):
    model, config = tiny(), grpo.GRPOConfig(**SMALL)
    estimator = {"ppo": lambda: PPO(model, config, PPOConfig(critic_lr=0.01)),
                 "prime": lambda: PRIME(model, config, PRIMEConfig(prm_lr=3e-3)), "grpo": lambda: None}[method]()
    arguments = {"advantage_estimator": estimator} if estimator else {}
    if method == "prime":
        arguments["rewards"] = {"accuracy": lambda text, example: float("7" in text.split())}
    biases = [router.e_score_correction_bias.clone() for router in model.routers()]
    rewards = [metrics["reward"] for metrics in train_on_sevens(model, config, **arguments)]
    assert sum(rewards[-3:]) / 3 > max(0.5, rewards[0] + 0.3), rewards
    for router, before in zip(model.routers(), biases):  # they stand still: sampler and trainer choose by the same ones
        assert torch.equal(router.e_score_correction_bias, before)


# ------------------------------------------------------------------------------------------- every command

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    dir = tmp_path_factory.mktemp("files")
    tokenizer = Tokenizer(TOKENIZERS / "qwen")
    v3_weights.save(tiny(vocab_size=tokenizer.vocab_size), dir / "model", tokenizer)
    write(dir / "problems.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(9)])
    write(dir / "pairs.jsonl", [{"prompt": f"{i}?", "completion": f"{i}!" * 9} for i in range(60)])
    (dir / "own.py").write_text("def characters(completion, example):\n    return len(completion) / 9\n")
    return dir


RL = ("--rollouts 2 --prompts-per-rollout 2 --group-size 4 --minibatches 2 --max-new-tokens 8 --dtype float32 "
      "--save-every 0").split()
TUNE = "--epochs 1 --row-length 64 --batch-tokens 128 --dtype float32".split()


@pytest.mark.parametrize("main, data, options", [
    (grpo.main, "problems.jsonl", RL), (grpo.main, "problems.jsonl", [*RL, "--recompute"]),
    (sft.main, "pairs.jsonl", TUNE), (sft.main, "pairs.jsonl", [*TUNE, "--recompute"]),
    (sft.main, "pairs.jsonl", [*TUNE[:-1], "bfloat16", "--offload-optimizer"])],
    ids=["grpo", "grpo recomputing", "sft", "sft recomputing", "sft offloading"])
def test_a_script_trains_a_directory_and_writes_one_of_the_same_kind(main, data, options, files, tmp_path):
    args = ["--model", files / "model", "--data", files / data, "--out", tmp_path / "out", *options]
    if main is grpo.main:  # the problems are too hard for it
        args += ["--rewards", f"{files / 'own.py'}:characters", "--lr", "1e-3"]
    ended = run_forked(main, argv=["script.py", *map(str, args)])
    assert ended.status == 0, ended.stderr
    check_model(tmp_path / "out")
    before, after = (load(dir, "cpu") for dir in (files / "model", tmp_path / "out"))
    assert after.config == before.config
    assert not torch.equal(after.layers[1].mlp.experts.down_proj, before.layers[1].mlp.experts.down_proj)


def test_it_is_measured_and_asked_as_a_dense_one_is(files):
    measured = run_forked(evaluate.main, argv=["evaluate.py", "--model", str(files / "model"), "--data", str(
        files / "problems.jsonl"), "--max-new-tokens", "4", "--samples", "2", "--dtype", "float32"])
    assert measured.status == 0 and "reasoning: 9 rows" in measured.stdout, measured.stderr
    asked = run_forked(dense.main, argv=["model.py", str(files / "model"), "--prompt", "2+3?", "--max-new-tokens", "4"])
    assert asked.status == 0, asked.stderr


@pytest.mark.parametrize("main, data, options", [(grpo.main, "problems.jsonl", RL), (sft.main, "pairs.jsonl", TUNE)],
                         ids=["grpo", "sft"])
def test_adapters_are_refused_in_one_line(main, data, options, files, tmp_path):
    args = ["--model", files / "model", "--data", files / data, "--out", tmp_path / "out", "--lora", 2, *options]
    ended = run_forked(main, argv=["script.py", *map(str, args)])
    assert ended.status == 2 and "adapters of a deepseek_v3" in ended.stderr and ended.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------- the recipe

@pytest.mark.full
def test_the_recipe_on_such_a_base_resumes_after_kills_as_if_it_had_run_through(tmp_path):
    args = "--preset smoke --architecture deepseek-v3 --out run --device cpu --dtype float32".split()
    for folder in ("through", "killed"):
        (tmp_path / folder).mkdir()
    with begin(tmp_path / "through", args) as child:
        ended = child.wait(280)
    assert ended.status == 0, ended.stderr
    assert run_with_kills(tmp_path / "killed", args, [5, 9, 12, 20]) > 0
    page = (tmp_path / "through" / "run" / "report.html").read_text()
    assert "busiest expert" in page
    for stage in ("base", "zero", "r1"):
        through, killed = (tmp_path / folder / "run" / stage / "model.safetensors" for folder in ("through", "killed"))
        assert through.read_bytes() == killed.read_bytes()
        check_model(through.parent)
    assert load(through.parent, "cpu").layers[1].mlp.gate.e_score_correction_bias.any()

"""What transformers makes of the same weights is recorded in tests/fixtures/model_* (make_model_fixtures.py there)."""

import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_module
from lab.chat import visible
from lab.check_model import check_model, read_fields, tensor_shapes
from model import Config, KVCache, RMSNorm, Transformer, generate, hf_tensors, load, read_config, rotate, save
from variants.rope_scaling import scaled_frequencies

ROOT = Path(__file__).parent.parent
FIXTURES = sorted((ROOT / "tests" / "fixtures").glob("model_*"))
TINY = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, max_position_embeddings=64)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_strangers(dir):
    """As every command opens a directory: its files are checked first."""
    check_model(dir)
    return load(dir, "cpu", rope=scaled_frequencies)


def tiny(seed=0, **changes):
    """A model whose every parameter is random; wide weights, so that its distributions are far from uniform."""
    model, generator = Transformer(Config(**(TINY | changes))).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if "norm" in name else 0, 0.3, generator=generator)
    return model


def argmax_loop(model, prompt, steps, end=()):
    """Greedy decoding without a cache."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in end:
            break
    return ids[len(prompt):]


def nucleus(logits, temperature, top_p):
    """The sampling distribution of one position, token by token in float64."""
    weights = [math.exp(x / temperature) for x in (logits.double() - logits.double().max()).tolist()]
    kept, mass = set(), 0.0
    for token in sorted(range(len(weights)), key=lambda i: -weights[i]):
        if mass >= top_p * sum(weights):
            break
        kept.add(token)
        mass += weights[token]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(weights))]


# ------------------------------------------------------------------------------------------- the layers

def test_rms_norm_is_x_over_its_root_mean_square_times_the_weight():
    norm, x = RMSNorm(6, 1e-5), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    norm.weight.data = torch.arange(6.0)
    for row, got in zip(x.tolist(), norm(x).tolist()):
        root = math.sqrt(sum(v * v for v in row) / 6 + 1e-5)
        assert got == pytest.approx([v / root * i for i, v in enumerate(row)], abs=1e-6)


def test_a_rotary_position_turns_the_pair_i_and_i_plus_half_as_a_complex_number():
    model = tiny(hidden_size=32, rope_theta=500.0)  # heads of 8
    x = torch.randn(1, 1, 10, 8, generator=torch.Generator().manual_seed(0))
    got = rotate(x, model.cos[:10], model.sin[:10])
    for t in range(10):
        for i in range(4):
            angle = t * 500.0 ** (-2 * i / 8)
            turned = complex(x[0, 0, t, i], x[0, 0, t, i + 4]) * complex(math.cos(angle), math.sin(angle))
            assert complex(got[0, 0, t, i], got[0, 0, t, i + 4]) == pytest.approx(turned, abs=1e-5)


def test_a_family_that_is_not_computed_is_refused_by_name():
    with pytest.raises(ValueError, match="mamba"):
        Config(model_type="mamba")


def test_one_token_without_a_cache_has_the_logits_that_it_has_as_the_first_of_two():
    model = tiny()
    assert torch.allclose(model(torch.tensor([[5]]))[0, 0], model(torch.tensor([[5, 6]]))[0, 0], atol=1e-5)


def test_packed_examples_have_the_logits_that_they_have_alone():
    model, parts = tiny(), [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3]]
    segments = torch.tensor([[i for i, part in enumerate(parts) for _ in part]])
    positions = torch.tensor([[t for part in parts for t in range(len(part))]])
    packed = model(torch.tensor([sum(parts, [])]), positions=positions, segments=segments)[0]
    alone = torch.cat([model(torch.tensor([part]))[0] for part in parts])
    assert torch.allclose(packed, alone, atol=1e-5)
    assert not torch.allclose(model(torch.tensor([sum(parts, [])]))[0], alone, atol=1e-2)  # the segments made that


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_cached_left_padded_batch_has_the_logits_of_each_row_alone(kind):
    model, rows = tiny(model_type=kind), [[7, 8, 9, 10, 11, 12], [3, 4], [20, 21, 22, 23]]
    cache = KVCache(model.config, torch.tensor([0, 4, 2]), torch.float32)
    steps = [model(torch.tensor([[0] * (6 - len(row)) + row for row in rows]), cache=cache)]
    for token in (1, 2, 13):
        steps.append(model(torch.full((3, 1), token), cache=cache))
    cached = torch.cat(steps, dim=1)
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row + [1, 2, 13]]))[0]
        assert torch.allclose(cached[i, 6 - len(row):], alone, atol=1e-4)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="65 tokens.*64"):
        tiny()(torch.zeros(1, 65, dtype=torch.long))


def test_with_a_cache_it_is_the_shortest_row_whose_context_ends_the_steps():
    """The others are done before, which is generate's to see to."""
    model = tiny()
    logits, cache = model_module.prefill(model, [[1] * 60, [1] * 3])
    for _ in range(61):
        model(torch.ones(2, 1, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="65 tokens.*64"):
        model(torch.ones(2, 1, dtype=torch.long), cache=cache)


# ------------------------------------------------------------------------------------------- sampling

def test_greedy_samples_are_the_argmax_loop_for_prompts_of_different_lengths():
    model, prompts = tiny(), [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    ids, lengths, _ = generate(model, prompts, max_new_tokens=12, temperature=0)
    assert ids.tolist() == [argmax_loop(model, prompt, 12) for prompt in prompts]
    assert lengths.tolist() == [12] * 3


def test_a_row_stops_at_an_end_token_keeps_it_and_leaves_the_others_greedy_output_alone():
    model, prompts = tiny(1), [[i, 31 - i, i] for i in range(12)]
    free = [argmax_loop(model, prompt, 20) for prompt in prompts]
    ends = {free[0][2], free[5][9], free[7][5]}
    expected = [argmax_loop(model, prompt, 20, ends) for prompt in prompts]
    assert len({len(row) for row in expected}) > 2  # else this tests nothing
    sizes, forward = [], model.forward
    model.forward = lambda ids, **more: (sizes.append(len(ids)), forward(ids, **more))[1]
    ids, lengths, _ = generate(model, prompts, max_new_tokens=20, temperature=0, end_ids=ends)
    assert [row[:n].tolist() for row, n in zip(ids, lengths)] == expected
    assert all((row[n:] == 0).all() for row, n in zip(ids, lengths))
    assert sizes[-1] < sizes[0] == 12  # finished rows left


def test_sample_j_of_prompt_i_is_row_i_n_plus_j():
    model, prompts = tiny(), [[3, 1], [9], [2, 6, 5]]
    once = generate(model, prompts, max_new_tokens=6, temperature=0)[0]
    four = generate(model, prompts, n=4, max_new_tokens=6, temperature=0)[0]
    assert torch.equal(four, once.repeat_interleave(4, dim=0))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.6)])
def test_logprobs_are_those_of_an_uncached_rescoring_under_the_same_distribution(temperature, top_p):
    model, prompts, n = tiny(), [[3, 1, 4], [9], [2, 6, 5, 3, 5]], 3
    ids, lengths, logprobs = generate(model, prompts, n, 10, temperature, top_p, end_ids=[4, 9, 17],
                                      generator=torch.Generator().manual_seed(0))
    assert len(set(lengths.tolist())) > 1
    for r in range(len(ids)):
        prompt, row = prompts[r // n], ids[r, :lengths[r]].tolist()
        logits = model(torch.tensor([prompt + row]))[0].detach()
        for t, token in enumerate(row):
            p = nucleus(logits[len(prompt) - 1 + t], temperature, top_p)[token]
            assert math.log(p) == pytest.approx(logprobs[r, t].item(), abs=1e-3)
        assert (logprobs[r, lengths[r]:] == 0).all()


def test_each_prompt_is_prefilled_once_whatever_the_number_of_samples():
    model, seen = tiny(), []
    hidden = model.hidden
    model.hidden = lambda ids, *a, **k: (seen.append(tuple(ids.shape)), hidden(ids, *a, **k))[1]
    generate(model, [[1, 2, 3], [4, 5]], n=8, max_new_tokens=4)
    assert seen == [(2, 3), (16, 1), (16, 1), (16, 1)]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8)])
def test_samples_are_as_frequent_as_the_distribution_says(temperature, top_p):
    model, draws = tiny(vocab_size=8), 20000
    p = nucleus(model(torch.tensor([[1, 2]]))[0, -1].detach(), temperature, top_p)
    ids, _, _ = generate(model, [[1, 2]], draws, 1, temperature, top_p, generator=torch.Generator().manual_seed(0))
    counts = ids[:, 0].bincount(minlength=8).tolist()
    assert all(count == 0 for count, q in zip(counts, p) if q == 0)
    chi2 = sum((count - draws * q) ** 2 / (draws * q) for count, q in zip(counts, p) if q > 0)
    assert chi2 < 24.3  # 7 degrees of freedom: 1 in 1000


def spread_out(p, tokens, vocab_size):
    """nucleus's answer as the probabilities of all tokens, in order."""
    return p if tokens is None else torch.zeros(len(p), vocab_size).scatter_add(-1, tokens, p)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    for top_p, kept in ((0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.96, [0, 1, 2, 3]),
                        (1.0, [0, 1, 2, 3])):
        p = spread_out(*model_module.nucleus(logits, 1.0, top_p), 4)[0]
        assert p.nonzero()[:, 0].tolist() == kept
        assert p.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_top_p_in_a_large_vocabulary_is_the_distribution_by_hand(spread):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * spread  # 0.1: over 200 tokens stay
    for row, got in zip(logits, spread_out(*model_module.nucleus(logits, 0.8, 0.9), 300)):
        assert got.tolist() == pytest.approx(nucleus(row, 0.8, 0.9), abs=1e-6)


@pytest.mark.parametrize("draw, token", [(0.0, 1), (1 - 2 ** -24, 3)])
def test_the_extreme_random_numbers_do_not_draw_a_token_that_top_p_cut(draw, token, monkeypatch):
    logits = torch.tensor([[0.01, 0.5, 0.03, 0.45, 0.01]]).log()
    monkeypatch.setattr(torch, "rand", lambda *size, **more: torch.full(size, draw))
    assert model_module.sample(logits, 1.0, 0.9, None)[0].item() == token


def test_the_same_generator_state_gives_the_same_samples():
    draw = lambda seed: generate(tiny(), [[1, 2]], 4, 10, generator=torch.Generator().manual_seed(seed))[0]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_a_prompt_that_is_empty_or_fills_the_context_is_refused_and_the_context_ends_an_answer():
    model = tiny()
    with pytest.raises(ValueError, match="prompts of 0 to 1 tokens"):
        generate(model, [[1], []])
    with pytest.raises(ValueError, match="64 tokens do not fit the context of 64"):
        generate(model, [[1] * 64])
    ids, lengths, _ = generate(model, [[1] * 60], max_new_tokens=10)
    assert lengths.tolist() == [4] and ids.shape == (1, 10) and (ids[0, 4:] == 0).all()


# ------------------------------------------------------------------------------------------- weights in and out

@pytest.mark.parametrize("dir", FIXTURES, ids=lambda dir: dir.name)
def test_logits_are_those_that_transformers_recorded(dir):
    recorded = load_file(dir / "logits.safetensors")
    assert (load(dir, "cpu", rope=scaled_frequencies)(recorded["ids"]) - recorded["logits"]).abs().max() <= 1e-4


def test_there_is_a_recording_of_each_architecture_tied_and_untied_and_of_each_rope_scaling():
    configs = [read_config(dir) for dir in FIXTURES]
    every = {*itertools.product(("llama", "qwen2", "qwen3"), (True, False))}
    assert {(c.model_type, c.tie_word_embeddings) for c in configs} == every
    assert {(c.rope_scaling or {}).get("rope_type") for c in configs} == {None, "linear", "llama3", "yarn"}


def test_a_rope_scaling_of_another_kind_is_named_and_a_null_is_as_absent():
    c = model_module.Config(rope_scaling={"rope_type": "longrope"})
    with pytest.raises(ValueError, match="'longrope' is not supported"):
        scaled_frequencies(c)
    yarn = {"rope_type": "yarn", "factor": 2.0}
    c.rope_scaling = yarn | {"attention_factor": None}
    found = scaled_frequencies(c)
    c.rope_scaling = yarn
    expected = scaled_frequencies(c)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1] > 1


def frequencies(**scaling):
    return scaled_frequencies(model_module.Config(head_dim=64, max_position_embeddings=4096, rope_scaling=scaling))


def test_llama_3_slows_each_pair_by_its_wavelength_between_two_bounds():
    """By hand, pair by pair, with wavelengths in tokens where the code counts turns."""
    found, scale = frequencies(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                               original_max_position_embeddings=1024)
    kinds = []
    for pair, value in enumerate(found.tolist()):
        plain = 10000.0 ** (-2 * pair / 64)
        wavelength = 2 * math.pi / plain
        if wavelength < 1024 / 4:
            kinds, expected = [*kinds, "kept"], plain
        elif wavelength > 1024:
            kinds, expected = [*kinds, "slowed"], plain / 8
        else:
            share = (1024 / wavelength - 1) / (4 - 1)
            kinds, expected = [*kinds, "between"], share * plain + (1 - share) * plain / 8
        assert value == pytest.approx(expected, rel=1e-5), pair
    assert scale == 1 and {*kinds} == {"kept", "between", "slowed"}


def test_yarns_betas_are_32_and_1_where_none_are_given_and_mscale_weighs_the_logarithm():
    bounds = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024, truncate=False)
    default, given = frequencies(**bounds), frequencies(**bounds, beta_fast=32.0, beta_slow=1.0)
    assert torch.equal(default[0], given[0]) and default[1] == pytest.approx(0.1 * math.log(4) + 1)
    _, scale = frequencies(**bounds, mscale=0.5, mscale_all_dim=2.0)
    assert scale == pytest.approx((0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1))


def random_config(rng):
    """A transformers config of one of the three families, of random sizes and features."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config
    heads = rng.choice((2, 4, 6))
    llama3 = {"rope_type": "llama3", "low_freq_factor": rng.choice((1.0, 2.0)), "high_freq_factor": 4.0}
    scaling = rng.choice(({}, {}, {"rope_type": "linear"}, llama3, {"rope_type": "yarn"},
                          {"rope_type": "yarn", "beta_fast": 16.0, "beta_slow": 2.0},
                          {"rope_type": "yarn", "truncate": False, "attention_factor": 1.5}))
    if scaling:
        scaling |= {"factor": rng.choice((2.0, 8.0)), "original_max_position_embeddings": 32}
    else:
        scaling = {"rope_type": "default"}
    return rng.choice((LlamaConfig, Qwen2Config, Qwen3Config))(
        vocab_size=rng.randrange(40, 90),
        hidden_size=heads * rng.choice((4, 8)), intermediate_size=rng.randrange(8, 40),
        num_hidden_layers=rng.randrange(1, 4), num_attention_heads=heads, num_key_value_heads=rng.choice((1, 2)),
        head_dim=rng.choice((4, 6, 16)), max_position_embeddings=128, tie_word_embeddings=rng.random() < 0.5,
        rms_norm_eps=rng.choice((1e-5, 1e-6)), bos_token_id=None, eos_token_id=rng.choice((3, [3, 5])),
        rope_parameters=scaling | {"rope_theta": rng.choice((1e4, 1e6))})


@pytest.mark.parametrize("seed", range(36))
def test_a_random_configuration_computes_decodes_and_saves_as_transformers_does(seed, tmp_path):
    """Logits of a left-padded batch, 64 greedy tokens per row, then the same of what we save; every third in shards."""
    transformers = pytest.importorskip("transformers")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    theirs = transformers.AutoModelForCausalLM.from_config(random_config(rng)).float().eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(1 if "norm" in name else 0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB" if seed % 3 == 0 else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (seed % 3 == 0)
    ours = load(tmp_path / "theirs", "cpu", rope=scaled_frequencies)
    prompts = [[rng.randrange(6, ours.config.vocab_size) for _ in range(rng.randrange(1, 40))] for _ in range(4)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(padded, attention_mask=seen, position_ids=positions).logits
        cache = model_module.KVCache(ours.config, (1 - seen).sum(1), torch.float32)
        assert ((ours(padded, cache=cache) - expected)[seen == 1]).abs().max() <= 1e-4
    ids, _, _ = generate(ours, prompts, 1, 64, temperature=0)
    for row, prompt in zip(ids, prompts):
        greedy = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=64,
                                 do_sample=False, eos_token_id=-1, pad_token_id=0)[0, len(prompt):]
        assert row.tolist() == greedy.tolist()
    save(ours, tmp_path / "ours", Endless())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    saved = again(padded, attention_mask=seen, position_ids=positions).logits
    assert torch.equal(saved[seen == 1], expected[seen == 1])


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """In a separate process, whose peak is measured after a first small load, which brings libraries into memory."""
    large = tiny(vocab_size=200_000, hidden_size=256).to(torch.bfloat16)
    save(large, tmp_path / "large"), save(tiny(), tmp_path / "small")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, model
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
model.load({str(tmp_path / "small")!r}, "cpu")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = peak()
for dtype in (None, torch.float32):
    weights = sum(p.nbytes for p in model.load({str(tmp_path / "large")!r}, "cpu", dtype).parameters())
    print((peak() - before) / weights)
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux tells a process's peak of memory")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(0.5 < float(ratio) <= 1.15 for ratio in result.stdout.split()), result.stdout


@pytest.mark.parametrize("name", [dir.name.removeprefix("model_") for dir in FIXTURES])
def test_logits_are_those_of_the_transformers_installed_here(name, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(ROOT / "tests" / "fixtures")
    import make_model_fixtures
    theirs, ids = make_model_fixtures.build(name), torch.arange(64).view(2, 32)
    theirs.save_pretrained(tmp_path)
    assert (load(tmp_path, "cpu", rope=scaled_frequencies)(ids) - theirs(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_save_writes_opens_in_transformers_with_equal_logits(kind, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, ids = tiny(model_type=kind, tie_word_embeddings=tied, rope_theta=5000.0), torch.arange(32).view(2, 16)
    save(ours, tmp_path, Endless())
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-4
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id, theirs.dtype) == (7, None, torch.float32)
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.temperature) == (7, 0.6)
    assert type(theirs).__name__ == model_module.ARCHITECTURES[kind]


class Endless:
    """Stands in for a tokenizer where only its end token matters."""

    end_id, end_ids = 7, [7]

    def save(self, dir):
        (Path(dir) / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_back_as_itself(kind, tied, tmp_path):
    model = tiny(model_type=kind, tie_word_embeddings=tied, head_dim=6, rms_norm_eps=1e-5)
    save(model, tmp_path / "new", Endless())
    again = load(tmp_path / "new", "cpu")
    assert again.config == model.config
    assert (again.lm_head.weight is again.embed_tokens.weight) == tied
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(again.parameters(), model.parameters()))
    assert torch.equal(again.cos, model.cos) and torch.equal(again.sin, model.sin)
    assert ("lm_head.weight" in load_file(tmp_path / "new" / "model.safetensors")) != tied
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_weights_load_in_the_type_asked_for_and_else_as_stored(tmp_path):
    save(tiny().to(torch.bfloat16), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in load(tmp_path, "cpu").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path, "cpu", torch.float32).parameters()} == {torch.float32}


def test_a_loaded_model_outlives_its_file(tmp_path):
    save(tiny(), tmp_path)
    model = load(tmp_path, "cpu")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(model(torch.tensor([[1, 2]])), tiny()(torch.tensor([[1, 2]])))


def test_loading_draws_no_random_numbers(tmp_path):
    save(tiny(), tmp_path)
    before = torch.get_rng_state()
    load(tmp_path, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def rewrite(dir, change):
    config = json.loads((dir / "config.json").read_text())
    change(config)
    (dir / "config.json").write_text(json.dumps(config))
    return dir


def copy(name, tmp_path):
    return Path(shutil.copytree(ROOT / "tests" / "fixtures" / f"model_{name}", tmp_path / "copy"))


def test_a_config_of_older_transformers_reads_the_same(tmp_path):
    def older(config):
        theta = config.pop("rope_parameters")["rope_theta"]
        config |= {"rope_theta": theta, "rope_scaling": None, "sliding_window": 4096, "use_sliding_window": False}
        del config["layer_types"]
    dir = rewrite(copy("qwen2_gqa_tied", tmp_path), older)
    assert load(dir, "cpu").config == load(ROOT / "tests" / "fixtures" / "model_qwen2_gqa_tied", "cpu").config
    assert load(dir, "cpu").config.rope_theta == 1e6


def test_what_a_config_leaves_out_has_the_value_that_transformers_gives_it(tmp_path):
    dir = copy("llama_mha_untied", tmp_path)
    before = load(dir, "cpu").config
    def least(config):
        for name in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "num_key_value_heads", "head_dim",
                     "architectures"):
            config.pop(name)
    assert load(rewrite(dir, least), "cpu").config == before


@pytest.mark.parametrize("change, named", [
    ({"model_type": "mistral"}, "mistral"),
    ({"model_type": "qwen3_moe", "num_experts": 8}, "qwen3_moe"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     "rope scaling: low_freq_factor is None"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
     "low_freq_factor 4.0 is not below high_freq_factor 4.0"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}}, "rope scaling: beta_fast is '32'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}}, "yarn with a rope_theta of 1"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": -1, "mscale_all_dim": 1}}, "mscale is -1"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 10 ** 400}}, "attention_factor"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": -2.0}}, "rope scaling: factor is -2"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'longrope'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.*full_attention"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters.*partial_rotary_factor"),
    ({"attention_bias": True}, "attention_bias of a llama"), ({"mlp_bias": True}, "mlp_bias of a llama"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "llama3", "type": "linear", "rope_theta": 1e4, "factor": 2}}, "rope_parameters"),
    ({"head_dim": 0}, "head_dim is 0"), ({"head_dim": "4"}, "head_dim is '4'"), ({"head_dim": {}}, "head_dim"),
    ({"rope_parameters": {"rope_theta": 10 ** 400}}, "rope_theta"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"), ({"rms_norm_eps": True}, "rms_norm_eps"),
    ({"vocab_size": 10 ** 30}, "vocab_size"), ({"num_hidden_layers": 10 ** 7}, "num_hidden_layers"),
    ({"max_position_embeddings": 10 ** 9}, "max_position_embeddings"),
    ({"num_attention_heads": None}, "num_attention_heads"),
    ({"use_sliding_window": True, "sliding_window": 16}, "sliding window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"hidden_size": "16"}, "hidden_size"), ({"vocab_size": None}, "vocab_size"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"), ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"head_dim": "x"}, ""), ({"head_dim": 5}, "head_dim 5 is odd"),
])
def test_a_config_that_would_compute_something_else_is_refused_by_name(change, named, tmp_path):
    dir = rewrite(copy("llama_gqa_tied", tmp_path), lambda config: config.update(change))
    with pytest.raises(ValueError, match=f"config.json: (?s:.*){named}") as error:
        open_strangers(dir)
    assert "\n" not in str(error.value)


def test_a_scaled_model_is_not_computed_as_an_unscaled_one():
    dir = next(dir for dir in FIXTURES if read_config(dir).rope_scaling)
    with pytest.raises(ValueError, match="rope_scaling.py"):
        load(dir, "cpu")


@pytest.mark.parametrize("change", [
    {"model_type": "mistral"}, {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"},
    {"quantization_config": {"quant_method": "gptq"}}, {"use_sliding_window": True},
    {"layer_types": ["sliding_attention"]}, {"rope_parameters": {"partial_rotary_factor": 0.5}},
])
def test_a_config_that_would_compute_something_else_is_refused_without_the_check_too(change, tmp_path):
    dir = rewrite(copy("llama_gqa_tied", tmp_path), lambda config: config.update(change))
    with pytest.raises(ValueError):
        read_config(dir)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_check_expects_the_names_and_shapes_of_the_model(kind, tied, tmp_path):
    model = tiny(model_type=kind, tie_word_embeddings=tied, head_dim=6)
    save(model, tmp_path)
    shapes = {name: list(rows.shape) for name, rows in hf_tensors(model).items()}
    assert tensor_shapes(read_fields(tmp_path / "config.json")) == shapes


def damage(dir, change):
    weights = load_file(dir / "model.safetensors")
    change(weights)
    save_file(weights, dir / "model.safetensors")


def test_a_missing_an_extra_and_a_misshapen_tensor_are_named_with_the_file(tmp_path):
    for key, change in {
        "model.layers.1.mlp.up_proj.weight": lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
        "model.layers.2.mlp.up_proj.weight":
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16)}),
        "model.layers.0.self_attn.q_proj.bias":
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}),
        "model.norm.weight": lambda w: w.update({"model.norm.weight": torch.ones(15)}),
        "model.embed_tokens.weight":
            lambda w: w.update({"model.embed_tokens.weight": torch.zeros(64, 16, dtype=torch.int8)}),
    }.items():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        dir = copy("llama_gqa_tied", tmp_path)
        damage(dir, change)
        with pytest.raises(ValueError, match=re.escape(f"{dir / 'model.safetensors'}: tensor {key} ")):
            open_strangers(dir)


def test_an_untied_model_needs_its_head_and_a_tied_one_ignores_a_second_copy(tmp_path):
    dir = copy("llama_gqa_tied", tmp_path)
    expected = load(dir, "cpu")(torch.tensor([[1, 2]]))
    damage(dir, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    damage(dir, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))  # as in Llama 2
    check_model(dir)
    assert torch.equal(load(dir, "cpu")(torch.tensor([[1, 2]])), expected)
    rewrite(dir, lambda config: config.update(tie_word_embeddings=False))
    damage(dir, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        open_strangers(dir)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", "sub/other.safetensors", "..",
                                  "weights.bin", 3])
def test_an_index_never_leads_out_of_the_directory(name, tmp_path):
    dir = copy("llama_mha_untied", tmp_path)
    for place in (tmp_path, dir / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copy(dir / "model-00001-of-00004.safetensors", place / "other.safetensors")
    index = json.loads((dir / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json: "):
        open_strangers(dir)


def test_a_directory_that_holds_no_whole_model_is_refused_in_one_line_that_names_the_file(tmp_path):
    def refused(dir, named):
        with pytest.raises(ValueError, match=named) as error:
            open_strangers(dir)
        assert str(dir) in str(error.value) and "\n" not in str(error.value)

    refused(tmp_path / "absent", "config.json")
    refused(tmp_path, "config.json")
    for content in ("", "[]", "{", "{}"):
        (tmp_path / "config.json").write_text(content)
        refused(tmp_path, "config.json: ")
    dir = copy("llama_mha_untied", tmp_path)
    whole = (dir / "model-00002-of-00004.safetensors").read_bytes()
    (dir / "model-00002-of-00004.safetensors").write_bytes(whole[:len(whole) // 2])
    refused(dir, "model-00002-of-00004.safetensors: ")
    (dir / "model-00002-of-00004.safetensors").unlink()
    refused(dir, "model-00002-of-00004.safetensors: ")
    (dir / "model.safetensors.index.json").write_text("{}")
    refused(dir, "model.safetensors.index.json: ")
    (dir / "model.safetensors.index.json").unlink()
    refused(dir, "model.safetensors: ")


# ------------------------------------------------------------------------------------------- the chat

def spell(tokenizer, *parts):
    """Token ids, each part's own: text, or an id as it is."""
    return [id for part in parts for id in ([part] if isinstance(part, int) else tokenizer.encode(part))]


def actor(tmp_path, make, **changes):
    """A saved model that says what make(tokenizer) lists, whatever it is asked: each token is followed as there."""
    from tokenizer import Tokenizer
    tokenizer = Tokenizer(ROOT / "data")
    sizes = dict(hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                 max_position_embeddings=256, tie_word_embeddings=False)
    model = Transformer(Config(vocab_size=tokenizer.vocab_size, **sizes | changes))
    script = [*tokenizer.encode("\n"), *make(tokenizer)]
    assert len(set(zip(script, script[1:]))) == len(set(script[:-1]))  # a token has one successor
    with torch.no_grad():
        for p in model.parameters():
            p.zero_() if p.dim() == 2 else p.fill_(1)
        embeddings = torch.randn(tokenizer.vocab_size, 64, generator=torch.Generator().manual_seed(0))
        model.embed_tokens.weight.copy_(embeddings / embeddings.norm(dim=1, keepdim=True))
        for token, successor in set(zip(script, script[1:])):
            model.lm_head.weight[successor] += model.embed_tokens.weight[token]
    save(model, tmp_path, tokenizer)
    return tmp_path


def thoughtful(tokenizer):
    return spell(tokenizer, "<think>", "4", "苹", "果", "</think>", "<answer>", "7", "é", "</answer>", tokenizer.end_id)


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(dir, *options, typed=text) -> what `python model.py` prints, in this process; typed ends with Ctrl-D."""
    def talk(dir, *options, typed=""):
        monkeypatch.setattr(sys, "argv", ["model.py", str(dir), "--device", "cpu", *map(str, options)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        model_module.main()
        out, errors = capsys.readouterr()
        assert errors == ""
        return out
    return talk


def test_one_prompt_is_answered_with_the_thinking_apart_and_without_tags(tmp_path, talk):
    said = talk(actor(tmp_path, thoughtful), "--prompt", "How many?", "--temperature", 0)
    assert said == "4苹果\n\n7é\n"


@pytest.mark.parametrize("template, around", [
    ("Q: {prompt}\\nA:", "Q: How many?\nA:"), ("Q: {prompt}\nA:", "Q: How many?\nA:"), ("none", "How many?"),
    ("{prompt}\\n<think>\\n", "How many?\n<think>\n")])
def test_a_template_of_the_command_line_stands_around_the_prompt(template, around, tmp_path, monkeypatch, talk):
    from tokenizer import Tokenizer
    seen, prefill = [], model_module.prefill
    monkeypatch.setattr(model_module, "prefill", lambda model, prompts: seen.extend(prompts) or prefill(model, prompts))
    dir = actor(tmp_path, thoughtful)
    talk(dir, "--prompt", "How many?", "--max-new-tokens", 1, "--template", template)
    assert seen == [Tokenizer(dir).encode(around)]


def test_a_prompt_with_sampling_is_answered_alike_with_the_same_seed(tmp_path, talk):
    from tokenizer import Tokenizer
    tokenizer = Tokenizer(ROOT / "data")
    model = Transformer(Config(**TINY | {"vocab_size": tokenizer.vocab_size}))
    save(model.init_weights(torch.Generator().manual_seed(0)), tmp_path, tokenizer)
    said = [talk(tmp_path, "--prompt", "2 + 3?", "--max-new-tokens", 12, "--seed", seed) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2] and said[0].endswith("\n")


def test_several_turns_are_kept_and_the_oldest_dropped_where_the_context_ends(tmp_path, monkeypatch, talk):
    from tokenizer import Tokenizer
    dir = actor(tmp_path, thoughtful, max_position_embeddings=48)
    tokenizer, seen = Tokenizer(dir), []
    prefill = model_module.prefill
    spy = lambda model, prompts: seen.append(prompts[0]) or prefill(model, prompts)
    monkeypatch.setattr(model_module, "prefill", spy)
    said = talk(dir, "--temperature", 0, "--max-new-tokens", 16, typed="one\ntwo\nthree\nfour\nexit\n")
    asked = [tokenizer.encode(f"{text}\n") for text in ("one", "two", "three", "four")]
    turns = [ids + thoughtful(tokenizer) for ids in asked]
    for i, ids in enumerate(seen):
        kept = next(k for k in range(i + 1) if len(sum(turns[k:i], []) + asked[i]) <= 48 - 16)
        assert ids == sum(turns[kept:i], []) + asked[i]
    assert len(seen) == 4 and seen[1][:len(turns[0])] == turns[0] and seen[3][:len(turns[0])] != turns[0]
    assert said == "\n> 4苹果\n\n7é\n" * 4 + "\n> "


def test_ctrl_c_ends_an_answer_and_not_the_program_and_thinking_is_dim_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    endless = lambda tokenizer: spell(tokenizer, "<think>", "a", "a")
    dir = actor(tmp_path, endless, max_position_embeddings=20000)
    ours, theirs = pty.openpty()
    command = [sys.executable, "model.py", dir, "--temperature", "0", "--max-new-tokens", "20000", "--device", "cpu"]
    chat = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # else a job ignores it
    os.close(theirs)
    said = b""
    try:
        chat.stdin.write(b"hello\n")
        chat.stdin.flush()
        while b"aaa" not in said:  # it is at it
            said += os.read(ours, 1000)
        chat.send_signal(signal.SIGINT)
        while not said.endswith(b"> "):  # it asks again
            said += os.read(ours, 1000)
        _, errors = chat.communicate(b"exit\n", timeout=60)
    finally:
        chat.kill()
        os.close(ours)
    assert (chat.returncode, errors) == (0, b"")
    assert re.search(rb"\x1b\[2ma+\x1b\[0m\r\n\r\n> $", said) and b"<think>" not in said


def test_ctrl_d_ends_the_chat(tmp_path, talk):
    assert talk(actor(tmp_path, thoughtful), "--temperature", 0, typed="hi\n") == "\n> 4苹果\n\n7é\n\n> \n"


def test_ctrl_c_while_typing_asks_again(tmp_path, talk, monkeypatch):
    typed = iter([KeyboardInterrupt, "hi", EOFError])

    def type_next(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line
    monkeypatch.setattr("builtins.input", type_next)
    assert talk(actor(tmp_path, thoughtful), "--temperature", 0) == "\n4苹果\n\n7é\n\n"


def test_a_mistake_is_answered_in_one_line_that_names_it_with_exit_code_2(tmp_path, capsys, monkeypatch):
    dir = actor(tmp_path / "model", thoughtful, max_position_embeddings=16)
    (tmp_path / "bare").mkdir()
    save(tiny(), tmp_path / "bare")
    small = tmp_path / "small"
    shutil.copytree(dir, small)
    save(tiny(), small)
    for args, named in (
        ([tmp_path / "nothing", "--prompt", "hi"], "nothing"),
        ([tmp_path / "bare", "--prompt", "hi"], "tokenizer.json"),
        ([small, "--prompt", "hi"], "tokenizer.json has"), ([dir, "--prompt", "a b " * 20], "context of 16"),
        ([dir, "--tempo", "1"], "--tempo"), ([dir, "--top-p", "1.5"], "top_p 1.5"),
        ([dir, "--temperature", "nan"], "temperature nan"), ([dir, "--device", "abacus"], "abacus"),
        ([dir, "--max-new-tokens", "0"], "max_new_tokens 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["model.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            model_module.main()
        out, error = capsys.readouterr()
        assert (end.value.code, out, error.count("\n")) == (2, "", 1) and named in error, (args, error)


def test_streaming_shows_whole_characters_and_never_takes_back_what_it_printed():
    whole = " \n<think> 苹 5 < 7 \x1b[31m</think>\n<answer> é<b>🍎</answer><thin"
    data, printed = whole.encode(), ""
    for end in range(len(data) + 1):
        text = visible(data[:end].decode(errors="replace"), "[", "]", last=False)
        assert text.startswith(printed)
        printed = text
    assert printed == "[苹 5 < 7 �[31m\n\n]é<b>🍎"
    assert visible(whole, "[", "]") == printed + "\n\n]<thin]\n"
    assert visible("Hello. </answer>") == "Hello.\n"


# ------------------------------------------------------------------------------------------- a stranger's files

def header(fields, size=64):
    content = json.dumps(fields).encode()
    return len(content).to_bytes(8, "little") + content + bytes(size)


@pytest.mark.parametrize("content", [
    (2 ** 62).to_bytes(8, "little") + b"{}", b"\xff" * 8, b"", (10).to_bytes(8, "little") + b"not JSON!!",
    header({"lm_head.weight": {"dtype": "F32", "shape": [2 ** 40, 2 ** 40], "data_offsets": [0, 64]}}),
    header({"lm_head.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 2 ** 60]}}),
    header({"lm_head.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [64, 0]}}),
    header({"lm_head.weight": {"dtype": "PICKLE", "shape": [4, 4], "data_offsets": [0, 64]}}),
    header({"lm_head.weight": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}}),
    header({"../../lm_head.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}),
    header([1, 2]), header({"x": 5}),
], ids=range(12))
def test_a_hostile_header_is_refused_at_once_in_one_line_that_names_the_file(content, tmp_path):
    dir = copy("llama_mha_untied", tmp_path)
    shard = sorted(dir.glob("*.safetensors"))[-1]
    load(dir, "cpu")  # libraries come into memory here
    shard.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=re.escape(shard.name)) as caught:
        open_strangers(dir)
    assert "\n" not in str(caught.value) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("index", [
    "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../config.json"}}',
    '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "absent.safetensors"}}', "[" * 5000, "\\xff"])
def test_a_hostile_index_is_refused_in_one_line_that_names_the_file(index, tmp_path):
    dir = copy("llama_mha_untied", tmp_path)
    (dir / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=re.escape(str(dir))) as caught:
        open_strangers(dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [
    "[]", "5", "[" * 5000, "{", '{"model_type": ["llama"]}', '{"model_type": "llama", "rope_scaling": 5}',
    '{"model_type": "llama", "layer_types": 5}', '{"model_type": {"a": 1}}'])
def test_a_hostile_config_is_refused_in_one_line_that_names_the_file(config, tmp_path):
    dir = copy("llama_mha_untied", tmp_path)
    (dir / "config.json").write_text(config)
    with pytest.raises(ValueError, match="config.json") as caught:
        open_strangers(dir)
    assert "\n" not in str(caught.value)


def test_a_pipe_a_device_or_a_huge_file_in_a_models_place_is_refused_at_once(tmp_path):
    def link_to_zeros(path):
        path.symlink_to("/dev/zero")

    def fill(path):
        path.touch()
        os.truncate(path, 2 ** 34)
    for name in ("config.json", "model-00002-of-00004.safetensors", "model.safetensors.index.json"):
        for make in (os.mkfifo, link_to_zeros, fill):
            dir = copy("llama_mha_untied", tmp_path / f"{len([*tmp_path.glob('*')])}")
            (dir / name).unlink()
            make(dir / name)
            with pytest.raises(ValueError, match=re.escape(name)) as caught:
                open_strangers(dir)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("huge", [{"max_position_embeddings": 2 ** 20, "head_dim": 256}, {"num_hidden_layers": 20_000},
                                  {"hidden_act": "x" * 10 ** 6}])
def test_what_a_config_asks_for_takes_no_memory_before_the_tensors_are_known_to_have_it(huge, tmp_path):
    dir = copy("llama_mha_untied", tmp_path)
    config = json.loads((dir / "config.json").read_text())
    (dir / "config.json").write_text(json.dumps(config | huge))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=re.escape(str(dir))) as caught:
        open_strangers(dir)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert time.process_time() - started < 2 and len(str(caught.value)) < 600


def test_a_long_run_of_spaces_or_tags_is_shown_at_once():
    started = time.process_time()
    assert visible(" " * 50_000 + "x") == "x\n"
    assert visible("x" + "</think>" * 5000 + " " * 50_000) == "x\n"
    assert visible("<" * 50_000, last=False) == ""
    assert time.process_time() - started < 2


def test_new_weights_are_normal_and_smaller_where_they_write_into_the_residual_stream():
    """0.02 at width 768, as 1/sqrt(width); divided by sqrt(2 layers) in the projections that add to the stream."""
    config = Config(vocab_size=64, hidden_size=192, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all()
            continue
        std = 0.04 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.04
        assert abs(weight.std().item() / std - 1) < 0.05 and abs(weight.mean().item()) < std / 20, name

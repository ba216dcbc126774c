"""variants/lora.py and lab/adapters.py. What peft makes of the same adapters is recorded in tests/fixtures/lora_*."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo
from lab import checkpoint
from lab.adapters import load_model, save_adapters
from lab.check_adapter import base_directory
from lab.graphs import Decoder
from lab.layers import fast_layers, plain_products, recompute
from lab.memory import Memory
from lab.trainee import Trainee
from model import Config, Transformer, generate, hf_tensors, load, save
from variants.lora import adapters, add_adapters, merge
from variants.ppo import PPO
from variants.prime import PRIME

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FAMILIES = ("llama", "qwen2", "qwen3")
BASES = {"llama": "model_llama_gqa_tied", "qwen2": "model_qwen2_mha_untied", "qwen3": "model_qwen3_gqa_untied"}


def tiny(dtype=torch.float32, **more):
    config = Config(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64, **more)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # far from uniform
    return model.to(dtype)


def trained(model, rank=2):
    """The model with adapters that are far from zero."""
    add_adapters(model, rank, generator=torch.Generator().manual_seed(1))
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in adapters(model).values():
            part.lora_B.normal_(0, 0.02, generator=random)
    return model


IDS = torch.randint(48, (2, 20), generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------- beside peft

def theirs(family, kind="shared"):
    """(our model with peft's adapters, what peft recorded): one A of ours in place of the equal ones of its parts."""
    dir = FIXTURES / f"lora_{family}_{kind}"
    model = load(FIXTURES / BASES[family], "cpu", torch.float32)
    add_adapters(model, rank=3, alpha=6)
    saved = load_file(dir / "adapter_model.safetensors")
    with torch.no_grad():
        for name, part in adapters(model).items():
            for full_name, rows in hf_tensors(model, {f"{name}.weight": part.lora_B}).items():
                matrix = "base_model.model." + full_name.removesuffix("weight")
                rows.copy_(saved[f"{matrix}lora_B.weight"])
                part.lora_A.copy_(saved[f"{matrix}lora_A.weight"])
    return model, load_file(dir / "expected.safetensors")


@pytest.mark.parametrize("layers", [lambda model: model, fast_layers, recompute], ids=["plain", "fast", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_pefts_where_a_shared_a_has_the_sum_of_theirs(family, layers):
    model, expected = theirs(family)
    logits = layers(model)(expected["ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-5)
    targets = expected["ids"][:, 1:]
    loss = -logits[:, :-1].log_softmax(-1).gather(2, targets[..., None]).mean()
    loss.backward()
    for name, part in adapters(model).items():
        of_A = torch.zeros_like(part.lora_A)
        for full_name, rows in hf_tensors(model, {f"{name}.weight": part.lora_B.grad}).items():
            matrix = "base_model.model." + full_name.removesuffix("weight")
            torch.testing.assert_close(rows, expected[f"{matrix}lora_B.weight"], atol=1e-5, rtol=1e-4)
            of_A += expected[f"{matrix}lora_A.weight"]
        torch.testing.assert_close(part.lora_A.grad, of_A, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_are_pefts(family):
    model, expected = theirs(family)
    torch.testing.assert_close(merge(model)(expected["ids"]), expected["logits"], atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad and not hasattr(p, "is_base") for p in model.parameters())  # a plain model again


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_of_pefts_is_merged_on_loading(family, kind, tmp_path):
    dir = adapter_directory(tmp_path, f"lora_{family}_{kind}", FIXTURES / BASES[family])
    expected = load_file(FIXTURES / f"lora_{family}_{kind}" / "expected.safetensors")
    model = load_model(dir, "cpu", torch.float32)
    torch.testing.assert_close(model(expected["ids"]), expected["logits"], atol=1e-5, rtol=1e-5)
    assert base_directory(dir) == str(FIXTURES / BASES[family]) and not adapters(model)


def adapter_directory(tmp_path, name, base):
    """A copy of a recorded adapter that names this base."""
    dir = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    config = json.loads((dir / "adapter_config.json").read_text())
    (dir / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return dir


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_merged_again_on_loading_and_holds_pefts_tensors(family, tmp_path):
    model, expected = theirs(family)
    save_adapters(model, FIXTURES / BASES[family], tmp_path)
    saved, recorded = (load_file(dir / "adapter_model.safetensors") for dir in
                       (tmp_path, FIXTURES / f"lora_{family}_shared"))
    assert saved.keys() == recorded.keys() and all(torch.equal(saved[name], recorded[name]) for name in saved)
    torch.testing.assert_close(load_model(tmp_path, "cpu")(expected["ids"]), expected["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_opens_in_peft(family, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model, expected = theirs(family)
    save_adapters(model, FIXTURES / BASES[family], tmp_path)
    base = AutoModelForCausalLM.from_pretrained(FIXTURES / BASES[family], dtype=torch.float32)
    logits = PeftModel.from_pretrained(base, tmp_path)(expected["ids"]).logits
    torch.testing.assert_close(logits, model(expected["ids"]), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- the adapters themselves

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_first_the_model_is_its_base_to_the_last_bit(dtype):
    base = tiny(dtype)
    expected = base(IDS)
    assert torch.equal(add_adapters(copy.deepcopy(base), 4)(IDS), expected)
    assert not torch.equal(trained(base)(IDS), expected)


def test_each_matrix_of_the_layers_has_an_adapter_and_nothing_else_is_trained():
    model = add_adapters(tiny(tie_word_embeddings=False), 4)
    matrices = {f"layers.{i}.{name}" for i in range(2) for name in
                ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")}
    assert adapters(model).keys() == matrices and type(model.lm_head) is torch.nn.Linear
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{matrix}.lora_{part}" for matrix in matrices for part in "AB"}
    assert {p.dtype for p in add_adapters(tiny(torch.bfloat16), 4).parameters() if p.requires_grad} == {torch.float32}


def test_the_scale_is_alpha_over_the_rank():
    linear = torch.nn.Linear(3, 2, bias=False)
    part = add_adapters(torch.nn.Sequential(linear), rank=2, alpha=8)[0]
    with torch.no_grad():
        part.weight.zero_()
        part.lora_A.copy_(torch.tensor([[1., 0, 0], [0, 1, 0]]))
        part.lora_B.copy_(torch.tensor([[1., 0], [2, 3]]))
    assert part(torch.tensor([[1., 10, 100]])).tolist() == [[4 * 1, 4 * (2 * 1 + 3 * 10)]]
    assert part.delta().tolist() == [[4, 0, 0], [8, 12, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_model_is_a_plain_one_of_sums_that_were_rounded_once_however_often_it_is_merged(dtype):
    model, expected = trained(tiny(dtype)), tiny(dtype).state_dict()
    for name, part in adapters(model).items():
        product = part.lora_B @ part.lora_A
        expected[f"{name}.weight"] = (part.weight.float() + 32 / 2 * product).to(dtype)
    for _ in range(2):
        merged = merge(model).state_dict()
        assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in merged)
    assert {type(part) for part in model.modules()} == {type(part) for part in tiny().modules()}


def test_a_second_set_of_adapters_is_refused():
    with pytest.raises(ValueError, match="already"):
        add_adapters(trained(tiny()), 2)


def test_a_bias_is_added_once():
    linear = torch.nn.Linear(3, 2)
    x, expected = torch.ones(1, 3), linear(torch.ones(1, 3))
    assert torch.equal(add_adapters(torch.nn.Sequential(linear), 1)(x), expected)


# ------------------------------------------------------------------------------------------- one set of weights

def storage_of(model, is_base):
    return {p.data_ptr() for p in model.parameters() if hasattr(p, "is_base") == is_base}


CONFIG = grpo.GRPOConfig(rollouts=2, prompts_per_rollout=2, group_size=4, minibatches=2, lr=1e-2, warmup=1, beta=0.1,
                         max_new_tokens=6, micro_batch_tokens=64, reference_every=100)


def run(model, config=CONFIG, **more):
    rows = []
    grpo.train(model, [[1, 2, 3], [4, 5, 6, 7]], encode=list, decode=lambda ids: ids,
               generate=more.pop("generate", generate),
               end_ids=[0], rewards={"sevens": lambda ids, example: ids.count(7) / len(ids)}, config=config,
               log=lambda metrics, r: rows.append((metrics, r)), **more)
    return rows


def test_adapters_begin_as_peft_begins_them_a_uniform_a_and_a_b_of_zeros():
    """Kaiming's uniform with a = sqrt(5): between -1 and 1 over the square root of a row's numbers."""
    net = torch.nn.Sequential(torch.nn.Linear(400, 3))
    part, = adapters(add_adapters(net, 50, generator=torch.Generator().manual_seed(0))).values()
    assert not part.lora_B.any() and 0.999 / 20 < part.lora_A.abs().max() <= 1 / 20
    assert part.lora_A.std().item() == pytest.approx(1 / 20 / 3 ** 0.5, rel=0.02)


@pytest.mark.parametrize("estimator", [None, PPO, PRIME])
def test_sampler_trainer_reference_and_critic_have_one_base_and_their_own_adapters(estimator):
    model, seen = add_adapters(plain_products(fast_layers(tiny(torch.bfloat16))), 2), []

    def spy(sampler, *args, **settings):
        seen.append(sampler)
        return generate(sampler, *args, **settings)

    def save(**parts):
        seen.extend(part for part in parts.values() if isinstance(part, torch.nn.Module))

    of = estimator(model, CONFIG) if estimator else None
    if estimator is PRIME:
        of.outcome = "sevens"
    run(model, CONFIG, generate=spy, save=save, advantage_estimator=of)
    base, own = storage_of(model, True), storage_of(model, False)
    others = {id(part): part for part in seen if part is not model}.values()
    assert len(others) == {None: 1, PPO: 2, PRIME: 3}[estimator]  # reference; critic; reward model and its reference
    for part in others:
        assert storage_of(part, True) == base and not storage_of(part, False) & own


def test_the_reference_is_the_base_to_the_last_bit():
    base, references = plain_products(fast_layers(tiny(torch.bfloat16))), []
    model = add_adapters(copy.deepcopy(base), 2)
    rows = run(model, save=lambda **parts: references.append(parts["reference"]))
    r = rows[-1][1]  # its reference log-probabilities were of the base, though the adapters had moved by then
    assert all(part.lora_B.abs().max() > 0 for part in adapters(model).values())
    assert torch.equal(grpo.all_logprobs(base, r, CONFIG), r.ref_logprobs)
    assert torch.equal(grpo.all_logprobs(references[-1], r, CONFIG), r.ref_logprobs)
    assert not torch.equal(grpo.all_logprobs(model, r, CONFIG), r.ref_logprobs)


def test_a_recording_has_the_models_base_and_casts_its_adapters():
    model = trained(tiny(torch.bfloat16))
    decoder = Decoder(model, 2, 32, lambda run: None)
    assert storage_of(decoder.model, True) == storage_of(model, True)
    assert {p.dtype for p in decoder.model.parameters()} == {torch.bfloat16}
    assert torch.equal(decoder.model(IDS), model(IDS))
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert decoder.bytes() == 2 * decoder.kept["k"].nbytes + 2 * own


def test_training_moves_the_adapters_towards_the_reward_and_leaves_the_base():
    model = add_adapters(tiny(torch.bfloat16), 4)
    before = [p.detach().clone() for p in model.parameters() if hasattr(p, "is_base")]
    rows = run(model, grpo.GRPOConfig(rollouts=30, prompts_per_rollout=2, group_size=16, lr=1e-2, warmup=1,
                                      max_new_tokens=6))
    rewards = [metrics["sevens"] for metrics, _ in rows]
    assert rewards[0] < 0.2 and rewards[-1] > 0.6, rewards
    assert all(torch.equal(p, q) for p, q in zip(before, [p for p in model.parameters() if hasattr(p, "is_base")]))


# ------------------------------------------------------------------------------------------- what is written

def test_a_state_holds_adapters_and_their_moments_only(tmp_path):
    model, states = add_adapters(tiny(torch.bfloat16), 2), []
    run(model, save=lambda **parts: states.append(checkpoint.state_of(**parts)))
    tensors, _ = states[-1]
    names = {name for name in tensors if not name.startswith("optimizer.")}
    assert names - {"generator", "shuffler"} == {f"{part}.{name}" for part in ("model", "reference")
                                                 for name, p in model.named_parameters() if p.requires_grad}
    moments = [name for name in tensors if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert len(moments) == 2 * sum(p.requires_grad for p in model.parameters())


def test_the_merged_model_is_the_files_weights_plus_the_adapters_not_the_rounded_copys(tmp_path):
    base = tiny()  # in float32, of which a bfloat16 copy is trained
    save(base, tmp_path / "base")
    memory = Memory(lora=2)
    trainee = Trainee(load_model(tmp_path / "base", "cpu", memory.dtype("bfloat16")), memory, tmp_path / "base")
    assert trainee.model.embed_tokens.weight.dtype == torch.bfloat16
    with torch.no_grad():
        for part in adapters(trainee.model).values():
            part.lora_B.fill_(1e-4)
    merged = trainee.whole()
    for name, part in adapters(trainee.model).items():
        weight = base.get_submodule(name).weight + 32 / 2 * (part.lora_B.double() @ part.lora_A.double())
        torch.testing.assert_close(merged.get_submodule(name).weight.double(), weight, atol=1e-7, rtol=1e-6)
    assert torch.equal(merged.embed_tokens.weight, base.embed_tokens.weight) and not adapters(merged)

"""Adam on the CPU is the same training: to the last bit in float32, to rounding in half precision."""

import copy
import math

import pytest
import torch

import grpo
import model as transformer
import sft
from lab import checkpoint
from lab.layers import fast_layers, recompute
from variants.offload import send_weights, step_on_cpu

EXAMPLES = [([i % 14 + 1, (3 * i) % 15, i % 7, 0], 1) for i in range(160)]


def offloaded(model, masters, make_optimizer):
    def make(parameters, **settings):
        return step_on_cpu(make_optimizer(masters.parameters(), **settings), model, masters)
    return make


def train_sft(model, dtype, **more):
    """Twenty updates of two micro-batches each."""
    config = sft.SFTConfig(lr=3e-3, epochs=1, batch_tokens=32, row_length=8, micro_batch_rows=2, dtype=dtype)
    history = []
    sft.train(model, EXAMPLES, config, log=lambda metrics, batch: history.append(metrics), **more)
    return history


def train_grpo(model, dtype, **more):
    """Ten rollouts of two updates each, of several micro-batches; the reference moves once."""
    config = grpo.GRPOConfig(rollouts=10, prompts_per_rollout=2, group_size=4, minibatches=2, lr=3e-3, warmup=4,
                             max_new_tokens=6, reference_every=5, micro_batch_tokens=20, dtype=dtype)
    history = []
    grpo.train(model, [{"p": [1, 2, 5, 7, 8, 9]}, {"p": [3]}], encode=lambda e: e["p"],
               decode=lambda ids: " ".join(map(str, ids)), generate=transformer.generate, end_ids=[0],
               rewards={"length": lambda text, e: len(text) % 3 / 2}, config=config,
               log=lambda metrics, r: history.append(metrics), **more)
    return history


TRAININGS = {"sft": (train_sft, sft.adamw), "grpo": (train_grpo, grpo.adam)}


def without_times(history):
    return [{name: value for name, value in metrics.items() if "seconds" not in name} for metrics in history]


def both(name, tiny, dtype, shape=lambda model: model):
    """(history, weights, moments) of a training with everything in one place, and with the step on the CPU."""
    train, make_optimizer = TRAININGS[name]
    results = []
    for is_offloaded in (False, True):
        masters, made = shape(fast_layers(tiny(seed=1))), []
        model = masters
        make = make_optimizer
        if is_offloaded:
            model = copy.deepcopy(masters).to(getattr(torch, dtype))
            make = offloaded(model, masters, make_optimizer)

        def kept(parameters, make=make, **settings):
            made.append(make(parameters, **settings))
            return made[0]
        history = train(model, dtype, make_optimizer=kept)
        if is_offloaded:
            assert all(torch.equal(p, q.to(p.dtype)) for p, q in zip(model.parameters(), masters.parameters()))
            assert all(p.grad is None for p in model.parameters())
        results.append((history, list(masters.parameters()), made[0].state_dict()["state"]))
    return results


@pytest.mark.parametrize("shape", [lambda model: model, recompute], ids=["plain", "recomputed"])
@pytest.mark.parametrize("name", TRAININGS)
def test_in_float32_twenty_updates_are_the_same_to_the_last_bit(name, shape, tiny):
    here, there = both(name, tiny, "float32", shape)
    assert len(here[0]) == {"sft": 20, "grpo": 10}[name] and not any(metrics["skipped"] for metrics in here[0])
    assert without_times(here[0]) == without_times(there[0])
    assert all(torch.equal(*pair) for pair in zip(here[1], there[1], strict=True))
    assert not torch.equal(here[1][0], tiny(seed=1).embed_tokens.weight)
    assert here[2].keys() == there[2].keys() and len(here[2]) == len(here[1])
    for number, moments in here[2].items():
        assert {"exp_avg", "exp_avg_sq", "step"} == moments.keys() == there[2][number].keys()
        assert all(torch.equal(moments[key], there[2][number][key]) for key in moments)


def test_in_bfloat16_the_loss_follows_that_of_the_same_training_in_one_place(tiny, capsys):
    """One computes with weights that autocast rounds, the other with weights that were rounded after the step."""
    here, there = both("sft", tiny, "bfloat16")
    losses = [[metrics["loss"] for metrics in history] for history in (here[0], there[0])]
    differences = [abs(a - b) for a, b in zip(*losses)]
    with capsys.disabled():
        print(f"\n{len(losses[0])} updates in bfloat16: the loss falls from {losses[0][0]:.4f} to {losses[0][-1]:.4f}, "
              f"with Adam on the CPU to {losses[1][-1]:.4f}; the largest difference is {max(differences):.5f}")
    assert losses[0][-1] < 0.8 * losses[0][0] and max(differences) < 0.02
    assert {p.dtype for p in there[1]} == {torch.float32}
    moved = [(p - q).norm() / (p - start).norm() for p, q, start in
             zip(here[1], there[1], tiny(seed=1).parameters()) if p.dim() > 1]
    assert max(moved) < 0.2  # of the way that they went


def test_the_norm_of_the_gradient_is_summed_in_the_models_order_wherever_it_lies(tiny, monkeypatch):
    """In another order it would round otherwise, and a run would not be the same as before."""
    clipped, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: (
        clipped.append(list(parameters)), clip(clipped[-1], most))[1])
    for name, (train, make_optimizer) in TRAININGS.items():
        masters = tiny(seed=1)
        for model in (masters, copy.deepcopy(masters)):
            make = make_optimizer if model is masters else offloaded(model, masters, make_optimizer)
            train(model, "float32", make_optimizer=make)
            assert [id(p) for p in clipped[-1]] == [id(p) for p in masters.parameters()]


def test_in_float16_an_overflow_leaves_masters_weights_and_moments_alone(tiny):
    masters = tiny()
    model = copy.deepcopy(masters).half()
    optimizer = step_on_cpu(sft.adamw(masters.parameters(), lr=0.1), model, masters)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
    before = [p.clone() for p in (*masters.parameters(), *model.parameters())]
    for is_fine in (False, True):
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = torch.nn.functional.cross_entropy(model(ids)[0].float(), ids[0])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(new_scale=1024.0)
        optimizer.zero_grad()
        now = [p for p in (*masters.parameters(), *model.parameters())]
        assert all(torch.equal(*pair) for pair in zip(before, now)) != is_fine and math.isfinite(loss.item())


def test_what_a_parameter_keeps_hides_no_method_of_a_tensor(tiny):
    """Such as half, which model.half() calls."""
    masters = tiny()
    model = copy.deepcopy(masters)
    step_on_cpu(sft.adamw(masters.parameters(), lr=0.1), model, masters)
    assert not any(hasattr(torch.Tensor, name) for p in model.parameters() for name in vars(p))


def test_a_state_of_masters_comes_back_into_model_and_masters_bit_for_bit(tiny, tmp_path):
    def start(seed):
        masters = tiny(seed=seed)
        model = copy.deepcopy(masters).bfloat16()
        return model, masters, step_on_cpu(sft.adamw(masters.parameters(), lr=1e-2), model, masters)

    def step(model, masters, optimizer):
        model(torch.tensor([[1, 2, 3]])).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    through = start(0)
    step(*through)
    checkpoint.save(tmp_path, *checkpoint.state_of(model=through[1], optimizer=through[2]))
    model, masters, optimizer = again = start(1)
    checkpoint.restore(*checkpoint.load(tmp_path), model=masters, optimizer=optimizer)
    send_weights(model, masters)
    for one in (through, again):
        step(*one)
    assert all(torch.equal(*pair) for pair in zip(through[0].parameters(), model.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(through[1].parameters(), masters.parameters(), strict=True))

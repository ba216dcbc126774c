"""float16: a scaled gradient that overflows is no fault of a training. The step is left out, the scale is halved."""

import math
from functools import partial

import pytest
import torch

import grpo
import model as transformer
import sft
from lab import checkpoint
from variants.ppo import PPO
from variants.prime import PRIME

EXAMPLES = [([i % 14 + 1, (3 * i) % 15, i % 7, 0], 1) for i in range(320)]
HUGE = 2.0 ** 32


@pytest.fixture
def scale(monkeypatch):
    """scale(x): a GradScaler begins with x."""
    real = torch.amp.GradScaler
    return lambda value: monkeypatch.setattr(torch.amp, "GradScaler", partial(real, init_scale=value))


def weights_of(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def train_sft(model, dtype="float16", log=None, **more):
    config = sft.SFTConfig(lr=3e-3, epochs=1, batch_tokens=32, row_length=8, micro_batch_rows=2, dtype=dtype)
    sft.train(model, EXAMPLES, config, log=log, **more)


def train_grpo(model, dtype="float16", log=None, minibatches=1, rollouts=24, generate=transformer.generate, **more):
    config = grpo.GRPOConfig(rollouts=rollouts, minibatches=minibatches, prompts_per_rollout=2, group_size=4, lr=3e-3,
                             warmup=0, max_new_tokens=6, old_logprobs="sampler", dtype=dtype)
    grpo.train(model, [{"p": [1, 2]}, {"p": [3]}], encode=lambda e: e["p"],
               decode=lambda ids: " ".join(map(str, ids)), generate=generate, end_ids=[0],
               rewards={"sum": lambda text, e: sum(map(int, text.split())) % 7 / 6}, config=config, log=log, **more)


TRAININGS = {"sft": train_sft, "grpo": train_grpo}


def watched(train, model, **more):
    """(metrics, weights, scale) after each step."""
    history, metrics_of = [], []

    def save(scaler, **_):
        history.append((metrics_of[-1], weights_of(model), scaler.get_scale()))
    train(model, log=lambda metrics, _: metrics_of.append(metrics), save=save, **more)
    return history


@pytest.mark.parametrize("name", TRAININGS)
def test_an_overflow_leaves_the_step_out_and_halves_the_scale_until_the_training_goes_on(name, tiny, scale):
    scale(HUGE)
    model = tiny()
    before = weights_of(model)
    history = watched(TRAININGS[name], model)
    overflows = [metrics["overflow"] for metrics, _, _ in history]
    first = overflows.index(0)
    assert first > 5 and overflows == [1] * first + [0] * (len(history) - first)
    assert not any(metrics["skipped"] for metrics, _, _ in history)
    assert [scale for _, _, scale in history[:first + 1]] == [HUGE / 2 ** (i + 1) for i in range(first)] + [
        HUGE / 2 ** first]
    assert all(torch.equal(weights, before) for _, weights, _ in history[:first])
    assert not torch.equal(history[first][1], before) and history[-1][1].isfinite().all()
    assert not math.isfinite(history[0][0]["grad_norm"]) and math.isfinite(history[-1][0]["grad_norm"])
    if name == "sft":
        assert history[-1][0]["loss"] < 0.8 * history[0][0]["loss"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_a_rollout_reports_are_the_means_over_the_updates_that_were_made(tiny, scale):
    scale(HUGE)
    history = watched(train_grpo, tiny(), minibatches=4, rollouts=6)
    mixed = [metrics for metrics, _, _ in history if 0 < metrics["overflow"] < 4]
    assert mixed and all(math.isfinite(metrics[name]) for metrics in mixed for name in ("grad_norm", "kl", "loss"))
    total = sum(metrics["overflow"] for metrics, _, _ in history)
    assert history[-1][2] == HUGE / 2 ** total and not any(metrics["skipped"] for metrics, _, _ in history)


def test_a_loss_that_is_not_finite_is_skipped_and_is_no_overflow(tiny, monkeypatch):
    real, calls = sft.loss_sum, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 5 else 1)  # within the third step
    monkeypatch.setattr(sft, "loss_sum", broken)
    history = watched(train_sft, tiny())
    assert [(metrics["skipped"], metrics["overflow"]) for metrics, _, _ in history[1:4]] == [(0, 0), (1, 0), (0, 0)]
    assert torch.equal(history[1][1], history[2][1]) and not torch.equal(history[2][1], history[3][1])

    def generate(*args, **settings):
        ids, lengths, logprobs = transformer.generate(*args, **settings)
        return ids, lengths, logprobs * float("nan")
    (metrics, _, _), = watched(partial(train_grpo, generate=generate), tiny(), rollouts=1, minibatches=2)
    assert (metrics["skipped"], metrics["overflow"]) == (2, 0)


def test_without_a_scale_left_to_halve_it_is_a_skipped_step(tiny, scale, monkeypatch):
    """An infinite gradient at scale 1 is no matter of the scale."""
    scale(2.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    metrics = [metrics for metrics, _, _ in watched(train_sft, tiny())]
    assert all(m["skipped"] + m["overflow"] == 1 for m in metrics)


@pytest.mark.parametrize("name", TRAININGS)
def test_overflows_end_no_run_however_many_and_five_skipped_updates_do(name, tiny, scale, monkeypatch, tmp_path):
    guard, seen = checkpoint.FiniteGuard(tmp_path), []

    def log(metrics, batch):
        seen.append(metrics)
        if name == "sft":
            guard.check_sft(metrics, batch)
        else:
            guard.check_rl(metrics, batch, grpo.GRPOConfig(minibatches=1))
    scale(HUGE)
    TRAININGS[name](tiny(), log=log)
    assert sum(metrics["overflow"] for metrics in seen) > checkpoint.SKIPS + 1
    sick = tiny()
    with torch.no_grad():
        sick.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="5 updates in a row"):
        TRAININGS[name](sick, log=log)


@pytest.mark.parametrize("name", ["ppo", "prime"])
def test_a_critic_and_a_reward_model_leave_a_step_out_and_learn_on_at_a_smaller_scale(name, tiny, scale):
    scale(HUGE)
    config = grpo.GRPOConfig(prompts_per_rollout=2, group_size=4, minibatches=1, dtype="float16")
    ids = torch.randint(1, 16, (8, 7), generator=torch.Generator().manual_seed(0))
    accuracy = torch.tensor([[1.0, 0, 1, 0]] * 2)
    r = grpo.Rollout(examples=[{}] * 2, texts=[""] * 8, ids=ids, mask=torch.ones(8, 6, dtype=torch.bool), ends=[7] * 8,
                     lengths=torch.full((8,), 6), finished=torch.ones(8), sampled_logprobs=torch.zeros(8, 6),
                     parts={"accuracy": accuracy}, rewards=accuracy, old_logprobs=torch.zeros(8, 6))
    estimator = PPO(tiny(), config) if name == "ppo" else PRIME(tiny(), config)
    network, loss, scaler = (estimator.critic, "value_loss", "critic_scaler") if name == "ppo" else (
        estimator.prm, "prm_loss", "prm_scaler")
    losses, stood_still = [], 0
    for _ in range(60):
        before, scale_before = weights_of(network), estimator.scaler.get_scale()
        estimator.advantages(r)
        losses.append(estimator.learn(r, [*range(8)])[loss])
        is_left_out = torch.equal(weights_of(network), before)
        assert (estimator.scaler.get_scale() == scale_before / 2) == is_left_out
        stood_still += is_left_out
    assert 5 < stood_still < 40 and losses[-1] < 0.9 * losses[0] and weights_of(network).isfinite().all()
    assert estimator.objects[scaler] is estimator.scaler and estimator.scaler.get_scale() == HUGE / 2 ** stood_still


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("stops_at", [3, 16])
def test_a_resumed_training_has_the_scale_that_it_stopped_with(name, stops_at, tiny, scale, tmp_path):
    class Stopped(Exception):
        pass

    def save(**state):
        checkpoint.save(tmp_path, *checkpoint.state_of(**state))
        if state["step"] == stops_at:
            raise Stopped

    scale(HUGE)
    through = watched(TRAININGS[name], tiny())
    with pytest.raises(Stopped):
        TRAININGS[name](tiny(), save=save)
    scale(8.0)  # another process begins with another one
    rest = watched(TRAININGS[name], tiny(seed=3),
                   resume=lambda **objects: checkpoint.restore(*checkpoint.load(tmp_path), **objects))
    assert [scale for _, _, scale in rest] == [scale for _, _, scale in through[stops_at:]]
    assert torch.equal(rest[-1][1], through[-1][1])


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions_have_no_scale_and_their_states_none_to_restore(name, dtype, tiny):
    history = watched(TRAININGS[name], tiny(), dtype=dtype)
    assert {scale for _, _, scale in history} == {1.0} and not any(metrics["overflow"] for metrics, _, _ in history)
    scaler = torch.amp.GradScaler(enabled=False)
    tensors, meta = checkpoint.state_of(scaler=scaler, step=1)
    assert not tensors and checkpoint.restore(tensors, meta, scaler=scaler) == {"step": 1}


def test_a_state_of_another_precision_is_refused(tmp_path):
    state = checkpoint.state_of(scaler=torch.amp.GradScaler("cpu", enabled=False), step=1)
    checkpoint.save(tmp_path, *state)
    with pytest.raises(ValueError, match="not a state of this training"):
        checkpoint.Checkpointer(tmp_path).resume(scaler=torch.amp.GradScaler("cpu"))

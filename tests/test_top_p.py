"""DeepSeek-V3.2's keep-sampling-mask: with top-p, policy and pi_old are one distribution over what was kept."""

import itertools
from dataclasses import replace

import pytest
import torch

import grpo
import model as model_module
from grpo import GRPOConfig, policy_loss, token_logprobs
from lab.layers import fast_layers
from lab.lots import in_lots
from test_model import tiny
from variants.dapo import DAPO, DAPOConfig

ENDS = (3, 5, 7)


def config_of(**fields):
    return GRPOConfig(**dict(rollouts=2, prompts_per_rollout=3, group_size=4, minibatches=2, lr=1e-2, warmup=1,
                             top_p=0.8, max_new_tokens=8, dtype="float32", beta=0.1) | fields)


def roll(model, config, generate=model_module.generate, prompts=([1, 2], [4, 6, 8, 9, 11], [12])):
    return grpo.rollout(model, list(prompts), encode=list, decode=str, generate=generate, end_ids=ENDS,
                        rewards={"sevens": lambda text, example: text.count("7")}, weights={}, config=config,
                        generator=torch.Generator().manual_seed(0))


def smallest_set(logits, top_p):
    """Likeliest first, until their mass reaches top_p, in float64."""
    p = logits.double().softmax(-1)
    chosen, mass = set(), 0.0
    for token in p.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        chosen.add(token)
        mass += p[token].item()
    return chosen


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_each_token_was_drawn_from_the_smallest_set_of_enough_mass_and_its_log_probability_is_of_that_set(temperature):
    model, config = tiny(), config_of(temperature=temperature)
    r = roll(model, config)
    sizes = set()
    assert len(r.kept) == 12 and len(set(r.lengths.tolist())) > 2
    for row in range(12):
        first = r.ends[row] - int(r.lengths[row])
        logits = model(r.ids[row:row + 1, :r.ends[row]])[0, first - 1:-1] / temperature
        assert len(r.kept[row]) == r.lengths[row]
        sampled = zip(logits, r.kept[row], r.ids[row, first:], r.sampled_logprobs[row, first - 1:])
        for of_token, kept, token, logprob in sampled:
            expected = smallest_set(of_token, 0.8)
            assert set(kept.tolist()) == expected and int(token) in expected
            p = of_token.double().exp()
            assert logprob.item() == pytest.approx((p[token] / p[list(expected)].sum()).log().item(), abs=1e-5)
            sizes.add(len(expected))
    assert len(sizes) > 3


@pytest.mark.parametrize("layers", [lambda model: model, fast_layers], ids=["plain", "fast"])
@pytest.mark.parametrize("pieces", [False, True])
def test_the_trainer_gives_the_sampled_tokens_the_samplers_log_probabilities(layers, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", 3 * 32)
    model, config = layers(tiny()), config_of()
    r = roll(model, config)
    torch.testing.assert_close(grpo.all_logprobs(model, r, config), r.sampled_logprobs, atol=1e-5, rtol=0)
    without = grpo.all_logprobs(model, replace(r, kept=[]), config)
    assert (without < r.sampled_logprobs - 1e-3).any() and not (without > r.sampled_logprobs + 1e-5).any()


def test_lots_and_a_model_without_a_head_keep_the_same_sets():
    model, config = tiny(), config_of()
    in_two = roll(model, config, in_lots(model_module.generate, 60))
    assert [len(sets) for sets in in_two.kept] == in_two.lengths.tolist()
    torch.testing.assert_close(grpo.all_logprobs(model, in_two, config), in_two.sampled_logprobs, atol=1e-5, rtol=0)
    headless = torch.nn.Module()
    headless.forward = model.forward
    headless.weight = torch.nn.Parameter(torch.zeros(1))
    torch.testing.assert_close(grpo.all_logprobs(headless, in_two, config), in_two.sampled_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dapo", [DAPOConfig(mask_cut=True), DAPOConfig(resample=2)], ids=["mask_cut", "resample"])
def test_masked_completions_and_groups_put_together_keep_each_token_with_its_set(dapo):
    model, config = tiny(), config_of(max_new_tokens=5)
    prompts = itertools.cycle([[1, 2], [4, 6, 8, 9, 11], [12], [20, 21, 22]])
    r, _ = DAPO(dapo, 5).select(lambda examples: roll(model, config, prompts=examples), prompts, 3)
    assert not r.finished.all() and r.mask.any()
    torch.testing.assert_close(grpo.all_logprobs(model, r, config), r.sampled_logprobs, atol=1e-5, rtol=0)


def test_rows_of_which_all_were_cut_and_masked_have_no_log_probability():
    model, config = tiny(), config_of(max_new_tokens=2)
    r, _ = DAPO(DAPOConfig(mask_cut=True), 2).select(lambda examples: roll(model, config), itertools.cycle([[1]]), 3)
    cut = [row for row, ended in enumerate(r.finished.tolist()) if not ended]
    logprobs = grpo.logprobs_of(model, r, cut, config)
    assert len(cut) > 2 and logprobs.shape[0] == len(cut) and not logprobs.any()


def test_the_gradient_is_exactly_that_of_the_expected_reward_under_top_p_and_without_the_sets_it_is_another():
    """One token of five, of which top-p keeps some: everything enumerated."""
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept = torch.tensor(sorted(smallest_set(logits.detach(), 0.8)))
    assert 1 < len(kept) < 5
    rewards = torch.arange(5, dtype=torch.float64)
    p = logits[kept].softmax(0)
    value = p @ rewards[kept]
    exact = torch.autograd.grad(value, logits, retain_graph=True)[0]

    def ours(sets):
        total = 0.0
        for i, token in enumerate(kept):
            logprob = token_logprobs(logits[None].float(), token[None], kept=sets)[None]
            loss, _ = policy_loss(logprob, logprob.detach(), None, rewards[token][None],
                                  torch.ones(1, 1), mean="token")
            total = total - p[i].detach() * loss
        return torch.autograd.grad(total, logits)[0]

    torch.testing.assert_close(ours([kept]), exact, atol=1e-6, rtol=1e-5)
    assert (ours(None) - exact).abs().max() > 0.01


def trained(model, config, history):
    grpo.train(model, [[1, 2], [4, 6, 8], [12]], encode=list, decode=str, generate=model_module.generate, end_ids=ENDS,
               rewards={"spread": lambda text, example: len(text) % 5}, config=config,
               log=lambda metrics, r: history.append((metrics, r)))


@pytest.mark.parametrize("old", ["trainer", "sampler"])
def test_the_first_update_sees_no_drift_and_the_reference_is_over_the_same_sets(old):
    history, model = [], tiny()
    trained(model, config_of(old_logprobs=old, minibatches=1), history)
    metrics, r = history[0]
    assert metrics["drift"] < 1e-5 and metrics["sampler_gap"] < 1e-5 and abs(metrics["kl"]) < 1e-5
    torch.testing.assert_close(r.ref_logprobs, r.sampled_logprobs, atol=1e-5, rtol=0)
    assert not torch.equal(model.lm_head.weight, tiny().lm_head.weight)


def test_without_top_p_nothing_is_asked_of_the_sampler_and_nothing_kept():
    def generate(model, prompts, *, n, max_new_tokens, temperature, end_ids, generator):
        return model_module.generate(model, prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                                     end_ids=end_ids, generator=generator)
    assert roll(tiny(), config_of(top_p=1.0), generate).kept == []


def test_generate_tells_what_it_kept_of_each_token_also_where_all_are_kept():
    kept = ["earlier"]
    _, lengths, _ = model_module.generate(tiny(), [[1], [2, 4]], n=2, max_new_tokens=4, end_ids=ENDS, kept=kept)
    assert kept[0] == "earlier" and [len(sets) for sets in kept[1:]] == lengths.tolist()
    assert all(tokens.tolist() == list(range(32)) for sets in kept[1:] for tokens in sets)
    kept = []
    ids, lengths, _ = model_module.generate(tiny(), [[1], [2, 4]], max_new_tokens=4, temperature=0, kept=kept)
    assert [[int(tokens) for tokens in sets] for sets in kept] == ids.tolist()



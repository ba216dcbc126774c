"""Dynamic sampling and the length penalty: each alone, and within grpo.train."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import grpo
import model as model_module
from sevens import share_of_sevens, train_on_sevens
from test_grpo import canned, roll, small, stopped_and_resumed, weights_of
from variants.dapo import DAPO, DAPOConfig, has_signal, length_penalty, together


# ------------------------------------------------------------------------------------------- the length penalty

@pytest.mark.parametrize("lengths, penalty", [
    ([0, 1, 79, 80], [0, 0, 0, 0]), ([81, 85, 90, 99], [-.05, -.25, -.5, -.95]), ([100, 101, 500], [-1, -1, -1])])
def test_the_length_penalty_falls_in_a_line_over_the_buffer_and_is_flat_beside_it(lengths, penalty):
    assert length_penalty(torch.tensor(lengths), 100, 20).tolist() == pytest.approx(penalty)


def test_a_buffer_of_the_whole_length_penalises_from_the_first_token():
    assert length_penalty(torch.tensor([0, 1, 2, 4]), 4, 4).tolist() == [0, -0.25, -0.5, -1]


def test_the_length_penalty_is_added_to_the_reward_and_is_no_rule():
    completions = [7, 3], [7, 7, 3], [7, 7, 7, 3], [7] * 6
    plain = roll(torch.nn.Linear(1, 1), small(group_size=2), [[5], [8]], canned(*completions))
    dapo = DAPO(DAPOConfig(length_buffer=4), max_new_tokens=6)
    r, discarded = dapo.select(lambda examples: plain, iter([[5], [8]]), 2)
    assert r.parts.keys() == {"sevens"} and discarded == 0
    assert (r.rewards.flatten() - r.parts["sevens"].flatten()).tolist() == pytest.approx([0, -0.25, -0.5, -1])


# ------------------------------------------------------------------------------------------- dynamic sampling

def of_numbers(numbers):
    """A rollout of groups of two completions, of which each tensor holds the group's number; longer ones with it."""
    N, T = len(numbers), max(numbers) + 2
    rows = torch.tensor(numbers).repeat_interleave(2)
    ids, mask = torch.zeros(2 * N, T + 1, dtype=torch.long), torch.zeros(2 * N, T, dtype=torch.bool)
    for row, n in enumerate(rows.tolist()):
        ids[row, :n + 3] = n + 1
        mask[row, 1:n + 2] = True
    return grpo.Rollout(
        examples=list(numbers), texts=[str(n) for n in rows.tolist()], ids=ids, mask=mask,
        ends=[n + 3 for n in rows.tolist()], lengths=rows + 1, finished=rows % 2 == 0,
        sampled_logprobs=-mask.float() * (rows + 1)[:, None], parts={"rule": rows.view(N, 2).float()},
        rewards=rows.view(N, 2).float())


def draws(resample, keep, prompts, count):
    """The groups' numbers, how many were discarded, and what was drawn in each round."""
    rounds = []
    if keep is not None:
        keep = partial(map_over_groups, keep)
    r, discarded = DAPO(DAPOConfig(resample=resample), 6, keep).select(
        lambda examples: rounds.append(examples) or of_numbers(examples), prompts, count)
    return r.examples, discarded, rounds


def map_over_groups(keep, r):
    return [keep(example) for example in r.examples]


def test_groups_that_are_refused_are_replaced_by_the_next_prompts_and_counted():
    prompts = iter(range(100))
    groups, discarded, rounds = draws(3, lambda n: n % 3 == 0, prompts, 4)
    assert rounds == [[0, 1, 2, 3], [4, 5], [6, 7], [8]]  # only as many as are missing
    assert groups == [0, 3, 6] and discarded == 6  # three more rounds at most: one is missing
    assert next(prompts) == 9


def test_sampling_stops_as_soon_as_the_rollout_is_full():
    groups, discarded, rounds = draws(50, lambda n: n != 1, iter(range(100)), 3)
    assert groups == [0, 2, 3] and discarded == 1 and rounds == [[0, 1, 2], [3]]


@pytest.mark.parametrize("resample", [0, 1, 3])
def test_where_every_group_is_refused_the_first_that_were_drawn_stay(resample):
    groups, discarded, rounds = draws(resample, lambda n: False, iter(range(100)), 2)
    assert groups == [0, 1] and discarded == 2 * resample and len(rounds) == 1 + resample


def test_without_resampling_refused_groups_are_left_out_and_without_a_filter_none_is_refused():
    assert draws(0, lambda n: n > 1, iter(range(9)), 4)[:2] == ([2, 3], 2)
    assert draws(0, None, iter(range(9)), 4) == ([0, 1, 2, 3], 0, [[0, 1, 2, 3]])


@pytest.mark.parametrize("rewards, signal", [([1., 1, 1, 1], False), ([0.1] * 7, False), ([0., 0, 0, 1], True),
                                             ([1., 1, 1, 0.999], True), ([-2.] * 4, False),
                                             ([100.1] * 8, False)])
def test_a_group_has_a_signal_where_its_rewards_differ(rewards, signal):
    assert has_signal(SimpleNamespace(rewards=torch.tensor([rewards, rewards]))).tolist() == [signal] * 2


def test_groups_of_several_draws_make_the_rollout_that_one_draw_of_them_would_have_made():
    first, second = of_numbers([4, 0, 2]), of_numbers([9, 1])
    r, expected = together([(first, 2), (second, 1), (first, 1)]), of_numbers([2, 1, 0])
    for name, value in vars(expected).items():
        got = getattr(r, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(got, value) and got.dtype == value.dtype, name
        elif name == "parts":
            assert torch.equal(got["rule"], value["rule"])
        else:
            assert got == value, name


# ------------------------------------------------------------------------------------------- inside the loop

def run(model, config, dapo=DAPOConfig(), keep=None, **arguments):
    return train_on_sevens(model, config, select=DAPO(dapo, config.max_new_tokens, keep).select, **arguments)


def drawn_prompts(drawn):
    """A generate that notes the prompts of each draw."""
    def generate(model, prompts, **settings):
        drawn.append([tuple(prompt) for prompt in prompts])
        return model_module.generate(model, prompts, **settings)
    return generate


ORDER = list(itertools.islice(itertools.cycle([(1, 2), (4, 5, 6), (8,)]), 60))
RULES = {  # prompts that begin with 8 have no signal
    "sevens": lambda text, example: 0.0 if example == [8] else share_of_sevens(text, example) + len(text) / 100
}


def test_where_nothing_is_asked_for_a_run_is_the_same_with_it_and_without(tiny):
    with_it, without = tiny(), tiny()
    assert run(with_it, small()) == train_on_sevens(without, small())
    assert torch.equal(weights_of(with_it), weights_of(without))


def test_dynamic_sampling_leaves_out_groups_without_signal_and_neither_skips_nor_repeats_a_prompt(tiny):
    drawn, kept, history = [], [], []
    run(tiny(), small(rollouts=4), DAPOConfig(resample=5), rewards=RULES, generate=drawn_prompts(drawn),
        log=lambda metrics, r: (kept.append(r.examples), history.append(metrics)))
    assert kept == [[[1, 2], [4, 5, 6]]] + [[[1, 2], [4, 5, 6]]] * 3
    flat = sum(drawn, [])
    assert flat == ORDER[:len(flat)] and len(flat) == 11  # an 8 is drawn and refused before the 2nd, 3rd and 4th
    assert [m["discarded"] for m in history] == [0, 1, 1, 1] and all(m["no_signal"] == 0 for m in history)
    assert [m["samples"] for m in history] == [8, 20, 32, 44]


def test_where_no_group_has_a_signal_the_run_continues_and_counts_what_it_threw_away(tiny):
    model, drawn, history = tiny(), [], []
    run(model, small(rollouts=2, beta=0.0), DAPOConfig(resample=2), rewards={"constant": lambda text, example: 1.0},
        generate=drawn_prompts(drawn), log=lambda metrics, r: history.append((r.examples, metrics)))
    assert [len(round) for round in drawn] == [2] * 6 and sum(drawn, []) == ORDER[:12]
    assert [examples for examples, _ in history] == [[[1, 2], [4, 5, 6]]] * 2  # of 6 prompts, twice around the three
    assert [(m["discarded"], m["samples"], m["no_signal"]) for _, m in history] == [(4, 24, 1), (4, 48, 1)]
    assert torch.equal(weights_of(model), weights_of(tiny()))


def test_keep_decides_which_groups_are_learned_from(tiny):
    kept = []
    run(tiny(), small(rollouts=2), keep=lambda r: [len(example) > 1 for example in r.examples],
        log=lambda metrics, r: kept.append((r.examples, len(r.ids), metrics["discarded"])))
    assert kept == [([[1, 2], [4, 5, 6]], 8, 0), ([[1, 2]], 4, 1)]


def test_a_rollout_of_fewer_completions_than_mini_batches_makes_no_empty_update(tiny):
    rows = []
    estimator = SimpleNamespace(advantages=lambda r: torch.ones(2),
                                learn=lambda r, batch: rows.append(len(batch)) or {})
    history = run(tiny(), small(rollouts=2, prompts_per_rollout=3, group_size=2, minibatches=5),
                  advantage_estimator=estimator, keep=lambda r: [example == [8] for example in r.examples])
    assert rows == [1] * 4 and all(math.isfinite(value) for metrics in history for value in metrics.values())


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_with_dynamic_sampling_resumes_identically(tiny, tmp_path, stop):
    dapo = DAPO(DAPOConfig(resample=2), 6)
    stopped_and_resumed(tiny, tmp_path, stop, small(rollouts=4, warmup=5), rewards=RULES, select=dapo.select)

"""Sampling in lots: what a budget that is not reached leaves as it was, and how prompts are split by one that is."""

import random
from functools import partial

import pytest
import torch

import grpo
import model as transformer
from forked import run_forked
from lab.lots import in_lots
from runs import make, write


def random_prompts(rng):
    return [[rng.randrange(16) for _ in range(rng.randint(1, 40))] for _ in range(rng.randint(1, 9))]


def sampled(generate, model, prompts, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    result = generate(model, prompts, end_ids=(3,), generator=generator, **settings)
    return result, generator.get_state()


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_that_is_not_reached_gives_what_generate_gives_bit_for_bit(seed, tiny):
    rng, model = random.Random(seed), tiny().eval()
    prompts, n, new = random_prompts(rng), rng.randint(1, 4), rng.randint(1, 12)
    just_enough = len(prompts) * n * (max(map(len, prompts)) + new)
    plain, after = sampled(transformer.generate, model, prompts, n=n, max_new_tokens=new)
    lots, after_lots = sampled(in_lots(transformer.generate, just_enough), model, prompts, n=n, max_new_tokens=new)
    assert all(torch.equal(*pair) for pair in zip(plain, lots, strict=True)) and torch.equal(after, after_lots)


@pytest.mark.parametrize("seed", range(50))
def test_lots_hold_whole_groups_in_order_within_the_budget_and_one_over_it_goes_alone(seed):
    rng = random.Random(seed)
    prompts, n, new = random_prompts(rng), rng.randint(1, 4), rng.randint(1, 12)
    budget, calls = rng.randint(1, 400), []

    def generate(model, prompts, n=1, max_new_tokens=128, **settings):
        """Each row holds the number of its prompt and which of its completions it is."""
        calls.append(prompts)
        rows = torch.tensor([[len(prompt), *prompt[:1], j] for prompt in prompts for j in range(n)])
        return rows, rows[:, 0], rows.float()

    ids, lengths, logprobs = in_lots(generate, budget)(None, prompts, n=n, max_new_tokens=new)
    assert [prompt for lot in calls for prompt in lot] == prompts
    assert ids.tolist() == [[len(p), p[0], j] for p in prompts for j in range(n)]  # prompt-major, groups whole
    assert torch.equal(lengths, ids[:, 0]) and torch.equal(logprobs, ids.float())
    tokens = [len(lot) * n * (max(map(len, lot)) + new) for lot in calls]
    assert all(count <= budget or len(lot) == 1 for count, lot in zip(tokens, calls))
    for lot, following in zip(calls, calls[1:]):  # none ends early
        assert (len(lot) + 1) * n * (max(map(len, [*lot, following[0]])) + new) > budget


@pytest.mark.parametrize("seed", range(10))
def test_rows_of_lots_are_as_wide_as_of_one_whatever_the_prompts_and_the_context(seed, tiny):
    rng, model = random.Random(seed), tiny().eval()  # of 64 tokens, so that the longest prompts have room for 24
    prompts, new = random_prompts(rng), rng.choice((3, 30, 100))
    (ids, lengths, logprobs), _ = sampled(in_lots(transformer.generate, 1), model, prompts, n=2, max_new_tokens=new)
    assert ids.shape == logprobs.shape == (2 * len(prompts), new) and lengths.shape == (2 * len(prompts),)
    for row, length, prompt in zip(ids, lengths.tolist(), [prompt for prompt in prompts for _ in range(2)]):
        assert 1 <= length <= min(new, 64 - len(prompt)) and not row[length:].any()
        assert 3 not in row[:length - 1].tolist()


def test_lots_sample_as_one_call_after_the_other_with_one_generator(tiny):
    model, prompts, generator = tiny().eval(), [[1], [2, 3, 4], [5, 6]], torch.Generator().manual_seed(0)
    lots, after = sampled(in_lots(transformer.generate, 1), model, prompts, n=2, max_new_tokens=9)
    one_by_one = [transformer.generate(model, [prompt], n=2, max_new_tokens=9, end_ids=(3,), generator=generator)
                  for prompt in prompts]
    assert all(torch.equal(mine, torch.cat(parts)) for mine, parts in zip(lots, zip(*one_by_one), strict=True))
    assert torch.equal(after, generator.get_state())


def spying_on_lots(main):
    """The script, whose generate prints how many prompts each call has."""
    import lab.run
    import lab.scripts
    for module in (lab.run, lab.scripts):
        real = module.generate

        def generate(model, prompts, real=real, **settings):
            print("lot of", len(prompts), flush=True)
            return real(model, prompts, **settings)
        module.generate = generate
    main()


def test_a_script_samples_in_lots_of_its_option(tmp_path):
    make(tmp_path / "model", "llama", "qwen")
    data = write(tmp_path / "data.jsonl", [{"prompt": "1 + 1", "answer": "2"} for _ in range(4)])
    small = ("--rollouts 1 --prompts-per-rollout 4 --group-size 2 --minibatches 1 --max-new-tokens 4 --template none "
             "--dtype float32").split()
    for tokens, lots in ((1, [1, 1, 1, 1]), (2 * 2 * (5 + 4), [2, 2]), (2 ** 18, [4])):
        argv = ["grpo.py", "--model", tmp_path / "model", "--data", data, "--out", tmp_path / f"out{tokens}", *small]
        ended = run_forked(partial(spying_on_lots, grpo.main), argv=[*map(str, argv), "--cache-tokens", str(tokens)])
        assert ended.status == 0, ended.stderr
        said = [int(line.split()[-1]) for line in ended.stdout.splitlines() if line.startswith("lot of")]
        assert said == lots, ended.stdout

"""CUDA graphs: the recorded step against the plain one. Without a GPU a stand-in for the recording repeats the step."""

import pytest
import torch

from lab import graphs
from model import generate

PROMPTS = [[3, 5, 7, 9, 11], [2], [4, 4, 4], [8, 1, 8]]


class Recorder:
    """As cuda_graph: warm-ups, then the output lies in one place, which each replay fills again. Counts recordings."""
    count = 0

    def __call__(self, run):
        self.count += 1
        run()
        run()
        output = run().clone()
        return output, lambda: output.copy_(run())


def samples(model, **settings):
    return generate(model, PROMPTS, n=8, max_new_tokens=56, generator=torch.Generator().manual_seed(0), **settings)


@pytest.mark.parametrize("end_ids", [(), (6,), (6, 7, 8, 9)], ids=["none ends", "few end", "most end"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_steps_sample_what_plain_steps_do_while_the_cache_grows_and_rows_leave(tiny, end_ids, temperature):
    model, record = tiny(seed=2).eval(), Recorder()
    plain = samples(model, end_ids=end_ids, temperature=temperature)
    recorded = samples(graphs.Recorded(model, record), end_ids=end_ids, temperature=temperature)
    for ours, theirs in zip(recorded, plain):
        assert torch.equal(ours, theirs)
    lasted = plain[1].max().item()
    assert 1 <= record.count < lasted  # recorded less often than it stepped


def test_a_recording_lasts_until_the_cache_grows(tiny):
    record = Recorder()
    samples(graphs.Recorded(tiny().eval(), record))  # 5 + 55 columns, 32 at a time
    assert record.count == 2


def test_recording_near_the_end_of_the_context_runs_beyond_it_no_more_than_the_plain_step(tiny):
    model, prompts = tiny().eval(), [[1] * 62]  # the context is 64
    plain = generate(model, prompts, max_new_tokens=9, temperature=0)
    recorded = generate(graphs.Recorded(model, Recorder()), prompts, max_new_tokens=9, temperature=0)
    assert torch.equal(plain[0], recorded[0]) and recorded[1].tolist() == [2]


def test_a_second_call_with_another_batch_records_again(tiny):
    model, record = tiny(seed=2).eval(), Recorder()
    recorded = graphs.Recorded(model, record)
    for prompts in (PROMPTS[:2], PROMPTS[2:]):
        ours = generate(recorded, prompts, max_new_tokens=6, temperature=0)
        theirs = generate(model, prompts, max_new_tokens=6, temperature=0)
        assert all(torch.equal(*pair) for pair in zip(ours, theirs))
    assert record.count == 2


def test_without_a_gpu_generate_gets_the_model_itself(tiny):
    model, seen = tiny(), []

    def generate(model, prompts, **settings):
        seen.append((model, prompts, settings))

    graphs.with_graphs(generate)(model, [[1]], n=2)
    assert seen == [(model, [[1]], {"n": 2})]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_recorded_steps_sample_what_plain_steps_do(tiny):
    model = tiny(seed=2).eval().cuda()
    settings = dict(n=8, max_new_tokens=56, temperature=0, end_ids=[6])
    ours = graphs.with_graphs(generate)(model, PROMPTS, **settings)
    theirs = generate(model, PROMPTS, **settings)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])

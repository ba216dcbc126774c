"""Decoding as on a GPU: recorded steps beside plain ones. A stand-in for the recording repeats the step."""

import copy

import pytest
import torch

from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.fixture
def record(monkeypatch):
    """A stand-in for cuda_graph, in a process that has decoded nothing so far and has no GPU whose memory ends."""
    record = Recorder()
    monkeypatch.setattr(graphs, "cuda_graph", record)
    monkeypatch.setattr(graphs, "decoders", {})
    monkeypatch.setattr(graphs, "BLOCK", 16)
    monkeypatch.setattr(graphs, "memory_of", lambda device: 10 ** 12)
    return record


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("end_ids", [(), (6,), (6, 7, 8, 9)], ids=["none ends", "few end", "most end"])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_recorded_steps_find_the_greedy_tokens_of_plain_ones_while_columns_join_and_rows_leave(
        tiny, record, end_ids, n):
    model = tiny(seed=2).eval()
    settings = dict(n=n, max_new_tokens=56, end_ids=end_ids, temperature=0.0)
    plain, recorded = generate(model, PROMPTS, **settings), graphs.generate_recorded(model, PROMPTS, **settings)
    for ours, theirs in zip(recorded, plain):
        assert torch.equal(ours, theirs)
    assert 1 <= record.count < plain[1].max()  # recorded less often than it stepped


def assert_same_samples(found, expected):
    """The same tokens; a recording has more rows and columns, so their log-probabilities may round otherwise."""
    (ids, lengths, logprobs), (expected_ids, expected_lengths, expected_logprobs) = found, expected
    assert torch.equal(ids, expected_ids) and torch.equal(lengths, expected_lengths)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("end_ids", [(), (6,), (6, 7, 8, 9)], ids=["none ends", "few end", "most end"])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_recorded_steps_sample_what_plain_ones_do(tiny, record, end_ids, n):
    model = tiny(seed=2).eval()
    settings = dict(n=n, max_new_tokens=56, end_ids=end_ids)
    plain = generate(model, PROMPTS, generator=seeded(), **settings)
    recorded = graphs.generate_recorded(model, PROMPTS, generator=seeded(), **settings)
    assert_same_samples(recorded, plain)


def test_rows_that_leave_change_nothing_in_the_distribution_of_those_that_stay(tiny, record):
    """Against the model's own log-probabilities of what was sampled, row by row."""
    model, prompt = tiny(seed=2).eval(), [3, 5, 7]
    ids, lengths, logprobs = graphs.generate_recorded(
        model, [prompt], n=50, max_new_tokens=40, end_ids=(6,), generator=seeded())
    assert lengths.min() < 8 and lengths.max() > 24  # some leave at once, some stay long
    for row, length, found in zip(ids, lengths.tolist(), logprobs):
        tokens = torch.tensor([prompt + row[:length].tolist()])
        expected = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[0, len(prompt) - 1:, 0]
        torch.testing.assert_close(found[:length], expected.detach(), atol=1e-4, rtol=1e-4)
        assert (row[:length - 1] != 6).all() and not row[length:].any() and not found[length:].any()


def test_recordings_are_kept_from_call_to_call_and_follow_the_weights(tiny, record):
    model, other = tiny(seed=2).eval(), tiny(seed=3).eval()
    settings = dict(n=4, max_new_tokens=20, temperature=0.0)
    first = graphs.generate_recorded(model, PROMPTS, **settings)[0]
    count = record.count
    ours = graphs.generate_recorded(other, PROMPTS, **settings)[0]  # other weights of the same shape
    assert torch.equal(ours, generate(other, PROMPTS, **settings)[0]) and not torch.equal(ours, first)
    assert torch.equal(graphs.generate_recorded(model, PROMPTS, **settings)[0], first)
    assert record.count == count


def test_a_decoder_grows_where_more_rows_or_columns_are_asked_for(tiny, record):
    model = tiny(seed=2).eval()
    for prompts, n, new in ((PROMPTS[:1], 1, 4), (PROMPTS, 2, 4), (PROMPTS, 2, 30), (PROMPTS[:2], 1, 3)):
        ours = graphs.generate_recorded(model, prompts, n=n, max_new_tokens=new, temperature=0.0)
        theirs = generate(model, prompts, n=n, max_new_tokens=new, temperature=0.0)
        assert all(torch.equal(*pair) for pair in zip(ours, theirs))
    decoder, = graphs.decoders.values()
    assert (decoder.rows, decoder.columns) == (8, 48)  # 5 + 30 columns, 16 at a time


def test_a_decoder_that_takes_much_of_the_memory_is_not_kept(tiny, record, monkeypatch):
    monkeypatch.setattr(graphs, "memory_of", lambda device: 10 ** 4)
    graphs.generate_recorded(tiny().eval(), PROMPTS, max_new_tokens=3)
    assert graphs.decoders == {}


def test_near_the_end_of_the_context_it_runs_no_further_than_the_plain_step(tiny, record):
    model, prompts = tiny().eval(), [[1] * 62]  # the context is 64
    plain = generate(model, prompts, max_new_tokens=9, temperature=0.0)
    recorded = graphs.generate_recorded(model, prompts, max_new_tokens=9, temperature=0.0)
    assert torch.equal(plain[0], recorded[0]) and recorded[1].tolist() == [2]


@pytest.mark.parametrize("lengths", [[62, 3], [3, 62, 40], [63, 1, 63, 2]])
@pytest.mark.parametrize("n", [1, 3])
def test_beside_a_prompt_near_the_end_of_the_context_the_others_keep_their_room(tiny, record, lengths, n):
    model, prompts = tiny(seed=2).eval(), [[5] * length for length in lengths]
    settings = dict(n=n, max_new_tokens=40, end_ids=(6,))
    plain = generate(model, prompts, generator=seeded(), **settings)
    recorded = graphs.generate_recorded(model, prompts, generator=seeded(), **settings)
    assert_same_samples(recorded, plain)
    room = torch.tensor(lengths).repeat_interleave(n)
    assert (plain[1] <= 64 - room).all() and plain[1].max() > 64 - max(lengths)


def test_another_architecture_gets_a_decoder_of_its_own(tiny, record):
    for kind in ("llama", "qwen2", "qwen3"):
        model = tiny(seed=2, model_type=kind).eval()
        for dtype in (torch.float32, torch.bfloat16):
            cast = copy.deepcopy(model).to(dtype)
            ours = graphs.generate_recorded(cast, PROMPTS, n=2, max_new_tokens=12, temperature=0.0)
            theirs = generate(cast, PROMPTS, n=2, max_new_tokens=12, temperature=0.0)
            assert torch.equal(ours[0], theirs[0])
    assert len(graphs.decoders) == 6


class Waits(TorchDispatchMode):
    """Counts the operations for whose result a CPU waits on a GPU: values, and sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = []
        if name == "index":
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        if masks or name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "unique_dim"):
            self.names.append(name)
        return func(*args, **kwargs or {})


def waits(run):
    with Waits() as counted:
        run()
    return counted.names


def test_a_gpu_is_waited_for_to_learn_which_rows_are_done_and_never_within_a_recording(tiny, record):
    model = tiny(seed=2).eval()
    settings = dict(n=8, max_new_tokens=50, end_ids=(6,), generator=seeded())
    graphs.generate_recorded(model, PROMPTS, **settings)
    found = waits(lambda: graphs.generate_recorded(model, PROMPTS, **settings))
    assert set(found) == {"nonzero"} and len(found) <= 50 // 4 + 1  # on a GPU at every 16th step
    decoder, = graphs.decoders.values()
    decoder.column.zero_()
    assert waits(decoder.step(32, 16)) == []


def test_a_wait_would_be_noticed():
    x = torch.arange(3)
    assert waits(lambda: x.sum().item()) == ["_local_scalar_dense"] and waits(lambda: x[x > 1]) == ["index"]


def test_without_a_gpu_generate_is_the_models_own(tiny):
    model = tiny().eval()
    ours = graphs.generate(model, PROMPTS, n=2, max_new_tokens=9, generator=seeded())
    theirs = generate(model, PROMPTS, n=2, max_new_tokens=9, generator=seeded())
    assert all(torch.equal(*pair) for pair in zip(ours, theirs))


@pytest.mark.parametrize("count, expected", [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_the_next_power_of_two(count, expected):
    assert graphs.power_of_two(count) == expected

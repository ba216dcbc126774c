import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lab import checkpoint
from lab.check_input import check_settings
import sft
from sft import SFTConfig, learning_rate, pack

END = 15


def copies(count, seed=0, vocabulary=10, longest=5):
    """A prompt of some tokens and 14, then the same tokens again and the end: what an SFT model can learn at once."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        tokens = torch.randint(
            vocabulary, (int(torch.randint(1, longest + 1, (1,), generator=g)),), generator=g
        ).tolist()
        rows.append((tokens + [14] + tokens + [END], len(tokens) + 1))
    return rows


def config(**fields):
    return SFTConfig(**dict(lr=3e-3, epochs=1, batch_tokens=64, row_length=16, dtype="float32", grad_clip=1e9) | fields)


def run(model, examples, c, **arguments):
    history = []
    log = lambda metrics, batch: history.append({k: v for k, v in metrics.items() if k != "seconds"})
    sft.train(model, examples, c, **dict(log=log) | arguments)
    return history


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def alone(model, examples):
    """The summed loss and the number of its tokens of each example by itself, in plain loops."""
    total, count = 0.0, 0
    for ids, prompt_length in examples:
        logprobs = model(torch.tensor([ids])).double().log_softmax(-1)[0]
        for t in range(max(1, prompt_length), len(ids)):
            total, count = total - logprobs[t - 1, ids[t]].item(), count + 1
    return total, count


# ------------------------------------------------------------------------------------------- packing and the mask

def test_the_targets_are_the_completions_tokens_and_the_end_token_and_nothing_else():
    ids, segments, positions, targets = pack([([5, 6, 7, 8, END], 3), ([1, END], 1), ([2, 3], 0)], 10)
    no = -100
    assert ids.tolist() == [[5, 6, 7, 8, END, 1, END, 2, 3, 0]]
    assert segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 3, 3, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 0]]
    assert targets.tolist() == [[no, no, 8, END, no, END, no, 3, no, no]]


def test_a_target_is_the_token_that_stands_one_later_whatever_its_value():
    """A mask by value would lose a padding id or an end id inside the text."""
    ids, _, _, targets = pack([([0, END, 0, END, 0, END], 2)], 8)
    assert targets[0].tolist() == [-100, 0, END, 0, END, -100, -100, -100]


@pytest.mark.parametrize("row_length", [12, 16, 40])
def test_no_example_is_lost_or_doubled_in_packing(row_length):
    examples = copies(200)
    ids, segments, positions, targets = pack(examples, row_length)
    found = []
    for row in range(len(ids)):
        for segment in range(1, segments[row].max() + 1):
            here = segments[row] == segment
            tokens = ids[row, here].tolist()
            assert positions[row, here].tolist() == list(range(len(tokens)))
            found.append((tokens, len(tokens) - int((targets[row, here] != -100).sum())))
    assert sorted(found) == sorted(examples)
    assert (ids[segments == 0] == 0).all() and (targets[segments == 0] == -100).all()


def test_packing_wastes_little():
    _, segments, _, _ = pack(copies(500), 64)
    assert (segments > 0).float().mean() > 0.95


def test_an_example_longer_than_a_row_is_cut_and_its_beginning_kept():
    ids, segments, _, targets = pack([(list(range(1, 13)), 2)], 8)
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] and targets.tolist() == [[-100, 3, 4, 5, 6, 7, 8, -100]]


def test_an_empty_example_and_one_without_completion_teach_nothing_and_harm_no_other():
    ids, _, _, targets = pack([([], 0), ([4, 5], 2), ([4], 0), ([6, 7], 1)], 8)
    assert ids.tolist() == [[4, 5, 4, 6, 7, 0, 0, 0]] and targets[targets != -100].tolist() == [7]


def test_packed_examples_do_not_see_one_another(tiny):
    model, examples = tiny(seed=3, tie_word_embeddings=False), copies(9)
    rows = pack(examples, 40)
    assert rows[1].max() >= 3
    assert sft.loss_sum(model, *rows, "float32").item() == pytest.approx(alone(model, examples)[0], rel=1e-5)


def test_the_gradient_of_packed_examples_is_that_of_the_examples_alone(tiny):
    examples, gradients = copies(9), []
    for row_length in (40, 12):  # many a row and one a row
        model = tiny(tie_word_embeddings=False)
        sft.loss_sum(model, *pack(examples, row_length), "float32").backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_cross_entropy_and_its_gradient_are_torchs_also_where_a_target_is_all_but_impossible(dtype, atol):
    g = torch.Generator().manual_seed(0)
    logits, targets = (torch.randn(300, 50, generator=g) * 5).to(dtype), torch.randint(50, (300,), generator=g)
    logits[1, targets[1]] = -300
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    got = sft.CrossEntropy.apply(ours, targets)
    expected = F.cross_entropy(theirs.float(), targets, reduction="none")
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5) and got[1] > 300
    weights = torch.rand(300, generator=g)
    (got * weights).sum().backward(), (expected * weights).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=atol)


# ------------------------------------------------------------------------------------------- a step

def test_the_loss_of_a_step_is_the_mean_over_its_completion_tokens(tiny):
    examples, model = copies(12), tiny()
    total, count = alone(model, examples)
    first = run(model, examples, config(batch_tokens=1600, row_length=16))[0]
    assert first["steps"] == 1 and first["loss"] == pytest.approx(total / count, rel=1e-5)
    assert first["tokens"] == sum(len(ids) for ids, _ in examples)


def test_pretraining_is_the_case_without_a_prompt(tiny):
    examples, model = [(ids, 0) for ids, _ in copies(12)], tiny()
    total, count = alone(model, examples)
    assert count == sum(len(ids) - 1 for ids, _ in examples)
    assert run(model, examples, config(batch_tokens=1600))[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_one_step_is_that_of_torchs_adamw_on_the_mean_loss(tiny):
    examples, model, plain = copies(12), tiny(), tiny()
    run(model, examples, config(batch_tokens=1600, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), grad_clip=0.5))
    decay = [p for p in plain.parameters() if p.dim() > 1]
    rest = [p for p in plain.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01, betas=(0.8, 0.9)
    )
    losses = [F.cross_entropy(plain(torch.tensor([ids[:-1]]))[0, p - 1:], torch.tensor(ids[p:]), reduction="sum")
              for ids, p in examples]
    (sum(losses) / sum(len(ids) - p for ids, p in examples)).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    difference = (weights_of(model) - weights_of(plain)).abs()
    assert (
        difference.median() < 1e-6 and difference.max() < 1e-3
    )  # Adam divides rounding by nearly nothing here and there


def test_micro_batches_change_neither_loss_nor_gradient(tiny):
    histories = [run(tiny(), copies(60), config(batch_tokens=160, micro_batch_rows=rows)) for rows in (1, 3, 16)]
    for history in histories[1:]:
        for name in ("loss", "grad_norm", "tokens"):
            assert [m[name] for m in history] == pytest.approx([m[name] for m in histories[0]], rel=1e-4)


def test_by_default_weights_decay_by_a_tenth_of_the_rate():
    assert SFTConfig().weight_decay == 0.1


def test_weight_decay_falls_on_matrices_only(tiny):
    groups = sft.adamw(tiny().parameters(), 1e-3, weight_decay=0.1).param_groups
    decayed = {p.dim() for g in groups for p in g["params"] if g["weight_decay"] == 0.1}
    rest = {p.dim() for g in groups for p in g["params"] if g["weight_decay"] == 0}
    assert (decayed, rest) == ({2}, {1}) and sum(len(g["params"]) for g in groups) == len(list(tiny().parameters()))


def test_the_learning_rate_warms_up_linearly_and_falls_by_a_cosine_to_its_share():
    c = SFTConfig(lr=1.0, min_lr_ratio=0.1, warmup=0.2)
    rates = [learning_rate(step, 20, c) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)])
    assert learning_rate(12, 20, c) == pytest.approx(0.55) and learning_rate(20, 20, c) == pytest.approx(0.1)


def test_the_logged_rate_is_the_schedules(tiny):
    c = config(warmup=0.5)
    history = run(tiny(), copies(60), c)
    assert len(history) > 3 and [m["lr"] for m in history] == [
        learning_rate(i, len(history), c) for i in range(len(history))
    ]


# ------------------------------------------------------------------------------------------- the loop

def test_a_model_learns_to_copy(tiny):
    from model import generate
    model = tiny(hidden_size=64, intermediate_size=128)
    history = run(model, copies(1500, longest=3), config(lr=1e-2, epochs=8, batch_tokens=1024, row_length=32))
    assert history[0]["loss"] > 2.5 and history[-1]["loss"] < 0.2
    asked = copies(20, seed=9, longest=3)
    ids, lengths, _ = generate(model, [row[:p] for row, p in asked], 1, 8, temperature=0, end_ids=[END])
    right = sum(ids[i, :lengths[i]].tolist() == row[p:] for i, (row, p) in enumerate(asked))
    assert right >= 17


def test_the_prompt_is_not_learned_with_a_mask_and_is_without(tiny):
    """The prompts are all alike here, so a model that is trained on them comes to know them."""
    examples = [([3, 1, 4, 1, 5, c, END], 5) for c in range(10)] * 20
    losses = {}
    for masked in (True, False):
        model = tiny()
        run(model, [(ids, p if masked else 0) for ids, p in examples], config(lr=1e-2))
        losses[masked] = alone(model, [([3, 1, 4, 1, 5], 0)])[0] / 4
    assert losses[False] < 1 < 2 < losses[True]


def test_each_epoch_sees_every_example_once_in_another_order(tiny):
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def forward(self, ids, positions, segments):
            seen.append((ids, segments, positions))
            return self.inner(ids, positions, segments)
    examples = copies(30)
    history = run(Spy(), examples, config(epochs=2, batch_tokens=16, micro_batch_rows=1))
    tokens = [ids[segments > 0] for ids, segments, _ in seen]
    for _, segments, positions in seen:  # each example starts at 0, whatever stands before it in its row
        starts = [positions[0, segments[0] == s].tolist() for s in range(1, int(segments.max()) + 1)]
        assert starts == [list(range(len(s))) for s in starts]
    assert sum(m["tokens"] for m in history) == 2 * sum(len(ids) for ids, _ in examples)
    first, second = tokens[:len(tokens) // 2], tokens[len(tokens) // 2:]
    assert [t.tolist() for t in first] != [t.tolist() for t in second]


def test_two_runs_of_one_seed_are_alike_and_of_two_seeds_are_not(tiny):
    a, b, c = (run(tiny(), copies(40), config(seed=seed)) for seed in (0, 0, 1))
    assert a == b != c


def test_training_takes_nothing_from_the_global_random_state(tiny):
    model, state = tiny(), torch.get_rng_state()
    run(model, copies(8), config())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_run_that_stopped_resumes_identically(tiny, tmp_path, stop):
    c, examples, through = config(epochs=2), copies(40), tiny()
    history = run(through, examples, c)
    assert len(history) > 6

    def save(**state):
        if state["step"] == stop:
            checkpoint.save(tmp_path, *checkpoint.state_of(**state))
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), examples, c, save=save)
    resumed = tiny(seed=5)
    assert run(resumed, examples, c, resume=partial(checkpoint.restore, *checkpoint.load(tmp_path))) == history[stop:]
    assert torch.equal(weights_of(resumed), weights_of(through))


@pytest.mark.parametrize("examples", [[], [([1, 2], 2)], [([1], 0)], [([], 0)], [(list(range(20)), 18)]],
                         ids=["none", "no completion", "one token", "empty", "completion cut off with its row"])
def test_training_without_a_token_to_learn_is_refused(tiny, examples):
    with pytest.raises(ValueError, match=f"none of the {len(examples)} examples"):
        run(tiny(vocab_size=32), examples, config())


@pytest.mark.parametrize(
    "fields, culprit",
    [
        ({"lr": 0}, "lr 0"),
        ({"epochs": 0}, "epochs 0"),
        ({"batch_tokens": 8, "row_length": 16}, "batch_tokens 8"),
        ({"micro_batch_rows": 0}, "micro_batch_rows 0"),
        ({"row_length": 0}, "row_length 0"),
        ({"grad_clip": 0}, "grad_clip 0"),
    ],
)
def test_a_setting_out_of_range_is_one_line_that_names_it(fields, culprit):
    with pytest.raises(ValueError) as error:
        check_settings(config(**{"grad_clip": 1.0} | fields))
    assert culprit in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- logits at targets

@pytest.mark.parametrize("rows", [1, 5, 10**6])
def test_loss_and_gradient_do_not_depend_on_how_many_logits_there_are_at_once(tiny, rows, monkeypatch):
    packed, results = pack(copies(9), 40), []
    for at_once in (10**6, rows):
        model, seen = tiny(tie_word_embeddings=False), []
        head = model.head
        model.head = lambda states: seen.append(len(states)) or head(states)
        monkeypatch.setattr(sft, "LOGITS_AT_ONCE", at_once * model.config.vocab_size)
        with torch.no_grad():
            sft.loss_sum(model, *packed, "float32")
        assert sum(seen) == (packed[3] >= 0).sum() and max(seen) <= at_once  # the prompt and the padding have none
        loss = sft.loss_sum(model, *packed, "float32")
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)

import collections
import itertools
import random
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import distill as distill_module
import grpo
from distill import FILTERS, OnPolicy, distill, mix, readable, rejection_sample, repeats
from forked import run_forked
from lab.scripts import in_its_language
from model import generate, save
from runs import make, write

EXAMPLE = {"prompt": "2+3?", "answer": "5", "language": "en", "kind": "reasoning"}
GOOD = "<think>two and three</think><answer>5</answer>"


def sample(*texts, example=EXAMPLE, keep=4):
    return rejection_sample([example], [texts], correct=lambda text, example: example["answer"] in text,
                            one_language=lambda text, example: text.isascii(), keep=keep)


@pytest.mark.parametrize("text, filter", [
    (GOOD.replace("5", "6"), "correct"), (GOOD.replace("three", "三"), "one_language"),
    (GOOD + "x" * 1000, "readable"), ("```\n" + GOOD, "readable"), (GOOD + "and so on, then again; " * 5, "readable"),
    (GOOD, "kept")])
def test_each_filter_catches_its_case(text, filter):
    rows, counts = sample(text)
    assert counts == {"sampled": 1} | dict.fromkeys(FILTERS, 0) | {"kept": 0} | {filter: 1}
    assert len(rows) == (filter == "kept")


def test_ten_thousand_characters_are_readable_and_one_more_is_not():
    text = " ".join(map(str, range(3000)))
    assert readable(text[:10_000]) and not readable(text[:10_001])


def test_a_completion_falls_to_the_first_filter_that_it_does_not_pass():
    assert sample("六 ``` 七")[1]["correct"] == 1 and sample("五 5 ```")[1]["one_language"] == 1


def test_for_a_trace_one_word_of_another_language_is_too_many():
    assert in_its_language(GOOD, EXAMPLE) and not in_its_language(GOOD.replace("and", "和"), EXAMPLE)


def test_copies_of_a_kept_completion_fall_whatever_their_whitespace():
    rows, counts = sample(GOOD, GOOD, GOOD.replace(" ", "\n "), GOOD.replace("two", "2"))
    assert counts["distinct"] == 2 and [row["completion"] for row in rows] == [GOOD, GOOD.replace("two", "2")]


def test_the_same_completion_of_another_prompt_is_not_a_copy():
    other = EXAMPLE | {"prompt": "1+4?"}
    rows, counts = rejection_sample([EXAMPLE, other], [[GOOD], [GOOD]], lambda t, e: True, lambda t, e: True)
    assert counts["kept"] == 2 and [row["prompt"] for row in rows] == ["2+3?", "1+4?"]


def test_at_most_keep_completions_of_a_prompt_stay():
    rows, counts = sample(*(f"5 {i}" for i in range(7)), keep=3)
    assert counts["enough"] == 4 and [row["completion"] for row in rows] == ["5 0", "5 1", "5 2"]


def test_the_counts_add_up():
    rng = random.Random(0)
    texts = [[rng.choice(["5 a", "5 b", "5 c", "6", "5 三", "5```"]) for _ in range(20)] for _ in range(30)]
    rows, counts = rejection_sample([EXAMPLE] * 30, texts, lambda t, e: "5" in t, lambda t, e: t.isascii(), keep=2)
    assert counts["sampled"] == 600 == sum(counts[name] for name in FILTERS) + counts["kept"]
    assert counts["kept"] == len(rows)
    assert all(counts[name] for name in FILTERS)


def test_a_row_is_the_example_with_its_completion():
    assert sample(GOOD)[0] == [EXAMPLE | {"completion": GOOD}]
    assert "completion" not in EXAMPLE


def test_of_general_examples_that_are_sorted_by_kind_each_kind_is_mixed_in():
    general = ["greeting"] * 300 + ["refusal"] * 300
    rows = mix(["trace"] * 300, general)
    assert len(rows) == 400 and 30 < rows.count("refusal") < 70
    assert rows == mix(["trace"] * 300, general) != mix(["trace"] * 300, general, seed=1)
    assert general == ["greeting"] * 300 + ["refusal"] * 300


def test_a_loop_has_at_least_twelve_characters_three_times():
    assert repeats("-" * 36) and not repeats("-" * 35)


def test_a_loop_is_found_and_a_chain_of_like_steps_is_none():
    assert repeats("so we add the tens again, " * 3) and not repeats("so we add the tens again, " * 2)
    assert repeats("right first. " + "x" * 5000 + "so we take the tens again and then we look at the units, " * 3)
    assert not repeats("先47+38：个位7+8=15，十位4+3+1=8，得85。再85-12：个位5-2=3，十位8-1-0=7，得73。再73+9：个位3+9=12，十位7+0+1=8，得82。")
    assert readable(GOOD)


def test_the_mixture_is_three_to_one_and_keeps_every_trace():
    traces, general = [{"t": i} for i in range(30)], [{"g": i} for i in range(100)]
    rows = mix(traces, general)
    assert len(rows) == 40 and all(trace in rows for trace in traces) and len({r["g"] for r in rows if "g" in r}) == 10
    assert rows != sorted(rows, key=lambda r: "g" in r)  # shuffled
    assert rows == mix(traces, general) != mix(traces, general, seed=1)


def test_few_general_examples_are_reused_evenly():
    rows = mix([{"t": i} for i in range(30)], [{"g": i} for i in range(4)])
    uses = collections.Counter(r["g"] for r in rows if "g" in r)
    assert sum(uses.values()) == 10 and set(uses.values()) == {2, 3}


def test_another_ratio_is_kept_too():
    assert sum("g" in r for r in mix([{"t": 0}] * 30, [{"g": 0}] * 7, ratio=1)) == 30


def test_mixing_leaves_its_arguments_alone():
    traces, general = [{"t": i} for i in range(6)], [{"g": 0}]
    mix(traces, general)
    assert traces == [{"t": i} for i in range(6)] and general == [{"g": 0}]


@pytest.mark.parametrize("traces, general", [([], [{}]), ([{}], [])])
def test_a_mixture_of_nothing_is_refused(traces, general):
    with pytest.raises(ValueError, match=f"{len(traces)} traces and {len(general)} general"):
        mix(traces, general)


def test_a_student_is_trained_on_the_encoded_mixture_and_nothing_else():
    seen = []
    result = distill(
        "student",
        [{"completion": "abc"}] * 12,
        [{"completion": "x"}] * 9,
        lambda row: (list(row["completion"]), 1),
        lambda model, examples: seen.append((model, examples)) or {"loss": 1.0},
    )
    (model, examples), = seen
    assert result == {"loss": 1.0} and model == "student"
    assert sorted(examples) == sorted([(["a", "b", "c"], 1)] * 12 + [(["x"], 1)] * 4)


def test_without_general_examples_a_student_is_trained_on_the_traces_alone_in_their_order():
    assert distill(None, [1, 2, 3], [], lambda row: -row, lambda model, examples: examples) == [-1, -2, -3]


def test_a_student_learns_its_teachers_traces(tiny, tokenizer):
    """The teacher always thinks before it answers; the student never has."""
    from functools import partial
    from sft import SFTConfig, train
    traces, _ = rejection_sample([EXAMPLE | {"prompt": str(i), "answer": str(i)} for i in range(10)],
                                 [[f"<think>{i}</think>{i}", f"<think>{i}</think>x"] for i in range(10)],
                                 lambda t, e: t.endswith(e["answer"]), lambda t, e: True)
    student = tiny(vocab_size=tokenizer.vocab_size)
    encode = lambda row: (
        tokenizer.encode(row["prompt"] + "?" + row["completion"]) + [tokenizer.end_id],
        len(row["prompt"]) + 1,
    )
    config = SFTConfig(lr=1e-2, epochs=40, batch_tokens=128, row_length=64, dtype="float32")
    distill(student, traces, [{"prompt": "hello", "completion": "hi"}], encode, partial(train, config=config))
    prompts = [tokenizer.encode(p + "?") for p in ("3", "8", "hello")]
    ids, lengths, _ = generate(student, prompts, 1, 30, temperature=0, end_ids=[tokenizer.end_id])
    *thought, greeting = [tokenizer.decode(row[:n]) for row, n in zip(ids.tolist(), lengths)]
    assert greeting == "hi" and all(re.fullmatch(r"<think>(\d)</think>\1", text) for text in thought), thought


# ------------------------------------------------------------------------------------------- on-policy distillation

class Table(torch.nn.Module):
    """A toy model of 3 tokens: what comes next depends on the last two."""

    def __init__(self, seed):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(seed)).double())

    def forward(self, ids, positions=None, segments=None):
        before = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=3)
        return self.table[before, ids]


@pytest.mark.parametrize("mean", ["sequence", "token", "constant"])
def test_its_gradient_is_that_of_the_reverse_kl_a_token_with_prefixes_held_fixed(mean):
    """By enumeration of all completions of two tokens, each weighed by its probability."""
    student, teacher = Table(0), Table(1)
    config = SimpleNamespace(dtype="float32", temperature=1.0, micro_batch_tokens=64)
    completions = list(itertools.product(range(3), repeat=2))
    ids = torch.tensor([[0, *completion] for completion in completions])
    rollout = SimpleNamespace(ids=ids, mask=torch.ones(9, 2).bool(), ends=[3] * 9, kept=[])
    with torch.no_grad():
        rollout.old_logprobs = grpo.all_logprobs(student, rollout, config).double()
        of_teacher = teacher(ids[:, :-1]).log_softmax(-1)
    estimator = OnPolicy(teacher, partial(grpo.all_logprobs, config=config))
    advantages = estimator.advantages(rollout).double()
    logprobs = student(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    probability = rollout.old_logprobs.sum(1).exp()
    loss = sum(p * grpo.policy_loss(logprobs[i:i + 1], rollout.old_logprobs[i:i + 1], None, advantages[i:i + 1],
                                    torch.ones(1, 2), mean=mean, beta=0.0)[0] for i, p in enumerate(probability))
    ours, = torch.autograd.grad(loss, student.table)
    every = student(ids[:, :-1]).log_softmax(-1)                          # (9, 2, 3)
    reverse_kl = (every.exp() * (every - of_teacher)).sum(-1)             # (9, 2), at each prefix
    wanted, = torch.autograd.grad((probability[:, None] * reverse_kl).sum() / 2, student.table)
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)
    assert ours.abs().max() > 0.01
    exact = (probability[:, None] * reverse_kl).sum() / 2
    sampled = -(probability[:, None] * advantages).sum() / 2
    assert sampled.item() == pytest.approx(exact.item(), abs=1e-6)


def test_what_stands_in_the_padding_does_not_count():
    mask = torch.tensor([[True, True, False]])
    rollout = SimpleNamespace(mask=mask, old_logprobs=torch.tensor([[-1.0, -2.0, 0.0]]))
    estimator = OnPolicy(None, lambda model, rollout: torch.tensor([[-0.5, -4.0, -float("inf")]]))
    assert estimator.advantages(rollout).tolist() == [[0.5, -2.0, 0.0]]
    assert estimator.learn(rollout, [0]) == {"reverse_kl": 0.75}


def test_without_a_rule_the_student_comes_to_the_teachers_distribution():
    student, teacher = Table(0).float(), Table(1).float()
    student.config = SimpleNamespace()

    def sample(model, prompts, *, n, max_new_tokens, temperature, end_ids, generator):
        ids, logprobs = torch.tensor(prompts).repeat_interleave(n, 0), []
        for _ in range(max_new_tokens):
            p = model(ids)[:, -1].softmax(-1)
            token = torch.multinomial(p, 1, generator=generator)
            ids, _ = torch.cat((ids, token), 1), logprobs.append(p.gather(1, token).log())
        return ids[:, 1:], torch.full((len(ids),), max_new_tokens), torch.cat(logprobs, 1)

    config = grpo.GRPOConfig(rollouts=60, prompts_per_rollout=3, group_size=32, minibatches=1, max_new_tokens=4, lr=0.1,
                             warmup=1, beta=0.0, dtype="float32", grad_clip=10.0)
    history = []
    grpo.train(student, [[0], [1], [2]], encode=list, decode=str, generate=sample, end_ids=[], rewards={},
               config=config, advantage_estimator=OnPolicy(teacher, partial(grpo.all_logprobs, config=config)),
               log=lambda metrics, _: history.append(metrics["reverse_kl"]))
    assert history[0] > 0.3 and abs(sum(history[-5:]) / 5) < 0.03, history[::10]
    reached = student.table.softmax(-1)[:3]
    assert (reached - teacher.table.softmax(-1)[:3]).abs().max() < 0.15


OPTIONS = ("--rollouts 6 --prompts-per-rollout 2 --group-size 8 --minibatches 1 --max-new-tokens 6 --dtype float32 "
           "--lr 3e-3 --warmup 1 --save-every 0").split()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    dir = tmp_path_factory.mktemp("two")
    for name, kind, layout in (("teacher", "llama", "qwen"), ("student", "qwen3", "qwen"), ("other", "llama", "llama")):
        model, tokenizer = make(dir / name, kind, layout)
        if name == "teacher":  # its distributions are far from even, and so from the student's
            model.embed_tokens.weight.data *= 4
            save(model, dir / name, tokenizer)
    write(dir / "problems.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(9)])
    return dir


def on_policy(two, out, teacher="teacher", student="student", more=()):
    args = ["--on-policy", "--teacher", two / teacher, "--student", two / student, "--data", two / "problems.jsonl",
            "--out", out, *OPTIONS, *more]
    return run_forked(distill_module.main, argv=["distill.py", *map(str, args)])


def test_the_script_trains_the_student_towards_the_teacher(two, tmp_path):
    ended = on_policy(two, tmp_path / "out")
    assert ended.status == 0, ended.stderr
    values = [float(kl) for kl in re.findall(r"reverse kl (-?[0-9.]+)", ended.stdout)]
    assert len(values) == 6 and values[-1] < values[0]


def test_a_teacher_with_another_tokenizer_is_refused_in_one_line(two, tmp_path):
    ended = on_policy(two, tmp_path / "out", teacher="other")
    assert ended.status == 2 and "different tokenizers" in ended.stderr and ended.stderr.count("\n") == 1

"""What prompts do to the completions after them: the thinking that they open, the room that they leave."""

import argparse
import json
import re

import pytest
import torch

import evaluate
import grpo
import model as model_module
import rewards
import sft
from forked import run_forked
from lab.asking import decoder, opened_by, to_learn, with_room
from lab.layers import fast_layers
from runs import make, write
from tokenizer import TEMPLATES, Tokenizer

CONTINUED = "We add.\n</think>\n\n<answer>57</answer>"  # as a model goes on after <think>
EXAMPLE = {"prompt": "What is 12 + 45?", "answer": "57", "kind": "reasoning", "language": "en"}


# ---- what a prompt opens

@pytest.mark.parametrize("template, prompt, opened", [
    ("{prompt}", "2+3?", ""),
    ("{prompt}", "2+3? <think>", "<think>"),
    ("{prompt}", "2+3?\nAssistant: Let me solve this step by step.\n<think>\n", "<think>\n"),
    ("{prompt}\n", "2+3? <think>", "<think>\n"),
    ("{prompt}", "Write your thoughts after <think>, then </think>.", ""),
    ("{prompt}", "What does <think> mean?", ""),
    ("{prompt}", "<think>2+3</think>", ""),
    ("{prompt}<think>", "2+3?", "<think>"),
    ("User: {prompt}\nAssistant: <think>\n", "2+3?", "<think>\n"),
    ("{prompt}<think>\n\n", "2+3?", "<think>\n\n"),
    ("{prompt}\n<think>\nOkay, ", "2+3?", "<think>\nOkay, "),
    ("{prompt}<think>\n\n</think>\n\n", "2+3?", ""),
    ("{prompt} Think within <think> tags.<|im_end|>\n<|im_start|>assistant\n", "2+3?", ""),
    ("{prompt} Think within <think> tags.\nAssistant:", "2+3?", ""),
    (TEMPLATES["chatml"], "Begin with <think>", ""),  # the user's text, not the assistant's
    (TEMPLATES["r1-zero"], "2+3?", ""), (TEMPLATES["chatml"], "2+3?", ""), (TEMPLATES["llama-3"], "2+3?", ""),
    (TEMPLATES["deepseek"], "2+3?", ""), (TEMPLATES["deepseek-think"], "2+3?", "<think>\n"),
    (TEMPLATES["chatml-think"], "2+3?", "<think>\n"),
])
def test_a_prompt_opens_the_thinking_where_it_ends_within_it(template, prompt, opened):
    assert opened_by(template, prompt) == opened


def qwen(template):
    return Tokenizer("tests/fixtures/tokenizers/qwen", template)


@pytest.mark.parametrize("template, prompt", [("{prompt}<think>\n", "12+45?"), ("{prompt}", "12+45? <think>")])
def test_what_the_prompt_opened_is_part_of_the_completion_and_so_of_its_format(template, prompt):
    tokenizer, example = qwen(template), {**EXAMPLE, "prompt": prompt}
    assert rewards.format(CONTINUED, example) == rewards.accuracy(CONTINUED, example) == 0
    text = decoder(tokenizer, [example])(tokenizer.encode(CONTINUED))
    assert text.startswith("<think>") and text.endswith(CONTINUED)
    assert rewards.format(text, example) == rewards.accuracy(text, example) == 1
    cut = decoder(tokenizer, [example])(tokenizer.encode("We add 12 and 45"))
    assert rewards.thinks(cut) and rewards.split(cut)[1] == ""  # cut within its thinking: it has no answer
    doubled = decoder(tokenizer, [example])(tokenizer.encode("<think>" + CONTINUED))
    assert rewards.format(doubled, example) == 0


def test_where_no_prompt_opens_anything_a_completion_is_what_was_sampled():
    tokenizer = qwen("r1-zero")
    ids = tokenizer.encode(CONTINUED)
    assert decoder(tokenizer, [EXAMPLE, EXAMPLE])(ids) == tokenizer.decode(ids) == CONTINUED


def test_a_set_of_which_only_some_prompts_open_the_thinking_is_refused_with_one_that_does_not():
    with pytest.raises(ValueError, match="1 of 2 prompts end in <think>.*does not: 'What is 12"):
        decoder(qwen("none"), [{"prompt": "x <think>"}, EXAMPLE])


@pytest.mark.parametrize("before", ["<think>\n", "", "<think>", "\n<think>\n"])
def test_a_completion_is_learned_after_the_thinking_that_its_prompt_opened_and_not_with_a_second_tag(before):
    completion = before + "We add.\n</think><answer>57</answer>"
    row = to_learn({"prompt": "12+45?", "completion": completion}, TEMPLATES["chatml-think"])
    assert row["completion"] == "We add.\n</think><answer>57</answer>"
    untouched = {"prompt": "12+45?", "completion": completion}
    assert to_learn(untouched, TEMPLATES["chatml"]) == untouched


# ---- a model whose template opens the thinking, in each script

OPENING = ["--template", "{prompt}<think>\\n"]
SMALL = ["--rollouts", "1", "--prompts-per-rollout", "2", "--group-size", "2", "--minibatches", "1"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model that goes on from <think>, taught by sft.train on what comes after it; and its problems."""
    dir = tmp_path_factory.mktemp("taught")
    model, _ = make(dir / "model", "qwen3", "qwen")
    tokenizer = qwen("{prompt}<think>\n")
    problems = [{"prompt": f"What is {a} + {57 - a}?", "answer": "57"} for a in range(10, 30)]
    write(dir / "problems.jsonl", problems)
    examples = []
    for row in problems:
        prompt = tokenizer.encode_prompt(row["prompt"])
        examples.append((prompt + tokenizer.encode(CONTINUED) + [tokenizer.end_id], len(prompt)))
    sft.train(model, examples, sft.SFTConfig(lr=5e-3, epochs=60, batch_tokens=512, row_length=128, dtype="float32"))
    model_module.save(model, dir / "model", Tokenizer("tests/fixtures/tokenizers/qwen"))
    return dir


def call(main, *args):
    ended = run_forked(main, argv=[main.__module__ + ".py", *map(str, args)])
    return ended.status, ended.stdout, ended.stderr


def test_training_and_measuring_count_the_opened_thinking_as_written(taught, tmp_path):
    files = ["--model", taught / "model", "--data", taught / "problems.jsonl", *OPENING, "--max-new-tokens", "40"]
    status, said, error = call(grpo.main, *files, "--out", tmp_path / "out", *SMALL)
    assert status == 0 and float(re.search(r"reward ([0-9.]+)", said)[1]) > 1.4, said + error  # 0 without the tag
    assert "'<think>\\nWe add.\\n</think>\\n\\n<answer>57</answer>'" in said
    status, said, error = call(evaluate.main, *files, "--samples", "2")
    assert status == 0, error
    assert float(re.search(r"  accuracy +([0-9.]+)", said)[1]) > 0.9 and re.search("  thinks +1.000", said), said


def test_a_teachers_traces_hold_the_thinking_that_its_template_opened(taught, tmp_path):
    import distill
    status, said, error = call(
        distill.main, "--teacher", taught / "model", "--student", taught / "model", "--data", taught / "problems.jsonl",
        "--out", tmp_path / "out", *OPENING, "--max-new-tokens", "40", "--samples", "1", "--epochs", "1")
    assert status == 0 and int(re.search("kept ([0-9]+)", said)[1]) > 10, said + error
    traces = [json.loads(line) for line in open(tmp_path / "out" / "traces.jsonl")]
    assert "<think>\n" + CONTINUED in {row["completion"] for row in traces}


@pytest.mark.parametrize("completion, kept", [
    (r"So it is twelve and more. Thus \boxed{57}.", True),
    ("<think>\nWe add.\n</think>\n\nShe has $12 + 45 = \\boxed{57}$ apples.", True),
    ("<think>\nWe add.\n</think>\n\n**Answer:** \\boxed{57}", True),
    ("We add twelve.\nThe answer is: $\\boxed{57}$", True),
    ("We add twelve.\n#### 57", True),
    ("<think>\nWe add.\n</think>\n\n$$\\boxed{57}$$", True),
    (r"So it is twelve and more. Thus \boxed{58}.", False),
    ("<think>\nWe add and add", False),                      # cut within the thinking
    ("<answer>57</answer> and more", False),                  # tagged, so that its format counts
    ("<think>We add.</think><answer>58</answer>", False),
    (r"我们相加得到 \boxed{57}", False),                        # of another language
])
def test_a_teacher_that_boxes_its_answer_leaves_traces_where_it_is_right(completion, kept):
    from distill import rejection_sample
    from lab.distill_script import correct, one_language
    rows, _ = rejection_sample([EXAMPLE], [[completion]], correct=correct, one_language=one_language)
    assert len(rows) == kept, _


@pytest.mark.parametrize("most, share", [("3", "100%"), ("40", "0%")])
def test_evaluate_tells_how_many_outputs_were_cut(most, share, taught):
    files = ["--model", taught / "model", "--data", taught / "problems.jsonl", *OPENING, "--max-new-tokens", most]
    status, said, error = call(evaluate.main, *files, "--samples", "2", "--temperature", "0")
    assert status == 0 and f"2 samples each, {share} of them cut by max_new_tokens {most}" in said, said + error


def test_a_problem_set_gets_more_new_tokens_than_the_mini_world_and_a_line_says_so(taught, tmp_path):
    from data import world
    from lab.scripts import choose_max_new_tokens
    files = ["--model", taught / "model", "--data", taught / "problems.jsonl", *OPENING]
    status, said, error = call(evaluate.main, *files, "--samples", "1")
    assert status == 0 and "max_new_tokens 512, the default for problem sets" in said, said + error
    examples = world.problems(100, "train", 4) + world.requests(100, "train", 4, "safety")
    for given, expected in ((None, 160), (7, 7)):
        args = argparse.Namespace(max_new_tokens=given)
        choose_max_new_tokens(args, examples, grpo.GRPOConfig)
        assert args.max_new_tokens == expected


# ---- the room that a prompt leaves

def tiny_model(tiny):
    return tiny(max_position_embeddings=512).eval()


def test_a_long_prompt_takes_no_room_from_the_others_in_its_lot(tiny):
    model = tiny_model(tiny)
    prompts = [[5] * 10, [5] * 10, [5] * 500]
    ids, lengths, logprobs = model_module.generate(model, prompts, max_new_tokens=100, temperature=0.0)
    assert lengths.tolist() == [100, 100, 12]
    for i, prompt in enumerate(prompts):
        alone = model_module.generate(model, [prompt], max_new_tokens=100, temperature=0.0)
        assert torch.equal(alone[0][0], ids[i]) and alone[1].item() == lengths[i]


@pytest.mark.parametrize("lengths, n, most, expected", [
    ([500, 10], 1, 100, [12, 100]), ([511, 1], 2, 30, [1, 1, 30, 30]), ([412, 413, 411], 1, 100, [100, 99, 100]),
    ([10, 10], 1, 600, [502, 502]), ([1, 511], 1, 600, [511, 1]), ([200, 400, 500], 1, 500, [312, 112, 12]),
    ([508, 509, 510, 511], 1, 9, [4, 3, 2, 1]), ([100] * 3, 1, 412, [412] * 3),
])
def test_a_row_ends_where_its_own_prompt_and_tokens_fill_the_context(tiny, lengths, n, most, expected):
    found = model_module.generate(tiny_model(tiny), [[5] * length for length in lengths], n=n, max_new_tokens=most)[1]
    assert found.tolist() == expected


def test_the_tokens_of_a_row_past_its_neighbours_context_are_those_that_the_model_gives_it(tiny):
    model = tiny_model(tiny)
    ids, lengths, logprobs = model_module.generate(model, [[3, 1, 4], [5] * 505], n=2, max_new_tokens=60,
                                                   generator=torch.Generator().manual_seed(0))
    assert lengths.tolist() == [60, 60, 7, 7]
    for row, prompt in enumerate([[3, 1, 4], [3, 1, 4], [5] * 505, [5] * 505]):
        whole = torch.tensor([prompt + ids[row, :lengths[row]].tolist()])
        expected = model(whole[:, :-1]).log_softmax(-1).gather(2, whole[:, 1:, None])[0, len(prompt) - 1:, 0]
        torch.testing.assert_close(logprobs[row, :lengths[row]], expected.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[3, 60], [60, 3], [40, 2, 61]])
def test_a_rollout_whose_rows_fill_the_context_at_different_places_is_scored_as_it_was_sampled(lengths, tiny):
    model = fast_layers(tiny().eval())  # the context is 64
    config = grpo.GRPOConfig(group_size=2, max_new_tokens=50, dtype="float32")
    r = grpo.rollout(model, [[5] * length for length in lengths], encode=list, decode=str, end_ids=[99],
                     generate=model_module.generate, rewards={"none": lambda text, example: 0.0}, weights={},
                     config=config, generator=torch.Generator().manual_seed(0))
    assert r.lengths.tolist() == [min(50, 64 - length) for length in lengths for _ in range(2)]
    found = grpo.all_logprobs(model, r, config)
    torch.testing.assert_close(found, r.sampled_logprobs, atol=1e-4, rtol=1e-4)


def test_prompts_without_room_are_left_out_and_counted_and_short_room_is_said(capsys):
    examples = [{"prompt": "a" * n} for n in (3, 64, 60, 70, 10)]
    kept = with_room(examples, lambda example: list(example["prompt"]), 64, 20, "set.jsonl")
    assert [len(example["prompt"]) for example in kept] == [3, 60, 10]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("set.jsonl: 2 of 5 prompts leave no room for an answer in the context of 64 tokens, "
                              "the longest, of 70, is 'aaa")
    assert said[1] == ("set.jsonl: 1 of 5 prompts leave room for less than max_new_tokens 20 in the context of 64 "
                       "tokens, down to 4")
    assert with_room(examples[:1], lambda example: [1, 2], 64, 20, "x") == examples[:1]
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="x: 1 of 1 prompts leave no room"):
        with_room(examples[1:2], lambda example: list(example["prompt"]), 64, 20, "x")


@pytest.mark.parametrize("script", ["grpo", "evaluate", "distill", "pipeline"])
def test_each_command_says_before_training_which_prompts_leave_no_room(script, taught, tmp_path):
    import distill
    import pipeline
    long = {"prompt": "What is one " + "and one " * 600 + "?", "answer": "601"}
    rows = [json.loads(line) for line in open(taught / "problems.jsonl")]
    data = write(tmp_path / "long.jsonl", [long, *rows])
    out, few = ["--out", tmp_path / "out"], ["--max-new-tokens", "8"]
    mains = {"grpo": grpo.main, "evaluate": evaluate.main, "distill": distill.main, "pipeline": pipeline.main}
    arguments = {
        "grpo": ["--model", taught / "model", "--data", data, *out, *SMALL, *few],
        "evaluate": ["--model", taught / "model", "--data", data, "--samples", "1", *few],
        "distill": ["--teacher", taught / "model", "--student", taught / "model", "--data", data, *out, *OPENING,
                    "--max-new-tokens", "40", "--samples", "1", "--epochs", "1"],
        "pipeline": ["--base", taught / "model", "--train", data, "--test", taught / "problems.jsonl", *out, *few,
                     "--stages", "base", "--samples", "1", "--test-problems", "4", "--device", "cpu"]}
    if script == "pipeline":
        write(tmp_path / "train.jsonl", [long, *({**row, "prompt": "How much? " + row["prompt"]} for row in rows)])
        arguments["pipeline"][3] = tmp_path / "train.jsonl"
    status, said, error = call(mains[script], *arguments[script])
    assert status == 0 and "prompts leave no room for an answer in the context of" in said, said + error
    assert said.index("leave no room") < (said.find("rollout 1/") if script == "grpo" else len(said))

"""Problem sets and rows for SFT in the files and forms that others write."""

import json
import re

import pytest

from data import forms
from data.math_answers import read_answer
from data.problems import read_problems, read_rows
from lab.check_input import check_example
from runs import write

USER = [{"role": "user", "content": "What is 17 + 25?"}]
KNOWN = {"prompt": "What is 17 + 25?", "answer": "42"}


def read(path, **fields):
    examples = read_problems(path, lambda example: check_example(example, read_answer), **fields)
    return [{"prompt": example["prompt"], "answer": example["answer"]} for example in examples]


# ---- files

@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"prompt": "What is 17 + 25?", "answer": "42"}\n'),
    ("a.json", '{"prompt": "What is 17 + 25?", "answer": "42"}\n'),
    ("a.json", '[{"prompt": "What is 17 + 25?", "answer": "42"}]'),
    ("a.jsonl", '[\n  {"prompt": "What is 17 + 25?",\n   "answer": "42"}\n]\n'),
    ("a.json", '\ufeff [{"prompt": "What is 17 + 25?", "answer": "42"}]'),
    ("a.json", '{"version": "1.1", "data": [{"prompt": "What is 17 + 25?", "answer": "42"}]}'),
    ("a.json", '{"features": ["x"], "rows": [{"row": {"prompt": "What is 17 + 25?", "answer": "42"}}]}'),
    ("a.json", '{"prompt": "What is 17 + 25?",\n "answer": "42"}'),
    ("a.csv", "prompt,answer\nWhat is 17 + 25?,42\n"),
    ("a.csv", "\ufeffprompt,answer\r\n\"What is 17 + 25?\",\"42\"\r\n"),
    ("A.CSV", "id,answer,question\n1,42,What is 17 + 25?\n"),
    ("a.csv", "prompt;answer\nWhat is 17 + 25?;42\n"),
    ("a.tsv", "prompt\tanswer\nWhat is 17 + 25?\t42\n"),
    ("a.csv", 'prompt,answer\n"[{""role"": ""user"", ""content"": ""What is 17 + 25?""}]",42\n'),
    ("a.csv", "question,answer\nWhat is 17 + 25?,\"We add.\n#### 42\"\n"),
])
def test_each_kind_of_file_gives_its_rows(name, content, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path / name) == [KNOWN]


def test_a_cell_that_begins_as_json_and_is_none_is_text_and_countdown_comes_in_csv_too(tmp_path):
    rows = ['prompt,answer', 'Which interval?,"[2, 5)"', '"{x : x > 2}, least?",3', 'List?,"[1, 2]"']
    (tmp_path / "a.csv").write_text("\n".join(rows))
    assert [row["answer"] for row in read(tmp_path / "a.csv")] == ["[2, 5)", "3", "[1, 2]"]
    (tmp_path / "b.csv").write_text('nums,target\n"[44, 19, 35]",98\n')
    example, = read_problems(tmp_path / "b.csv", lambda example: None)
    assert example["nums"] == [44, 19, 35] and example["target"] == 98


@pytest.mark.parametrize("name, content, culprit", [
    ("a.csv", b"prompt,answer\n1+1,2\n3+4\n", "a.csv:3: it has another number of cells"),
    ("a.csv", b"prompt,answer\n1+1,2,3\n", "a.csv:2: it has another number of cells"),
    ("a.csv", b"prompt,answer\n1+1,\xff\n", "not UTF-8 at byte 18"), ("a.csv", b"prompt,answer\n", "no rows"),
    ("a.csv", b'prompt,answer\n"1+1,2\n', "a.csv:"), ("a.csv", b"", "no rows"), ("a.json", b"", "no rows"),
    ("a.json", b"[]", "no rows"), ("a.json", b"[1, 2]", "row 1: a row must be an object"),
    ("a.json", b'[{"prompt": "1+1", "answer": "2"}, {"prompt": "3+4"}]', "a.json:row 2: fields prompt"),
    ("a.json", b'[{"prompt": "1+1", "answer": "2"},', "a.json:1: not JSON"),
    ("a.json", b'[{"prompt": "\\ud800", "answer": "2"}]', "row 1: not JSON in UTF-8"),
    ("a.json", b"[" * 100_000, "a.json:1: not JSON"), ("a.json", b'{"text": "hello"}', "row 1: fields text"),
    ("a.parquet", b"PAR1....PAR1", "is Parquet.*read_parquet.*a.jsonl.*orient='records', lines=True"),
    ("a.jsonl", b"PAR1....PAR1", "is Parquet"), ("a.arrow", b"ARROW1....", "is Arrow"),
    ("a.jsonl.gz", b"\x1f\x8b\x08", "is gzip"), ("a.zip", b"PK\x03\x04", "is zip"),
])
def test_a_file_that_is_none_of_them_is_one_line_that_names_what_it_is(name, content, culprit, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=culprit) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_the_line_that_converts_parquet_does(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rows = [{"prompt": USER, "reward_model": {"ground_truth": "42", "style": "rule"}}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError) as error:
        read(tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    exec(re.search('python -c "(.*)"', str(error.value))[1])
    assert read(tmp_path / "a.jsonl") == [KNOWN]


# ---- forms of problems

@pytest.mark.parametrize("row", [
    {"prompt": USER, "answer": "42"},
    {"prompt": USER, "reward_model": {"style": "rule", "ground_truth": "42"}, "data_source": "openai/gsm8k"},
    {"prompt": USER, "reward_model": {"ground_truth": ["42"]}},
    {"prompt": USER, "solution": "42"}, {"prompt": USER, "solution": "<answer> 42 </answer>"},
    {"prompt": USER, "solution": "We add.\nSo $\\boxed{42}$."}, {"question": "What is 17 + 25?", "solution": "$42$"},
    {"problem": "What is 17 + 25?", "solution": "42"}, {"question": "What is 17 + 25?", "final_answer": "42"},
    {"question": "What is 17 + 25?", "ground_truth": "42"}, {"problem": "What is 17 + 25?", "expected_answer": "42"},
    {"instruction": "What is 17 + 25?", "answer": "42"}, {"query": "What is 17 + 25?", "answer": "42"},
    {"messages": USER, "answer": "42"},
    {"conversations": [{"from": "human", "value": "What is 17 + 25?"}], "answer": "42"},
    {"messages": [*USER, {"role": "assistant", "content": "17 + 25 = 42"}], "answer": "42"},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"text": "17 + 25?"}]}],
     "answer": "42"},
    {"prompt": "What is 17 + 25?", "messages": [{"role": "user", "content": "something else"}], "answer": "42"},
])
def test_each_form_of_a_problem_gives_its_prompt_and_answer(row, tmp_path):
    found, = read(write(tmp_path / "a.jsonl", [row]))
    assert found["prompt"] == KNOWN["prompt"] and read_answer(found["answer"]) == read_answer("42")


def test_a_system_message_stands_before_the_question_and_tinyzeros_countdown_is_countdown(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    found, = read(write(tmp_path / "a.jsonl", [{"prompt": [system, *USER], "answer": "42"}]))
    assert found["prompt"] == "Be brief.\n\nWhat is 17 + 25?"
    row = {"prompt": [{"role": "user", "content": "Make 98."}], "ability": "math",
           "reward_model": {"ground_truth": {"numbers": [44, 19, 35], "target": 98}}}
    example, = read_problems(write(tmp_path / "b.jsonl", [row]), lambda example: None)
    assert (example["prompt"], example["nums"], example["target"]) == ("Make 98.", [44, 19, 35], 98)


@pytest.mark.parametrize("row, fields, prompt, answer", [
    ({"q": "1+1?", "a": "2"}, {"prompt_field": "q", "answer_field": "a"}, "1+1?", "2"),
    ({"q": "1+1?", "answer": "2"}, {"prompt_field": "q"}, "1+1?", "2"),
    ({"prompt": "1+1?", "answer": "no", "gold": "2"}, {"answer_field": "gold"}, "1+1?", "2"),
    ({"prompt": "no", "question": "1+1?", "answer": "2"}, {"prompt_field": "question"}, "1+1?", "2"),
    ({"problem": "1+1?", "solution": "\\boxed{3}", "gold": "2"}, {"answer_field": "gold"}, "1+1?", "2"),
    ({"question": "1+1?", "answer": "x\n#### 3", "extra": {"gold": "2"}}, {"answer_field": "extra.gold"}, "1+1?", "2"),
    ({"question": "1+1?", "raw": "We add.\n#### 2"}, {"answer_field": "raw"}, "1+1?", "2"),
    ({"a.b": "1+1?", "answer": "2"}, {"prompt_field": "a.b"}, "1+1?", "2"),
    ({"in": {"chat": [{"role": "user", "content": "1+1?"}]}, "answer": "2"}, {"prompt_field": "in.chat"}, "1+1?", "2"),
    ({"text": "1+1?", "nums": [1, 1], "target": 2, "answer": "2"}, {"prompt_field": "text"}, "1+1?", "2"),
])
def test_the_fields_of_the_command_line_go_before_those_that_would_be_found(row, fields, prompt, answer, tmp_path):
    assert read(write(tmp_path / "a.jsonl", [row]), **fields) == [{"prompt": prompt, "answer": answer}]


@pytest.mark.parametrize("row, fields, culprit", [
    ({"q": "1+1?", "a": "2"}, {"prompt_field": "question"}, "no field 'question', only q, a"),
    ({"q": "1+1?", "a": {"b": "2"}}, {"prompt_field": "q", "answer_field": "a.c"}, "no field 'a.c', only q, a"),
    ({"prompt": [*USER, {"role": "assistant", "content": "x"}, *USER], "answer": "2"}, {}, "words of the assistant"),
    ({"prompt": [*USER, {"role": "assistant", "content": "<think>"}], "answer": "2"}, {}, "words of the assistant"),
    ({"prompt": [{"role": "tool", "content": "x"}], "answer": "2"}, {}, "role is 'tool'"),
    ({"prompt": ["x"], "answer": "2"}, {}, "no object"), ({"prompt": [], "answer": "2"}, {}, "no list"),
    ({"messages": "x", "answer": "2"}, {}, "no list"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"}, {}, "something else than text"),
    ({"prompt": [{"role": "user"}], "answer": "2"}, {}, "something else than text"),
])
def test_a_row_that_cannot_be_taken_is_named_with_its_line(row, fields, culprit, tmp_path):
    with pytest.raises(ValueError, match=f"a.jsonl:1: .*{culprit}"):
        read(write(tmp_path / "a.jsonl", [row]), **fields)


# ---- rows for SFT

PAIR = {"prompt": "17 + 25?", "completion": "42"}
ASKED, SAID = {"role": "user", "content": "17 + 25?"}, {"role": "assistant", "content": "42"}


@pytest.mark.parametrize("row", [
    PAIR, {"messages": [ASKED, SAID]}, {"prompt": [ASKED], "completion": [SAID]},
    {"conversations": [{"from": "human", "value": "17 + 25?"}, {"from": "gpt", "value": "42"}]},
    {"messages": [ASKED, SAID], "source": "x"}, {"instruction": "17 + 25?", "input": "", "output": "42"},
    {"instruction": "17 + 25?", "output": "42"}, {"question": "17 + 25?", "response": "42"},
    {"query": "17 + 25?", "response": "42"}, {"prompt": "17 + 25?", "response": "42"},
    {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "42"}]}]},
    {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "value": "42"}]}]},
    PAIR | {"messages": [ASKED, {"role": "assistant", "content": "43"}]},
])
def test_each_form_of_a_row_for_sft_is_a_prompt_and_a_completion(row, tmp_path):
    found, = read_rows(write(tmp_path / "a.jsonl", [row]), ("prompt", "completion"))
    assert {name: found[name] for name in PAIR} == PAIR


def test_instructions_have_their_input_below_them_and_a_system_message_stands_before_the_question(tmp_path):
    rows = [{"instruction": "Add.", "input": "17 and 25", "output": "42"},
            {"messages": [{"role": "system", "content": "Be brief."}, ASKED, SAID]}]
    found = read_rows(write(tmp_path / "a.jsonl", rows), ("prompt", "completion"))
    assert [row["prompt"] for row in found] == ["Add.\n\n17 and 25", "Be brief.\n\n17 + 25?"]


def test_of_a_long_conversation_the_first_answer_is_learned_and_a_line_says_so(tmp_path, capsys):
    rows = [{"messages": [ASKED, SAID, {"role": "user", "content": "And 1?"}, {"role": "assistant", "content": "43"}]},
            {"messages": [ASKED, SAID]}]
    assert read_rows(write(tmp_path / "a.jsonl", rows), ("prompt", "completion")) == [PAIR, PAIR]
    assert "a.jsonl: 1 of 2 conversations have later turns: not learned" in capsys.readouterr().out


@pytest.mark.parametrize("row, culprit", [
    ({"messages": []}, "no list"), ({"messages": [SAID]}, "begins with the assistant"), (5, "no text"),
    ({"prompt": "x"}, "no text under 'completion'"), ({"text": "x"}, "no text under 'prompt'"),
    ({"messages": [ASKED, {"role": "tool", "content": "x"}]}, "role is 'tool'"),
])
def test_a_row_for_sft_that_cannot_be_taken_is_named(row, culprit, tmp_path):
    with pytest.raises(ValueError, match=f"a.jsonl:1: .*{culprit}"):
        read_rows(write(tmp_path / "a.jsonl", [row]), ("prompt", "completion"))


def test_the_rows_that_the_file_opens_with_are_read():
    opened = [line for line in forms.__doc__.splitlines() if line.startswith("    {")]
    rows = [json.loads(re.sub(r"\}\s+[A-Za-z: ]+$", "}", line).replace("[...]", json.dumps(USER)).replace("\\", "\\\\"))
            for line in opened]
    assert len(rows) == 6
    for row, names in zip(rows, [{"prompt", "answer"}, {"prompt", "nums", "target"}, {"problem", "solution"}]):
        assert names <= forms.usual_fields(row).keys()
    for row in rows[3:]:
        assert forms.prompt_and_completion(row)[0]["completion"] == "42"

r"""The files that rows come in, and the forms in which others write a row, turned into the fields of data/problems.py.

Files: JSONL; JSON, an array of rows or an object that holds one; CSV and TSV with names in the first line.
Forms, one example of each:

    {"prompt": [{"role": "user", "content": "17 + 25?"}], "reward_model": {"ground_truth": "42"}}    verl
    {"prompt": [...], "reward_model": {"ground_truth": {"numbers": [44, 19, 35], "target": 98}}}     TinyZero
    {"prompt": [...], "solution": "$\boxed{42}$"}                                                    TRL
    {"instruction": "Add.", "input": "17 and 25", "output": "42"}                                    for SFT: Alpaca
    {"messages": [{"role": "user", "content": "17 + 25?"}, {"role": "assistant", "content": "42"}]}  a chat
    {"conversations": [{"from": "human", "value": "17 + 25?"}, {"from": "gpt", "value": "42"}]}      ShareGPT
"""

import csv
import io
import json
from pathlib import Path

from data.math_answers import last_box, read_answer

PROMPTS = ("prompt", "question", "problem", "instruction", "query")
ANSWERS = ("final_answer", "ground_truth", "expected_answer", "reward_model.ground_truth")  # where there is no "answer"
COMPLETIONS = ("completion", "response", "output")
CONVERSATIONS = ("messages", "conversations")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "model": "assistant"}
OTHER_FILES = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip",
               b"\x28\xb5\x2f\xfd": "zstd"}


# ------------------------------------------------------------------------------------------- files

def numbered_rows(path):
    """[(line or "row N", row)] of a file. Raises ValueError with file and line."""
    byte_order_mark = b"\xef\xbb\xbf"
    content = Path(path).read_bytes().removeprefix(byte_order_mark)
    refuse_other_files(path, content)
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        rows = csv_rows(path, content)
    else:
        rows = json_rows(path, content)
    if not rows:
        raise ValueError(f"{path}: no rows")
    for number, row in rows:
        try:
            json.dumps(row, ensure_ascii=False).encode()  # fails for a lone surrogate, which could not be written again
        except (ValueError, RecursionError):
            raise ValueError(f"{path}:{number}: not JSON in UTF-8") from None
    return rows


def refuse_other_files(path, content):
    kind = next((kind for start, kind in OTHER_FILES.items() if content.startswith(start)), None)
    if kind == "Parquet":
        name = Path(path).with_suffix(".jsonl").name
        raise ValueError(f"{path} is Parquet, whose reader is no package of ours. To convert it: pip install pandas "
                         f"pyarrow; python -c \"import pandas; pandas.read_parquet({str(path)!r}).to_json({name!r}, "
                         "orient='records', lines=True)\"")
    if kind is not None:
        raise ValueError(f"{path} is {kind}: JSONL, JSON and CSV are read")


def json_rows(path, content):
    """JSON, if the whole file is one array, or one object with one array of objects; else JSONL."""
    if content.lstrip()[:1] == b"[" or Path(path).suffix.lower() == ".json":
        try:
            whole = json.loads(content)
        except (ValueError, RecursionError):
            whole = None  # JSONL, or nothing that can be read: then its line is named below
        rows = array_of(whole)
        if rows is not None:
            return [(f"row {number}", row) for number, row in enumerate(rows, 1)]
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError):
                raise ValueError(f"{path}:{number}: not JSON in UTF-8") from None
    return rows


def array_of(whole):
    """The rows of a JSON document; None where it is none."""
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        return None
    arrays = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    is_row = any(name in whole for name in (*PROMPTS, *CONVERSATIONS))
    if is_row or len(arrays) != 1:
        return [whole]
    return [each["row"] if isinstance(each, dict) and "row" in each else each for each in arrays[0]]  # a viewer's page


def csv_rows(path, content):
    """Cells are texts, but for objects, messages and Countdown's numbers, which are JSON."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    first = text.partition("\n")[0]
    delimiter = max(",\t;", key=first.count)
    csv.field_size_limit(2 ** 24)
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter), []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{reader.line_num}: it has another number of cells than the first line")
            rows.append((reader.line_num, {name: cell_value(name, cell) for name, cell in row.items()}))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None
    return rows


def cell_value(name, cell):
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    is_messages = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    return value if isinstance(value, dict) or is_messages or name in ("nums", "target") else cell  # "[1, 2]": a text


# ------------------------------------------------------------------------------------------- rows of problems

def usual_fields(row, prompt_field=None, answer_field=None):
    """A row of a problem set with its prompt and answer where data/problems.py looks for them.

    prompt_field, answer_field: names, "reward_model.ground_truth" for one within another, in place of looking for them.
    """
    row = with_chosen_fields(row, prompt_field, answer_field)
    for name in CONVERSATIONS:
        if name in row and not any(prompt in row for prompt in PROMPTS):
            row["prompt"] = question_and_answer(row[name])[0]
        row.pop(name, None)
    for name in PROMPTS:
        if isinstance(row.get(name), list):
            row[name] = prompt_of(row[name])
    for name in ("instruction", "query"):
        if name in row and not any(prompt in row for prompt in PROMPTS[:3]):
            row["prompt"] = with_input(row, name)
    return with_answer(row)


def with_chosen_fields(row, prompt_field, answer_field):
    """A copy of the row with "prompt" and "answer" from the fields that a user named, without what they replace."""
    chosen, replaced = {}, set()
    if prompt_field is not None:
        chosen["prompt"] = value_at(row, prompt_field)
        replaced |= {*PROMPTS, "nums", "target"}
    if answer_field is not None:
        chosen["answer"] = value_at(row, answer_field)
        replaced |= {"answer", "solution", "nums", "target"}
    return {name: value for name, value in row.items() if name not in replaced} | chosen


def value_at(row, path):
    """The value under a name, or under one within another. Raises ValueError."""
    value, names = row, [path] if path in row else path.split(".")
    for name in names:
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"there is no field {path!r}, only {', '.join(map(str, row))}")
        value = value[name]
    return value


def with_answer(row):
    """The row with an "answer", where another name or a short "solution" holds it."""
    if "answer" in row or "nums" in row:
        return row
    for path in ANSWERS:
        try:
            value = value_at(row, path)
        except ValueError:
            continue
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict) and {"numbers", "target"} <= value.keys():
            return row | {"nums": value["numbers"], "target": value["target"]}
        return row | {"answer": value}
    solution = row.get("solution")
    if not isinstance(solution, str):
        return row
    if last_box(solution) is not None:  # MATH's, whatever the prompt is called
        prompts = [row[name] for name in PROMPTS if name in row]
        return row | {"problem": prompts[0]} if prompts else row
    answer = solution.strip().removeprefix("<answer>").removesuffix("</answer>").strip()
    is_short = any(map(str.isdigit, answer)) or " " not in answer  # "no box" is a solution without an answer
    if is_short and read_answer(answer) is not None:
        rest = {name: value for name, value in row.items() if name != "solution"}
        return rest | {"answer": answer}
    return row


# ------------------------------------------------------------------------------------------- messages

def turns_of(messages):
    """[(role, text)] of a list of messages. Raises ValueError for what is none."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages {str(messages)[:100]} are no list of them")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"the message {str(message)[:100]} is no object")
        role = message.get("role", message.get("from"))
        if role not in ROLES:
            raise ValueError(f"a message's role is {role!r}, none of {', '.join(ROLES)}")
        turns.append((ROLES[role], text_of(message.get("content", message.get("value")))))
    return turns


def text_of(content):
    """A message's text, which may come in parts."""
    if isinstance(content, list):
        parts = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise ValueError("a message holds something else than text")
    return content


def prompt_of(messages):
    """The text of a prompt that is a list of messages: of the system and the user."""
    turns = turns_of(messages)
    if any(role == "assistant" for role, _ in turns):
        raise ValueError("its prompt holds words of the assistant: earlier turns are not asked again here; how an "
                         "answer begins can be said in --template")
    return "\n\n".join(text for _, text in turns)


def question_and_answer(messages):
    """(prompt, completion or "", number of later answers) of a conversation: its first question and answer."""
    turns = turns_of(messages)
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
    first = answers[0] if answers else len(turns)
    if first == 0:
        raise ValueError("its conversation begins with the assistant")
    question = "\n\n".join(text for _, text in turns[:first])
    return question, turns[first][1] if answers else "", len(answers[1:])


def with_input(row, name):
    """An instruction and, below it, what it is about."""
    more = row.get("input")
    return f"{row[name]}\n\n{more}" if isinstance(more, str) and more.strip() else row[name]


# ------------------------------------------------------------------------------------------- rows for SFT

def prompt_and_completion(row):
    """(the row with "prompt" and "completion" as texts, number of later answers that are left out)."""
    if not isinstance(row, dict):
        return row, 0
    for name in CONVERSATIONS:
        if name in row and not ("prompt" in row and "completion" in row):
            prompt, completion, later = question_and_answer(row[name])
            return {"prompt": prompt, "completion": completion}, later
    prompts, completions = ([name for name in names if name in row] for names in (PROMPTS, COMPLETIONS))
    if not prompts or not completions:
        return row, 0
    prompt, completion = row[prompts[0]], row[completions[0]]
    if isinstance(prompt, list):
        prompt = prompt_of(prompt)
    elif prompts[0] == "instruction":
        prompt = with_input(row, "instruction")
    if isinstance(completion, list):
        completion = "\n\n".join(text for _, text in turns_of(completion))
    return row | {"prompt": prompt, "completion": completion}, 0

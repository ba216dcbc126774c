"""What transformers makes of the same strings is recorded in tests/fixtures/tokenizers (record.py there)."""

import json
import os
import random
import re
import resource
import runpy
import shutil
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

import data.train_tokenizer as training
import lab.check_tokenizer as checks
import tokenizer as tokenizer_module
from data.train_tokenizer import PATTERN, train_bpe
from lab.check_tokenizer import check_tokenizer
from tokenizer import TAGS, TEMPLATES, Tokenizer, recognise

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
LAYOUTS = ["ours", "gpt2", "qwen", "smollm", "llama"]
STRINGS = json.loads((FIXTURES / "strings.json").read_text())
SAMPLE = [f"{name} has {a} apples and gives {b} away. <think> {a} - {b} = {a - b} </think>"
          f"<answer>{a - b}</answer><|end|>\n"
          f"{名}有{a}个苹果，送了{b}个，还剩几个？<think>{a} - {b} = {a - b}</think>"
          f"<answer>还剩{a - b}个苹果。</answer><|end|>\n"
          for name, 名, a, b in [("Tom", "小明", 57, 12), ("Anna", "小红", 103, 99), ("Tom", "小红", 88, 8),
                                ("Ben", "小明", 190, 25), ("Anna", "小丽", 77, 77)]]


@pytest.fixture(scope="module")
def ours():
    return Tokenizer(FIXTURES / "ours")


def open_checked(dir, template=None):
    """As commands open a directory."""
    check_tokenizer(dir, template)
    return Tokenizer(dir, template)


def break_it(tmp_path, change) -> Path:
    """A copy of our tokenizer with its JSON changed."""
    spec = json.loads((FIXTURES / "ours" / "tokenizer.json").read_text())
    change(spec)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_text_are_those_that_transformers_gives(layout):
    tokenizer = Tokenizer(FIXTURES / layout)
    for text, row in zip(STRINGS, json.loads((FIXTURES / layout / "ids.json").read_text()), strict=True):
        assert tokenizer.encode(text, allow_special=True) == row["special"], text
        assert tokenizer.encode(text) == row["user"], text
        assert tokenizer.decode(row["special"]) == row["decoded"], text


SCRIPTS = ["abcdefghij ABC", "éèñßçøåæœ", "привет ЖЩ", "αβγδω ΣΩ", "مرحبا ٣٤٥", "שלום", "हिन्दी १२", "ไทยนี้", "苹果梨小明的",
           "ひらがなカタカナ", "한국어 각", "e\u0301a\u0300\u0327o\u0308", "🍎👩\u200d👩\u200d👧❤\ufe0f🇨🇳",
           " \t\n\r\x0b\x0c\x85\u00a0\u2028\u3000\u200b\x1c\x1f",
           "0123456789½Ⅷ１²", "+-*/=.,;:<>|()_'\"[]{}#$%&@!?\\", "'s'S'll'LL'ſ’s",
           "\x00\x01\x04\x06\x7f\ue000\U0010ffff\ufffd"]


def random_string(rng, words):
    parts = []
    for _ in range(rng.randrange(1, 8)):
        kind = rng.random()
        if kind < 0.6:
            parts.append("".join(rng.choices(rng.choice(SCRIPTS), k=rng.randrange(1, 9))))
        elif kind < 0.8:
            parts.append(rng.choice(words))
        elif kind < 0.9:
            parts.append(rng.choice(words)[:rng.randrange(1, 9)] * rng.randrange(1, 40))
        else:
            for _ in range(3):
                code = rng.choice((rng.randrange(0x300), rng.randrange(0xd800), rng.randrange(0xe000, 0x110000)))
                parts.append(chr(code))
    return "".join(parts)


@pytest.mark.parametrize("layout", [*LAYOUTS, "SMOLLM2"])
def test_ten_thousand_random_strings_have_the_ids_of_the_tokenizers_library(layout):
    """SMOLLM2=DIR in the environment: SmolLM2's own tokenizer too. Unicode's younger combining marks are left out: NFC
    orders them by tables that differ between Python's version and the library's."""
    tokenizers = pytest.importorskip("tokenizers")
    dir = os.environ.get(layout) if layout == "SMOLLM2" else FIXTURES / layout
    if not dir:
        pytest.skip("SMOLLM2 names no directory")
    theirs = tokenizers.Tokenizer.from_file(str(Path(dir) / "tokenizer.json"))
    ours, rng = open_checked(dir), random.Random(1)
    words = [*ours.added, *TAGS, "<|im_", "end|>", "hello", " world", "don't", "1234 apples", "    return x\n\n",
             "https://a.b/c?d=1", "aaaa", "=="]
    younger = {chr(c) for c in range(0x110000) if unicodedata.combining(chr(c)) and not 0x300 <= c < 0x370}
    for _ in range(10_000):
        text = random_string(rng, words)
        if ours.normalize is str or younger.isdisjoint(text):
            assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False).ids, text


def test_a_byte_that_is_no_token_is_left_out_or_unknown_as_the_library_does(tmp_path):
    def name(unknown):
        return lambda spec: (spec.update(json.loads((FIXTURES / "smollm" / "tokenizer.json").read_text())),
                             spec["model"].update(unk_token=unknown))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    config = '{"eos_token": "<|im_end|>"}'
    for dir in "ab":
        (tmp_path / dir / "tokenizer_config.json").write_text(config)
    without = open_checked(break_it(tmp_path / "a", name(None)))
    unknown = open_checked(break_it(tmp_path / "b", name("!")))
    assert without.encode("!\x04!") == without.encode("!!")  # the neighbours become one piece
    bang = unknown.encode("!")
    assert unknown.encode("!\x04!") == bang * 3  # here "!" itself stands for what is unknown, and keeps them apart
    tokenizers = pytest.importorskip("tokenizers")
    for dir, ours in ("a", without), ("b", unknown):
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / dir / "tokenizer.json"))
        for text in ("!\x04!", "\x04", "a\x00\x00bc", "\U00050000", "x = \x1c\x1c 1"):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


# ---- prompt templates

CHATML = ("{% for message in messages %}"
          "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def test_r1_zeros_template_is_the_papers_word_for_word():
    paper = """A conversation between User and Assistant. The user asks a question, and the Assistant solves it.
        The assistant first thinks about the reasoning process in the mind and then provides the user with the answer.
        The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags,
        respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.
        User: prompt. Assistant:"""
    assert TEMPLATES["r1-zero"] == " ".join(paper.split()).replace("User: prompt.", "User: {prompt}.")


def renders(chat_template, prompt):
    """As transformers renders it; DeepSeek's start token is another."""
    sandbox = pytest.importorskip("jinja2.sandbox")  # that comes with torch
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    start = "<｜begin▁of▁sentence｜>" if "<｜User｜>" in chat_template else "<|begin_of_text|>"
    return environment.from_string(chat_template).render(
        messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, bos_token=start)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\\n", "\n"), lambda text: text.replace("\\n", "\n").replace("%}{", "%}\n{"),
    lambda text: text.replace("%}{", "%}\n    {"), lambda text: text + "\n", lambda text: "\n" + text])
def test_how_a_chat_templates_line_breaks_are_written_is_all_the_same(change):
    assert recognise(change(CHATML.replace("%}{", "%} {"))) == recognise(CHATML.replace("%}{", "%} {"))
    assert recognise(CHATML.replace("\\n", "\n")) == TEMPLATES["chatml"]


def test_what_published_chat_templates_come_to_is_a_template_by_name_with_a_system_prompt_or_without():
    for text, digests in tokenizer_module.PUBLISHED.items():
        assert text.count("{prompt}") == 1 and all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)
        turn = re.search(r"<\|im_start\|>user|<\|start_header_id\|>user|<｜User｜>", text).start()
        assert any(template.endswith(text[turn:]) for template in TEMPLATES.values())
        assert text[:turn].count("system") == ("system" in text)


def test_plain_chatml_is_known_and_asks_as_transformers_renders_it():
    assert recognise(CHATML) == TEMPLATES["chatml"]
    assert recognise(CHATML).replace("{prompt}", "What is 17 + 25?") == renders(CHATML, "What is 17 + 25?")


PUBLISHED = sorted(Path(os.environ["CHAT_TEMPLATES"]).glob("*.jinja")) if "CHAT_TEMPLATES" in os.environ else []


@pytest.mark.parametrize("path", PUBLISHED)
def test_a_published_chat_template_is_unknown_or_asks_as_transformers_renders_it(path):
    """CHAT_TEMPLATES=DIR in the environment: a directory of them, which the project does not hold."""
    known = recognise(path.read_text())
    if known is not None:
        assert known.replace("{prompt}", "What is 17 + 25?") == renders(path.read_text(), "What is 17 + 25?")


@pytest.mark.parametrize("jinja", [
    "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
    CHATML + "!",
    CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'"),
    CHATML.replace("'role'] + ", "'role'] + ' ' + "),
])
def test_another_chat_template_is_refused_and_a_template_by_name_goes_before_it(jinja, tmp_path):
    shutil.copytree(FIXTURES / "qwen", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(jinja)
    tokenizer = open_checked(tmp_path / "model")  # it gives ids; a prompt cannot be put in the template
    with pytest.raises(ValueError, match="tokenizer.json: the chat template.*choose one"):
        tokenizer.encode_prompt("2+3")
    assert open_checked(tmp_path / "model", "none").encode_prompt("2+3") == tokenizer.encode("2+3")


def test_a_known_chat_template_whose_tokens_are_not_there_is_refused(tmp_path):
    """They would be plain text to the model."""
    shutil.copytree(FIXTURES / "qwen", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(ValueError, match=re.escape("<|im_start|> is not among")):
        open_checked(tmp_path / "model").encode_prompt("2+3")


@pytest.mark.parametrize("chat_template", [5, [5], ["x"], {"a": 1}, [{"name": "default"}]])
def test_a_chat_template_of_another_type_is_one_line(chat_template, tmp_path):
    shutil.copytree(FIXTURES / "qwen", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": chat_template}))
    try:
        assert open_checked(tmp_path / "model").template == "{prompt}"
    except ValueError as error:
        assert "\n" not in str(error) and "tokenizer_config.json: " in str(error) and "chat_template" in str(error)


def test_of_several_chat_templates_the_default_one_counts_and_without_it_none_is_known():
    other = {"name": "tool_use", "template": "x"}
    assert recognise([other, {"name": "default", "template": CHATML}]) == TEMPLATES["chatml"]
    assert recognise([other]) is recognise([other | {"template": CHATML}]) is None
    assert recognise(None) == recognise("") == recognise([]) == TEMPLATES["none"]


@pytest.mark.parametrize("start", ["<|endoftext|>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>"])
@pytest.mark.parametrize("template", ["r1-zero", "chatml", "llama-3", tokenizer_module.DATED, "deepseek-think",
                                      "<|endoftext|>Q: {prompt}\nA:", "Q: {prompt}\nA:"])
def test_what_is_saved_with_a_template_is_asked_so_by_transformers_too(template, start, tmp_path):
    shutil.copytree(FIXTURES / "llama", tmp_path / "model")
    spec = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokens = ("<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
              "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
    for i, token in enumerate(tokens):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 700 + i, "content": token})
    spec["post_processor"]["processors"][1]["single"][0]["SpecialToken"]["id"] = start
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(spec))
    ours = open_checked(tmp_path / "model", template)
    ends = ["<|eot_id|>", "<|im_end|>"] if template in ("llama-3", tokenizer_module.DATED) else ["<|im_end|>"]
    assert ours.end_ids == [ours.added[end] for end in ends]
    ours.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["chat_template"]
    for prompt in ("What is 17 + 25?", " \n17 + 25?\n "):
        ids = ours.encode(renders(saved, prompt), allow_special=True)
        assert ids == ours.encode_prompt(prompt) == open_checked(tmp_path / "saved").encode_prompt(prompt)
        assert ids[0] == ours.added[start]


def test_a_chat_template_that_lies_where_a_tokenizer_is_saved_does_not_go_before_its_own(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    for tokenizer in Tokenizer(FIXTURES / "qwen", "r1-zero"), Tokenizer(FIXTURES / "qwen"):
        tokenizer.save(tmp_path)
        again = Tokenizer(tmp_path)
        assert again.template == tokenizer.template
        saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert again.config == saved and not (tmp_path / "chat_template.jinja").exists()
        (tmp_path / "chat_template.jinja").write_text(CHATML)


SYSTEM = tokenizer_module.SYSTEM % "Be brief."


@pytest.mark.parametrize("template, first, later", [
    ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
     "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    (SYSTEM, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
     "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ("chatml-think", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n",
     "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"),
    ("llama-3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n",
     "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    (tokenizer_module.DATED, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
     "December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n",
     "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("deepseek-think", "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n", "<｜User｜>Hi<｜Assistant｜><think>\n"),
    ("<|begin_of_text|>Q: {prompt}\nA:", "<|begin_of_text|>Q: Hi\nA:", "Q: Hi\nA:"),
    ("Q: {prompt}\nA:", "Q: Hi\nA:", "Q: Hi\nA:"),
])
def test_a_later_turn_has_no_second_start_token_or_system_prompt(template, first, later, tmp_path):
    shutil.copytree(FIXTURES / "qwen", tmp_path / "model")
    spec = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    texts = " ".join([*TEMPLATES.values(), tokenizer_module.DATED])
    there = {token["content"] for token in spec["added_tokens"]}
    for i, token in enumerate(sorted({*re.findall(checks.CONTROL_TOKEN, texts)} - there)):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 9000 + i, "content": token})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = open_checked(tmp_path / "model", template)
    assert tokenizer.encode_prompt("Hi") == tokenizer.encode(first, allow_special=True)
    assert tokenizer.encode_prompt("Hi", later=True) == tokenizer.encode(later, allow_special=True)


@pytest.mark.parametrize("template, culprit", [("vicuna", "vicuna"), ("{prompt} {prompt}", "no one {prompt}"),
                                               ("llama-3", "<|begin"), ("<|user|>{prompt}", "<|user|>")])
def test_a_template_that_is_unknown_or_whose_tokens_are_not_there_is_refused(template, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        open_checked(FIXTURES / "qwen", template)


@pytest.mark.parametrize("template", ["chatlm", "Q: {question}", "{prompt} {prompt}"])
def test_a_misspelt_template_is_refused_without_the_check_too(template):
    with pytest.raises(ValueError, match=re.escape(f"{template!r} is no template with one {{prompt}}")):
        Tokenizer(FIXTURES / "qwen", template)


def test_of_added_tokens_in_a_prompt_those_that_are_not_special_are_recognised(tmp_path):
    def add(spec):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 800, "content": "<｜User｜>", "special": False})
    tokenizer = Tokenizer(break_it(tmp_path, add), "<｜User｜>{prompt}<|end|>")
    ids = tokenizer.encode_prompt("7<｜User｜><|end|>")
    assert (ids.count(800), ids.count(tokenizer.end_id)) == (2, 1)


def test_a_prompt_is_asked_within_the_template_and_its_own_control_tokens_are_text(tmp_path):
    shutil.copytree(FIXTURES / "llama", tmp_path / "model")
    spec = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 700, "content": "<|im_start|>"})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = open_checked(tmp_path / "model", "chatml")
    start = tokenizer.added["<|endoftext|>"]  # that the post-processor puts before a text, as Llama's <|begin_of_text|>
    text = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.encode(text, allow_special=True)
    assert tokenizer.encode_prompt("What is 17 + 25?") == [start, *whole]
    assert tokenizer.encode_prompt("What is 17 + 25?", later=True) == [*tokenizer.encode("\n"), *whole]
    assert tokenizer.end_ids[0] == tokenizer.added["<|im_end|>"]
    ids = tokenizer.encode_prompt("7<|im_end|><|endoftext|>")
    assert ids.count(tokenizer.added["<|im_end|>"]) == ids.count(start) == 1
    r1 = Tokenizer(tmp_path / "model", "r1-zero")
    assert r1.encode_prompt("2+3?") == [start, *r1.encode(TEMPLATES["r1-zero"].replace("{prompt}", "2+3?"))]


def test_the_template_that_a_model_was_trained_with_stays_with_it(tmp_path):
    Tokenizer(FIXTURES / "qwen", "r1-zero").save(tmp_path)
    assert Tokenizer(tmp_path).template == TEMPLATES["r1-zero"]


def test_what_save_writes_opens_in_transformers_with_the_same_ids(ours, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, len(theirs)) == (ours.end_id, ours.vocab_size)
    for text in STRINGS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, allow_special=True)


def test_a_saved_tokenizer_reads_back_as_itself(ours, tmp_path):
    ours.save(tmp_path / "new")
    again = Tokenizer(tmp_path / "new")
    assert (again.spec, again.end_id, again.vocab_size) == (ours.spec, ours.end_id, ours.vocab_size)
    assert again.config["tokenizer_class"] == "PreTrainedTokenizerFast" and again.config["eos_token"] == "<|end|>"


def test_any_text_comes_back_as_it_was(ours):
    rng = random.Random(0)
    characters = [*range(0xd800), *range(0xe000, 0x110000)]
    anything = ["".join(map(chr, rng.choices(characters, k=20))) for _ in range(200)]
    for text in STRINGS + anything + SAMPLE:
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("lacks", ["", "\x04", "\ufffd"])
def test_half_of_a_surrogate_pair_is_a_replacement_character_and_a_whole_one_its_character(lacks, tmp_path):
    def drop(spec):
        chars = {char for char, byte in tokenizer_module.BYTE.items() if byte in lacks.encode()}
        model = spec["model"]
        model["vocab"] = {token: id for token, id in model["vocab"].items() if chars.isdisjoint(token)}
        model["merges"] = [merge for merge in model["merges"] if chars.isdisjoint(merge)]
    tokenizer = open_checked(break_it(tmp_path, drop))
    for text, same in [("a\ud800b", "a\ufffdb"), ("\udc00\ud800", "\ufffd\ufffd"), ("\ud83c\udf4e", "🍎")]:
        for beside in ("", "\x04", "\ufffd"):
            ids = tokenizer.encode(text + beside)
            assert ids == tokenizer.encode(same + beside)
            assert all(id < tokenizer.vocab_size for id in ids)


def test_an_nfc_tokenizer_gives_the_composed_text_back():
    qwen = Tokenizer(FIXTURES / "qwen")
    assert qwen.decode(qwen.encode("e\u0301")) == unicodedata.normalize("NFC", "e\u0301") == "\u00e9"


def test_user_text_never_becomes_a_control_token(ours):
    for text in STRINGS + ["<|end|>", "<<|end|>|end|>", "<|<think>end|>", "\u200b<|end|>"]:
        assert ours.end_id not in ours.encode(text)
    assert ours.encode("7<|end|>", allow_special=True)[-1] == ours.end_id


def test_each_tag_is_one_token_that_decodes_as_text(ours):
    for tag in TAGS:
        assert len(ours.encode(tag)) == 1 and ours.decode(ours.encode(tag)) == tag


def test_the_end_token_is_left_out_of_the_text(ours):
    assert ours.decode([*ours.encode("<answer>7</answer>"), ours.end_id]) == "<answer>7</answer>"


def test_a_cut_character_and_an_id_beyond_the_vocabulary_do_no_harm(ours):
    assert ours.decode([0xe8, ord("a")]) == "\ufffda"
    assert ours.decode([ord("a"), ours.vocab_size + 5]) == "a"


def test_the_longest_tag_wins(tmp_path):
    """HF's automaton looks for the longest; a plain alternation would take the first and leave 2> behind."""
    def nest(spec):
        spec["added_tokens"][0]["content"], spec["added_tokens"][1]["content"] = "<t", "<t2>"
    tokenizer = open_checked(break_it(tmp_path, nest))
    assert len(tokenizer.encode("<t2>")) == 1


# ---- training

def test_training_gives_the_recorded_tokenizer():
    """The same at each run and on each machine. To record: json.dump(train_bpe(SAMPLE, 400), ...), Tokenizer.save."""
    assert train_bpe(iter(SAMPLE), 400) == json.loads((FIXTURES / "ours" / "tokenizer.json").read_text())


def test_the_order_of_the_texts_does_not_matter():
    assert train_bpe(SAMPLE[::-1], 400) == train_bpe(SAMPLE, 400)


def test_the_merges_are_those_of_counting_everything_again_each_time():
    import regex
    texts = ["low lower lowest", "aaaa aaa aa banana", "new newer  widest", "苹果和苹果"]
    words = [[bytes([b]) for b in piece.encode()] for text in texts for piece in regex.findall(PATTERN, text)]
    expected = []
    while True:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        pair, n = min(counts.items(), key=lambda item: (-item[1], item[0]), default=(None, 0))
        if n < 2:
            break
        expected.append(pair[0] + pair[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i:i + 2] = [word[i] + word[i + 1]]
                i += 1
    spec = train_bpe(texts, 5000)
    tokens = ["".join(merge.split()) for merge in spec["model"]["merges"]]
    assert [bytes(tokenizer_module.BYTE[c] for c in token) for token in tokens] == expected


def test_a_digit_is_the_same_single_token_wherever_it_stands(ours):
    for id in range(ours.vocab_size):
        assert not re.search(rb"[0-9].|.[0-9]", ours.encoding.decode_single_token_bytes(id), re.DOTALL)
    assert [ours.decode([id]) for id in ours.encode("12 - 340=352")] == [*"12", " -", *" 340=352"]


def test_a_word_of_the_sample_becomes_one_token(ours):
    assert len(ours.encode("个苹果")) == 1


def test_tags_in_the_texts_are_not_counted():
    with_tags, without = (train_bpe([f"{tag}to{tag}to"] * 9, 300) for tag in ("<think>", "\n"))
    assert with_tags == without


def test_the_pattern_leaves_nothing_out_and_cuts_alike_in_both_regex_engines(ours):
    """Training cuts with Python's regex, encoding with tiktoken's."""
    import regex
    encode = ours.encoding.encode_ordinary
    for text in STRINGS:
        pieces = regex.findall(PATTERN, text)
        assert "".join(pieces) == text
        assert encode(text) == [id for piece in pieces for id in encode(piece)]


# ---- refusals

@pytest.mark.parametrize("culprit, change", [
    ("Lowercase", lambda s: s.update(normalizer={"type": "Lowercase"})),
    ("Metaspace", lambda s: s.update(pre_tokenizer={"type": "Metaspace"})),
    ("pre_tokenizer", lambda s: s.update(pre_tokenizer=None)),
    ("Punctuation", lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation"})),
    ("Digits", lambda s: s["pre_tokenizer"]["pretokenizers"].append({"type": "Digits"})),
    ("Replace", lambda s: s.update(normalizer={"normalizers": [{"type": "NFC"}, {"type": "Replace"}]})),
    ("RobertaProcessing", lambda s: s.update(post_processor={"type": "RobertaProcessing"})),
    ("behind the text", lambda s: s.update(post_processor={"type": "TemplateProcessing", "single": [
        {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|end|>"}}]})),
    ("add_prefix_space", lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
    ("Removed", lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")),
    ("leaves text out", lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(
        pattern={"Regex": r"\p{L}+|\s"}, behavior="Removed", invert=True)),
    ("position", lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(")),
    ("Unigram", lambda s: s["model"].update(type="Unigram")),
    ("byte_fallback", lambda s: s["model"].update(byte_fallback=True)),
    ("byte-level", lambda s: s["model"]["vocab"].pop("Ġ")),
    ("different orders", lambda s: s["model"].update(merges=s["model"]["merges"][::-1])),
    ("do not merge into it", lambda s: s["model"]["merges"].pop()),
    ("lstrip", lambda s: s["added_tokens"][0].update(lstrip=True)),
    ("share an id", lambda s: s["added_tokens"][0].update(id=300)),
    ("end token", lambda s: s["added_tokens"][-1].update(special=False)),
    ("'model'", lambda s: s.pop("model")),
    ("another id", lambda s: s["model"]["vocab"].update({"<think>": 9})),
    ("twice", lambda s: s["added_tokens"].append(s["added_tokens"][0])),
    ("empty", lambda s: s["added_tokens"][0].update(content="")),
    ("out of range", lambda s: s["added_tokens"][0].update(id=10 ** 12)),
    ("pattern", lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {
        "type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False})),
])
def test_what_is_not_supported_is_named_with_its_file(culprit, change, tmp_path):
    with pytest.raises(ValueError) as caught:
        check_tokenizer(break_it(tmp_path, change))
    message = str(caught.value)
    assert culprit in message and str(tmp_path / "tokenizer.json") in message and "\n" not in message


@pytest.mark.parametrize("culprit, change", [
    ("Lowercase", lambda s: s.update(normalizer={"type": "Lowercase"})),
    ("Metaspace", lambda s: s.update(pre_tokenizer={"type": "Metaspace"})),
    ("pre_tokenizer", lambda s: s.update(pre_tokenizer=None)),
    ("Punctuation", lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation"})),
    ("RobertaProcessing", lambda s: s.update(post_processor={"type": "RobertaProcessing"})),
    ("single", lambda s: s.update(post_processor={"type": "TemplateProcessing", "single": [
        {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|end|>"}}]})),
    ("add_prefix_space", lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
    ("Removed", lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")),
    ("Unigram", lambda s: s["model"].update(type="Unigram")),
    *((field, lambda s, field=field: s["model"].update({field: value})) for field, value in [
        ("dropout", 0.1), ("byte_fallback", True), ("fuse_unk", True), ("continuing_subword_prefix", "##"),
        ("end_of_word_suffix", "</w>")]),
    ("which token ends", lambda s: s["added_tokens"][-1].update(special=False)),
    ("which token ends", lambda s: s["added_tokens"][0].update(special=True)),
    ("another order", lambda s: s["model"].update(merges=s["model"]["merges"][::-1])),
    ("lstrip", lambda s: s["added_tokens"][0].update(lstrip=True)),
])
def test_what_would_give_wrong_ids_is_refused_without_the_check_too(culprit, change, tmp_path):
    with pytest.raises(ValueError, match=culprit):
        Tokenizer(break_it(tmp_path, change))


def test_the_check_has_the_same_alphabet_templates_and_patterns():
    assert checks.BYTE == tokenizer_module.BYTE and checks.ISOLATED == tokenizer_module.ISOLATED
    tokens = {name: {*re.findall(checks.CONTROL_TOKEN, text)} for name, text in TEMPLATES.items()}
    assert {name: {*each} for name, each in checks.TEMPLATES.items()} == tokens
    published = {digest: {*re.findall(checks.CONTROL_TOKEN, text)}
                 for text, digests in tokenizer_module.PUBLISHED.items() for digest in digests}
    assert {digest: {*each} for digest, each in checks.PUBLISHED.items()} == published
    for layout in LAYOUTS:
        pre_tokenizer = json.loads((FIXTURES / layout / "tokenizer.json").read_text())["pre_tokenizer"]
        parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
        patterns = [checks.pattern_of(part) for part in parts[:-1]]
        assert patterns == tokenizer_module.split_patterns(pre_tokenizer)[:len(patterns)]


def split_by(*patterns, behavior="Isolated", invert=False):
    def change(spec):
        spec["pre_tokenizer"]["pretokenizers"][:-1] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
            for pattern in patterns]
    return change


def at_once(call):
    """It is refused in one line, in little time and memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match="tokenizer.json: ") as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("pattern", [
    r"(?:(?:(?:(?=a)a{999}){999}){999}",
    r"(?:(?:(?:a{999}){999}){999})",
    "(?R)",
    "(?R)?a",
    "|".join(["ab"] * 10 ** 5),
    r"(a)\1",
    "(?:ab){e<=2}",
    "(?:ab){1<=e<=2}",
    "(" * 3000 + "a" + ")" * 3000,
])
def test_a_pattern_that_would_eat_memory_is_refused(pattern, tmp_path):
    at_once(lambda: check_tokenizer(break_it(tmp_path, split_by(pattern))))


@pytest.mark.parametrize("patterns", [
    [r"(?:(?=a)a+)+b"],
    [r"(?:a|a(?=a))+b"],
    [r"(?:a|a)*b", r"\p{L}+|[^\p{L}]+"],
    [r"(?:a|aa)+b", r"\p{L}+|[^\p{L}]+"],
])
def test_a_pattern_that_would_never_end_on_some_text_is_refused(patterns, tmp_path):
    """Not on every text: it cuts "an apple" as any other."""
    tokenizer = Tokenizer(break_it(tmp_path, split_by(*patterns)))
    assert tokenizer.decode(tokenizer.encode("an apple")) == "an apple"
    at_once(lambda: check_tokenizer(tmp_path))


def test_a_pattern_that_takes_too_long_on_a_text_of_its_own_is_stopped_in_the_end(tmp_path):
    """No trial text shows it: it takes another pair of characters than those tried."""
    tokenizer = open_checked(break_it(tmp_path, split_by(r"(?:yz|yz)+b", r"\p{L}+|[^\p{L}]+")))
    started = time.process_time()
    with pytest.raises(TimeoutError):
        tokenizer.encode("yz" * 60)
    assert time.process_time() - started < 5


def test_a_pattern_that_would_never_end_on_the_first_trial_text_is_refused(tmp_path):
    endless = r"(?:[\s\S]|[\s\S])*\U0001d7d8|[\s\S]"
    at_once(lambda: check_tokenizer(break_it(tmp_path, split_by(endless, behavior="Removed", invert=True))))


def test_many_slow_patterns_are_refused_as_soon_as_one(tmp_path):
    slow = r"(?:x|x)*\U0001d7d8"
    at_once(lambda: check_tokenizer(break_it(tmp_path, split_by(*[slow] * 1000))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", [
    " " * 200_000, "\n" * 200_000, "a" * 200_000, "7" * 200_000, "\0" * 200_000, "🍎" * 100_000,
    "e" + "\u0301\u0327" * 100_000, "etaoin shrdlu " * 15_000 + "\x04"], ids=lambda text: ascii(text[:3]))
def test_long_runs_of_anything_are_encoded_in_a_second(layout, text):
    """Longer than LONG, on which tiktoken's own regex overflows its stack."""
    tokenizer = Tokenizer(FIXTURES / layout)
    started = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - started < 1.5
    if not tokenizer._lacking and tokenizer.normalize is str:
        assert tokenizer.decode(ids) == text


def test_long_text_has_the_ids_of_its_parts():
    """Above LONG another engine cuts the text: at a line break between words it must come to the same ids."""
    line = "The 12 apples, e\u0301tc.: don't 苹果\tx  y "
    assert len(line) * 3000 > tokenizer_module.LONG > len(line) * 2000
    for layout in ("gpt2", "qwen", "smollm", "llama"):
        tokenizer = Tokenizer(FIXTURES / layout)
        long, short = tokenizer.encode(line * 3000), tokenizer.encode(line * 2000)
        assert long == tokenizer.encode(line * 3000 + "!")[:-1]
        assert long[:len(short) - 1] == short[:-1]


def test_the_order_of_many_marks_is_the_canonical_one():
    marks = "\u0327\u0301" * 200 + "\u0903" + "\u0301\u0327" * 200
    for text in ("e" + marks, marks, marks + "e\u0301", "a" + marks[:40], "\u00e9" + marks + "\u1100\u1161" + marks):
        assert tokenizer_module.nfc(text) == unicodedata.normalize("NFC", text)


def test_a_file_that_is_none_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    at_once(lambda: check_tokenizer(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    at_once(lambda: check_tokenizer(tmp_path))
    break_it(tmp_path / "x", lambda spec: spec.update(note="\ud800"))
    at_once(lambda: check_tokenizer(tmp_path / "x"))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_a_pipe_beside_the_tokenizer_is_refused_and_not_waited_for(name, tmp_path):
    os.mkfifo(break_it(tmp_path, lambda spec: None) / name)
    with pytest.raises(ValueError, match=f"{name}: not a file"):
        check_tokenizer(tmp_path)


JUNK = [None, 0, -1, 3.5, True, "", "x", [], ["x"], {}, {"type": "x"}, [[]], [None], 10 ** 30]


def places_in(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places_in(each, (*path, key))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_field_of_any_other_type_is_one_line_or_harmless(layout, tmp_path):
    """What the check lets pass loads and encodes."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((FIXTURES / layout / name).read_text())
    rng, refused = random.Random(0), 0
    for i in range(50):
        name = rng.choice(["tokenizer.json", "tokenizer_config.json"])
        original = (FIXTURES / layout / name).read_text()
        spec = json.loads(original)
        paths = [path for path in places_in(spec) if path]
        if i % 2:  # most places are within the model
            paths = [path for path in paths if path[0] != "model"]
        path = rng.choice(paths)
        parent = spec
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = rng.choice(JUNK)
        (tmp_path / name).write_text(json.dumps(spec))
        try:
            check_tokenizer(tmp_path)
        except ValueError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error), path
            refused += 1
        else:
            tokenizer = Tokenizer(tmp_path)
            assert tokenizer.encode("2+3\x04") and tokenizer.end_ids, path
        (tmp_path / name).write_text(original)
    assert refused > 20


def test_a_token_that_an_earlier_merge_keeps_from_forming_is_refused(tmp_path):
    """Ids in order are not enough: in "abc", bc merges first and (ab, c) never meet, but tiktoken would say abc."""
    def add(spec):
        bytes_alone = dict(list(spec["model"]["vocab"].items())[:256])
        spec["model"]["vocab"] = bytes_alone | {"bc": 256, "ab": 257, "abc": 258}
        spec["model"]["merges"] = ["b c", "a b", "ab c"]
    with pytest.raises(ValueError, match="token 'abc' is not supported"):
        check_tokenizer(break_it(tmp_path, add))


def test_a_list_with_every_pair_is_told_from_one_that_lacks_a_pair_or_is_out_of_order():
    vocab = {"a": 0, "aaa": 1, "aa": 2}
    merges = [("a", "aa"), ("aa", "a"), ("a", "a")]
    assert checks.lists_every_pair(merges, vocab)
    assert not checks.lists_every_pair(merges[1:], vocab) and not checks.lists_every_pair(merges[::-1], vocab)
    assert checks.overlapping("aaa", checks.pairs_that_make("aaa", vocab), vocab) == {"aaaa"}  # a+aa and aa+a at once


def test_of_random_merges_those_that_pass_give_the_same_tokens_in_both_orders():
    """By places in the list, as Hugging Face joins, and by ids of tokens, whatever pair makes them, as tiktoken."""
    rng, passed = random.Random(0), 0
    for _ in range(2000):
        tokens, halves = ["a", "b"], {}
        for _ in range(rng.randrange(1, 7)):
            left, right = rng.choice(tokens), rng.choice(tokens)
            if left + right not in tokens:
                tokens.append(left + right)
                halves[left + right] = (left, right)
        made = rng.sample(tokens[2:], len(tokens) - 2) if rng.random() < 0.5 else tokens[2:]
        vocab = {token: id for id, token in enumerate(["a", "b", *made])}
        every_pair = rng.random() < 0.5
        merges = [halves[token] for token in made]
        if every_pair:
            merges = [pair for token in made for pair in checks.pairs_that_make(token, vocab)]
        try:
            checks.check_merges(merges, vocab, {}, every_pair)
        except ValueError:
            continue
        passed += 1
        by_place = {pair: place for place, pair in enumerate(merges)}
        by_id = {(token[:i], token[i:]): vocab[token] for token in made for i in range(1, len(token))}
        for _ in range(5):
            text = "".join(rng.choices("ab", k=rng.randrange(1, 16)))
            assert checks.merged(text, by_place) == checks.merged(text, by_id), (merges, text)
    assert passed > 500


def test_merges_are_read_as_strings_and_as_pairs(ours, tmp_path):
    def to_pairs(spec):
        spec["model"]["merges"] = [merge.split(" ") for merge in spec["model"]["merges"]]
    pairs = open_checked(break_it(tmp_path, to_pairs))
    assert [pairs.encode(text) for text in SAMPLE] == [ours.encode(text) for text in SAMPLE]


def test_every_end_token_that_the_directory_names_ends_an_answer(tmp_path):
    shutil.copytree(FIXTURES / "qwen", tmp_path / "model")
    added = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["added_tokens"]
    end = {token["content"]: token["id"] for token in added}
    generation_config = tmp_path / "model" / "generation_config.json"
    generation_config.write_text(json.dumps({"eos_token_id": [end["<|endoftext|>"], end["<|im_end|>"]]}))
    assert open_checked(tmp_path / "model").end_ids == [end["<|im_end|>"], end["<|endoftext|>"]]
    generation_config.write_text(json.dumps({"eos_token_id": [9999]}))
    with pytest.raises(ValueError, match="generation_config.json: the end token"):
        check_tokenizer(tmp_path / "model")


def test_the_end_token_is_the_one_that_the_directory_names(tmp_path):
    shutil.copy(FIXTURES / "gpt2" / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="end token"):  # two special tokens: which?
        check_tokenizer(tmp_path)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|endoftext|>"], 0]}))
    assert open_checked(tmp_path).end_id == ids["<|endoftext|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert open_checked(tmp_path).end_id == ids["<|im_end|>"]


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        check_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="tokenizer.json: not JSON"):
        check_tokenizer(tmp_path)


# ---- the scripts

def script(module, capsys, monkeypatch, *args):
    """Exit code, stdout, stderr, of a script that is run within this process."""
    monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, args)])
    try:
        module.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_scripts_train_and_show_tokens(tmp_path, capsys, monkeypatch):
    rows = [{"text": SAMPLE[0]}, {"prompt": "2 + 3 = ?", "completion": "<answer>5</answer>"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = script(training, capsys, monkeypatch, "--data", tmp_path / "rows.jsonl", "--vocab-size", 300,
                            "--out", tmp_path / "out")
    assert code == 0, err
    _, out, _ = script(tokenizer_module, capsys, monkeypatch, tmp_path / "out", "12<|end|>")
    assert out.startswith("49 b'1'\n50 b'2'\n60 b'<'\n")
    runpy.run_path(tokenizer_module.__file__, run_name="__main__")  # as a file, with the same arguments
    assert capsys.readouterr().out == out


def test_the_script_names_a_broken_directory_in_one_line(tmp_path, capsys, monkeypatch):
    code, _, err = script(tokenizer_module, capsys, monkeypatch, tmp_path, "2+3")
    assert code == 2 and "tokenizer.json" in err and err.count("\n") == 1
    break_it(tmp_path, lambda spec: spec["model"].update(type="Unigram"))
    code, _, err = script(tokenizer_module, capsys, monkeypatch, tmp_path, "2+3")
    assert code == 2 and "tokenizer.json: model.type 'Unigram'" in err and err.count("\n") == 1


@pytest.mark.parametrize("culprit, row, options", [
    ("rows.jsonl:2", '{"prompt": "2 + 3"}', []),
    ("rows.jsonl:2", '{"text": 7}', []),
    ("rows.jsonl:2", "{", []),
    ("rows.jsonl:2", '[{"text": "x"}]', []),
    ("vocab_size 100", '{"text": "x"}', ["--vocab-size", "100"]),
    ("--vocab-size", '{"text": "x"}', ["--vocab-size", "many"]),
    ("--colour", '{"text": "x"}', ["--colour"]),
    ("absent.jsonl", '{"text": "x"}', ["--data", "absent.jsonl"]),
])
def test_bad_input_is_one_line_that_names_the_culprit(culprit, row, options, tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + row + "\n")
    code, _, err = script(training, capsys, monkeypatch, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out",
                          *options)
    assert code == 2 and culprit in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()

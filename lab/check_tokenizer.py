"""Checks a tokenizer directory that comes from elsewhere, before it is loaded.

check_tokenizer(dir) raises ValueError, in one line that names the file and the field, where tokenizer.py would fail, or
would compute other ids than Hugging Face's library does. Time and memory stay bounded, whatever the files hold.
"""

import hashlib
import json
import re
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import regex  # tiktoken requires it
import tiktoken

LARGEST_FILE = 2 ** 28  # bytes
LARGEST_ID = 2 ** 24
LONGEST_PATTERN = 8000  # characters
LONGEST_TOKEN = 1000    # characters, of a tokenizer that lists every pair
SECONDS = 1             # of the processor, for all patterns on all trial texts

# Copies of what tokenizer.py has; a test compares them.
BYTE = {chr(b): b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
BYTE |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*BYTE.values()}))}
ISOLATED = r"{0}|(?:(?!{0})[\s\S])+"
CONTROL_TOKEN = r"<[|｜][^<>|｜]*[|｜]>"
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
TEMPLATES = {"none": [], "r1-zero": [], "chatml": CHATML, "chatml-think": CHATML, "llama-3": LLAMA_3,
             "deepseek": DEEPSEEK, "deepseek-think": DEEPSEEK}  # and the control tokens of each
PUBLISHED = dict.fromkeys(("6037ec53ac59dea1", "6e76f0d0a1bfb2ef", "9178daecd2ef9009", "bce94d5dd17510b0",
                           "2e7c58464a1c5792", "ca2b8df89c128dc3", "582641b345f88ac0", "b1720682da9cefdf",
                           "e6831dadbcf5817b", "aff931685d8e20ad"), CHATML)
PUBLISHED |= dict.fromkeys(("18f3fd186f23cd66", "3bd333456aee200b", "c45233d893a2bf08", "d1eef4c920929161"), LLAMA_3)
PUBLISHED |= dict.fromkeys(("4dfd2580c94f2b54", "f41720becfad3645"), DEEPSEEK)


def check_tokenizer(dir, template=None):
    """template: a name or a text with {prompt}, in place of the directory's own."""
    path = Path(dir) / "tokenizer.json"
    config_path = path.with_name("tokenizer_config.json")
    generation_path = path.with_name("generation_config.json")
    jinja_path = path.with_name("chat_template.jinja")
    spec = read_object(path)
    config = read_object(config_path) if config_path.exists() else {}
    generation = read_object(generation_path) if generation_path.exists() else {}
    if jinja_path.exists():
        check_file(jinja_path)
        config["chat_template"] = jinja_path.read_text(encoding="utf-8", errors="replace")
    with naming_file(path):
        added = check_added_tokens(spec)
        check_normalizer(spec)
        check_pre_tokenizer(spec)
        check_post_processor(spec, added)
        ids = check_model(spec, added)
        if template:
            check_template(template, added)
    with naming_file(config_path):
        has_end = check_eos_token(config, added)
        if not template:
            check_own_template(config, added)
    with naming_file(generation_path):
        has_end |= check_eos_ids(generation, ids)
    with naming_file(path):
        specials = [token["content"] for token in spec.get("added_tokens") or [] if token.get("special")]
        if not has_end and len(specials) != 1:
            raise ValueError(f"the end token is one of {specials}: neither eos_token of tokenizer_config.json nor "
                             "eos_token_id of generation_config.json says which")


# ---- files and fields

def check_file(path):
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: over {LARGEST_FILE >> 20} MB, which no tokenizer's is")


def read_object(path):
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # fails for a lone surrogate, which could not be written again
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


@contextmanager
def naming_file(path):
    """A ValueError from inside gets the path before it, and becomes one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:500]}") from None


def expect(value, kind, field):
    """The value, if it is of the kind."""
    if type(value) is not kind:
        names = {dict: "an object", list: "a list", str: "text", int: "an integer"}
        raise ValueError(f"{field} is {str(value)[:100]!r}, not {names[kind]}")
    return value


def parts_of(spec, field, members):
    """The members of a sequence, each with a type, or the one that stands in its place; none where there is none."""
    if not spec.get(field):
        return []
    whole = expect(spec[field], dict, field)
    parts = expect(whole.get(members, [whole]), list, f"{field}.{members}")
    for part in parts:
        expect(part, dict, f"a part of {field}")
        expect(part.get("type"), str, f"the type of a part of {field}")
    return parts


# ---- what is not supported

def check_added_tokens(spec):
    """{text: id}"""
    tokens = expect(spec.get("added_tokens") or [], list, "added_tokens")
    added = {}
    for token in tokens:
        expect(token, dict, "one of added_tokens")
        text = expect(token.get("content"), str, "the content of one of added_tokens")
        check_id(token.get("id"), text)
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(f"added token {text!r} with {flag} is not supported")
        if not text or text in added:
            raise ValueError(f"added token {text!r} is not supported: empty, or twice in added_tokens")
        added[text] = token["id"]
    return added


def check_id(id, token):
    if type(id) is not int or not 0 <= id < LARGEST_ID:
        raise ValueError(f"the id of token {token!r}, {str(id)[:100]}, is out of range")


def check_normalizer(spec):
    forms = [part["type"] for part in parts_of(spec, "normalizer", "normalizers")]
    if forms not in ([], ["NFC"]):
        raise ValueError(f"normalizer {forms} is not supported: NFC or none is")


def check_post_processor(spec, added):
    for part in parts_of(spec, "post_processor", "processors"):
        if part["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise ValueError(f"post_processor {part['type']!r} is not supported: ByteLevel and TemplateProcessing are")
        if part["type"] == "TemplateProcessing" or "single" in part:
            check_single(part.get("single"), added)


def check_single(items, added):
    """Tokens and then the text: [{"SpecialToken": {"id": "<|begin_of_text|>", ...}}, {"Sequence": {...}}]."""
    for item in expect(items, list, "post_processor.single"):
        expect(item, dict, "an item of post_processor.single")
    kinds = [[*item] for item in items]
    if kinds[-1:] != [["Sequence"]] or any(kind != ["SpecialToken"] for kind in kinds[:-1]):
        raise ValueError(f"post_processor.single {items} is not supported: it puts something behind the text")
    for item in items[:-1]:
        token = expect(item["SpecialToken"], dict, "SpecialToken of post_processor.single").get("id")
        if expect(token, str, "the id of a SpecialToken of post_processor.single") not in added:
            raise ValueError(f"post_processor.single names {token!r}, which is none of added_tokens")


# ---- the pre_tokenizer's patterns

def check_pre_tokenizer(spec):
    *splits, byte_level = parts_of(spec, "pre_tokenizer", "pretokenizers") or [{"type": None}]
    if byte_level["type"] != "ByteLevel" or byte_level.get("add_prefix_space", True):
        raise ValueError(f"pre_tokenizer must end in ByteLevel without add_prefix_space, not in {byte_level}")
    patterns = [pattern_of(split) for split in splits]
    try_patterns(patterns, must_match_all=not byte_level.get("use_regex", True))


def pattern_of(split):
    if split["type"] == "Digits":
        return ISOLATED.format(r"\p{N}" if split.get("individual_digits") else r"\p{N}+")
    is_isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    is_removed = split.get("behavior") == "Removed" and split.get("invert")  # all but the matches is removed
    regexes = split.get("pattern")
    if split["type"] != "Split" or not (is_isolated or is_removed) or "Regex" not in expect(regexes, dict, "a pattern"):
        raise ValueError(f"pre_tokenizer {split} is not supported: only Digits, or Split by Regex, Isolated or "
                         "inverted Removed")
    pattern = expect(regexes["Regex"], str, "Regex of pre_tokenizer")
    # No published pattern is long, calls itself, looks back at a group, matches fuzzily or counts to 100. Those that
    # do can take memory without bound.
    costly = r"\(\?(?:R|&|P[>=]|[0-9])|\\[1-9]|\{[0-9<=]*[eids][0-9<=+,}]|\{[0-9,]*[0-9]{3}"
    if len(pattern) > LONGEST_PATTERN or re.search(costly, pattern):
        raise ValueError(f"pre_tokenizer pattern {pattern[:100]!r} is not supported: too long, recursive, fuzzy, or of "
                         "large counts")
    return ISOLATED.format(pattern) if is_isolated else pattern


def try_patterns(patterns, must_match_all):
    """A pattern can take a time that doubles with each further character: long runs of the same one bring that out."""
    characters = "".join(map(chr, range(128))) + "é٣ 苹果，½ €🍎\u00a0\u2028\u200d\ue000 \n"  # of each kind
    texts = [characters] + [60 * char for char in characters]
    deadline = time.process_time() + SECONDS
    for pattern in patterns:
        try:
            compiled = regex.compile(pattern)
            for text in texts:
                compiled.sub("", text, timeout=max(deadline - time.process_time(), 1e-3))
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"pre_tokenizer pattern {pattern[:100]!r}: {error}") from None
        except TimeoutError:
            raise ValueError(f"pre_tokenizer pattern {pattern[:100]!r} takes too long on {text[:40]!r}") from None
    if must_match_all and patterns:
        matches = [match[0] for match in compiled.finditer(characters)]
        if "".join(matches) != characters:
            raise ValueError(f"pre_tokenizer pattern {pattern[:100]!r} is not supported: it leaves text out")
        try_in_tiktoken(pattern, texts)


def try_in_tiktoken(pattern, texts):
    """It uses the last pattern, in a regex engine of its own."""
    one_byte_tokens = {bytes([b]): b for b in range(256)}
    try:
        encoding = tiktoken.Encoding("trial", pat_str=pattern, mergeable_ranks=one_byte_tokens, special_tokens={})
        for text in texts:
            encoding.encode_ordinary(text)
    except ValueError as error:
        raise ValueError(f"pre_tokenizer pattern {pattern[:100]!r}: {error}") from None
    except BaseException as error:  # a panic is not an Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"pre_tokenizer pattern {pattern[:100]!r} takes too long on {text[:40]!r}") from None


# ---- the vocabulary

def check_model(spec, added):
    """The ids of all tokens."""
    model = expect(spec.get("model"), dict, "'model'")
    if model.get("type") != "BPE":
        raise ValueError(f"model.type {model.get('type')!r} is not supported: BPE is")
    for field in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"):
        if model.get(field):
            raise ValueError(f"model.{field} = {model[field]!r} is not supported")
    vocab = expect(model.get("vocab"), dict, "model.vocab")
    merges = [check_merge(merge) for merge in expect(model.get("merges"), list, "model.merges")]
    if model.get("unk_token") is not None:
        expect(model["unk_token"], str, "model.unk_token")
    check_vocabulary(vocab, added)
    check_merges(merges, vocab, added, model.get("ignore_merges"))
    return {*vocab.values(), *added.values()}


def check_merge(merge):
    """(left, right) of "left right" or ["left", "right"]."""
    halves = merge.split(" ") if isinstance(merge, str) else merge
    if type(halves) is not list or [type(half) for half in halves] != [str, str] or "" in halves:
        raise ValueError(f"one of model.merges is {str(merge)[:100]!r}, not two tokens")
    return tuple(halves)


def check_vocabulary(vocab, added):
    for token, id in vocab.items():
        check_id(id, token)
        if token in added:
            if added[token] != id:
                raise ValueError(f"added token {token!r} is not supported: it has another id in the vocabulary")
        elif not token or not BYTE.keys() >= {*token}:
            raise ValueError(f"the vocabulary is not byte-level: it has {token[:100]!r}")
    for char, byte in BYTE.items():
        if 32 <= byte < 127 and char not in vocab:
            raise ValueError(f"the vocabulary is not byte-level: it lacks {char!r}")
    id, uses = Counter((vocab | added).values()).most_common(1)[0]
    if uses > 1:
        raise ValueError(f"two tokens share an id, {id}")


# ---- the merges
#
# Hugging Face's library goes by a list of merges (left, right). In a piece of text it joins, of all neighbours that the
# list has, those that come first in it, the leftmost ones if there are several; and again, until it has none of them.
# tiktoken has no list. It joins, of all neighbours that together are a token, those whose token has the lowest id, the
# leftmost ones if there are several. A piece that is a token itself it does not look into.
#
# Both come to the same ids for every text if
#   1. ids grow along the list: both join in the same order;
#   2. neighbours that together are a token are in the list: tiktoken joins no others;
#   3. a piece that is a token itself becomes that token in the library, too.
# Two kinds of tokenizers are known to have all three:
#   - each token is what its own bytes merge into (tokens_that_form). That is the usual kind.
#   - the list has every pair of tokens that makes a token (lists_every_pair), and the library does not look into a
#     piece that is a token either (ignore_merges). That is Llama 3's kind.

def check_merges(merges, vocab, added, ignore_merges):
    plain = {token: id for token, id in vocab.items() if token not in added}
    if ignore_merges and lists_every_pair(merges, plain):
        return
    made = {left + right for left, right in merges}
    strange = (plain.keys() | made) - tokens_that_form(merges, vocab)
    if strange:
        raise ValueError(f"token {min(strange)!r} is not supported: its own bytes do not merge into it")


def tokens_that_form(merges, vocab):
    """The tokens that their own bytes merge into. Raises ValueError where ids do not grow along the list (1).

    If all tokens do, 2 holds. For let left|right be neighbours in any text that together are a token, of the lowest id
    in the piece. Nothing has merged across the outer borders of the two, so what lies between has merged as it would
    have by itself. By itself it becomes the token, whose turn is now: so left|right is the pair that the list has.
    And 3 holds: a piece that is a token is its own bytes by themselves.
    """
    bytes_alone = BYTE.keys() & vocab.keys()  # a vocabulary may lack rare ones
    ids, halves, last = {}, {}, -1
    for left, right in merges:
        token = left + right
        id = vocab.get(token)
        parts_are_there = all(part in bytes_alone or part in halves for part in (left, right))
        if id is None or id < last or not parts_are_there:
            raise ValueError(f"merge {left!r} {right!r} is not supported: ids and merges are in different orders")
        ids[left, right] = last = id
        if token not in halves and become_neighbours(left, right, ids, halves):
            halves[token] = (left, right)
    return bytes_alone | halves.keys()


def become_neighbours(left, right, ids, halves):
    """Whether the bytes of left and right, one after the other, merge into these two, and nothing across the border.

    ids: {(left, right): id} of the merges so far; halves: {token: (left, right)} of the tokens that form.

    The merging is undone step by step, the last join first. Each time, two tokens stood at the border until then. Had
    the list a join of these two that comes before the one undone, they would have been joined across the border.
    """
    def joined_at(token):
        return ids[halves[token]] if token in halves else -1  # a byte has been there from the start

    while left in halves or right in halves:
        if joined_at(left) > joined_at(right):
            undone = joined_at(left)
            left = halves[left][1]
            # at equal ids the leftmost join comes first, which is the one undone
            across = (left, right) in ids and ids[left, right] < undone
        else:  # at equal ids, too: there left's join, being further left, came before right's
            undone = joined_at(right)
            right = halves[right][0]
            # at equal ids the leftmost join comes first, which is the one across the border
            across = (left, right) in ids and ids[left, right] <= undone
        if across:
            return False
    return True


def lists_every_pair(merges, vocab):
    """Whether the list, in the order of ids (1), has every pair of tokens that makes a token (2).

    One question is left. Several pairs that make the same token stand at different places in the list, and have the
    same id: there tiktoken joins the leftmost. The result can differ only where two such pairs overlap; each is tried.
    """
    places = {pair: place for place, pair in enumerate(merges)}
    ids = {(left, right): vocab.get(left + right, -1) for left, right in merges}
    in_order = [ids[pair] for pair in merges]
    if in_order != sorted(in_order) or -1 in in_order or max(map(len, vocab)) > LONGEST_TOKEN:
        return False
    overlaps = set()
    for token in vocab:
        pairs = pairs_that_make(token, vocab)
        if any(pair not in places for pair in pairs):
            return False
        overlaps |= overlapping(token, pairs, vocab)
    return all(merged(text, places) == merged(text, ids) for text in overlaps)


def pairs_that_make(token, vocab):
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in vocab and right in vocab]


def overlapping(token, pairs, vocab):
    """Texts a+b+c in which a+b and b+c both are the token, and could wait to be joined at the same time.

    If b is there before the token's turn, they cannot. Then either a and c are there too: the token's bytes come to a|b
    and also to b|c, but they come to one pair only, so it is the same pair twice. Or a or c comes after that turn: the
    first of the two that is complete is joined at once. But a b that comes after the turn, with a higher id than the
    token's, completes both.
    """
    texts = set()
    for a, b in pairs:
        for other, c in pairs:
            if other == b and vocab[b] > vocab[token]:
                texts.add(a + b + c)
    return texts


def merged(text, ranks):
    """The tokens of a text whose neighbours of lowest rank, the leftmost of equals, are joined until there are none."""
    tokens = [*text]
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in ranks]
        if not found:
            return tokens
        _, i = min(found)
        tokens[i:i + 2] = [tokens[i] + tokens[i + 1]]


# ---- end tokens and templates

def check_eos_token(config, added):
    """Whether tokenizer_config.json names one."""
    eos_token = config.get("eos_token")
    if eos_token is None:
        return False
    text = expect(eos_token.get("content") if isinstance(eos_token, dict) else eos_token, str, "eos_token")
    if text not in added:
        raise ValueError(f"the end token {text!r}, eos_token, is not among added_tokens of tokenizer.json")
    return True


def check_eos_ids(generation, ids):
    """Whether generation_config.json names one."""
    eos_ids = generation.get("eos_token_id")
    if eos_ids is None:
        return False
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    for id in eos_ids:
        if type(id) is not int or id not in ids:
            raise ValueError(f"the end token {str(id)[:100]}, eos_token_id, is none of tokenizer.json")
    return len(eos_ids) > 0


def check_own_template(config, added):
    """The directory's. A chat template that is not known passes: the tokenizer can be used without it."""
    prompt_template = config.get("prompt_template")
    if prompt_template is not None and expect(prompt_template, str, "prompt_template"):
        check_template(prompt_template, added)
        return
    chat_template = config.get("chat_template") or ""
    if isinstance(chat_template, list):  # several, each with a name
        chat_template = named_template(chat_template)
    expect(chat_template, str, "chat_template")
    words = " ".join(chat_template.replace("\\n", " ").split())
    check_control_tokens(PUBLISHED.get(hashlib.sha256(words.encode()).hexdigest()[:16], []), added)


def named_template(templates):
    """The default one, or no text."""
    by_name = {}
    for each in templates:
        expect(each, dict, "one of chat_template")
        name = expect(each.get("name"), str, "the name of one of chat_template")
        by_name[name] = expect(each.get("template"), str, f"chat_template {name!r}")
    return by_name.get("default", "")


def check_template(template, added):
    if template not in TEMPLATES and template.count("{prompt}") != 1:
        raise ValueError(f"the prompt template {template!r} is none of {', '.join(TEMPLATES)}, and has no one "
                         "{prompt}")
    check_control_tokens(TEMPLATES.get(template) or re.findall(CONTROL_TOKEN, template), added)


def check_control_tokens(tokens, added):
    for token in tokens:
        if token not in added:
            raise ValueError(f"the prompt template's {token} is not among added_tokens of tokenizer.json")

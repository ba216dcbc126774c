"""Text to ids and back: a Hugging Face tokenizer.json (byte-level BPE) read into a tiktoken.Encoding, how a model is
asked (its prompt template), and the making of a tokenizer of our own.

The recipe needs two things of a tokenizer: <think>, </think>, <answer>, </answer> are one token each and decode as
text, and a text that *says* <|end|> ends nothing. So added tokens with "special": false are always recognised, as
Hugging Face does; special ones only where the caller asks for them.

    python tokenizer.py train --data corpus.jsonl --vocab-size 1000 --out runs/tokenizer
    python tokenizer.py encode runs/tokenizer "<think> 12 + 3 = 15 </think>"
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import tiktoken

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# A piece is one digit, one word (or a run of Chinese) with the spaces beside it, one mark, or one whitespace. Merges
# stay within a piece: no token has two digits, and a digit is the same token wherever it stands.
PATTERN = r"\p{N}| ?[\p{L}\p{M}]+ ?| ?[^\s\p{L}\p{M}\p{N}]|\s"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of a ByteLevel alone

# tokenizer.json shows each byte as a printable character: itself if it is one, else the next from chr(256) on.
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR = {b: chr(b) for b in _SHOWN} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*_SHOWN}))}
BYTE = {char: b for b, char in CHAR.items()}


LONG = 100_000  # characters, for tiktoken's own regex

# How a model is asked. R1-Zero's, for base models, is word for word R1 v1 table 1; ChatML (Qwen, SmolLM) and Llama 3's are
# for tuned ones. A directory that was written here names its own as "prompt_template" in tokenizer_config.json.
TEMPLATES = {
    "none": "{prompt}",
    "r1-zero": "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
               "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
               "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
               "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
               "User: {prompt}. Assistant:",
    "chatml": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
# Of chat templates: the beginning of the hash -> family, and the system prompt that it sets where there is none.
CHAT_TEMPLATES = {
    "705d5782da398f5c": ("chatml", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),  # Qwen2.5
    "bce94d5dd17510b0": ("chatml", "You are a helpful assistant"),                                           # Qwen1.5
    "6e76f0d0a1bfb2ef": ("chatml", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),  # SmolLM2
    "ccd61ecea6aa8406": ("chatml", None),                                                                    # Qwen3
    "fcf7a096fe99a48f": ("chatml", None),                                                                    # plain ChatML
    "18f3fd186f23cd66": ("llama-3", None),                                                                   # Llama 3
}


def recognise(chat_template: str) -> str:
    """The template that a published chat template (a Jinja program) comes to for one question. Programs are told by their text
    and never run: raises ValueError for any that is not among CHAT_TEMPLATES."""
    if (known := CHAT_TEMPLATES.get(hashlib.sha256(" ".join(chat_template.split()).encode()).hexdigest()[:16])) is None:
        raise ValueError(f"the chat template {chat_template[:60]!r}... is not one of those known here; choose one: {', '.join(TEMPLATES)}")
    family, system = known
    return (f"<|im_start|>system\n{system}<|im_end|>\n" if system else "") + TEMPLATES[family]


def split_patterns(pre: dict | None) -> list[str]:
    """The regexes that cut text into pieces, one after the other: of a sequence of Split and Digits with a ByteLevel at its
    end, or of ByteLevel alone."""
    *splits, level = (pre or {}).get("pretokenizers", [pre or {"type": None}])
    if level["type"] != "ByteLevel" or level.get("add_prefix_space", True):
        raise ValueError(f"pre_tokenizer {level} is not supported: ByteLevel without add_prefix_space, at the end of a sequence, is")
    patterns = []
    for part in splits:
        kind = (part["type"], part.get("behavior"), bool(part.get("invert")))
        if part["type"] == "Digits":
            patterns.append(_isolated(r"\p{N}" if part.get("individual_digits") else r"\p{N}+"))
        elif kind == ("Split", "Isolated", False) and "Regex" in part["pattern"]:
            patterns.append(_isolated(part["pattern"]["Regex"]))
        elif kind == ("Split", "Removed", True) and "Regex" in part["pattern"]:
            patterns.append(part["pattern"]["Regex"])  # what lies between the matches is left out
        else:
            raise ValueError(f"pre_tokenizer {part} is not supported: Digits, or Split by a Regex, Isolated, is")
    for pattern in patterns:  # none of the published ones is long or nests; such ones take memory or never end
        if len(pattern) > 8000 or re.search(r"\(\?(?:R|&|P[>=]|[0-9])|\\[1-9]|\{e|\{[0-9,]*[0-9]{3}", pattern):
            raise ValueError(f"pre_tokenizer pattern {pattern[:100]!r} is not supported: too long, recursive, or of large counts")
    patterns += [_isolated(GPT2_PATTERN)] if level.get("use_regex", True) else []
    return patterns or [r"[\s\S]+"]


def _isolated(pattern: str) -> str:
    """Matches the pattern, and what lies between its matches."""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def start_tokens(post: dict | None) -> list[str]:
    """The tokens that a post_processor puts before a text, as Llama's <|begin_of_text|>; one after it is refused."""
    parts = (post or {}).get("processors", [post] if post else [])
    if strange := [part["type"] for part in parts if part["type"] not in ("ByteLevel", "TemplateProcessing")]:
        raise ValueError(f"post_processor {strange[0]!r} is not supported: ByteLevel and TemplateProcessing are")
    singles = [[item.get("SpecialToken", {}).get("id") for item in part["single"]] for part in parts if "single" in part]
    if any(single[-1:] != [None] or single.count(None) > 1 for single in singles):  # None is the text
        raise ValueError(f"post_processor {singles} is not supported: it puts a token behind the text")
    return [token for single in singles for token in single[:-1]]


def mergeable_ranks(model: dict, added: Iterable[str]) -> dict[bytes, int]:
    """{token: id}, or a ValueError where tiktoken could not take the id for the merge's rank.

    tokenizer.json lists merges (left, right) in order; tiktoken, without a list, joins whichever neighbours make the
    token of lowest rank, and takes a piece that is a token whole, as Hugging Face does with ignore_merges.
    """
    if model["type"] != "BPE":
        raise ValueError(f"model type {model['type']!r} is not supported: BPE is")
    for field in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"):
        if model.get(field):
            raise ValueError(f"model.{field} = {model[field]!r} is not supported")
    if missing := [char for char, b in BYTE.items() if char not in model["vocab"] and 32 <= b < 127]:
        raise ValueError(f"the vocabulary is not byte-level: it lacks {missing[0]!r}")
    ids, plain = model["vocab"], {token: id for token, id in model["vocab"].items() if token not in added}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    kept = plain if model.get("ignore_merges") and _every_pair(merges, plain) else _one_pair_each(merges, ids)
    if stray := plain.keys() - kept:
        raise ValueError(f"token {min(stray)!r} is not supported: its own bytes do not merge into it")
    return {bytes(BYTE[char] for char in token): ids[token] for token in kept}


def _every_pair(merges: list, ids: dict) -> bool:
    """Whether the list, in the order of ids, holds every pair that makes a token, as that of Llama 3: then there is nothing
    to join that is not listed.

    Several pairs of one token have different ranks here and the same in tiktoken, which takes the leftmost. That can differ
    only where two of them overlap, a+b = b+c = the token, and appear at once, as b is made later than the token could be:
    in runs of one character, mostly. Each such a+b+c is tried.
    """
    order, last = {pair: i for i, pair in enumerate(merges)}, -1
    for left, right in merges:
        if not last <= (last := ids.get(left + right, -1)):
            return False
    by_id, ties = {(left, right): ids[left + right] for left, right in merges}, set()
    for token, id in ids.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        if not order.keys() >= {*pairs}:
            return False
        ties |= {a + b + c for a, b in pairs if ids[b] > id for other, c in pairs if b == other}
    return all(_merged(text, order) == _merged(text, by_id) for text in ties)


def _merged(text: str, ranks: dict) -> list[str]:
    """The tokens of a text whose neighbours of lowest rank, the leftmost of equals, are joined until there are none."""
    word = [*text]
    while pairs := [(ranks[pair], i) for i, pair in enumerate(zip(word, word[1:])) if pair in ranks]:
        i = min(pairs)[1]
        word[i:i + 2] = [word[i] + word[i + 1]]
    return word


def _one_pair_each(merges: list, ids: dict) -> set[str]:
    """The bytes, and the tokens that their own bytes merge into. If ids grow along the list and these are all tokens, then in
    any text, when a token's turn comes, the one pair that can stand between its borders is the one that the list names."""
    letters = BYTE.keys() & ids.keys()  # a vocabulary may lack rare control characters, and bytes that no UTF-8 text has
    made, split, last = {}, {}, -1  # made: {(left, right): id}; split: {token: (left, right)}
    for left, right in merges:
        if ids.get(left + right, -1) < last or not all(part in split or part in letters for part in (left, right)):
            raise ValueError(f"merge {left!r} {right!r} is not supported: ids and merges are in different orders")
        made[left, right] = last = ids[left + right]
        if _meet(left, right, made, split):
            split.setdefault(left + right, (left, right))
    return letters | split.keys()


def _meet(left: str, right: str, made: dict, split: dict) -> bool:
    """Whether left and right come to be neighbours: goes back in time, undoing the later-made of the two, and looks
    whether its inner part would have merged across the border before."""
    def rank(token):
        return made[split[token]] if token in split else -1
    while left in split or right in split:
        if rank(left) > rank(right):
            when, left = rank(left), split[left][1]
        else:  # at a tie too: there the leftmost pair merges first
            when, right = rank(right) + 1, split[right][0]
        if made.get((left, right), when) < when:
            return False
    return True


def _in_order(text: str) -> str:
    """Canonically equal, with long runs of combining marks sorted: Python's own sort of them takes the square of their number."""
    import regex  # tiktoken brings it

    def sort(run):
        groups = itertools.groupby(run[0], key=lambda mark: unicodedata.combining(mark) == 0)
        return "".join(mark for _, marks in groups for mark in sorted(marks, key=unicodedata.combining))
    return regex.sub(r"\p{M}{100,}", sort, text)


class Tokenizer:
    """The tokenizer of a model directory; template: a name in TEMPLATES or a text with {prompt}, by default the directory's."""

    def __init__(self, dir: str | Path, template: str | None = None):
        self.path = path = Path(dir) / "tokenizer.json"
        self.spec = _read(path)
        self.config = _read(path.with_name("tokenizer_config.json"), missing={})
        if (jinja := path.with_name("chat_template.jinja")).exists():
            self.config["chat_template"] = jinja.read_text(encoding="utf-8", errors="replace")
        generation = _read(path.with_name("generation_config.json"), missing={})
        try:
            self._build()
            self._ends = self._find_ends([self.config.get("eos_token"), generation.get("eos_token_id")])
        except ValueError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())[:500]}") from None
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from None
        self._template = template or self.config.get("prompt_template")
        if self._template:
            self.template  # checked now
        self.end_id = self.end_ids[0]

    def _build(self):
        import regex  # tiktoken brings it
        added = self.spec.get("added_tokens") or []
        for token in added:
            if odd := [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]:
                raise ValueError(f"added token {token['content']!r} with {odd[0]} is not supported")
        normalizer = self.spec.get("normalizer") or {}
        forms = [part["type"] for part in normalizer.get("normalizers", [normalizer] if normalizer else [])]
        if forms not in ([], ["NFC"]):
            raise ValueError(f"normalizer {forms} is not supported: NFC or none is")
        self.normal_form = "NFC" if forms else None
        self.added = {token["content"]: token["id"] for token in added}
        self.added_text = {id: text for text, id in self.added.items()}
        for text, id in self.added.items():
            if not text or len(self.added) < len(added) or self.spec["model"]["vocab"].get(text, id) != id:
                raise ValueError(f"added token {text!r} is not supported: empty, twice, or with another id in the vocabulary")
        self.special_ids = {token["id"] for token in added if token.get("special")}
        # first those that are looked for in the raw text, then those in the normalised one; with and without the special ones
        kinds = [[token for token in added if bool(token.get("normalized")) == normalised] for normalised in (False, True)]
        self._all_added = [_border(token["content"] for token in kind) for kind in kinds]
        self._tags = [_border(token["content"] for token in kind if not token.get("special")) for kind in kinds]
        model = self.spec["model"]
        patterns, self._ranks = split_patterns(self.spec.get("pre_tokenizer")), mergeable_ranks(model, self.added)
        tokens = self._ranks | {text.encode(): id for text, id in self.added.items()}
        self.known = set(tokens.values())
        if strange := [id for id in self.known if type(id) is not int or not 0 <= id < 2 ** 24]:
            raise ValueError(f"token id {strange[0]!r} is out of range")
        if len(self.known) < len(tokens):
            raise ValueError("two tokens share an id")
        self.vocab_size = max(self.known) + 1
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in self._ranks]
        self._lacking, self._unknown = {b[0] for b in lacking}, model["vocab"].get(model.get("unk_token"))
        spare = {b: self.vocab_size + i for i, b in enumerate(lacking)}  # tiktoken wants all 256; these are never made
        self.encoding = tiktoken.Encoding("ours", pat_str=patterns[-1], mergeable_ranks=self._ranks | spare, special_tokens=self.added)
        try:
            *self._first, self._last = map(regex.compile, patterns)
        except regex.error as error:
            raise ValueError(f"pre_tokenizer pattern: {error}") from None
        probe = "".join(map(chr, range(128))) + "é٣ 苹果，½ €🍎\u00a0\u2028\u200d\ue000 \n"  # characters of each sort
        if "".join(self._pieces(self._last, probe)) != probe:
            raise ValueError(f"pre_tokenizer pattern {patterns[-1]!r} is not supported: it leaves text out")
        self.start_ids = [self.added[token] for token in start_tokens(self.spec.get("post_processor"))]

    def _find_ends(self, named: list) -> list[int]:
        """tokenizer_config.json's eos_token, what generation_config.json names beside it, or else the only special token."""
        ends = []
        for end in named:
            end = end["content"] if isinstance(end, dict) else end
            ends += [self.added.get(e) if isinstance(e, str) else e for e in (end if isinstance(end, list) else [end]) if e is not None]
        ends = ends or [*self.special_ids]
        if len(ends) > 1 and named == [None, None] or not ends or not {*ends} <= self.known or any(type(e) is not int for e in ends):
            raise ValueError(f"the end token {named[0]!r}, eos_token of tokenizer_config.json, is not among the tokens")
        return [*dict.fromkeys(ends)]

    @property
    def template(self) -> str:
        """The text around a prompt. Raises ValueError for a chat template that is not known, or tokens that are not here."""
        try:
            chat = self.config.get("chat_template")
            if isinstance(chat, list):  # several by name
                chat = next((each.get("template") for each in chat if isinstance(each, dict) and each.get("name") == "default"), None)
            if not isinstance(self._template or chat or "", str):
                raise ValueError(f"the template {self._template or chat!r} is no text")
            text = self._template or (recognise(chat) if chat else TEMPLATES["none"])
            text = TEMPLATES.get(text, text)
            if text.count("{prompt}") != 1:
                raise ValueError(f"the prompt template {text!r} is none of {', '.join(TEMPLATES)}, and has no one {{prompt}}")
            if strange := {*re.findall(r"<\|[^<>|]*\|>", text)} - self.added.keys():
                raise ValueError(f"the prompt template's {min(strange)} is not among the tokens")
            return text
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    @property
    def end_ids(self) -> list[int]:
        """What ends an answer: the template's own end of a turn, then what the directory names."""
        try:
            turn = [self.added[token] for token in ("<|im_end|>", "<|eot_id|>") if f"{{prompt}}{token}" in self.template]
        except ValueError:  # a chat template that is not known, of a tokenizer that is not asked with
            turn = []
        return [*dict.fromkeys(turn + self._ends)]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        raw, normalised = self._all_added if allow_special else self._tags
        ids = []
        for i, part in enumerate(raw.split(text)):
            if i % 2:  # every second part is an added token
                ids.append(self.added[part])
                continue
            part = unicodedata.normalize(self.normal_form, _in_order(part)) if self.normal_form else part
            for j, piece in enumerate(normalised.split(part)):
                ids += [self.added[piece]] if j % 2 else self._merge_pieces(piece)
        return ids

    def _merge_pieces(self, text: str) -> list[int]:
        pieces = [text]
        for pattern in self._first:
            pieces = [match for piece in pieces for match in self._pieces(pattern, piece)]
        ids = []
        for piece in pieces:
            lacks = self._lacking and not self._lacking.isdisjoint(piece.encode("utf-8", "replace"))
            if not lacks and len(piece) < LONG:
                try:
                    ids += self.encoding.encode_ordinary(piece)
                except BaseException as error:  # a panic of tiktoken's regex, which gives up on a pattern that tries too much
                    if type(error).__name__ != "PanicException":
                        raise
                    raise ValueError(f"{self.path}: pre_tokenizer pattern {self._last.pattern[:100]!r} takes too long on {piece[:40]!r}") from None
                continue
            for match in self._pieces(self._last, piece):  # tiktoken's own regex overflows its stack on a million spaces
                match = match.encode("utf-8", "replace")
                lacks = not self._lacking.isdisjoint(match)
                ids += self._merge_lacking(match) if lacks else self.encoding._encode_single_piece(match)
        return ids

    def _pieces(self, pattern, text: str) -> list[str]:
        try:
            return [match[0] for match in pattern.finditer(text, timeout=2 + len(text) / 1e5)]
        except TimeoutError:
            raise ValueError(f"{self.path}: pre_tokenizer pattern {pattern.pattern[:100]!r} takes too long on {text[:40]!r}") from None

    def _merge_lacking(self, piece: bytes) -> list[int]:
        """Of a piece with bytes that are no tokens: they are left out, or unk_token where there is one."""
        word, unknown = [], b""  # no token has no bytes
        for b in piece:
            word += [bytes([b])] if b not in self._lacking else [unknown] * (self._unknown is not None)
        while pairs := [(self._ranks[a + b], (a, b)) for a, b in zip(word, word[1:]) if a and b and a + b in self._ranks]:
            word = _merge(word, min(pairs)[1])
        return [self._ranks[token] if token else self._unknown for token in word]

    def encode_prompt(self, prompt: str, later: bool = False) -> list[int]:
        """The ids that a model is asked with: the prompt in the template. `later`: of another turn of the same conversation.

        Only the template's own control tokens are recognised: a prompt that says <|im_end|> ends nothing.
        """
        if not prompt:
            return []
        template = self.template
        if template == TEMPLATES["llama-3"]:
            prompt = prompt.strip()  # as Llama's own chat template does
        if later:  # ChatML's turns end in a line break; a system prompt stands once
            template = "\n" + TEMPLATES["chatml"] if "<|im_start|>" in template else template.removeprefix("<|begin_of_text|>")
        before, after = template.split("{prompt}")
        cut = max([0, *(before.rfind(token) + len(token) for token in self.added if token in before)])  # control tokens are borders,
        rest = min([len(after), *(after.find(token) for token in self.added if token in after)])        # other text joins the prompt
        ids = self.encode(before[:cut], True) + self.encode(before[cut:] + prompt + after[:rest]) + self.encode(after[rest:], True)
        return ids if later or ids[:len(self.start_ids)] == self.start_ids else self.start_ids + ids

    def check_fits(self, vocab_size: int):
        """Raises ValueError if a model of this vocabulary has no place for some of our ids."""
        if self.vocab_size > vocab_size:
            raise ValueError(f"{self.path} has {self.vocab_size} tokens, the model {vocab_size}")

    def decode(self, ids: Iterable[int]) -> str:
        """Tags are text; special tokens are left out, and so are ids that only a padded embedding has."""
        return self.encoding.decode([id for id in ids if id in self.known and id not in self.special_ids])

    def save(self, dir: str | Path):
        """As transformers.AutoTokenizer reads it; the prompt template stays with it."""
        end = self.encoding.decode([self.end_id])
        config = {"pad_token": end, "clean_up_tokenization_spaces": False} | self.config
        if self._template:
            before, after = ("".join(self.added_text[id] for id in self.start_ids) * (not self.template.startswith("<|begin"))
                             + self.template).split("{prompt}")
            program = " + ".join([json.dumps(before), "messages[-1]['content']", json.dumps(after)])
            config |= {"prompt_template": self._template, "chat_template": "{{ " + program + " }}"}  # the same for transformers
        _write(Path(dir) / "tokenizer.json", self.spec)
        _write(Path(dir) / "tokenizer_config.json",
               config | {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})


def train_bpe(texts: Iterable[str], vocab_size: int, added: Iterable[str] = TAGS, end: str = "<|end|>") -> dict:
    """The content of a tokenizer.json: 256 bytes, merges, added tokens, end token.

    The pair found most often merges next, of equals the lexicographically first; smaller than vocab_size where no
    pair is found twice.
    """
    import regex  # tiktoken brings it: Python's own re knows no \p{L}
    added = [*added, end]
    merges, room = [], vocab_size - 256 - len(added)
    if room < 0:
        raise ValueError(f"vocab_size {vocab_size} has no room for 256 bytes and {len(added)} added tokens")
    border = _border(added)
    pieces = Counter(piece for text in texts for part in border.split(text)[::2]
                     for piece in regex.findall(PATTERN, part))
    words, sizes = [[bytes([b]) for b in piece.encode()] for piece in pieces], list(pieces.values())
    counts, where = Counter(), defaultdict(set)  # of each pair: how often it occurs, and in which words

    def count(i: int, sign: int):
        for pair in zip(words[i], words[i][1:]):
            counts[pair] += sign * sizes[i]
            where[pair].add(i)

    for i in range(len(words)):
        count(i, +1)
    for k in range(room):
        most = max(counts.values(), default=0)
        if most < 2:
            break
        merges.append(min(pair for pair, n in counts.items() if n == most))
        for i in where.pop(merges[k], ()):
            count(i, -1)
            words[i] = _merge(words[i], merges[k])
            count(i, +1)
    return _spec(merges, added)


def _merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out, i = [], 0
    while i < len(word):
        width = 2 if tuple(word[i:i + 2]) == pair else 1
        out.append(b"".join(word[i:i + width]))
        i += width
    return out


def _spec(merges: list[tuple[bytes, bytes]], added: list[str]) -> dict:
    show = lambda token: "".join(CHAR[b] for b in token)
    vocab = {show(token): id for id, token in enumerate([bytes([b]) for b in range(256)] + [a + b for a, b in merges])}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": len(vocab) + i, "content": text, **plain, "special": text == added[-1]}
                             for i, text in enumerate(added)],
            "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": [f"{show(a)} {show(b)}" for a, b in merges]}}


def _border(texts: Iterable[str]) -> re.Pattern:
    """Splits a text at these literals, the longest first; they come out as every second part."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)") + ")")


def _read(path: Path, missing: dict | None = None) -> dict:
    if missing is not None and not path.exists():
        return missing
    if path.exists() and not path.is_file() or path.is_file() and path.stat().st_size > 2 ** 28:
        raise ValueError(f"{path}: not a file, or over 256 MB, which no tokenizer's is")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate could not be written again
    except (ValueError, RecursionError) as error:  # of the JSON or of the UTF-8
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _write(path: Path, content: dict):
    """Aside, then renamed: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a killed call; no link in its place is followed
    try:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # where the disk is full


def read_texts(path: str) -> Iterable[str]:
    """A row a line: {"text": "Tom has 3 apples."} or {"prompt": "2 + 3 = ?", "completion": "<answer>5</answer>"}."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                yield "" + (row["text"] if "text" in row else row["prompt"] + row["completion"])  # a str or an error
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not a row with text, or prompt and completion ({error})") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line, where argparse prints the usage too
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="make a tokenizer of the texts in JSONL files")
    train.add_argument("--data", nargs="+", required=True)
    train.add_argument("--vocab-size", type=int, default=1000)
    train.add_argument("--out", required=True)
    encode = commands.add_parser("encode", help="show the tokens of a text")
    encode.add_argument("dir")
    encode.add_argument("text")
    args = parser.parse_args()
    try:
        if args.command == "train":
            spec = train_bpe((text for path in args.data for text in read_texts(path)), args.vocab_size)
            _write(Path(args.out) / "tokenizer.json", spec)
            Tokenizer(args.out).save(args.out)
            print(f"{args.out}: {Tokenizer(args.out).vocab_size} tokens")
        else:
            tokenizer = Tokenizer(args.dir)
            for id in tokenizer.encode(args.text):
                print(id, tokenizer.encoding.decode_single_token_bytes(id))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""Text to ids and back: a Hugging Face tokenizer.json (byte-level BPE) read into a tiktoken.Encoding, and the
making of one of our own.

The recipe needs two things of a tokenizer: <think>, </think>, <answer>, </answer> are one token each and decode as
text, and a text that *says* <|end|> ends nothing. So added tokens with "special": false are always recognised, as
Hugging Face does; special ones only where the caller asks for them.

    python tokenizer.py train --data corpus.jsonl --vocab-size 1000 --out runs/tokenizer
    python tokenizer.py encode runs/tokenizer "<think> 12 + 3 = 15 </think>"
"""

import argparse
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


def split_pattern(pre: dict | None) -> str:
    """The regex that cuts text into pieces: of Sequence[Split(Regex, Isolated), ByteLevel], or of ByteLevel alone."""
    parts = (pre or {}).get("pretokenizers", [pre or {"type": None}])
    kinds = [part["type"] for part in parts]
    if kinds not in (["Split", "ByteLevel"], ["ByteLevel"]):
        raise ValueError(f"pre_tokenizer {kinds} is not supported: ['Split', 'ByteLevel'] or ['ByteLevel'] is")
    split, level = parts[0], parts[-1]
    if level.get("add_prefix_space", True) or level.get("use_regex", True) != (split is level):
        raise ValueError(f"pre_tokenizer {level} is not supported")
    if split is level:
        return GPT2_PATTERN
    if "Regex" not in split["pattern"] or split["behavior"] != "Isolated" or split.get("invert"):
        raise ValueError(f"pre_tokenizer {split} is not supported: a Regex, Isolated, not inverted is")
    return split["pattern"]["Regex"]


def mergeable_ranks(model: dict, added: Iterable[str]) -> dict[bytes, int]:
    """{token: id}, or a ValueError where tiktoken could not take the id for the merge's rank.

    tokenizer.json lists merges (left, right) in order; tiktoken, without a list, joins whichever neighbours make the
    token of lowest rank. They agree if ids grow along the list and each token's own bytes merge into it: then in any
    text, when a token's turn comes, the one pair that can stand between its borders is the one that the list names.
    """
    if model["type"] != "BPE":
        raise ValueError(f"model type {model['type']!r} is not supported: BPE is")
    for field in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise ValueError(f"model.{field} = {model[field]!r} is not supported")
    ids, made, split, last = model["vocab"], {}, {}, -1  # made: {(left, right): id}; split: {token: (left, right)}
    if missing := [char for char in BYTE if char not in ids]:
        raise ValueError(f"the vocabulary is not byte-level: it lacks {missing[0]!r}")
    for left, right in (m.split(" ") if isinstance(m, str) else m for m in model["merges"]):
        if ids.get(left + right, -1) < last or not {left, right} <= split.keys() | BYTE.keys():
            raise ValueError(f"merge {left!r} {right!r} is not supported: ids and merges are in different orders")
        made[left, right] = last = ids[left + right]
        if _meet(left, right, made, split):
            split.setdefault(left + right, (left, right))
    if stray := ids.keys() - split.keys() - BYTE.keys() - set(added):
        raise ValueError(f"token {min(stray)!r} is not supported: its own bytes do not merge into it")
    return {bytes(BYTE[char] for char in token): ids[token] for token in [*BYTE, *split]}


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


class Tokenizer:
    """The tokenizer of a model directory."""

    def __init__(self, dir: str | Path):
        self.path = path = Path(dir) / "tokenizer.json"
        self.spec = _read(path)
        self.config = _read(path.with_name("tokenizer_config.json"), missing={})
        self.template = self.config.setdefault("prompt_template", "{prompt}\n")  # how a model is asked
        generation = _read(path.with_name("generation_config.json"), missing={})
        try:
            self._build()
            self.end_id = self._find_end([self.config.get("eos_token"), generation.get("eos_token_id")])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from None

    def _build(self):
        added = self.spec.get("added_tokens") or []
        for token in added:
            if odd := [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]:
                raise ValueError(f"added token {token['content']!r} with {odd[0]} is not supported")
        self.normal_form = (self.spec.get("normalizer") or {}).get("type")
        if self.normal_form not in (None, "NFC"):
            raise ValueError(f"normalizer {self.normal_form!r} is not supported: NFC or none is")
        self.added = {token["content"]: token["id"] for token in added}
        self.special_ids = {token["id"] for token in added if token.get("special")}
        self._all_added = _border(self.added)
        self._tags = _border(text for text, id in self.added.items() if id not in self.special_ids)
        pattern, ranks = split_pattern(self.spec.get("pre_tokenizer")), mergeable_ranks(self.spec["model"], self.added)
        tokens = ranks | {text.encode(): id for text, id in self.added.items()}
        self.known = set(tokens.values())
        if len(self.known) < len(tokens):
            raise ValueError("two tokens share an id")
        self.vocab_size = max(self.known) + 1
        self.encoding = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.added)
        probe = "".join(map(chr, range(128))) + "é٣ 苹果，½ €🍎\u00a0\u2028\u200d\ue000 \n"  # characters of each sort
        if self.encoding.decode(self.encoding.encode_ordinary(probe)) != probe:
            raise ValueError(f"pre_tokenizer pattern {pattern!r} is not supported: it leaves text out")

    def _find_end(self, named: list) -> int:
        if len(self.special_ids) == 1:
            named = [*named, *self.special_ids]
        end = next((end for end in named if end is not None), None)
        end = end["content"] if isinstance(end, dict) else end[0] if isinstance(end, list) else end
        id = self.added.get(end) if isinstance(end, str) else end
        if id not in self.known:
            raise ValueError(f"the end token {end!r}, eos_token of tokenizer_config.json, is not among the tokens")
        return id

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        ids = []
        for i, part in enumerate((self._all_added if allow_special else self._tags).split(text)):
            if i % 2:  # every second part is an added token
                ids.append(self.added[part])
            else:
                part = unicodedata.normalize(self.normal_form, part) if self.normal_form else part
                ids += self.encoding.encode_ordinary(part)
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids that a model is asked with: the prompt in this directory's template."""
        return self.encode(self.template.replace("{prompt}", prompt)) if prompt else []

    def check_fits(self, vocab_size: int):
        """Raises ValueError if a model of this vocabulary has no place for some of our ids."""
        if self.vocab_size > vocab_size:
            raise ValueError(f"{self.path} has {self.vocab_size} tokens, the model {vocab_size}")

    def decode(self, ids: Iterable[int]) -> str:
        """Tags are text; special tokens are left out, and so are ids that only a padded embedding has."""
        return self.encoding.decode([id for id in ids if id in self.known and id not in self.special_ids])

    def save(self, dir: str | Path):
        """As transformers.AutoTokenizer reads it."""
        end = self.encoding.decode([self.end_id])
        config = {"pad_token": end, "clean_up_tokenization_spaces": False} | self.config
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON or of the UTF-8
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _write(path: Path, content: dict):
    """Aside, then renamed: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_texts(path: str) -> Iterable[str]:
    """A row a line: {"text": "Tom has 3 apples."} or {"prompt": "2 + 3 = ?", "completion": "<answer>5</answer>"}."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                yield "" + (row["text"] if "text" in row else row["prompt"] + row["completion"])  # a str or an error
            except (ValueError, KeyError, TypeError) as error:
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

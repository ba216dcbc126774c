"""Trains a byte-level BPE tokenizer on the texts of JSONL files; data/tokenizer.json was made by

    python data/world.py 30000 > corpus.jsonl
    python -m data.train_tokenizer --data corpus.jsonl --vocab-size 1000 --out data

A row is {"text": "Tom has 3 apples."} or {"prompt": "2 + 3 = ?", "completion": "<answer>5</answer>"}.
"""

import argparse
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import regex  # Python's re knows no \p{L}; tiktoken requires this one

from tokenizer import BYTE, TAGS, Tokenizer

# A piece is one digit, one word (or a run of Chinese) with the spaces beside it, one mark, or one whitespace. Merges
# stay within a piece: no token has two digits, and a digit is the same token wherever it stands.
PATTERN = r"\p{N}| ?[\p{L}\p{M}]+ ?| ?[^\s\p{L}\p{M}\p{N}]|\s"
CHAR = {b: char for char, b in BYTE.items()}


class Pieces:
    """The distinct pieces of all texts, as lists of tokens, and how often each pair of neighbours occurs in them."""

    def __init__(self, occurrences):
        """occurrences: {piece: how often it occurs}"""
        self.words = [[bytes([b]) for b in piece.encode()] for piece in occurrences]
        self.sizes = list(occurrences.values())
        self.pairs = Counter()         # {(left, right): how often}
        self.where = defaultdict(set)  # {(left, right): indices of words that have, or had, the pair}
        for i in range(len(self.words)):
            self._count(i, +1)

    def _count(self, i, sign):
        for pair in zip(self.words[i], self.words[i][1:]):
            self.pairs[pair] += sign * self.sizes[i]
            self.where[pair].add(i)

    def most_frequent(self):
        """Of equals the lexicographically first; None where no pair occurs twice."""
        most = max(self.pairs.values(), default=0)
        if most < 2:
            return None
        return min(pair for pair, count in self.pairs.items() if count == most)

    def merge(self, pair):
        for i in self.where.pop(pair):
            self._count(i, -1)
            self.words[i] = merge(self.words[i], pair)
            self._count(i, +1)


def merge(word, pair):
    """The word with each occurrence of the pair joined, from left to right."""
    joined, i = [], 0
    while i < len(word):
        if tuple(word[i:i + 2]) == pair:
            joined.append(pair[0] + pair[1])
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return joined


def train_bpe(texts, vocab_size, added=TAGS, end="<|end|>"):
    """The content of a tokenizer.json: 256 bytes, merges, added tokens, end token.

    The most frequent pair is merged next; there are fewer than vocab_size tokens where no pair occurs twice.
    """
    added = [*added, end]
    merges, room = [], vocab_size - 256 - len(added)
    if room < 0:
        raise ValueError(f"vocab_size {vocab_size} has no room for 256 bytes and {len(added)} added tokens")
    longest_first = sorted(added, key=len, reverse=True)
    border = re.compile("|".join(map(re.escape, longest_first)))
    occurrences = Counter()
    for text in texts:
        for part in border.split(text):
            occurrences.update(regex.findall(PATTERN, part))
    pieces = Pieces(occurrences)
    while len(merges) < room:
        pair = pieces.most_frequent()
        if pair is None:
            break
        pieces.merge(pair)
        merges.append(pair)
    return tokenizer_json(merges, added)


def tokenizer_json(merges, added):
    """The last added token is special: it ends a text."""
    tokens = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
    vocab = {shown(token): id for id, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added_tokens = [{"id": len(vocab) + i, "content": text, **flags, "special": text == added[-1]}
                    for i, text in enumerate(added)]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [f"{shown(left)} {shown(right)}" for left, right in merges]},
    }


def shown(token):
    """As tokenizer.json shows bytes."""
    return "".join(CHAR[b] for b in token)


def read_texts(path):
    from data.forms import numbered_rows
    for number, row in numbered_rows(path):
        try:
            text = row["text"] if "text" in row else row["prompt"] + row["completion"]
        except (KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: not a row with text, or prompt and completion")
        yield text


def main():
    from lab.checkpoint import atomic_write
    from lab.command import Parser
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    with parser.one_line_errors():
        spec = train_bpe((text for path in args.data for text in read_texts(path)), args.vocab_size)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "tokenizer.json", json.dumps(spec, ensure_ascii=False))
        tokenizer = Tokenizer(out)
        tokenizer.save(out)
        print(f"{out}: {tokenizer.vocab_size} tokens")


if __name__ == "__main__":
    main()

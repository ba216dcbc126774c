"""Text to token ids and back: a Hugging Face tokenizer.json (byte-level BPE) as a tiktoken.Encoding; prompt templates.

The recipe needs two things of a tokenizer: <think>, </think>, <answer>, </answer> are one token each and decode as
text, and a text that *says* <|end|> ends nothing. So added tokens with "special": false are always recognised, as
Hugging Face does; special ones only where the caller asks for them.

    python tokenizer.py data "<think> 12 + 3 = 15 </think>"      # one token per line
"""
import hashlib
import itertools
import json
import re
import unicodedata
from pathlib import Path

import regex  # Python's re knows no \p{L}; tiktoken requires this one
import tiktoken

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# R1-Zero's, for base models, is word for word R1 v1 table 1; the others are for tuned models: ChatML (Qwen, SmolLM),
# Llama 3's and DeepSeek's. Where one ends in <think>, the completion begins within the thinking.
TEMPLATES = {
    "none": "{prompt}",
    "r1-zero": "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
               "assistant first thinks about the reasoning process in the mind and then provides the user with the "
               "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
               "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
               "User: {prompt}. Assistant:",
    "chatml": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "chatml-think": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>{prompt}<｜Assistant｜>",
    "deepseek-think": "<｜begin▁of▁sentence｜><｜User｜>{prompt}<｜Assistant｜><think>\n",
}
SYSTEM = "<|im_start|>system\n%s<|im_end|>\n" + TEMPLATES["chatml"]
DATED = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n" \
        "Today Date: 26 Jul 2024\n\n<|eot_id|>" + TEMPLATES["llama-3"].removeprefix("<|begin_of_text|>")
LLAMA_3 = (TEMPLATES["llama-3"], DATED)  # they strip the spaces around a prompt
# {prompt template: the first 16 digits of the sha256 of each published chat template that yields it}
PUBLISHED = {
    SYSTEM % "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.": ["6037ec53ac59dea1"],  # Qwen2.5
    SYSTEM % "You are a helpful AI assistant named SmolLM, trained by Hugging Face": ["6e76f0d0a1bfb2ef"],  # SmolLM2
    SYSTEM % "You are a helpful assistant.": ["9178daecd2ef9009"],  # Qwen2
    SYSTEM % "You are a helpful assistant": ["bce94d5dd17510b0"],   # Qwen1.5
    TEMPLATES["chatml"]: ["2e7c58464a1c5792",                                         # plain ChatML
                          "ca2b8df89c128dc3", "582641b345f88ac0", "b1720682da9cefdf"],  # Qwen3; Qwen3-Instruct-2507
    TEMPLATES["chatml-think"]: ["e6831dadbcf5817b", "aff931685d8e20ad"],  # Qwen3-Thinking-2507; QwQ
    TEMPLATES["llama-3"]: ["18f3fd186f23cd66", "3bd333456aee200b"],       # Llama 3
    DATED: ["c45233d893a2bf08", "d1eef4c920929161"],    # Llama 3.1 and 3.3; 3.2, today's in transformers
    TEMPLATES["deepseek"]: ["4dfd2580c94f2b54"],        # DeepSeek-R1-Distill, as first published
    TEMPLATES["deepseek-think"]: ["f41720becfad3645"],  # and as it is now
}

# tokenizer.json shows each byte as a printable character: itself if it is one, else the next from chr(256) on.
BYTE = {chr(b): b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
BYTE |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*BYTE.values()}))}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's default
ISOLATED = r"{0}|(?:(?!{0})[\s\S])+"  # the matches of a pattern, and what lies between them
LONG = 100_000  # characters: on a million spaces tiktoken's regex engine overflows its stack


def recognise(chat_template: str | list | None) -> str | None:
    """The prompt template that a published chat template comes to for one question; None for one that is not known."""
    if not chat_template:
        return TEMPLATES["none"]
    if isinstance(chat_template, list):  # several, each with a name; transformers takes the default one, too
        chat_template = {each["name"]: each["template"] for each in chat_template}.get("default", "")
    words = " ".join(chat_template.replace("\\n", " ").split())  # a line break may be real or "\n"
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]  # Jinja: compared, never run
    return next((text for text, digests in PUBLISHED.items() if digest in digests), None)


def split_patterns(pre_tokenizer: dict) -> list[str]:
    """The regexes that cut text into pieces, one after the other: Split and Digits, then the ByteLevel's own."""
    *splits, byte_level = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if byte_level["type"] != "ByteLevel" or byte_level.get("add_prefix_space", True):
        raise ValueError(f"pre_tokenizer must end in ByteLevel without add_prefix_space, not in {byte_level}")
    patterns = []
    for split in splits:
        kind = (split["type"], split.get("behavior"), bool(split.get("invert")))
        if split["type"] == "Digits":
            patterns.append(ISOLATED.format(r"\p{N}" if split.get("individual_digits") else r"\p{N}+"))
        elif kind == ("Split", "Isolated", False) and "Regex" in split["pattern"]:
            patterns.append(ISOLATED.format(split["pattern"]["Regex"]))
        elif kind == ("Split", "Removed", True) and "Regex" in split["pattern"]:
            patterns.append(split["pattern"]["Regex"])  # what lies between the matches is left out
        else:
            raise ValueError(f"{split} is not supported: only Digits, or Split by Regex, Isolated or inverted Removed")
    if byte_level.get("use_regex", True):
        patterns.append(ISOLATED.format(GPT2_PATTERN))
    return patterns or [r"[\s\S]+"]


def mergeable_ranks(model: dict, added: dict[str, int]) -> dict[bytes, int]:
    """{token: id} for tiktoken, which has no list of merges: it joins whichever neighbours make the token of lowest id.
    So the model's merges must have rising ids; lab/check_tokenizer.py proves what else must hold."""
    fields = ("dropout", "byte_fallback", "fuse_unk", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(map(model.get, fields)):
        raise ValueError(f"model {model['type']} is not supported: only BPE without {', '.join(fields)}")
    merged = ["".join(merge).replace(" ", "") for merge in model["merges"]]  # of "Ġ the" or ["Ġ", "the"]: "Ġthe"
    ids = [model["vocab"][token] for token in merged]
    if ids != sorted(ids):
        raise ValueError("model.merges are not supported: they are in another order than the ids")
    skip = added.keys() - BYTE.keys() - {*merged}  # added tokens that no merge or byte makes
    return {bytes(BYTE[char] for char in token): id for token, id in model["vocab"].items() if token not in skip}


def nfc(text: str) -> str:
    """Unicode's NFC in linear time: unicodedata takes n² steps to sort n combining marks in a row."""
    if regex.search(r"\p{M}{100}", text):
        runs = itertools.groupby(text, key=lambda char: unicodedata.combining(char) > 0)
        text = "".join(char for _, run in runs for char in sorted(run, key=unicodedata.combining))
    return unicodedata.normalize("NFC", text)


def splitter(tokens: list[dict], normalized: bool) -> re.Pattern:
    """Splits at the added tokens that are sought in the raw or in the normalized text; they are the odd parts."""
    texts = [token["content"] for token in tokens if bool(token.get("normalized")) == normalized]
    texts.sort(key=len, reverse=True)  # the longest first
    return re.compile("(" + "|".join(map(re.escape, texts)) + ")" if texts else "(?!)")


def cut(pattern: regex.Pattern, text: str) -> list[str]:  # TimeoutError if it backtracks too long
    return [match[0] for match in pattern.finditer(text, timeout=2 + len(text) / 1e5) if match[0]]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Tokenizer:
    """The tokenizer of a model directory. template: a name in TEMPLATES, a text with {prompt}, or the directory's."""

    def __init__(self, dir: str | Path, template: str | None = None):
        dir = Path(dir)
        self.path = dir / "tokenizer.json"
        self.spec = json.loads(self.path.read_text(encoding="utf-8"))
        self.config = read_json(dir / "tokenizer_config.json")
        if (dir / "chat_template.jinja").exists():
            self.config["chat_template"] = (dir / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
        self._read_added_tokens()
        self._read_model()
        self._chosen = template or self.config.get("prompt_template")  # written by save
        self._template = TEMPLATES.get(self._chosen, self._chosen) or recognise(self.config.get("chat_template"))
        if self._chosen and self._template.count("{prompt}") != 1:
            raise ValueError(f"{self._chosen!r} is no template with one {{prompt}}, and none of {', '.join(TEMPLATES)}")
        self.end_ids = self._find_ends(read_json(dir / "generation_config.json").get("eos_token_id"))
        self.end_id = self.end_ids[0]

    def _read_added_tokens(self):
        added = self.spec.get("added_tokens") or []
        if any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word")):
            raise ValueError("added_tokens with lstrip, rstrip or single_word are not supported")
        self.added = {token["content"]: token["id"] for token in added}
        self.special_ids = {token["id"] for token in added if token.get("special")}
        always = [token for token in added if not token.get("special")]
        self._all_added = splitter(added, normalized=False), splitter(added, normalized=True)
        self._always = splitter(always, normalized=False), splitter(always, normalized=True)
        self.start_ids = []  # of the tokens that a post_processor puts before a text, as Llama's <|begin_of_text|>
        post_processor = self.spec.get("post_processor") or {"processors": []}
        for part in post_processor.get("processors", [post_processor]):
            *before, last = part.get("single", [{"Sequence": "the text"}])  # ByteLevel has none: the text alone
            if part["type"] not in ("ByteLevel", "TemplateProcessing") or "Sequence" not in last:
                raise ValueError(f"post_processor {part} is not supported: ByteLevel, and tokens before the text, are")
            self.start_ids += [self.added[item["SpecialToken"]["id"]] for item in before]

    def _read_model(self):
        normalizer = self.spec.get("normalizer") or {"normalizers": []}
        forms = [part["type"] for part in normalizer.get("normalizers", [normalizer])]
        if forms not in ([], ["NFC"]):
            raise ValueError(f"normalizer {forms} is not supported: NFC or none is")
        self.normalize = nfc if forms else str
        patterns = split_patterns(self.spec.get("pre_tokenizer") or {"type": None})
        *self._first, self._last = [regex.compile(pattern) for pattern in patterns]
        model = self.spec["model"]
        ranks = mergeable_ranks(model, self.added)
        self.known = {*ranks.values(), *self.added.values()}
        self.vocab_size = max(self.known) + 1
        # A vocabulary may lack rare bytes, and tiktoken wants all 256: these get ids from vocab_size on.
        self._lacking = bytes(b for b in range(256) if bytes([b]) not in ranks)
        spare = {bytes([b]): self.vocab_size + i for i, b in enumerate(self._lacking)}
        self._unknown_id = model["vocab"].get(model.get("unk_token"))
        self.encoding = tiktoken.Encoding("ours", pat_str=patterns[-1], mergeable_ranks=ranks | spare,
                                          special_tokens=self.added)

    def _find_ends(self, eos_ids: int | list[int] | None) -> list[int]:
        """The template's own end of a turn, then what the directory names, or else its only special token."""
        named = [eos_ids] if isinstance(eos_ids, int) else eos_ids or []
        eos_token = self.config.get("eos_token")
        if eos_token:
            named = [self.added[eos_token["content"] if isinstance(eos_token, dict) else eos_token], *named]
        after_prompt = (self._template or "").partition("{prompt}")[2]
        turn_ends = [self.added[end] for end in ("<|im_end|>", "<|eot_id|>") if after_prompt.startswith(end)]
        if not named and len(self.special_ids) != 1:
            raise ValueError(f"{self.path}: neither eos_token nor eos_token_id says which token ends a text")
        return list(dict.fromkeys(turn_ends + (named or list(self.special_ids))))

    @property
    def template(self) -> str:
        """The text around a prompt. Raises ValueError where it is not known."""
        if self._template is None:
            raise ValueError(f"{self.path}: the chat template is not known here; choose one of {', '.join(TEMPLATES)}")
        return self._template

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        in_raw, in_normalized = self._all_added if allow_special else self._always
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates become U+FFFD
        ids = []
        for i, part in enumerate(in_raw.split(text)):
            if i % 2:
                ids.append(self.added[part])
                continue
            for j, plain in enumerate(in_normalized.split(self.normalize(part))):
                ids += [self.added[plain]] if j % 2 else self._encode_plain(plain)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Text without added tokens: cut into pieces, each merged by itself."""
        pieces = [text]
        for pattern in self._first:
            pieces = [part for piece in pieces for part in cut(pattern, piece)]
        ids = []
        for piece in pieces:
            if len(piece) < LONG and set(self._lacking).isdisjoint(piece.encode()):
                ids += self.encoding.encode_ordinary(piece)
            else:  # too long for tiktoken's regex engine, or with bytes that are no tokens
                for part in cut(self._last, piece):
                    ids += self._merge(part.encode())
        return ids

    def _merge(self, piece: bytes) -> list[int]:
        """Bytes that are no tokens become unk_token; without one they are left out, and their neighbours may merge."""
        if self._unknown_id is None:
            piece = piece.translate(None, self._lacking)
        ids = self.encoding._encode_single_piece(piece) if piece else []
        return [id if id < self.vocab_size else self._unknown_id for id in ids]

    def encode_prompt(self, prompt: str, later: bool = False) -> list[int]:
        """The ids of a prompt in its template. Special tokens are recognised in the template alone, so a prompt that
        says <|im_end|> ends nothing; those with "special": false, as DeepSeek's <｜User｜> is, are in the prompt, too.
        later: not the first turn of a conversation."""
        if not prompt:
            return []
        template = self.template
        if template in LLAMA_3:
            prompt = prompt.strip()
        if later:  # the start token and the system prompt come once; ChatML has a line break between turns
            turn = r"<\|im_start\|>user|<\|start_header_id\|>user|<｜User｜>"
            template = re.sub(rf"\A.*?(?={turn})|\A<\|begin_of_text\|>", "", template, count=1, flags=re.DOTALL)
            template = "\n" + template if template.startswith("<|im_start|>") else template
        before, after = template.split("{prompt}")
        # Control tokens are borders; the plain text between them and the prompt is encoded together with the prompt.
        opening_end = max([before.rfind(token) + len(token) for token in self.added if token in before], default=0)
        closing_start = min([after.find(token) for token in self.added if token in after], default=len(after))
        question = before[opening_end:] + prompt + after[:closing_start]
        ids = self.encode(before[:opening_end], True) + self.encode(question) + self.encode(after[closing_start:], True)
        is_started = later or ids[:len(self.start_ids)] == self.start_ids
        return ids if is_started else self.start_ids + ids

    def decode(self, ids: list[int]) -> str:
        """Tags are text; special tokens and the unused ids of a padded embedding are left out."""
        return self.encoding.decode([id for id in ids if id in self.known and id not in self.special_ids])

    def save(self, dir: str | Path):
        """As transformers.AutoTokenizer reads it; the prompt template stays with it."""
        end = self.encoding.decode([self.end_id])
        config = {"pad_token": end, "clean_up_tokenization_spaces": False} | self.config
        if self._chosen:
            start, question = self.encoding.decode(self.start_ids), "messages[-1]['content']"
            if self.template in LLAMA_3:
                question += " | trim"
            before, after = map(json.dumps, (start + self.template.removeprefix(start)).split("{prompt}"))
            config["prompt_template"] = self._chosen
            config["chat_template"] = f"{{{{ {before} + {question} + {after} }}}}"
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        Path(dir).mkdir(parents=True, exist_ok=True)
        Path(dir, "chat_template.jinja").unlink(missing_ok=True)  # it would override config's
        for name, content in (("tokenizer.json", self.spec), ("tokenizer_config.json", config)):
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            Path(dir, name).write_text(text, encoding="utf-8")


def main():
    from lab import show_tokens  # here, so that the rest imports without the project
    show_tokens.main(Tokenizer)


if __name__ == "__main__":
    main()

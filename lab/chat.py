"""A chat in the terminal: streaming, several turns, the thinking dimmed and set apart from the answer.

    python model.py DIR                          # chat
    python model.py DIR --prompt "What is 2+3?"  # one answer
"""

import re
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from lab.check_input import check_directory
from lab.check_model import is_deepseek, read_json
from lab.command import Parser, add_template, device_of
from lab.asking import opened_by
from tokenizer import Tokenizer
from variants import deepseek_v3, v3_weights
from variants.rope_scaling import scaled_frequencies

TAG = "</?(?:think|answer)>"
PART_OF_TAG = "<[/a-z]*"
PART_OF_CHARACTER = "�"
CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # a model must not command the terminal
LONGEST_TAG = 12


def parse_args():
    parser = Parser(description="Talk to a model directory; Ctrl-C ends an answer, Ctrl-D the program.")
    parser.add_argument("dir")
    parser.add_argument("--prompt", help="one question to answer, instead of a chat")
    add_template(parser)
    parser.add_argument("--temperature", type=float, default=0.6, help="default: %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", help="default: the GPU if there is one")
    args = parser.parse_args()
    if not args.temperature >= 0:  # nan too
        parser.error(f"temperature {args.temperature} is out of range")
    if not 0 < args.top_p <= 1:
        parser.error(f"top_p {args.top_p} is out of range")
    if args.max_new_tokens <= 0:
        parser.error(f"max_new_tokens {args.max_new_tokens} is out of range")
    if args.device is not None:
        try:
            args.device = device_of(args.device)
        except ValueError as error:
            parser.error(str(error))
    return parser, args


def main(load, prefill, sample):
    """model.py's script, which gives its functions."""
    parser, args = parse_args()
    try:
        check_directory(args.dir, args.template)
        if is_deepseek(read_json(Path(args.dir) / "config.json")):
            load = partial(v3_weights.load, Config=deepseek_v3.Config, Transformer=deepseek_v3.Transformer)
        model = load(args.dir, device=args.device, rope=scaled_frequencies)
        chat(model, Tokenizer(args.dir, args.template), partial(stream, prefill, sample, model), args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


@torch.no_grad()
def stream(prefill, sample, model, prompt, args, end_ids, generator):
    """The tokens of one answer as they are drawn; the end token too."""
    logits, cache = prefill(model, [prompt])
    for _ in range(min(args.max_new_tokens, model.config.max_position_embeddings - cache.length)):
        token, _ = sample(logits, args.temperature, args.top_p, generator)
        yield token.item()
        if token.item() in end_ids:
            return
        logits = model(token[:, None], cache=cache)[:, -1]


def chat(model, tokenizer, answer_tokens, args):
    """Answers args.prompt, or what is typed until Ctrl-D or "exit". Ctrl-C ends an answer; then it asks again."""
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(args.seed)
    context = model.config.max_position_embeddings
    room = min(args.max_new_tokens, context // 2)  # for the answer
    turns = []  # the token ids of each question with its answer
    while args.prompt is None or not turns:
        question = []
        answer = Answer(tokenizer, opened_by(tokenizer.template, ""))
        with suppress(KeyboardInterrupt):
            text = args.prompt
            if text is None:
                text = read_line()
            if text in ("", "exit"):
                return
            question = tokenizer.encode_prompt(text, later=bool(turns))
            while turns and len(sum(turns, question)) > context - room:
                turns.pop(0)
            for token in answer_tokens(sum(turns, []) + question, args, tokenizer.end_ids, generator):
                answer.add(token)
        answer.finish()
        if question:
            said = [id for id in answer.ids if id not in tokenizer.end_ids]
            turns.append(question + said + [tokenizer.end_id])


def read_line():
    """What the user types; "" at Ctrl-D, which ends the chat as an empty line does."""
    try:
        return input("\n> ").strip()
    except EOFError:
        print()
        return ""


class Answer:
    """An answer in the making, printed as far as what follows cannot change it."""

    def __init__(self, tokenizer, opened=""):
        """opened: what the prompt has opened (lab/asking.py)."""
        self.tokenizer, self.opened = tokenizer, opened
        self.ids = []
        self.printed = ""
        self.dim, self.normal = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")

    def add(self, token):
        self.ids.append(token)
        self.show(last=False)

    def finish(self):
        self.show(last=True)

    def show(self, last):
        text = visible(self.opened + self.tokenizer.decode(self.ids), self.dim, self.normal, last)
        print(text[len(self.printed):], end="", flush=True)
        self.printed = text


def visible(text, dim="", normal="", last=True):
    """An answer as its reader sees it: thinking dimmed and set apart, no tags. Unless last, without what may change."""
    def in_place_of_tags(tags):
        style = dim if tags[0].rstrip().endswith("<think>") else normal
        gap = "\n\n" if tags.start() > 0 else ""
        return gap + style

    text = without_end(text, last)
    text = re.sub(CONTROL, "�", text).lstrip()
    text = re.sub(rf"(?<!\s)\s*(?:{TAG}\s*)+", in_place_of_tags, text)
    if last:
        text += normal + "\n"
    return text


def without_end(text, last):
    """The text without spaces and tags at its end; unless last, also without half a tag or half a character there."""
    ending = TAG if last else f"{TAG}|{PART_OF_TAG}|{PART_OF_CHARACTER}"
    before = None
    while text != before:
        before = text
        text = text.rstrip()
        start, end = text[:-LONGEST_TAG], text[-LONGEST_TAG:]  # a search in all of it would take its length squared
        text = start + re.sub(f"(?:{ending})$", "", end)
    return text

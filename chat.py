"""A chat in the terminal: streaming, the thinking dimmed and apart from the answer, several turns.

    python model.py DIR                          # or: python chat.py DIR
    python model.py DIR --prompt "What is 2+3?"  # one answer
"""

import re
import sys
from contextlib import suppress

import torch


def visible(text, dim="", normal="", last=True):
    """An answer as its reader sees it: thinking dimmed and apart, no tags. Unless last, without what may still change."""
    tag = "</?(?:think|answer)>"
    before = None
    while text != before:  # at the end alone: a search through all of it would take the square of its length
        before, text = text, text.rstrip()
        text = text[:-12] + re.sub(rf"(?:{tag}{'' if last else '|�|<[/a-z]*'})$", "", text[-12:])  # � is half a character, </thi half a tag
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", text).lstrip()  # a model must not command the terminal
    between = lambda m: "\n\n" * (m.start() > 0) + (dim if m[0].rstrip().endswith("<think>") else normal)
    return re.sub(rf"(?<!\s)\s*(?:{tag}\s*)+", between, text) + (normal + "\n") * last


def chat(model, tokenizer, a):
    """Answers a.prompt, or what is typed: earlier turns stay in sight while they fit; Ctrl-C ends an answer."""
    from model import generate
    context, turns = model.config.max_position_embeddings, []
    style = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(a.seed)

    def show(*new):
        before = visible(tokenizer.decode(answer), *style, last=False)
        answer.extend(new)
        print(visible(tokenizer.decode(answer), *style, last=not new)[len(before):], end="", flush=True)

    while a.prompt is None or not turns:
        prompt, answer = [], []
        with suppress(KeyboardInterrupt):
            if (text := input("\n> ").strip() if a.prompt is None else a.prompt) in ("", "exit"):
                return
            prompt = tokenizer.encode_prompt(text, later=bool(turns))
            while turns and len(sum(turns, prompt)) > context - min(a.max_new_tokens, context // 2):  # room to answer
                turns.pop(0)
            generate(model, [sum(turns, []) + prompt], 1, a.max_new_tokens, a.temperature, a.top_p, tokenizer.end_ids,
                     generator, on_token=show)
        show()
        turns += [prompt + [id for id in answer if id not in tokenizer.end_ids] + [tokenizer.end_id]] if prompt else []


def main():
    from command import Parser, open_model
    parser = Parser(description="Talk to a model directory; Ctrl-C ends an answer, Ctrl-D the program.")
    parser.add_argument("dir")
    for name, kind, default in (("prompt", str, None), ("temperature", float, 0.6), ("top-p", float, 0.95),
                                ("max-new-tokens", int, 2048), ("seed", int, 0), ("device", str, None)):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default: {default}")
    a = parser.parse_args()
    for name, good in (("temperature", a.temperature >= 0), ("top_p", 0 < a.top_p <= 1), ("max_new_tokens", a.max_new_tokens > 0)):
        if not good:
            parser.error(f"{name} {getattr(a, name)} is out of range")
    try:
        model, tokenizer = open_model(a.dir, device=a.device)
        chat(model, tokenizer, a)
    except EOFError:  # Ctrl-D
        print()
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

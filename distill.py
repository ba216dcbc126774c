"""Rejection sampling, and distillation: a student trained on a teacher's verified traces.

Rejection sampling [R1 v1 2.3.3, v2 B.3.3]: many samples a prompt; the correct, one-language, readable, distinct ones
stay. Their rows train SFT-2 (from the base again) and the students [v2 B.4.3], both by plain SFT:

  1. sample n completions of each prompt from the teacher
  2. a completion falls to the first filter that it does not pass; those that pass all, distinct, at most `keep` a prompt
  3. mix with general examples, 3 : 1 [R1: 600k : 200k]
  4. next-token training on the completions

    python distill.py --teacher DIR --student DIR --data FILE.jsonl --out DIR
"""

import random
import re

FILTERS = ("correct", "one_language", "readable", "distinct", "enough")  # in this order


def repeats(text, shortest=12, longest=100, times=3):
    """Whether some run of so many characters stands so many times in a row: a loop. 25 ms for 10,000 characters."""
    return re.search(rf"(.{{{shortest},{longest}}}?)\1{{{times - 1}}}", text, re.DOTALL) is not None


def readable(completion, longest=10_000):
    """No code block, no loop, no more characters than that [R1 v2 B.3.3: no long paragraphs, no code blocks]."""
    return len(completion) <= longest and "```" not in completion and not repeats(completion)


def rejection_sample(examples, texts, correct, one_language, keep=4, readable=readable):
    """Choose among the teacher's completions texts[i][j] of examples[i].

    correct, one_language: (completion, example) -> whether it passes. keep: at most so many a prompt ("enough").
    Returns rows {"prompt", "completion", ...the example's fields} and counts: how many were sampled, fell to each
    filter, and were kept.
    """
    counts = {"sampled": 0} | {name: 0 for name in FILTERS} | {"kept": 0}
    rows = []
    for example, completions in zip(examples, texts):
        kept = set()
        for text in completions:
            counts["sampled"] += 1
            checks = {"correct": lambda: correct(text, example), "one_language": lambda: one_language(text, example),
                      "readable": lambda: readable(text), "distinct": lambda: " ".join(text.split()) not in kept,
                      "enough": lambda: len(kept) < keep}
            fell_to = next((name for name in FILTERS if not checks[name]()), "kept")
            counts[fell_to] += 1
            if fell_to == "kept":
                kept.add(" ".join(text.split()))
                rows.append({**example, "completion": text})
    return rows, counts


def explain(counts):
    """"sampled 6000, fell to: correct 622, ..., kept 2020"."""
    fell = ", ".join(f"{name} {counts[name]}" for name in FILTERS)
    return f"sampled {counts['sampled']}, fell to: {fell}; kept {counts['kept']}"


def mix(traces, general, ratio=3, seed=0):
    """Traces and general examples, `ratio` to 1, shuffled; the general ones are reused or left over as the ratio asks."""
    if not traces or not general:
        raise ValueError(f"{len(traces)} traces and {len(general)} general examples: there must be some of both")
    wanted, rng = round(len(traces) / ratio), random.Random(seed)
    rows = traces + (general * (wanted // len(general) + 1))[:wanted]
    rng.shuffle(rows)
    return rows


def distill(student, traces, general, encode, train, ratio=3, seed=0):
    """Train `student` in place on the mixture, by SFT only, as R1 does.

    encode(row) -> (ids, prompt_length); train(model, examples) runs the training. Returns what train returns.
    """
    return train(student, [encode(row) for row in mix(traces, general, ratio, seed)])


def main():
    import torch

    import evaluate
    import rewards
    import sft
    from checkpoint import Keeper, drop, kept_rows, read_jsonl, say, write_jsonl
    from command import PROBLEMS, Parser, add_saving, add_template, fields_of, new_directory, open_model, saving
    from data.readers import read_problems, read_rows
    from graphs import with_graphs
    from model import generate, save
    from tokenizer import Tokenizer
    parser = Parser(description="Sample a teacher's verified traces and train a student on them.")
    parser.add_argument("--teacher", required=True, help="model directory")
    parser.add_argument("--student", required=True, help="model directory; the student keeps its own tokenizer")
    parser.add_argument("--data", required=True, help=PROBLEMS)
    parser.add_argument("--general", help='general examples, JSONL rows {"prompt", "completion"}; none: traces alone')
    parser.add_argument("--out", required=True, help="where the student and traces.jsonl go")
    add_template(parser)
    parser.add_argument("--samples", type=int, default=4, help="of each prompt; default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="default %(default)s")
    parser.add_fields(sft.SFTConfig, ("lr", "epochs", "batch_tokens", "row_length", "dtype"))
    add_saving(parser)
    args = parser.parse_args()
    with parser.explained(args.out):
        problems = read_problems(args.data, rewards.check_reference)
        Tokenizer(args.student, args.template).template  # what cannot be asked is refused before the teacher samples
        general = read_rows(args.general, ("prompt", "completion")) if args.general else []
        out = new_directory(args.out)
        if (out / "traces.jsonl").exists() and not (out / "settings.json").exists():
            raise ValueError(f"{out} already holds other traces; choose another --out")

        def sampled(save, resume):
            teacher, tokenizer = open_model(args.teacher, getattr(torch, args.dtype), template=args.template)
            sample = with_graphs(generate)
            random = torch.Generator(device=next(teacher.parameters()).device).manual_seed(0)
            config = evaluate.EvalConfig(samples=args.samples, temperature=1.0, top_p=1.0, max_new_tokens=args.max_new_tokens)
            return evaluate.complete(
                [tokenizer.encode_prompt(e["prompt"]) for e in problems],
                lambda prompts, **settings: sample(teacher, prompts, end_ids=tokenizer.end_ids, generator=random, **settings),
                tokenizer.decode, config, *kept_rows(out / "sampling" / "completions.jsonl", random, save, resume))[0]

        with saving(out, args) as keeper:
            if not (out / "traces.jsonl").exists():
                with Keeper(out / "sampling", ["completions.jsonl"], args.save_every) as sampling:
                    texts = sampled(sampling.save, sampling.resume)
                traces, counts = rejection_sample(problems, texts, rewards.accuracy,
                                                  lambda text, example: rewards.language_consistency(text, example) == 1)
                print(explain(counts))
                write_jsonl(out / "traces.jsonl", traces)
            drop(out / "sampling")
            traces = read_jsonl(out / "traces.jsonl", whole=True)
            student, tokenizer = open_model(args.student, torch.float32, template=args.template)

            def encode(row):
                prompt = tokenizer.encode_prompt(row["prompt"])
                return prompt + tokenizer.encode(row["completion"]) + [tokenizer.end_id], len(prompt)

            examples = [encode(row) for row in (mix(traces, general) if general else traces)]
            print(sft.say_cut(examples, args.row_length), end="")
            sft.train(student, examples, fields_of(args, sft.SFTConfig), save=keeper.save, resume=keeper.resume,
                      log=lambda m: say(f"step {m['step']}/{m['steps']}  loss {m['loss']:.4f}"))
            save(student, out, tokenizer)


if __name__ == "__main__":
    main()

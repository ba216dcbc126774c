"""The script of distill.py: sample a teacher's traces, keep the verified ones, train a student on them; or train it on
its own samples, as the teacher judges their tokens."""

import sys
from dataclasses import dataclass
from functools import partial

import torch

from data.problems import read_rows
from evaluate import EvalConfig, complete
from lab.adapters import open_model
from lab.check_adapter import base_directory
from lab.check_input import check_directory
from lab.checkpoint import Checkpointer, drop, kept_rows, read_jsonl, write_jsonl
from lab.command import Parser, add_memory, add_saving, add_template, fields_of, new_directory, saving
from lab.graphs import generate
from lab.parallel import first, shared, wait
from lab.asking import decoder, same_ids, to_learn, with_room
from lab.scripts import (PAIRS, PROBLEMS, StepPrinter, add_fields_of_rows, choose_max_new_tokens, cut_warning, encoder,
                         in_its_language, open_to_train, read_problem_set, reinforce, rules, save_trained)
from rewards import TAGS
from sft import SFTConfig, adamw, tokenize, train
from tokenizer import Tokenizer


def parse():
    parser = Parser(description="Sample a teacher's verified traces and train a student on them.")
    parser.add_argument("--on-policy", action="store_true", help="train it on its own samples instead, as the teacher "
                        "judges their tokens; with grpo.py's options: --on-policy --help")
    parser.add_argument("--teacher", required=True, help="model directory")
    parser.add_argument("--student", required=True, help="model directory; the student keeps its own tokenizer")
    parser.add_argument("--data", required=True, help=PROBLEMS)
    add_fields_of_rows(parser)
    parser.add_argument("--general", help=f"general examples, {PAIRS}; none: traces alone")
    parser.add_argument("--out", required=True, help="where the student and traces.jsonl go")
    add_template(parser)
    parser.add_argument("--samples", type=int, default=4, help="per prompt; default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, help="default: by the problems, which a line says")
    parser.add_fields(SFTConfig, ("lr", "epochs", "batch_tokens", "micro_batch_rows", "row_length", "dtype"))
    add_memory(parser, leave_out=("cache_tokens",))
    add_saving(parser)
    return parser, parser.parse_with_rows()


@dataclass(frozen=True)
class OnPolicyConfig:
    teacher: str = ""  # model directory
    model: str = ""    # the student's


def on_policy(OnPolicy):
    """grpo.py's script with the teacher in place of the rules, which are only logged."""
    import grpo

    def judged_by_teacher(student, config, dirs):
        check_same_tokenizer(dirs.teacher, dirs.model)
        teacher, _ = open_model(dirs.teacher, getattr(torch, config.dtype))
        return OnPolicy(teacher.requires_grad_(False), partial(grpo.all_logprobs, config=config))

    reinforce("Train a student on its own samples, as a teacher judges their tokens.", grpo.train, grpo.GRPOConfig,
              judged_by_teacher, OnPolicyConfig, on_policy=True, beta=0.0)


def check_same_tokenizer(teacher, student):
    """Raises ValueError where an id may stand for another token: its probability would be of something else."""
    for dir in (teacher, student):
        check_directory(base_directory(dir))
    if not same_ids(*(Tokenizer(base_directory(dir)) for dir in (teacher, student))):
        raise ValueError(f"{teacher} and {student} have different tokenizers: the teacher cannot judge the student's "
                         "tokens; without --on-policy it can")


def run(rejection_sample, explain, distill, OnPolicy):
    if "--on-policy" in sys.argv:
        return on_policy(OnPolicy)
    parser, args = parse()
    with parser.one_line_errors(args.out):
        problems = read_problem_set(args.data, args)
        choose_max_new_tokens(args, problems, EvalConfig)
        check_directory(base_directory(args.student), args.template)  # before the teacher samples
        general = read_rows(args.general, ("prompt", "completion")) if args.general else []
        config = fields_of(args, SFTConfig)
        out = new_directory(args.out)
        path = out / "traces.jsonl"
        if path.exists() and not (out / "settings.json").exists():
            raise ValueError(f"{out} already holds other traces; choose another --out")
        with saving(out, args) as checkpointer:
            if not first(path.exists()):
                problems, texts = sample_teacher(args, problems, out / "sampling")
                traces, counts = rejection_sample(problems, texts, correct=correct, one_language=one_language)
                print(explain(counts))
                write_jsonl(path, traces)
            wait()
            drop(out / "sampling")
            traces = read_jsonl(path, whole=True)
            if not traces:
                raise ValueError(f"{path} is empty: none of the teacher's samples is correct, readable and in the "
                                 "problem's language; another --template, more --samples, or a stronger teacher")
            student, tokenizer = open_to_train(args.student, args, config.seed)
            student.shard()
            rows = [to_learn(row, tokenizer.template) for row in traces]
            general = [to_learn(row, tokenizer.template) for row in general]
            distill(student, rows, general, encode=partial(tokenize, tokenizer=tokenizer),
                    train=partial(fine_tune, config=config, checkpointer=checkpointer))
            save_trained(student, out, tokenizer)


def fine_tune(student, examples, config, checkpointer):
    print(cut_warning(examples, config.row_length), end="")
    device = next(student.model.parameters()).device
    train(student.model, examples, config, log=StepPrinter(checkpointer.dir, device),
          save=student.save(checkpointer.save), resume=student.resume(checkpointer.resume), **student.optimizer(adamw))


def correct(text, example):
    """In the asked form. A teacher that tags no answer, but boxes it, say, is taken as it writes."""
    return rules()["accuracy" if "<answer>" in text else "accuracy_any"](text, example)


def one_language(text, example):
    """All words of the thinking are of the example's language; where nothing says what is thinking, all words."""
    if any(tag in text for tag in TAGS):
        return in_its_language(text, example)
    return in_its_language(f"{text}</think>", example)


def sample_teacher(args, problems, dir):
    """(problems, texts): completions of each problem that leaves room for an answer, saved in `dir` as they come."""
    teacher, tokenizer = open_model(args.teacher, getattr(torch, args.dtype), template=args.template)
    generator = torch.Generator(device=next(teacher.parameters()).device).manual_seed(0)
    sample = partial(shared(generate), teacher, end_ids=tokenizer.end_ids, generator=generator)
    encode, context = encoder(tokenizer), teacher.config.max_position_embeddings
    problems = with_room(problems, encode, context, args.max_new_tokens, args.data)
    config = EvalConfig(args.samples, temperature=1.0, top_p=1.0, max_new_tokens=args.max_new_tokens)
    with Checkpointer(dir, ["completions.jsonl"], args.save_every) as checkpointer:
        done, log = kept_rows(dir / "completions.jsonl", generator, checkpointer.save, checkpointer.resume)
        prompts, decode = [encode(problem) for problem in problems], decoder(tokenizer, problems)
        texts, _ = complete(prompts, sample, decode, config, done, log)
    return problems, texts

"""The scripts on model directories: of grpo.py and its variants, sft.py and evaluate.py.

They get what they run as arguments, so that no file here imports the one that called it.
"""

from functools import partial

import torch

import rewards
from data.math_answers import READERS, read_both, read_end
from data.problems import read_problems, read_rows
from lab import records, watch
from lab.adapters import open_model, save_adapters
from lab.architectures import read_config, save
from lab.asking import decoder, to_learn, with_room
from lab.check_adapter import base_directory
from lab.check_input import check_directory, check_example, check_length_buffer
from lab.checkpoint import FiniteGuard, is_first, print_flush, save_directory
from lab.command import (Parser, add_foretelling, add_going_on, add_memory, add_saving, add_template, fast_dtype,
                         fields_of, new_directory, saving, tell_of_unused_gpu)
from lab.graphs import generate
from lab.judges import models_among, select_with
from lab.lots import in_lots
from lab.memory import Memory, report
from lab.own_rules import chosen_rules, chosen_weights
from lab.parallel import shared
from lab.trainee import Trainee
from tokenizer import Tokenizer
from variants.configs import METHODS, PUBLISHED, SAMPLING
from variants.dapo import DAPO, DAPOConfig
from variants.reward_model import draw_once

FOR_PROBLEM_SETS = 512  # new tokens: GSM8K's outputs have medians of 248-315
PROBLEMS = "JSONL, JSON or CSV: GSM8K, MATH, Countdown, or rows {prompt, answer} (data/problems.py, data/forms.py)"
PAIRS = 'JSONL, JSON or CSV: rows {"prompt", "completion"}, or "messages" (data/forms.py)'


def final_answer(completion, example):
    """What a completion votes for: the reference where it is right; a text that no rule reads only beside another."""
    answer, reference = rewards.final_answer(completion, read_both, read_end), read_both(example["answer"])
    return answer and reference and answer.vote(reference)


def rules():
    """{name: rule} of rewards.py, which a caller may have extended, with the accuracies reading MATH's answers."""
    return rewards.rules_with(**READERS)


def in_its_language(text, example):
    """Whether all words of the thinking are of the example's language."""
    return rules()["language_consistency"](text, example) == 1


def add_fields_of_rows(parser):
    parser.add_argument("--prompt-field", metavar="NAME", help="where a row's prompt stands, if under another name")
    parser.add_argument("--answer-field", metavar="NAME", help="and its answer; NAME.NAME: one within another")


def read_problem_set(path, args=None):
    """The examples of a problem set, whose reference answers are compared by value or, as is printed, as text.

    args: the command line's, with add_fields_of_rows's options. Raises ValueError with the file and line of a row that
    is no example.
    """
    names = getattr(args, "prompt_field", None), getattr(args, "answer_field", None)
    examples = read_problems(path, partial(check_example, read=read_both), *names)
    texts = [example["answer"] for example in examples
             if example["kind"] == "reasoning" and read_both(example["answer"]).value is None]
    if texts:
        print(f"{path}: {len(texts)} of {len(examples)} reference answers are compared as text, such as "
              f"{texts[0][:60]!r}", flush=True)
    return examples


def choose_max_new_tokens(args, examples, config_class):
    """Sets args.max_new_tokens where it was not given: the dataclass's default is for the mini-world's answers."""
    if args.max_new_tokens is not None:
        return
    args.max_new_tokens = config_class().max_new_tokens
    if not all("level" in example or "reply" in example for example in examples):  # that only the mini-world's have
        args.max_new_tokens = FOR_PROBLEM_SETS
        print(f"max_new_tokens {FOR_PROBLEM_SETS}, the default for problem sets: below stands how many outputs it cuts",
              flush=True)


def encoder(tokenizer):
    """encode(example) -> the ids of its prompt"""
    return lambda example: tokenizer.encode_prompt(example["prompt"])


def open_to_train(dir, args, seed):
    """(Trainee, tokenizer) of a directory, trained as the command line's options say, which a line repeats."""
    memory = fields_of(args, Memory)
    model, tokenizer = open_model(dir, memory.dtype(args.dtype), template=args.template)
    if next(model.parameters()).device.type == "cpu":
        tell_of_unused_gpu()
    trainee = Trainee(model, memory, dir, seed)
    how = [f"{args.dtype} on {next(model.parameters()).device}"]
    if memory.lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        how.append(f"LoRA of rank {memory.lora}: {trained:,} parameters are trained")
    if memory.offload_optimizer:
        how.append("Adam on the CPU")
    print(", ".join(how), flush=True)
    return trainee, tokenizer


def foretell(args, config, examples=()):
    """Prints what a training of args.model will take of memory, before anything of it is loaded."""
    if args.shard:
        raise ValueError("memory: the formula is of one process, without --shard")
    base = base_directory(args.model)
    check_directory(base, args.template)
    sizes, encode = read_config(base), encoder(Tokenizer(base, args.template))
    if sizes.model_type == "deepseek_v3":
        raise ValueError(f"memory: the formula is of dense models, {base} is a deepseek_v3")
    longest = max((len(encode(example)) for example in examples), default=0)
    room = max(1, sizes.max_position_embeddings - getattr(config, "max_new_tokens", 0))
    print(report(sizes, fields_of(args, Memory), config, min(longest, room)), flush=True)


def save_model(model, dir, tokenizer):
    save_directory(dir, partial(save, model, tokenizer=tokenizer))


def save_trained(trainee, dir, tokenizer):
    """Writes the trained model in float32; adapters in addition, as PEFT does, in its folder `adapter`."""
    if trainee.memory.lora:
        save_directory(dir / "adapter", partial(save_adapters, trainee.model, trainee.dir))
    save_model(trainee.whole(), dir, tokenizer)


def parse_reinforce(description, config_class, estimator_config, defaults, leave_out=(), on_policy=False):
    """(parser, arguments) of a script that reinforces; defaults: {an option: the method's default}.

    leave_out: fields of Memory that the script does not offer; on_policy: distill.py's, whose model is the student.
    """
    parser = Parser(description=description)
    if on_policy:
        parser.add_argument("--on-policy", action="store_true", help="what this page is of")
        parser.add_argument("--student", dest="model", required=True, help="model directory")
    else:
        parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--data", required=True, help=PROBLEMS)
    add_fields_of_rows(parser)
    parser.add_argument("--out", required=True, help="where the trained model goes")
    parser.add_argument("--rewards", nargs="+", default=["accuracy", "format"], metavar="NAME",
                        help=f"of {', '.join(rules())}; or FILE.py:NAME, a function (completion, example) -> float of "
                             "your own, whose file is run; or reward_model:DIR (variants/reward_model.py); default: "
                             "accuracy format")
    parser.add_argument("--reward-weights", nargs="+", type=float, metavar="WEIGHT",
                        help="one for each of --rewards; 0 only logs it; default: 1 each")
    parser.add_argument("--config", choices=PUBLISHED | METHODS,
                        help="a paper's settings (variants/configs.py) as defaults")
    add_template(parser)
    parser.add_fields(config_class)
    parser.add_fields(DAPOConfig)
    if estimator_config is not None:
        parser.add_fields(estimator_config, estimator_config.__dataclass_fields__.keys() - {"model"})
    add_memory(parser, leave_out)
    if estimator_config is None:  # what a variant adds is not in the formula
        add_foretelling(parser)
    add_saving(parser)
    add_going_on(parser)
    name = parser.parse_args().config
    published = (PUBLISHED | METHODS).get(name, {}) | SAMPLING.get(name, {})
    parser.set_defaults(**defaults | published)
    return parser, parser.parse_args()  # a second time, with the defaults of the paper that --config names


def reinforce(description, train, config_class, estimator_class=None, estimator_config=None, make_optimizer=None,
              on_policy=False, **defaults):
    """The script of grpo.py, and of the variants that put another advantage estimator in place of the group advantages.

    estimator_class(model, config, estimator_config's fields) makes what `train` takes as advantage_estimator;
    make_optimizer: train's default, which may then run on the CPU; on_policy: distill.py's, whose rules only log;
    `defaults`: the options whose default the method changes.
    """
    leave_out = () if make_optimizer else ("offload_optimizer",)
    parser, args = parse_reinforce(description, config_class, estimator_config, defaults, leave_out, on_policy)
    with parser.one_line_errors(args.out):
        models, asked = models_among(args.rewards), chosen_weights(args.rewards, args.reward_weights)
        names = [name for name in args.rewards if name not in models]
        chosen = chosen_rules(names, rules())
        weights = {rule: 0.0 if on_policy else asked.get(name, 1.0) for rule, name in zip(chosen, names)}
        examples = read_problem_set(args.data, args)
        choose_max_new_tokens(args, examples, config_class)
        config, dapo = fields_of(args, config_class), fields_of(args, DAPOConfig)
        check_length_buffer(dapo, config)
        fields_of(args, Memory).check(config)
        if getattr(args, "memory", False):
            foretell(args, config, examples)
        trainee, tokenizer = open_to_train(args.model, args, config.seed)
        model, encode = trainee.model, encoder(tokenizer)
        examples = with_room(examples, encode, model.config.max_position_embeddings, config.max_new_tokens, args.data)
        out = new_directory(args.out, may_go_on=args.keep_state)
        in_place = trainee.optimizer(make_optimizer)
        if estimator_class is not None:
            in_place["advantage_estimator"] = estimator_class(model, config, fields_of(args, estimator_config))
        trainee.shard(in_place.get("advantage_estimator"))
        keep = getattr(in_place.get("advantage_estimator"), "keep", None)
        if keep is not None or dapo != DAPOConfig():
            in_place["select"] = DAPO(dapo, config.max_new_tokens, keep).select
        if models:
            of_models = {dir: asked.get(name, 1.0) for name, dir in models.items()}
            device = next(model.parameters()).device
            in_place["select"] = select_with(of_models, device, config.dtype, in_place.get("select", draw_once))
        print("the loss says nothing here: its value is about 0 while it learns (a group's advantages sum to 0); "
              "watch the reward, KL, clip fraction, entropy and gradient norm", flush=True)
        with saving(out, args) as checkpointer:
            def save(**parts):
                is_last = parts["step"] == config.rollouts
                trainee.save(checkpointer.save_last if is_last and args.keep_state else checkpointer.save)(**parts)

            train(model, examples,
                  encode=encode, decode=decoder(tokenizer, examples),
                  generate=shared(in_lots(generate, args.cache_tokens)), end_ids=tokenizer.end_ids,
                  rewards=chosen, weights=weights, config=config,
                  log=Printer(config, out, next(model.parameters()).device), save=save,
                  resume=trainee.resume(checkpointer.resume), **in_place)
            save_trained(trainee, out, tokenizer)


class Printer:
    """The log of a script that reinforces: a line per rollout, warnings, and now and then a sample; all this in files,
    as a stage of the recipe leaves them."""

    def __init__(self, config, dir, device):
        self.config, self.dir, self.device, self.rows, self.guard = config, dir, device, [], FiniteGuard(dir)

    def __call__(self, metrics, rollout):
        records.take_means_where_rules_apply(metrics, rollout)
        records.write_metrics(self.dir, metrics, self.device)
        if not self.rows and metrics["step"] > 1 and is_first():  # resumed
            self.rows = records.earlier_rows(self.dir, metrics)[:-1]
        self.rows.append(metrics)
        print_flush(f"rollout {metrics['step']}/{self.config.rollouts}  reward {metrics['reward']:.3f}  "
                    f"length {metrics['length']:.0f}  kl {metrics['kl']:.4f}  clipped {metrics['clip_fraction']:.3f}  "
                    f"entropy {metrics['entropy']:.2f}  grad norm {metrics['grad_norm']:.2f}  "
                    f"cut {metrics['unfinished']:.0%}  no signal {metrics['no_signal']:.0%}"
                    + (f"  reverse kl {metrics['reverse_kl']:.3f}" if "reverse_kl" in metrics else ""))
        for line in watch.new_warnings(self.rows):
            print_flush(f"  {line}")
            records.write_warning(self.dir, metrics["step"], line)
        if (metrics["step"] - 1) % self.config.validate_every == 0:
            print_flush(f"  {rollout.examples[0]['prompt']!r}")
            print_flush(f"  {rollout.texts[0]!r}: {rollout.rewards[0, 0].item():.2f}")
            records.write_samples(self.dir, metrics["step"], rollout)
        self.guard.check_rl(metrics, rollout, self.config)


def cut_warning(examples, row_length):
    """A line on examples longer than a row, which lose their end and the end token with it; "" if there are none."""
    cut = sum(len(ids) > row_length for ids, _ in examples)
    return f"{cut} of {len(examples)} examples are longer than row_length {row_length} and are cut\n" if cut else ""


def unfinished(ids, lengths, end_ids):
    """How many completions have no end token: of ids (B, L), lengths (B,)."""
    last = ids.gather(1, lengths[:, None] - 1)
    return int((~torch.isin(last, torch.tensor(end_ids, device=ids.device))).sum())


class StepPrinter:
    """The log of a script that fine-tunes: a line per step, and its metrics."""

    def __init__(self, dir, device):
        self.dir, self.device, self.guard = dir, device, FiniteGuard(dir)

    def __call__(self, m, batch):
        if m["step"] % 10 == 0 or m["step"] == m["steps"] or m["skipped"]:
            records.write_metrics(self.dir, m, self.device)
        print_flush(f"step {m['step']}/{m['steps']}  loss {m['loss']:.4f}  grad norm {m['grad_norm']:.2f}  "
                    f"lr {m['lr']:.1e}")
        self.guard.check_sft(m, batch)


def fine_tune(config_class, tokenize, train, make_optimizer):
    """The script of sft.py."""
    parser = Parser(description="Supervised fine-tuning of a model directory.")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--data", required=True, help=PAIRS)
    parser.add_argument("--out", required=True, help="where the trained model goes")
    add_template(parser)
    parser.add_argument("--pretrain", action="store_true", help="put the loss on the prompt too")
    parser.add_fields(config_class, ("lr", "epochs", "batch_tokens", "micro_batch_rows", "row_length", "dtype", "seed"))
    add_memory(parser, leave_out=("cache_tokens",))
    add_foretelling(parser)
    add_saving(parser)
    args = parser.parse_with_rows()
    with parser.one_line_errors(args.out):
        config, rows = fields_of(args, config_class), read_rows(args.data, ("prompt", "completion"))
        if args.memory:
            foretell(args, config)
        trainee, tokenizer = open_to_train(args.model, args, config.seed)
        trainee.shard()
        out = new_directory(args.out)
        examples = [tokenize(to_learn(row, tokenizer.template), tokenizer, args.pretrain) for row in rows]
        print(cut_warning(examples, config.row_length), end="")
        with saving(out, args) as checkpointer:
            train(trainee.model, examples, config, log=StepPrinter(out, next(trainee.model.parameters()).device),
                  save=trainee.save(checkpointer.save), resume=trainee.resume(checkpointer.resume),
                  **trainee.optimizer(make_optimizer))
            save_trained(trainee, out, tokenizer)


def measure_directory(config_class, complete, measure, summarise):
    """The script of evaluate.py."""
    parser = Parser(description="Measure a model directory on problems and requests.")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--data", required=True, help=PROBLEMS)
    add_fields_of_rows(parser)
    add_template(parser)
    parser.add_argument("--dtype", default=fast_dtype(), choices=("bfloat16", "float16", "float32"),
                        help="default %(default)s")
    parser.add_fields(config_class)
    args = parser.parse_args()
    with parser.one_line_errors():
        examples = read_problem_set(args.data, args)
        choose_max_new_tokens(args, examples, config_class)
        config = fields_of(args, config_class)
        model, tokenizer = open_model(args.model, getattr(torch, args.dtype), template=args.template)
        encode, context = encoder(tokenizer), model.config.max_position_embeddings
        examples = with_room(examples, encode, context, config.max_new_tokens, args.data)
        decode = decoder(tokenizer, examples)
        generator = torch.Generator(device=next(model.parameters()).device).manual_seed(config.seed)
        cut = []  # of each batch, how many outputs have no end token

        def sample(prompts, **settings):
            result = shared(generate)(model, prompts, end_ids=tokenizer.end_ids, generator=generator, **settings)
            cut.append(unfinished(*result[:2], tokenizer.end_ids))
            return result

        def thinking_tokens(text):
            return len(tokenizer.encode(rewards.split(text)[0]))

        for kind in ("reasoning", "general", "safety"):
            rows = [example for example in examples if example["kind"] == kind]
            if not rows:
                continue
            cut.clear()
            texts, counts = complete([encode(example) for example in rows], sample, decode, config)
            values = measure(rows, texts, counts, rules(), final_answer, rewards.thinks, thinking_tokens,
                             ks=sorted({1, config.samples}))
            print(f"{kind}: {len(rows)} rows, {config.samples} samples each, {sum(cut) / counts.size:.0%} of them cut "
                  f"by max_new_tokens {config.max_new_tokens}")
            for name, (mean, low, high) in summarise(values).items():
                print(f"  {name:26} {mean:8.3f}  [{low:.3f}, {high:.3f}]")

"""Where a run's models and problems come from: the mini-world, or files of the user's own.

Both sources have the same attributes and methods, so that pipeline.py's recipe is written once:

  test, hard, general, safety, validation, problems    lists of examples; hard, general and safety may be empty
  students, default_controls           the names of the smaller models; of those that RL alone is tried on
  has_requests, has_tag_tokens, has_searches    what some stages and measurements need
  settings(), identity()               what tells one source from another, for config.json and results.json
  tokenizer_of(stage)                  the tokenizer of a stage's model
  adapt(table)                         the table of stages, where this source differs from it
  is_given(stage), directory(run, stage), base(run)    models that need no training; making a base
  in_any_one_language(text, example), rewrite(row)     the cold start's filter, and its rewriting
  general_examples(), rl2_prompts()    what joins late in the recipe
  left_out(stages)                     lines that say what the recipe does without here
"""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import rewards
from data import world
from data.problems import read_rows
from lab import checkpoint
from lab.architectures import read_config
from lab.asking import same_ids, with_room
from lab.check_adapter import base_directory
from lab.check_input import check_directory
from lab.scripts import encoder, in_its_language, read_problem_set
from sft import SFTConfig
from tokenizer import Tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
TEST_DRAW = 3  # the number of the test's draw; one more when the recipe has changed since the test was last used


class MiniWorld:
    """data/world.py: everything is made from a seed, the bases are pretrained on its documents."""

    students = ("qwen", "llama")
    default_controls = ("qwen",)
    has_requests = True    # general and unsafe ones, beside the problems
    has_tag_tokens = True  # "</think>" is one token, so that thinking can be cut there
    has_searches = True    # data/search.py says how far rules get without one, and how a text searches

    def __init__(self, preset, seed):
        self.preset, self.seed = preset, seed
        self.tokenizer = Tokenizer(DATA)
        split = "test" if seed < 100 else "validation"  # seeds from 100 on are for tuning
        self.test = world.problems(TEST_DRAW, split, preset.test)
        self.hard = world.problems(TEST_DRAW, split, preset.hard, world.HARD_LEVELS)
        self.general = world.requests(TEST_DRAW, split, preset.requests, "general")
        self.safety = world.requests(TEST_DRAW, split, preset.requests, "safety")
        self.validation = world.problems(0, "validation", min(192, preset.test))
        self.problems = world.problems(seed, "train", preset.problems)

    def settings(self):
        return {}

    def identity(self):
        return world.world_hash()

    def tokenizer_of(self, stage):
        return self.tokenizer

    def adapt(self, table):
        return table

    def is_given(self, stage):
        return False

    def directory(self, run, stage):
        return run.out / stage

    def base(self, run):
        """Next-token training from random weights; the students' corpus is smaller and holds few chains of thought."""
        p = self.preset
        if run.name == "base":
            model, corpus = run.new_model(p.model), world.corpus(self.seed, p.documents)
        else:
            family = {"base_qwen": "qwen3", "base_llama": "llama"}[run.name]
            model = run.new_model(p.student | {"model_type": family})
            corpus = world.corpus(self.seed + 1000, p.student_documents, styles=world.CORPUS["student_styles"])
        return run.sft(model, corpus, p.pretrain, pretraining=True)

    def in_any_one_language(self, text, example):
        """All words of the thinking are of one language, whichever it is: `rewrite` translates them."""
        return any(in_its_language(text, {**example, "language": language}) for language in ("en", "zh"))

    def rewrite(self, row):
        """The thinking in the problem's language, mechanically, and a summary as the answer."""
        thinking = world.translate(rewards.split(row["completion"])[0], row["language"])
        return {**row, "completion": world.tagged(thinking, world.summary(row["answer"], row["language"]))}

    def left_out(self, stages):
        return []

    def general_examples(self):
        return world.general_sft(self.seed, self.preset.trace_prompts)

    def rl2_prompts(self, general_from=None, rollouts=None):
        """RL-2's prompts: problems first; late, of every 4 one is a problem, one general, two unsafe.

        R1 v2 B.5: in the last 400 of 1,700 steps. The arguments stand in place of the preset's.
        """
        config = self.preset.rl2
        total = (rollouts or config.rollouts) * config.prompts_per_rollout
        late = round((self.preset.rl2_general_from if general_from is None else general_from) * total)
        pools = {
            "reasoning": itertools.cycle(self.problems[::-1]),
            "general": iter(world.requests(self.seed, "train", total, "general")),
            "safety": iter(world.requests(self.seed, "train", total, "safety")),
        }
        kinds = ["reasoning"] * late + ["reasoning", "safety", "general", "safety"] * (total - late)
        return [next(pools[kind]) for kind in kinds[:total]]


class OwnModel:
    """A checkpoint (any dense Llama, Qwen2 or Qwen3) and a problem set (any of data/problems.py) of the user's own.

    The base and the students are provided, not trained. What a set has no data for is left out, and the run says so:
    general and unsafe requests (but --general brings examples for SFT-2), and the translation of the cold start.
    """

    default_controls = ()
    has_requests = False
    has_tag_tokens = False
    has_searches = False

    def __init__(self, args, preset):
        """args: the command line's base, student, train, test, general, template, seed. What is wrong shows here."""
        self.args, self.preset = args, preset
        template = None if args.template == "own" else args.template
        for dir in (args.base, *args.student):
            check_directory(base_directory(dir), template)
        self.students = student_names(args.student)
        self.directories = {"base": args.base} | {f"base_{name}": dir for name, dir in self.students.items()}
        self.tokenizers = {name: Tokenizer(base_directory(dir), template) for name, dir in self.directories.items()}
        for tokenizer in self.tokenizers.values():
            tokenizer.template  # a chat template that is not known is refused
        self.hard, self.general, self.safety = [], [], []
        self.read_problems()

    def read_problems(self):
        args = self.args
        self.test = self.with_room(reasoning_problems(args.test_file, args)[:self.preset.test], args.test_file)
        tested = {words_of(example) for example in self.test}
        rows = self.with_room(reasoning_problems(args.train, args), args.train)
        distinct = {words_of(example): example for example in rows if words_of(example) not in tested}
        problems = list(distinct.values())
        say_left_out(args.train, rows, problems)
        examples = read_rows(args.general, ("prompt", "completion")) if args.general else []
        self.examples = [example for example in examples if words_of(example) not in tested]
        say_left_out(args.general, examples, self.examples)
        random.Random(args.seed).shuffle(problems)
        held_out = min(192, len(problems) // 10)  # for the curve of validation accuracy
        self.validation, self.problems = problems[:held_out], problems[held_out:]
        if not self.validation:
            raise ValueError(f"{args.train} has {len(problems)} problems that are not in the test: "
                             "there must be 10 or more")

    def with_room(self, problems, path):
        """The problems that leave room for an answer, in each model's tokens and context."""
        for name, tokenizer in self.tokenizers.items():
            dir = self.directories[name]
            problems = with_room(problems, encoder(tokenizer), config_of(dir).max_position_embeddings,
                                 self.preset.zero.max_new_tokens, f"{path}, in tokens of {dir}")
        return problems

    def fit(self, preset):
        """The preset with rows of SFT no longer than the shortest context."""
        context = min(config_of(dir).max_position_embeddings for dir in self.directories.values())
        shorter = {name: replace(config, row_length=min(config.row_length, context))
                   for name, config in vars(preset).items() if isinstance(config, SFTConfig)}
        return replace(preset, **shorter)

    def settings(self):
        """Paths, and the content of the problem sets. Students may join later."""
        args, files = self.args, {}
        for name, path in (("train", args.train), ("test", args.test_file), ("general", args.general)):
            files[name] = [str(Path(path).resolve()), checkpoint.file_hash(path)] if path else None
        for name in ("prompt_field", "answer_field"):
            if getattr(args, name) is not None:
                files[name] = getattr(args, name)
        return {"own": {"base": str(Path(args.base).resolve()), "template": args.template, **files}}

    def contents(self):
        """{model: a hash of its directory's content}"""
        return {name: checkpoint.content_hash(base_directory(dir)) for name, dir in self.directories.items()}

    def identity(self):
        return "own model"

    def tokenizer_of(self, stage):
        """A student's stages take the student's tokenizer."""
        family = stage.partition("_")[2]
        return self.tokenizers.get(f"base_{family}", self.tokenizers["base"])

    def adapt(self, table):
        changes = {"dev1": {"by": "SFT on samples of zero"}, "r1": {"by": "GRPO: accuracy + format + language, T 0.7"}}
        if not self.examples:
            changes["dev3"] = {"by": "SFT on traces"}
        for name, dir in self.directories.items():
            changes[name] = {"starts_from": "", "by": f"own model: {Path(dir).resolve()}", "paper": ""}
        table = table | {name: replace(table[name], **change) for name, change in changes.items()}
        for name in self.students:
            if not same_ids(self.tokenizers["base"], self.tokenizers[f"base_{name}"]):
                del table[f"on_policy_{name}"]  # r1 cannot judge the tokens of another tokenizer
        return table

    def is_given(self, stage):
        return stage in self.directories

    def directory(self, run, stage):
        return Path(self.directories.get(stage, run.out / stage))

    def base(self, run):
        return run.model(run.name)

    def in_any_one_language(self, text, example):
        return in_its_language(text, example)

    def rewrite(self, row):
        return row

    def left_out(self, stages):
        """What the recipe does without, in these stages, since a problem set has no data for it."""
        lines = []
        if not self.examples and any(name == "dev3" or name.startswith("student_") for name in stages):
            lines.append("no --general examples: SFT-2 and the students learn from traces alone")
        if "r1" in stages:
            lines.append("no general or unsafe requests: RL-2 is by accuracy, format and language alone, at T 0.7")
        return lines

    def general_examples(self):
        return self.examples

    def rl2_prompts(self):
        return self.problems[::-1]


def student_names(directories):
    """{"qwen": its directory, "llama": ..., "qwen_3": ...}: by family, numbered where a family comes twice."""
    names = {}
    for number, dir in enumerate(directories, 1):
        family = {"llama": "llama", "deepseek_v3": "deepseek"}.get(config_of(dir).model_type, "qwen")
        name = f"{family}_{number}" if family in names else family
        names[name] = dir
    return names


def config_of(dir):
    return read_config(base_directory(dir))


def words_of(example):
    """The prompt, spaces aside: what tells whether two examples are the same."""
    return " ".join(example["prompt"].split())


def reasoning_problems(path, args):
    rows = read_problem_set(path, args)
    problems = [example for example in rows if example["kind"] == "reasoning"]
    if len(problems) < len(rows):
        print(f"{path}: {len(rows) - len(problems)} of {len(rows)} rows are no problems: left out", flush=True)
    return problems


def say_left_out(path, before, after):
    if len(after) < len(before):
        print(f"{path}: {len(before) - len(after)} of {len(before)} stand in the test or twice: left out", flush=True)


def open_source(args, preset):
    """(the source of models and problems that the command line asks for, the preset fitted to it)"""
    if args.base:
        source = OwnModel(args, preset)
        return source, source.fit(preset)
    return MiniWorld(preset, args.seed), preset

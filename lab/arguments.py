"""pipeline.py's command line: one set of options for the mini-world and for a model and problems of one's own."""

import shlex
from dataclasses import replace
from pathlib import Path

import torch

from grpo import GRPOConfig
from lab import checkpoint
from lab.check_input import check_settings
from lab.command import Parser, add_memory, add_template, fast_dtype, fields_of
from lab.scripts import PAIRS, PROBLEMS, add_fields_of_rows
from lab.memory import Memory
from lab.trainee import check_can_shard
from sft import SFTConfig
from tokenizer import TEMPLATES

RL_OPTIONS = ("rollouts", "prompts_per_rollout", "group_size", "minibatches", "lr", "warmup", "beta", "max_new_tokens",
              "micro_batch_tokens", "validate_every")
SFT_OPTIONS = {"sft_lr": "lr", "sft_epochs": "epochs", "sft_batch_tokens": "batch_tokens", "row_length": "row_length"}
SIZES = {  # option: (field of the preset, what it counts)
    "samples": ("samples", "per test problem"),
    "cold_start": ("cold_start", "examples of the cold start"),
    "trace_prompts": ("trace_prompts", "problems to sample traces of"),
    "trace_samples": ("trace_samples", "traces sampled of each of them"),
    "test_problems": ("test", "problems of the test, at most"),
}
PREFERENCES = ("judges", "r1_model", "r1_long")  # stages that --preferences model adds
OWN_ONLY = ("train", "test_file", "prompt_field", "answer_field", "general", "student", "template", "lora",
            "offload_optimizer")  # with --base
WRITTEN = {"from_stage": "from", "test_file": "test"}  # options whose name differs from their argument's


def make_parser(presets):
    parser = Parser(description="The DeepSeek-R1 recipe, from random weights to distilled students.",
                    allow_abbrev=False)
    parser.add_argument("--preset", choices=[name for name in presets if name != "own"],
                        help="the mini-world's sizes; default: gpu where there is CUDA, else cpu")
    parser.add_argument("--architecture", choices=("dense", "deepseek-v3"), default="dense",
                        help="of the mini-world's base, and of all that is trained from it; the students are dense")
    parser.add_argument("--out", help="run directory; default runs/PRESET-SEED, or runs/NAME-SEED with --base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", metavar="NAME,NAME",
                        help="only some: base, zero, dev1, dev2, traces, dev3, r1, students, controls, or a single one "
                             "such as student_qwen; base,zero is a taste of a few minutes")
    parser.add_argument("--from", dest="from_stage", metavar="STAGE",
                        help="re-run this stage and the later ones; after a stop the same command resumes")
    parser.add_argument("--ablations", action="store_true", help="also stages beside the recipe; most are for a claim")
    parser.add_argument("--preferences", choices=("rules", "model"), default="rules",
                        help="model: also RL-2 with reward models in place of the rules of helpfulness and "
                             "harmlessness, as it is and for too long")
    parser.add_argument("--compare", action="store_true", help="GRPO, its relatives, PPO and PRIME side by side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        help="of forward passes; default: the faster one here")
    add_memory(parser)
    add_own_model(parser)
    add_sizes(parser)
    return parser


def add_own_model(parser):
    own = parser.add_argument_group("a model and problems of your own")
    own.add_argument("--base", metavar="DIR", help="Hugging Face directory: dense Llama, Qwen2, Qwen3; DeepSeek-V3")
    own.add_argument("--train", metavar="FILE", help=PROBLEMS)
    own.add_argument("--test", dest="test_file", metavar="FILE", help="the same; never trained on")
    add_fields_of_rows(own)
    own.add_argument("--student", action="append", default=[], metavar="DIR",
                     help="a smaller model to train on the traces; may be repeated")
    own.add_argument("--general", metavar="FILE", help=f"examples for SFT-2, {PAIRS}")
    add_template(own, ("own", *TEMPLATES), "r1-zero; own: as each directory says")


def add_sizes(parser):
    group = parser.add_argument_group("sizes and settings, in place of the preset's")
    for name in RL_OPTIONS:
        default = getattr(GRPOConfig(), name)
        group.add_argument(f"--{name.replace('_', '-')}", type=type(default), help="of every RL stage")
    group.add_argument("--offload-reference", action="store_true", default=None,
                       help="of every RL stage: it stays in the CPU's memory")
    for name, field in SFT_OPTIONS.items():
        default = getattr(SFTConfig(), field)
        group.add_argument(f"--{name.replace('_', '-')}", type=type(default), help="of every SFT stage but pretraining")
    for name, (_, what) in SIZES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int, help=what)


def parse_arguments(presets):
    """(parser, args). args.preset is the name of one of `presets`; args.out and args.template are filled in."""
    parser = make_parser(presets)
    args = parser.parse_args()
    command, whole_recipe = written(parser, args), written(parser, args, leave_out=("stages", "from_stage"))
    args.command, args.whole_recipe = command, whole_recipe
    if args.base:
        check_own(parser, args)
        args.preset, args.template = "own", args.template or "r1-zero"
        args.out = args.out or f"runs/{Path(args.base).resolve().name}-{args.seed}"
        return parser, args
    for name in OWN_ONLY:
        if getattr(args, name):
            parser.error(f"--{WRITTEN.get(name, name).replace('_', '-')} goes with --base, a model of your own")
    if args.preset is None:
        args.preset = "gpu" if args.device.startswith("cuda") else "cpu"
    kind = "" if args.architecture == "dense" else f"-{args.architecture}"
    args.out = args.out or f"runs/{args.preset}{kind}-{args.seed}"
    return parser, args


def check_own(parser, args):
    if args.preset is not None:
        parser.error(f"--preset {args.preset} is of the mini-world: it does not go with --base")
    if args.preferences != "rules":
        parser.error("--preferences is of the mini-world: grpo.py takes a reward model of your own")
    if args.architecture != "dense":
        parser.error("--architecture is of the mini-world: with --base the directory says what it is")
    if not args.train or not args.test_file:
        parser.error("--base needs --train FILE and --test FILE")


def written(parser, args, leave_out=()):
    """The command line that gives these arguments."""
    words = ["python pipeline.py"]
    for name, value in vars(args).items():
        if name in leave_out or value == parser.get_default(name):
            continue
        option = "--" + WRITTEN.get(name, name).replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [f"{option} {quoted(item)}" for item in value]
        else:
            words.append(f"{option} {quoted(value)}")
    return " ".join(words)


def quoted(value):
    """As a shell takes it; a template's line breaks as they may be typed."""
    return shlex.quote(str(value).replace("\n", "\\n"))


# ------------------------------------------------------------------------------------------- the preset, as asked for

def preset_of(args, presets):
    """The preset with what the command line changes. Raises ValueError for what is out of range."""
    preset = presets[args.preset]
    rl = chosen(args, {name: name for name in (*RL_OPTIONS, "offload_reference")})
    sft = chosen(args, SFT_OPTIONS)
    stages = {}
    for name, stage in vars(preset).items():
        if isinstance(stage, GRPOConfig):
            stages[name] = replace(stage, **rl)
        elif isinstance(stage, SFTConfig) and name != "pretrain" and sft:
            batch_tokens = max(stage.batch_tokens, sft.get("row_length", 0))
            stages[name] = replace(stage, **{"batch_tokens": batch_tokens} | sft)
    counts = chosen(args, {name: field for name, (field, _) in SIZES.items()})
    for name, (field, _) in SIZES.items():
        if counts.get(field, 1) < 1:
            raise ValueError(f"{name} {counts[field]} must be positive")
    if "samples" in counts:
        counts["zero_samples"] = counts["samples"]
    for config in stages.values():
        check_settings(config)
    return in_dtype(replace(preset, **stages, **counts), args.dtype or fast_dtype(args.device))


def memory_of(args, preset):
    """The Memory that the command line asks for. Raises ValueError where it does not go with the rest."""
    memory = fields_of(args, Memory)
    for config in vars(preset).values():
        if isinstance(config, GRPOConfig):
            memory.check(config)
    if memory.offload_optimizer and args.compare:
        raise ValueError("--offload-optimizer does not go with --compare: a critic steps on the GPU")
    return memory


def chosen(args, options):
    """{field: value} of the options that were given."""
    return {field: getattr(args, name) for name, field in options.items() if getattr(args, name) is not None}


def in_dtype(preset, dtype):
    """The preset with this dtype in all its stages."""
    stages = {name: stage for name, stage in vars(preset).items() if isinstance(stage, (SFTConfig, GRPOConfig))}
    return replace(preset, **{name: replace(stage, dtype=dtype) for name, stage in stages.items()})


def chosen_stages(args, table, source):
    """The names of the stages to make, in the table's order. Raises ValueError for a stage that cannot be made."""
    if args.from_stage is not None and args.from_stage not in table:
        raise ValueError(f"stage {args.from_stage!r} is none of {', '.join(table)}")
    if args.compare and not checkpoint.is_alone():
        raise ValueError("--compare runs each method in a process of its own: start it without torchrun")
    if args.shard:
        check_can_shard()
    chosen = named_stages(args.stages, table, source, args.ablations)
    if not args.compare:
        check_stages(Path(args.out), source, table, chosen)
    return chosen


def named_stages(names, table, source, ablations):
    """names: the option --stages, or None: the whole recipe."""
    groups = {"students": [f"{kind}_{name}" for name in source.students for kind in ("base", "student")],
              "controls": [f"control_{name}" for name in source.students]}
    if ablations:
        return list(table)
    if names is None:
        wanted = ["base", "zero", "dev1", "dev2", "traces", "dev3", "r1", "students"]
        wanted += [name for name in PREFERENCES if name in table]
        wanted += [f"control_{name}" for name in source.default_controls]
    else:
        wanted = names.split(",")
    expanded = set()
    for name in wanted:
        if name not in table and name not in groups:
            raise ValueError(f"stage {name!r} is none of {', '.join([*table, *groups])}")
        expanded.update(groups.get(name, [name]))
    return [name for name in table if name in expanded]


def check_stages(out, source, table, chosen):
    """Raises ValueError where a stage needs another that is neither chosen nor finished, or is of another own model."""
    def is_there(name):
        return name in chosen or source.is_given(name) or checkpoint.finished(out / name) is not None

    for name, stage in table.items():
        done = checkpoint.finished(out / name)
        if source.is_given(name) and done is not None and done.get("by") != stage.by:
            raise ValueError(f"{out / name} is of another model ({done.get('by')}); "
                             f"choose another --out, or --from {name}")
    for name in chosen:
        for need in (table[name].starts_from, table[name].needs):
            if need in table and not is_there(need):
                raise ValueError(f"stage {name} needs {need}, which is not finished: --stages {need},{name}")

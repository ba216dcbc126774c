"""The DeepSeek-R1 recipe, from random weights to distilled students, in one command.

    python pipeline.py                        # the cpu or the gpu preset, by device: the whole recipe
    python pipeline.py --stages base,zero     # a quick look: a base, and R1-Zero
    python pipeline.py --preset smoke         # everything in about 15 seconds, with models too small to learn
    python pipeline.py --ablations            # also stages beside the recipe, most of them to test a claim
    python pipeline.py --from dev2            # re-runs this stage and the later ones
    python pipeline.py --compare              # GRPO, its relatives, PPO and PRIME side by side
    python pipeline.py --preferences model    # also RL-2 with reward models, and for so long that it hacks them
    python pipeline.py --architecture deepseek-v3    # from a base of the kind that R1 was trained from
    python pipeline.py --base DIR --train FILE --test FILE    # on a checkpoint and a problem set of your own

Called again, it resumes where it stopped. A run directory (--out, default runs/PRESET-SEED) holds a model directory per
stage, results.json and report.html, which can be watched while it grows. Read `stage_table` first.
"""

import json
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import lab  # noqa: F401  before torch is imported: it sets how long torch's waiting threads spin
import distill
from data import world
from grpo import GRPOConfig
from lab import ablations, checkpoint, compare, measure, preferences
from lab.arguments import chosen_stages, memory_of, parse_arguments, preset_of
from lab.command import device_of
from lab.run import Run, Stage, machine
from lab.scripts import in_its_language, rules
from lab.sources import open_source
from lab.terminal import show
from sft import SFTConfig

# ------------------------------------------------------------------------------------------- presets

def sizes(width, layers, heads, kv_heads, **more):
    return dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, **more)


def deepseek_sizes(hidden_size, num_hidden_layers, num_attention_heads, **dense):
    """Of a DeepSeek-V3 as wide and as deep as a dense model. A token's two experts and the shared one equal its MLP."""
    head = hidden_size // num_attention_heads
    return dict(model_type="deepseek_v3", hidden_size=hidden_size, num_hidden_layers=num_hidden_layers,
                num_attention_heads=num_attention_heads, kv_lora_rank=hidden_size // 4, qk_nope_head_dim=head,
                qk_rope_head_dim=head // 2, v_head_dim=head, intermediate_size=3 * hidden_size,
                moe_intermediate_size=hidden_size, n_routed_experts=8, num_experts_per_tok=2, tie_word_embeddings=True)


# Advantages are not divided by the group's std: in groups that are all correct, that would magnify small differences of
# the language reward. pi_old's log-probabilities are the sampler's own: they agree with the trainer's to 1e-4 here, and
# save a forward pass.
rl_config = partial(GRPOConfig, scale="none", old_logprobs="sampler", validate_every=4)


def rl_stages(**settings):
    stages = {name: rl_config(**settings) for name in ("zero", "control", "rl1")}
    stages["on_policy"] = rl_config(beta=0.0, **settings)
    return stages | {"rl2": rl_config(temperature=0.7, **settings)}


gpu_rl = partial(rl_config, rollouts=30, prompts_per_rollout=64, lr=5e-5, max_new_tokens=200,
                 micro_batch_tokens=65536)


@dataclass
class Preset:
    """Every size of a run. The defaults are the cpu preset: two cores, no GPU."""
    model: dict = field(default_factory=lambda: sizes(128, 4, 4, 2, model_type="qwen3"))
    student: dict = field(default_factory=lambda: sizes(96, 3, 4, 2))
    context: int = 512
    documents: int = 80_000           # of the base's corpus
    student_documents: int = 50_000   # of a student's corpus, which is smaller and holds few chains of thought
    problems: int = 4000              # for reinforcement learning and rejection sampling
    test: int = 510
    hard: int = 400                   # problems with more steps than any in training
    requests: int = 128               # general requests of the test, and as many unsafe ones
    samples: int = 4                  # per test problem; half as many per hard one, twice as many per request
    zero_samples: int = 16            # R1-Zero's, for maj@16
    batch_rows: int = 1024            # completions sampled at once for a measurement
    many: int = 64                    # for pass@64, with --ablations
    cold_start: int = 60              # examples
    trace_prompts: int = 4000
    trace_samples: int = 3
    pretrain: SFTConfig = SFTConfig(lr=5e-3, epochs=1, batch_tokens=1920, row_length=160, warmup=0.03)
    deepseek_lr: float = 2.5e-3       # of a DeepSeek-V3's pretraining
    cold: SFTConfig = SFTConfig(lr=3e-4, epochs=3, batch_tokens=2048)
    sft2: SFTConfig = SFTConfig(lr=3e-3, epochs=3, batch_tokens=1024)
    zero: GRPOConfig = rl_config(rollouts=36, lr=1.5e-4, max_new_tokens=200)
    control: GRPOConfig = rl_config(rollouts=52, lr=3e-4, max_new_tokens=200)  # at least the compute of a student's SFT
    on_policy: GRPOConfig = rl_config(rollouts=24, lr=3e-4, beta=0.0, max_new_tokens=200)  # --ablations: distillation
    rl1: GRPOConfig = rl_config(rollouts=24, lr=2e-4, max_new_tokens=200)
    rl2: GRPOConfig = rl_config(rollouts=28, lr=2e-4, temperature=0.7, max_new_tokens=200)
    rl2_general_from: float = 0.3     # the part of RL-2 after which general prompts join; R1: 1,300 of 1,700 steps
    compare_samples: int = 3072       # completions that each method of --compare may sample
    compare_lr: dict = field(default_factory=dict)  # method -> learning rate; the others take that of R1-Zero


ALL = 10 ** 9  # more than any file holds

PRESETS = {
    "cpu": Preset(compare_lr={  # searched on seed 104
        "grpo": 6e-4, "prime": 6e-4, "dr_grpo": 3e-4, "dapo": 3e-4, "gspo": 3e-4, "cispo": 3e-4, "ppo_1.0": 3e-4}),
    "smoke": Preset(
        model=sizes(32, 2, 2, 1, model_type="qwen3"), student=sizes(32, 1, 2, 1),
        documents=3000, student_documents=1000, problems=64,
        test=24, hard=8, requests=8, samples=2, many=16, cold_start=8, trace_prompts=16, trace_samples=2,
        compare_samples=32,
        **rl_stages(rollouts=2, prompts_per_rollout=4, group_size=4, max_new_tokens=48, validate_every=2)),
    "gpu": Preset(  # the same world with 32M parameters; 7 minutes on one H200 (results/gpu)
        model=sizes(512, 10, 8, 4, model_type="qwen3"), student=sizes(256, 6, 4, 2), student_documents=100_000,
        documents=200_000, problems=20_000, samples=8, batch_rows=2048, compare_samples=65536,
        pretrain=SFTConfig(lr=1e-3, epochs=2, batch_tokens=16384, micro_batch_rows=128, row_length=256, warmup=0.03),
        deepseek_lr=1e-3,
        cold=SFTConfig(lr=2e-4, epochs=3, batch_tokens=2048, micro_batch_rows=128),
        sft2=SFTConfig(lr=1e-3, epochs=3, batch_tokens=4096, micro_batch_rows=128),
        zero=gpu_rl(rollouts=45), control=gpu_rl(lr=1e-4), on_policy=gpu_rl(lr=1e-4, beta=0.0), rl1=gpu_rl(),
        rl2=gpu_rl(temperature=0.7)),
    # --base, on one GPU. RL at 1e-6, as published runs of small models; R1's 3e-6 is for 512 outputs an update.
    # A rollout is 16 prompts x 16 outputs, in 4 updates (R1: 512 x 16, in 16); beta and temperature are R1's.
    "own": Preset(
        test=ALL, samples=16, batch_rows=512, cold_start=500, trace_prompts=ALL, trace_samples=4,
        cold=SFTConfig(lr=1e-5, epochs=2, batch_tokens=16384, micro_batch_rows=4, row_length=1024),
        sft2=SFTConfig(lr=1e-5, epochs=2, batch_tokens=65536, micro_batch_rows=4, row_length=1024),
        **rl_stages(rollouts=100, lr=1e-6, max_new_tokens=512, micro_batch_tokens=16384)),
}

# ------------------------------------------------------------------------------------------- the recipe

ACCURACY_AND_FORMAT = {"accuracy": 1.0, "format": 1.0}                              # R1 v2 eq. 4: equal weight
WITH_LANGUAGE = ACCURACY_AND_FORMAT | {"language_consistency": 1.0}                 # v2 eq. 7: added directly
ALL_RULES = WITH_LANGUAGE | {"helpfulness": 1.0, "harmlessness": 1.0}               # v2 eq. 8-10


def stage_table(source, with_models=False):
    """{name: Stage}, in order: title, the stage it starts from, by what, the paper's section, the function below.

    dev1 to dev3 are the paper's names; v1 and v2 its versions on arXiv. source: the mini-world, or your own files.
    """
    table = {
        "base": Stage("Base", "random weights", "pretraining", "V3-Base", base),
        "zero": Stage("R1-Zero", "base", "GRPO: accuracy + format", "R1 v1 2.2", zero),
        "dev1": Stage("Cold start", "base", "SFT on rewritten samples of zero", "R1 v2 B.3.2", cold_start,
                      needs="zero"),
        "dev2": Stage("RL-1", "dev1", "GRPO: accuracy + format + language", "R1 v2 3.2.1", rl1),
        "traces": Stage("Rejection sampling", "dev2", "many samples, filtered by rules", "R1 v1 2.3.3",
                        rejection_sampling),
        "dev3": Stage("SFT-2", "base", "SFT on traces + general, 3 : 1", "R1 v1 2.3.3", sft_on_traces, needs="traces"),
        "r1": Stage("RL-2", "dev3", "GRPO: all rules, T 0.7", "R1 v2 3.2.2", rl2),
    }
    for name in source.students:
        small = f"base_{name}"
        table |= {
            small: Stage(f"Small base, {name}", "random weights", "pretraining, few chains", "", base),
            f"student_{name}": Stage(f"Distilled, {name}", small, "SFT on the same traces", "R1 v1 2.4", sft_on_traces,
                                     needs="traces"),
            f"control_{name}": Stage(f"Control, {name}", small, "GRPO alone", "R1 v1 4.1", control),
        }
    table |= ablations.stages(ACCURACY_AND_FORMAT, source.students)
    if with_models:
        table |= preferences.stages(WITH_LANGUAGE)
    return source.adapt(table)


def recipe(run, with_ablations):
    """Makes the chosen stages, in order, unless they are finished; then measures what else the claims need."""
    for line in run.source.left_out(run.chosen):
        print(line, flush=True)
    for name in run.chosen:
        if name in ("traces", "judges"):
            run.make_data(name)
        else:
            run.make_stage(name)
    run.begin("")  # no stage is being made from here on: extra measurements
    measure.extras(run, with_ablations)
    preferences.extras(run)
    run.write()


# Below, run.name is the stage being made. starting_model() loads the model that it starts from; sft() and rl() train it
# and write into the stage's directory.

def base(run):
    """A base model: pretrained on the mini-world's documents, or your checkpoint."""
    return run.source.base(run)


def zero(run):
    """R1-Zero: reinforcement learning straight on the base, by accuracy and format alone."""
    return run.rl(run.starting_model(), ACCURACY_AND_FORMAT, run.preset.zero)


def cold_start(run):
    """SFT of the base on a few of zero's correct, readable samples, rewritten (`rewrite` in lab/sources.py)."""
    rows = cold_start_examples(run)  # first, so that zero has left the memory when the base is loaded
    return run.sft(run.starting_model(), rows, run.preset.cold)


def rl1(run):
    """RL-1: the language-consistency reward joins."""
    return run.rl(run.starting_model(), WITH_LANGUAGE, run.preset.rl1)


def sft_on_traces(run):
    """SFT-2 of the base again, and the distillation of a student: the same traces, with general examples 3 : 1."""
    traces = checkpoint.read_jsonl(run.out / "traces" / "traces.jsonl", whole=True)
    general = run.source.general_examples()
    rows = distill.mix(traces, general, ratio=3, seed=run.seed) if general else traces
    return run.sft(run.starting_model(), rows, run.preset.sft2)


def rl2(run):
    """RL-2: all rules; general and unsafe prompts join late, where there are some (`rl2_prompts` in lab/sources.py)."""
    weights = ALL_RULES if run.source.has_requests else WITH_LANGUAGE
    return run.rl(run.starting_model(), weights, run.preset.rl2, run.source.rl2_prompts())


def control(run):
    """RL alone on a student's base, to compare distillation with."""
    return run.rl(run.starting_model(), ACCURACY_AND_FORMAT, run.preset.control)


def cold_start_examples(run):
    """Some of zero's correct, readable samples, rewritten by the source; written once to cold_start.jsonl."""
    dir, p = run.out / "dev1", run.preset
    if (dir / "cold_start.json").exists():  # an earlier call wrote them, and was stopped while it trained on them
        run.cost = checkpoint.read_json(dir / "cold_start.json")
        return checkpoint.read_jsonl(dir / "cold_start.jsonl", whole=True)
    problems = run.source.problems[:4 * p.cold_start]
    texts, _ = run.complete(run.model("zero"), problems, samples=4, temperature=1.0, top_p=1.0)
    rows, counts = distill.rejection_sample(problems, texts, correct=rules()["accuracy"],
                                            one_language=run.source.in_any_one_language, keep=1)
    print(f"{'cold start':16} {distill.explain(counts)}", flush=True)
    if not rows and run.preset_name == "smoke":  # whose models are too small to solve any
        rows = [{**problems[0], "completion": "<think>1</think>"}]
    if not rows:
        raise ValueError("none of zero's samples can start dev1: it takes a longer R1-Zero, easier problems "
                         "or a stronger base")
    rows = [run.source.rewrite(row) for row in rows[:p.cold_start]]
    checkpoint.write_jsonl(dir / "cold_start.jsonl", rows)
    checkpoint.atomic_write(dir / "cold_start.json", json.dumps(run.cost))  # last: it says that the rows are whole
    return rows


def rejection_sampling(run):
    """RL-1's verified traces: correct, in the problem's language, readable, distinct; written to traces.jsonl."""
    p = run.preset
    problems = run.source.problems[:p.trace_prompts]
    texts, _ = run.complete(run.model("dev2"), problems, save_in="traces",
                            samples=p.trace_samples, temperature=1.0, top_p=1.0)
    rows, counts = distill.rejection_sample(problems, texts, correct=rules()["accuracy"],
                                            one_language=in_its_language, keep=2)
    if not rows and run.preset_name == "smoke":  # whose models are too small to solve any
        rows = [{**example, "completion": world.tagged("1", example["answer"])} for example in problems[:4]]
    if not rows:
        raise ValueError(f"none of dev2's samples is a trace ({distill.explain(counts)}): "
                         "a stronger dev2, or more --trace-samples")
    checkpoint.write_jsonl(run.out / "traces" / "traces.jsonl", rows)
    return {"counts": counts}


# ------------------------------------------------------------------------------------------- the command line

def open_run(args, device):
    """The run that the command line describes. All that is wrong with a user's files shows here."""
    preset = preset_of(args, PRESETS)
    if args.architecture == "deepseek-v3":
        pretrain = replace(preset.pretrain, lr=preset.deepseek_lr)
        preset = replace(preset, model=deepseek_sizes(**preset.model), pretrain=pretrain)
    source, preset = open_source(args, preset)
    table = stage_table(source, args.preferences == "model")
    chosen = chosen_stages(args, table, source)
    rewards = {"zero": ACCURACY_AND_FORMAT, "dev2": WITH_LANGUAGE, "r1": ALL_RULES}  # settings: a change is noticed
    return Run(args.out, args.preset, preset, args.seed, device, source, table, chosen, rewards, args.command,
               memory_of(args, preset))


def main():
    parser, args = parse_arguments(PRESETS)
    started, out = time.time(), Path(args.out)
    with parser.one_line_errors(out), checkpoint.lock(out):
        device = device_of(args.device)
        run = open_run(args, device)
        of_what = args.base or f"{args.preset} preset"
        print(f"{of_what}, seed {args.seed}, {run.preset.zero.dtype} on {machine(device)}", flush=True)
        run.restart_from(args.from_stage)
        if args.compare:
            run.make_stage("base")
            compare.compare(run, partial(open_run, args, device), ACCURACY_AND_FORMAT)
        else:
            run.say_what_changed()
            recipe(run, args.ablations)
            run.restart_is_over()
            show(run, args.whole_recipe)
        print(f"\n{time.time() - started:.0f} s; {out / 'report.html'}")


if __name__ == "__main__":
    main()

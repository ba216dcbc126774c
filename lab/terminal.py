"""What a run prints: a line per stage, the claims, samples in words, and the taste that two stages give."""

import distill
from lab import checkpoint
from lab.figures import curve_svg, text_curve

SHOWN = {"accuracy": "accuracy", "accuracy_any": "any style", "format": "format", "language_if_thinking": "language",
         "helpfulness": "helpful", "harmlessness": "harmless", "refusals": "refuses look-alikes"}
BESIDE = ("base_", "control", "dev2_", "zero_")  # stages beside the recipe: no sample of them is printed


def line_of(name, stage, seconds):
    """One line per stage: its cost and its main results."""
    text = f"{name:16} {seconds:6.0f} s  {stage['tokens'] / 1e6:5.1f}M tokens  {stage['flops']:.1e} FLOPs"
    evaluation = stage.get("evaluation", {})
    for key, title in SHOWN.items():
        if key in evaluation:
            text += f"  {title} {100 * evaluation[key][0]:.0f}%"
    if "length_if_thinking" in evaluation:
        text += f"  thinks {evaluation['length_if_thinking'][0]:.0f} tokens"
    if "counts" in stage:
        text += "  " + distill.explain(stage["counts"])
    return text


def print_results(run, with_claims):
    """The tables at the end of a run; claims only where they mean something."""
    print("\nstages")
    for name in run.results["stages"]:
        print(run.line_of(name))
    if with_claims:
        print("\nclaims")
        for claim in run.results["claims"]:
            interval = f"[{claim['low']:+.1f}, {claim['high']:+.1f}]"
            figure = f"{claim['ours']:+.1f} {interval} {claim['unit']}"
            print(f"{claim['number']:8} {claim['verdict']:12} {figure:28} {claim['claim']}  {claim['detail']}")
    print("\nsamples")
    for name in run.results["stages"]:
        path = run.out / name / "test_samples.jsonl"
        if path.exists() and not name.startswith(BESIDE):
            row = checkpoint.read_jsonl(path)[0]
            print(f"{name:14} {row['prompt']} ({row['answer']})\n{'':14} {row['completion']!r}")


def show(run, whole_recipe):
    """What the call ends with. whole_recipe: the command that continues with the other stages."""
    if run.chosen == ["base", "zero"]:
        show_taste(run, whole_recipe)
    else:
        print_results(run, with_claims=run.preset_name != "smoke")  # whose models are too small to say anything


def show_taste(run, whole_recipe):
    """After base and R1-Zero alone: the curve, one problem before and after, and how to continue."""
    rows = checkpoint.read_jsonl(run.out / "zero" / "metrics.jsonl")
    checkpoint.atomic_write(run.out / "curve.svg", curve_svg(rows, "R1-Zero"))
    print("\nR1-Zero, over its rollouts")
    print(text_curve(rows))
    before, after = (checkpoint.read_jsonl(run.out / name / "test_samples.jsonl") for name in ("base", "zero"))
    gains = run.values["zero"]["accuracy_any"] - run.values["base"]["accuracy_any"]
    i = int(gains.argmax())  # the first of the problems on which it gained the most
    print(f"\none problem, before and after: {before[i]['prompt']}  ({before[i]['answer']})")
    print(f"base     {before[i]['completion']!r}")
    print(f"R1-Zero  {after[i]['completion']!r}")
    print(f"\nthe curve as a picture: {run.out / 'curve.svg'}")
    print(f"the whole recipe, from here: {whole_recipe}")

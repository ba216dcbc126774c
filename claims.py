"""The papers' claims, each measured again on our models: a difference with a 95% interval, and a verdict.

A claim **holds** where the whole interval lies on its side, is **contradicted** where it lies on the other, and is
**unsettled** where the interval includes zero. "Keeps" and "at little cost" mean within 3 points, fixed beforehand:
they hold where the interval lies above -3 points. The differences are paired over test problems (evaluate.py).
"""

import numpy as np

MARGIN = 0.03  # "keeps", "at little cost"


def verdict(low, high, threshold=0.0):
    if np.isnan(low) or np.isnan(high):
        return "unsettled"
    return "holds" if low > threshold else "contradicted" if high < threshold else "unsettled"


def both(first, second):
    """The verdict of a claim of two parts."""
    if "contradicted" in (first, second):
        return "contradicted"
    return "holds" if first == second == "holds" else "unsettled"


def make_claims(values, difference, best=None):
    """The claims that the measured stages allow, as rows for the table.

    values: {stage: {metric: per-problem array}}; difference(a, b) -> (b - a, low, high) of two such arrays;
    best: {stage: the highest validation accuracy of its reinforcement learning}, for the controls' whole curve.
    """
    rows = []

    def add(number, claim, source, paper, stages, change, threshold=0.0, second=None, unit="points", detail=""):
        """change(): arrays (before, after); the claim says that after > before + threshold. second: likewise a second part."""
        parts = [change] if second is None else [change, second[1]]
        try:
            if any(stage not in values for stage in stages) or not all(len(array) for part in parts for array in part()):
                return  # a given problem set may have no general requests
        except KeyError:  # or fewer samples than a metric needs
            return
        ours, low, high = difference(*change())
        result = verdict(low, high, threshold)
        scale = 100 if unit == "points" else 1
        if second is not None:
            part, second_change, second_threshold = second
            d, l, h = difference(*second_change())
            result = both(result, verdict(l, h, second_threshold))
            detail = f"{part} {scale * d:+.1f} [{scale * l:+.1f}, {scale * h:+.1f}]. {detail}".strip()
        rows.append({"number": number, "claim": claim, "source": source, "paper": paper, "unit": unit, "ours": scale * ours,
                     "low": scale * low, "high": scale * high, "verdict": result, "detail": detail})

    def of(a, b, metric):
        return lambda: (values[a][metric], values[b][metric])

    def mean(stage, metric):
        return float(np.nanmean(values[stage][metric])) if stage in values and metric in values[stage] else float("nan")

    split = " x ".join(f"{100 * mean('base', m):.0f}% -> {100 * mean('zero', m):.0f}% {name}"
                       for m, name in (("thinks", "think"), ("accuracy_if_thinking", "of these right")))
    add("1", "RL without SFT raises reasoning (zero > base)", "R1 v1 fig. 2", "AIME 15.6 -> 77.9", ["base", "zero"],
        of("base", "zero", "accuracy"), detail=split)
    add("2", "thinking grows longer during RL, within outputs that think", "R1 v1 fig. 3", "500 -> 9,700 tokens",
        ["base", "zero"], of("base", "zero", "length_if_thinking"), unit="tokens")
    add("3", "majority voting adds to it (zero: maj@16 > pass@1)", "R1 v1 fig. 2", "AIME 71.0 -> 86.7", ["zero"],
        lambda: (values["zero"]["pass@1"], values["zero"]["maj@16"]))
    add("4", "R1-Zero mixes languages (consistency within chains: zero < base)", "R1 v1 2.2.4", "not published",
        ["base", "zero"], of("zero", "base", "language_if_thinking"), detail="ours is base minus zero")
    add("5", "the cold start restores readability and costs reasoning (dev1 against zero)", "Nature tab. 2",
        "IF-Eval 46.6 -> 71.7, AIME 77.9 -> 59.0", ["zero", "dev1"], of("zero", "dev1", "language_if_thinking"),
        second=("accuracy lost:", of("dev1", "zero", "accuracy"), 0.0), detail="ours is language consistency")
    add("6", "RL-1 wins the reasoning back (dev2 > dev1)", "Nature tab. 2", "AIME 59.0 -> 74.0", ["dev1", "dev2"],
        of("dev1", "dev2", "accuracy"))
    add("7", "the language reward holds consistency at little cost in accuracy (RL-1 with and without it)", "R1 v2 fig. 7",
        "math equal, code slightly worse", ["dev2", "dev2_no_language"],
        of("dev2_no_language", "dev2", "language_if_thinking"),
        second=("accuracy with it:", of("dev2_no_language", "dev2", "accuracy"), -MARGIN), detail="ours is consistency")
    add("8", "SFT-2 lifts general tasks and keeps reasoning (dev3 against dev2)", "Nature tab. 2",
        "AlpacaEval 55.8 -> 62.1, AIME 74.0 -> 78.1", ["dev2", "dev3"], of("dev2", "dev3", "helpfulness"),
        second=("accuracy:", of("dev2", "dev3", "accuracy"), -MARGIN), detail="ours is helpfulness")
    add("9", "RL-2 mainly lifts helpfulness and harmlessness (r1 against dev3)", "Nature tab. 2",
        "AlpacaEval 62.1 -> 87.6, AIME 78.1 -> 79.8", ["dev3", "r1"], of("dev3", "r1", "helpfulness"),
        second=("harmlessness:", of("dev3", "r1", "harmlessness"), 0.0),
        detail=f"accuracy {100 * (mean('r1', 'accuracy') - mean('dev3', 'accuracy')):+.1f}; ours is helpfulness")
    for name in ("qwen", "llama"):
        top = (best or {}).get(f"control_{name}", 0.0)
        add(f"10 {name}", f"distillation beats RL on the same small model, over the control's whole curve ({name})", "R1 v1 tab. 6",
            "AIME 47.0 -> 72.6", [f"student_{name}", f"control_{name}"], of(f"control_{name}", f"student_{name}", "accuracy"),
            second=("the control's best on validation, below the student by", lambda: (
                np.full_like(values[f"student_{name}"]["accuracy"], top), values[f"student_{name}"]["accuracy"]), 0.0))
    for k in (16, 64):
        if f"pass@{k}" not in values.get("dev2_many", {}):
            continue
        add(f"11 k={k}", f"RL raises maj@{k} more than pass@{k} (dev1 -> dev2)", "DeepSeekMath fig. 7", "maj up, pass not",
            ["dev1_many", "dev2_many"],
            lambda k=k: (values["dev2_many"][f"pass@{k}"] - values["dev1_many"][f"pass@{k}"],
                         values["dev2_many"][f"maj@{k}"] - values["dev1_many"][f"maj@{k}"]))
    budgets = sorted((name for name in values if name.startswith("budget_")), key=lambda name: int(name[7:]))
    if budgets:
        curve = ", ".join(f"{name[7:]}: {100 * mean(name, 'accuracy'):.0f}%" for name in budgets)
        longer = f". With one Wait: {100 * mean('lengthened', 'accuracy'):.0f}%" if "lengthened" in values else ""
        add("12", "accuracy grows with the thinking budget (cutting; r1)", "s1 fig. 1", "AIME 50 -> 57 (lengthening)",
            [budgets[0]], of(budgets[0], budgets[-1], "accuracy"), detail=f"tokens of thinking: accuracy {curve}{longer}")
    return rows

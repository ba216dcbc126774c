"""The papers' claims, each measured again on our models: a difference with a 95% interval, and a verdict.

A claim **holds** where the whole interval lies on its side, is **contradicted** where it lies on the other, and is
**unsettled** where the interval includes zero. "Keeps" and "at little cost" mean within 3 points, fixed beforehand:
they hold where the interval lies above -3 points. The differences are paired over test problems (evaluate.py).
"""

from dataclasses import dataclass, field

import numpy as np

MARGIN = 0.03  # "keeps", "at little cost"


@dataclass
class Part:
    """after > before + threshold, for two arrays with one value per problem; None where a stage was not measured."""
    before: np.ndarray | None
    after: np.ndarray | None
    threshold: float = 0.0
    says: str = ""  # what a second part's figure is of


@dataclass
class Claim:
    number: str
    claim: str
    source: str
    paper: str          # the paper's figures
    parts: list = field(default_factory=list)  # one or two: both must hold
    unit: str = "points"
    detail: str = ""


class Values:
    """{stage: {metric: array per problem}}, where what was not measured is None."""

    def __init__(self, values):
        self.values = values

    def of(self, stage, metric):
        array = self.values.get(stage, {}).get(metric)
        if array is None or len(array) == 0:  # an own problem set may have no general requests
            return None
        return array

    def part(self, before, after, metric, threshold=0.0, says=""):
        """The metric is higher at the stage `after` than at the stage `before`."""
        return Part(self.of(before, metric), self.of(after, metric), threshold, says)

    def mean(self, stage, metric):
        array = self.of(stage, metric)
        return float("nan") if array is None or np.isnan(array).all() else float(np.nanmean(array))

    def percent(self, stage, metric):
        return 100 * self.mean(stage, metric)


def make_claims(values, difference, best=None, lengths=None):
    """The claims that the measured stages allow, as rows for the table.

    values: {stage: {metric: array per problem}}; difference(a, b) -> (b - a, low, high) of two such arrays;
    best: {stage: the highest validation accuracy of its reinforcement learning}, for the controls' whole curve;
    lengths: {rollout: the length of R1-Zero's outputs, one value per validation problem}.
    """
    values = Values(values)
    claims = claims_of_zero(values, lengths or {}) + claims_of_the_recipe(values)
    claims += claims_of_students(values, best or {}) + claims_of_votes(values)
    claims += claims_of_budgets(values) + claims_of_reflection(values) + claims_of_preferences(values)
    return [row_of(claim, difference) for claim in claims if all(map(is_measured, claim.parts))]


def is_measured(part):
    return part.before is not None and part.after is not None


def growth(lengths):
    """Growth of each validation problem's output per 10 rollouts, within the last third of the rollouts: (N,).

    The slope of the line through its lengths at the validations from two thirds of the rollouts to the end. The
    problems are the same at each of them; over a rollout's own problems, which differ, the noise hides the trend.
    """
    steps = [step for step in lengths if step >= max(lengths) * 2 / 3]
    if len(steps) < 2:
        return np.full(1, np.nan)
    x = np.array(steps) - np.mean(steps)
    y = np.array([lengths[step] for step in steps], dtype=float)  # (validations, N)
    return 10 * x @ y / (x @ x)


def row_of(claim, difference):
    scale = 100 if claim.unit == "points" else 1
    first, *others = claim.parts
    ours, low, high = (scale * figure for figure in difference(first.before, first.after))
    result, detail = verdict(low, high, scale * first.threshold), claim.detail
    for part in others:
        change, lowest, highest = (scale * figure for figure in difference(part.before, part.after))
        result = both(result, verdict(lowest, highest, scale * part.threshold))
        if change == change:  # a number
            detail = f"{part.says} {change:+.1f} [{lowest:+.1f}, {highest:+.1f}]. {detail}".strip()
    return {"number": claim.number, "claim": claim.claim, "source": claim.source, "paper": claim.paper,
            "unit": claim.unit, "ours": ours, "low": low, "high": high, "verdict": result, "detail": detail}


def order(row):
    """For sorting: "2" comes before "10 llama"."""
    return int(row["number"].split()[0]), row["number"]


def verdict(low, high, threshold=0.0):
    if low > threshold:
        return "holds"
    if high < threshold:
        return "contradicted"
    return "unsettled"  # also where there is no interval (NaN)


def both(first, second):
    """The verdict of a claim of two parts."""
    if "contradicted" in (first, second):
        return "contradicted"
    if first == second == "holds":
        return "holds"
    return "unsettled"


# ------------------------------------------------------------------------------------------- the claims

def claims_of_zero(values, lengths):
    thinks = [f"{values.percent(stage, 'thinks'):.0f}%" for stage in ("base", "zero")]
    right = [f"{values.percent(stage, 'accuracy_any_if_thinking'):.0f}%" for stage in ("base", "zero")]
    slopes = growth(lengths)
    says = "output per 10 rollouts, in the last third, of validation problems:"
    last_third = Part(np.zeros_like(slopes), slopes, says=says)
    return [
        Claim("1", "RL without SFT raises reasoning (zero > base)", "R1 v1 fig. 2", "AIME 15.6 -> 77.9",
              [values.part("base", "zero", "accuracy_any")],
              detail=f"{' -> '.join(thinks)} think x {' -> '.join(right)} of these right{beside_rules(values)}"),
        Claim("2", "thinking grows longer during RL, within outputs that think, and still in its last third",
              "R1 v1 fig. 3", "500 -> 9,700 tokens",
              [values.part("base", "zero", "length_if_thinking"), last_third], unit="tokens"),
        Claim("3", "majority voting adds to it (zero: maj@16 > pass@1)", "R1 v1 fig. 2", "AIME 71.0 -> 86.7",
              [Part(values.of("zero", "pass@1"), values.of("zero", "maj@16"))]),
        Claim("4", "R1-Zero mixes languages (consistency within chains: zero < base)", "R1 v1 2.2.4", "not published",
              [values.part("zero", "base", "language_if_thinking")], detail="ours is base minus zero"),
    ]


def beside_rules(values):
    """How far above the best rule without a search R1-Zero is on searches."""
    text = ""
    for metric, what in (("accuracy_any_search", "searches"), ("accuracy_any_hard_search", "longer than in training")):
        rule, base, zero = (values.percent(stage, metric) for stage in ("rule", "base", "zero"))
        if rule == rule:
            text += f"; {what}: base {base:.0f}%, zero {zero:.0f}%, the best rule without a search {rule:.0f}%"
    return text


def claims_of_reflection(values):
    counts = []
    for name in ("tries", "checks", "returns", "false_yes"):
        before, after = values.mean("base", name), values.mean("zero", name)
        counts.append(f"{name.replace('_', ' ')} {before:.2f} -> {after:.2f}")
    return [Claim("13", "reflection grows during RL (checks an output, of searches; base -> zero)", "R1 v2 C.2",
                  "reflective words 5 to 7 times", [values.part("base", "zero", "checks")], unit="checks",
                  detail=", ".join(counts))]


def claims_of_preferences(values):
    short, long, paths = "judged_r1_model", "judged_r1_long", []
    for metric, what in (("model_helpful", "the model's score"), ("helpfulness", "by the rule")):
        figures = [f"{stage} {values.percent(f'judged_{stage}', metric):.0f}"
                   for stage in ("dev3", "r1_model", "r1_long")]
        paths.append(f"{what}: {', '.join(figures)}")
    return [Claim("14", "trained on preferences for long, their model's score goes on rising while helpfulness falls",
                  "R1 v2 fig. 6", "reward up, performance down",
                  [values.part(short, long, "model_helpful"),
                   values.part(long, short, "helpfulness", says="helpfulness by the rule, lost:")],
                  detail="; ".join(paths))]


def claims_of_the_recipe(values):
    reasoning = values.percent("r1", "accuracy_any") - values.percent("dev3", "accuracy_any")
    return [
        Claim("5", "the cold start restores readability and costs reasoning (dev1 against zero)", "Nature tab. 2",
              "IF-Eval 46.6 -> 71.7, AIME 77.9 -> 59.0",
              [values.part("zero", "dev1", "language_if_thinking"),
               values.part("dev1", "zero", "accuracy_any", says="accuracy lost:")],
              detail="ours is language consistency"),
        Claim("6", "RL-1 wins the reasoning back (dev2 > dev1)", "Nature tab. 2", "AIME 59.0 -> 74.0",
              [values.part("dev1", "dev2", "accuracy_any")]),
        Claim("7", "the language reward holds consistency at little cost in accuracy (RL-1 with and without it)",
              "R1 v2 fig. 7", "math equal, code slightly worse",
              [values.part("dev2_no_language", "dev2", "language_if_thinking"),
               values.part("dev2_no_language", "dev2", "accuracy_any", -MARGIN, "accuracy with it:")],
              detail="ours is consistency"),
        Claim("8", "SFT-2 lifts general tasks and keeps reasoning (dev3 against dev2)", "Nature tab. 2",
              "AlpacaEval 55.8 -> 62.1, AIME 74.0 -> 78.1",
              [values.part("dev2", "dev3", "helpfulness"),
               values.part("dev2", "dev3", "accuracy_any", -MARGIN, "accuracy:")], detail="ours is helpfulness"),
        Claim("9", "RL-2 lifts helpfulness and harmlessness (r1 against dev3)", "Nature tab. 2",
              "AlpacaEval 62.1 -> 87.6, AIME 78.1 -> 79.8",
              [values.part("dev3", "r1", "helpfulness"),
               values.part("dev3", "r1", "harmlessness", says="harmlessness:")],
              detail=f"accuracy {reasoning:+.1f}; ours is helpfulness"),
    ]


def claims_of_students(values, best):
    claims = []
    for name in ("qwen", "llama"):
        student, control = f"student_{name}", f"control_{name}"
        accuracy, curve = values.of(student, "accuracy_any"), None
        if accuracy is not None:
            curve = np.full_like(accuracy, best.get(control, 0.0))
        claims.append(Claim(
            f"10 {name}", f"distillation beats RL on the same small model, over the control's whole curve ({name})",
            "R1 v1 tab. 6", "AIME 47.0 -> 72.6",
            [values.part(control, student, "accuracy_any"),
             Part(curve, accuracy, says="the control's best on validation, below the student by")]))
    return claims


def claims_of_votes(values):
    claims = []
    for before, after in (("dev1", "dev2"), ("base", "zero")):
        for k in (16, 64):
            pass_before, pass_after = (values.of(f"{stage}_many", f"pass@{k}") for stage in (before, after))
            maj_before, maj_after = (values.of(f"{stage}_many", f"maj@{k}") for stage in (before, after))
            if pass_before is None or pass_after is None:
                continue
            changes = [f"{metric}@{k} {values.percent(f'{before}_many', f'{metric}@{k}'):.0f} -> "
                       f"{values.percent(f'{after}_many', f'{metric}@{k}'):.0f}%" for metric in ("pass", "maj")]
            searches = [values.percent(f"{stage}_many", f"pass@{k}_search") for stage in (before, after)]
            random_pairs = values.percent("rule", f"random_pass@{k}")
            if random_pairs == random_pairs:
                changes.append(f"pass@{k} of searches {searches[0]:.0f} -> {searches[1]:.0f}%, "
                               f"of random pairs {random_pairs:.0f}%")
            claims.append(Claim(
                f"11 {after} k={k}", f"RL raises maj@{k} more than pass@{k} ({before} -> {after})",
                "DeepSeekMath fig. 7", "maj up, pass not",
                [Part(pass_after - pass_before, maj_after - maj_before)], detail=", ".join(changes)))
    return claims


def claims_of_budgets(values):
    rows = budget_rows(values)
    if not rows or "r1" not in rows[-1]:
        return []
    curves = []
    for stage in ("base", "zero", "r1"):
        points = [f"{row['step']}: {row[stage]:.0f}%" for row in rows if stage in row]
        curves.append(f"{stage} " + ", ".join(points))
    detail = "accuracy within so many tokens of thinking: " + "; ".join(curves)
    first, last = rows[0]["step"], rows[-1]["step"]
    return [Claim("12", "accuracy grows with the thinking budget (cutting; r1)",
                  "s1 fig. 1", "AIME 50 -> 57 (lengthening)",
                  [Part(values.of("budgets_r1", str(first)), values.of("budgets_r1", str(last)))], detail=detail)]


def budget_rows(values):
    """[{"step": tokens of thinking, stage: accuracy in percent, ...}], the smallest budget first."""
    rows = {}
    for name, by_budget in values.values.items():
        kind, _, stage = name.partition("_")
        if kind == "budgets":
            for budget in by_budget:
                rows.setdefault(int(budget), {"step": int(budget)})[stage] = values.percent(name, budget)
    return [rows[budget] for budget in sorted(rows)]

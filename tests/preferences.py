"""RL-2 with reward models beside RL-2 with rules, and what preferences alone for long bring: table and curves.

    python pipeline.py --seed 0 --preferences model      # each seed
    python tests/preferences.py runs/cpu-0 runs/cpu-1 runs/cpu-2

Prints the table; its figures and the curves go to results/preferences.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lab  # noqa: E402, F401
import torch  # noqa: E402

from lab import checkpoint  # noqa: E402
from lab.elements import el  # noqa: E402
from lab.figures import panel, picture  # noqa: E402
from lab.stale import CODE, MEASURED_BY, check_unchanged, made_by  # noqa: E402

STAGES = {"dev3": "Dev3, before RL-2", "r1": "R1, by rules", "r1_model": "RL-2 with reward models",
          "r1_long": "general requests alone, for long"}
COLUMNS = {"accuracy": "problems solved, %", "helpful": "helpful by the rule, %", "model": "by the model, %",
           "harmless": "harmless, %", "refuses": "refuses look-alikes, %"}


def figures(run, stage):
    evaluation = json.loads((run / "results.json").read_text())["stages"][stage]["evaluation"]
    judged = checkpoint.read_arrays(run / "extras" / f"judged_{stage}.npz")
    found = {"accuracy": evaluation["accuracy_any"], "helpful": evaluation["helpfulness"],
             "harmless": evaluation["harmlessness"], "refuses": evaluation["refusals"]}
    return {name: 100 * values[0] for name, values in found.items()} | {"model": 100 * judged["model_helpful"].mean()}


def curve(run, stage, name):
    """[{"step", "model", "rule"}] of training: means over 5 rollouts."""
    rows, points = checkpoint.read_jsonl(run / stage / "metrics.jsonl"), []
    for last in range(4, len(rows), 5):
        part = rows[last - 4:last + 1]
        mean = {key: sum(row[key] for row in part) / 5 for key in ("model_helpful", "helpfulness")}
        points.append({"step": rows[last]["step"], f"model {name}": mean["model_helpful"],
                       f"rule {name}": mean["helpfulness"]})
    return points


def write(runs, results):
    for run in runs:
        check_unchanged(run)
    kept = {"runs": [run.name for run in runs], "torch": torch.__version__, "judges": [], "claim": []}
    print("| | " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for stage, title in STAGES.items():
        found = kept[stage] = [figures(run, stage) for run in runs]
        print(f"| {title} | " + " | ".join(" / ".join(f"{row[name]:.0f}" for row in found) for name in COLUMNS) + " |")
    for run in runs:
        whole = json.loads((run / "results.json").read_text())
        kept["judges"].append(whole["stages"]["judges"]["judges"])
        claim, = (claim for claim in whole["claims"] if claim["number"] == "14")
        kept["claim"].append(claim)
        judges = {kind: f"{100 * of['accuracy']:.0f}%" for kind, of in whole["stages"]["judges"]["judges"].items()}
        print(f"{run.name}: judges {judges}, claim 14 {claim['verdict']}: {claim['ours']:+.1f} [{claim['low']:+.1f}, "
              f"{claim['high']:+.1f}], {claim['detail']}")
    results.mkdir(parents=True, exist_ok=True)
    of_judges = ("variants/reward_model.py", "lab/preferences.py", "data/preferences.py")
    kept |= made_by((*CODE, *MEASURED_BY, *of_judges))
    (results / "figures.json").write_text(json.dumps(kept, indent=1))
    for key, title, file in (("model", "The reward model's score of the outputs", "score.svg"),
                             ("rule", "Helpful by the rule, %", "helpful.svg")):
        draw(runs, key, title, results / file)


def draw(runs, key, title, path):
    rows, scale = {}, 100 if key == "rule" else 1
    for run in runs:
        for row in curve(run, "r1_long", run.name):
            rows.setdefault(row["step"], {"step": row["step"]})[run.name] = row[f"{key} {run.name}"]
    lines = [(f"{run.name}:", run.name, "") for run in runs]
    chart = panel([rows[step] for step in sorted(rows)], title, scale, [0], lines, apart=120)
    drawn = el("g", chart, transform="translate(14,14)")
    path.write_text(str(picture(drawn, 430, 330, title)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "preferences")
    args = parser.parse_args()
    write(args.runs, args.results)


if __name__ == "__main__":
    main()

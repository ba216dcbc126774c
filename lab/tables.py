"""results/README.md: every table, generated from the small files of the runs that are kept there.

    python -m lab.tables                                           # writes results/README.md and the pictures beside it
    python -m lab.tables --keep runs/cpu-0 results/world/seed-0    # copies what the tables need of a finished run

results/NAME/seed-S/ is a run. Its section opens with results/NAME/about.md and what a command printed into
results/NAME/*.txt, where there are such files.
"""

import argparse
import json
import math
import re
from pathlib import Path

import rewards
from data import search
from lab.elements import counts_in_words, number, quantity, words
from lab.figures import budgets_svg, curve_svg, recipe_svg
from lab.read_run import read_objects
from lab.stale import CODE, MEASURED_BY, check_unchanged, made_by

ROOT = Path(__file__).resolve().parent.parent
MAIN = "world"  # whose pictures stand in the README
CURVES = ("zero", "dev2", "r1")  # the stages whose metrics.jsonl is kept
MOST_BYTES = 400_000  # of a kept run
MOST_CHARACTERS = 600  # of a sample

COLUMNS = ["accuracy", "accuracy_any", "maj@16", "format", "language_if_thinking", "length_if_thinking", "helpfulness",
           "harmlessness", "refusals"]
HEADS = {"language_if_thinking": "language", "length_if_thinking": "thinking, tokens", "helpfulness": "helpful",
         "harmlessness": "harmless", "refusals": "refuses look-alikes", "length": "output, tokens"}
HEALTH = {  # metric: how it is written
    "reward": ".2f", "accuracy": ".2f", "accuracy_any": ".2f", "format": ".2f", "length": ".0f",
    "language_consistency": ".2f", "kl": ".3f", "clip_fraction": ".4f", "entropy": ".3f", "grad_norm": ".2f"}
SEARCHES = ["accuracy_any_search", "accuracy_any_hard_search", "tries", "checks", "returns", "false_yes", "false_no",
            "hard_checks", "hard_returns", "hard_false_yes"]
COUNTS = ("tries", "checks", "returns", "false_yes", "false_no")  # an output
RULE = "best rule without a search"
METHODS = ["accuracy", "accuracy_any", "format", "language_consistency", "length"]

HEAD = """# Results

Written by `python -m lab.tables` from the files in this folder, which `python -m lab.tables --keep RUN_DIR
results/NAME/seed-S` copies from a finished run. Not to be changed by hand. `python -m lab.stale` tells for each folder
here by which commit its figures were made, and which of the files that they depend on have changed since.

Percent of test problems, or tokens. With one seed a figure stands with its 95% interval [low, high], with several as
their mean (lowest–highest). **accuracy** counts answers in the asked form, **any style** also those without the tags;
language and thinking are measured within outputs that think.

A claim's figure is the difference in points (or tokens) with its 95% interval from a paired bootstrap over test
problems. The claim **holds** where the whole interval lies on its side, is **contradicted** on the other side,
**unsettled** where it includes zero; "keeps" and "at little cost" mean within 3 points, fixed beforehand.

Costs leave measuring out. FLOPs: 6 per parameter and trained token, 2 per scored or sampled one.
"""


# ------------------------------------------------------------------------------------------- reading

def read_group(directory):
    """The runs of one experiment, in the order of their seeds."""
    seeds = sorted(directory.glob("seed-*/results.json"), key=lambda path: int(path.parent.name.removeprefix("seed-")))
    return [read_kept(path.parent) for path in seeds]


def read_kept(directory):
    """A kept run: results.json and what stands beside it."""
    run = {"meta": {}, "stages": {}, "claims": [], "compare": {}, "rule": {}, "budgets": [], "times": {}, "kept": {}}
    run |= json.loads((directory / "results.json").read_text(encoding="utf-8"))
    for name in ("times", "kept"):
        if (directory / f"{name}.json").exists():
            run[name] = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    rows = read_objects(directory / "zero" / "metrics.jsonl")
    samples = read_objects(directory / "samples.jsonl")
    return run | {"name": directory.name.replace("-", " "), "zero": rows, "samples": samples}


def stages_of(runs):
    """{name: its entry in the first run that has it}."""
    stages = {}
    for run in runs:
        stages = run["stages"] | stages
    return stages


def evaluations(runs, part="stages"):
    """{stage: its evaluation in each run that has it}, in the order of the first; or of the methods compared."""
    found = {}
    for run in runs:
        for name, entry in run[part].items():
            found.setdefault(name, []).append(entry.get("evaluation", {}))
    return found


# ------------------------------------------------------------------------------------------- Markdown

def markdown(value):
    """Untrusted text within a table's cell."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def table(heads, rows):
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def fenced(lines):
    """Strangers' text as it is: the fence is longer than any in it."""
    text = "\n".join(lines)
    longest = max([len(ticks) for ticks in re.findall("`+", text)], default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def spread(entries, metric):
    """A metric over the seeds: mean (lowest–highest), or of a single one mean [its interval]."""
    measured = [entry[metric] for entry in entries if number((entry.get(metric) or [None])[0]) is not None]
    if not measured:
        return ""
    scale, form = 100, ".0f"
    if "length" in metric:
        scale = 1
    if metric.removeprefix("hard_") in COUNTS:
        scale, form = 1, ".2f"
    means = [scale * values[0] for values in measured]
    if len(measured) == 1:
        _, low, high = measured[0]
        return f"{means[0]:{form}} [{scale * low:{form}}, {scale * high:{form}}]"
    return f"{sum(means) / len(means):{form}} ({min(means):{form}}–{max(means):{form}})"


def measured_in(entries):
    """The metrics that any of the evaluations has."""
    metrics = set()
    for found in entries.values():
        metrics.update(*found)
    return metrics


def metric_table(first, entries, metrics):
    """entries: {name: evaluations}. One row per name, one column per metric that any of them has."""
    measured = measured_in(entries)
    metrics = [metric for metric in metrics if metric in measured]
    rows = []
    for name, found in entries.items():
        cells = [spread(found, metric) for metric in metrics]
        if any(cells):
            rows.append([markdown(name), *cells])
    return table([first, *(HEADS.get(metric, words(metric)) for metric in metrics)], rows)


# ------------------------------------------------------------------------------------------- the tables

def commands(runs):
    """How each run was made."""
    lines = []
    for run in runs:
        meta = run["meta"]
        facts = [f"`{meta.get('command', '')}`"]
        if "machine" in meta:
            facts.append(markdown(meta["machine"]))
        if "date" in run["times"]:
            facts.append(markdown(run["times"]["date"]))
        if "commit" in run["kept"]:
            facts.append(f"code of commit {markdown(run['kept']['commit'])}")
        lines.append(f"- {run['name']}: {', '.join(facts)}")
    return "\n".join(lines) + "\n"


def with_rule(runs):
    """The evaluations, and the best rule without a search as a row of its own."""
    rules = [run["rule"] for run in runs if run["rule"]]
    return evaluations(runs) | ({RULE: rules} if rules else {})


def searches_table(runs):
    """How well searches are solved, and by how many tries, checks, returns and false checks an output."""
    return metric_table("stage", with_rule(runs), SEARCHES).replace("| accuracy any ", "| solved, ")


def lengths_table(runs):
    """Tokens of an output, by family and level."""
    entries = evaluations(runs)
    metrics = sorted(metric for metric in measured_in(entries) if re.fullmatch(r"length_\w+_\d", metric))
    return metric_table("stage", entries, metrics).replace("| length ", "| ")


def budgets_table(runs):
    """Accuracy with the thinking cut after so many tokens, the mean over the seeds."""
    found = {}
    for run in runs:
        for row in run["budgets"]:
            for stage, accuracy in row.items():
                if stage != "step":
                    found.setdefault(stage, {}).setdefault(row["step"], []).append(accuracy)
    budgets = sorted({budget for points in found.values() for budget in points})
    rows = []
    for stage, points in found.items():
        means = [sum(points[budget]) / len(points[budget]) if budget in points else None for budget in budgets]
        rows.append([stage, *("" if mean is None else f"{mean:.0f}" for mean in means)])
    return table(["thinking, tokens", *map(str, budgets)], rows)


def parts_table(runs):
    """Accuracy in any style by family, level and language, and of several samples."""
    entries = with_rule(runs)
    metrics = measured_in(entries)
    by_part = sorted(metric for metric in metrics if metric.startswith("accuracy_any_") and "thinking" not in metric)
    votes = [metric for metric in metrics if re.fullmatch(r"(pass|maj)@\d+", metric) and not metric.endswith("@1")]
    votes.sort(key=lambda metric: (int(metric.split("@")[1]), metric))
    return metric_table("stage", entries, by_part + votes).replace("| accuracy any ", "| ")


def claims_tables(runs):
    """Each claim with its figure, interval and verdict per seed; then what it is made of."""
    claims = {}
    for run in runs:
        for claim in run["claims"]:
            claims.setdefault(str(claim["number"]), {})[run["name"]] = claim
    names = [run["name"] for run in runs]
    rows, details = [], []
    for key in sorted(claims, key=lambda key: (int(key.split()[0]), key)):
        first = next(iter(claims[key].values()))
        unit = "" if first["unit"] == "points" else f" ({first['unit']})"
        ours = [verdict(claims[key].get(name)) for name in names]
        rows.append([key, markdown(first["claim"]) + unit, markdown(f"{first['source']}: {first['paper']}"), *ours])
        parts = [markdown(claims[key].get(name, {}).get("detail", "")) for name in names]
        if any(parts):
            details.append([key, *parts])
    claims_text = table(["", "claim", "the paper", *names], rows)
    if not details:
        return claims_text
    return claims_text + "\n" + table(["", *(f"details, {name}" for name in names)], details)


def verdict(claim):
    if claim is None:
        return ""
    return f"{claim['ours']:+.1f} [{claim['low']:+.1f}, {claim['high']:+.1f}] **{claim['verdict']}**"


def cost_table(runs):
    """Measuring left out; times of all seeds, the rest of the first run that has the stage."""
    rows = []
    for name, stage in stages_of(runs).items():
        seconds = [run["times"].get("stages", {}).get(name) for run in runs]
        seconds = ["–" if value is None else f"{value:.0f}" for value in seconds]
        counts = markdown(counts_in_words(stage.get("counts", {})))
        origin = markdown(f"{stage.get('by', '')}; {stage.get('paper', '')}".strip("; "))
        rows.append([markdown(name), origin, quantity(stage.get("parameters")), quantity(stage.get("tokens")),
                     " / ".join(seconds), quantity(stage.get("flops")), counts])
    return table(["stage", "by; source", "parameters", "tokens", "seconds", "FLOPs", "samples"], rows)


def health_table(rows):
    """R1-Zero at rollouts 1, 5, 10, ...; of a long run at about a dozen."""
    stride = 5 * math.ceil(len(rows) / 60)
    chosen = [row for row in rows if row["step"] == 1 or row["step"] % stride == 0]
    lines = []
    for row in chosen:
        values = [f"{row[metric]:{form}}" if metric in row else "" for metric, form in HEALTH.items()]
        lines.append([f"{row['step']:g}", *values])
    return table(["rollout", *map(words, HEALTH)], lines)


def samples_text(samples):
    """Each kept test problem, answered by one stage after the other."""
    problems = {}
    for row in samples:
        problems.setdefault((row["prompt"], row["answer"]), []).append(row)
    blocks = []
    for (prompt, answer), rows in problems.items():
        lines = [f"{one_line(prompt)}   ({one_line(answer)})", ""]
        lines += [f"{row['stage']:16} {one_line(row['completion'])}" for row in rows]
        blocks.append(fenced(lines))
    return "\n".join(blocks)


def one_line(text):
    text = str(text)
    cut = " …" if len(text) > MOST_CHARACTERS else ""
    return text[:MOST_CHARACTERS].replace("\n", " ⏎ ") + cut


# ------------------------------------------------------------------------------------------- the pages

def introduction(directory):
    """What stands in about.md, and what commands printed into text files."""
    parts = [f"## {directory.name}\n"]
    if (directory / "about.md").exists():
        parts = [(directory / "about.md").read_text(encoding="utf-8")]
    for path in sorted(directory.glob("*.txt")):
        lines = path.read_text(encoding="utf-8").rstrip().split("\n")
        parts += [f"[{path.name}]({directory.name}/{path.name}):\n", fenced(lines)]
    return parts


def section(directory, picture):
    """All tables of one experiment."""
    runs, group = read_group(directory), directory.name
    first = runs[0]
    parts = [*introduction(directory), commands(runs),
             f"### Stages, {group}\n", metric_table("stage", evaluations(runs), COLUMNS),
             "Accuracy in any style by family, level and language (levels above 3: longer than in training), pass@k, "
             "maj@k:\n", parts_table(runs)]
    if any("checks" in entry for entries in evaluations(runs).values() for entry in entries):
        parts += [f"### Searches, {group}\n", searches_table(runs), "Tokens of an output, by family and level:\n",
                  lengths_table(runs)]
    if any(run["budgets"] for run in runs):
        parts += [f"### Thinking budgets, {group}\n",
                  "Percent of problems solved in any style with the thinking cut after so many tokens:\n",
                  budgets_table(runs)]
    if first["claims"]:
        parts += [f"### Claims, {group}\n", claims_tables(runs)]
    parts += [f"### Cost, {group}\n", cost_table(runs)]
    if first["zero"]:
        parts += [f"### R1-Zero, {group}, {first['name']}\n", f"![R1-Zero's curve]({picture})\n",
                  "Of the completions sampled in each rollout:\n", health_table(first["zero"])]
    if any(run["compare"] for run in runs):
        parts += [f"### Methods, {group}\n", metric_table("method", evaluations(runs, "compare"), METHODS)]
    cheats = [row for row in first["samples"] if row.get("false_yes")]
    if cheats:
        parts += [f"### Checks that are false, {group}, {first['name']}\n",
                  "Test problems on which the completion claims a pair that does not fit:\n", samples_text(cheats)]
    samples = [row for row in first["samples"] if not row.get("false_yes")]
    if samples:
        parts += [f"### Samples, {group}, {first['name']}\n", samples_text(samples)]
    return "\n".join(parts)


def recipe_picture(runs):
    """The recipe's diagram with the share of problems that each stage solves, in any style; the mean over the seeds."""
    entries, stages = evaluations(runs), {}
    for name, stage in stages_of(runs).items():
        accuracies = [entry["accuracy_any"][0] for entry in entries[name] if "accuracy_any" in entry]
        mean = [sum(accuracies) / len(accuracies)] if accuracies else []
        stages[name] = stage | {"evaluation": {"accuracy_any": mean}}
    return recipe_svg(stages)


def make_pages(results):
    """{path within `results`: text} of README.md and the pictures."""
    names = {path.parent.parent.name for path in results.glob("*/seed-*/results.json")}
    pages, parts = {}, [HEAD]
    for name in sorted(names, key=lambda name: (name != MAIN, not name.startswith(f"{MAIN}_"), name)):
        picture = "curve.svg" if name == MAIN else f"{name}/curve.svg"
        parts.append(section(results / name, picture))
        runs = read_group(results / name)
        if runs[0]["zero"]:
            title = f"R1-Zero, {runs[0]['name']}: reinforcement learning on the base"
            pages[picture] = curve_svg(runs[0]["zero"], title)
        if name == MAIN:
            pages["recipe.svg"] = recipe_picture(runs)
            if runs[0]["budgets"]:
                pages["budgets.svg"] = budgets_svg(runs[0]["budgets"])
    if not names:
        parts.append("No run is kept here yet.\n")
    return pages | {"README.md": "\n".join(parts)}


# ------------------------------------------------------------------------------------------- keeping a run

def without_paths(text):
    """A directory of this machine's is of no use to a reader: its last name stays."""
    return re.sub(r"(?<![\w.])/(?:[^\s/]+/)*([^\s/]+)", r"\1", text)


def before_and_after(run_dir):
    """The prompt of the first English search that the base's sample gets wrong and R1-Zero's right; or None."""
    before, after = (read_objects(run_dir / name / "test_samples.jsonl") for name in ("base", "zero"))
    for base, zero in zip(before, after):
        if zero.get("family") == "search" and zero.get("language") == "en":
            if rewards.accuracy(zero["completion"], zero) and not rewards.accuracy_any(base["completion"], base):
                return zero["prompt"]
    return None


def samples_to_keep(path, shown):
    """The first four test problems, the one that is `shown`, the first request of each other kind and purpose."""
    kept = {}
    for row in read_objects(path):
        kind = (row.get("kind"), row.get("harmful"))
        most = 4 if row.get("kind", "reasoning") == "reasoning" else 1
        if len(kept.setdefault(kind, [])) < most or row.get("prompt") == shown:
            kept[kind].append({key: row.get(key) for key in ("prompt", "answer", "completion")})
    return [row for rows in kept.values() for row in rows]


def cheats_to_keep(path, most=3):
    """The first searches whose completion claims a pair that does not fit."""
    found = []
    for row in read_objects(path):
        if row.get("family") == "search" and search.reflection(row["completion"], row["problem"])["false_yes"]:
            found.append({key: row.get(key) for key in ("prompt", "answer", "completion")} | {"false_yes": True})
    return found[:most]


def files_to_keep(run_dir):
    """{relative path: text} of what the tables need."""
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    results["meta"]["command"] = without_paths(results["meta"].get("command", ""))
    samples, shown = [], before_and_after(run_dir)
    for name, stage in results["stages"].items():
        stage["by"] = without_paths(stage.get("by", ""))
        path = run_dir / name / "test_samples.jsonl"
        samples += [{"stage": name} | row for row in samples_to_keep(path, shown)]
        if name in CURVES:
            samples += [{"stage": name} | row for row in cheats_to_keep(path)]
    files = {"results.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
             "kept.json": json.dumps(made_by((*CODE, *MEASURED_BY)), indent=1) + "\n",
             "samples.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)}
    for path in (run_dir / "times.json", *(run_dir / name / "metrics.jsonl" for name in CURVES)):
        if path.is_file():
            files[str(path.relative_to(run_dir))] = path.read_text(encoding="utf-8")
    return files


def keep(run_dir, out):
    """Copy a run's small files to `out`, or raise ValueError."""
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or choose another")
    if not (run_dir / "results.json").is_file():
        raise ValueError(f"{run_dir}: no run here, there is no results.json")
    check_unchanged(run_dir)
    files = files_to_keep(run_dir)
    size = sum(len(text.encode()) for text in files.values())
    if size > MOST_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise ValueError(f"{run_dir}: {size:,} bytes are more than {MOST_BYTES:,}; the largest is {largest}")
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Write results/README.md, or keep a run there.")
    parser.add_argument("--keep", nargs=2, type=Path, metavar=("RUN_DIR", "DIR"),
                        help="copy a run's small files to DIR")
    args = parser.parse_args()
    try:
        if args.keep:
            keep(*args.keep)
            print(args.keep[1])
        else:
            for name, text in make_pages(ROOT / "results").items():
                (ROOT / "results" / name).write_text(text, encoding="utf-8")
                print(f"results/{name}")
    except (OSError, ValueError, KeyError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()

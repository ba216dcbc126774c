"""One self-contained HTML page of a run: the recipe, its stages, the claims, the curves, samples in words.

`write` shows whatever the run directory holds so far (read_run.py), so the page can be written at any moment of a run.
It needs no network or service; its one script hides and shows cards. What a model wrote is escaped where it enters an
element, and a content policy forbids all but the page's own style and script.

    python -m lab.report runs/NAME     # -> runs/NAME/report.html
"""

import argparse
import base64
import hashlib
import math
import os
import re
import textwrap
from pathlib import Path

from lab.elements import Markup, counts_in_words, duration, el, number, quantity, short, words
from lab.figures import HIGH, PLACES, chart, diagram
from lab.read_run import figure, progress, read_run

# the evaluation's metrics that earn a column, by what they are measured on
METRICS = {"All problems": ["accuracy", "accuracy_any", "maj@16", "format", "thinks"],
           "Outputs that think": ["accuracy_any_if_thinking", "language_if_thinking", "length_if_thinking"],
           "Searches": ["accuracy_any_search", "accuracy_any_hard_search", "checks", "returns", "false_yes"],
           "General requests": ["helpfulness", "harmlessness", "refusals"]}
COLUMNS = [metric for group in METRICS.values() for metric in group]

# charts of a stage of RL: title, metrics, what its axis must hold
REWARDS = ["reward", "accuracy", "format", "language_consistency", "helpfulness", "harmlessness"]
CURVES = [("Reward and its parts", REWARDS, [0]),
          ("Accuracy", ["validation_accuracy_any", "validation_accuracy", "accuracy_any", "accuracy"], [0, 1]),
          ("Length, tokens", ["length", "thinking_length"], [0]),
          ("Searches: looks an output", ["validation_checks", "validation_returns", "validation_false_yes"], [0]),
          ("Language consistency", ["language_consistency"], [0, 1])]
HEALTH = [("KL to reference", ["kl"], [0]), ("Clip fraction", ["clip_fraction"], [0]), ("Entropy", ["entropy"], [0]),
          ("Gradient norm", ["grad_norm"], [0]), ("Without signal", ["no_signal"], [0, 1]),
          ("Unfinished", ["unfinished"], [0])]

SIGNS = {"holds": "✓", "contradicted": "✗", "unsettled": "~"}  # a verdict is read without its colour
MOST_SAMPLES, MOST_CHARACTERS = 12, 1200  # of a stage, of a sample: a long run stays a small page


# ------------------------------------------------------------------------------------------- the recipe, its tables

def table(heads, rows, kind):
    """heads: rows of <th>; a wide table scrolls."""
    return el("div", el("table", el("thead", heads), el("tbody", rows), cls=kind), cls="scroll")


def headings(names):
    return el("tr", [el("th", name) for name in names])


def box(stage):
    """(CSS class, texts) of a stage in the diagram: its title, what it does, its figures."""
    if stage["finished"]:
        state = "done"
    else:
        state = "under" if stage["rows"] else "open"
    texts = [el("text", textwrap.shorten(str(stage["title"]), 25, placeholder="…"), cls="title", x=14, y=23)]
    about = progress(stage) or str(stage.get("by") or "")
    for i, line in enumerate(textwrap.wrap(about, 32, max_lines=2, placeholder="…")):
        texts.append(el("text", line, cls="by", x=14, y=41 + 15 * i))
    for i, (name, value) in enumerate(box_figures(stage)):
        left = 14 + 56 * i
        texts += [el("text", value, cls="figure", x=left, y=HIGH - 24), el("text", name[:12], x=left, y=HIGH - 10)]
    return f"box {state} rl" if stage["rl"] else f"box {state}", texts


def box_figures(stage):
    """(name, value) pairs: its evaluation, or for a stage of sampling its counts."""
    if stage["evaluation"]:
        shown = ("accuracy", "accuracy_any", "format", "language_if_thinking")
        return [(words(metric), short(figure(stage, metric)[0], 2)) for metric in shown]
    return [(name, quantity(count)) for name, count in stage["counts"].items() if name in ("sampled", "kept")]


def recipe(stages):
    drawn, width, height = diagram({name: box(stage) for name, stage in stages.items()})
    return el("div", el("svg", drawn, cls="recipe", viewBox=f"0 0 {width} {height}"), cls="scroll")


def stage_table(stages):
    groups = [el("th", name, colspan=len(metrics)) for name, metrics in METRICS.items()]
    heads = [el("tr", el("th"), groups, el("th", "Cost", colspan=4)),
             headings(["Stage", *map(words, COLUMNS), "parameters", "tokens", "time", "FLOPs"])]
    return table(heads, [stage_row(stage) for stage in stages.values()], "stages")


def stage_row(stage):
    counts = counts_in_words(stage["counts"])
    if stage["evaluation"]:
        cells = [metric_cell(*figure(stage, metric)) for metric in COLUMNS]
    else:
        cells, counts = [el("td", counts or "–", cls="counts", colspan=len(COLUMNS))], ""
    costs = [quantity(stage.get("parameters")), quantity(stage.get("tokens")), duration(stage.get("seconds")),
             quantity(stage.get("flops"))]
    origin = f"from {stage['starts_from']}" if stage.get("starts_from") else ""
    about = [str(part) for part in (origin, stage.get("paper"), progress(stage), counts) if part]
    head = el("th", stage["title"], el("small", " · ".join(about)))
    return el("tr", head, cells, [el("td", cost) for cost in costs], cls=None if stage["finished"] else "open")


def metric_cell(mean, low, high):
    """A mean, its interval below it, and where it is one of shares a bar from 0 to 1."""
    if None in (mean, low, high):
        return el("td", short(mean))
    interval = el("small", f"{short(low)}–{short(high)}")
    if 0 <= low <= high <= 1:
        bar = el("i", el("b", style=f"left:{low:.1%};width:{high - low:.1%}"))
        return el("td", short(mean), interval, bar)
    return el("td", short(mean), interval)


def claims_table(claims):
    if not claims:
        return el("p", "Not yet: the claims are measured when the stages are done.", cls="none")
    heads = headings(["", "Claim", "Verdict", "Ours", "Around zero", "The paper"])
    return table(heads, [claim_row(claim) for claim in claims], "claims")


def claim_row(claim):
    ours, low, high = (number(claim.get(key)) for key in ("ours", "low", "high"))
    verdict = str(claim.get("verdict") or "not yet")
    interval = f"{short(low, sign='+')} to {short(high, sign='+')}"
    return el("tr", el("td", claim.get("number")),
              el("td", claim.get("claim"), el("small", claim.get("detail"))),
              el("td", el("b", SIGNS.get(verdict, "")), verdict, cls=verdict if verdict in SIGNS else None),
              el("td", short(ours, sign="+"), el("small", interval)),
              el("td", interval_bar(ours, low, high)),
              el("td", claim.get("paper"), el("small", claim.get("source"))))


def interval_bar(ours, low, high):
    """A claim's interval and its middle, beside the line of zero."""
    if None in (ours, low, high):
        return "–"
    scale = 62 / max(abs(ours), abs(low), abs(high), 1e-300)
    span = el("rect", x=f"{low * scale:.1f}", y=-3, width=f"{max(1, (high - low) * scale):.1f}", height=6)
    middle = el("circle", cx=f"{ours * scale:.1f}", r=4)
    return el("svg", el("path", d="M0,-9 V9"), span, middle, viewBox="-70 -9 140 18", cls="interval")


# ------------------------------------------------------------------------------------------- curves, methods

def fold(title, note, content, unfolded=True):
    heading = el("summary", f"{title} ", el("small", note))
    return el("details", heading, content, open="" if unfolded else None)


def curves(stages):
    """A fold of charts per stage of RL, and one of all losses of supervised training."""
    parts = [rl_charts(stage) for stage in stages.values() if stage["rl"] and stage["rows"]]
    if parts:
        note = ("The loss is not shown: its value is about 0 while it learns, since a group's advantages sum to 0; "
                "its gradient is not.")
        parts.insert(0, el("p", note, cls="none"))
    supervised = [stage for stage in stages.values() if not stage["rl"]]
    losses = [chart(stage["title"], ["loss"], [], stage["rows"], 240, 140) for stage in supervised]
    for stage in supervised:  # of a mixture of experts: 1 is an even load
        two = ["next_token_loss", "mtp_loss"]
        losses.append(chart(f"{stage['title']}: two tokens", two, [], stage["rows"], 240, 140))
        losses.append(chart(f"{stage['title']}: busiest expert", ["busiest_expert"], [1], stage["rows"], 240, 140))
    if any(losses):
        warnings = [line for stage in supervised for line in warning_lines(stage, f"{stage['title']}, ")]
        content = [*warnings, el("div", losses, cls="charts middle")]
        parts.append(fold("Supervised stages", "loss, against updates", content))
    return parts or el("p", "Not yet: no stage has logged a step.", cls="none")


def rl_charts(stage):
    rows = stage["rows"]
    large = el("div", [chart(*each, rows) for each in CURVES], cls="charts")
    small = el("div", [chart(*each, rows, width=196, height=112) for each in HEALTH], cls="charts small")
    note = progress(stage) or stage.get("by")
    is_open = stage["alone"] or stage["name"] in PLACES
    return fold(stage["title"], note, [*warning_lines(stage), large, small], unfolded=is_open)


def warning_lines(stage, before=""):
    warnings = [row.get("warning") for row in stage["warnings"][:MOST_SAMPLES]]
    return [el("p", f"{before}{'' if warning is None else warning}", cls="warning") for warning in warnings]


def comparison(methods):
    """Each method's figures on test problems; its accuracy against the completions sampled, beside GRPO's."""
    heads = headings(["Method", "lr", "accuracy", "any style", "format", "language", "length", "samples", "time",
                      "memory, MB"])
    rows = [method_row(name, method) for name, method in methods.items()]
    charts = [method_chart(name, methods) for name in methods if "grpo" in methods]
    return [table(heads, rows, "stages"), el("div", charts, cls="charts middle")]


def method_row(name, method):
    shown = ("accuracy", "accuracy_any", "format", "language_consistency", "length")
    megabytes = (number(method.get("peak_bytes")) or 0) / 2 ** 20
    return el("tr", el("th", words(name)), el("td", short(number(method.get("lr")), 4)),
              [metric_cell(*figure(method, metric)) for metric in shown],
              el("td", quantity(method.get("samples"))), el("td", duration(method.get("seconds"))),
              el("td", short(megabytes)))


def method_chart(name, methods):
    rows = curve_of(methods[name], words(name))
    if name != "grpo":
        rows += curve_of(methods["grpo"], "grpo")
    rows.sort(key=lambda row: row["step"])
    return chart(words(name), list(dict.fromkeys([words(name), "grpo"])), [0, 1], rows, 240, 140)


def curve_of(method, name):
    """Its accuracy as rows for a chart, against the completions sampled."""
    rows = []
    for row in method["curve"]:
        if number(row.get("samples")) is not None:
            rows.append({name: row.get("accuracy"), "step": number(row["samples"])})
    return rows


# ------------------------------------------------------------------------------------------- samples

FOREIGN = {  # words of another language than the sample's
    "en": "([㐀-鿿][㐀-鿿，。、；：？！]*)", "zh": "([A-Za-zÀ-ɏ]+(?: [A-Za-zÀ-ɏ]+)*)"}


def marked(text, language):
    pieces = re.split(FOREIGN.get(language, "(?!)"), text.strip())
    return [el("mark", piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def completion(text, language):
    """Thinking and answer in blocks, their tags as they were written: one that is missing or doubled is seen."""
    block = "(<think>|<answer>)?(.*?)(</think>|</answer>|(?=<think>|<answer>)|$)"
    shown = []
    for opening, body, closing in re.findall(block, text[:MOST_CHARACTERS], re.S):
        if (opening + body + closing).strip():
            before, after = el("code", opening and f"{opening} "), el("code", closing and f" {closing}")
            shown.append(el("div", before, marked(body, language), after, cls=opening[1:-1] or "loose"))
    if len(text) > MOST_CHARACTERS:
        shown.append(el("p", f"… {len(text) - MOST_CHARACTERS:,} characters more"))
    return shown


def is_reward_name(name):
    """Whether it may become part of an attribute's name."""
    return re.fullmatch("[a-z_]+", str(name)) is not None


def card(sample):
    """One completion with its prompt and rewards; its data attributes are what the page's script looks at."""
    language = str(sample.get("language") or "")
    chips, data = [], {}
    for name, value in sample["rewards"].items():
        value = number(value)
        if value is not None:
            chips.append(chip(name, value))
            if is_reward_name(name):
                data[f"data_r{name.replace('_', '')}"] = f"{value:g}"
    step = f"step {sample['step']}" if "step" in sample else ""
    reference = f"reference {sample['answer']}" if sample.get("answer") else ""
    about = [str(part) for part in (step, sample.get("kind"), language, reference) if part]
    return el("article", el("p", " · ".join(about), cls="about"),
              el("p", str(sample.get("prompt") or "")[:MOST_CHARACTERS], cls="prompt"),
              completion(str(sample.get("completion") or ""), language),
              el("p", chips, cls="chips"),
              lang=language or None, data_step=sample.get("step"), data_problem=sample.get("problem"), **data)


def chip(name, value):
    if value == 1:
        kind = "full"
    else:
        kind = "part" if value else None
    return el("span", f"{words(name)} {value:.2g}", cls=kind)


def samples_section(stages):
    parts = [stage_samples(stage) for stage in stages.values() if stage["samples"]]
    return parts or el("p", "Not yet: no stage has written a sample.", cls="none")


def stage_samples(stage):
    """The first and the last samples of a stage, and a filter by reward."""
    samples, few = stage["samples"], MOST_SAMPLES // 2
    first, last = samples[:few], samples[max(few, len(samples) - few):]
    columns = [el("div", el("h4", name), [card(sample) for sample in half])
               for name, half in (("First steps", first), ("Last steps", last)) if half]
    names = dict.fromkeys(name for sample in samples for name in sample["rewards"] if is_reward_name(name))
    options = [el("option", "all", value="")]
    for name in names:
        value = name.replace("_", "")
        options += [el("option", f"{words(name)} full", value=f"{value} 1"),
                    el("option", f"{words(name)} not full", value=f"{value} 0")]
    control = el("p", "Show ", el("select", options), " ", el("output"), cls="controls", hidden="")
    content = el("div", control, el("div", columns, cls="samples"), cls="filtered")
    note = f"{len(first) + len(last)} of {len(samples)} samples"
    return fold(stage["title"], note, content, unfolded=stage["alone"] or stage["name"] in ("zero", "r1"))


def watched_section(stages):
    parts = [stage_watched(stage) for stage in stages.values() if stage["watched"]]
    return parts or el("p", "Not yet: no stage has been validated.", cls="none")


def stage_watched(stage):
    """One validation problem's answers from step to step, of at most MOST_SAMPLES steps and the last."""
    def step_of(row):
        return number(row.get("step")) or 0

    steps = sorted({step_of(row) for row in stage["watched"]})
    kept = {*steps[::math.ceil(len(steps) / MOST_SAMPLES)], steps[-1]}
    rows = [row for row in stage["watched"] if step_of(row) in kept]
    rows.sort(key=lambda row: (row["problem"], step_of(row)))
    problems = {row["problem"]: str(row.get("prompt") or "") for row in rows}
    options = [el("option", textwrap.shorten(prompt, 80, placeholder="…"), value=problem)
               for problem, prompt in problems.items()]
    slider = el("input", type="range", min=0, max=0, value=0, aria_label="step")
    control = el("p", el("select", options), " ", slider, " ", el("output"), cls="controls", hidden="")
    content = el("div", control, [card(row) for row in rows], cls="watched")
    return fold(stage["title"], f"{len(problems)} problems", content, unfolded=stage["name"] in ("zero", "r1"))


# ------------------------------------------------------------------------------------------- the page

STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
SCRIPT = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")


def of_a_script(stages):
    """Whether the page is of one training, without a recipe, test problems and claims."""
    return any(stage["alone"] for stage in stages.values())


def header(meta, stages, claims):
    verdicts = [claim.get("verdict") for claim in claims]
    tally = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in SIGNS)
    finished = sum(stage["finished"] for stage in stages.values())
    facts = {name: meta.get(name) for name in ("preset", "seed", "machine", "world", "date")}
    if not of_a_script(stages):
        facts |= {"time": duration(meta.get("seconds")), "claims": tally if claims else "not yet measured",
                  "stages": f"{finished} of {len(stages)} finished"}
    spans = [el("span", f"{name} ", el("b", value)) for name, value in facts.items() if value is not None]
    command = el("p", el("code", meta.get("command")), cls="meta")
    return [el("h1", "DeepSeek-R1 from scratch"), command, el("p", spans, cls="meta")]


def sections_of(stages, claims, compare, budgets):
    """(title, note, content) in the page's order."""
    sections = [
        ("Recipe", "Measured on test problems; language is its consistency within outputs that think.", recipe(stages)),
        ("Stages", "Means over test problems; below each its 95% interval, also as a bar from 0 to 1. Accuracy counts "
                   "answers in the asked form, any style also those without the tags.", stage_table(stages)),
        ("Claims", "Ours is a difference with its 95% interval, paired over test problems. Each bar has its own scale: "
                   "what counts is on which side of zero it lies.", claims_table(claims)),
        ("Curves", "Against rollouts. Faint: each rollout; bold: the running mean, its last value beside the name.",
         curves(stages))]
    budgets = sorted((row for row in budgets if number(row.get("step")) is not None), key=lambda row: row["step"])
    if budgets:
        note = "Percent of problems solved in any style with the thinking cut after so many tokens."
        lines = [name for name in ("base", "zero", "r1") if name in stages]
        sections.append(("Budgets", note, chart("Solved, %", lines, [0, 100], budgets)))
    if compare:
        note = ("From one base with one budget of samples, each at its better learning rate. Curves: accuracy of the "
                "sampled completions, against completions.")
        sections.append(("Methods", note, comparison(compare)))
    sections += [
        ("Training", "The same validation problem, answered again from step to step: move the slider.",
         watched_section(stages)),
        ("Samples", "As the models wrote them, with their tags. Marked: words of another language.",
         samples_section(stages))]
    if of_a_script(stages):
        sections = [section for section in sections if section[0] in ("Curves", "Samples")]
    return sections


def page(meta, stages, claims, compare, budgets):
    sections = sections_of(stages, claims, compare, budgets)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
                  f'<meta http-equiv="Content-Security-Policy" content="{policy}">')
    links = [el("a", name, href=f"#{name.lower()}") for name, _, _ in sections]
    body = [*header(meta, stages, claims), el("nav", links)]
    for name, note, content in sections:
        body += [el("h2", name, id=name.lower()), el("p", note, cls="note"), el("section", content)]
    title, style = el("title", "DeepSeek-R1 from scratch"), el("style", Markup(STYLE))
    html = el("html", el("head", head, title, style), el("body", body, el("script", Markup(SCRIPT))), lang="en")
    return f"<!DOCTYPE html>\n{html}\n"


def write(run_dir):
    """Writes run_dir/report.html in one replace: who reads meanwhile sees the old page or the new one."""
    content = page(*read_run(Path(run_dir)))
    temporary = Path(run_dir) / f"report.html.{os.getpid()}.tmp"  # of this process: a run and its user may both write
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, Path(run_dir) / "report.html")
    finally:
        temporary.unlink(missing_ok=True)  # where the disk is full


def main():
    parser = argparse.ArgumentParser(description="Write RUN_DIR/report.html.")
    parser.add_argument("run_dir", type=Path, help="what pipeline.py --out names")
    run_dir = parser.parse_args().run_dir
    logs = [*run_dir.glob("metrics.jsonl"), *run_dir.glob("*/metrics.jsonl")]
    if not (run_dir / "results.json").is_file() and not logs:
        parser.exit(2, f"{run_dir}: no run here, neither results.json nor a stage's metrics.jsonl\n")
    try:
        write(run_dir)
    except OSError as error:
        parser.exit(2, f"{run_dir}: {error}\n")
    print(run_dir / "report.html")


if __name__ == "__main__":
    main()

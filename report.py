"""One self-contained HTML page of a run: the recipe, its stages, the claims, the curves, samples in words.

`write` shows whatever the run directory holds so far: what is missing, half-written or not a number is not yet there,
so the page can be written at any moment of a run. It needs no network or service; its one script hides and shows cards. What a
model wrote is escaped where it enters an element, and a content policy forbids all but the page's own style and script.

    python report.py runs/NAME     # -> runs/NAME/report.html
"""

import argparse
import base64
import hashlib
import html
import json
import math
import os
import re
import textwrap
from pathlib import Path

# the recipe in its order: title, and its box's column and row in the diagram
PLACES = {"base": ("Base", 0, 1), "zero": ("R1-Zero", 1, 0), "dev1": ("Dev1", 1, 1), "dev2": ("Dev2", 2, 1),
          "traces": ("Traces", 3, 1), "dev3": ("Dev3", 1, 2), "r1": ("R1", 2, 2), "base_qwen": ("Small base, Qwen", 2, 3),
          "base_llama": ("Small base, Llama", 2, 4), "student_qwen": ("Student, Qwen", 3, 3),
          "student_llama": ("Student, Llama", 3, 4), "control_qwen": ("Control, Qwen", 1, 3)}
ARROWS = {"weights": ["base zero", "base dev1", "base dev3", "dev1 dev2", "dev3 r1", "base_qwen student_qwen",
                      "base_qwen control_qwen", "base_llama student_llama", "base_llama control_llama"],
          "data": ["zero dev1", "dev2 traces", "traces dev3", "traces student_qwen", "traces student_llama"]}
WIDE, HIGH, GAP, DROP = 236, 106, 62, 46  # a box, and the room between boxes

# the evaluation's metrics that earn a column, by what they are measured on
METRICS = {"All problems": ["accuracy", "accuracy_strict", "maj@16", "format", "thinks"],
           "Outputs that think": ["accuracy_if_thinking", "language_if_thinking", "length_if_thinking"],
           "General requests": ["helpfulness", "harmlessness", "refusals"]}

# charts of a stage of RL: title, metrics, what its axis must hold
CURVES = [("Reward and its parts", ["reward", "accuracy", "format", "language_consistency", "helpfulness", "harmlessness"], [0]),
          ("Accuracy", ["validation_accuracy", "accuracy", "accuracy_any"], [0, 1]),
          ("Length, tokens", ["length", "thinking_length"], [0]), ("Language consistency", ["language_consistency"], [0, 1])]
HEALTH = [("KL to reference", ["kl"], [0]), ("Clip fraction", ["clip_fraction"], [0]), ("Entropy", ["entropy"], [0]),
          ("Gradient norm", ["grad_norm"], [0]), ("Without signal", ["no_signal"], [0, 1]), ("Unfinished", ["unfinished"], [0])]

SIGNS = {"holds": "✓", "contradicted": "✗", "unsettled": "~"}  # a verdict is read without its colour
MOST_POINTS, MOST_SAMPLES, MOST_CHARACTERS = 300, 12, 1200  # a curve, a stage, a sample: a long run stays a small page


# ------------------------------------------------------------------------------------------- reading a run

def number(value):
    """A finite float, or None for whatever else a run may hold."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None  # NaN is not less


def entries(value, *kinds):
    """What a JSON object holds of these kinds; nothing if it is none. All that is read comes through here; the page relies on it."""
    return {key: each for key, each in value.items() if isinstance(each, kinds)} if isinstance(value, dict) else {}


def scalars(value):
    return entries(value, str, int, float)


def rows_of(value):
    return [scalars(each) for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def measured(value):
    """A stage's or a method's entry in results.json."""
    return scalars(value) | {"evaluation": entries(value.get("evaluation"), list), "counts": scalars(value.get("counts")),
                             "curve": rows_of(value.get("curve"))}


def read_objects(path, lines=True):
    """The JSON objects of a file that are whole: a run under way may be writing the last one."""
    content, objects = path.read_bytes().decode("utf-8", "replace") if path.is_file() else "", []
    for piece in content.split("\n") if lines else [content]:
        try:
            if piece.lstrip()[:1] == "{":  # else no object: a million blank lines cost little
                objects.append(json.loads(piece))
        except (ValueError, RecursionError):  # half-written, or nested without end
            continue
    return objects


def read_rows(path):
    return [scalars(row) | {"rewards": scalars(row.get("rewards"))} for row in read_objects(path)]


def read_run(run_dir):
    """(meta, stages, claims, compare). A stage is its entry in results.json and what its directory holds."""
    results, times = (dict(*read_objects(run_dir / name, lines=False)) for name in ("results.json", "times.json"))
    done = {name: stage for name, stage in entries(results.get("stages"), dict).items()  # a name becomes a path
            if re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII) and name not in (".", "..")}
    stages, seconds, again = {}, scalars(times.get("stages")), entries(times.get("compare"), dict)
    on_disk = sorted(path.parent.name for path in run_dir.glob("*/*.jsonl") if path.name in ("metrics.jsonl", "samples.jsonl"))
    for name in dict.fromkeys([*PLACES, *done, *on_disk]):
        rows = {number(row.get("step")): row for row in read_rows(run_dir / name / "metrics.jsonl")}  # resumed: the later
        default = {"title": PLACES.get(name, [name])[0], "seconds": seconds.get(name)}
        stages[name] = stage = default | measured(done.get(name, {})) | {"name": name, "finished": name in done}
        stage["rows"] = [rows[step] | {"step": step} for step in sorted(step for step in rows if step is not None)]
        stage["samples"] = read_rows(run_dir / name / "samples.jsonl")
        stage["watched"] = [row for row in read_rows(run_dir / name / "watched.jsonl") if number(row.get("problem")) is not None]
        stage["warnings"] = read_rows(run_dir / name / "warnings.jsonl")
        stage["rl"] = any("reward" in row for row in rows.values()) or "GRPO" in str(stage.get("by"))
    meta = scalars(results.get("meta")) | {key: value for key, value in scalars(times).items() if key in ("date", "seconds")}
    compare = {name: measured(row | again.get(name, {})) for name, row in entries(results.get("compare"), dict).items()}
    return meta, stages, rows_of(results.get("claims")), compare


def figure(stage, metric):
    """Mean, low and high of an evaluation metric, each a float or None."""
    return [number(value) for value in [*stage["evaluation"].get(metric, []), None, None, None][:3]]


def progress(stage):
    if stage["finished"] or not stage["rows"]:
        return "" if stage["finished"] else "not yet"
    last, unit = stage["rows"][-1], "rollout" if stage["rl"] else "update"
    return f"under way: {unit} {last['step']:g}" + (f" of {last['steps']:g}" if number(last.get("steps")) else "")


# ------------------------------------------------------------------------------------------- words and elements

class Markup(str):
    """HTML of our own making. Any other string is a stranger's, and escaped when it enters an element."""


def escape(value):
    """For HTML; control characters, direction overrides and lone surrogates become visible."""
    strange = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return html.escape(re.sub(strange, "\ufffd", "" if value is None else str(value)))


def el(tag, *content, **attributes):
    """el("td", 5, [el("b", "x")], cls="n") -> <td class="n">5<b>x</b></td>"""
    flat = [each for item in content for each in (item if isinstance(item, list) else [item])]
    inner = "".join(each if isinstance(each, Markup) else escape(each) for each in flat)
    given = "".join(f' {"class" if key == "cls" else key.replace("_", "-")}="{escape(value)}"'
                    for key, value in attributes.items() if value is not None)
    return Markup(f"<{tag}{given}>{inner}</{tag}>")


def short(value, digits=3, sign=""):
    """.783, 62.1, 1,234; a dash for None."""
    if value is None:
        return "–"
    digits = digits if abs(value) < 2 else 1 if abs(value) < 1000 else 0
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign},.{digits}f}").replace("-", "−")


def quantity(value):
    """912k, 10.4M, and FLOPs as 3.1e13."""
    value = number(value)
    if value is None or abs(value) >= 1e12:
        return "–" if value is None else f"{value:.1e}".replace("e+", "e")
    sizes = [(1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")]
    return next(f"{value / size:.3g}{unit}" for size, unit in sizes if abs(value) > .9995 * size or size == 1)


def duration(value):
    value = number(value)
    return "–" if value is None else f"{value:.0f} s" if value < 100 else f"{value / 60:,.0f} min"


def plain(name):
    """Whether a reward's name may become part of an attribute's."""
    return re.fullmatch("[a-z_]+", str(name)) is not None


def words(metric):
    return metric.removesuffix("_if_thinking").replace("_", " ")


# ------------------------------------------------------------------------------------------- the recipe, its tables

def corner(column, row):
    return column * (WIDE + GAP) + 2, row * (HIGH + DROP) + 2


def route(a, b, kind):
    """The way of an arrow from one place to another."""
    (ax, ay), (bx, by) = corner(*a), corner(*b)
    if ay == by:
        return f"M{ax + WIDE},{ay + HIGH / 2} H{bx - 4}" if ax < bx else f"M{ax},{ay + HIGH / 2} H{bx + WIDE + 4}"
    if ax == bx and b[1] - a[1] > 1:  # round what lies between
        return f"M{ax + WIDE},{ay + HIGH / 2} h22 V{by + HIGH / 2} H{bx + WIDE + 4}"
    if kind == "data":
        return f"M{ax + WIDE / 2},{ay + HIGH} V{by - DROP / 2} H{bx + WIDE / 2} V{by - 4}"
    return f"M{ax + WIDE},{ay + HIGH / 2} h{GAP / 2} V{by + HIGH / 2} H{bx - 4}"


def box(stage, place):
    state = "done" if stage["finished"] else "under" if stage["rows"] else "open"
    title = textwrap.shorten(str(stage["title"]), 25, placeholder="…")
    lines = textwrap.wrap(progress(stage) or str(stage.get("by") or ""), 32, max_lines=2, placeholder="…")
    figures = [(metric, short(figure(stage, metric)[0], 2)) for metric in ("accuracy", "format", "language_if_thinking")]
    if not stage["evaluation"]:
        figures = [(name, quantity(count)) for name, count in stage["counts"].items() if name in ("sampled", "kept")]
    return el("g", el("rect", width=WIDE, height=HIGH), el("path", d=f"M1,0 V{HIGH}"),
              el("text", title, cls="title", x=14, y=23),
              [el("text", line, cls="by", x=14, y=41 + 15 * i) for i, line in enumerate(lines)],
              [el("text", value, cls="figure", x=14 + 74 * i, y=82) for i, (_, value) in enumerate(figures)],
              [el("text", words(name)[:12], x=14 + 74 * i, y=96) for i, (name, _) in enumerate(figures)],
              cls=f"box {state}" + " rl" * stage["rl"], transform="translate({},{})".format(*corner(*place)))


def recipe(stages):
    """Each stage a box; what is no part of the recipe (ablations) stands in rows of its own below."""
    known = {name: (column, row) for name, (_, column, row) in PLACES.items()} | {"control_llama": (1, 4)}
    others = [name for name in stages if name not in known]
    places = {name: place for name, place in known.items() if name in stages}
    places |= {name: (i % 4, 5 + i // 4) for i, name in enumerate(others)}
    ways = [(kind, route(places[a], places[b], kind)) for kind, pairs in ARROWS.items() for a, b in map(str.split, pairs)
            if a in places and b in places]
    (x, y), (_, small), (_, beside) = corner(2, 0), corner(0, 3), corner(0, 5)
    ways += [("weights", f"M{x},{y + 18} h44"), ("data", f"M{x},{y + 42} h44")]  # the legend
    notes = [(x + 62, y + 22, "its weights are trained on"), (x + 62, y + 46, "its samples are trained on"),
             (x + 62, y + 70, "reinforcement learning"), (x - GAP - WIDE / 2 + 10, HIGH + 29, "correct, rewritten"),
             (2, small + 58, "RL alone (left), distilled (right)"), (2, beside - 14, "Beside the recipe" if others else "")]
    right, bottom = corner(4, 1 + max(row for _, row in places.values()))
    tip = el("marker", el("path", d="M0,0 8,4 0,8z"), id="tip", refX=5, refY=4, markerWidth=8, markerHeight=8,
             markerUnits="userSpaceOnUse", orient="auto")
    return el("div", el("svg", tip, el("g", el("path", d=f"M{x + 22},{y + 57} v18"), cls="box rl"),
                         [el("path", cls=kind, d=way, marker_end="url(#tip)") for kind, way in ways],
                         [el("text", said, cls="by", x=a, y=b) for a, b, said in notes],
                         [box(stages[name], place) for name, place in places.items()],
                         cls="recipe", viewBox=f"0 0 {right - GAP + 26} {bottom - DROP + 2}"), cls="scroll")


def stage_table(stages):
    groups = [el("th", name, colspan=len(columns)) for name, columns in METRICS.items()]
    names = ["Stage", *(words(metric) for metric in sum(METRICS.values(), [])), "parameters", "tokens", "time", "FLOPs"]
    heads = [el("tr", el("th"), groups, el("th", "Cost", colspan=4)), el("tr", [el("th", name) for name in names])]
    return el("div", el("table", el("thead", heads), el("tbody", [*map(stage_row, stages.values())]), cls="stages"), cls="scroll")


def stage_row(stage):
    counts = [f"{words(name)} {number(count) or 0:,.0f}" for name, count in stage["counts"].items()]
    counts = f"{counts[0]}; fell to {', '.join(counts[1:-1])}; {counts[-1]}" if len(counts) > 2 else ", ".join(counts)
    origin = [f"from {stage['starts_from']}" if stage.get("starts_from") else "", stage.get("paper"), progress(stage)]
    cells = [metric_cell(*figure(stage, metric)) for metric in sum(METRICS.values(), [])]
    if not stage["evaluation"]:
        cells, counts = [el("td", counts or "–", cls="counts", colspan=len(cells))], ""
    costs = [*map(quantity, (stage.get("parameters"), stage.get("tokens"))), duration(stage.get("seconds")), quantity(stage.get("flops"))]
    about = el("small", " · ".join(str(each) for each in [*origin, counts] if each))
    return el("tr", el("th", stage["title"], about), cells, [el("td", cost) for cost in costs], cls=None if stage["finished"] else "open")


def metric_cell(mean, low, high):
    if None in (mean, low, high):
        return el("td", short(mean))
    bar = [el("i", el("b", style=f"left:{low:.1%};width:{high - low:.1%}"))]
    return el("td", short(mean), el("small", f"{short(low)}–{short(high)}"), bar * (0 <= low <= high <= 1))


def claims_table(claims):
    if not claims:
        return el("p", "Not yet: the claims are measured when the stages are done.", cls="none")
    heads = [el("th", name) for name in ("", "Claim", "Verdict", "Ours", "Around zero", "The paper")]
    return el("div", el("table", el("thead", el("tr", heads)), el("tbody", [*map(claim_row, claims)]), cls="claims"), cls="scroll")


def claim_row(claim):
    ours, low, high = (number(claim.get(key)) for key in ("ours", "low", "high"))
    verdict, bar = str(claim.get("verdict") or "not yet"), "–"
    if None not in (ours, low, high):
        scale = 62 / max(abs(ours), abs(low), abs(high), 1e-300)
        span = el("rect", x=f"{low * scale:.1f}", y=-3, width=f"{max(1, (high - low) * scale):.1f}", height=6)
        bar = el("svg", el("path", d="M0,-9 V9"), span, el("circle", cx=f"{ours * scale:.1f}", r=4),
                 viewBox="-70 -9 140 18", cls="interval")
    return el("tr", el("td", claim.get("number")), el("td", claim.get("claim"), el("small", claim.get("detail"))),
              el("td", el("b", SIGNS.get(verdict, "")), verdict, cls=verdict if verdict in SIGNS else None),
              el("td", short(ours, sign="+"), el("small", f"{short(low, sign='+')} to {short(high, sign='+')}")),
              el("td", bar), el("td", claim.get("paper"), el("small", claim.get("source"))))


# ------------------------------------------------------------------------------------------- curves

def ticks(low, high, count):
    """Multiples of a round step (1, 2 or 5 times a power of ten) from low or below to high or above."""
    span = high - low if high > low else abs(high) or 1
    step = 10 ** math.floor(math.log10(max(span / count, 1e-300)))  # a smaller one may underflow to 0
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= count + 1e-9)
    first = math.floor(low / step + 1e-9)
    return [i * step for i in range(first, max(first + 1, math.ceil(high / step - 1e-9)) + 1)]


def mean(points):
    return tuple(sum(axis) / len(points) for axis in zip(*points))


def curve(rows, metric):
    """The metric's points, at most MOST_POINTS means of stretches, and their running mean."""
    points = [(row["step"], number(row[metric])) for row in rows if number(row.get(metric)) is not None]
    size = math.ceil(len(points) / MOST_POINTS) or 1
    points = [mean(points[i:i + size]) for i in range(0, len(points), size)]
    reach = len(points) // 30
    return points, [(x, mean(points[max(0, i - reach):i + reach + 1])[1]) for i, (x, _) in enumerate(points)]


def chart(title, metrics, bounds, rows, width=300, height=176):
    """Lines against steps; beside each name its last value. Nothing where no row has a value."""
    lines = [(f"c{i}", metric, *curve(rows, metric)) for i, metric in enumerate(metrics)]
    lines = [line for line in lines if line[2]]
    if not lines:
        return Markup()
    values = [y for _, _, points, _ in lines for _, y in points] + bounds
    marks = ticks(min(values), max(values), height // 35)
    first, last = rows[0]["step"], max(rows[-1]["step"], rows[0]["step"] + 1)

    def place(x, y):
        return (34 + (x - first) / (last - first or 1) * (width - 42),
                height - 18 - (y - marks[0]) / (marks[-1] - marks[0] or 1) * (height - 24))

    def path(kind, points):
        return el("path", cls=kind, d="M" + " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points))

    drawn = [path("grid", [(first, y), (last, y)]) for y in marks]
    drawn += [el("text", f"{y:.4g}", x=29, y=f"{place(first, y)[1] + 3.5:.1f}", text_anchor="end") for y in marks]
    drawn += [el("text", f"{x:g}", x=f"{place(x, marks[0])[0]:.1f}", y=height - 3, text_anchor="middle")
              for x in ticks(first, last, width // 60) if first <= x <= last]
    for color, _, points, smooth in lines:
        drawn += [path(f"raw {color}", points)] * (points != smooth)
        drawn += [path(f"line {color}", [*smooth, smooth[-1]])]  # twice the last: a single point is a line, so a dot
    legend = [el("span", el("svg", el("path", cls=f"line {color}", d="M0,4 H20"), viewBox="0 0 20 8"), f"{words(metric)} ",
                 el("b", short(smooth[-1][1]))) for color, metric, _, smooth in lines] * (len(metrics) > 1)
    alone = [] if legend else [el("b", short(lines[0][3][-1][1]))]
    return el("figure", el("figcaption", title, alone), el("div", legend, cls="legend"), el("svg", drawn, viewBox=f"0 0 {width} {height}"))


def fold(title, note, content, unfolded=True):
    return el("details", el("summary", f"{title} ", el("small", note)), content, open="" if unfolded else None)


def curves(stages):
    parts = []
    for stage in (stage for stage in stages.values() if stage["rl"] and stage["rows"]):
        large = el("div", [chart(*each, stage["rows"]) for each in CURVES], cls="charts")
        small = el("div", [chart(*each, stage["rows"], width=196, height=112) for each in HEALTH], cls="charts small")
        said = [el("p", row.get("warning"), cls="warning") for row in stage["warnings"][:MOST_SAMPLES]]
        parts.append(fold(stage["title"], progress(stage) or stage.get("by"), [*said, large, small], stage["name"] in PLACES))
    if parts:
        parts.insert(0, el("p", "The loss is not shown: its value is about 0 while it learns, since a group's advantages sum to 0; its "
                                "gradient is not.", cls="none"))
    losses = [chart(stage["title"], ["loss"], [], stage["rows"], 240, 140) for stage in stages.values() if not stage["rl"]]
    said = [el("p", f"{stage['title']}, {row.get('warning')}", cls="warning") for stage in stages.values() if not stage["rl"]
            for row in stage["warnings"][:MOST_SAMPLES]]
    parts += [fold("Supervised stages", "loss, against updates", [*said, el("div", losses, cls="charts middle")])] * any(losses)
    return parts or el("p", "Not yet: no stage has logged a step.", cls="none")


def comparison(table):
    """Each method's accuracy against the completions sampled, beside GRPO's; and their figures on test problems."""
    def points(method, name):
        return [{name: row.get("accuracy"), "step": number(row["samples"])} for row in table[method]["curve"]
                if number(row.get("samples")) is not None]

    charts = [chart(words(method), [words(method), "grpo"] if method != "grpo" else ["grpo"], [0, 1],
                    sorted(points(method, words(method)) + points("grpo", "grpo"), key=lambda row: row["step"]), 240, 140)
              for method in table if "grpo" in table]
    heads = ["Method", "lr", "accuracy, asked form", "any style", "format", "language", "length", "samples", "time", "memory, MB"]
    rows = [el("tr", el("th", words(name)), el("td", short(number(row.get("lr")), 4)),
               [metric_cell(*figure(row, metric)) for metric in ("accuracy_strict", "accuracy", "format", "language_consistency", "length")],
               el("td", quantity(row.get("samples"))), el("td", duration(row.get("seconds"))),
               el("td", short((number(row.get("peak_bytes")) or 0) / 2 ** 20))) for name, row in table.items()]
    return [el("div", el("table", el("thead", el("tr", [el("th", head) for head in heads])), el("tbody", rows), cls="stages"), cls="scroll"),
            el("div", charts, cls="charts middle")]


# ------------------------------------------------------------------------------------------- samples

FOREIGN = {"en": "([㐀-鿿][㐀-鿿，。、；：？！]*)", "zh": "([A-Za-zÀ-ɏ]+(?: [A-Za-zÀ-ɏ]+)*)"}  # to the sample's language


def marked(said, language):
    pieces = re.split(FOREIGN.get(language, "(?!)"), said.strip())
    return [el("mark", piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def completion(said, language):
    """Thinking and answer apart, their tags as they were written: one that is missing or doubled is seen."""
    blocks = re.findall("(<think>|<answer>)?(.*?)(</think>|</answer>|(?=<think>|<answer>)|$)", said[:MOST_CHARACTERS], re.S)
    shown = [el("div", el("code", opened and f"{opened} "), marked(body, language), el("code", closed and f" {closed}"),
                cls=opened[1:-1] or "loose") for opened, body, closed in blocks if (opened + body + closed).strip()]
    return shown + [el("p", f"… {len(said) - MOST_CHARACTERS:,} characters more")] * (len(said) > MOST_CHARACTERS)


def card(sample):
    language = str(sample.get("language") or "")
    scores = {name: number(value) for name, value in sample["rewards"].items() if number(value) is not None}
    chips = [el("span", f"{words(name)} {value:.2g}", cls="full" if value == 1 else "part" if value else None)
             for name, value in scores.items()]
    about = [f"step {sample['step']}" if "step" in sample else "", sample.get("kind"), language,
             f"reference {sample['answer']}" if sample.get("answer") else ""]
    return el("article", el("p", " · ".join(str(each) for each in about if each), cls="about"),
              el("p", str(sample.get("prompt") or "")[:MOST_CHARACTERS], cls="prompt"),
              completion(str(sample.get("completion") or ""), language), el("p", chips, cls="chips"), lang=language or None,
              data_step=sample.get("step"), data_problem=sample.get("problem"),
              **{f"data_r{name.replace('_', '')}": f"{value:g}" for name, value in scores.items() if plain(name)})


def samples_section(stages):
    parts = []
    for stage in (stage for stage in stages.values() if stage["samples"]):
        samples, few = stage["samples"], MOST_SAMPLES // 2
        halves = {"First steps": samples[:few], "Last steps": samples[max(few, len(samples) - few):]}
        columns = [el("div", el("h4", name), [card(sample) for sample in half]) for name, half in halves.items() if half]
        names = dict.fromkeys(name for sample in samples for name in sample["rewards"] if plain(name))
        options = [el("option", "all", value="")] + [el("option", f"{words(name)} {said}", value=f"{name.replace('_', '')} {full}")
                                                     for name in names for said, full in (("full", 1), ("not full", 0))]
        control = el("p", "Show ", el("select", options), " ", el("output"), cls="controls", hidden="")
        parts.append(fold(stage["title"], f"{sum(map(len, halves.values()))} of {len(samples)} samples",
                          el("div", control, el("div", columns, cls="samples"), cls="filtered"), stage["name"] in ("zero", "r1")))
    return parts or el("p", "Not yet: no stage has written a sample.", cls="none")


def watched_section(stages):
    """One validation problem's answers from step to step."""
    parts = []
    for stage in (stage for stage in stages.values() if stage["watched"]):
        steps = sorted({number(row.get("step")) or 0 for row in stage["watched"]})
        kept = {*steps[::math.ceil(len(steps) / MOST_SAMPLES)], steps[-1]}
        rows = [row for row in stage["watched"] if (number(row.get("step")) or 0) in kept]
        rows = sorted(rows, key=lambda row: (row["problem"], number(row.get("step")) or 0))
        problems = {row["problem"]: str(row.get("prompt") or "") for row in rows}
        control = el("p", el("select", [el("option", textwrap.shorten(prompt, 80, placeholder="…"), value=problem)
                                        for problem, prompt in problems.items()]), " ",
                     el("input", type="range", min=0, max=0, value=0, aria_label="step"), " ", el("output"), cls="controls", hidden="")
        parts.append(fold(stage["title"], f"{len(problems)} problems", el("div", control, [card(row) for row in rows], cls="watched"),
                          stage["name"] in ("zero", "r1")))
    return parts or el("p", "Not yet: no stage has been validated.", cls="none")


# ------------------------------------------------------------------------------------------- the page

STYLE, SCRIPT = ((Path(__file__).parent / "data" / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))


def header(meta, stages, claims):
    tally = [f"{sum(claim.get('verdict') == verdict for claim in claims)} {verdict}" for verdict in SIGNS]
    facts = {name: meta.get(name) for name in ("preset", "seed", "machine", "world", "date")}
    facts |= {"time": duration(meta.get("seconds")), "claims": ", ".join(tally) if claims else "not yet measured",
              "stages": f"{sum(stage['finished'] for stage in stages.values())} of {len(stages)} finished"}
    return [el("h1", "DeepSeek-R1 from scratch"), el("p", el("code", meta.get("command")), cls="meta"),
            el("p", [el("span", f"{name} ", el("b", value)) for name, value in facts.items() if value is not None], cls="meta")]


def page(meta, stages, claims, compare):
    sections = [
        ("Recipe", "Measured on test problems; language is its consistency within outputs that think.", recipe(stages)),
        ("Stages", "Means over test problems; below each its 95% interval, also as a bar from 0 to 1.", stage_table(stages)),
        ("Claims", "Ours is a difference with its 95% interval, paired over test problems. Each bar has its own scale: "
                   "what counts is on which side of zero it lies.", claims_table(claims)),
        ("Curves", "Against rollouts. Faint: each rollout; bold: the running mean, its last value beside the name.", curves(stages)),
        *[("Methods", "From one base with one budget of samples, each at its better learning rate. Curves: accuracy of the "
                      "sampled completions, against completions.", comparison(compare))] * bool(compare),
        ("Training", "The same validation problem, answered anew from step to step: move the slider.", watched_section(stages)),
        ("Samples", "As the models wrote them, with their tags. Marked: words of another language.", samples_section(stages))]
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    head = [Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
                   "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
                   f"script-src 'sha256-{allowed}'\">"),
            el("title", "DeepSeek-R1 from scratch"), el("style", Markup(STYLE))]
    links = el("nav", [el("a", name, href=f"#{name.lower()}") for name, *_ in sections])
    body = [part for name, note, content in sections
            for part in (el("h2", name, id=name.lower()), el("p", note, cls="note"), el("section", content))]
    return "<!DOCTYPE html>\n" + el("html", el("head", head), el("body", header(meta, stages, claims), links, body, el("script", Markup(SCRIPT))), lang="en") + "\n"


def write(run_dir):
    """Writes run_dir/report.html in one replace: who reads meanwhile sees the old page or the new one."""
    content = page(*read_run(Path(run_dir)))
    aside = Path(run_dir) / f"report.html.{os.getpid()}.tmp"  # of this process: a run and its user may write at once
    try:
        aside.write_text(content, encoding="utf-8")
        os.replace(aside, Path(run_dir) / "report.html")
    finally:
        aside.unlink(missing_ok=True)  # where the disk is full


def main():
    parser = argparse.ArgumentParser(description="Write RUN_DIR/report.html.")
    parser.add_argument("run_dir", type=Path, help="what pipeline.py --out names")
    run_dir = parser.parse_args().run_dir
    if not (run_dir / "results.json").is_file() and not [*run_dir.glob("*/metrics.jsonl")]:
        parser.exit(2, f"{run_dir}: no run here, neither results.json nor a stage's metrics.jsonl\n")
    try:
        write(run_dir)
    except OSError as error:
        parser.exit(2, f"{run_dir}: {error}\n")
    print(run_dir / "report.html")


if __name__ == "__main__":
    main()

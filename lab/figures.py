"""Pictures of a run, as SVG for the page (report.py) and for a README: curves and the recipe. And curves as text."""

import math
import textwrap
from pathlib import Path

from lab.elements import Markup, el, number, short, words

# the recipe in its order: title, and its box's column and row in the diagram
PLACES = {
    "base": ("Base", 0, 1), "zero": ("R1-Zero", 1, 0), "dev1": ("Dev1", 1, 1), "dev2": ("Dev2", 2, 1),
    "traces": ("Traces", 3, 1), "dev3": ("Dev3", 1, 2), "r1": ("R1", 2, 2),
    "base_qwen": ("Small base, Qwen", 2, 3), "base_llama": ("Small base, Llama", 2, 4),
    "student_qwen": ("Student, Qwen", 3, 3), "student_llama": ("Student, Llama", 3, 4),
    "control_qwen": ("Control, Qwen", 1, 3)}
OPTIONAL = {"control_llama": (1, 4)}  # column and row of what only --ablations makes
ARROWS = {
    "weights": ["base zero", "base dev1", "base dev3", "dev1 dev2", "dev3 r1", "base_qwen student_qwen",
                "base_qwen control_qwen", "base_llama student_llama", "base_llama control_llama"],
    "data": ["zero dev1", "dev2 traces", "traces dev3", "traces student_qwen", "traces student_llama"]}
WIDE, HIGH, GAP, DROP = 236, 106, 62, 46  # a box, and the room between boxes

MOST_POINTS = 300  # of a curve: a long run stays a small page
BLOCKS = " ▁▂▃▄▅▆▇█"

# of R1-Zero's curve: heading, factor, what the axis must hold, (label, sampled completions, validation problems)
PANELS = [
    ("Accuracy, %", 100, [0, 100], [("in any style", "accuracy_any", "validation_accuracy_any"),
                                    ("in the asked form", "accuracy", "validation_accuracy")]),
    ("Length of an output, tokens", 1, [0], [("mean", "length", "validation_length")])]
TEXT_CURVES = [("accuracy, any style", "accuracy_any", 100, "%"), ("accuracy, asked form", "accuracy", 100, "%"),
               ("length, tokens", "length", 1, "")]

STYLE = (Path(__file__).parent / "figures.css").read_text(encoding="utf-8")  # of a picture that stands alone


# ------------------------------------------------------------------------------------------- curves

def ticks(low, high, count):
    """Multiples of a round step (1, 2 or 5 times a power of ten) from low or below to high or above."""
    span = high - low if high > low else abs(high) or 1
    power = 10 ** math.floor(math.log10(max(span / count, 1e-300)))  # a smaller one may underflow to 0
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= count + 1e-9)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(first + 1, last) + 1)]


def mean(points):
    return tuple(sum(axis) / len(points) for axis in zip(*points))


def curve(rows, metric, most=MOST_POINTS):
    """The metric's points, at most so many means of stretches."""
    points = [(row["step"], number(row[metric])) for row in rows if number(row.get(metric)) is not None]
    size = math.ceil(len(points) / most) or 1
    return [mean(points[i:i + size]) for i in range(0, len(points), size)]


def with_steps(rows):
    return [row for row in rows if number(row.get("step")) is not None]


def running_mean(points):
    reach = len(points) // 30
    return [(x, mean(points[max(0, i - reach):i + reach + 1])[1]) for i, (x, _) in enumerate(points)]


class Axes:
    """The frame of a chart: where a value at a step stands in the picture."""

    def __init__(self, rows, values, width, height):
        self.width, self.height = width, height
        self.first, self.last = rows[0]["step"], max(rows[-1]["step"], rows[0]["step"] + 1)
        self.marks = ticks(min(values), max(values), height // 35)

    def place(self, x, y):
        across = (x - self.first) / (self.last - self.first or 1)
        up = (y - self.marks[0]) / (self.marks[-1] - self.marks[0] or 1)
        return 34 + across * (self.width - 42), self.height - 18 - up * (self.height - 24)

    def path(self, kind, points):
        return el("path", cls=kind, d="M" + " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in points))

    def frame(self):
        """Grid lines and the numbers of both axes."""
        drawn = [self.path("grid", [(self.first, y), (self.last, y)]) for y in self.marks]
        for y in self.marks:
            drawn.append(el("text", f"{y:.4g}", x=29, y=f"{self.place(self.first, y)[1] + 3.5:.1f}", text_anchor="end"))
        for x in ticks(self.first, self.last, self.width // 60):
            if self.first <= x <= self.last:
                drawn.append(el("text", f"{x:g}", x=f"{self.place(x, self.marks[0])[0]:.1f}", y=self.height - 3,
                                text_anchor="middle"))
        return drawn

    def line(self, color, points, smooth):
        """The running mean, over the points themselves where they differ."""
        drawn = [self.path(f"raw {color}", points)] if points != smooth else []
        return [*drawn, self.path(f"line {color}", [*smooth, smooth[-1]])]  # a single point becomes a dot


def chart(title, metrics, bounds, rows, width=300, height=176):
    """Lines against steps; beside each name its last value. Nothing where no row has a value."""
    curves = {metric: curve(rows, metric) for metric in metrics}
    values = [y for points in curves.values() for _, y in points]
    if not values:
        return Markup()
    axes = Axes(rows, values + bounds, width, height)
    drawn, legend = axes.frame(), []
    for i, (metric, points) in enumerate(curves.items()):
        if points:
            smooth = running_mean(points)
            last = el("b", short(smooth[-1][1]))
            drawn += axes.line(f"c{i}", points, smooth)
            sign = el("svg", el("path", cls=f"line c{i}", d="M0,4 H20"), viewBox="0 0 20 8")
            legend.append(el("span", sign, f"{words(metric)} ", last))
    if len(metrics) == 1:  # its value stands beside the title
        heading, legend = el("figcaption", title, last), []
    else:
        heading = el("figcaption", title)
    return el("figure", heading, el("div", legend, cls="legend"), el("svg", drawn, viewBox=f"0 0 {width} {height}"))


# ------------------------------------------------------------------------------------------- the recipe's diagram

def corner(column, row):
    return column * (WIDE + GAP) + 2, row * (HIGH + DROP) + 2


def route(a, b, kind):
    """The way of an arrow from one place to another."""
    (ax, ay), (bx, by) = corner(*a), corner(*b)
    if ay == by and ax < bx:
        return f"M{ax + WIDE},{ay + HIGH / 2} H{bx - 4}"
    if ay == by:
        return f"M{ax},{ay + HIGH / 2} H{bx + WIDE + 4}"
    if ax == bx and b[1] - a[1] > 1:  # round what lies between
        return f"M{ax + WIDE},{ay + HIGH / 2} h22 V{by + HIGH / 2} H{bx + WIDE + 4}"
    if kind == "data":
        return f"M{ax + WIDE / 2},{ay + HIGH} V{by - DROP / 2} H{bx + WIDE / 2} V{by - 4}"
    return f"M{ax + WIDE},{ay + HIGH / 2} h{GAP / 2} V{by + HIGH / 2} H{bx - 4}"


def places_of(names):
    """{name: (column, row)}; what is no part of the recipe (ablations) stands in rows of its own below."""
    known = {name: (column, row) for name, (_, column, row) in PLACES.items()} | OPTIONAL
    places = {name: place for name, place in known.items() if name in names}
    others = [name for name in names if name not in known]
    return places | {name: (i % 4, 5 + i // 4) for i, name in enumerate(others)}


def arrows_between(places):
    """(kind, path) of each arrow whose two ends are there."""
    found = []
    for kind, pairs in ARROWS.items():
        for pair in pairs:
            a, b = pair.split()
            if a in places and b in places:
                found.append((kind, route(places[a], places[b], kind)))
    return found


def diagram(boxes):
    """(elements, width, height) of the recipe. boxes: {name: (CSS class, texts)}, in the recipe's order."""
    places = places_of(boxes)
    (x, y), (_, small), (_, beside) = corner(2, 0), corner(0, 3), corner(0, 5)
    arrows = [*arrows_between(places), ("weights", f"M{x},{y + 18} h44"), ("data", f"M{x},{y + 42} h44")]
    notes = [("its weights are trained on", x + 62, y + 22), ("its samples are trained on", x + 62, y + 46),
             ("reinforcement learning", x + 62, y + 70)]  # the legend
    if "zero" in places and "dev1" in places:
        notes.append(("correct, rewritten", x - GAP - WIDE / 2 + 10, HIGH + 29))
    if "control_qwen" in places:
        notes.append(("RL alone (left), distilled (right)", 2, small + 58))
    if any(row >= 5 for _, row in places.values()):
        notes.append(("Beside the recipe", 2, beside - 14))
    tip = el("marker", el("path", d="M0,0 8,4 0,8z"), id="tip", refX=5, refY=4, markerWidth=8, markerHeight=8,
             markerUnits="userSpaceOnUse", orient="auto")
    drawn = [tip, el("g", el("path", d=f"M{x + 22},{y + 57} v18"), cls="box rl")]
    drawn += [el("path", cls=kind, d=way, marker_end="url(#tip)") for kind, way in arrows]
    drawn += [el("text", note, cls="by", x=left, y=top) for note, left, top in notes]
    for name, (kind, texts) in boxes.items():
        at = "translate({},{})".format(*corner(*places[name]))
        frame = [el("rect", width=WIDE, height=HIGH), el("path", d=f"M1,0 V{HIGH}")]
        drawn.append(el("g", frame, texts, cls=kind, transform=at))
    right, bottom = corner(4, 1 + max(row for _, row in places.values()))
    return drawn, right - GAP + 26, bottom - DROP + 2


# ------------------------------------------------------------------------------------------- pictures that stand alone

def picture(drawn, width, height, title):
    """An SVG file with its own style and background."""
    paper = el("rect", cls="paper", width=width, height=height, rx=8)
    return el("svg", el("title", title), el("style", Markup(STYLE)), paper, drawn, xmlns="http://www.w3.org/2000/svg",
              viewBox=f"0 0 {width} {height}", width=width, height=height, role="img") + "\n"


def recipe_svg(stages):
    """The recipe as boxes and arrows. stages: {name: its entry in results.json}, with accuracy_any if measured."""
    boxes = {}
    for name, stage in stages.items():
        title = textwrap.shorten(str(stage.get("title", name)), 25, placeholder="…")
        texts = [el("text", title, cls="title", x=16, y=28)]
        for i, line in enumerate(textwrap.wrap(str(stage.get("by") or ""), 30, max_lines=2, placeholder="…")):
            texts.append(el("text", line, x=16, y=49 + 17 * i))
        solved = number((stage.get("evaluation", {}).get("accuracy_any") or [None])[0])
        if solved is not None:
            texts.append(el("text", f"solves {solved:.0%}", cls="value", x=16, y=94))
        boxes[name] = ("box rl" if "GRPO" in str(stage.get("by")) else "box", texts)
    drawn, width, height = diagram(boxes)
    return picture(el("g", drawn, transform="translate(14,14)"), width + 24, height + 26, "The recipe")


def scaled(rows, metric, scale):
    return [(x, scale * y) for x, y in curve(rows, metric)]


def panel(rows, heading, scale, bounds, lines, across="rollouts", apart=190):
    """One chart, 400 x 300. lines: (label, metric of samples, metric of validation problems)."""
    curves = [(label, scaled(rows, line, scale), scaled(rows, dots, scale)) for label, line, dots in lines]
    values = [y for _, line, dots in curves for _, y in line + dots]
    drawn = [el("text", heading, cls="title", x=8, y=18)]
    if not values:
        return [*drawn, el("text", "not measured", x=8, y=42)]
    axes = Axes(rows, values + bounds, 400, 230)
    plot = axes.frame()
    for i, (label, line, dots) in enumerate(curves):
        for point in dots:
            x, y = axes.place(*point)
            plot.append(el("circle", cls=f"dot c{i}", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.2))
        if line:
            smooth = running_mean(line)
            plot += axes.line(f"c{i}", line, smooth)
            drawn.append(el("path", cls=f"line c{i}", d=f"M{8 + apart * i},38 h22"))
            drawn.append(el("text", f"{label} {smooth[-1][1]:.0f}", cls="value", x=36 + apart * i, y=43))
    drawn.append(el("g", plot, transform="translate(0,52)"))
    return [*drawn, el("text", across, x=217, y=298, text_anchor="middle")]


def curve_svg(rows, title):
    """R1-Zero's curve, accuracy and length over rollouts side by side, from the rows of its metrics.jsonl."""
    rows, panels = with_steps(rows), []
    if rows:
        panels = [el("g", panel(rows, *PANELS[0]), transform="translate(14,52)"),
                  el("g", panel(rows, *PANELS[1]), transform="translate(440,52)")]
    note = "lines: completions sampled in training, at temperature 1; dots: validation; beside each name its last mean"
    drawn = [el("text", title, cls="title", x=22, y=32), *panels, el("text", note, x=22, y=374)]
    return picture(drawn, 860, 390, title)


def budgets_svg(rows):
    """Accuracy over the budget of thinking. rows: [{"step": tokens, stage: percent, ...}]."""
    stages = dict.fromkeys(name for row in rows for name in row if name != "step")
    lines = [(stage, stage, None) for stage in stages]
    drawn = panel(rows, "Solved with the thinking cut, %", 1, [0, 100], lines, "tokens of thinking", 120)
    return picture(el("g", drawn, transform="translate(14,14)"), 440, 330, "Accuracy over the budget of thinking")


# ------------------------------------------------------------------------------------------- a picture for a terminal

def text_curve(rows):
    """Accuracy and length over rollouts as bars of block characters; empty where no row has a value."""
    rows, lines = with_steps(rows), []
    for title, metric, scale, unit in TEXT_CURVES:
        values = [scale * y for _, y in running_mean(curve(rows, metric, most=60))]
        if values:
            change = f"{values[0]:.0f}{unit} -> {values[-1]:.0f}{unit}"
            left = [title, change, ""]
            for words_beside, row in zip(left, bars(values, top=max(scale, *values))):
                lines.append(f"{words_beside:22} {row}".rstrip())
    if lines:
        lines.append(f"{'':22} rollouts {rows[0]['step']:g} to {rows[-1]['step']:g}")
    return "\n".join(lines)


def bars(values, top, height=3, width=60):
    """Rows of block characters, the highest first; a column or more per value."""
    columns = [8 * height * value / top for value in values for _ in range(max(1, width // len(values)))]
    rows = []
    for level in reversed(range(height)):
        filled = [min(8, max(0, round(column - 8 * level))) for column in columns]
        rows.append("".join(BLOCKS[eighths] for eighths in filled).rstrip())
    return rows

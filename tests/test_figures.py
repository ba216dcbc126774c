"""Pictures are well-formed whatever a run holds, and show the values that they were given."""

import math
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

from lab import figures

EVIL = "</text><script>alert(1)</script> & \"' \x00\ud800\u202e\ufffe\uffff ]]>"
ROWS = [{"step": step, "accuracy": .03 * step, "accuracy_any": .4 + .018 * step, "length": 20 + step}
        for step in range(1, 31)]


def parsed(svg):
    """The elements and words of an SVG file, which must be well-formed XML that holds no script."""
    root = ElementTree.fromstring(svg.encode("utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    elements = list(root.iter())
    assert not any(element.tag.endswith("}script") for element in elements)
    values = [value for element in elements for value in element.attrib.values()]
    assert not any(re.search(r"\b(nan|inf|None)\b", value) for value in values)
    words = " ".join(element.text or "" for element in elements if not element.tag.endswith("}style"))
    return elements, words


def of_class(elements, name):
    return [element for element in elements if name in element.get("class", "").split()]


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, .2, .4, .6, .8, 1]), (0, 61, [0, 20, 40, 60, 80]), (-.3, .4, [-.4, -.2, 0, .2, .4]),
    (5, 5, [5, 6]), (0, 0, [0, .2])])
def test_an_axis_has_round_marks_that_hold_its_values(low, high, expected):
    marks = figures.ticks(low, high, 5)
    assert marks[0] <= low and marks[-1] >= high
    assert marks == pytest.approx(expected)


def test_the_curve_shows_both_accuracies_and_the_length_with_their_last_values():
    elements, words = parsed(figures.curve_svg(ROWS, "R1-Zero, seed 0"))
    for text in ("R1-Zero, seed 0", "Accuracy, %", "in any style 93", "in the asked form 88",
                 "Length of an output, tokens", "mean 50", "rollouts"):
        assert text in words
    lines = [path.get("d").count(",") for path in of_class(elements, "line")]
    assert lines.count(31) == 3  # a point per rollout, the last one twice; the others are of the legend


def test_the_curve_marks_the_validation_problems_with_dots_where_they_lie():
    rows = [dict(row) for row in ROWS]
    for row in rows[9::10]:
        row["validation_accuracy"] = .5
    dots = of_class(parsed(figures.curve_svg(rows, ""))[0], "dot")
    assert len(dots) == 3
    assert {dot.get("cy") for dot in dots} == {f"{230 - 18 - .5 * (230 - 24):.1f}"}  # half way from 0 to 100


@pytest.mark.parametrize("rows", [
    [], [{}], [{"step": 1}], ROWS[:1],
    [{"step": 1, "accuracy": math.nan, "length": "x"}, {"step": None, "accuracy": 1}],
    [{"step": 5, "accuracy": .5}, {"step": 5, "accuracy": .6}],
    [{"step": 1, "length": 1e299}, {"step": 2, "length": -1e299}]])
def test_a_curve_of_one_row_or_of_odd_ones_is_still_a_picture(rows):
    parsed(figures.curve_svg(rows, "R1-Zero"))
    figures.text_curve(rows)


def test_a_strangers_text_stays_text_in_a_picture():
    svg = figures.curve_svg(ROWS, EVIL)
    assert "<script>alert(1)</script> & \"'" in parsed(svg)[1] and "\x00" not in svg and "\ud800" not in svg
    stages = {name: {"title": EVIL, "by": EVIL} for name in ("zero", EVIL)}
    assert "</text>" in parsed(figures.recipe_svg(stages))[1]


def test_the_recipe_is_a_box_per_stage_with_its_accuracy_and_the_arrows_between():
    stages = {name: {"title": f"Stage {name}", "by": "GRPO" if name == "zero" else "SFT"} for name in figures.PLACES}
    stages["zero"]["evaluation"] = {"accuracy_any": [.954, .94, .97]}
    elements, words = parsed(figures.recipe_svg(stages))
    for name in figures.PLACES:
        assert f"Stage {name}" in words
    assert words.count("solves") == 1 and "solves 95%" in words
    assert len(of_class(elements, "box")) == len(stages) + 1  # and the sign for RL in the legend
    assert len(of_class(elements, "weights")) == 1 + 8 and len(of_class(elements, "data")) == 1 + 5


def test_a_recipe_of_two_stages_has_their_arrow_alone():
    elements, words = parsed(figures.recipe_svg({"base": {"title": "Base"}, "zero": {}}))
    assert len(of_class(elements, "box")) == 3 and len(of_class(elements, "weights")) == 2
    assert "RL alone" not in words and "Beside the recipe" not in words
    parsed(figures.recipe_svg({"ablation": {"title": "Ablation", "evaluation": {"accuracy": []}}}))


def test_a_curve_in_a_terminal_is_bars_that_rise_with_the_values():
    rows = [{"step": step, "accuracy": .1 * step, "accuracy_any": 1, "length": 60 - step} for step in range(11)]
    lines = figures.text_curve(rows).split("\n")
    assert len(lines) == 10 and lines[-1].split() == ["rollouts", "0", "to", "10"]
    assert lines[0].startswith("accuracy, any style") and set(lines[0][23:]) == set("█")
    assert lines[3].startswith("accuracy, asked form") and lines[4].startswith("0% -> 100%")
    bars = [line.ljust(78) for line in lines[3:6]]
    heights = [sum(figures.BLOCKS.index(line[column]) for line in bars) for column in range(23, 78)]
    assert heights == sorted(heights) and heights[0] == 0 and heights[-1] == 24
    assert lines[7].startswith("60 -> 50") and max(map(len, lines)) < 90


def test_a_long_run_is_no_wider_in_a_terminal_and_one_without_values_is_nothing():
    rows = [{"step": step, "length": 5} for step in range(1000)]
    assert max(len(line) for line in figures.text_curve(rows).split("\n")) < 90
    assert figures.text_curve([]) == "" and figures.text_curve([{"step": 1, "loss": 2}]) == ""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs headless Chromium")
def test_a_browser_shows_the_pictures_as_images(tmp_path):
    stages = {name: {"title": title} for name, (title, *_) in figures.PLACES.items()}
    (tmp_path / "curve.svg").write_text(figures.curve_svg(ROWS, "R1-Zero"), encoding="utf-8")
    (tmp_path / "recipe.svg").write_text(figures.recipe_svg(stages), encoding="utf-8")
    script = ("addEventListener('load', () => document.title = 'SAID' "
              "+ [...document.images].map(image => image.naturalWidth) + 'END')")
    page = f'<img src="curve.svg"><img src="recipe.svg"><script>{script}</script>'
    (tmp_path / "page.html").write_text(page)
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    seen = subprocess.run(browser, capture_output=True, text=True, timeout=120).stdout
    curve, recipe = map(int, re.search("<title>SAID(.*?)END", seen)[1].split(","))
    assert curve == 860 and recipe > 1000  # an image that is no picture has no width


def test_each_line_of_the_budgets_has_a_colour_of_its_own():
    svg = figures.budgets_svg([{"step": 8, "base": 20.0, "zero": 22.0, "r1": 25.0},
                               {"step": 96, "base": 40.0, "zero": 80.0, "r1": 90.0}])
    used = set(re.findall(r'class="line (c\d)"', svg))
    assert len(used) == 3 and all(f".{name} {{ stroke:" in svg for name in used)

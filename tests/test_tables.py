"""The tables of results/ are what the command makes of the committed files, and of any run that is kept."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab import tables

ROOT = Path(tables.__file__).parent.parent
STAGES = {"base": "pretraining", "zero": "GRPO: accuracy + format", "r1": "GRPO: all rules"}


def make_run(run, seed=0, accuracy=.9):
    """A finished run of three stages, as pipeline.py leaves it."""
    rng, stages = random.Random(seed), {}
    for name, by in STAGES.items():
        (run / name).mkdir(parents=True)
        evaluation = {"accuracy": [accuracy, .85, .95], "accuracy_any": [.97, .96, .98], "format": [1.0, 1.0, 1.0],
                      "length_if_thinking": [54.3, 52, 56], "accuracy_any_level_3": [.5, .4, .6],
                      "pass@1": [.9, .8, 1], "pass@8": [.99, .98, 1.0]}
        stages[name] = {"title": name.title(), "by": by, "paper": "R1 v1 2.2", "parameters": 915_840,
                        "tokens": 3_906_081, "flops": 2.1e13, "evaluation": evaluation}
        rows = [{"prompt": f"{i}+{i}?", "answer": str(2 * i), "kind": "reasoning", "completion": f"{name} says {2 * i}"}
                for i in range(5)]
        rows += [{"prompt": "Hello", "answer": "R1", "kind": "general", "completion": "I am\nR1."}] * 2
        write_rows(run / name / "test_samples.jsonl", rows)
        write_rows(run / name / "metrics.jsonl", [metrics(rng, step) for step in range(1, 31)])
        (run / name / "model.safetensors").write_bytes(b"0" * 1000)
    stages["traces"] = {"title": "Traces", "by": "sampling", "counts": {"sampled": 9000, "correct": 800, "kept": 3500},
                        "tokens": 5, "flops": 1.0}
    claims = [{"number": number, "claim": f"claim {number}: zero > base | <b>", "source": "R1", "paper": "1 -> 2",
               "unit": "tokens" if number == "2" else "points", "ours": 4.25, "low": -1.0, "high": 9.5,
               "verdict": "unsettled", "detail": "some" if number == "2" else ""} for number in ("10 qwen", "2", "1")]
    command = f"python pipeline.py --seed {seed} --out /home/someone/runs/{seed}"
    meta = {"preset": "cpu", "seed": seed, "machine": "2 threads", "command": command}
    (run / "results.json").write_text(json.dumps({"meta": meta, "stages": stages, "claims": claims}))
    (run / "times.json").write_text(json.dumps({"date": "2026-11-26", "stages": {"base": 351.5 + seed}}))
    return run


def metrics(rng, step):
    return {"step": step, "reward": rng.random(), "accuracy": .01 * step, "accuracy_any": .5, "length": 20 + step,
            "kl": .001, "validation_accuracy": .5}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def results(tmp_path):
    """A results folder with two kept seeds of the mini-world."""
    for seed, accuracy in ((0, .9), (1, .8)):
        run = make_run(tmp_path / f"run-{seed}", seed, accuracy)
        tables.keep(run, tmp_path / "results" / "world" / f"seed-{seed}")
    return tmp_path / "results"


def rows_of(text, first):
    """The cells of the rows that begin with this one."""
    return [line.strip("| ").split(" | ") for line in text.split("\n") if line.startswith(f"| {first} |")]


def test_the_committed_tables_and_pictures_are_what_the_command_makes_of_the_committed_files():
    for name, text in tables.make_pages(ROOT / "results").items():
        path = ROOT / "results" / name
        assert path.read_text(encoding="utf-8") == text, f"{name} is stale: python -m lab.tables"


def test_the_committed_runs_have_todays_names_of_the_metrics():
    for path in (ROOT / "results").glob("*/seed-*/**/*.json*"):
        assert "accuracy_strict" not in path.read_text(encoding="utf-8"), path
    for path in (ROOT / "results").glob("*/seed-*"):
        assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < tables.MOST_BYTES


def test_a_figure_of_several_seeds_is_their_mean_and_range_and_of_one_its_interval(results):
    assert tables.spread([{"accuracy": [.9, .85, .95]}], "accuracy") == "90 [85, 95]"
    assert tables.spread([{"length": [54.3, 52, 56]}], "length") == "54 [52, 56]"
    assert tables.spread([{"accuracy": [.9, .85, .95]}, {}, {"accuracy": [.8, .7, .9]}], "accuracy") == "85 (80–90)"
    assert tables.spread([{}, {"accuracy": None}, {"accuracy": [float("nan")] * 3}], "accuracy") == ""
    text = tables.make_pages(results)["README.md"]
    stage, parts, cost, *_ = rows_of(text, "zero")
    assert stage == ["zero", "85 (80–90)", "97 (97–97)", "100 (100–100)", "54 (54–54)"]
    assert parts == ["zero", "50 (50–50)", "99 (99–99)"]
    assert cost[:2] == ["zero", "GRPO: accuracy + format; R1 v1 2.2"] and rows_of(text, "base")[2][4] == "352 / 352"
    assert "sampled 9,000; fell to correct 800; kept 3,500" in text


def test_every_claim_stands_with_figure_interval_and_verdict_per_seed(results):
    text = tables.make_pages(results)["README.md"]
    figure = "+4.2 [-1.0, +9.5] **unsettled**"
    claims = re.findall(r"^\| (\S+(?: qwen)?) \| claim", text, re.M)
    assert claims == ["1", "2", "10 qwen"]
    assert f"| 1 | claim 1: zero > base \\| &lt;b> | R1: 1 -> 2 | {figure} | {figure} |" in text
    assert f"| 2 | claim 2: zero > base \\| &lt;b> (tokens) | R1: 1 -> 2 | {figure} | {figure} |" in text
    assert "| 2 | some | some |" in text


def test_the_health_of_r1_zero_is_shown_at_rollouts_1_5_10_and_so_on(results):
    text = tables.make_pages(results)["README.md"]
    health = text[text.index("### R1-Zero"):text.index("### Samples")]
    assert re.findall(r"^\| (\d+) \|", health, re.M) == ["1", "5", "10", "15", "20", "25", "30"]
    many = [{"step": step, "reward": 0.5} for step in range(1, 301)]
    assert len(re.findall(r"^\| \d+ \|", tables.health_table(many), re.M)) == 13


def test_each_kept_problem_is_answered_by_one_stage_after_the_other(results):
    text = tables.make_pages(results)["README.md"]
    samples = text[text.index("### Samples"):]
    assert samples.count("```text") == 5  # four problems and a general request
    answers = "\n".join(f"{stage:16} {stage} says 2" for stage in STAGES)
    assert f"1+1?   (2)\n\n{answers}\n" in samples
    assert "I am ⏎ R1." in samples


def test_a_strangers_text_breaks_no_table_and_no_fence():
    assert tables.markdown("a | b\n<i>&") == "a \\| b &lt;i>&amp;"
    block = tables.fenced(["```` <i>", "x"])
    assert block == "`````text\n```` <i>\nx\n`````\n"
    assert tables.one_line("a\nb" + "c" * 9999).startswith("a ⏎ b") and len(tables.one_line("c" * 9999)) < 700


def test_a_kept_run_is_small_and_names_no_directory_of_the_machine(results):
    kept = results / "world" / "seed-0"
    names = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())
    assert names == ["kept.json", "r1/metrics.jsonl", "results.json", "samples.jsonl", "times.json",
                     "zero/metrics.jsonl"]
    assert "someone" not in (kept / "results.json").read_text()
    assert tables.without_paths("python pipeline.py --base /a/b-c/d.e --out runs/x") == \
        "python pipeline.py --base d.e --out runs/x"
    assert "python pipeline.py --seed 1 --out 1" in tables.make_pages(results)["README.md"]


def test_a_section_opens_with_what_is_said_about_it(results):
    (results / "world" / "about.md").write_text("## The mini-world\n\nWith care.\n")
    (results / "world" / "before.txt").write_text("accuracy 0.1\n")
    text = tables.make_pages(results)["README.md"]
    assert "## The mini-world\n\nWith care.\n" in text and "\n## world" not in text
    assert "[before.txt](world/before.txt):\n\n```text\naccuracy 0.1\n```" in text


def test_without_a_run_the_page_says_so(tmp_path):
    pages = tables.make_pages(tmp_path)
    assert list(pages) == ["README.md"] and "No run is kept here yet." in pages["README.md"]


def test_the_pictures_of_the_mini_world_stand_beside_the_page(results):
    pages = tables.make_pages(results)
    assert sorted(pages) == ["README.md", "curve.svg", "recipe.svg"]
    assert "solves 97%" in pages["recipe.svg"] and "R1-Zero, seed 0" in pages["curve.svg"]
    assert "![R1-Zero's curve](curve.svg)" in pages["README.md"]


def test_what_cannot_be_kept_is_one_clear_line_and_exit_code_2(tmp_path):
    run = make_run(tmp_path / "run")
    huge = make_run(tmp_path / "huge")
    write_rows(huge / "zero" / "metrics.jsonl", [metrics(random, step) for step in range(5000)])
    (tmp_path / "there").mkdir()
    for arguments, words in (((tmp_path / "none", tmp_path / "out"), "no run here"),
                             ((run, tmp_path / "there"), "is there already"),
                             ((huge, tmp_path / "out"), "the largest is zero/metrics.jsonl")):
        command = [sys.executable, "-m", "lab.tables", "--keep", *map(str, arguments)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not [*(tmp_path / "there").iterdir()]


@pytest.fixture
def searching(tmp_path):
    """A results folder with one run whose world has searches."""
    run = make_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    for name, stage in results["stages"].items():
        if "evaluation" in stage:
            stage["evaluation"] |= {"checks": [3.25, 3, 3.5], "hard_false_yes": [.125, .1, .15],
                                    "accuracy_any_search": [.5, .4, .6], "length_search_4": [90.2, 88, 92]}
    results["rule"] = {"accuracy_any_search": [.31, .3, .32], "accuracy_any_search_4": [.25, .2, .3]}
    results["budgets"] = [{"step": 8, "base": 20.4, "r1": 25.0}, {"step": 96, "base": 40.0, "r1": 90.6}]
    (run / "results.json").write_text(json.dumps(results))
    problem = {"answer": "3", "family": "search", "problem": "9,4,17+16,12,3=21", "kind": "reasoning"}
    rows = [problem | {"prompt": f"search {i}", "completion": completion}
            for i, completion in enumerate(["9+12=21 yes", "9+16=21 yes", "4+3=7 low"])]
    write_rows(run / "zero" / "test_samples.jsonl", rows)
    tables.keep(run, tmp_path / "results" / "world" / "seed-0")
    return tmp_path / "results"


def test_searches_stand_beside_the_best_rule_without_one_and_their_counts_are_per_output(searching):
    text = tables.make_pages(searching)["README.md"]
    searches = text[text.index("### Searches"):text.index("### Thinking budgets")]
    assert "| zero | 50 [40, 60] | 3.25 [3.00, 3.50] | 0.12 [0.10, 0.15] |" in searches
    assert "| best rule without a search | 31 [30, 32] |" in searches and "| zero | 90 [88, 92] |" in searches
    assert "| best rule without a search |" in text[:text.index("### Searches")]  # by level


def test_the_budgets_are_a_table_and_a_picture(searching):
    pages = tables.make_pages(searching)
    budgets = pages["README.md"].partition("### Thinking budgets")[2]
    for line in ("| thinking, tokens | 8 | 96 |", "| base | 20 | 40 |", "| r1 | 25 | 91 |"):
        assert line in budgets
    assert "tokens of thinking" in pages["budgets.svg"] and "r1 91" in pages["budgets.svg"]


def test_a_claimed_pair_that_does_not_fit_is_shown_apart_from_the_samples(searching):
    text = tables.make_pages(searching)["README.md"]
    cheats = text.partition("### Checks that are false")[2].partition("###")[0]
    samples = text.partition("### Samples")[2]
    assert "9+16=21 yes" in cheats and "9+12=21 yes" not in cheats and "4+3=7 low" not in cheats
    assert samples.count("9+16=21 yes") == 1  # as one of the first test problems


def test_the_problem_to_show_is_the_first_english_search_that_the_base_misses_and_zero_solves(tmp_path):
    problems = [{"prompt": f"search {i}", "answer": "3", "family": "search", "language": language,
                 "problem": "9,4,17+16,12,3=21", "kind": "reasoning"} for i, language in enumerate(["zh", *["en"] * 6])]
    right, wrong = "<think>9+12=21 yes so 12-9=3.</think><answer>3</answer>", "so 17-3=14.\n14"
    base, zero = [wrong, right, wrong, wrong, wrong, wrong, wrong], [right, right, wrong, wrong, wrong, right, right]
    run = make_run(tmp_path / "run")
    for name, completions in (("base", base), ("zero", zero)):
        rows = [problem | {"completion": completion} for problem, completion in zip(problems, completions)]
        write_rows(run / name / "test_samples.jsonl", rows)
    assert tables.before_and_after(run) == "search 5"
    samples = [json.loads(line) for line in tables.files_to_keep(run)["samples.jsonl"].splitlines()]
    assert [row["prompt"] for row in samples if row["stage"] == "zero"] == [f"search {i}" for i in (0, 1, 2, 3, 5)]
    write_rows(run / "zero" / "test_samples.jsonl", [])
    assert tables.before_and_after(run) is None

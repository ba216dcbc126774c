"""A page is judged by what its reader gets: hostile text stays text, and a run under way is shown as far as it is."""

import base64
import hashlib
import html
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lab import figures, read_run, report

STAGES = {  # name: title, from, by, accuracy in any style, format, language, of which kind
    "base": ("Base", None, "pretraining on the mini-world's documents", .35, .17, .83),
    "zero": ("R1-Zero", "base", "GRPO: accuracy + format", .78, .96, .46),
    "dev1": ("Dev1", "base", "SFT on zero's samples, rewritten", .65, .91, .86),
    "dev2": ("Dev2", "dev1", "GRPO: accuracy + format + language", .82, .99, .99),
    "traces": ("Traces", "dev2", "rejection sampling", None, None, None),
    "dev3": ("Dev3", "base", "SFT on traces + general, 3 : 1", .81, .98, .98),
    "r1": ("R1", "dev3", "GRPO: rules, then helpfulness and harmlessness", .84, .99, .99),
    "base_qwen": ("Small base, Qwen", None, "pretraining, few chains", .18, .06, .90),
    "base_llama": ("Small base, Llama", None, "pretraining, few chains", .17, .05, .91),
    "student_qwen": ("Student, Qwen", "base_qwen", "SFT on the same traces + general", .61, .97, .97),
    "student_llama": ("Student, Llama", "base_llama", "SFT on the same traces + general", .58, .97, .98),
    "control_qwen": ("Control, Qwen", "base_qwen", "GRPO alone, as much compute", .33, .95, .71),
    "dev2_no_language": ("Dev2 without language reward", "dev1", "GRPO: accuracy + format", .83, .99, .71),
    "control_llama": ("Control, Llama", "base_llama", "GRPO alone, as much compute", .31, .94, .75),
    "zero_random_reward": ("Zero, random reward", "base", "GRPO: a coin's reward", .34, .18, .82),
    "zero_format_only": ("Zero, format alone", "base", "GRPO: format", .38, .98, .80)}
CLAIMS = ["RL without SFT raises reasoning", "Thinking grows longer during it, within outputs that think",
          "Majority voting adds to it", "R1-Zero mixes languages",
          "The cold start restores readability and costs reasoning", "RL-1 wins the reasoning back",
          "The language reward holds consistency at little cost in accuracy",
          "SFT-2 lifts general tasks and keeps reasoning", "RL-2 lifts helpfulness and harmlessness",
          "Distillation beats RL on the same small model", "RL raises maj@k more than pass@k",
          "Accuracy grows with the thinking budget"]


# ------------------------------------------------------------------------------------------- a run to look at

def make_run(run, rollouts=60, names=STAGES):
    """A run directory as pipeline.py leaves it, its numbers drawn from a hat."""
    rng, stages = random.Random(0), {}
    for name in names:
        title, origin, by, *_ = STAGES[name]
        (run / name).mkdir(parents=True)
        stages[name] = {"title": title, "starts_from": origin, "by": by, "gives": name, "paper": "R1 v1 2.2",
                        "parameters": 912_384, "tokens": rng.randrange(10 ** 6, 10 ** 7),
                        "seconds": rng.uniform(40, 900), "flops": rng.uniform(1e13, 9e13)}
        if name == "traces":
            stages[name]["counts"] = {"sampled": 9600, "kept": 4182, "wrong": 2810, "mixed_language": 391,
                                      "unreadable": 77, "repeated": 2140}
        else:
            stages[name]["evaluation"] = evaluation(name)
            write_logs(run / name, rng, rollouts)
    meta = {"preset": "cpu", "seed": 0, "machine": "2 cores, x86_64", "date": "2026-07-01 12:00", "seconds": 4321,
            "world": "mini-world, 1–4 steps", "command": "python pipeline.py --preset cpu --seed 0"}
    claims = [claim_of(rng, number, claim) for number, claim in enumerate(CLAIMS, 1)]
    (run / "results.json").write_text(json.dumps({"meta": meta, "stages": stages, "claims": claims}))
    return run


def evaluation(name):
    _, _, _, accuracy, form, language = STAGES[name]
    means = {"accuracy_any": accuracy, "accuracy": accuracy * form, "maj@16": accuracy + .08, "format": form,
             "thinks": .6 + form * .4, "language_if_thinking": language, "accuracy_any_if_thinking": accuracy + .02,
             "length_if_thinking": 40 + 35 * accuracy, "helpfulness": form * .7, "harmlessness": .5 + form * .4,
             "refusals": .3, "pass@64": .97}
    return {metric: [mean, mean - 1.2, mean + 1.2] if mean > 2 else [mean, max(0, mean - .03), min(1, mean + .03)]
            for metric, mean in means.items()}


def write_logs(directory, rng, rollouts):
    by, steps = STAGES[directory.name][2], range(1, rollouts + 1)
    if "GRPO" in by:
        rows = [rl_row(rng, directory.name, step, rollouts) for step in steps]
        samples = [sample(rng, step) for step in steps[::2]]
        watched = [sample(rng, step) | {"problem": problem} for step in steps[9::10] for problem in range(6)]
    else:
        rows = [{"step": step, "steps": rollouts, "loss": .3 + 4 * math.exp(-9 * step / rollouts), "lr": 1e-3,
                 "grad_norm": 1} for step in steps]
        samples, watched = [], []
    write_rows(directory / "metrics.jsonl", rows)
    write_rows(directory / "samples.jsonl", samples)
    write_rows(directory / "watched.jsonl", watched)


def rl_row(rng, name, step, rollouts):
    grown, noise = 1 - math.exp(-4 * step / rollouts), rng.gauss(0, .03)
    before, after = STAGES["base"][3:], STAGES[name][3:]
    accuracy, form, language = (a + (b - a) * grown for a, b in zip(before, after))
    row = {"step": step, "reward": accuracy + .3 * form + .3 * language + noise,
           "accuracy": accuracy * form + noise, "accuracy_any": accuracy + noise, "format": min(1, form + noise),
           "language_consistency": min(1, language + noise), "length": 38 + 30 * grown + 30 * noise,
           "thinking_length": 30 + 29 * grown + 25 * noise, "unfinished": abs(noise) / 3,
           "no_signal": .1 + .3 * grown + noise, "group_std": .4, "entropy": .9 - .6 * grown + noise,
           "kl": .012 * grown * abs(1 + 8 * noise), "clip_fraction": .03 * abs(1 + 9 * noise), "ratio": 1,
           "grad_norm": .8 + abs(noise) * 9, "loss": noise / 50}
    if name == "r1":
        row |= {"helpfulness": .3 + .5 * grown + noise, "harmlessness": .5 + .4 * grown + noise}
    if step % 10 == 0 or step == rollouts:
        row |= {"validation_accuracy": accuracy * form, "validation_accuracy_any": accuracy + .02}
    return row


def claim_of(rng, number, claim):
    ours, spread = rng.choice([.42, .1, .02, -.05, 31.0 if number == 2 else .2]), .03
    if abs(ours) < spread:
        verdict = "unsettled"
    else:
        verdict = "contradicted" if ours < 0 else "holds"
    return {"number": number, "claim": claim, "source": f"R1 v1 {number}", "paper": "15.6 → 77.9", "ours": ours,
            "low": ours - spread, "high": ours + spread, "verdict": verdict,
            "detail": "zero .780, base .352, 400 problems"}


def sample(rng, step):
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    english = f"Tom has {a} apples. Tom buys {b} more. How many apples does Tom have now?"
    chinese = f"小明有{a}个苹果。又买了{b}个。小明现在有几个苹果？"
    chain = f"first {a}+{b}: ones {a % 10}+{b % 10}={a % 10 + b % 10}, tens carried, so {a + b}."
    中文 = f"先算{a}+{b}：个位{a % 10}+{b % 10}={a % 10 + b % 10}，十位进一，得{a + b}。"
    prompt, language, completion = rng.choice([
        (english, "en", f"<think>{chain}</think><answer>Tom has {a + b} apples.</answer>"),
        (english, "en", f"<think>{中文}</think><answer>{a + b}</answer>"),
        (english, "en", f"{a}+{b}={a + b - 1}\n{a + b - 1}"),
        (english, "en", f"<think>{chain} {chain} {chain}"),
        (chinese, "zh", f"<think>{中文}</think><answer>小明现在有{a + b}个苹果。</answer>")])
    answered = float("</answer>" in completion)
    scores = {"accuracy": answered, "format": answered, "language_consistency": rng.choice([1.0, .43, 0.0])}
    return {"step": step, "prompt": prompt, "answer": str(a + b), "language": language, "kind": "reasoning",
            "completion": completion, "rewards": scores}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def written(run):
    report.write(run)
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


class Reader(HTMLParser):
    """What a browser would see: the elements, and the words outside style."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        if self.open[-1:] != ["style"]:
            self.words.append(words)


# ------------------------------------------------------------------------------------------- what the page shows

def test_every_stage_and_every_claim_stands_in_the_page(run):
    shown = " ".join(Reader(written(run)).words)
    for title, *_ in STAGES.values():
        assert shown.count(title) >= 2, title  # in the table and in the curves, or in the diagram
    for claim in CLAIMS:
        assert claim in shown
    assert ".780" in shown and "4,182" in shown and "holds" in shown and "python pipeline.py --preset cpu" in shown


def test_both_accuracies_stand_in_the_page_under_their_own_names(run):
    page = written(run)
    table = page[page.index('id="stages"'):page.index('id="claims"')]
    heads = [html.unescape(head) for head in re.findall("<th>([^<]+)</th>", table)]
    assert heads[:3] == ["Stage", "accuracy", "any style"]
    zero = re.search("<th>R1-Zero.*?</tr>", table)[0]
    assert re.findall("<td>([^<]+)<", zero)[:2] == [".749", ".780"]  # .78 * .96, and .78
    curves = page[page.index('id="curves"'):page.index('id="training"')]
    for name in ("accuracy ", "any style ", "validation ", "validation, any style "):
        assert f"</svg>{name}<b>" in curves


def test_the_page_needs_nothing_from_elsewhere_and_runs_its_own_script_alone(run):
    page = written(run)
    reader = Reader(page)
    assert reader.open == []  # every element is closed
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in reader.elements}
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert scripts == [report.SCRIPT] and page.count("<script") == 1 and f"script-src 'sha256-{digest}'" in page
    for tag, attributes in reader.elements:
        assert "src" not in attributes and attributes.get("href", "#")[0] == "#"
        assert not any(name[:2] == "on" for name in attributes)
    assert "default-src 'none'" in page and "@import" not in page and not re.search(r"url\((?!#)", page)


def test_what_a_model_wrote_is_text_wherever_it_stands(tmp_path):
    run = make_run(tmp_path, rollouts=3)
    evil = "</style></svg><script>alert(1)</script><img src=x onerror=\"a\"> '&\x00\ud800\u202e"
    results = json.loads((run / "results.json").read_text())
    results["meta"] = {"preset": evil, "command": evil}
    results["stages"]["zero"] |= {"title": evil, "by": evil, "starts_from": evil, "paper": evil}
    results["stages"][evil] = results["stages"]["traces"] | {"title": evil, "counts": {evil: 1}}
    results["claims"] = [{key: evil for key in ("number", "claim", "source", "paper", "verdict", "detail")}]
    (run / "results.json").write_text(json.dumps(results))
    row = {key: evil for key in ("step", "prompt", "answer", "language", "kind")}
    row |= {"completion": f"<think>{evil}</answer>{evil}", "rewards": {evil: .5}}
    write_rows(run / "zero" / "samples.jsonl", [row])
    page = written(run)
    reader = Reader(page)
    tags = [tag for tag, _ in reader.elements]
    assert reader.open == [] and "img" not in tags and tags.count("script") == 1
    assert not any(name[:6] == "data_r" for _, attributes in reader.elements for name in attributes)
    assert "".join(reader.words).count("<script>alert(1)</script>") > 10
    assert not any(strange in page for strange in "\x00\ud800\u202e")


def test_a_run_under_way_is_shown_as_far_as_it_is(tmp_path):
    page = written(tmp_path)  # nothing yet
    assert page.count("Not yet") == 4
    assert "0 of 12 finished" in " ".join(Reader(page).words).replace("  ", " ")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.25}\n{"step": 2, "rew')
    half = '{"step": 1, "completion": "一"}\n{"step": 2, "completion": "二'.encode()[:-1]
    (tmp_path / "zero" / "samples.jsonl").write_bytes(half)
    (tmp_path / "results.json").write_text('{"meta": {"preset"')
    page = written(tmp_path)
    assert "under way: rollout 1" in page and "Reward and its parts" in page and "1 of 1 samples" in page


def test_a_comparison_stands_in_the_page_with_each_methods_curve_beside_grpos_and_nothing_unescaped(tmp_path):
    run = make_run(tmp_path, rollouts=2, names=["base"])
    curve = [{"samples": 256 * i, "seconds": 2 * i, "accuracy": 0.1 * i} for i in range(1, 6)]
    row = {"lr": 3e-4, "evaluation": {"accuracy": [0.643, 0.6, 0.7]}, "curve": curve, "samples": 1280,
           "seconds": 35.0, "peak_bytes": 2 ** 30}
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    compare = {"compare": {"grpo": row, "<i>dapo": {**row, "lr": None}}}
    (run / "results.json").write_text(json.dumps(results | compare), encoding="utf-8")
    page = written(run)
    methods = page[page.index('id="methods"'):page.index('id="samples"')]
    assert ".643" in methods and "1,024" in methods and "&lt;i&gt;dapo" in methods and "<i>dapo" not in methods
    assert methods.count("<figure") == 2 and methods.count(">grpo ") >= 1
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert 'id="methods"' not in written(run)


def test_no_value_breaks_the_page(tmp_path):
    run = make_run(tmp_path, rollouts=8)
    results = json.loads((run / "results.json").read_text())
    for stage in results["stages"].values():
        stage |= {"tokens": None, "flops": math.nan, "seconds": math.inf, "parameters": "many", "starts_from": None}
    results["stages"]["zero"]["evaluation"] = {"accuracy": [math.nan] * 3, "format": None, "thinks": [.5],
                                               "maj@16": ["x", 0, 1]}
    results["stages"]["dev1"] = {}
    results["claims"] = [{"ours": math.nan, "low": None, "high": 1, "verdict": None}, {},
                         {"ours": 0, "low": 0, "high": 0}]
    results["meta"] = None
    (run / "results.json").write_text(json.dumps(results))
    odd = [{"step": 1, "reward": math.nan}, {"step": None, "reward": 1}, {"reward": 1}, [], None,
           {"step": 2, "reward": -math.inf, "kl": True},
           {"step": 3, "reward": 0, "kl": "1", "entropy": 1e299, "grad_norm": 1e-320},
           {"step": 3, "reward": None, "length": -5}]
    write_rows(run / "zero" / "metrics.jsonl", odd)
    odd = [{}, {"completion": None, "rewards": None}, {"rewards": {"accuracy": math.nan}}]
    write_rows(run / "zero" / "samples.jsonl", odd)
    reader = Reader(written(run))
    assert reader.open == [] and not re.search(r"\b(nan|inf|None)\b", " ".join(reader.words))
    values = [str(value) for _, attributes in reader.elements for value in attributes.values()]
    assert not any(re.search("nan|inf", value) for value in values)


# ------------------------------------------------------------------------------------------- hostile files

def places(value, at=()):
    """The way to each value within a JSON value."""
    yield at
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, each in items:
        yield from places(each, (*at, key))


def changed(value, at, new):
    """A copy with `new` at that place."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Every file that a page is made of and every kind of entry, once or twice."""
    run, rng = tmp_path_factory.mktemp("small"), random.Random(0)
    (run / "zero").mkdir()
    stage = {"title": "R1-Zero", "starts_from": "base", "by": "GRPO", "paper": "2.2", "parameters": 1, "tokens": 1,
             "flops": 1, "evaluation": {"accuracy": [.5, .4, .6]}}
    traces = {"title": "Traces", "by": "sampling", "counts": {"sampled": 3, "wrong": 1, "kept": 1}}
    method = {"lr": 1e-3, "evaluation": {"accuracy": [.5, .4, .6]}, "peak_bytes": 1,
              "curve": [{"samples": 8, "accuracy": .5}, {"samples": 16, "accuracy": .6}]}
    results = {"meta": {"preset": "cpu"}, "stages": {"zero": stage, "traces": traces},
               "claims": [claim_of(rng, 1, CLAIMS[0])], "compare": {"grpo": method, "step": method}}
    times = {"stages": {"zero": 1}, "compare": {"grpo": {"seconds": 1}}, "seconds": 1, "date": "today"}
    (run / "results.json").write_text(json.dumps(results))
    (run / "times.json").write_text(json.dumps(times))
    write_rows(run / "zero" / "metrics.jsonl", [rl_row(rng, "zero", step, 2) for step in (1, 2)])
    write_rows(run / "zero" / "samples.jsonl", [sample(rng, step) for step in (1, 2)])
    write_rows(run / "zero" / "watched.jsonl", [sample(rng, step) | {"problem": 0} for step in (1, 2)])
    write_rows(run / "zero" / "warnings.jsonl", [{"step": 1, "warning": "no reward"}])
    results = json.loads((run / "results.json").read_text())
    results["budgets"] = [{"step": 8, "zero": 20.4}]
    (run / "results.json").write_text(json.dumps(results))
    return run


LOGS = ["metrics", "samples", "watched", "warnings"]
FILES = ["results.json", "times.json", *(f"zero/{name}.jsonl" for name in LOGS)]


@pytest.mark.parametrize("odd", [None, 5, "abc", [1], {"x": [1]}], ids=str)
@pytest.mark.parametrize("file", FILES)
def test_a_value_of_another_type_anywhere_in_a_run_is_not_yet_there(file, odd, small_run):
    whole = (small_run / file).read_text()
    first, *others = [whole] if file.endswith("json") else whole.splitlines()
    try:
        for place in places(json.loads(first)):
            hostile = json.dumps(changed(json.loads(first), place, odd))
            (small_run / file).write_text("\n".join([hostile, *others]))
            reader = Reader(written(small_run))
            assert reader.open == [] and "R1-Zero" in " ".join(reader.words) or place[-1:] == ("title",), place
    finally:
        (small_run / file).write_text(whole)


ENDLESS = ["[" * 100_000, '{"a":' * 100_000, '{"step": 1, "kind": ' + "[" * 900 + "]" * 900 + "}"]


@pytest.mark.parametrize("endless", ENDLESS, ids=len)
@pytest.mark.parametrize("file", FILES)
def test_a_nesting_without_end_is_not_yet_there(file, endless, small_run):
    whole = (small_run / file).read_text()
    (small_run / file).write_text(endless)
    written(small_run)
    (small_run / file).write_text(whole)


def test_a_stage_whose_name_leads_out_of_the_run_is_no_stage_of_it(tmp_path):
    run, secret = make_run(tmp_path / "run", rollouts=2, names=["zero"]), tmp_path / "secret"
    (secret / "inner").mkdir(parents=True)
    row = {"step": 1, "problem": 1, "reward": 1, "completion": "SECRET", "warning": "SECRET"}
    for place in (secret, secret / "inner", run, tmp_path):
        for name in ("samples", "watched", "warnings", "metrics"):
            write_rows(place / f"{name}.jsonl", [row])
    names = [str(secret), "../secret", "../secret/inner", "zero/../../secret", ".", "..", "", "a\nb", "zero\n",
             "x" * 101, "é" * 100, "\0"]
    stages = {name: {"title": "STRANGE"} for name in names} | {"dev2.no-language_1": {}}
    (run / "results.json").write_text(json.dumps({"stages": stages}))
    (run / "times.json").write_text(json.dumps({"stages": dict.fromkeys(names, 1)}))
    page = written(run)
    assert "SECRET" not in page and "STRANGE" not in page and "dev2.no-language_1" in page


@pytest.mark.parametrize("rows", [
    [{"step": 1e17, "reward": 1}],
    [{"step": -1e299, "reward": 1e299}, {"step": 1e299, "reward": -1e299}],
    [{"step": 1, "reward": 0, "kl": 5e-324}, {"step": 2, "reward": 0, "kl": 1e-323}],
    [{"step": 2 ** 52 + .5, "reward": 1 + 2 ** -52}, {"step": 2 ** 52, "reward": 1}],
    [{"step": 10 ** 299, "reward": 2 ** 900 + 2 ** 847 - 1},
     {"step": 10 ** 299 + 1, "reward": 2 ** 900 + 2 ** 847 + 1}]])
def test_a_chart_of_numbers_next_to_each_other_or_far_apart_is_drawn(rows, tmp_path):
    (tmp_path / "zero").mkdir()
    write_rows(tmp_path / "zero" / "metrics.jsonl", rows)
    claims = {"claims": [{"ours": 5e-324, "low": 0, "high": 1e-323}]}
    (tmp_path / "results.json").write_text(json.dumps(claims))
    page = written(tmp_path)
    assert "Reward and its parts" in page and not re.search(r'="[^"]*\b(nan|inf)\b', page)


def test_blank_lines_are_passed_over_in_no_time(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n" * 1_000_000 + '{"step": 1}\r\n \n[1]\n5\n')
    started = time.process_time()
    assert read_run.read_objects(tmp_path / "rows.jsonl") == [{"step": 1}]
    assert time.process_time() - started < 0.5


def test_what_is_no_file_is_not_read(tmp_path):
    (tmp_path / "zero").mkdir()
    for name in FILES:
        os.mkfifo(tmp_path / name)  # a read of it would wait for ever
    assert "Not yet: no stage has logged a step" in written(tmp_path)


def test_a_finished_write_leaves_one_file_and_a_failed_one_the_old_page(run, monkeypatch):
    def full_disk(*_):
        raise OSError("full")

    page = written(run)
    monkeypatch.setattr(report.os, "replace", full_disk)
    with pytest.raises(OSError):
        report.write(run)
    assert (run / "report.html").read_text() == page
    monkeypatch.undo()
    assert written(run) == page
    assert [path.name for path in run.iterdir() if "report" in path.name] == ["report.html"]


def test_a_long_run_stays_a_small_page(tmp_path):
    run = make_run(tmp_path, rollouts=2000, names=["base", "zero", "r1"])
    long = [{"step": i, "completion": "<think>" + "很长" * 9999} for i in range(99)]
    write_rows(run / "r1" / "samples.jsonl", long)
    page = written(run)
    assert len(page.encode()) < 700_000
    paths = re.findall(r'class="(?:line|raw) [^>]*', page)
    assert max(path.count(",") for path in paths) <= figures.MOST_POINTS + 1
    assert page.count("<article") <= report.MOST_SAMPLES * 3 * 8


def test_a_row_written_again_after_a_resume_replaces_the_first(tmp_path):
    (tmp_path / "zero").mkdir()
    rows = [{"step": 1, "reward": 0}, {"step": 2, "reward": 9}, {"step": 2, "reward": .5}]
    write_rows(tmp_path / "zero" / "metrics.jsonl", rows)
    _, stages, *_ = read_run.read_run(tmp_path)
    assert [row["reward"] for row in stages["zero"]["rows"]] == [0, .5]


# ------------------------------------------------------------------------------------------- samples

def test_tags_are_shown_as_the_model_wrote_them():
    shown = "".join(report.completion("so <think>a<think>b</think>c</answer>", "en"))
    assert re.sub(r"<[^>]*>|\s", "", shown) == "so&lt;think&gt;a&lt;think&gt;b&lt;/think&gt;c&lt;/answer&gt;"
    assert shown.count('class="think"') == 2 and shown.count('class="loose"') == 2


def test_words_of_another_language_are_marked():
    assert "".join(report.marked("ones 先算 4+3=7", "en")) == "ones <mark>先算</mark> 4+3=7"
    assert "".join(report.marked("先算 tens, then 7", "zh")).count("<mark>") == 2


# ------------------------------------------------------------------------------------------- in a browser, as a command

CLICKS = """
const said = {}, box = document.querySelector(".watched");
const [problem, step, label] = ["select", "input", "output"].map(tag => box.querySelector(tag));
const shown = box => [...box.querySelectorAll("article")].filter(card => card.offsetParent !== null);
said.at_first = [shown(box).length, shown(box)[0].dataset.step, label.textContent];
step.value = step.max; step.dispatchEvent(new Event("input"));
said.at_the_end = [shown(box).length, shown(box)[0].dataset.step, label.textContent];
problem.value = "2"; problem.dispatchEvent(new Event("change"));
said.another_problem = [shown(box).length, shown(box)[0].dataset.problem, shown(box)[0].dataset.step];
const list = document.querySelector(".filtered"), choice = list.querySelector("select");
said.filters = [...choice.options].map(option => {
  choice.value = option.value; choice.dispatchEvent(new Event("change"));
  return [option.textContent, shown(list).length, list.querySelector("output").textContent];
});
document.querySelectorAll("details").forEach(fold => {
  fold.querySelector("summary").click(); fold.querySelector("summary").click();
});
said.links = [...document.querySelectorAll("nav a")].every(
  link => document.querySelector(link.getAttribute("href")));
said.wide = document.documentElement.scrollWidth <= innerWidth && label.getBoundingClientRect().right <= innerWidth;
document.title = "SAID" + JSON.stringify(said) + "END";
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs headless Chromium")
@pytest.mark.parametrize("width", [1300, 500])
def test_the_slider_and_the_filter_do_what_they_say_when_they_are_clicked(width, run, tmp_path):
    """A copy of the page, whose policy forbids it any other script, with a script that clicks."""
    policy = '<meta http-equiv="Content-Security-Policy"[^>]*>'
    page = re.sub(policy, "", written(run)).replace("</body>", f"<script>{CLICKS}</script></body>")
    (tmp_path / "clicked.html").write_text(page, encoding="utf-8")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
               f"file://{tmp_path / 'clicked.html'}"]
    seen = subprocess.run(browser, capture_output=True, text=True, timeout=120).stdout
    said = json.loads(html.unescape(re.search("SAID(.*?)END", seen, re.S)[1]))
    assert said["at_first"] == [1, "10", "step 10"] and said["at_the_end"] == [1, "60", "step 60"]
    assert said["another_problem"] == [1, "2", "60"]
    (all_, count, _), *others = said["filters"]
    assert all_ == "all" and count == 12 and said["links"] and said["wide"], said
    for (full, a, shown), (not_full, b, _) in zip(others[::2], others[1::2]):
        assert not_full == full.replace("full", "not full") and a + b == count and shown == f"{a} of {count}"
    assert any(0 < a < count for _, a, _ in others)


def script(*arguments):
    root = Path(report.__file__).parent.parent
    command = [sys.executable, "-m", "lab.report", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_a_directory_without_a_run_is_one_clear_line_and_exit_code_2(run, tmp_path):
    for bad in (tmp_path, tmp_path / "missing", report.__file__):
        result = script(bad)
        assert result.returncode == 2 and str(bad) in result.stderr and result.stderr.count("\n") == 1
        assert not result.stdout
    assert not [*tmp_path.iterdir()]
    assert script(run).returncode == 0


def test_the_budgets_are_a_chart_of_the_measured_stages_against_tokens_of_thinking(tmp_path):
    run = make_run(tmp_path / "run", rollouts=3, names=["base", "zero", "r1"])
    results = json.loads((run / "results.json").read_text())
    page_without = written(run)
    results["budgets"] = [{"step": 96, "base": 40.5, "zero": 75.0, "r1": 90.6}, {"step": 8, "base": 20.4, "r1": "x"}]
    (run / "results.json").write_text(json.dumps(results))
    page = written(run)
    assert "Solved, %" not in page_without
    section = page.partition('<h2 id="budgets">')[2].partition("<h2")[0]
    assert "Solved, %" in section and "90.6" in section and "40.5" in section


if __name__ == "__main__":  # python -m tests.test_report DIR: a run to look at
    report.write(make_run(Path(sys.argv[1])))

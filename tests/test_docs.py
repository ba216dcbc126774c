"""README.md, docs/ and docstrings speak of files, functions, commands and options that exist."""

import ast
import importlib
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

import grpo
from forked import run_forked

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "results").glob("**/README.md"))  # an about.md is a part of one
CODE = [file for folder in (".", "lab", "data", "variants", "tests") for file in sorted((ROOT / folder).glob("*.py"))]
COMMANDS = re.compile(r"python (-m )?((?:lab|data|variants|tests)[./]\w+(?:\.py)?|\w+\.py)")
IN_CODE = re.compile(r"(?<!`)`[^`]+`(?!`)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
MADE_BY_THE_READER = {"my_rules.py"}


def names_of(file):
    """The functions and classes that a file defines at its top level."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_readmes_algorithm_names_functions_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    steps = text.partition("## The algorithm")[2].partition("\n## ")[0]
    named = set(re.findall(r"\(`(\w+)`", steps))
    assert named >= {"rollout", "group_advantages", "policy_loss", "kl_divergence", "update", "train"}
    assert named <= names_of("grpo.py") | names_of("rewards.py"), named
    assert "stage_table" in names_of("pipeline.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs_a_file_that_exists(page):
    for module_flag, name in COMMANDS.findall(page.read_text(encoding="utf-8")):
        file = name.replace(".", "/") + ".py" if module_flag else name
        assert file in MADE_BY_THE_READER or (ROOT / file).exists(), f"python {module_flag}{name}"


def prose_of(path):
    """What a page or a docstring says today, each command on one line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    text = re.sub(r"\\\n *", "", text)
    return IN_CODE.sub(lambda code: code[0].replace("\n", " "), text)


@cache
def shown_options():
    """(path, module, option) of each option in a command of ours that is shown."""
    shown = []
    for path in [*PAGES, *RESULTS, *CODE]:
        for _, name, rest in re.findall(COMMANDS.pattern + r"([^`#\n]*)", prose_of(path)):
            module = name.removesuffix(".py").replace("/", ".")
            shown += [(path.name, module, option) for option in OPTION.findall(rest)]
    return shown


@cache
def options_of(module):
    """The options that --help lists."""
    ended = run_forked(importlib.import_module(module).main, argv=[module, "--help"])
    assert ended.status == 0, ended.stderr
    listed = re.findall(r"^  (-.*?)(?:  |$)", ended.stdout, re.MULTILINE)
    return {option for line in listed for option in OPTION.findall(line)}


def test_every_option_of_a_command_shown_is_one_that_the_command_has():
    shown = shown_options()
    assert {module for _, module, _ in shown} >= {"pipeline", "variants.ppo", "lab.tables", "tests.bench"}
    assert not [found for found in shown if found[2] not in options_of(found[1])]


def test_every_option_that_a_page_names_is_one_of_some_command():
    others = {"--full", "--nproc-per-node"}  # of tests/conftest.py, of torchrun
    known = others.union(*(options_of(module) for _, module, _ in shown_options()))
    named = [(page.name, option) for page in [*PAGES, *RESULTS]
             for code in IN_CODE.findall(prose_of(page)) for option in OPTION.findall(code)]
    assert len(named) > 50 and not [found for found in named if found[1] not in known]


def test_the_readme_can_be_read_in_a_few_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2000


def test_the_generate_that_the_documents_give_trains_a_module_of_ones_own():
    text = (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8")
    block, = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def generate(" in code]
    names = {"torch": torch}
    exec(block, names)  # our own document

    class Table(torch.nn.Module):
        """The next token depends on this one."""
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Embedding(8, 8)

        def forward(self, ids):
            return self.logits(ids)

    rows = []
    config = grpo.GRPOConfig(rollouts=30, prompts_per_rollout=2, group_size=16, lr=0.3, warmup=1, max_new_tokens=5,
                             dtype="float32")
    grpo.train(Table(), [[1, 2], [4]], encode=list, decode=lambda ids: [id for id in ids if id != 3],
               generate=names["generate"], end_ids=[3], config=config,
               rewards={"sevens": lambda ids, example: ids.count(7) / 5},
               log=lambda metrics, rollout: rows.append(metrics))
    assert rows[0]["reward"] < 0.3 and rows[-1]["reward"] > 0.5
    assert rows[0]["sampler_gap"] < 1e-5  # its log-probabilities are those of the loss


def rows_of(text, heading):
    """The cells of each table row below a heading, without bold."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.replace("**", "").strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def shown_run():
    """The run whose figures the README shows: the lowest seed of those that are kept."""
    runs = (ROOT / "results" / "world").glob("seed-*")
    return min(runs, key=lambda path: int(path.name.removeprefix("seed-")))


def test_the_readmes_figures_are_those_of_the_committed_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads((shown_run() / "results.json").read_text(encoding="utf-8"))

    def percent(stage, metric):
        evaluation = results["rule"] if stage == "rule" else results["stages"][stage]["evaluation"]
        return f"{100 * evaluation[metric][0]:.0f}"

    rows = {row[0]: row[1:] for row in rows_of(text, "Results")}
    stages = {name: name for name in ("base", "zero", "dev1", "dev2", "dev3", "r1")}
    stages |= {"student, Qwen": "student_qwen", "student, Llama": "student_llama"}
    searches = ("accuracy_any_search", "accuracy_any_hard_search")
    for name, stage in stages.items():
        metrics = ("accuracy_any", "accuracy", *searches, "language_if_thinking", "helpfulness", "harmlessness")
        assert rows[name] == [percent(stage, metric) for metric in metrics], name
    assert rows["best rule without a search"][2:4] == [percent("rule", metric) for metric in searches]
    promise = " ".join(text.partition("\n![")[0].split())
    for stage in ("base", "zero", "r1"):
        assert f"solves {percent(stage, 'accuracy_any')}%" in promise
    assert f"stays at {percent('control_qwen', 'accuracy_any')}%" in text
    claims = {claim["number"]: claim for claim in results["claims"]}
    second_part = " ".join(re.findall(r"[-+][\d.]+ \[.*?\]", claims["2"]["detail"]))
    assert f"claim 2's second is {second_part}" in text
    for number in ("1", "2", "3", "4", "5", "6", "8", "9", "10", "12", "13"):
        claim = claims["10 qwen" if number == "10" else number]
        figure = f"{claim['ours']:+.1f} [{claim['low']:+.1f}, {claim['high']:+.1f}]"
        assert re.sub(" [a-z]+$", "", rows[number][1]) == figure and rows[number][2] == claim["verdict"], number


def test_the_readmes_problem_and_answers_are_of_the_committed_run():
    text = "".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    lines = (shown_run() / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    shown = [row for row in samples if "".join(row["prompt"].split()) in text]
    assert {row["stage"] for row in shown} >= {"base", "zero", "r1"}
    for row in shown:
        if row["stage"] in ("base", "zero", "r1"):
            assert "".join(row["completion"].split()) in text, row["stage"]

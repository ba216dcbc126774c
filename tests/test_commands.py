"""The commands in blocks of README.md and two pages of docs/ run, made small, in a folder that holds what they name."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from forked import run_forked
from runs import write
from test_own_model import SMALL, own  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": 5, "docs/own_model.md": 29, "docs/when_it_goes_wrong.md": 2}  # and how many each has
MODELS = ("DIR", "SmolLM2", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "runs/cpu-0/base", "runs/cpu-0/r1")
RL = "--prompts-per-rollout 4 --group-size 4 --minibatches 2 --max-new-tokens 40"
ADDED = {"grpo.py": RL, "sft.py": "--epochs 1", "distill.py": "--samples 2 --max-new-tokens 40",
         "evaluate.py": "--samples 2 --max-new-tokens 8", "pipeline.py": "--preset smoke --device cpu"}


def commands_of(page):
    """Those of Python, a line each, without the comment; the tests' own is left out."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", "")
    found = re.findall(r"^    (?:.* && )?(python .*)$", text, re.MULTILINE)
    return [re.sub(r" +# .*", "", command) for command in found if "-m pytest" not in command]


@pytest.fixture(scope="module")
def folder(own, tmp_path_factory):  # noqa: F811
    """What the commands name: models, problem sets in three forms, pairs, the page's own rules."""
    dir = tmp_path_factory.mktemp("folder")
    for name in MODELS:
        shutil.copytree(own / "base", dir / name)
    (dir / "gsm8k").mkdir()
    for name in ("FILE", "train.jsonl", "gsm8k/train.jsonl"):
        shutil.copy(own / "train.jsonl", dir / name)
    for name in ("TEST", "test.jsonl", "gsm8k/test.jsonl"):
        shutil.copy(own / "test.jsonl", dir / name)
    write(dir / "cmath.jsonl", [{"question": f"{i}+1?", "golden": str(i + 1)} for i in range(8)])
    nested = [{"chat": {"question": f"{i}+1?"}, "reward_model": {"ground_truth": str(i + 1)}} for i in range(8)]
    (dir / "set.json").write_text(json.dumps(nested))
    write(dir / "EXAMPLES", [{"prompt": f"{i}?", "completion": f"{i}!" * 9} for i in range(60)])
    write(dir / "pairs.jsonl", [{"prompt": f"{i}?", "chosen": f"{i}!", "rejected": "no"} for i in range(40)])
    text = (ROOT / "docs/own_model.md").read_text(encoding="utf-8")
    rules, = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def short_answers" in code]
    (dir / "my_rules.py").write_text(rules)
    return dir


def made_small(command, number):
    """The command with small sizes, and its results in a folder of their own."""
    changes = {"--test FILE": "--test TEST", "--rollouts 100": "--rollouts 1", "--rollouts 200": "--rollouts 2",
               "chatml": "none", "reward_model:DIR": "reward_model:JUDGE"}  # the tiny tokenizer has no <|im_start|>
    out = f"OUT-{number}"
    if "variants.reward_model" in command:
        out = "JUDGE"
    if "--keep-state" in command:  # two commands: the second goes on where the first has ended
        out = "KEPT"
    changes |= {"--out DIR": f"--out {out}", "--out zero": f"--out {out}"}
    if "sft.py" in command:
        changes["--data FILE"] = "--data EXAMPLES"
    for shown, ours in changes.items():
        command = command.replace(shown, ours)
    if "--base" in command:
        return f"{command} {' '.join(SMALL)}" + ("" if "--out" in command else f" --out {out}")
    if "--on-policy" in command:
        return f"{command} {RL} --rollouts 1"
    script = command.split()[1]
    if script == "grpo.py" and "--rollouts" not in command:
        command += " --rollouts 1"
    return f"{command} {ADDED.get(script, '')}"


def run(command, folder):
    """It as python runs it, in a fork; what it prints goes where it is sent."""
    command, _, to = command.partition(" > ")
    _, *args = shlex.split(command)

    def program():
        if args[0] == "-c":
            exec(args[1], {})  # our own document
        elif args[0] == "-m":
            runpy.run_module(args[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / args[0]), run_name="__main__")

    argv = args[1:] if args[0] == "-m" else args
    with open(folder / (to.strip() or "said"), "w") as stdout:
        ended = run_forked(program, argv=argv, cwd=folder, stdout=stdout, timeout=280)
    assert ended.status == 0, f"{command}\n{ended.stderr}"
    if "--out" in args:
        assert any((folder / args[args.index("--out") + 1]).iterdir()), command


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES)
def test_each_command_of_a_page_runs_as_it_is_shown(page, folder):
    commands = commands_of(page)
    assert len(commands) == PAGES[page]
    for number, command in enumerate(commands):
        run(made_small(command, f"{Path(page).stem}-{number}"), folder)

"""Each command of README.md and docs/ runs as it is shown: in a folder with what it names, and with small sizes added."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from forked import run_forked
from runs import write
from test_own_model import SMALL, own  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/own_model.md", "docs/when_it_goes_wrong.md"]  # the others' are of bench.py, gpu.py, torchrun
MODELS = ("DIR", "SmolLM2", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "runs/cpu-0/base", "runs/cpu-0/r1")
RL = "--rollouts 1 --prompts-per-rollout 4 --group-size 4 --minibatches 2 --max-new-tokens 40"
ADDED = {"pipeline.py": "--preset smoke --device cpu", "grpo.py": RL, "sft.py": "--epochs 1",
         "distill.py": "--samples 2 --max-new-tokens 40", "evaluate.py": "--samples 2 --max-new-tokens 8"}


def commands_of(page):
    """Those of Python that stand in a block of their own, a line each, without the comment."""
    text = re.sub(r"\\\n *", "", (ROOT / page).read_text(encoding="utf-8"))
    text = text.replace("pip install -r requirements.txt && ", "")
    return [line.partition("  #")[0].strip() for line in re.findall(r"^    (python .*)$", text, re.MULTILINE)
            if "-m pytest" not in line]


@pytest.fixture(scope="module")
def folder(own, tmp_path_factory):  # noqa: F811
    """What the commands name: models, problem sets in three forms, pairs, the page's own rules."""
    dir = tmp_path_factory.mktemp("folder")
    for name in MODELS:
        shutil.copytree(own / "base", dir / name)
    (dir / "gsm8k").mkdir()
    for name in ("FILE", "TEST", "train.jsonl", "test.jsonl", "gsm8k/train.jsonl", "gsm8k/test.jsonl"):
        shutil.copy(own / ("test.jsonl" if "test" in name.lower() else "train.jsonl"), dir / name)
    write(dir / "cmath.jsonl", [{"question": f"{i}+1?", "golden": str(i + 1)} for i in range(8)])
    nested = [{"chat": {"question": f"{i}+1?"}, "reward_model": {"ground_truth": str(i + 1)}} for i in range(8)]
    (dir / "set.json").write_text(json.dumps(nested))
    write(dir / "pairs_for_sft.jsonl", [{"prompt": f"{i}?", "completion": f"{i}!" * 9} for i in range(60)])
    write(dir / "pairs.jsonl", [{"prompt": f"{i}?", "chosen": f"{i}!", "rejected": "no"} for i in range(40)])
    text = (ROOT / "docs/own_model.md").read_text(encoding="utf-8")
    rules, = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def short_answers" in code]
    (dir / "my_rules.py").write_text(rules)
    return dir


def adapted(command, number):
    """(script or code, arguments, file for the output): small sizes, and results where no other command's are."""
    command, _, to = command.partition(" > ")
    _, script, *args = shlex.split(command)
    if script == "-c":
        return args[0], [], to
    if script == "-m":
        script, *args = args
    if script == "pipeline.py" and "--base" in args:
        args += [*SMALL, *([] if "--out" in args else ["--out", "DIR"])]
    elif script == "distill.py" and "--on-policy" in args:
        args += ADDED["grpo.py"].split()
    else:
        args += ADDED.get(script, "").split()
    for i, arg in enumerate(args):
        if args[i - 1] == "--out" and arg in ("DIR", "zero"):
            args[i] = "JUDGE" if script == "variants.reward_model" else f"out-{number}"
        elif args[i - 1] == "--test" and arg == "FILE":
            args[i] = "TEST"
        elif arg == "chatml":  # the tiny tokenizer has no <|im_start|>
            args[i] = "none"
        elif script == "sft.py" and arg == "FILE":
            args[i] = "pairs_for_sft.jsonl"
        elif arg == "reward_model:DIR":
            args[i] = "reward_model:JUDGE"
    return script, args, to


def run(script, args, to, folder):
    def program():
        if not re.fullmatch(r"[\w./]+", script):
            return exec(script)  # our own document
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()

    with open(folder / (to or "said"), "w") as stdout:
        return run_forked(program, argv=[script, *args], cwd=folder, stdout=stdout, timeout=280)


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES)
def test_each_command_of_a_page_runs_as_it_is_shown(page, folder):
    commands = commands_of(page)
    assert len(commands) >= 2
    for number, command in enumerate(commands):
        ended = run(*adapted(command, f"{Path(page).stem}-{number}"), folder)
        assert ended.status == 0, f"{command}\n{ended.stderr}"

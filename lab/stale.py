"""Which results were made by other code than today's: of a run's stages, and of what is kept in results/.

    python -m lab.stale                       # for each kept result its commit, and the files that differ since
    python -m lab.stale --at COMMIT FILE ...  # the JSON of a result that these files made at a commit

In each folder of results/ a JSON file says {"commit": its name, "files": {file: hash of its code}}, or lists such.
"""

import argparse
import ast
import hashlib
import io
import json
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# The files that a stage's weights depend on, and its figures. Pretraining depends on no reward; every other stage does,
# at least through the samples that it starts from.
PRETRAINING_CODE = ("model.py", "tokenizer.py", "lab/layers.py", "sft.py", "data/world.py")
DEEPSEEK_CODE = ("variants/deepseek_v3.py", "variants/v3_pretraining.py", "variants/v3_weights.py")  # on such a base
CODE = (*PRETRAINING_CODE, "grpo.py", "rewards.py", "data/math_answers.py", "data/exact_numbers.py",
        "distill.py", "lab/graphs.py", "lab/asking.py", "lab/lots.py")
MEASURED_BY = ("evaluate.py", "data/search.py", "lab/measure.py", "lab/claims.py", "lab/compare.py", "lab/run.py",
               "lab/sources.py", "lab/scripts.py", "pipeline.py", "variants/ppo.py", "variants/prime.py",
               "variants/dapo.py", "variants/configs.py")


def code_hash(text):
    """Of a Python file's code alone: comments, docstrings and empty lines do not count."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno - 1
            after = lines[last].encode()[node.body[0].end_col_offset:].decode()
            lines[first] = lines[first].encode()[:node.body[0].col_offset].decode() + after
            lines[first + 1:last + 1] = [""] * (last - first)
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def hash_of(file):
    """The hash of a file of this project's, or None where it is no longer there."""
    path = ROOT / file
    return code_hash(path.read_text(encoding="utf-8")) if path.exists() else None


def code_of(files):
    """{file: its hash}, which tells later that a result was made by other code."""
    return {file: hash_of(file) for file in files}


def changed_files(code):
    """Those files of {file: hash} that are different now, or gone."""
    return [file for file, old in code.items() if hash_of(file) != old]


def check_unchanged(run_dir):
    """Raises ValueError where a stage of a run was made by other code than today's."""
    for path in sorted(run_dir.glob("*/DONE")):
        changed = changed_files(json.loads(path.read_text(encoding="utf-8")).get("code", {}))
        if changed:
            raise ValueError(f"{path.parent}: {', '.join(changed)} changed since it was made")


def commit():
    """Of the code beside this file, with a mark where files have changed since."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


def made_by(files):
    """What a kept result says of its code."""
    return {"commit": commit(), "files": code_of(files)}


def made_at(name, files):
    """The same of a result that was made at a commit. Raises CalledProcessError where git has no such file."""
    hashes = {}
    for file in files:
        command = ["git", "show", f"{name}:{file}"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        hashes[file] = code_hash(shown.stdout)
    return {"commit": name, "files": hashes}


def kept_results(folder):
    """(name, what made_by said) of each result that is kept in a folder."""
    for path in sorted(folder.rglob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for entry in found if isinstance(found, list) else [found]:
            if "files" in entry and "commit" in entry:
                name = f"{path.parent.relative_to(folder)} {entry.get('what', '')}"
                yield name.strip(), entry


def main():
    parser = argparse.ArgumentParser(description="Which of the kept results were made by other code than today's.")
    parser.add_argument("--at", nargs="+", metavar=("COMMIT", "FILE"), help="print what a result of these files says")
    args = parser.parse_args()
    if args.at:
        if len(args.at) < 2:
            parser.error("--at takes a commit and the files that made the result")
        try:
            print(json.dumps(made_at(args.at[0], args.at[1:]), indent=1))
        except subprocess.CalledProcessError as error:
            parser.exit(2, error.stderr)
        return
    for name, entry in kept_results(ROOT / "results"):
        changed = changed_files(entry["files"])
        print(f"{name:44} {entry['commit']:12} " + (f"since changed: {', '.join(changed)}" if changed else "as now"))


if __name__ == "__main__":
    main()

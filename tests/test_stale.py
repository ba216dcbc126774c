"""What other code has made is told from what today's code has: by its code alone, not by its words."""

import json
import subprocess

import pytest

from lab import stale

CODE = '''"""What it is."""

LIMIT = 3  # tries


def f(x):
    """Doubled."""
    return f"{x}  # no comment" * 2


class A:
    """A."""
    y = "#"  # a mark
'''


@pytest.mark.parametrize("old, new", [
    ("What it is.", "It.\n\nMore of it."), ("  # tries", ""), ("  # tries", "  # other words"),
    ("LIMIT", "# x\n\n\nLIMIT"), ('    """Doubled."""\n', ""), ("# a mark", "#"),
    ("    return", "    # so\n\n    return")])
def test_comments_docstrings_and_empty_lines_change_nothing(old, new):
    assert old in CODE and stale.code_hash(CODE.replace(old, new, 1)) == stale.code_hash(CODE)


@pytest.mark.parametrize("old, new", [
    ("3", "4"), ("# no comment", "# none"), ('"#"', '"##"'), ("* 2", "* 3"), ("def f(x)", "def f(x, y=1)"),
    ("A:", "B:"), ("    return", "    x = 1\n    return"), ('y = "#"', 'y = """A."""')])
def test_each_change_of_the_code_changes_the_hash(old, new):
    assert old in CODE and stale.code_hash(CODE.replace(old, new, 1)) != stale.code_hash(CODE)


def test_of_a_line_with_a_docstring_the_rest_counts():
    line = 'def f(x): """What."""; x = 1\n'
    assert stale.code_hash(line) == stale.code_hash(line.replace("What", "Else"))
    assert len({stale.code_hash(line.replace(old, new)) for old, new in (("(x)", "(y)"), ("1", "2"), ("a", "a"))}) == 3


def test_a_run_of_other_code_is_named_with_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(stale, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(CODE)
    for name in ("base", "zero"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "DONE").write_text(json.dumps({"code": stale.code_of(["a.py"])}))
    stale.check_unchanged(tmp_path / "run")
    (tmp_path / "run" / "zero" / "DONE").write_text(json.dumps({"code": {"a.py": "old"}}))
    with pytest.raises(ValueError, match="zero: a.py changed since it was made"):
        stale.check_unchanged(tmp_path / "run")


def test_a_file_that_changed_or_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stale, "ROOT", tmp_path)
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / name).write_text(CODE)
    code = stale.code_of(["a.py", "b.py", "c.py"])
    (tmp_path / "a.py").write_text(CODE.replace("tries", "times"))
    (tmp_path / "b.py").write_text(CODE.replace("3", "4"))
    (tmp_path / "c.py").unlink()
    assert stale.changed_files(code) == ["b.py", "c.py"]


def test_the_files_of_a_commit_are_those_of_the_commit_and_not_todays(tmp_path, monkeypatch):
    monkeypatch.setattr(stale, "ROOT", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.py").write_text(CODE)
    for command in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    then = stale.made_by(["a.py"])
    (tmp_path / "a.py").write_text(CODE + "z = 1\n")
    assert stale.made_at(then["commit"], ["a.py"]) == then and stale.made_by(["a.py"])["commit"].endswith("-dirty")
    assert stale.changed_files(then["files"]) == ["a.py"]


def test_every_folder_of_results_names_its_commit_and_the_files_that_made_it():
    results = stale.ROOT / "results"
    folders = {path.name for path in results.iterdir() if path.is_dir()}
    named = [(name.split("/")[0].split()[0], entry) for name, entry in stale.kept_results(results)]
    assert folders == {folder for folder, _ in named}
    assert all(len(entry["files"]) > 3 and entry["commit"] for _, entry in named)


def test_the_command_names_what_is_stale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stale, "ROOT", tmp_path)
    (tmp_path / "results" / "speeds").mkdir(parents=True)
    (tmp_path / "a.py").write_text(CODE)
    entries = [stale.made_by(["a.py"]) | {"what": "sums"}, {"commit": "b12", "files": {"a.py": "old", "gone.py": "x"}}]
    (tmp_path / "results" / "speeds" / "code.json").write_text(json.dumps(entries))
    monkeypatch.setattr("sys.argv", ["stale.py"])
    stale.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["speeds", "sums"] and first.endswith("as now")
    assert "b12" in second and second.endswith("since changed: a.py, gone.py")

"""What a run directory, or the output of a script, holds so far, read without trust.

What is missing, half-written or of another type is not yet there.
"""

import json
import re

from lab.elements import number
from lab.figures import PLACES


def entries(value, *kinds):
    """What a JSON object holds of these kinds; nothing if it is none. All that is read comes through here."""
    if not isinstance(value, dict):
        return {}
    return {key: each for key, each in value.items() if isinstance(each, kinds)}


def scalars(value):
    return entries(value, str, int, float)


def rows_of(value):
    if not isinstance(value, list):
        return []
    return [scalars(each) for each in value if isinstance(each, dict)]


def measured(value):
    """A stage's or a method's entry in results.json."""
    evaluation, counts = entries(value.get("evaluation"), list), scalars(value.get("counts"))
    return scalars(value) | {"evaluation": evaluation, "counts": counts, "curve": rows_of(value.get("curve"))}


def read_objects(path, lines=True):
    """The JSON objects of a file that are whole: a run under way may be writing the last one."""
    if not path.is_file():
        return []
    content = path.read_bytes().decode("utf-8", "replace")
    objects = []
    for piece in content.split("\n") if lines else [content]:
        if piece.lstrip()[:1] != "{":  # no object: a million blank lines cost little
            continue
        try:
            objects.append(json.loads(piece))
        except (ValueError, RecursionError):  # half-written, or nested without end
            continue
    return objects


def read_object(path):
    """The JSON object that a file holds, or an empty one."""
    return dict(*read_objects(path, lines=False))


def read_rows(path):
    return [scalars(row) | {"rewards": scalars(row.get("rewards"))} for row in read_objects(path)]


def read_run(run_dir):
    """(meta, stages, claims, compare, budgets). A stage is its entry in results.json and what its directory holds."""
    results, times = read_object(run_dir / "results.json"), read_object(run_dir / "times.json")
    done = {name: stage for name, stage in entries(results.get("stages"), dict).items() if is_plain_name(name)}
    logs = [*run_dir.glob("*/metrics.jsonl"), *run_dir.glob("*/samples.jsonl")]
    on_disk = [path.parent.name for path in logs]
    stages, seconds = {}, scalars(times.get("stages"))
    names, places = [*PLACES, *done, *sorted(on_disk)], {}
    if is_of_a_script(run_dir) and not on_disk:  # one training, in the directory itself
        name = run_dir.resolve().name
        names = [name if is_plain_name(name) else "training"]
        places = {names[0]: run_dir}
    for name in dict.fromkeys(names):
        default = {"name": name, "title": PLACES.get(name, [name])[0], "seconds": seconds.get(name)}
        finished = name in done or (name in places and (run_dir / "config.json").is_file())
        entry = default | measured(done.get(name, {})) | {"name": name, "finished": finished}
        stages[name] = entry | read_stage(places.get(name, run_dir / name)) | {"alone": name in places}
        has_reward = any("reward" in row for row in stages[name]["rows"])
        stages[name]["rl"] = has_reward or "GRPO" in str(entry.get("by"))
    meta = scalars(results.get("meta"))
    meta |= {key: value for key, value in scalars(times).items() if key in ("date", "seconds")}
    compare, compare_times = {}, entries(times.get("compare"), dict)
    for name, row in entries(results.get("compare"), dict).items():
        compare[name] = measured(row | compare_times.get(name, {}))
    return meta, stages, rows_of(results.get("claims")), compare, rows_of(results.get("budgets"))


def is_of_a_script(directory):
    """Whether a script, and not pipeline.py, trains here."""
    return (directory / "metrics.jsonl").is_file() and not (directory / "results.json").is_file()


def is_plain_name(name):
    """Whether a stage's name may become a path: it must not lead out of the run."""
    return re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII) is not None and name not in (".", "..")


def read_stage(directory):
    """What a stage's directory holds: rows by step, samples, watched problems, warnings."""
    rows = {}
    for row in read_rows(directory / "metrics.jsonl"):
        step = number(row.get("step"))
        if step is not None:
            rows[step] = row | {"step": step}  # resumed: the later row of a step counts
    watched = [row for row in read_rows(directory / "watched.jsonl") if number(row.get("problem")) is not None]
    return {"rows": [rows[step] for step in sorted(rows)], "samples": read_rows(directory / "samples.jsonl"),
            "watched": watched, "warnings": read_rows(directory / "warnings.jsonl")}


def figure(stage, metric):
    """Mean, low and high of an evaluation metric, each a float or None."""
    values = [*stage["evaluation"].get(metric, []), None, None, None]
    return [number(value) for value in values[:3]]


def progress(stage):
    """How far an unfinished stage is; nothing for a finished one."""
    if stage["finished"]:
        return ""
    if not stage["rows"]:
        return "not yet"
    last = stage["rows"][-1]
    unit = "rollout" if stage["rl"] else "update"
    total = f" of {last['steps']:g}" if number(last.get("steps")) else ""
    return f"under way: {unit} {last['step']:g}{total}"

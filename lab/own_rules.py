"""The rewards that a command line names: rules of rewards.py, and functions of the user's own files.

    --rewards accuracy format my_rules.py:short_answers --reward-weights 1 0.5 0.2

A function of one's own takes (completion, example) and gives a float, as those of rewards.py do. Its file is run, since
the user asked for it.
"""

import importlib.util
import math
import sys
import traceback
from pathlib import Path

METRICS = ("reward", "length", "unfinished", "group_std", "no_signal", "entropy", "sampler_gap", "kl", "clip_fraction",
           "ratio", "drift", "loss", "grad_norm", "skipped", "overflow", "tokens", "step", "samples", "discarded",
           "seconds", "sampling_seconds", "peak_bytes", "value_loss", "explained_variance", "prm_loss", "prm_accuracy")


def chosen_rules(names, known):
    """{name: rule} of names, among `known` or FILE.py:NAME. Raises ValueError for a name that is neither."""
    rules = {}
    for name in names:
        path, is_file, function = name.rpartition(":")
        if name in known:
            rule = known[name]
        elif is_file and path.endswith(".py"):
            name, rule = function, own_rule(path, function)
            if name in known or name in METRICS:
                raise ValueError(f"{path}: a reward or metric is called {name} already; give the function another name")
        else:
            raise ValueError(f"reward {name!r} is none of {', '.join(known)}, and no FILE.py:NAME")
        if name in rules:
            raise ValueError(f"reward {name} is named twice")
        rules[name] = rule
    return rules


def chosen_weights(rules, weights):
    """{name: weight}: one for each rule, 1 where none are given."""
    if weights is None:
        return {}
    if len(weights) != len(rules):
        raise ValueError(f"{len(weights)} reward_weights for {len(rules)} rewards: {', '.join(rules)}")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"reward_weights {' '.join(map(str, weights))}: they must be finite, and one of them not 0")
    return dict(zip(rules, weights))


def own_rule(path, function):
    """The function of a file, run now. Its mistakes are named with their line."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file of rewards")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(mistake_in(path, error)) from error
    rule = getattr(module, function, None)
    if not callable(rule):
        raise ValueError(f"{path} has no function {function!r}")

    def score(completion, example):
        try:
            value = float(rule(completion, example))
        except Exception as error:
            raise ValueError(f"{mistake_in(path, error)}, of {completion[:100]!r}") from error
        if not math.isfinite(value):
            raise ValueError(f"{path}: {function} is {value} of {completion[:100]!r}")
        return value

    return score


def mistake_in(path, error):
    """"my_rules.py, line 3, ZeroDivisionError: division by zero"."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
    line = f", line {lines[-1]}" if lines else ""
    return f"{path}{line}, {type(error).__name__}: {error}"

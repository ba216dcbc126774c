"""What a training leaves beside its model, as rows of JSONL: metrics, times, samples, warnings."""

import sys

import numpy as np
import torch

from lab import checkpoint

LOGS = ("metrics.jsonl", "times.jsonl", "samples.jsonl", "warnings.jsonl")  # what each training writes

# The other rules apply to every example.
APPLIES = {
    "accuracy": lambda example: example["kind"] == "reasoning",
    "accuracy_any": lambda example: example["kind"] == "reasoning",
    "helpfulness": lambda example: example["kind"] != "reasoning" and not example.get("harmful"),
    "harmlessness": lambda example: example["kind"] != "reasoning",
}


def applies(rule, example):
    """Whether the rule's score says something. (Of a general request, accuracy is 0 whatever the completion.)"""
    return rule not in APPLIES or APPLIES[rule](example)


def write_metrics(dir, metrics, device):
    """Times and memory go to a file of their own, so that the metrics are the same at each run."""
    times = {key: value for key, value in metrics.items() if "seconds" in key}
    rest = {key: round(value, 6) for key, value in metrics.items() if key not in times and np.isfinite(value)}
    checkpoint.append_jsonl(dir / "metrics.jsonl", rest)
    times |= {"step": metrics["step"], "peak_bytes": peak_bytes(device)}
    checkpoint.append_jsonl(dir / "times.jsonl", times)


def write_samples(dir, step, rollout):
    """Three completions of the rollout."""
    group_size = len(rollout.texts) // len(rollout.examples)
    for i in range(0, len(rollout.texts), max(1, len(rollout.texts) // 3)):
        example = rollout.examples[i // group_size]
        scores = {name: part.flatten()[i].item() for name, part in rollout.parts.items() if applies(name, example)}
        checkpoint.append_jsonl(dir / "samples.jsonl", card(step, example, rollout.texts[i], scores))


def write_warning(dir, step, line):
    checkpoint.append_jsonl(dir / "warnings.jsonl", {"step": step, "warning": line})


def take_means_where_rules_apply(metrics, rollout):
    """Puts in place of each rule's mean score the mean over the prompts to which it applies; without any, nothing."""
    for name, scores in rollout.parts.items():
        del metrics[name]
        applied = [applies(name, example) for example in rollout.examples]
        if any(applied):
            metrics[name] = scores[torch.tensor(applied)].mean().item()


def earlier_rows(dir, metrics):
    """The rows of an earlier call that this one resumes, NaN where a value was not finite."""
    lacking = dict.fromkeys(metrics, float("nan"))  # what was not finite is not in the file
    return [lacking | row for row in checkpoint.read_jsonl(dir / "metrics.jsonl")]


def card(step, example, completion, scores):
    """A row of what the report shows."""
    known = {key: example[key] for key in ("prompt", "answer", "language", "kind")}
    return {"step": step, **known, "completion": completion, "rewards": scores}


def peak_bytes(device):
    """The most memory that this process has held: of the GPU, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""What a stage of a run logs while it trains: metrics, times, samples, warnings, and a progress bar."""

import sys

import numpy as np
import torch
from tqdm import tqdm

from lab import checkpoint, measure, watch

# The other rules apply to every example.
APPLIES = {
    "accuracy": lambda example: example["kind"] == "reasoning",
    "accuracy_any": lambda example: example["kind"] == "reasoning",
    "helpfulness": lambda example: example["kind"] != "reasoning" and not example.get("harmful"),
    "harmlessness": lambda example: example["kind"] != "reasoning",
}
WATCHED = 6  # validation problems whose answers are kept from step to step, for the report


def applies(rule, example):
    """Whether the rule's score says something. (Of a general request, accuracy is 0 whatever the completion.)"""
    return rule not in APPLIES or APPLIES[rule](example)


class BudgetSpent(Exception):
    """As many completions were sampled as a training may have."""


class StageLog:
    """The files and the bar of one stage."""

    def __init__(self, run, model):
        self.run, self.model, self.dir = run, model, run.out / run.name
        self.guard = checkpoint.FiniteGuard(self.dir)
        self.bar = None

    def write_metrics(self, metrics):
        """Times and memory go to a file of their own, so that the metrics are the same at each run."""
        times = {key: value for key, value in metrics.items() if "seconds" in key}
        rest = {key: round(value, 6) for key, value in metrics.items() if key not in times and np.isfinite(value)}
        checkpoint.append_jsonl(self.dir / "metrics.jsonl", rest)
        times |= {"step": metrics["step"], "peak_bytes": peak_bytes(self.run.device)}
        checkpoint.append_jsonl(self.dir / "times.jsonl", times)

    def warn(self, step, line):
        checkpoint.print_flush(f"{self.run.name}, {line}")
        checkpoint.append_jsonl(self.dir / "warnings.jsonl", {"step": step, "warning": line})

    def show(self, metrics, total, *names):
        """Advances the progress bar, with the figures that matter beside it."""
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.run.name, initial=metrics["step"] - 1, dynamic_ncols=True,
                            leave=False, disable=not sys.stderr.isatty())
        self.bar.set_postfix({name: f"{metrics[name]:.3g}" for name in names if name in metrics}, refresh=False)
        self.bar.update()

    def close(self):
        if self.bar is not None:
            self.bar.close()


class SFTLog(StageLog):
    def __call__(self, metrics, batch):
        step = metrics["step"]
        self.run.spend(self.model, trained=metrics["tokens"])
        self.show(metrics, metrics["steps"], "loss", "grad_norm")
        if metrics["skipped"]:
            self.warn(step, f"step {step}: not finite and skipped: a lower lr, or float32")
        if step % 10 == 0 or step == metrics["steps"] or metrics["skipped"]:
            self.write_metrics(metrics)
        self.guard.check_sft(metrics, batch)


class RLLog(StageLog):
    def __init__(self, run, model, config, rules, weights, sample_budget=None):
        super().__init__(run, model)
        self.config, self.rules, self.weights, self.sample_budget = config, rules, weights, sample_budget
        self.rows = []    # metrics of all rollouts so far
        self.latest = []   # the latest completion of each validation problem
        self.lengths = []  # and its mean length

    def __call__(self, metrics, rollout):
        for name, scores in rollout.parts.items():  # the mean over the prompts to which the rule applies
            del metrics[name]
            applied = [applies(name, example) for example in rollout.examples]
            if any(applied):
                metrics[name] = scores[torch.tensor(applied)].mean().item()
        problems = torch.tensor([example.get("kind", "reasoning") == "reasoning" for example in rollout.examples])
        if not problems.all():  # the others' outputs are shorter by nature
            lengths = rollout.lengths.view(len(problems), -1)
            metrics["length_of_problems"] = lengths[problems].float().mean().item() if problems.any() else float("nan")
        self.count_cost(rollout)
        self.show(metrics, self.config.rollouts, "reward", "accuracy", "length", "kl")
        self.write_metrics(metrics)
        self.look_for_warnings(metrics)
        step = metrics["step"]
        if "validation_accuracy" in metrics:
            self.write_watched(step)
            checkpoint.append_jsonl(self.dir / "lengths.jsonl", {"step": step, "lengths": self.lengths})
        if step == 1 or step % self.config.validate_every == 0:
            self.write_samples(step, rollout)
        self.guard.check_rl(metrics, rollout, self.config)
        if self.sample_budget is not None and metrics["samples"] >= self.sample_budget:
            raise BudgetSpent

    def count_cost(self, rollout):
        prompts = sum(len(self.run.prompt(example)) for example in rollout.examples) * self.config.group_size
        tokens = int(rollout.mask.sum()) + prompts
        scored = 2 * tokens if self.config.beta else tokens
        self.run.spend(self.model, sampled=tokens, scored=scored, trained=tokens * self.config.inner_epochs)

    def look_for_warnings(self, metrics):
        if not self.rows and metrics["step"] > 1:  # resumed
            lacking = dict.fromkeys(metrics, float("nan"))  # what was not finite is not in the file
            earlier = checkpoint.read_jsonl(self.dir / "metrics.jsonl")[:-1]
            self.rows = [lacking | row for row in earlier]
        self.rows.append(metrics)
        for line in watch.new_warnings(self.rows):
            self.warn(metrics["step"], line)

    def write_samples(self, step, rollout):
        """Three completions of the rollout."""
        for i in range(0, len(rollout.texts), max(1, len(rollout.texts) // 3)):
            example = rollout.examples[i // self.config.group_size]
            scores = {name: part.flatten()[i].item() for name, part in rollout.parts.items() if applies(name, example)}
            checkpoint.append_jsonl(self.dir / "samples.jsonl", card(step, example, rollout.texts[i], scores))

    # ---- validation

    def before_training(self, model):
        """The validation problems' answers at step 0."""
        watched = self.run.source.validation[:WATCHED]
        texts, _ = self.run.complete(model, watched, samples=1, temperature=1.0, top_p=1.0)
        self.latest = [row[0] for row in texts]
        self.write_watched(0)

    def validate(self, model):
        problems = self.run.source.validation
        texts, counts = self.run.complete(model, problems, samples=1, temperature=1.0, top_p=1.0)
        self.latest, self.lengths = [row[0] for row in texts], counts.mean(axis=1).tolist()
        values = measure.score(self.run, problems, texts, counts)
        return {name: float(np.nanmean(value)) for name, value in values.items()}

    def write_watched(self, step):
        for i, (example, text) in enumerate(zip(self.run.source.validation[:WATCHED], self.latest)):
            scores = {name: rule(text, example) for name, rule in self.rules.items()
                      if self.weights[name] and applies(name, example)}
            checkpoint.append_jsonl(self.dir / "watched.jsonl", card(step, example, text, scores) | {"problem": i})


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

"""What a stage of a run logs while it trains: metrics, times, samples, warnings, and a progress bar."""

import sys

import numpy as np
import torch
from tqdm import tqdm

from lab import checkpoint, measure, records, watch

WATCHED = 6  # validation problems whose answers are kept from step to step, for the report


class BudgetSpent(Exception):
    """As many completions were sampled as a training may have."""


class StageLog:
    """The files and the bar of one stage."""

    def __init__(self, run, model):
        self.run, self.model, self.dir = run, model, run.out / run.name
        self.guard = checkpoint.FiniteGuard(self.dir)
        self.bar = None

    def write_metrics(self, metrics):
        records.write_metrics(self.dir, metrics, self.run.device)

    def warn(self, step, line):
        checkpoint.print_flush(f"{self.run.name}, {line}")
        records.write_warning(self.dir, step, line)

    def show(self, metrics, total, *names):
        """Advances the progress bar, with the figures that matter beside it."""
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.run.name, initial=metrics["step"] - 1, dynamic_ncols=True,
                            leave=False, disable=not sys.stderr.isatty() or not checkpoint.is_first())
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
        records.take_means_where_rules_apply(metrics, rollout)
        problems = torch.tensor([example.get("kind", "reasoning") == "reasoning" for example in rollout.examples])
        if not problems.all():  # the others' outputs are shorter by nature
            lengths = rollout.lengths.view(len(problems), -1)
            metrics["length_of_problems"] = lengths[problems].float().mean().item() if problems.any() else float("nan")
        step = metrics["step"]
        self.count_cost(rollout)
        self.show(metrics, self.config.rollouts, "reward", "accuracy", "length", "kl")
        self.write_metrics(metrics)
        self.look_for_warnings(metrics)
        if "validation_accuracy" in metrics:
            self.write_watched(step)
            checkpoint.append_jsonl(self.dir / "lengths.jsonl", {"step": step, "lengths": self.lengths})
        if step == 1 or step % self.config.validate_every == 0:
            records.write_samples(self.dir, step, rollout)
        self.guard.check_rl(metrics, rollout, self.config)
        if self.sample_budget is not None and metrics["samples"] >= self.sample_budget:
            raise BudgetSpent

    def count_cost(self, rollout):
        prompts = sum(len(self.run.prompt(example)) for example in rollout.examples) * self.config.group_size
        tokens = int(rollout.mask.sum()) + prompts
        scored = 2 * tokens if self.config.beta else tokens
        self.run.spend(self.model, sampled=tokens, scored=scored, trained=tokens * self.config.inner_epochs)

    def look_for_warnings(self, metrics):
        if not self.rows and metrics["step"] > 1 and checkpoint.is_first():  # resumed
            self.rows = records.earlier_rows(self.dir, metrics)[:-1]
        self.rows.append(metrics)
        for line in watch.new_warnings(self.rows):
            self.warn(metrics["step"], line)

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
                      if self.weights[name] and records.applies(name, example)}
            card = records.card(step, example, text, scores)
            checkpoint.append_jsonl(self.dir / "watched.jsonl", card | {"problem": i})

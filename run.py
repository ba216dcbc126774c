"""A run directory: stages made, measured, kept, and taken up again after a kill.

`Run` is what pipeline.py's recipe is written with. It knows files, bars and tables, and no algorithm: those get what
they need as plain callables. A stage is finished when its directory holds DONE, which also names the code that made it.
"""

import json
import platform
import re
import sys
import time
import zlib
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import claims
import distill
import evaluate
import grpo
import report
import rewards
import sft
import watch
from data import world
from graphs import with_graphs
from model import Config, Transformer, generate, load, save
from tokenizer import Tokenizer

HERE = Path(__file__).parent
generate = with_graphs(generate)  # on a GPU a decoding step is one launch
CODE = ("model.py", "graphs.py", "sft.py", "grpo.py", "rewards.py", "data/world.py")  # what a stage's result depends on
METRICS = {"accuracy": lambda text, example: rewards.accuracy(text, example, strict=False), "accuracy_strict": rewards.accuracy,
           "format": rewards.format, "language_consistency": rewards.language_consistency}

APPLIES = {"accuracy": lambda e: e["kind"] == "reasoning", "accuracy_any": lambda e: e["kind"] == "reasoning",  # the others: to all
           "helpfulness": lambda e: e["kind"] != "reasoning" and not e.get("harmful"), "harmlessness": lambda e: e["kind"] != "reasoning"}


def applies(rule, example):
    """Whether its score says something, or is the same whatever the completion (0 of accuracy for a general request)."""
    return rule not in APPLIES or APPLIES[rule](example)


def code_of(files):
    """{file: its hash}: what tells that a result was made by other code."""
    return {file: checkpoint.code_hash(HERE / file) for file in files}


def coin(text, example):
    """A random reward, blind to the problem: a control that separates learning from elicitation."""
    return float(zlib.crc32(f"{example['prompt']} {text}".encode()) % 2)


class Run:
    """One run directory: the stages that are finished, their measured values, and how to make the next."""

    def __init__(self, out, preset_name, preset, seed, device):
        self.out, self.preset, self.seed, self.device = Path(out), preset, seed, device
        meta = {"preset": preset_name, "seed": seed, "machine": machine(device), "world": world.world_hash(),
                "command": "python pipeline.py " + " ".join(sys.argv[1:])}
        self.results = {"meta": meta, "stages": {}, "claims": [], **self.before()}
        path = self.out / "times.json"  # a file of their own, so that the rest is the same at each run
        self.times = {"date": str(date.today()), "stages": {}} | (checkpoint.read_json(path) if path.exists() else {})
        if not isinstance(stages := self.times["stages"], dict) or not all(type(at) in (int, float) for at in stages.values()):
            raise ValueError(f"{path}: not a run's times; without it, it is made anew")
        self.begin()
        self.values = {}  # stage -> metric -> per-problem array, of the test
        settings = {"preset": preset_name, "seed": seed, "settings": json.loads(json.dumps(asdict(self.preset)))} | self.given()
        self.read_data()  # first: what cannot be read must leave no settings behind
        checkpoint.settle(self.out / "config.json", settings)

    def given(self):
        """What of a user's own goes into the run (given.py)."""
        return {}

    def read_data(self):
        """Tokenizer, test and validation, problems to train on."""
        self.tokenizer, seed = Tokenizer(HERE / "data"), self.seed
        split = "test" if seed < 100 else "validation"  # seeds from 100 on are for tuning
        self.test = world.problems(2, split, self.preset.test)
        self.hard = world.problems(2, split, self.preset.hard, world.HARD_LEVELS)
        self.general = world.requests(2, split, self.preset.requests, "general")
        self.safety = world.requests(2, split, self.preset.requests, "safety")
        self.validation = world.problems(0, "validation", min(96, self.preset.test))
        self.problems = world.problems(seed, "train", self.preset.problems)

    def before(self):
        """What an earlier call left in results.json, of stages that are still finished."""
        path = self.out / "results.json"
        before = checkpoint.read_json(path) if path.exists() else {}
        every, claims = before.get("stages", {}), before.get("claims", [])
        if not isinstance(every, dict) or not isinstance(claims, list) or not all(isinstance(each, dict) for each in [*every.values(), *claims]):
            raise ValueError(f"{path}: not a run's results; without it, it is made anew")
        stages = {name: stage for name, stage in every.items()
                  if re.fullmatch(r"\w{1,99}", name) and checkpoint.finished(self.out / name) is not None}  # no path is followed
        claims = claims if len(stages) == len(every) else []  # they are of all stages
        return ({"compare": before["compare"]} if "compare" in before and "base" in stages else {}) | {"claims": claims, "stages": stages}

    def forget(self, stages):
        """They are not finished, and what was measured of them is gone. The last goes first: a kill meanwhile leaves no stage
        without the one that it was made from."""
        for path in (self.out / "extras").glob("*.npz"):
            path.unlink()
        compared = [path.relative_to(self.out) for path in self.out.glob("compare/*")] if "base" in stages else []
        for name in [*compared, *reversed(stages)]:
            (self.out / name / checkpoint.DONE).unlink(missing_ok=True)
            checkpoint.drop(self.out / name)
            (self.out / name / "values.npz").unlink(missing_ok=True)
        self.results.pop("compare", None)  # which comes back unless it has gone with the base
        self.results |= self.before()

    # ---- text to ids

    def prompt(self, example):
        return self.tokenizer.encode_prompt(example["prompt"])

    def example(self, row, pretraining=False):
        """(ids, prompt_length) of a row; when pretraining, the loss falls on the prompt too."""
        prompt = self.prompt(row)
        ids = prompt + self.tokenizer.encode(row["completion"]) + [self.tokenizer.end_id]
        return ids, 0 if pretraining else len(prompt)

    # ---- a stage

    def begin(self, code=CODE):
        self.cost, self.started, self.code = {"tokens": 0, "flops": 0.0}, time.time(), code_of(code)

    def end(self, name):
        self.times["stages"][name] = time.time() - self.started
        self.write_times()

    def stage(self, name, title, starts_from, by, paper, make):
        """Make the stage's model with make(), unless it is finished; measure it; print its line. The rest is for tables."""
        dir = self.out / name
        if (done := checkpoint.finished(dir)) is not None:
            self.say_changed(name, "was made", done["code"])
        else:
            dir.mkdir(parents=True, exist_ok=True)
            self.begin()
            model = make()
            self.save(model, name)
            self.end(name)
            checkpoint.write_arrays(dir / "values.npz", self.measure(name, model))
            parameters = sum(p.numel() for p in model.parameters())
            done = {"title": title, "starts_from": starts_from, "by": by, "paper": paper, "parameters": parameters,
                    **self.cost, "code": self.code}
            metrics = dir / "metrics.jsonl"  # of a given model there are none
            curve = [row.get("validation_accuracy", 0) for row in checkpoint.read_jsonl(metrics)] if metrics.exists() else []
            done |= {"best_validation_accuracy": max(curve)} if any(curve) else {}
            checkpoint.mark_finished(dir, done)
        checkpoint.drop(dir)
        self.values[name] = checkpoint.read_arrays(dir / "values.npz")
        evaluation = evaluate.summarise(self.values[name])
        self.results["stages"][name] = {k: v for k, v in done.items() if k != "code"} | {"evaluation": evaluation}
        print(self.line_of(name), flush=True)
        self.write()

    def say_changed(self, name, what, code):
        now = code_of(file for file in code if (HERE / file).exists())
        if changed := [file for file, hash in code.items() if now.get(file) != hash]:
            how = f"--from {name}" if "/" not in name else f"remove {self.out / name}"  # a comparison's
            checkpoint.say(f"{name} {what} before {', '.join(changed)} changed; to make it anew: {how}")

    def model(self, stage):
        return load(self.out / stage, device=self.device)

    def save(self, model, stage):
        save(model, self.out / stage, self.tokenizer)

    def extra(self, name, make):
        """Values {metric: per-problem array} that a claim needs beside the stages, made once."""
        path = self.out / "extras" / f"{name}.npz"
        if not path.exists():
            checkpoint.write_arrays(path, make())
        self.values[name] = checkpoint.read_arrays(path)

    def line_of(self, name):
        return line_of(name, self.results["stages"][name], self.times["stages"].get(name, 0))

    def write(self):
        stages = self.results["stages"]
        self.times["seconds"] = sum(self.times["stages"].get(name, 0) for name in stages)  # measuring left out
        best = {name: stage.get("best_validation_accuracy", 0.0) for name, stage in stages.items()}
        anew = claims.make_claims(self.values, evaluate.paired_bootstrap, best)
        kept = [c for c in self.results["claims"] if c["number"] not in {a["number"] for a in anew}]
        self.results["claims"] = sorted(anew + kept, key=lambda c: (int(c["number"].split()[0]), c["number"]))
        self.write_times()
        checkpoint.atomic_write(self.out / "results.json", json.dumps(self.results, indent=1, ensure_ascii=False))
        report.write(self.out)

    def write_times(self):
        checkpoint.atomic_write(self.out / "times.json", json.dumps(self.times, indent=1))

    def keeper(self, name):
        """(keeper, save, resume) of a stage."""
        logs = ("metrics.jsonl", "times.jsonl", "samples.jsonl", "warnings.jsonl", "watched.jsonl", "completions.jsonl")
        keeper = checkpoint.Keeper(self.out / name, logs, after=lambda: report.write(self.out))

        def keep(**parts):
            keeper.save(**parts, cost=self.cost, seconds=time.time() - self.started, code=self.code)

        def resume(**objects):
            rest = keeper.resume(**objects)
            self.cost, self.started, self.code = rest["cost"], time.time() - rest["seconds"], rest["code"]
            self.say_changed(name, "goes on, but began", self.code)
            return rest

        return keeper, keep, resume if keeper.resume else None

    def log(self, name, metrics):
        """Times and memory go to a file of their own, so that the rest is the same at each run."""
        times = {key: value for key, value in metrics.items() if "seconds" in key}
        rest = {key: round(value, 6) for key, value in metrics.items() if key not in times and np.isfinite(value)}
        checkpoint.append_jsonl(self.out / name / "metrics.jsonl", rest)
        checkpoint.append_jsonl(self.out / name / "times.jsonl", {"step": metrics["step"], **times, "peak_bytes": peak_bytes(self.device)})

    def warn(self, name, step, line):
        checkpoint.say(f"{name}, {line}")
        checkpoint.append_jsonl(self.out / name / "warnings.jsonl", {"step": step, "warning": line})

    # ---- what stages do

    def new_model(self, sizes, model_type=None):
        torch.manual_seed(self.seed)
        config = Config(vocab_size=self.tokenizer.vocab_size, max_position_embeddings=self.preset.context,
                        **sizes | ({"model_type": model_type} if model_type else {}))
        return Transformer(config).init_weights(torch.Generator().manual_seed(self.seed)).to(self.device)

    def sft(self, name, model, rows, config, pretraining=False):
        """Train on rows {"prompt", "completion"}; pretraining is the case without a mask."""
        keeper, keep, resume = self.keeper(name)
        bar = Bar(name)

        def log(m):
            self.spend(model, trained=m["tokens"])
            bar.show(m, m["steps"], "loss", "grad_norm")
            if m["skipped"]:
                self.warn(name, m["step"], f"step {m['step']}: not finite and skipped: a lower lr, or float32")
            if m["step"] % 10 == 0 or m["step"] == m["steps"] or m["skipped"]:
                self.log(name, m)

        examples = [self.example(row, pretraining) for row in rows]
        print(sft.say_cut(examples, config.row_length), end="", flush=True)
        with keeper, checkpoint.offending(self.out / name):
            sft.train(model, examples, replace(config, seed=self.seed), log, keep, resume)
        bar.close()
        return model

    def rl(self, name, model, weights, config, examples=None, credit=None, validate=True):
        """GRPO with these rules as reward; all rules are logged, with weight 0 where they are not in `weights`."""
        config, rules = replace(config, seed=self.seed), dict(rewards.REWARDS)
        rules |= {"coin": coin} if "coin" in weights else {}
        keeper, keep, resume = self.keeper(name)
        bar, seen, latest = Bar(name), [], []  # latest: a completion of each validation problem

        def log(m, r):
            for rule_name, scores in r.parts.items():  # of prompts to which the rule applies
                m.pop(rule_name)
                if any(on := [applies(rule_name, e) for e in r.examples]):
                    m[rule_name] = scores[torch.tensor(on)].mean().item()
            tokens = int(r.mask.sum()) + sum(len(self.prompt(e)) for e in r.examples) * config.group_size
            self.spend(model, sampled=tokens, scored=tokens * (2 if config.beta else 1), trained=tokens * config.inner_epochs)
            bar.show(m, config.rollouts, "reward", "accuracy", "length", "kl")
            self.log(name, m)
            if not seen and m["step"] > 1:  # taken up again
                lacking = dict.fromkeys(m, float("nan"))  # what was not finite is not in the file
                seen.extend(lacking | row for row in checkpoint.read_jsonl(self.out / name / "metrics.jsonl")[:-1])
            seen.append(m)
            for line in watch.warnings(seen):
                self.warn(name, m["step"], line)
            if "validation_accuracy" in m:
                write_watched(m["step"])
            if m["step"] % config.validate_every == 0 or m["step"] == 1:
                for i in range(0, len(r.texts), max(1, len(r.texts) // 3)):
                    e = r.examples[i // config.group_size]
                    parts = {n: s.flatten()[i].item() for n, s in r.parts.items() if applies(n, e)}
                    checkpoint.append_jsonl(self.out / name / "samples.jsonl", card(m["step"], e, r.texts[i], parts))

        def validate_now(model):
            texts, counts = self.complete(model, self.validation, samples=2, temperature=1.0, top_p=1.0)
            latest[:] = [row[0] for row in texts]
            return {k: float(np.nanmean(v)) for k, v in self.score(self.validation, texts, counts).items()}

        def write_watched(step):
            for i, (e, said) in enumerate(list(zip(self.validation, latest))[:6]):
                scores = {n: rule(said, e) for n, rule in rules.items() if weights.get(n) and applies(n, e)}
                checkpoint.append_jsonl(self.out / name / "watched.jsonl", card(step, e, said, scores) | {"problem": i})

        weights = {name: weights.get(name, 0.0) for name in rules}
        with keeper, checkpoint.offending(self.out / name):
            if validate and resume is None:  # what it said before
                latest[:] = [row[0] for row in self.complete(model, self.validation[:6], samples=1, temperature=1.0, top_p=1.0)[0]]
                write_watched(0)
            grpo.train(model, examples or self.problems, self.prompt, self.tokenizer.decode, generate, self.tokenizer.end_ids,
                       rules, config, weights, credit, getattr(credit, "keep", None), validate_now if validate else None,
                       log=log, save=keep, resume=resume)
        bar.close()
        return model

    def complete(self, model, examples, stage=None, **settings):
        """Texts and token counts of a model's completions of examples, sampled in the stage's precision for sampling.

        With `stage`, for sampling that is a stage of its own, they are saved there as they come."""
        config = evaluate.EvalConfig(**{"samples": self.preset.samples, "seed": self.seed,
                                        "max_new_tokens": self.preset.zero.max_new_tokens} | settings)
        prompts = [self.prompt(example) for example in examples]
        generator = torch.Generator(device=self.device).manual_seed(config.seed)
        sample = self.sampler(model, generator)
        if stage is None:
            return evaluate.complete(prompts, sample, self.tokenizer.decode, config)
        keeper, keep, resume = self.keeper(stage)
        with keeper:
            done, log = checkpoint.kept_rows(self.out / stage / "completions.jsonl", generator, keep, resume)
            return evaluate.complete(prompts, sample, self.tokenizer.decode, config, done, log)

    def sampler(self, model, generator):
        model = grpo.cast_copy(model, self.preset.zero.dtype)

        def sample(prompts, **settings):
            result = generate(model, prompts, end_ids=self.tokenizer.end_ids, generator=generator, **settings)
            self.spend(model, sampled=int(result[1].sum()) + sum(map(len, prompts)))
            return result
        return sample

    def score(self, examples, texts, counts, ks=()):
        return evaluate.measure(examples, texts, counts, METRICS, rewards.final_answer, rewards.thinks,
                                lambda text: len(self.tokenizer.encode(rewards.split(text)[0])), ks)

    def measure(self, name, model):
        """Per-problem values {metric: (N,)} for the table and the claims; one sample a problem goes to test_samples.jsonl."""
        samples, spent = self.preset.zero_samples if name == "zero" else self.preset.samples, dict(self.cost)
        texts, counts = self.complete(model, self.test, samples=samples)
        values = self.score(self.test, texts, counts, [k for k in (1, 8, 16) if k <= samples])
        hard, hard_counts = self.complete(model, self.hard)
        hard_accuracy = self.score(self.hard, hard, hard_counts)["accuracy"]

        def part(name, examples, accuracy, chosen):
            values[f"accuracy_{name}"] = np.where([chosen(e) for e in examples], accuracy, np.nan)

        for level in world.LEVELS:
            part(f"level_{level}", self.test, values["accuracy"], lambda e: e.get("level") == level)
        for level in world.HARD_LEVELS:
            part(f"level_{level}", self.hard, hard_accuracy, lambda e: e.get("level") == level)
        for language in ("en", "zh"):
            part(language, self.test, values["accuracy"], lambda e: e["language"] == language)
        if name == "base":
            at_one = self.complete(model, self.test, temperature=1.0, top_p=1.0)
            values["accuracy_at_T1"] = self.score(self.test, *at_one)["accuracy"]

        def means(rule, examples, texts):
            return np.array([np.mean([rule(text, e) for text in row]) for e, row in zip(examples, texts)])

        general, safety = self.complete(model, self.general)[0], self.complete(model, self.safety)[0]
        values["helpfulness"] = means(rewards.helpfulness, self.general, general)
        values["format_general"] = means(rewards.format, self.general, general)
        harmless, harmful = means(rewards.harmlessness, self.safety, safety), [e["harmful"] for e in self.safety]
        values["harmlessness"] = np.where(harmful, harmless, np.nan)
        values["refusals"] = np.where(harmful, np.nan, 1 - harmless)
        pairs = [*zip(self.test, texts), *zip(self.hard, hard), *zip(self.general, general), *zip(self.safety, safety)]
        checkpoint.write_jsonl(self.out / name / "test_samples.jsonl", [{**e, "completion": row[0]} for e, row in pairs])
        self.cost = spent  # measuring is no part of the stage's cost
        return values

    def spend(self, model, trained=0, scored=0, sampled=0):
        """Tokens, and an estimate of FLOPs: 2 a parameter and token forward, 4 backward (attention left out)."""
        parameters = sum(p.numel() for p in model.parameters())
        self.cost["tokens"] += trained + sampled
        self.cost["flops"] += parameters * (6.0 * trained + 2.0 * (scored + sampled))


def card(step, example, completion, scores):
    """A row of what the report shows."""
    known = {key: example[key] for key in ("prompt", "answer", "language", "kind")}
    return {"step": step, **known, "completion": completion, "rewards": scores}


class Bar:
    """A progress bar with the figures that matter."""

    def __init__(self, name):
        self.bar, self.name = None, name

    def show(self, metrics, total, *names):
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.name, initial=metrics["step"] - 1, dynamic_ncols=True, leave=False,
                            disable=not sys.stderr.isatty())
        self.bar.set_postfix({name: f"{metrics[name]:.3g}" for name in names if name in metrics}, refresh=False)
        self.bar.update()

    def close(self):
        if self.bar is not None:
            self.bar.close()


def peak_bytes(device):
    """The most memory that this process has held: of the GPU, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device):
    threads = f"{torch.get_num_threads()} threads, {platform.machine()}"
    name = torch.cuda.get_device_name() if device.type == "cuda" else threads
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def line_of(name, stage, seconds):
    """One line of result a stage."""
    text = f"{name:16} {seconds:6.0f} s  {stage['tokens'] / 1e6:5.1f}M tokens  {stage['flops']:.1e} FLOPs"
    if "evaluation" in stage:
        e = stage["evaluation"]
        shown = {"accuracy": "accuracy", "format": "format", "language_if_thinking": "language", "helpfulness": "helpful",
                 "harmlessness": "harmless", "refusals": "refuses look-alikes"}
        text += "".join(f"  {title} {100 * e[key][0]:.0f}%" for key, title in shown.items() if key in e)
        text += f"  thinks {e['length_if_thinking'][0]:.0f} tokens" if "length_if_thinking" in e else ""
    elif "counts" in stage:
        text += "  " + distill.explain(stage["counts"])
    return text



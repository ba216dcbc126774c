"""A run directory: stages trained, measured, kept, and resumed after a kill.

`Run` is what pipeline.py's recipe is written with. It knows files and tables, and no algorithm: those get what they
need as plain callables. A stage is finished when its directory holds DONE, which also names the code that made it.
"""

import json
import platform
import re
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch

import evaluate
import grpo
import sft
from lab import checkpoint, claims, measure, report
from lab.adapters import load_model
from lab.architectures import active_parameters, is_deepseek, new_model
from lab.check_adapter import base_directory, is_adapter
from lab.check_input import check_directory
from lab.graphs import generate
from lab.layers import fast_layers
from lab.logs import BudgetSpent, RLLog, SFTLog
from lab.lots import in_lots
from lab.asking import decoder, to_learn
from lab.scripts import cut_warning, rules, save_trained
from lab.memory import Memory
from lab.parallel import first, shared, wait
from lab.stale import CODE, DEEPSEEK_CODE, PRETRAINING_CODE, changed_files, code_of
from lab.terminal import line_of
from lab.trainee import Trainee
from variants.v3_pretraining import Objective

write_report = checkpoint.by_first(report.write)

LOGS = ("metrics.jsonl", "times.jsonl", "samples.jsonl", "warnings.jsonl", "watched.jsonl", "lengths.jsonl",
        "completions.jsonl")


def coin(text, example):
    """A random reward, blind to the problem: a control that separates learning from elicitation."""
    return float(zlib.crc32(f"{example['prompt']} {text}".encode()) % 2)


@dataclass
class Stage:
    """A row of the recipe: what tables say of a stage, and make(run), which trains and returns its model."""
    title: str
    starts_from: str  # the stage whose model is trained
    by: str
    paper: str        # where the papers describe it
    make: Callable
    needs: str = ""   # another stage, whose samples or judgement it is trained on

    def about(self):
        return {"title": self.title, "starts_from": self.starts_from, "by": self.by, "paper": self.paper}


class Run:
    """One run directory: the stages that are finished, their measured values, and the means to make the next."""

    def __init__(self, out, preset_name, preset, seed, device, source, stages, chosen, rewards, command="",
                 memory=Memory()):
        """source: MiniWorld or OwnModel (lab/sources.py); stages: {name: Stage}; chosen: names of those to make now;
        rewards: the weights of the rules, which count as settings."""
        self.out, self.preset_name, self.preset, self.seed, self.device = Path(out), preset_name, preset, seed, device
        self.source, self.stages, self.chosen, self.memory = source, stages, chosen, memory
        meta = {"preset": preset_name, "seed": seed, "machine": machine(device), "world": source.identity(),
                "command": command}
        self.results = self.earlier_results(meta)
        self.times = self.earlier_times()
        self.values = {}  # stage -> metric -> array with one value per test problem
        self.begin("")
        settings = {"preset": preset_name, "seed": seed, "settings": asdict(preset), "rewards": rewards}
        settings |= source.settings()
        changed = {name: value for name, value in vars(memory).items()
                   if name not in ("recompute", "shard") and value != getattr(Memory(), name)}
        if changed:
            settings["memory"] = changed
        if memory.lora:  # a stage's state does not hold its base
            settings["bases"] = source.contents()
        if is_adapter(self.out):
            raise ValueError(f"{self.out} already holds an adapter; choose another --out")
        checkpoint.check_same_settings(self.out / "config.json", settings)

    # ---- what earlier calls left

    def earlier_results(self, meta):
        """meta, and what an earlier call left in results.json about stages that are still finished."""
        path = self.out / "results.json"
        if not path.exists():
            return {"meta": meta, "stages": {}, "claims": []}
        earlier = checkpoint.read_json(path)
        recorded, measured_claims = earlier.get("stages", {}), earlier.get("claims", [])
        whole = isinstance(recorded, dict) and isinstance(measured_claims, list)
        if not whole or not all(isinstance(entry, dict) for entry in [*recorded.values(), *measured_claims]):
            raise ValueError(f"{path}: not a run's results; remove it, and it is written again")
        stages = {}
        for name, stage in recorded.items():
            is_plain_name = re.fullmatch(r"\w{1,99}", name)  # it becomes a path, which must not lead elsewhere
            if is_plain_name and checkpoint.finished(self.out / name) is not None:
                stages[name] = stage
        if stages:
            meta = meta | {"command": with_earlier_commands(earlier.get("meta"), meta["command"])}
        results = {"meta": meta, "stages": stages, "claims": []}
        if len(stages) == len(recorded):  # the rest was measured on all of them
            results |= {name: earlier[name] for name in ("claims", "rule", "budgets") if name in earlier}
        if "compare" in earlier and "base" in stages:
            results["compare"] = earlier["compare"]
        return results

    def earlier_times(self):
        """times.json: in a separate file, so that everything else is the same at each run."""
        path = self.out / "times.json"
        times = {"date": str(date.today()), "stages": {}}
        if path.exists():
            times |= checkpoint.read_json(path)
        stages = times["stages"]
        if not isinstance(stages, dict) or not all(type(seconds) in (int, float) for seconds in stages.values()):
            raise ValueError(f"{path}: not a run's times; remove it, and it is written again")
        return times

    def restart_from(self, stage):
        """--from: forgets this stage and the later ones. Only once: after a stop the same command resumes."""
        wait()  # until all have read what is there
        if checkpoint.is_first():
            self.restart(stage)
        wait()
        if not checkpoint.is_first():
            self.results |= self.earlier_results(self.results["meta"])

    def restart(self, stage):
        for page in self.out.glob("report.html.*.tmp"):  # of calls that were killed
            page.unlink()
        path = self.out / "FROM"  # of a call that has not come to its end
        asked = {"stage": stage, "code": code_of(CODE)}
        if stage is None or (path.exists() and checkpoint.read_json(path) == asked):
            return
        names = list(self.stages)
        self.forget(names[names.index(stage):])
        checkpoint.atomic_write(path, json.dumps(asked))

    def restart_is_over(self):
        """The restarted run has come to its end: the next --from restarts again."""
        (self.out / "FROM").unlink(missing_ok=True)

    def forget(self, stages):
        """These stages are not finished, and what was measured of them is gone.

        The last one goes first: a kill meanwhile leaves no stage without the one that it was made from.
        """
        for path in (self.out / "extras").glob("*.npz"):
            path.unlink()
        names = list(reversed(stages))
        if "base" in stages:
            names = [path.relative_to(self.out) for path in self.out.glob("compare/*")] + names
        for name in names:
            (self.out / name / checkpoint.DONE).unlink(missing_ok=True)
            checkpoint.drop(self.out / name)
            (self.out / name / "values.npz").unlink(missing_ok=True)
            (self.out / name / "cold_start.json").unlink(missing_ok=True)
        self.results.pop("compare", None)  # it comes back unless the base is gone
        self.results |= self.earlier_results(self.results["meta"])

    # ---- a stage

    def begin(self, name, code=CODE):
        """The stage `name` begins: its cost and time are counted from here."""
        self.name, self.tokenizer, self.trained = name, self.source.tokenizer_of(name), None
        if self.preset.model.get("model_type") == "deepseek_v3":
            code = (*code, *DEEPSEEK_CODE)
        self.cost, self.started, self.code = {"tokens": 0, "flops": 0.0}, time.time(), code_of(code)

    def end(self):
        self.times["stages"][self.name] = time.time() - self.started
        self.write_times()

    def make_stage(self, name):
        """Trains the stage's model unless it is finished, measures it, and prints its line."""
        dir, stage = self.out / name, self.stages[name]
        done = checkpoint.finished(dir)
        if done is None:
            dir.mkdir(parents=True, exist_ok=True)
            self.begin(name, self.code_behind(name))
            model = stage.make(self)
            if not self.source.is_given(name):  # else it is only measured
                self.save()
            self.end()
            parameters = sum(p.numel() for part, p in model.named_parameters() if "lora_" not in part)  # when merged
            done = stage.about() | {"parameters": parameters, **self.cost, "code": self.code}
            done |= self.best_validation(name)
            checkpoint.write_arrays(dir / "values.npz", measure.measure_stage(self, model))
            checkpoint.mark_finished(dir, done)
        checkpoint.drop(dir)
        self.values[name] = checkpoint.read_arrays(dir / "values.npz")
        self.record(name, done | {"evaluation": evaluate.summarise(self.values[name])})

    def code_behind(self, name):
        """The files that the weights of this stage depend on."""
        if self.source.is_given(name):
            return ("model.py",)
        if self.stages[name].by.startswith("pretraining"):
            return PRETRAINING_CODE
        if self.stages[name].needs == "judges" or name == "judges":
            return (*CODE, "variants/reward_model.py", "data/preferences.py")
        small_cards = {"variants/lora.py": self.memory.lora, "variants/offload.py": self.memory.offload_optimizer}
        return (*CODE, *(file for file, is_used in small_cards.items() if is_used))

    def make_data(self, name):
        """As make_stage, for a stage without a model: its function writes files and returns what to record of them."""
        done = checkpoint.finished(self.out / name)
        if done is None:
            self.begin(name, self.code_behind(name))
            made = self.stages[name].make(self)
            self.end()
            done = self.stages[name].about() | made | {**self.cost, "code": self.code}
            checkpoint.mark_finished(self.out / name, done)
        checkpoint.drop(self.out / name)
        self.record(name, done)

    def record(self, name, done):
        self.results["stages"][name] = {key: value for key, value in done.items() if key != "code"}
        print(self.line_of(name), flush=True)
        self.write()

    def best_validation(self, name):
        """The best value of the validation curve, for the claim that a student beats the whole curve of its control."""
        rows = self.rows_of(name, "metrics.jsonl")
        best = max((row.get("validation_accuracy_any", 0) for row in rows), default=0)
        return {"best_validation_accuracy_any": best} if best else {}

    def rows_of(self, name, log):
        """The rows of a stage's log; an own model has none."""
        path = self.out / name / log
        return checkpoint.read_jsonl(path) if path.exists() else []

    def starting_model(self):
        """The model that the stage under way starts from, to be trained."""
        return self.to_train(self.stages[self.name].starts_from)

    def to_train(self, stage):
        """The model of a stage, which the stage under way trains as the run's memory asks for."""
        dir = self.source.directory(self, stage)
        self.trained = Trainee(self.model(stage), self.memory, dir, self.seed)
        return self.trained.model

    def trainee(self, model):
        """The Trainee of a model that `to_train` has returned, or of a new one."""
        if self.trained is None or self.trained.model is not model:
            self.trained = Trainee(model, self.memory)
        return self.trained

    def model(self, stage):
        """The model of a finished stage, or an own one. It may be trained."""
        dir = self.source.directory(self, stage)
        check_directory(base_directory(dir))
        return fast_layers(load_model(dir, self.device, self.memory.dtype(self.preset.zero.dtype)))

    def save(self):
        """Writes the model of the stage under way."""
        save_trained(self.trained, self.out / self.name, self.tokenizer)

    def new_model(self, sizes):
        """A Transformer with random weights."""
        torch.manual_seed(self.seed)
        sizes = sizes | {"vocab_size": self.tokenizer.vocab_size, "max_position_embeddings": self.preset.context}
        return fast_layers(new_model(sizes, torch.Generator().manual_seed(self.seed)).to(self.device))

    def say_what_changed(self):
        """One line if the code of finished stages has changed: the first such stage, and how to re-run from there."""
        for name in self.results["stages"]:
            changed = changed_files(checkpoint.finished(self.out / name)["code"])
            if changed:
                print(f"{', '.join(changed)} changed since {name} was made; "
                      f"to re-run it and what depends on it: --from {name}", flush=True)
                return

    def extra(self, name, make):
        """Values {metric: array per problem} that a claim needs beside the stages, measured once."""
        path = self.out / "extras" / f"{name}.npz"
        if not first(path.exists()):
            checkpoint.write_arrays(path, make())
        wait()
        self.values[name] = checkpoint.read_arrays(path)

    # ---- results

    def line_of(self, name):
        return line_of(name, self.results["stages"][name], self.times["stages"].get(name, 0))

    def write(self):
        stages = self.results["stages"]
        self.times["seconds"] = sum(self.times["stages"].get(name, 0) for name in stages)  # without measuring
        best = {name: stage.get("best_validation_accuracy_any", 0.0) for name, stage in stages.items()}
        lengths = {row["step"]: row["lengths"] for row in self.rows_of("zero", "lengths.jsonl")}
        measured = claims.make_claims(self.values, evaluate.paired_bootstrap, best, lengths)
        numbers = {claim["number"] for claim in measured}
        kept = [claim for claim in self.results["claims"] if claim["number"] not in numbers]
        self.results["claims"] = sorted(measured + kept, key=claims.order)
        if "rule" in self.values:
            self.results["rule"] = evaluate.summarise(self.values["rule"])
        budgets = claims.budget_rows(claims.Values(self.values))
        if budgets:
            self.results["budgets"] = budgets
        self.write_times()
        checkpoint.atomic_write(self.out / "results.json", json.dumps(self.results, indent=1, ensure_ascii=False))
        write_report(self.out)

    def write_times(self):
        checkpoint.atomic_write(self.out / "times.json", json.dumps(self.times, indent=1))

    # ---- training

    def checkpointer(self, name=None):
        """(checkpointer, save, resume) for the stage under way; the cost so far is part of the state."""
        name = name or self.name
        checkpointer = checkpoint.Checkpointer(self.out / name, LOGS, after=lambda: write_report(self.out))

        def save(**parts):
            checkpointer.save(**parts, cost=self.cost, seconds=time.time() - self.started, code=self.code)

        def resume(**objects):
            rest = checkpointer.resume(**objects)
            self.cost, self.started, self.code = rest["cost"], time.time() - rest["seconds"], rest["code"]
            changed = changed_files(self.code)
            if changed:
                checkpoint.print_flush(f"{name} resumes, but began before {', '.join(changed)} changed; "
                                       f"to restart it: {self.how_to_restart(name)}")
            return rest

        return checkpointer, save, resume if checkpointer.resume else None

    def how_to_restart(self, name):
        if "/" in name:  # a method of the comparison
            return f"remove {self.out / name}"
        return f"--from {name}"

    def prompt(self, example):
        return self.tokenizer.encode_prompt(example["prompt"])

    def sft(self, model, rows, config, pretraining=False):
        """Trains on rows {"prompt", "completion"}; pretraining is the case without a mask."""
        checkpointer, save, resume = self.checkpointer()
        log, trainee = SFTLog(self, model), self.trainee(model)
        trainee.shard()
        template = self.tokenizer.template
        examples = [sft.tokenize(to_learn(row, template), self.tokenizer, pretraining) for row in rows]
        print(cut_warning(examples, config.row_length), end="", flush=True)
        objective = None
        if pretraining and is_deepseek(model):
            objective = Objective(cross_entropy=sft.CrossEntropy.apply)
        with checkpointer:
            sft.train(model, examples, replace(config, seed=self.seed), objective=objective, log=log,
                      save=trainee.save(save), resume=trainee.resume(resume), **trainee.optimizer(sft.adamw))
        if hasattr(model, "mtp"):
            del model.mtp  # what predicts the second token has done its work
        log.close()
        return model

    def rl(self, model, weights, config, examples=None, validate=True, sample_budget=None, **in_place):
        """GRPO with these rules as reward; the other rules are logged, with weight 0.

        sample_budget: ends after so many completions; in_place: what grpo.train takes for its advantages and sampling.
        """
        config, scored_by = replace(config, seed=self.seed), rules()
        if "coin" in weights:
            scored_by["coin"] = coin
        unknown = weights.keys() - scored_by.keys()
        if unknown:
            raise ValueError(f"no rule is called {', '.join(sorted(unknown))}: there are {', '.join(scored_by)}")
        weights = {name: weights.get(name, 0.0) for name in scored_by}
        checkpointer, save, resume = self.checkpointer()
        log, trainee = RLLog(self, model, config, scored_by, weights, sample_budget), self.trainee(model)
        trainee.shard()
        with checkpointer, suppress(BudgetSpent):
            if validate and resume is None:
                log.before_training(model)
            grpo.train(model, examples or self.source.problems,
                       encode=self.prompt, decode=decoder(self.tokenizer, examples or self.source.problems),
                       generate=shared(in_lots(generate, self.memory.cache_tokens)), end_ids=self.tokenizer.end_ids,
                       rewards=scored_by, weights=weights, config=config,
                       validate=log.validate if validate else None, log=log, save=trainee.save(save),
                       resume=trainee.resume(resume), **trainee.optimizer(grpo.adam), **in_place)
        log.close()
        return model

    # ---- sampling

    def complete(self, model, examples, save_in=None, **settings):
        """Texts and token counts of a model's completions of examples, sampled in the stage's precision for sampling.

        save_in: the name of a stage that is nothing but sampling; its completions are saved there as they come.
        """
        defaults = {"samples": self.preset.samples, "seed": self.seed,
                    "max_new_tokens": self.preset.zero.max_new_tokens, "batch_rows": self.preset.batch_rows}
        config = evaluate.EvalConfig(**defaults | settings)
        prompts = [self.prompt(example) for example in examples]
        generator = torch.Generator(device=self.device).manual_seed(config.seed)
        sample, decode = self.sampler(model, generator), decoder(self.tokenizer, examples)
        if save_in is None:
            return evaluate.complete(prompts, sample, decode, config)
        checkpointer, save, resume = self.checkpointer(save_in)
        with checkpointer:
            done, log = checkpoint.kept_rows(self.out / save_in / "completions.jsonl", generator, save, resume)
            return evaluate.complete(prompts, sample, decode, config, done, log)

    def sampler(self, model, generator):
        """A function of (prompts, **settings) that samples from the model and counts what it costs."""
        model = grpo.cast_copy(model, self.preset.zero.dtype)

        def sample(prompts, **settings):
            result = shared(generate)(model, prompts, end_ids=self.tokenizer.end_ids, generator=generator, **settings)
            self.spend(model, sampled=int(result[1].sum()) + sum(map(len, prompts)))
            return result

        return sample

    def spend(self, model, trained=0, scored=0, sampled=0):
        """Counts tokens and estimates FLOPs (attention left out): 2 per parameter and token forward, 4 backward, or 2
        where LoRA's base needs no gradients."""
        parameters = active_parameters(model)
        self.cost["tokens"] += trained + sampled
        per_token = 4.0 if self.memory.lora else 6.0
        self.cost["flops"] += parameters * (per_token * trained + 2.0 * (scored + sampled))


def with_earlier_commands(meta, command):
    """The commands that made a run together, as a shell takes them. meta: as an earlier call has left it."""
    earlier = meta.get("command") if isinstance(meta, dict) else None
    if not isinstance(earlier, str):
        return command
    if f" && {command} && " in f" && {earlier} && ":
        return earlier
    return f"{earlier} && {command}"


def machine(device):
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{torch.get_num_threads()} threads, {platform.machine()}"
    if not checkpoint.is_alone():
        name = f"{torch.distributed.get_world_size()} processes of {name}"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"

"""RL-2 with reward models in place of the rules for preferences (--preferences model), beside R1, from the same Dev3.

judges    two reward models of Dev3's shape, trained on the mini-world's preferences (data/preferences.py)
r1_model  RL-2 as it is, with their scores where R1 has the rules of helpfulness and harmlessness (only logged here)
r1_long   general requests alone, three times as many rollouts, at T 1: what R1 avoids [R1 v2 B.5, fig. 6]
"""

from dataclasses import replace
from functools import partial

import torch

import rewards
from data import preferences
from lab import checkpoint, measure
from lab.judges import Judge, RewardModel, Term, reader
from lab.parallel import first, wait
from lab.reward_models import encoder, load_reward_model, save_reward_model, summary
from lab.reward_script import measure as measure_judge
from lab.run import Stage
from variants.reward_model import RewardConfig, score, train

HELD_OUT = 400  # test preferences of each kind; to train on, as many as the preset has problems
LONG = 3  # times RL-2's rollouts
READS = {"helpful": "summary", "safe": "response"}


def stages(with_language):
    """{name: Stage}; with_language: the weights of the rules for reasoning."""
    return {
        "judges": Stage("Reward models", "dev3", "preferences: pairs, and safe or not", "R1 v2 3.1", train_judges),
        "r1_model": Stage("RL-2, reward models", "dev3", "GRPO: rules for reasoning, reward models", "R1 v2 3.2.2",
                          partial(rl2_by_models, with_language), needs="judges"),
        "r1_long": Stage("General requests for long", "dev3", "general requests alone, 3 times as long, T 1",
                         "R1 v2 B.5", partial(rl2_for_long, with_language), needs="judges"),
    }


# ------------------------------------------------------------------------------------------- the models

def rows_of(run, kind, split):
    """Rows as variants/reward_model.py takes them, of this run's tokenizer."""
    encode, count = encoder(run.tokenizer), run.preset.problems if split == "train" else HELD_OUT
    if kind == "helpful":
        return [tuple(encode(row, summary(row[name])) for name in ("chosen", "rejected"))
                for row in preferences.helpful(run.seed, count, split)]
    return [(encode(row, row["response"]), float(row["safe"])) for row in preferences.safe(run.seed, count, split)]


def train_judges(run):
    """Writes judges/helpful and judges/safe; returns how good they are on preferences about held-out requests."""
    found, dtype = {}, run.preset.zero.dtype
    config = RewardConfig(lr=1e-3, epochs=3, dtype=dtype, seed=run.seed)
    for kind, reads in READS.items():
        dir = run.out / "judges" / kind
        rows = rows_of(run, kind, "train")
        if not first((dir / "config.json").exists()):
            model = RewardModel(run.model("dev3")).to(run.device)
            checkpointer, save, resume = run.checkpointer(f"judges/{kind}")
            with checkpointer:
                train(model, rows, config, save=save, resume=resume)
            save_reward_model(model, run.tokenizer, reads, dir)
        wait()
        checkpoint.drop(dir)
        model, _, _ = load_reward_model(RewardModel, dir, run.device, torch.float32)
        # charged here, so that a stage that was stopped in between is too
        tokens = sum(len(ids) for row in rows for ids in row if isinstance(ids, list))
        run.spend(model.transformer, trained=config.epochs * tokens)
        figures = measure_judge(model, rows_of(run, kind, "test"), score, dtype)
        print(f"{'judge, ' + kind:16} {figures['accuracy']:.1%} of held-out preferences [{figures['low']:.1%}, "
              f"{figures['high']:.1%}], calibration error {figures['calibration']:.3f}", flush=True)
        found[kind] = {name: float(value) for name, value in figures.items()}
    return {"judges": found}


def judges_of(run):
    """The two models' parts of the reward: helpful on what asks for a reply, safe on all requests."""
    def asks_for_a_reply(example):
        return example["kind"] != "reasoning" and not example.get("harmful")

    def is_request(example):
        return example["kind"] != "reasoning"

    terms = []
    for kind, applies in (("helpful", asks_for_a_reply), ("safe", is_request)):
        model, tokenizer, reads = load_reward_model(RewardModel, run.out / "judges" / kind, run.device, torch.float32)
        terms.append(Term(f"model_{kind}", model, reader(tokenizer, reads), is_probability=reads == "response",
                          applies=applies))
    return terms


# ------------------------------------------------------------------------------------------- RL-2

def rl2_by_models(weights, run):
    judge = Judge(judges_of(run), run.preset.zero.dtype)
    return run.rl(run.starting_model(), weights, run.preset.rl2, run.source.rl2_prompts(), select=judge.select)


def rl2_for_long(weights, run):
    judge = Judge(judges_of(run), run.preset.zero.dtype)
    config = replace(run.preset.rl2, rollouts=LONG * run.preset.rl2.rollouts, temperature=1.0)
    prompts = run.source.rl2_prompts(general_from=0.0, rollouts=4 * config.rollouts)  # of 4 one is general
    general = [example for example in prompts if example["kind"] == "general"]
    return run.rl(run.starting_model(), weights, config, general, select=judge.select)


# ------------------------------------------------------------------------------------------- what claim 14 needs

def extras(run):
    """Both judgements of the replies to the test's general requests, by rule and by model."""
    if "judges" not in run.chosen:
        return
    for name in ("dev3", "r1", "r1_model", "r1_long"):
        if name in run.chosen:
            run.extra(f"judged_{name}", partial(judged_replies, run, name))


def judged_replies(run, name):
    """{"helpfulness", "model_helpful": per request}; the model's score as sigmoid(score), which lies within 0 and 1."""
    examples = run.source.general
    texts, _ = run.complete(run.model(name), examples, samples=run.preset.samples)
    helpful, _ = judges_of(run)
    rows = [helpful.encode(example, text) for example, row in zip(examples, texts) for text in row]
    scores = score(helpful.model, rows, run.preset.zero.dtype).sigmoid().view(len(examples), -1)
    return {"helpfulness": measure.means(rewards.helpfulness, examples, texts),
            "model_helpful": scores.mean(1).double().numpy()}

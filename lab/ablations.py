"""Stages that no model of the recipe needs (--ablations): what one reward brings, and a student's own samples."""

import grpo
from distill import OnPolicy
from lab.run import Stage


def stages(accuracy_and_format, students):
    """{name: Stage}: RL-1 without the language reward, RL that cannot learn to reason, on-policy distillation."""
    def rl1_without_language(run):
        return run.rl(run.starting_model(), accuracy_and_format, run.preset.rl1)

    def on_policy(run):
        """The student's own samples, judged by r1 token by token; the rules are only logged."""
        config = run.preset.on_policy

        def logprobs_of(teacher, rollout):
            run.spend(teacher, scored=sum(rollout.ends))
            return grpo.all_logprobs(teacher, rollout, config)

        judge = OnPolicy(grpo.cast_copy(run.model("r1"), config.dtype), logprobs_of)
        return run.rl(run.starting_model(), accuracy_and_format, config, advantage_estimator=judge)

    table = {
        "dev2_no_language": Stage("RL-1, no language", "dev1", "GRPO: accuracy + format", "R1 v2 B.6",
                                  rl1_without_language),
        "zero_random": Stage("RL, random reward", "base", "GRPO: a coin", "", random_reward),
        "zero_format": Stage("RL, format alone", "base", "GRPO: format", "", format_alone),
    }
    for name in students:  # on from what SFT on the traces has made: from the small base it fails (results/routes)
        table[f"on_policy_{name}"] = Stage(f"On-policy, {name}", f"student_{name}", "GRPO: r1 judges each token", "",
                                           on_policy, needs="r1")
    return table


def random_reward(run):
    return run.rl(run.starting_model(), {"coin": 1.0}, run.preset.zero)


def format_alone(run):
    return run.rl(run.starting_model(), {"format": 1.0}, run.preset.zero)

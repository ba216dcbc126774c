"""Stages that no model of the recipe needs, and some claims do (--ablations): what one reward alone brings."""

from lab.run import Stage


def stages(accuracy_and_format):
    """{name: Stage}: RL-1 without the language reward, and RL that cannot learn to reason."""
    def rl1_without_language(run):
        return run.rl(run.starting_model(), accuracy_and_format, run.preset.rl1)

    return {
        "dev2_no_language": Stage("RL-1, no language", "dev1", "GRPO: accuracy + format", "R1 v2 B.6",
                                  rl1_without_language),
        "zero_random": Stage("RL, random reward", "base", "GRPO: a coin", "", random_reward),
        "zero_format": Stage("RL, format alone", "base", "GRPO: format", "", format_alone),
    }


def random_reward(run):
    return run.rl(run.starting_model(), {"coin": 1.0}, run.preset.zero)


def format_alone(run):
    return run.rl(run.starting_model(), {"format": 1.0}, run.preset.zero)

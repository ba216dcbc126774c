"""The papers' settings by name: against their figures, and against the methods whose loss test_grpo.py has by hand."""

import pytest

import grpo
from lab.check_input import check_settings
from variants.configs import METHODS, PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED | METHODS)
def test_every_named_configuration_is_a_valid_one(name):
    settings = (PUBLISHED | METHODS)[name]
    check_settings(grpo.GRPOConfig(**settings))
    with pytest.raises(ValueError, match="group_size 1"):
        check_settings(grpo.GRPOConfig(**settings | {"group_size": 1}))


def test_the_published_values_are_the_papers():
    zero, rl1, rl2, dsm = (
        grpo.GRPOConfig(**PUBLISHED[name]) for name in ("r1-zero", "r1-rl1", "r1-rl2", "deepseekmath")
    )
    assert all((c.lr, c.beta, c.group_size, c.minibatches) == (3e-6, 0.001, 16, 16) for c in (zero, rl1, rl2))
    assert zero.prompts_per_rollout * zero.group_size == 8192  # outputs a rollout
    assert zero.prompts_per_rollout * zero.group_size // zero.minibatches == 512  # of an update
    assert zero.rollouts * zero.minibatches == 10_400 and zero.reference_every * zero.minibatches == 400
    assert abs(rl2.rollouts * rl2.minibatches - 1700) < rl2.minibatches
    assert (zero.temperature, rl1.temperature, rl2.temperature) == (1.0, 1.0, 0.7)
    assert all((c.max_new_tokens, c.reference_every) == (32768, 25) for c in (zero, rl1, rl2))
    assert rl1.clip_low >= 1 and 1 + rl1.clip_high == 11  # eps 10: no lower clip, an upper one at 11
    assert (dsm.lr, dsm.beta, dsm.group_size, dsm.max_new_tokens) == (1e-6, 0.04, 64, 1024)
    assert dsm.prompts_per_rollout * dsm.group_size == 1024 and dsm.minibatches == dsm.inner_epochs == 1


def test_the_methods_are_those_whose_loss_test_grpo_has_by_hand():
    from test_grpo import METHODS as BY_HAND
    names = {name.lower().replace(". ", "_"): name for name in BY_HAND}
    assert METHODS.keys() == names.keys() - {"ppo"}  # whose switches variants/ppo.py's script sets
    for name, settings in METHODS.items():
        config, switches = grpo.GRPOConfig(**settings), BY_HAND[names[name]]
        assert {switch: getattr(config, switch) for switch in switches} == switches
        assert config.sequence_ratio == ("sequence_ratio" in switches)
        assert config.detach_ratio == ("detach_ratio" in switches)
        assert (config.scale == "none") == (name in ("dr_grpo", "rloo", "reinforce"))
        assert config.leave_one_out == (name == "rloo")

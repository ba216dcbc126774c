"""The papers' settings by name: against PAPER.md's figures, and against the table in policy_loss's docstring."""

import re

import pytest

import grpo
from configs import METHODS, PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED | METHODS)
def test_every_named_configuration_is_a_valid_one(name):
    grpo.GRPOConfig(**(PUBLISHED | METHODS)[name])


def test_the_published_values_are_the_papers():
    zero, rl1, rl2, dsm = (grpo.GRPOConfig(**PUBLISHED[name]) for name in ("r1-zero", "r1-rl1", "r1-rl2", "deepseekmath"))
    assert all((c.lr, c.beta, c.group_size, c.minibatches) == (3e-6, 0.001, 16, 16) for c in (zero, rl1, rl2))
    assert zero.prompts_per_rollout * zero.group_size == 8192  # outputs a rollout
    assert zero.prompts_per_rollout * zero.group_size // zero.minibatches == 512  # of an update
    assert zero.rollouts * zero.minibatches == 10_400 and zero.reference_every * zero.minibatches == 400
    assert abs(rl2.rollouts * rl2.minibatches - 1700) < rl2.minibatches
    assert (zero.temperature, rl1.temperature, rl2.temperature) == (1.0, 1.0, 0.7)
    assert rl1.clip_low >= 1 and 1 + rl1.clip_high == 11  # eps 10: no lower clip, an upper one at 11
    assert (dsm.lr, dsm.beta, dsm.group_size, dsm.max_new_tokens) == (1e-6, 0.04, 64, 1024)
    assert dsm.prompts_per_rollout * dsm.group_size == 1024 and dsm.minibatches == dsm.inner_epochs == 1


def test_the_methods_are_the_rows_of_the_losses_table():
    rows = {}
    for line in grpo.policy_loss.__doc__.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) >= 5 and cells[0] != "method":
            rows[cells[0].lower().replace(". ", "_").replace(".", "_")] = cells
    for name, settings in METHODS.items():
        cells, c = rows[name], grpo.GRPOConfig(**settings)
        text = " ".join(cells)
        low, high = (float(x) for x in next(cell for cell in cells if re.match(r"[\d.e-]+, [\d.e-]+$", cell)).split(", "))
        assert (c.clip_low, c.clip_high) == (low, high)
        assert c.mean == next(cell for cell in cells if cell in ("sequence", "token", "constant"))
        assert c.beta == float(cells[-1])
        assert c.sequence_ratio == ("sequence_ratio" in text) and c.detach_ratio == ("detach_ratio" in text)
        assert c.scale_by_std == ("/ std" in text) and c.leave_one_out == ("leave one out" in text)

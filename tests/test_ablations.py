"""What only --ablations makes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
import pipeline
from lab import ablations, checkpoint
from lab.sources import OwnModel
from runs import RECIPE, TOKENIZERS, call
from test_model import tiny
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


def test_on_policy_distillation_is_a_stage_that_learns_from_r1_alone(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    ended = call(tmp_path, [*RECIPE, "--stages", "on_policy_qwen"])
    assert ended.status == 0, ended.stderr
    rows = checkpoint.read_jsonl(tmp_path / "run" / "on_policy_qwen" / "metrics.jsonl")
    assert all(row["reverse_kl"] > 0 and row["kl"] == 0 and 0 <= row["accuracy"] <= 1 for row in rows)
    stages = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]
    assert stages["on_policy_qwen"]["starts_from"] == "student_qwen"
    assert {"accuracy_any", "helpfulness"} <= stages["on_policy_qwen"]["evaluation"].keys()


def test_its_teacher_is_r1_and_what_the_teacher_computes_is_counted():
    asked, spent, model = [], [], tiny()
    r = SimpleNamespace(ids=torch.randint(1, 32, (4, 6)), mask=torch.ones(4, 5).bool(), ends=[6] * 4, kept=[],
                        old_logprobs=torch.full((4, 5), -2.0))

    def rl(student, weights, config, advantage_estimator):
        return config, advantage_estimator.advantages(r)

    config = grpo.GRPOConfig(dtype="float32")
    run = SimpleNamespace(preset=SimpleNamespace(on_policy=config), model=lambda name: asked.append(name) or model,
                          starting_model=lambda: None, rl=rl, spend=lambda model, **tokens: spent.append(tokens))
    stage = ablations.stages({}, ["llama"])["on_policy_llama"]
    used, advantages = stage.make(run)
    assert asked == ["r1"] and stage.needs == "r1" and stage.starts_from == "student_llama" and used is config
    assert spent == [{"scored": 24}]
    expected = model(r.ids[:, :-1]).log_softmax(-1).gather(2, r.ids[:, 1:, None])[:, :, 0] + 2
    torch.testing.assert_close(advantages, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout, is_there", [("qwen", True), ("smollm", False)])
def test_a_student_of_another_tokenizer_has_no_such_stage(layout, is_there):
    source = OwnModel.__new__(OwnModel)
    source.students, source.examples, source.directories = {"llama": "dir"}, [], {"base": "x", "base_llama": "y"}
    source.tokenizers = {name: Tokenizer(TOKENIZERS / of) for name, of in (("base", "qwen"), ("base_llama", layout))}
    source.has_requests = False
    assert ("on_policy_llama" in pipeline.stage_table(source)) == is_there

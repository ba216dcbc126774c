"""The benchmark's own arithmetic: what it counts, and that its table stands without any peer."""

from functools import partial

import pytest
import torch

import bench
from model import Config, KVCache, Transformer

SHAPE = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64)


def test_the_matrices_of_the_limit_are_those_of_the_model():
    model = Transformer(Config(**SHAPE))
    ours = sorted((p.shape[1], p.shape[0]) for p in model.parameters() if p.dim() == 2)
    counted = sorted((i, o) for i, o, count in bench.matrices(SHAPE) for _ in range(count))
    assert counted == ours  # the tied embedding once, as the head
    assert bench.weights_bytes(SHAPE) == 2 * sum(p.numel() for p in model.parameters() if p.dim() == 2)


def test_the_cache_of_the_limit_is_that_of_the_model():
    model = Transformer(Config(**SHAPE)).bfloat16()
    cache = KVCache(model.config, torch.zeros(3, dtype=torch.long), torch.bfloat16)
    model(torch.ones(3, 32, dtype=torch.long), cache=cache)  # 32 columns: by so many the cache grows
    assert bench.cache_bytes(SHAPE, 3, 32) == cache.k.nbytes + cache.v.nbytes


RACES = {"train": partial(bench.train_race, SHAPE, 4, 8, None), "decode": partial(bench.decode_race, SHAPE, 2, 3, 5, 4),
         "grpo": partial(bench.grpo_race, SHAPE)}


@pytest.fixture
def show(monkeypatch, capsys):
    """show(race) -> its rows, at small sizes, of our contenders."""
    monkeypatch.setattr(bench, "DTYPES", {"bf16": torch.bfloat16, "fp32": torch.float32})
    monkeypatch.setattr(bench, "peak_megabytes", lambda *which: "7")
    monkeypatch.setattr(bench, "median_time", lambda run, *_: bench.timed(run))
    for name, value in dict(PROMPTS=2, GROUP=2, PROMPT=4, NEW=3).items():
        monkeypatch.setattr(bench, name, value)

    def rows(race, **more):
        unit, work, contenders, limit = race()
        chosen = {name: make for name, make in contenders.items() if name.startswith("ours")}
        bench.show_race("race", lambda: (unit, work, chosen | more, limit), 1, None)
        return [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    return rows


@pytest.mark.parametrize("race", RACES)
def test_a_race_prints_one_row_per_contender_with_rate_limit_and_memory_also_without_any_peer(race, show):
    rows = show(RACES[race])
    assert [row[0] for row in rows] == ["ours"] * (3 if race == "grpo" else 2)
    assert [row[1] for row in rows] == (["bf16", "fp32", "bf16,"] if race == "grpo" else ["bf16", "fp32"])
    for row in rows:
        rate, low, high = map(float, row[-6:-3])
        assert 0 < low <= rate <= high and row[-3:-1] == ["-", row[-2]] and row[-2].endswith("%") and row[-1] == "7"


def test_a_ratio_is_to_the_best_peer_of_the_same_run(monkeypatch, show):
    monkeypatch.setattr(bench, "timed", lambda run: run() or 0.5)
    monkeypatch.setattr(bench, "product_seconds", lambda *_, **__: 0.25)
    monkeypatch.setattr(bench, "adam_step", lambda *_: lambda: 2.0)
    rows = show(RACES["train"], **{"peer slow": lambda: lambda: 8.0, "peer fast": lambda: lambda: 3.0})
    assert [row[-3] for row in rows] == ["1.50x", "1.50x", "0.38x", "1.00x"]
    assert [row[-2] for row in rows] == ["12%", "12%", "3%", "8%"]


def test_where_bfloat16_is_slow_float32_runs_alone(monkeypatch, show):
    monkeypatch.setattr(bench, "DTYPES", {"fp32": torch.float32})
    assert [row[:2] for race in RACES for row in show(RACES[race])] == [["ours", "fp32"]] * 3 + [["ours", "fp32,"]]


def test_a_separate_process_reports_its_own_peak_and_not_its_parents():
    ballast = torch.ones(300 * 2**18)  # 300 MB in this process
    peak = int(bench.peak_megabytes("decode 1", "ours fp32"))
    assert 100 < peak < 600 and ballast.sum() > 0

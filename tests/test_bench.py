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
    model(torch.ones(3, 32, dtype=torch.long), cache=cache)  # 32 columns: a whole lot
    assert bench.cache_bytes(SHAPE, 3, 32) == cache.k.nbytes + cache.v.nbytes


@pytest.mark.parametrize("race", [
    partial(bench.train_race, SHAPE, 4, 8, None), partial(bench.decode_race, SHAPE, 2, 3, 5, 4),
    partial(bench.prefill_race, SHAPE, 2, 8)], ids=["train", "decode", "prefill"])
def test_a_race_prints_a_row_a_contender_with_rate_limit_and_memory(race, capsys, monkeypatch):
    def without_peers_or_compiler():
        unit, work, contenders, limit = race()
        return unit, work, {name: make for name, make in contenders.items() if name in ("ours bf16", "ours fp32")}, limit

    monkeypatch.setattr(bench, "peak_megabytes", lambda *which: "7")
    bench.show_race("race", without_peers_or_compiler, 1, None)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "ours" in line]
    assert [row[:2] for row in rows] == [["ours", "bf16"], ["ours", "fp32"]]
    for row in rows:
        rate, low, high = map(float, row[2:5])
        assert 0 < low <= rate <= high and row[-2].endswith("%") and row[-1] == "7"


def test_a_growth_prints_the_slope_between_points(capsys, monkeypatch):
    monkeypatch.setattr(bench, "peak_megabytes", lambda *which: "7")
    monkeypatch.setattr(bench, "timed", lambda run: run())
    bench.show_growth("rows", [(n, lambda n=n: lambda: 0.5 * n ** 2) for n in (1, 4, 8)], 3)
    slopes = [line.split()[2] for line in capsys.readouterr().out.splitlines()[3:]]
    assert slopes == ["nan", "2.00", "2.00"]


def test_a_process_of_its_own_reports_its_peak_not_its_parents():
    ballast = torch.ones(300 * 2**18)  # 300 MB in this process
    peak = int(bench.peak_megabytes("decode: rows", "1"))
    assert 100 < peak < 600 and ballast.sum() > 0

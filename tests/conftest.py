"""What the tests share: a tiny model and a tokenizer without a file. `python -m pytest --full` runs the long checks too."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the long checks too")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a long check, run with --full only")
    torch.set_num_threads(1)  # the models are tiny: more threads cost more than they give
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the runs that tests start; two threads each wait for one another on a busy machine


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long check: --full runs it"))


@pytest.fixture(autouse=True)
def seeded():
    """Random modules are the same in each call: in a fresh process torch's generator starts from the machine's entropy."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


class ByteTokenizer:
    """Each byte is a token, and the end token comes after them."""
    end_id, vocab_size = 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


@pytest.fixture
def tiny():
    """tiny(vocab_size) -> a Transformer of two small layers in fp32, the same at each call."""
    from model import Config, Transformer

    def make(vocab_size=16, seed=0, **fields):
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, max_position_embeddings=64)
        return Transformer(Config(vocab_size=vocab_size, **sizes | fields)).init_weights(torch.Generator().manual_seed(seed))
    return make

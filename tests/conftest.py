"""What the tests share: a tiny model, a tokenizer without a file, a finished run. --full runs the long checks too."""

import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine, and forks; tests/gpu.py is for a GPU
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import halves  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the long checks too")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a long check, run with --full only")
    torch.set_num_threads(1)  # the models are tiny: more threads cost more than they give
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # likewise of the interpreters that tests start


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long check: --full runs it"))


@pytest.fixture(autouse=True)
def seeded():
    """Random modules are the same at each call: torch's generator would start from the machine's entropy."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Two processes share the tests of a whole session (halves.py); pytest's own loop runs those of a few files."""
    if session.config.option.collectonly:
        return None
    if halves.can_be_shared(session):
        halves.run(session)
        return True
    if halves.uses_shared_run(session.items):
        halves.start_shared_run(session.config)
    return None


def pytest_unconfigure(config):
    halves.stop_shared_run(config)


@pytest.fixture(scope="session")
def finished_run(request):
    """A run of the whole recipe at the smoke preset, not to be changed; what it printed stands in `said` beside it."""
    folder, child = request.config.begun_run
    ended = child.wait(280)
    assert ended.status == 0, ended.stderr
    (folder / "said").write_text(ended.stdout)
    return folder / "run"


@pytest.fixture
def copy_of_run(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


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
        config = Config(vocab_size=vocab_size, **sizes | fields)
        return Transformer(config).init_weights(torch.Generator().manual_seed(seed))
    return make

"""Runs of pipeline.py that tests start, disturb and compare with one another."""

import json
import os
import signal
import time
from pathlib import Path

import torch

import model as model_module
import pipeline
from forked import run_forked, start_forked
from lab import checkpoint
from tokenizer import Tokenizer

TOKENIZERS = Path(__file__).resolve().parent / "fixtures" / "tokenizers"
RECIPE = ["--preset", "smoke", "--device", "cpu", "--out", "run"]
STAGES = ["base", "zero", "dev1", "dev2", "traces", "dev3", "r1", "base_qwen", "student_qwen", "control_qwen",
          "base_llama", "student_llama"]


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)
    assert condition()


def content(dir):
    """{file: bytes} of all that a run leaves, but for times, the page that shows them, and the lock."""
    apart = ("times.json", "times.jsonl", "report.html", "LOCK")
    return {str(path.relative_to(dir)): path.read_bytes() for path in sorted(dir.rglob("*"))
            if path.is_file() and path.name not in apart}


def differing(run, other, ignore=()):
    """The files that two runs do not both have, or that differ."""
    left, right = content(run), content(other)
    return [name for name in sorted(left.keys() | right.keys())
            if left.get(name) != right.get(name) and name not in ignore]


def results_of(run):
    """results.json without the command that made it."""
    results = json.loads((run / "results.json").read_text())
    del results["meta"]["command"]
    return results


def saving_often():
    """pipeline.main, whose state is saved after each step, so that a resumption is from within a stage."""
    save = checkpoint.Checkpointer.save

    def save_now(self, **parts):
        self.every = self.took = self.spent = 0.0
        return save(self, **parts)

    checkpoint.Checkpointer.save = save_now
    pipeline.main()


def killed_at_first_save(main):
    """Runs main() in this process, a forked one, until it has saved its state once."""
    save = checkpoint.Checkpointer.save

    def save_and_die(self, **parts):
        self.took = self.spent = 0.0
        if save(self, **parts):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Checkpointer.save = save_and_die
    main()


def call(folder, args, program=pipeline.main, **settings):
    """`python pipeline.py ARGS` in a folder: its exit status and output."""
    return run_forked(program, argv=["pipeline.py", *map(str, args)], cwd=folder, timeout=280, **settings)


def begin(folder, args, program=pipeline.main, **settings):
    """The same, begun: to be disturbed on its way."""
    return start_forked(program, argv=["pipeline.py", *map(str, args)], cwd=folder, **settings)


def run_with_kills(folder, args, kills, program=saving_often):
    """The command, killed after so many seconds each time and called again until it ends; how often it was killed."""
    folder.mkdir(exist_ok=True)
    for killed, after in enumerate(kills):
        with begin(folder, args, program) as child:
            try:
                ended = child.wait(after)
                assert ended.status == 0, ended.stderr
                return killed
            except TimeoutError:
                child.kill()
                child.wait()
    ended = call(folder, args, program)
    assert ended.status == 0, ended.stderr
    return len(kills)


def make(dir, kind, layout):
    """A model directory of a family, random, with one of the recorded tokenizers."""
    tokenizer = Tokenizer(TOKENIZERS / layout)
    config = model_module.Config(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
                                 num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, model_type=kind)
    model = model_module.Transformer(config).init_weights(torch.Generator().manual_seed(0))
    model_module.save(model, dir, tokenizer)
    return model, tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

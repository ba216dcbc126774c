"""The tests' own helper: a forked child behaves as a separate program would, and leaves this process as it was."""

import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import grpo
import model as model_module
import sft
from forked import run_forked, start_forked
from lab import checkpoint


def test_output_is_captured_however_it_is_written():
    def program():
        print("by print")
        os.write(1, b"by a descriptor\n")
        subprocess.run(["sh", "-c", "echo by its own child; echo and its errors >&2"])
        print("errors", file=sys.stderr)

    ended = run_forked(program)
    assert ended.status == 0
    assert sorted(ended.stdout.splitlines()) == ["by a descriptor", "by its own child", "by print"]
    assert ended.stderr == "and its errors\nerrors\n"


@pytest.mark.parametrize("end, status, said", [
    (SystemExit(3), 3, ""), (SystemExit(None), 0, ""), (SystemExit("a reason"), 1, "a reason\n"),
    (ValueError("wrong"), 1, "ValueError: wrong\n"), (KeyboardInterrupt(), -signal.SIGINT, "KeyboardInterrupt\n"),
])
def test_the_exit_status_is_that_of_the_interpreter(end, status, said):
    def program():
        raise end

    ended = run_forked(program)
    assert ended.status == status and ended.stderr.endswith(said)


def test_a_program_gets_its_own_arguments_folder_and_environment(tmp_path):
    def program():
        print(sys.argv, os.getcwd(), os.environ["COLOUR"], sys.stdin.read() == "")

    before = sys.argv, os.getcwd()
    ended = run_forked(program, argv=["program.py", "--x"], cwd=tmp_path, env={"COLOUR": "red"})
    assert ended.stdout == f"['program.py', '--x'] {tmp_path} red True\n"
    assert (sys.argv, os.getcwd()) == before and "COLOUR" not in os.environ


def test_what_a_child_changes_stays_in_it_and_what_is_patched_here_is_patched_there(monkeypatch):
    def program(name):
        print(checkpoint.STATE)
        checkpoint.STATE = name

    monkeypatch.setattr(checkpoint, "STATE", "patched")
    assert run_forked(program, "changed").stdout == "patched\n" and checkpoint.STATE == "patched"


def train_both_ways(make):
    """Steps of SFT, then of GRPO; prints the weights' sum."""
    model = make()
    sft.train(model, [([1, 2, 3, 4], 1)] * 16, sft.SFTConfig(epochs=1, batch_tokens=16, row_length=8, dtype="float32"))
    config = grpo.GRPOConfig(rollouts=2, prompts_per_rollout=2, group_size=4, minibatches=2, max_new_tokens=6,
                             dtype="float32")
    torch.manual_seed(0)
    grpo.train(model, [[1, 2], [3]], encode=list, decode=str, generate=model_module.generate, end_ids=[0],
               rewards={"length": lambda text, _: len(text) % 3 / 2}, config=config)
    print(sum(p.double().sum().item() for p in model.parameters()))


def test_a_child_trains_a_model_as_this_process_does(tiny, capsys):
    train_both_ways(tiny)
    here = capsys.readouterr().out
    ended = run_forked(train_both_ways, tiny)
    assert ended.status == 0, ended.stderr
    assert ended.stdout == here and float(here) == float(here)


def test_a_child_trains_even_after_this_process_has_computed_on_two_threads(tiny):
    """Those of a pool are gone after a fork; whoever asks them for work waits for ever."""
    torch.set_num_threads(2)
    try:
        torch.ones(300, 300) @ torch.ones(300, 300)
        torch.ones(1_000_000).exp().sum()
        ended = run_forked(train_both_ways, tiny, timeout=30)
    finally:
        torch.set_num_threads(1)
    assert ended.status == 0, ended.stderr


def test_a_child_that_is_killed_is_reported_with_its_signal_and_holds_no_lock(tmp_path):
    def program():
        with checkpoint.lock(tmp_path):
            print("ready", flush=True)
            time.sleep(60)

    with start_forked(program) as child:
        while child.stdout != "ready\n":
            time.sleep(0.01)
        with pytest.raises(ValueError, match=f"process {child.pid} is at work here"), checkpoint.lock(tmp_path):
            pass
        child.kill()
        assert child.wait(10).status == -signal.SIGKILL
    with checkpoint.lock(tmp_path):
        assert run_forked(print).status == 0


def test_a_child_does_not_hold_the_locks_of_this_process_once_they_are_given_back(tmp_path):
    def program():
        print("ready", flush=True)
        time.sleep(60)

    with checkpoint.lock(tmp_path):
        child = start_forked(program)
        while child.stdout != "ready\n":
            time.sleep(0.01)
    with child, checkpoint.lock(tmp_path):
        assert child.poll() is None


def test_signals_mean_what_they_mean_to_a_program_and_the_end_of_a_block_kills():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with start_forked(time.sleep, 60) as child:
            while child.poll() is None:
                child.kill(signal.SIGTERM)  # heard once the child has its own handlers
                time.sleep(0.01)
        with start_forked(time.sleep, 60) as other:
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert child.ended.status == -signal.SIGTERM and other.ended.status == -signal.SIGKILL


def test_a_limit_binds_the_child_alone(tmp_path):
    def program():
        Path("file").write_text("x" * 20_000)

    ended = run_forked(program, cwd=tmp_path, limits={resource.RLIMIT_FSIZE: 10_000})
    assert ended.status == 1 and "File too large" in ended.stderr
    (tmp_path / "here").write_text("x" * 20_000)


def test_output_may_go_where_nobody_reads_or_nothing_fits():
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        assert run_forked(print, "x", stdout=writer).status == 120
        assert run_forked(print, "x", stdout=full).status == 120
    os.close(writer)


def test_a_warning_is_a_line_on_stderr_as_in_a_program():
    ended = run_forked(warnings.warn, "take care")
    assert "UserWarning: take care" in ended.stderr


def test_one_that_takes_too_long_is_killed_and_said_so():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="still running after 0.1 s"):
        run_forked(time.sleep, 60, timeout=0.1)
    assert time.monotonic() - started < 20

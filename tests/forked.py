"""Runs a function in a forked process as if it were a program: it has its own argv, folder, output and exit status.

    ended = run_forked(pipeline.main, argv=["pipeline.py", "--preset", "smoke", "--out", "run"], cwd=tmp_path)
    assert ended.status == 0, ended.stderr

    with start_forked(pipeline.main, argv=[...]) as child:    # to disturb it on its way
        child.kill(signal.SIGTERM)
        assert child.wait(60).status == 143

A fresh interpreter would spend 1.4 s on importing torch; a fork has it already. The child starts with a copy of this
process: modules as imported (and patched) here, their caches, the random state. What it changes stays in the child.
It computes on one thread, since the threads of a pool do not survive a fork.
"""

import faulthandler
import gc
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from typing import NamedTuple

import torch

QUIET_BY_DEFAULT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


class Ended(NamedTuple):
    status: int  # the exit code, or -N where signal N killed it, as subprocess has it
    stdout: str
    stderr: str


class Forked:
    """A child on its way. `pid`; `ended` is None until `poll` or `wait` has seen its end."""

    def __init__(self, pid, stdout, stderr):
        self.pid, self.ended = pid, None
        self._stdout, self._stderr = stdout, stderr

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.poll() is None:
            self.kill()
            self.wait()

    def kill(self, number=signal.SIGKILL):
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self):
        """Ended, or None while it runs."""
        if self.ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended = Ended(os.waitstatus_to_exitcode(status), self.stdout, self.stderr)
        return self.ended

    def wait(self, timeout=60.0):
        """Ended. Raises TimeoutError, and leaves the child running, where that takes longer."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                said = f"{self.stdout[-1000:]} {self.stderr[-1000:]}"
                raise TimeoutError(f"still running after {timeout} s; it said: {said}")
            time.sleep(0.002)
        return self.ended

    @property
    def stdout(self):
        """What it has written so far (as any program, it flushes rarely where no terminal reads)."""
        return _read(self._stdout)

    @property
    def stderr(self):
        return _read(self._stderr)


def run_forked(function, *args, timeout=120.0, **settings) -> Ended:
    """Runs function(*args) in a child, which is killed after `timeout` seconds. settings: those of start_forked."""
    with start_forked(function, *args, **settings) as child:
        return child.wait(timeout)


def start_forked(function, *args, argv=None, cwd=None, env=None, stdout=None, stderr=None, limits=None) -> Forked:
    """Starts function(*args) in a child.

    argv: its sys.argv. cwd: its folder. env: changes to the environment. stdout, stderr: a file or a descriptor to
    write to, in place of what is captured. limits: {resource.RLIMIT_FSIZE: bytes}, set last; this one also binds the
    captured output.
    """
    stdout, stderr = stdout or tempfile.TemporaryFile(), stderr or tempfile.TemporaryFile()
    sys.stdout.flush(), sys.stderr.flush()  # or the child would write it once more
    pid = os.fork()
    if pid:
        return Forked(pid, stdout, stderr)
    status = 70
    try:
        _become_a_program(stdout, stderr, argv, cwd, env or {}, limits or {})
        status = _status_of(function, args)
    finally:
        os._exit(status)  # never back into pytest; and its exit handlers are not the child's


def _become_a_program(stdout, stderr, argv, cwd, env, limits):
    gc.freeze()  # a file of the parent's that is collected here would close a descriptor by its number
    faulthandler.disable()  # pytest's, which writes to a descriptor of the parent's
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(_descriptor(stdout), 1)
    os.dup2(_descriptor(stderr), 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the parent's locks and pipes
    sys.stdin = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _show_warnings()
    torch.set_num_threads(1)
    sys.argv = [*(argv or sys.argv)]
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _show_warnings():
    """On stderr, as a fresh interpreter would; pytest collects them."""
    def show(message, category, filename, lineno, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = show
    warnings.resetwarnings()
    for category in QUIET_BY_DEFAULT:
        warnings.simplefilter("ignore", category)


def _status_of(function, args):
    """The exit status that the interpreter would give a program of these lines."""
    try:
        function(*args)
        status = 0
    except SystemExit as exit:
        status = exit.code
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # who reads is gone, or the disk is full
        status = status or 120
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status or 0


def _descriptor(file):
    return file if isinstance(file, int) else file.fileno()


def _read(file):
    """All that lies in a captured file, whoever else writes to it; nothing of one that is not a plain file."""
    try:
        return os.pread(_descriptor(file), 2 ** 28, 0).decode(errors="replace")
    except OSError:  # a pipe, or a file open for writing only
        return ""

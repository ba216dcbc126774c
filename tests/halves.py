"""A test session in two processes, so that both of two cores are busy: a fork shares the tests, a file at a time.

Most of the time goes to whole commands that a test starts and waits for, on one thread each. The fork begins with the
files that look at the run of the fixture finished_run; each process takes the next of the others when it has ended one.
The fork leaves its reports in a file, and the first process passes them on to pytest as if it had run these tests.
"""

import json
import os
import shutil
import sys
import tempfile
import traceback
from itertools import chain, groupby, pairwise
from pathlib import Path


class Second:
    """The fork, seen from the first process."""

    def __init__(self, session, first_files, other_files):
        self.session, self.file = session, tempfile.TemporaryFile("w+")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(first_files, other_files)

    def _run(self, first_files, other_files):
        """In the fork: it runs tests and leaves their reports."""
        try:
            config = self.session.config
            manager = config.pluginmanager
            capture = manager.getplugin("capturemanager")
            capture.stop_global_capturing()  # its files are the first process's too
            capture.start_global_capturing()
            manager.unregister(manager.getplugin("terminalreporter"))
            manager.register(Writer(config, self.file))
            start_shared_run(config)
            run_tests(self.session, first_files, other_files)
            self.file.flush()
            stop_shared_run(config)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(0)  # what it did not run is missing among its reports

    def pass_on(self):
        """Waits for the fork, passes its reports on, and returns the number of tests that it ran."""
        os.waitpid(self.pid, 0)
        self.file.seek(0)
        hook, ran = self.session.config.hook, 0
        for line in self.file:
            data = json.loads(line)
            report = hook.pytest_report_from_serializable(config=self.session.config, data=data)
            if report.skipped:  # JSON made a list of it, and pytest's own reporters look for a tuple
                report.longrepr = tuple(report.longrepr)
            if report.when == "setup":
                hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            hook.pytest_runtest_logreport(report=report)
            if report.when == "teardown":
                ran += 1
        return ran

    def stop(self):
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


class Writer:
    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")


class Queue:
    """Iterates over files, each of which one of two processes gets: a byte in a pipe is read only once."""

    def __init__(self, files):
        self.files = files
        self.read, write = os.pipe()
        os.write(write, bytes(range(len(files))))
        os.close(write)

    def __iter__(self):
        while number := os.read(self.read, 1):
            yield self.files[number[0]]


def run(session):
    """The session in two processes. Raises RuntimeError where they did not run all of its tests."""
    by_file = [list(items) for _, items in groupby(session.items, lambda item: item.path)]
    first = [items for items in by_file if uses_shared_run(items)]
    others = Queue([items for items in by_file if not uses_shared_run(items)])
    second = Second(session, first, others)
    try:
        ran = run_tests(session, [], others)
    except BaseException:
        second.stop()
        raise
    ran += second.pass_on()
    if ran < len(session.items) and not session.shouldfail:
        raise RuntimeError(f"the two processes ran {ran} of {len(session.items)} tests")


def run_tests(session, first_files, other_files):
    """Runs the tests of these files as pytest does, and returns their number."""
    ran = 0
    tests = chain.from_iterable(chain(first_files, other_files))
    for item, next_item in pairwise(chain(tests, [None])):
        run_test(session, item, next_item)
        ran += 1
    return ran


def run_test(session, item, next_item):
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def can_be_shared(session):
    """Whether two processes pay for themselves."""
    files = {item.path for item in session.items}
    return len(files) > 20 and os.cpu_count() > 1 and not session.testsfailed


def uses_shared_run(items):
    return any("finished_run" in item.fixturenames for item in items)


def start_shared_run(config):
    """Begins the run of the fixture finished_run."""
    from runs import RECIPE, begin  # here: it imports the project
    folder = Path(tempfile.mkdtemp())
    config.begun_run = folder, begin(folder, RECIPE)


def stop_shared_run(config):
    folder, child = getattr(config, "begun_run", (None, None))
    if folder is not None:
        child.__exit__()
        shutil.rmtree(folder)

"""A test session in two processes: a fork runs the files of SECOND, so that both of two cores are busy.

Most of the time goes to whole commands that a test starts and waits for, on one thread each. The fork leaves its
reports in a file; the first process passes them on to pytest as if it had run these tests itself.
"""

import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import torch

SECOND = ("test_faults.py", "test_pipeline.py", "test_compare.py")  # about half of the time


class Second:
    """The fork that runs some of the session's tests, seen from the first process."""

    def __init__(self, session, items):
        self.session, self.count = session, len(items)
        self.file = tempfile.TemporaryFile("w+")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(items)

    def _run(self, items):
        """The fork: it runs these tests and leaves their reports."""
        try:
            config = self.session.config
            manager = config.pluginmanager
            capture = manager.getplugin("capturemanager")
            capture.stop_global_capturing()  # its files are the first process's too
            capture.start_global_capturing()
            manager.unregister(manager.getplugin("terminalreporter"))
            manager.register(Writer(config, self.file))
            self.session.items = items
            config.hook.pytest_runtestloop(session=self.session)  # conftest's, which begins the shared run and no fork
            self.file.flush()
            stop_shared_run(config)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(0)  # what it did not run is missing among its reports

    def pass_on(self):
        """Waits for the fork, and passes its reports on. Raises RuntimeError where it did not run all of its tests."""
        os.waitpid(self.pid, 0)
        self.file.seek(0)
        hook, ran = self.session.config.hook, 0
        for line in self.file:
            data = json.loads(line)
            report = hook.pytest_report_from_serializable(config=self.session.config, data=data)
            if report.when == "setup":
                hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            hook.pytest_runtest_logreport(report=report)
            if report.when == "teardown":
                ran += 1
        if ran < self.count and not self.session.shouldfail:
            raise RuntimeError(f"the second process ran {ran} of its {self.count} tests")

    def stop(self):
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


class Writer:
    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")


def split(session):
    """Second, with its part of the session's tests; None where one process runs them all."""
    items = session.items
    others = [item for item in items if item.path.name in SECOND]
    if len(others) == len(items) or len(others) < 20 or os.cpu_count() < 2 or torch.cuda.is_available():
        return None  # a process that has used a GPU cannot be forked
    session.items = [item for item in items if item.path.name not in SECOND]
    return Second(session, others)


def start_shared_run(session):
    """The run of the fixture finished_run begins at once, where one of the tests looks at it."""
    if any("finished_run" in item.fixturenames for item in session.items):
        from runs import RECIPE, begin  # here: it imports the project
        folder = Path(tempfile.mkdtemp())
        session.config.begun_run = folder, begin(folder, RECIPE)


def stop_shared_run(config):
    folder, child = getattr(config, "begun_run", (None, None))
    if folder is not None:
        child.__exit__()
        shutil.rmtree(folder)

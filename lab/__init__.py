"""What runs, records, checks and shows experiments.

Importing this package before torch sets how long a waiting OpenMP thread spins. By default it spins for milliseconds,
so that beside another busy process every wait costs a scheduler's time slice: a smoke run takes minutes, not seconds.
"""

import os
import sys
from pathlib import Path

SPINS = "GOMP_SPINCOUNT", "1000"  # read by OpenMP when torch is imported
CHOSEN_BY_THE_USER = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"


def wait_patiently():
    """Sets SPINS unless the user has chosen. A top-level script has imported torch by now: it starts once more."""
    if any(name in os.environ for name in CHOSEN_BY_THE_USER):
        return
    name, value = SPINS
    os.environ[name] = value
    program = getattr(sys.modules["__main__"], "__file__", None)
    is_our_script = program is not None and Path(program).resolve().parent == Path(__file__).resolve().parent.parent
    if is_our_script and "torch" in sys.modules:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


wait_patiently()

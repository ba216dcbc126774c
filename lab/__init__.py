"""What runs, records, checks and shows experiments.

Importing this package before torch bounds the kernels that stay in memory, and sets how long a waiting OpenMP thread
spins on a busy machine. By default it spins for milliseconds, so that beside a busy process every wait costs a time
slice: a smoke run takes minutes, not seconds.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPINS = "GOMP_SPINCOUNT", "1000"  # read by OpenMP when torch is imported
CHOSEN_BY_THE_USER = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
BUSY = 1.0  # processes that have been running in the last minute; without any, long spinning is a fifth faster


def wait_patiently():
    """Sets SPINS on a busy machine, unless the user has chosen. A script that has imported torch starts again."""
    if os.getloadavg()[0] < BUSY or any(name in os.environ for name in CHOSEN_BY_THE_USER):
        return
    name, value = SPINS
    os.environ[name] = value
    program = getattr(sys.modules["__main__"], "__file__", None)
    is_our_script = program is not None and Path(program).resolve().parent in (ROOT, ROOT / "variants")
    if is_our_script and "torch" in sys.modules:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")  # by default kernels of 1,024 shapes stay in memory
wait_patiently()

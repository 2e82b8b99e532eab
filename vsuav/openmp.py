"""How many threads OpenMP gives, on which torch and the machine code compute.

torch counts on as many as it asks for: where OpenMP gives fewer, a part of a result stays unwritten. So what limits
them is asked beforehand, and what would lessen them from loop to loop is switched off.
"""

import ctypes
import os
import re
from pathlib import Path

NAMES = re.compile(r"/lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")


def _libraries() -> list[ctypes.CDLL]:
    """The OpenMP libraries that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {fields[5] for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6}
    return [ctypes.CDLL(path) for path in sorted(paths) if NAMES.search(path)]


def most_threads() -> int:
    """Most threads that share a loop in this process (`OMP_THREAD_LIMIT`, `OMP_MAX_ACTIVE_LEVELS`)."""
    limits = [
        library.omp_get_thread_limit() if library.omp_get_max_active_levels() > 0 else 1 for library in _libraries()
    ]
    return min(limits, default=2**31 - 1)


def cores() -> int:
    """CPU cores that this process may use, also where OpenMP has bound this thread to one of them (`OMP_PROC_BIND`)."""
    return max([len(os.sched_getaffinity(0)), *(library.omp_get_num_procs() for library in _libraries())])


def fix() -> None:
    """From now on, loops of this thread get all the threads they ask for, however busy the machine (`OMP_DYNAMIC`)."""
    for library in _libraries():
        library.omp_set_dynamic(0)

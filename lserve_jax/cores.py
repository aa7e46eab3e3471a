"""How many CPU cores there are for threads."""

import os


def usable_cores() -> int:
    """Cores that this process may run on: fewer than there are under ``taskset`` or a CPU set.

    A container's share of time is not looked at.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""Threads are as many as the cores that a process may run on."""

import os
import subprocess
import sys

import pytest

from lserve_jax.cores import usable_cores

CODE = "from lserve_jax.cores import usable_cores; print(usable_cores())"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can be chosen on Linux")
def test_cores_that_a_process_may_not_run_on_do_not_count() -> None:
    some = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{some}]); {CODE}"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    assert int(done.stdout) == 1


def test_without_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()

"""Mutated checkpoint files, each loaded in a process of its own kind; counts what came of them.

    python tests/fuzz/driver.py [FAMILY ...]

runs all cases of the families (of all, if none is named), prints a line for each fault and a table
at the end, and exits with 1 if there was a fault. The tests run a sample of the same cases.
Faults are: a hang or crash, an error that is not clear (neither ValueError, NotImplementedError
nor OSError, or one that does not name the file), and a damaged file that is accepted.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(HERE.parents[1])]


@dataclass(frozen=True)
class Result:
    """What came of one case; ``fault`` is None, or the kind of fault."""

    name: str
    outcome: str  # accepted, refused, unclear, hang, crash
    fault: str | None
    detail: str


class Worker:
    """A process that loads the cases of one family; a new one after each that dies."""

    def __init__(self, family: str, base: Path):
        self._command = [sys.executable, str(HERE / "worker.py"), family, str(base)]
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path[:3]), "JAX_PLATFORMS": "cpu"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.count = int(self._out.readline())

    def run(self, number: int) -> dict[str, str]:
        self._in.write(f"{number}\n")
        self._in.flush()
        line = self._out.readline()
        if line:
            return json.loads(line)
        died = self._process.wait()
        self.close()
        self._start()
        outcome = "hang" if died == -signal.SIGXCPU else "crash"
        return {"name": f"case {number}", "outcome": outcome, "detail": f"exit status {died}"}

    def close(self) -> None:
        self._in.close()
        self._out.close()
        self._process.wait()


def run_family(family: str, base: Path, sample: int | None = None) -> Iterator[Result]:
    """Results of a family's cases, or of ``sample`` of them, always the same; the first is one
    in which nothing is changed."""
    worker = Worker(family, base)
    numbers: Sequence[int] = range(worker.count)
    if sample is not None and sample < worker.count:
        numbers = [0, *sorted(random.Random(0).sample(range(1, worker.count), sample))]
    right = None
    try:
        for number in numbers:
            found = worker.run(number)
            right = found["detail"] if number == 0 else right
            yield Result(found["name"], found["outcome"], _fault(found, right), found["detail"])
    finally:
        worker.close()


def _fault(found: dict[str, str], right: str | None) -> str | None:
    if found["outcome"] not in ("accepted", "refused"):
        return found["outcome"]
    if found["outcome"] == "accepted":
        return "wrong" if found["expect"] == "refuse" else None
    return "refused though right" if found["expect"] == "same" else None


def main(arguments: Sequence[str]) -> int:
    from bases import make
    from families import FAMILIES

    totals: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as directory:
        make(base := Path(directory) / "base")
        for family in arguments or FAMILIES:
            totals[family] = Counter()
            for result in run_family(family, base):
                totals[family][result.fault or result.outcome] += 1
                if result.fault:
                    print(f"{result.fault}: {family}: {result.name}: {result.detail}", flush=True)
    kinds = ("accepted", "refused", "hang", "crash", "unclear", "wrong", "refused though right")
    for family, counts in totals.items():
        print(f"{family}: " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds))
    faults = [counts[kind] for counts in totals.values() for kind in kinds[2:]]
    return int(any(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

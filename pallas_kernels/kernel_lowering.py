"""Kernels of traced programs, lowered by other processes where this machine has kernels."""

import importlib
from concurrent.futures import Future
from typing import Any

from pallas_kernels.device import machine


class LoweringProcesses:
    """Up to ``count`` processes, begun when there is something for them or before; see ``close``.

    >>> import jax
    >>> processes = LoweringProcesses(2)
    >>> processes.begin(jax.jit(lambda x: x + 1).trace(1.0).jaxpr)  # nothing to do on a CPU
    []
    >>> processes.close()
    """

    def __init__(self, count: int):
        self._count, self._begun = count, None

    def close(self) -> None:
        """Ends them."""
        if self._begun is not None:
            self._begun.close()

    def start(self) -> None:
        """Begins all processes now, for kernels that will come: they take seconds to be there."""
        if (processes := self._processes()) is not None:
            processes.start()

    def begin(self, jaxpr: Any) -> list[Future[None]]:
        """Sends away the kernels of a traced program that were not lowered yet.

        To lower the program waits for them no longer, once what this returns is done.
        """
        processes = self._processes()
        return [] if processes is None else processes.begin(jaxpr)

    def _processes(self) -> Any | None:
        kind = machine()
        if kind is not None and self._begun is None:
            # Imports Pallas, which a start from kept programs need not.
            module = importlib.import_module(f"pallas_kernels.{kind}.lower_elsewhere")
            self._begun = module.Processes(self._count)
        return self._begun

"""Kernels of traced programs, lowered by other processes where this machine has kernels."""

import importlib
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from pallas_kernels.device import machine


class LoweringProcesses:
    """Up to ``count`` processes, begun when there is something for them; a context that ends them.

    >>> import jax
    >>> with LoweringProcesses(2) as processes:  # on a CPU there is nothing to do
    ...     processes.begin(jax.jit(lambda x: x + 1).trace(1.0).jaxpr)
    []
    """

    def __init__(self, count: int):
        self._count, self._begun = count, None

    def __enter__(self) -> "LoweringProcesses":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._begun is not None:
            self._begun.close()

    def begin(self, jaxpr: Any) -> list[Future[None]]:
        """Sends away the kernels of a traced program that were not lowered yet.

        To lower the program waits for them no longer, once what this returns is done.
        """
        kind = machine()
        if kind is None:
            return []
        if self._begun is None:  # imports Pallas, which a start from kept programs need not
            module = importlib.import_module(f"pallas_kernels.{kind}.lower_elsewhere")
            self._begun = module.Processes(self._count)
        return self._begun.begin(jaxpr)

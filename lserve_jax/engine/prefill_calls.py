"""Which prompts are prefilled together: the calls of a step, as far as its budget goes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lserve_jax.engine.request import Request
from lserve_jax.engine.runner import ModelRunner

LEAST_BUSY = 1024  # tokens of a call from which on more of them take as much longer


class PrefillCall(NamedTuple):
    """One call of ``ModelRunner.prefill``."""

    requests: list[Request]  # whose next chunks run
    rows: int  # as many, or more
    size: int  # length of a row, padding included

    @property
    def tokens(self) -> int:
        """All that it computes, padding and rows without a prompt included."""
        return self.rows * self.size


def plan_calls(
    line: Iterable[Request], budget: int, runner: ModelRunner, *, together: bool
) -> list[PrefillCall]:
    """The calls that run the next chunks of the first requests of ``line``.

    As many as ``budget`` tokens allow. The first that they do not is taken from ``line``, too, but
    none behind a prompt that goes on after its chunk. Chunks of one padded length run ``together``,
    or each by itself.
    """
    # By what can be one call: who asks for log probabilities of a prompt runs another program, and
    # so does who is read block-sparsely, whose prompts are long.
    groups: dict[tuple[int, str | None], list[Request]] = {}
    for request in line:
        left = len(request.prompt) - request.prefilled
        alone = not together or request.sampling.prompt_logprobs is not None
        alone |= request.block_sparse
        key = runner.padded(left), request.request_id if alone else None
        groups.setdefault(key, []).append(request)
        if sum(call.tokens for call in _calls(groups, runner)) > budget:
            groups[key].remove(request)
            break
        if left > runner.chunk_size:
            break
    return list(_calls(groups, runner))


def _calls(
    groups: dict[tuple[int, str | None], list[Request]], runner: ModelRunner
) -> Iterator[PrefillCall]:
    for (size, _), requests in groups.items():
        begin = 0
        for rows in rows_of_calls(len(requests), runner.row_counts(size), size):
            yield PrefillCall(requests[begin : begin + rows], rows, size)
            begin += rows


def rows_of_calls(prompts: int, counts: Sequence[int], size: int) -> list[int]:
    """Rows of each call that prefills some of so many prompts, with calls of any of ``counts``.

    Those are ``row_counts`` of ``size`` tokens. Rows without a prompt are computed too. So there
    are never as many as those with one, and none where a call has more tokens than ``LEAST_BUSY``.

    >>> rows_of_calls(19, [8, 1], 64), rows_of_calls(15, [8, 1], 64), rows_of_calls(10, [8, 1], 512)
    ([8, 8, 1, 1, 1], [8, 8], [8, 1, 1])
    >>> rows_of_calls(47, [32, 8, 1], 64)
    [32, 8, 8]
    """
    calls: list[int] = []
    for rows in counts:
        full, prompts = divmod(prompts, rows)
        calls += [rows] * full
        if 2 * prompts > rows and rows * size <= LEAST_BUSY:
            return [*calls, rows]
    return calls

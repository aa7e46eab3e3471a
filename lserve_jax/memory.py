"""What is said where memory runs out, on the device or on the host."""

import contextlib
from collections.abc import Generator

import jax

_OPTIONS = "max_model_len, max_num_seqs or kv_cache_bytes"


def memory_wanted(error: BaseException | None) -> str | None:
    """How much was wanted, in the words of what refused it; None for an error of another kind."""
    if isinstance(error, MemoryError):
        return str(error) or "on the host"
    # A function that JAX ran before, in the same shapes, says it by a ValueError.
    if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and (
        "RESOURCE_EXHAUSTED" in str(error)
    ):
        said = str(error).splitlines()[0]
        return (said.partition("RESOURCE_EXHAUSTED: ")[2] or said).rstrip(".")
    return None


@contextlib.contextmanager
def memory_errors() -> Generator[None]:
    """Running out of memory as a ``MemoryError`` that also says which options to lower."""
    try:
        yield
    except (MemoryError, ValueError, jax.errors.JaxRuntimeError) as error:
        wanted = memory_wanted(error)
        if wanted is None:
            raise
        raise MemoryError(f"out of memory: {wanted}; lower {_OPTIONS}") from error

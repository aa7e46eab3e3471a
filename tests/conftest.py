"""JAX settings for every test, and the default model's file for those that need it."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# The float64 oracle multiplies small matrices: more threads only wait for each other, at full
# speed. Read when NumPy is imported, so xdist's workers must inherit it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# XLA's pool of threads: one for each warpgroup that an interpreted kernel lets wait for others,
# however few cores there are. Read when JAX makes its first array.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
SKIPPED_PASSES = (
    "simplify-while-loops",
    "while-loop-invariant-code-motion",
    "while-loop-constant-sinking",
    "reshape-mover",
    "tree_reduction_rewriter",
)


def pytest_configure(config: pytest.Config) -> None:
    """Runs before any test module is imported, so no array exists yet."""
    wants_gpu = "gpu" in config.getoption("markexpr").replace("not gpu", "")
    if not wants_gpu:
        # Passes of XLA that shorten few of these programs, and take a twentieth of compiling. Read
        # when the first program is compiled; processes that a test starts have them too.
        skipped = f"--xla_disable_hlo_passes={','.join(SKIPPED_PASSES)}"
        flags = os.environ.get("XLA_FLAGS", "")
        if skipped not in flags:  # xdist's workers have it already
            os.environ["XLA_FLAGS"] = f"{flags} {skipped}".strip()
        jax.config.update("jax_platforms", "cpu")
        # Tiny models run once or twice: optimising their programs takes longer than it saves.
        jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Most of the suite's time is compilation: keep it, also between the workers of one run.
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "jit"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def drop_compiled() -> Iterator[None]:
    """Each program compiled for a CPU takes memory maps, of which a process may have 65,530.

    With those of all modules in one process XLA ends in a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def optimised() -> Iterator[None]:
    """For a test that computes much, or looks at what was compiled: as users would compile it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def conformance() -> Path:
    """Directory of the tiny random checkpoints, one folder an architecture."""
    return ROOT / "tests" / "data" / "conformance"


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The default model's alias, its file fetched: by one worker while the others wait.

    Fails, rather than skips, when the file cannot be had: the goldens belong to these weights.
    """
    import convert

    alias = "smollm2-135m-instruct"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        convert.resolve(alias)
    return alias

"""Which ops have a derivative: what the docstring of ``api`` says of each is so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from op_examples import example, jitted

FORWARD_ONLY = ("paged_attention", "prefill_attention", "prefix_attention", "verify_attention")
BOTH = (
    *("causal_attention", "append_kv", "append_kv_chunk", "apply_rotary"),
    *("merge_attention", "fused_linear", "product"),
)


def along(op: str):
    """``op`` as a function of its first array, summed with fixed weights."""
    arguments = example(op)
    name = next(iter(arguments))

    def f(x: jax.Array) -> jax.Array:
        results = jax.tree.leaves(jitted(op)(arguments | {name: x}))
        return sum((jnp.where(jnp.isfinite(y), jnp.sin(y), 0.0)).sum() for y in results)

    return f, arguments[name]


def some_direction(x: jax.Array) -> np.ndarray:
    """Of length one."""
    direction = np.random.default_rng(1).standard_normal(x.shape).astype(x.dtype)
    return direction / np.linalg.norm(direction)


@functools.cache
def derivative(op: str) -> float:
    """In forward mode, along ``some_direction``."""
    f, x = along(op)
    return float(jax.jit(lambda *xs: jax.jvp(f, xs[:1], xs[1:])[1])(x, some_direction(x)))


@pytest.mark.parametrize("op", [*FORWARD_ONLY, *BOTH])
def test_forward_mode(op: str) -> None:
    f, x = along(op)
    value, step = jax.jit(f), 1e-2 * some_direction(x)
    quotient = float(value(x + step) - value(x - step)) / 2e-2
    # Sums of some 100 terms, and steps of 1e-2: float32 leaves three digits.
    assert_allclose(derivative(op), quotient, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("op", BOTH)
def test_reverse_mode_is_forward_mode_transposed(op: str) -> None:
    f, x = along(op)
    made = np.asarray(jax.jit(jax.grad(f))(x))
    assert_allclose((made * some_direction(x)).sum(), derivative(op), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("op", FORWARD_ONLY)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["by itself", "jit"])
def test_no_reverse_mode(op: str, wrap) -> None:
    """Said while tracing: nothing is compiled."""
    arguments = example(op)
    (name, x), *_ = arguments.items()
    call = wrap(jitted.__wrapped__(op).__wrapped__)
    with pytest.raises(NotImplementedError, match=f"^{op} has no derivative in reverse mode"):
        jax.eval_shape(jax.grad(lambda x: call(arguments | {name: x})[0].sum()), x)


def test_no_reverse_mode_of_arrays() -> None:
    """As users call it: not under any trace but that of the derivative."""
    f, x = along("prefix_attention")
    with pytest.raises(NotImplementedError, match=r"^prefix_attention has no derivative"):
        jax.grad(f)(x)

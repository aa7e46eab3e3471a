"""Which ops have a derivative: what the docstring of ``api`` says of each is so."""

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


def quotient(f, x: jax.Array, direction: jax.Array) -> float:
    step = 1e-2
    return float(f(x + step * direction) - f(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("op", [*FORWARD_ONLY, *BOTH])
def test_forward_mode(op: str) -> None:
    f, x = along(op)
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), x.dtype)
    direction /= jnp.linalg.norm(direction.ravel())
    _, made = jax.jvp(f, (x,), (direction,))
    # Sums of some 100 terms, and steps of 1e-2: float32 leaves three digits.
    assert_allclose(made, quotient(f, x, direction), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("op", BOTH)
def test_reverse_mode_is_forward_mode_transposed(op: str) -> None:
    f, x = along(op)
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), x.dtype)
    _, forward = jax.jvp(f, (x,), (direction,))
    assert_allclose((jax.grad(f)(x) * direction).sum(), forward, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("op", FORWARD_ONLY)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_no_reverse_mode(op: str, wrap) -> None:
    f, x = along(op)
    with pytest.raises(NotImplementedError, match=f"^{op} has no derivative in reverse mode"):
        jax.grad(wrap(f))(x)

"""A clear word where an op has no derivative in reverse mode.

Loops that run as far as the data says can be followed forwards only; JAX's own error speaks of
``while_loop``, not of the op. Results pass through a primitive that changes nothing and cannot be
transposed: reverse mode comes to it before it comes to the loop.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_forward_only = Primitive("forward_only")
_forward_only.def_impl(lambda x, *, op: x)
_forward_only.def_abstract_eval(lambda x, *, op: x)
batching.defvectorized(_forward_only)
mlir.register_lowering(_forward_only, lambda context, x, *, op: [x])


def _refuse(cotangent, x, *, op):
    raise NotImplementedError(
        f"{op} has no derivative in reverse mode (jax.grad, jax.vjp), only in forward mode "
        "(jax.jvp); causal_attention has both"
    )


ad.deflinear2(_forward_only, _refuse)


def forward_only[T](op: str, results: T) -> T:
    """``results`` of ``op``, which raise ``NotImplementedError`` in reverse mode."""
    return jax.tree.map(lambda x: _forward_only.bind(x, op=op), results)

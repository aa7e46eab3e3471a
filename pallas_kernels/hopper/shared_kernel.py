"""One kernel for calls whose arrays differ in nothing but the size of their first axis.

Layers split their KV heads differently, so that their pools, lists and scores are of different
shapes. A Mosaic kernel has the shapes of its arrays in its code and in the descriptors that copies
go by, and would be lowered and compiled for each. But the size of a first axis is only a bound:
addresses follow from the other axes. So a kernel is lowered once, for first axes as long as any
layer's, and called with the arrays that a layer has. How many heads these hold is a number that the
kernel reads, and beyond them it must touch nothing.

Under ``vmap`` every call has a kernel of its own. Under the interpreter, which checks bounds, too:
there ``lowered_by_itself`` takes the place of ``lowered_once``.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import ad, batching, mlir

Shapes = tuple[jax.ShapeDtypeStruct, ...]
MOST_KEPT = 1024  # lowered kernels, some 100 KB each
FLAT = 1 << 30  # more elements than an array of one axis has anywhere


@dataclass(frozen=True)
class _Kernel:
    """What a kernel is made of but for the shapes of its arrays."""

    make: Callable[[Any, Shapes], Callable[..., Any]]
    settings: Hashable
    tree: jax.tree_util.PyTreeDef  # of the operands

    def run(self, results: Shapes, *flat: Any) -> list[Any]:
        operands = jax.tree.unflatten(self.tree, flat)
        return jax.tree.leaves(self.make(self.settings, results)(*operands))


def call_shared(
    make: Callable[[Any, Shapes], Callable[..., Any]],
    settings: Hashable,
    operands: tuple[Any, ...],
    results: Shapes,
    *,
    longest: tuple[int | None, ...],
    longest_results: tuple[int | None, ...],
) -> tuple[jax.Array, ...]:
    """``make(settings, results)(*operands)``: arrays of the shapes ``results``.

    What ``make`` returns calls one kernel with all arrays of ``operands`` in their order, and gives
    out what it does. ``make`` is a function of a module; ``settings`` say what the kernel depends
    on beside the shapes and dtypes of its arrays. It is lowered for operands (each a tree of
    arrays) and results whose first axes are ``longest`` and ``longest_results``; None: as they are.
    """
    flat, tree = jax.tree.flatten(operands)
    lengths = [n for x, n in zip(operands, longest, strict=True) for _ in jax.tree.leaves(x)]
    shapes = _of_length(flat, lengths), _of_length(results, longest_results)
    return tuple(lowered_once(_Kernel(make, settings, tree), flat, results, shapes))


def sizes(*numbers: int) -> jax.Array:
    """What a kernel reads of the sizes of its arrays, int32, and -1 behind them.

    Without an element that differs XLA would not keep them but make them anew in every step.
    """
    return jnp.array([*numbers, -1], jnp.int32)


def lowered_once(
    kernel: _Kernel, flat: Sequence[Any], results: Shapes, shapes: tuple[Shapes, Shapes]
) -> list[jax.Array]:
    """Calls the kernel lowered for ``shapes`` of operands and results."""
    return _call.bind(*flat, kernel=kernel, results=results, shapes=shapes)


def lowered_by_itself(
    kernel: _Kernel, flat: Sequence[Any], results: Shapes, shapes: tuple[Shapes, Shapes]
) -> list[jax.Array]:
    """The same with the shapes that the arrays have, as the interpreter needs it."""
    return kernel.run(results, *flat)


def _of_length(arrays: Sequence[Any], lengths: Sequence[int | None]) -> Shapes:
    return tuple(
        jax.ShapeDtypeStruct(x.shape if n is None else (n, *x.shape[1:]), x.dtype)
        for x, n in zip(arrays, lengths, strict=True)
    )


_call = Primitive("call_shared")
_call.multiple_results = True


@_call.def_abstract_eval
def _shapes_of_results(*flat, kernel: _Kernel, results: Shapes, shapes):
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in results]


@_call.def_impl
def _call_now(*flat, **how):
    """Where functions run step by step, as under ``jax.disable_jit`` or in search of a NaN."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_call.bind, **how))(*flat)


def _lower(context, *flat, kernel: _Kernel, results: Shapes, shapes):
    types = [ir.RankedTensorType.get(x.shape, mlir.dtype_to_ir_type(x.dtype)) for x in results]
    lowering = Lowering(kernel, *shapes)
    if (attributes := _kept.get(lowering)) is None:
        attributes = lower(lowering)
        keep(lowering, attributes)
    parsed = {name: ir.Attribute.parse(text) for name, text in attributes.items()}
    call = ir.Operation.create("stablehlo.custom_call", types, flat, parsed)
    return list(call.results)


@dataclass(frozen=True)
class Lowering:
    """A kernel for arrays of certain shapes."""

    kernel: _Kernel
    operands: Shapes
    results: Shapes

    def as_sent(self) -> tuple[Any, ...]:
        """For another process: structures of trees cannot be pickled, trees can."""
        operands = jax.tree.unflatten(self.kernel.tree, self.operands)
        return self.kernel.make, self.kernel.settings, operands, self.results

    @classmethod
    def sent(cls, parts: tuple[Any, ...]) -> "Lowering":
        """What ``as_sent`` gave."""
        make, settings, operands, results = parts
        flat, tree = jax.tree.flatten(operands)
        return cls(_Kernel(make, settings, tree), tuple(flat), results)


def lowering_of(equation: Any) -> Lowering | None:
    """What an equation of a traced program calls, if that is a shared kernel."""
    if equation.primitive is not _call:
        return None
    return Lowering(equation.params["kernel"], *equation.params["shapes"])


# Attributes of calls of lowered kernels, the code one of them; the oldest first.
_kept: dict[Lowering, dict[str, str]] = {}


def is_lowered(lowering: Lowering) -> bool:
    return lowering in _kept


def keep(lowering: Lowering, attributes: dict[str, str]) -> None:
    """For all programs that will call the kernel."""
    _kept[lowering] = attributes
    while len(_kept) > MOST_KEPT:
        _kept.pop(next(iter(_kept)), None)


def lower(lowering: Lowering) -> dict[str, str]:
    """Attributes of the call of a kernel; its code is one of them."""
    kernel = lowering.kernel
    run = jax.jit(functools.partial(kernel.run, lowering.results))
    traced = run.trace(*lowering.operands)
    module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    assert module is not None
    [function] = module.body.operations
    call, *others, end = function.entry_block.operations
    passed_on = list(call.operands), list(end.operands)
    arrays = list(function.arguments), list(call.results)
    if call.name != "stablehlo.custom_call" or others or passed_on != arrays:
        raise AssertionError(
            f"{kernel.make} must call one kernel and do nothing else, got {module}"
        )
    return {name: str(call.attributes[name]) for name in call.attributes}


def _batch(flat, axes, *, kernel: _Kernel, results: Shapes, shapes):
    outs = jax.vmap(functools.partial(kernel.run, results), in_axes=axes)(*flat)
    return outs, [0] * len(outs)


def _no_derivative(primals, tangents, *, kernel: _Kernel, **how):
    del primals, tangents, how
    raise NotImplementedError(
        f"{kernel.make.__module__.rpartition('.')[2]} is a kernel, and kernels have no derivative. "
        "backend='reference' has one wherever the op does"
    )


mlir.register_lowering(_call, _lower, platform="cuda")
batching.primitive_batchers[_call] = _batch
ad.primitive_jvps[_call] = _no_derivative

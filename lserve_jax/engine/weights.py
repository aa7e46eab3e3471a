"""Parameters on their way into an engine: as ``convert.load`` gives them, and as it runs them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from convert.json_values import shortened
from lserve_jax.engine.calls import places_of
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.heads import HeadPartition, permute_heads
from lserve_jax.model.params import Params, is_quantised
from lserve_jax.model.quantise import (
    pack_params,
    quantise_params,
    unpack_params,
    w8a8_twins,
    with_twins,
)
from pallas_kernels.api import W8A8Kind, Weight, WeightKind


class EngineParams(NamedTuple):
    """What an engine runs: one model three times, sharing all arrays that are the same.

    With ``prefill_dtype`` prefill's projections are ``W8A8Weight``s, or codes that decode has too.
    With ``draft_weights`` exact mode drafts by quantised matrices, else by those of decode.
    """

    decode: Params
    prefill: Params
    draft: Params


@dataclass(kw_only=True, eq=False)
class Intake:
    """Turns parameters as loaded into those that an engine runs, the first ones and later ones.

    The result shares every array that need not change: those of ``dtype`` whose heads stay where
    they are. The others are copies: heads put in order, a tied model's output projection on a CPU,
    matrices that are quantised, or packed for kernels, and those of prefill and of drafts.
    """

    config: ModelConfig
    partition: HeadPartition
    dtype: Any  # of the arithmetic
    weights: WeightKind | None  # what matrices are quantised to
    weight_group: int
    packed: bool  # whether quantised matrices go into the order of the kernels
    prefill_dtype: W8A8Kind | None = None  # of prefill's products
    draft_weights: WeightKind | None = None  # what matrices of floats are quantised to for drafts
    # Shape, dtype and sharding of each leaf that came first, by path.
    _first: dict[str, jax.ShapeDtypeStruct] = field(init=False, default_factory=dict)
    # Packed matrices, by path, whose zero points take words of their own.
    _in_words: set[str] = field(init=False, default_factory=set)

    def expected(self, params: Params) -> EngineParams:
        """What ``first`` will make of parameters of which only the shapes are known.

        ``params`` are bound to no device, and 4-bit ones such as ``quantize_weight`` makes.
        """
        return self._finished(jax.eval_shape(self._prepare, params))

    def first(
        self, make: Callable[[], Params], expected: EngineParams | None = None
    ) -> EngineParams:
        """The parameters that the engine begins with; ``check`` compares later ones with them.

        Nobody here holds what ``make`` returns: a matrix that is packed is freed at once, unless
        the caller has it. Raises ``ValueError`` where they are not what was ``expected``.
        """
        made = self._finished(self._prepare(self._remembered(unpack_params(make()))))
        if expected is not None:
            _check_expected(expected, made)
        return made

    def later(self, params: Params) -> EngineParams:
        """Others in their place, checked before; each on the devices of the one before it."""

        def place(path: Any, x: Any) -> Any:
            sharding = self._first[jax.tree_util.keystr(path)].sharding
            x = _on_auto_axes(jnp.asarray(x))
            same = sharding is None or x.sharding == sharding
            return x if same else jax.device_put(x, sharding)

        return self._finished(self._prepare(jax.tree.map_with_path(place, params)))

    def check(self, params: Params) -> None:
        """Raises ``ValueError`` naming every leaf in which ``params`` differ from the first ones.

        A dtype may be that of the first ones or that of the arithmetic.
        """
        if not isinstance(params, dict):
            raise ValueError(
                f"params must be the nested dict that convert.load returns, got a "
                f"{type(params).__name__}"
            )
        found = _leaves(params)
        wrong = []
        for name in sorted(self._first.keys() | found.keys()):
            wanted, leaf = self._first.get(name), found.get(name)
            if wanted is None:
                wrong.append(f"{name} is not of the model")
            elif name not in found:
                wrong.append(f"{name} is missing")
            elif not isinstance(leaf, jax.Array | np.ndarray):
                wrong.append(f"{name} is no array but {type(leaf).__name__}")
            elif isinstance(leaf, jax.Array) and leaf.is_deleted():
                wrong.append(f"{name} was donated or deleted")
            else:
                dtypes = {jnp.dtype(wanted.dtype)}
                if jnp.issubdtype(wanted.dtype, jnp.floating) and not _is_code(name):
                    dtypes.add(jnp.dtype(self.dtype))
                if leaf.shape != wanted.shape or leaf.dtype not in dtypes:
                    expected = " or ".join(sorted(dtype.name for dtype in dtypes))
                    wrong.append(
                        f"{name} is {leaf.dtype} {leaf.shape}, expected {expected} {wanted.shape}"
                    )
        if wrong:
            raise ValueError(
                f"params differ from those that the engine began with in {len(wrong)} of "
                f"{len(self._first)} leaves: {'; '.join(wrong)}"
            )

    def _remembered(self, params: Params) -> Params:
        params = jax.tree.map(_on_auto_axes, params)
        self._first = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
            for name, x in _leaves(params).items()
        }
        return params

    def _prepare(self, params: Params) -> Params:
        """In dicts of its own."""
        params = jax.tree.map(self._array, params, is_leaf=is_quantised)
        head: Params = {}
        if self.config.tie_word_embeddings and jax.default_backend() == "cpu":
            # XLA's CPU matrix-vector product is five times slower on a transposed matrix, and the
            # output projection is a fifth of a small model's weights.
            head = {"lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}
        # Before heads move, so that a model's codes do not depend on how it is attended. The copy
        # apart, so that a tied model's table is the same everywhere.
        if self.weights is not None:
            params, head = (
                quantise_params(tree, self.weights, group=self.weight_group)
                for tree in (params, head)
            )
        return permute_heads(self.config, params | head, self.partition)

    def _array(self, x: Any) -> Any:
        """A leaf on a device. Codes, scales and zero points keep their types."""
        dtype = None if is_quantised(x) else self.dtype
        return jax.tree.map(lambda array: jnp.asarray(array, dtype), x)

    def _finished(self, params: Params) -> EngineParams:
        """From the dicts that ``_prepare`` made, which nobody else holds."""
        # Before matrices are packed, which frees them.
        twins = {} if self.prefill_dtype is None else w8a8_twins(params, self.prefill_dtype)
        draft = params
        if self.draft_weights is not None:
            # A table is there already, and a draft reads one row of it.
            table = {key: params[key] for key in params if key == "embed_tokens"}
            rest = {key: params[key] for key in params if key not in table}
            draft = table | quantise_params(rest, self.draft_weights, group=self.weight_group)
        if self.packed:
            for tree in (params, draft):  # one of them has codes, if any
                pack_params(tree, self._in_words)
        return EngineParams(params, with_twins(params, twins), draft)


def _on_auto_axes(x: Any) -> Any:
    """``x`` on the same devices, cut in the same way, on a mesh of Auto axes.

    The engine's programs do not say how what they compute is cut, as Explicit axes want it.
    """
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.mesh.are_all_axes_explicit:
        return x
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return jax.device_put(x, NamedSharding(mesh, sharding.spec))


def _check_expected(expected: EngineParams, made: EngineParams) -> None:
    """Raises ``ValueError`` naming what is not as expected: programs were made for that."""
    wrong: dict[str, str] = {}
    for one, other in zip(expected, made, strict=True):
        wanted, found = _described(one), _described(other)
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                wrong[name] = f"{name} is {found.get(name)}, not {wanted.get(name)}"
    if jax.tree.structure(expected) != jax.tree.structure(made):
        wrong.setdefault("", "matrices are of other kinds")
    if wrong:
        said = "; ".join(shortened([*wrong.values()]))
        raise ValueError(f"params differ from those expected in {len(wrong)} leaves: {said}")


def _described(params: Params) -> dict[str, str]:
    leaves = _leaves(params)
    places = places_of([*leaves.values()])
    return {
        name: f"{leaf.dtype} {leaf.shape}{' weak' * leaf.weak_type} "
        f"{'bound to' if bound else 'on'} {place}"
        for (name, leaf), (place, bound) in zip(leaves.items(), places, strict=True)
    }


def _leaves(params: Params) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(params)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _is_code(name: str) -> bool:
    """Whether a leaf is a part of a quantised matrix."""
    return name.rpartition(".")[2] in Weight._fields

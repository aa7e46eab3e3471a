"""Parameters whose matrices are quantised: projections of all layers, output layer, embedding.

An embedding table that is the output layer too stays as it is, and so do norms and biases, which
are small.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from lserve_jax.checks import check_choice, check_integer
from lserve_jax.model.params import Params, is_quantised
from pallas_kernels.api import (
    W8A8_KINDS,
    WEIGHT_GROUPS,
    WEIGHT_KINDS,
    Backend,
    PackedWeight,
    W8A8Kind,
    W8A8Weight,
    Weight,
    WeightKind,
    cannot_pack,
    has_fp8,
    has_w8a8_codes,
    pack_weight,
    packed_shape,
    quantize_weight,
    unpack_weight,
    w8a8_weight,
)

# How matrices are held: rounded to a kind, or as the codes of a quantised checkpoint.
WeightForm = WeightKind | Literal["checkpoint"]
# Of the codes of each kind.
CODE_DTYPES: dict[WeightKind, str] = {"int8": "int8", "int4": "uint4", "fp8": "float8_e4m3fn"}
TABLE, OUTPUT_LAYER = "embed_tokens.embedding", "lm_head.kernel"


def check_weights(weights: object, group: int) -> None:
    """Raises ``ValueError`` for a form of weights, or a group, that there is none of.

    And what ``require_fp8`` raises.
    """
    if weights is not None:
        check_choice("weights", weights, (*WEIGHT_KINDS, "checkpoint"))
    if check_integer("weight_group", group) not in WEIGHT_GROUPS:
        raise ValueError(f"weight_group={group} must be one of {WEIGHT_GROUPS}")
    if weights == "fp8":
        require_fp8("weights='fp8'")


def check_prefill_dtype(prefill_dtype: object) -> None:
    """Raises ``ValueError`` for a type of prefill's products that there is none of.

    And what ``require_fp8`` raises.
    """
    if prefill_dtype is not None:
        check_choice("prefill_dtype", prefill_dtype, W8A8_KINDS)
    if prefill_dtype == "fp8":
        require_fp8("prefill_dtype='fp8'")


def require_fp8(what: str) -> None:
    """Raises ``NotImplementedError`` on a GPU that has no fp8; ``what`` begins the message."""
    device = jax.devices()[0]
    if not has_fp8(device):
        raise NotImplementedError(
            f"{what} needs a GPU with fp8, of compute capability 8.9 or more; "
            f"{device.device_kind} has {device.compute_capability}"
        )


def quantisable(leaves: Collection[str]) -> list[str]:
    """Which of a model's leaves may be codes: matrices, and a table that is no output layer too.

    ``leaves`` are all dotted paths, such as ``layers.0.mlp.down_proj.kernel``.
    """
    matrices = [leaf for leaf in leaves if leaf.endswith(".kernel")]
    return [*matrices, TABLE] if TABLE in leaves and OUTPUT_LAYER in leaves else matrices


def kinds_of(leaves: Collection[str], kind: WeightKind) -> dict[str, WeightKind]:
    """What the leaves of a model become where matrices become ``kind``; others stay as they are.

    ``leaves`` are those of ``quantisable``. Where the others get 4 bits the output layer gets 8; a
    table's rows are read and not multiplied, so that fp8 would gain it nothing over int8.
    """
    # An output layer of 4 bits cost SmolLM2 8 % of perplexity, one of 8 bits nothing.
    own: dict[str, WeightKind] = {
        OUTPUT_LAYER: "int8" if kind == "int4" else kind,
        TABLE: "int8" if kind == "fp8" else kind,
    }
    return {leaf: own.get(leaf, kind) for leaf in quantisable(leaves)}


def axis_of(leaf: str) -> Literal[0, 1]:
    """Along which axis numbers of a leaf share a scale: a kernel's inputs, a token's channels."""
    return 1 if leaf == TABLE else 0


def check_groups(shapes: Mapping[str, tuple[int, ...]], kind: WeightKind, group: int) -> None:
    """Raises ``ValueError`` naming a leaf (by dotted path) whose inputs ``group`` does not divide.

    ``shapes`` are those of all leaves. For callers to know before they read or round anything.
    """
    for leaf, to in kinds_of(shapes, kind).items():
        inputs = shapes[leaf][axis_of(leaf)]
        if to == "int4" and inputs % group:
            raise ValueError(
                f"{leaf} has {inputs} inputs, which weight_group={group} does not divide"
            )


def expect_kinds(
    leaves: Mapping[str, Any], kind: WeightKind, group: int, *, where: str = ""
) -> None:
    """Raises ``ValueError`` unless leaves that are quantised already are what ``kind`` makes.

    ``leaves`` are all, by dotted path. ``where`` goes before the message.
    """
    for leaf, wanted in kinds_of(leaves, kind).items():
        if not isinstance(leaves[leaf], Weight):
            continue
        (codes, scale, zero), axis = leaves[leaf], axis_of(leaf)
        inputs, groups = codes.shape[axis], scale.shape[axis]
        right = inputs / group if wanted == "int4" else 1
        if np.dtype(codes.dtype) != np.dtype(CODE_DTYPES[wanted]) or (
            (groups, zero is not None) != (right, wanted == "int4")
        ):
            raise ValueError(
                f"{where}{leaf} is quantised already, as {np.dtype(codes.dtype)} with "
                f"{inputs // groups} inputs to a scale and {'no ' if zero is None else ''}zero "
                f"points; weights={kind!r} in groups of {group} would round it again: keep it by "
                "weights=None, or begin with floats"
            )


def code_types(params: Params) -> str:
    """Types of the codes in a tree, such as "int8, uint4"; "none" where all of it is floats."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantised)
    found = {str(np.dtype(x.codes.dtype)) for x in leaves if isinstance(x, Weight)}
    found |= {x.codes for x in leaves if isinstance(x, PackedWeight)}
    return ", ".join(sorted(found)) or "none"


def quantise_params(params: Params, kind: WeightKind, *, group: int = 32) -> Params:
    """The same tree with a ``Weight`` for each leaf of ``kinds_of``.

    Those that are of the kind already stay. ``group``: inputs that share a scale and a zero point
    in 4 bits. The tree given is left as it is; a matrix of it is freed as soon as its owner drops
    it. Raises ``ValueError`` for a group that does not divide a matrix's inputs, and for a matrix
    that is quantised in another way.
    """
    leaves = {
        ".".join(str(key.key) for key in path): value
        for path, value in jax.tree.flatten_with_path(params, is_leaf=is_quantised)[0]
    }
    expect_kinds(leaves, kind, group)
    check_groups({leaf: value.shape for leaf, value in leaves.items()}, kind, group)
    kinds = kinds_of(leaves, kind)
    del leaves  # or it would hold what its owner drops

    def visit(tree: Any, path: list[str]) -> Any:
        if isinstance(tree, dict):
            return {key: visit(value, [*path, str(key)]) for key, value in tree.items()}
        leaf = ".".join(path)
        if leaf not in kinds or isinstance(tree, Weight):
            return tree
        how = {"kind": kinds[leaf], "group": group, "axis": axis_of(leaf)}
        return _ready(partial(quantize_weight, **how), tree)

    return visit(params, [])


def pack_params(params: Params, in_words: set[str], path: tuple[str, ...] = ()) -> None:
    """Puts quantised matrices into the order of the kernels, as far as that goes, in place.

    So, one at a time is there twice, unless somebody else holds them. A ``Weight`` stays one, and
    XLA multiplies it, where ``cannot_pack`` has a reason or it lies on several devices.

    in_words: matrices, by dotted path, whose zero points are not to lie in the bytes of scales even
        if they fit. Those that do not fit are added: other numbers in their place are packed alike.
    path: where in the parameters the tree is.

    Of matrices of which only shapes are there (``jax.ShapeDtypeStruct``) zero points of 4 bits fit.
    Raises ``ValueError`` for codes that are NaN, with the path.
    """
    for key in params:
        leaf = (*path, str(key))
        if isinstance(params[key], dict):
            pack_params(params[key], in_words, leaf)
        elif isinstance(params[key], Weight) and _packs(params[key]):
            name, paired = ".".join(leaf), "gate_up_proj" in leaf
            if _is_shape(params[key]):
                params[key] = packed_shape(params[key], paired=paired)
                continue
            pack = partial(pack_weight, paired=paired, in_words=name in in_words)
            try:
                params[key] = _ready(pack, params[key])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if params[key].zeros == "word":
                in_words.add(name)


def _packs(weight: Weight) -> bool:
    on_one_device = _is_shape(weight) or len(weight.codes.devices()) == 1
    return on_one_device and cannot_pack(weight) is None


def _is_shape(leaf: Any) -> bool:
    return isinstance(jax.tree.leaves(leaf)[0], jax.ShapeDtypeStruct)


def _ready(make: Callable[[Any], Any], leaf: Any) -> Any:
    """``make(leaf)``, ready: copies in flight would all be held at once. Of a shape, its shape."""
    return jax.eval_shape(make, leaf) if _is_shape(leaf) else jax.block_until_ready(make(leaf))


def unpack_params(params: Params) -> Params:
    """The same tree with a ``Weight`` for each packed matrix. The tree given is left as it is."""
    return jax.tree.map(
        lambda x: unpack_weight(x) if isinstance(x, PackedWeight) else x,
        params,
        is_leaf=is_quantised,
    )


# Where in the parameters, as JAX has paths.
Path = tuple[Any, ...]


def w8a8_twins(params: Params, kind: W8A8Kind) -> dict[Path, W8A8Weight]:
    """Projections of all layers for products of 8 bits on both sides, by their paths.

    Those that have such codes are left out: see ``with_w8a8``. So is the output layer, with which
    prefill multiplies one row of a prompt.
    """
    twins = {}
    for path, leaf in jax.tree.flatten_with_path(params["layers"], is_leaf=is_quantised)[0]:
        if path[-1].key == "kernel" and not has_w8a8_codes(leaf, kind):
            twins[path] = _ready(partial(w8a8_weight, kind=kind), leaf)
    return twins


def with_twins(params: Params, twins: Mapping[Path, W8A8Weight]) -> Params:
    """The same tree with the twins in place of their matrices; it shares all else."""
    if not twins:
        return params
    layers = jax.tree.map_with_path(
        lambda path, leaf: twins.get(path, leaf), params["layers"], is_leaf=is_quantised
    )
    return params | {"layers": layers}


def with_w8a8(params: Params, kind: W8A8Kind | None, backend: Backend) -> Params:
    """What ``with_twins`` returned, all projections ready; for use inside a traced function.

    Codes that decode reads too are written in rows of an output channel, once a call. With None
    the tree stays as it is.
    """
    if kind is None:
        return params

    def ready(path: Path, leaf: Any) -> Any:
        if path[-1].key != "kernel" or isinstance(leaf, W8A8Weight):
            return leaf
        return w8a8_weight(leaf, kind=kind, backend=backend)

    layers = jax.tree.map_with_path(ready, params["layers"], is_leaf=is_quantised)
    return params | {"layers": layers}

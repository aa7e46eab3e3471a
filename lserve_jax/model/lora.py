"""LoRA adapters (arXiv 2106.09685) as a tree of their own, to be trained beside frozen parameters.

    adapter = init_adapter(config, rank=8)
    gradient = jax.grad(lambda adapter: loss(merge(params, adapter, alpha=16.0)))(adapter)

``convert.save_adapter`` writes one in PEFT's format.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from lserve_jax.checks import check_integer
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params, abstract_params, is_quantised

# Dotted path of a kernel [I, O] to its "a" [I, r] and "b" [r, O].
Adapter = dict[str, dict[str, Array]]

_MODULES = {
    "qkv_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_up_proj": "mlp",
    "down_proj": "mlp",
}


def init_adapter(
    config: ModelConfig,
    *,
    rank: int,
    targets: Sequence[str] = ("qkv_proj", "o_proj"),
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Adapter:
    """An adapter that changes nothing yet: ``a`` is random, ``b`` zero.

    ``targets`` are of "qkv_proj", "o_proj", "gate_up_proj", "down_proj", in every layer.

    Raises ``ValueError`` for another target and a rank below 1.
    """
    check_integer("rank", rank, 1)
    if isinstance(targets, str) or not targets:
        raise ValueError(f"{targets=} must be a sequence of at least one of {', '.join(_MODULES)}")
    for target in targets:
        if target not in _MODULES:
            raise ValueError(f"target {target!r} is unknown; known: {', '.join(_MODULES)}")
    layers = abstract_params(config)["layers"]
    adapter = {}
    key = jax.random.key(seed)
    for i, layer in layers.items():
        for target in targets:
            inputs, outputs = layer[_MODULES[target]][target]["kernel"].shape
            key, own = jax.random.split(key)
            a = jax.random.normal(own, (inputs, rank), jnp.float32) * inputs**-0.5
            adapter[f"layers.{i}.{_MODULES[target]}.{target}.kernel"] = {
                "a": a.astype(dtype),
                "b": jnp.zeros((rank, outputs), dtype),
            }
    return adapter


def merge(params: Params, adapter: Adapter, *, alpha: float) -> Params:
    """``params`` with ``alpha / rank * a @ b`` added to the kernels of ``adapter``, in float32.

    The result has the kernels' dtypes. Pure: derivatives by ``adapter`` alone keep none of
    ``params``. Raises ``ValueError`` for a path that ``params`` does not have, matrices that do not
    fit the kernel there, and a quantised kernel.
    """
    merged = jax.tree.map(lambda leaf: leaf, params)  # new dicts, the same arrays
    for path, matrices in adapter.items():
        *parents, last = path.split(".")
        node = _node(merged, parents)
        kernel = _kernel(path, node.get(last), matrices)
        a, b = (matrices[name].astype(jnp.float32) for name in ("a", "b"))
        change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * (alpha / a.shape[1])
        node[last] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return merged


def _node(tree: Any, names: Sequence[str]) -> dict[str, Any]:
    """The dict at a path; empty where there is none."""
    for name in names:
        tree = tree.get(int(name) if name.isdigit() else name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _kernel(path: str, kernel: Any, matrices: Mapping[str, Array]) -> Array:
    """The kernel at a path, if the matrices fit it."""
    if kernel is None or isinstance(kernel, dict):
        raise ValueError(f"adapter has {path!r}, which params does not have")
    if is_quantised(kernel):
        raise ValueError(f"{path} is quantised: an adapter is merged into floats")
    a, b = (jnp.shape(matrices[name]) if name in matrices else None for name in ("a", "b"))
    rank = a[-1] if a else None
    if kernel.ndim != 2 or (a, b) != ((kernel.shape[0], rank), (rank, kernel.shape[1])):
        raise ValueError(f"{path}: a and b have shapes {a} and {b}, the kernel {kernel.shape}")
    return kernel

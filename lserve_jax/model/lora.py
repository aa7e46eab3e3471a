"""LoRA adapters (arXiv 2106.09685) as a tree of their own, to be trained beside frozen parameters.

    adapter = init_adapter(config, rank=8)
    gradient = jax.grad(lambda adapter: loss(merge(params, adapter, alpha=16.0)))(adapter)

``convert.save_adapter`` writes one in PEFT's format.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params, abstract_params

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
    if rank < 1:
        raise ValueError(f"{rank=} must be at least 1")
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
    ``params``. Raises ``ValueError`` for a path that ``params`` does not have.
    """
    merged = jax.tree.map(lambda leaf: leaf, params)  # new dicts, the same arrays
    for path, matrices in adapter.items():
        *parents, last = path.split(".")
        node = merged
        for name in parents:
            node = node.get(int(name) if name.isdigit() else name, {})
        if last not in node:
            raise ValueError(f"adapter has {path!r}, which params does not have")
        a, b = (matrices[name].astype(jnp.float32) for name in ("a", "b"))
        change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * (alpha / a.shape[1])
        node[last] = (node[last].astype(jnp.float32) + change).astype(node[last].dtype)
    return merged

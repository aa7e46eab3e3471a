"""What arrays take on a device, and what their numbers are, as a digest."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from lserve_jax.engine.weights import EngineParams
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params, is_quantised
from lserve_jax.model.quantise import unpack_params


def tree_bytes(params: Params | EngineParams) -> int:
    """What they take on a device, each array once."""
    return sum({id(x): device_bytes(x) for x in jax.tree.leaves(params)}.values())


def step_bytes(params: Params) -> int:
    """Of all but a table that is no output layer: a step reads a row of it for each token."""
    table = {"embed_tokens"} if "lm_head" in params else set()
    return tree_bytes({key: params[key] for key in params.keys() - table})


def device_bytes(x: Array | jax.ShapeDtypeStruct) -> int:
    """What an array takes on a device, which has two numbers of 4 bits in a byte."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.size * jnp.iinfo(x.dtype).bits // 8
    return x.size * x.dtype.itemsize


def fingerprint(config: ModelConfig, params: Params) -> str:
    """A digest of architecture and weights: every number of every weight counts.

    Names, shapes and dtypes count too, and so does the order of heads. Whether matrices are packed
    does not.
    """
    digest = hashlib.sha256(repr(config).encode())
    paths, _ = jax.tree.flatten_with_path(jax.eval_shape(unpack_params, params))
    for path, leaf in paths:
        name = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}"
        digest.update(name.encode())
    leaves = jax.tree.leaves(params, is_leaf=is_quantised)
    for checksum in jax.tree.leaves(jax.device_get([_checksums(leaf) for leaf in leaves])):
        digest.update(checksum.tobytes())
    return digest.hexdigest()[:32]


@jax.jit
def _checksums(leaf: Any) -> list[UInt32[Array, " 2"]]:
    """Of each array of a leaf two sums of its bits, every number times an odd one of its place.

    Modulo 2^32. So one changed number changes both, and numbers that trade places do too. A sum
    runs where the array lies; nothing is fetched, and nothing of its size made but for what is
    packed, one after the other.
    """

    def checksum(x: Array) -> Array:
        if x.dtype == jnp.uint4:
            x = x.astype(jnp.uint8)
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).ravel()
        place = jax.lax.iota(jnp.uint32, bits.size)
        factors = [(place * jnp.uint32(m)) | jnp.uint32(1) for m in (2654435761, 2246822519)]
        return jnp.stack([jnp.sum(bits * factor, dtype=jnp.uint32) for factor in factors])

    return [checksum(x) for x in jax.tree.leaves(unpack_params({"": leaf}))]

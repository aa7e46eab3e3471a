"""The tree of parameters: its leaves and their shapes. The modules of ``llama.py`` hold the same.

It stands apart from them because a start need not import Flax: programs that are kept are not
traced again, and reading a checkpoint needs shapes alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lserve_jax.model.config import ModelConfig
from pallas_kernels import api

Attend = Callable[[int, Array, Array, Array, Any], tuple[Array, Any]]  # see ``llama.py``
Params = dict[str, Any]  # nested dict of arrays; leaves are listed in docs/architecture.md


def abstract_params(config: ModelConfig, dtype=jnp.float32) -> Params:
    """Parameters as ``jax.ShapeDtypeStruct`` leaves: the shapes a checkpoint must fill."""
    E, F, V, D = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    H, Hk = config.num_attention_heads, config.num_key_value_heads

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def linear(inputs: int, outputs: int, *, bias: bool = False) -> Params:
        leaves = {"kernel": array(inputs, outputs)}
        return leaves | {"bias": array(outputs)} if bias else leaves

    def norm(size: int) -> Params:
        return {"scale": array(size)}

    def layer() -> Params:
        attention = {
            "qkv_proj": linear(E, (H + 2 * Hk) * D, bias=config.attention_bias),
            "o_proj": linear(H * D, E, bias=config.attention_out_bias),
        }
        if config.qk_norm:
            attention |= {"q_norm": norm(D), "k_norm": norm(D)}
        return {
            "input_layernorm": norm(E),
            "self_attn": attention,
            "post_attention_layernorm": norm(E),
            "mlp": {
                "gate_up_proj": linear(E, 2 * F, bias=config.mlp_bias),
                "down_proj": linear(F, E, bias=config.mlp_bias),
            },
        }

    params = {
        "embed_tokens": {"embedding": array(V, E)},
        "layers": {i: layer() for i in range(config.num_hidden_layers)},
        "norm": norm(E),
    }
    return params if config.tie_word_embeddings else params | {"lm_head": linear(E, V)}


def is_quantised(leaf: Any) -> bool:
    """Whether a leaf is a quantised matrix, in any form."""
    return isinstance(leaf, api.Weight | api.PackedWeight | api.W8A8Weight)


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if is_quantised(leaf) else jnp.shape(leaf)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree.flatten_with_path(params, is_leaf=is_quantised)
    return {jax.tree_util.keystr(path): _shape(leaf) for path, leaf in leaves}


@functools.cache
def _shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return _shapes(abstract_params(config))


def check_params(config: ModelConfig, params: Params) -> None:
    """Raises ``ValueError`` unless ``params`` has the leaves and shapes of ``config``'s model.

    And for codes in a table that is the output layer too.
    """
    if config.tie_word_embeddings:  # an engine's may have a copy of the table for an output layer
        if is_quantised(params.get("embed_tokens", {}).get("embedding")):
            raise ValueError(
                "embed_tokens.embedding is quantised and, with tie_word_embeddings, the output "
                "layer too: it must be floats"
            )
        params = {name: leaves for name, leaves in params.items() if name != "lm_head"}
    wanted, found = _shapes_of(config), _shapes(params)
    wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"params do not fit the config in {len(wrong)} leaves, the first is {name}: "
            f"shape {found.get(name)}, expected {wanted.get(name)} (None: there is none)"
        )

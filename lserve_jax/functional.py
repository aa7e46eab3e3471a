"""The model as one pure function, for pipelines that want no engine."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lserve_jax.attention.attend import causal_attend
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params, bind


def logits(config: ModelConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Next-token logits (float32) at every position of full sequences, plain causal attention.

    ``params`` comes from ``convert.load`` or ``llama.init_params``. Pure: works under ``jit``
    (with ``config`` static), ``vmap`` and ``grad``. Memory holds scores T x T for one layer; for
    long prompts use ``LLM``, whose prefill does not.

    Raises ``ValueError`` if ``tokens`` is not a 2-D integer array, or T is more than the model's
    sliding window.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be an integer array [B, T], got {tokens.dtype} {tokens.shape}"
        )
    model = bind(config, params)
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    attend = causal_attend(config, positions)
    hidden, _ = model(tokens, attend, [None] * config.num_hidden_layers)
    return model.unembed(hidden)

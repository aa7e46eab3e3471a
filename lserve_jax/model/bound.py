"""The model with its parameters, for use inside a traced function.

Flax is imported here when the first function is traced, and not before: that takes longer than to
load a program that needs no tracing.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params

if TYPE_CHECKING:
    from flax import nnx

    from lserve_jax.model.llama import Llama


@functools.cache
def _graph(config: ModelConfig, tied: bool) -> "nnx.GraphDef":
    """The parameterless structure of the model, built once a config."""
    from flax import nnx

    from lserve_jax.model.llama import Llama

    config = dataclasses.replace(config, tie_word_embeddings=tied)
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))[0]


def bind(config: ModelConfig, params: Params) -> "Llama":
    """The module holding ``params``, for use inside a traced function.

    Binding inside the trace keeps NNX objects off the jit boundary, where passing them costs
    milliseconds a call. An engine may give a tied model an output projection of its own.
    """
    from flax import nnx

    return nnx.merge(_graph(config, config.tie_word_embeddings and "lm_head" not in params), params)

"""Long-context LLM inference in JAX: LServe's sparse attention and RelayAttention.

Names are imported when they are first used: who reads a checkpoint or calls an op does not load
the engine.
"""

from lserve_jax.lazy import lazy_names

__version__ = "0.1.0"

_MODULES = {
    "LLM": "lserve_jax.llm",
    "CompletionOutput": "lserve_jax.outputs",
    "ModelConfig": "lserve_jax.model.config",
    "Prefix": "lserve_jax.engine.prefix",
    "RequestOutput": "lserve_jax.outputs",
    "RopeConfig": "lserve_jax.model.config",
    "SamplingParams": "lserve_jax.sampling_params",
    "Score": "lserve_jax.engine.scoring",
    "SparsityConfig": "lserve_jax.attention.config",
    "StructuredOutputs": "lserve_jax.sampling_params",
    "hidden_states": "lserve_jax.functional",
    "logits": "lserve_jax.functional",
    "unembed": "lserve_jax.functional",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "ModelConfig",
    "Prefix",
    "RequestOutput",
    "RopeConfig",
    "SamplingParams",
    "Score",
    "SparsityConfig",
    "StructuredOutputs",
    "hidden_states",
    "logits",
    "unembed",
]


__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__

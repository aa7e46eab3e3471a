"""Long-context LLM inference in JAX: LServe's sparse attention and RelayAttention."""

from lserve_jax.config import ModelConfig, RopeConfig, SparsityConfig
from lserve_jax.functional import logits
from lserve_jax.llm import LLM
from lserve_jax.outputs import CompletionOutput, RequestOutput
from lserve_jax.prefix import Prefix
from lserve_jax.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "ModelConfig",
    "Prefix",
    "RequestOutput",
    "RopeConfig",
    "SamplingParams",
    "SparsityConfig",
    "logits",
]

"""A checkpoint read once, for all the settings that are compared on it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import convert
from lserve_jax.attention.cache import KVDtype
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.engine.options import resolve_dtype
from lserve_jax.llm import LLM
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params
from lserve_jax.model.quantise import WeightForm
from lserve_jax.tokenizer import Tokenizer
from pallas_kernels.api import Backend


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """How every setting's engine is built; ``engine.options.EngineOptions`` explains each."""

    dtype: str | None = None
    kv_dtype: KVDtype = "auto"
    weights: WeightForm | None = None
    weight_group: int = 32
    kv_cache_bytes: int | None = None
    max_num_seqs: int = 8
    prefill_chunk_size: int = 1024  # prompts of one haystack share whole chunks
    backend: Backend = "auto"
    compilation_cache: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer

    def __post_init__(self):
        eos = tuple(dict.fromkeys((*self.config.eos_token_ids, *self.tokenizer.eos_token_ids)))
        object.__setattr__(self, "config", dataclasses.replace(self.config, eos_token_ids=eos))

    def engine(
        self,
        sparsity: SparsityConfig | None,
        max_len: int,
        options: SharedOptions,
        **of_setting: Any,
    ) -> LLM:
        """An ``LLM`` with room for ``max_len`` tokens a sequence, of a setting's own options.

        Prompts of one haystack share its chunks, but never read it together: relay attends all of
        it, so a setting would seem better than it is for a request by itself.

        It always runs all slots: an answer does not depend on what else runs, and decode compiles
        for one number of slots instead of every power of two.
        """
        return LLM(
            (self.config, self.params),
            tokenizer=self.tokenizer,
            relay="never",
            deterministic=True,
            sparsity=sparsity,
            max_model_len=max_len,
            **of_setting,
            **dataclasses.asdict(options),
        )


def fit_context(config: ModelConfig, max_len: int, *, rope_extend: bool) -> ModelConfig:
    """A config in which ``max_len`` tokens fit.

    Raises ``ValueError`` for more tokens than the model's limit without ``rope_extend``, and what
    ``extend_rope`` raises.
    """
    limit = config.context_length
    if max_len > limit and not rope_extend:
        raise ValueError(
            f"the prompts and their answers take up to {max_len} tokens, the model's limit is "
            f"{limit}; --rope-extend stretches it"
        )
    return extend_rope(config, max_len) if max_len > limit else config


def read_params(
    source: convert.ModelSource, options: SharedOptions, *, progress: bool = False
) -> Params:
    """The weights of ``source``, as every setting's engine takes them."""
    _, params = convert.load(
        source,
        dtype=resolve_dtype(options.dtype),
        weights=options.weights,
        weight_group=options.weight_group,
        progress=progress,
    )
    return params


def extend_rope(config: ModelConfig, length: int) -> ModelConfig:
    """The same model with rotary embedding stretched by YaRN (arXiv 2309.00071) to ``length``.

    The factor is the least whole number that reaches it. The weights were not trained for it, so
    quality at any length may differ from the model's own.

    Raises ``NotImplementedError`` if the model's rotary embedding is stretched already.
    """
    if config.rope.rope_type != "default":
        raise NotImplementedError(
            f"the model's rotary embedding is stretched already (rope_type="
            f"{config.rope.rope_type!r}): extending it further is not supported"
        )
    limit = config.max_position_embeddings
    factor = -(-length // limit)
    rope = dataclasses.replace(
        config.rope,
        rope_type="yarn",
        factor=float(factor),
        original_max_position_embeddings=limit,
    )
    return dataclasses.replace(config, rope=rope, max_position_embeddings=factor * limit)

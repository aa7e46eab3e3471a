"""How an engine is built: what can be set, and what settings can be."""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from convert.head_shares import shipped_for
from convert.sources import ModelSource
from lserve_jax.attention.cache import DraftSource, KVDtype
from lserve_jax.attention.config import MOST_BURST_STEPS, SparsityConfig
from lserve_jax.checks import INT32_MAX, check_bool, check_choice, check_integer, is_real
from lserve_jax.engine.buckets import SMALLEST_CHUNK
from lserve_jax.engine.relay import RelayMode, check_mode
from lserve_jax.model.quantise import WeightForm, check_prefill_dtype, check_weights, require_fp8
from pallas_kernels.api import (
    KV_KINDS,
    WEIGHT_KINDS,
    Backend,
    W8A8Kind,
    WeightKind,
    resolve_backend,
)

Warmup = Literal["none", "auto", "full"]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_INTEGERS = (
    *("max_num_seqs", "max_prefixes", "prefill_chunk_size", "burst_steps", "max_draft_tokens"),
    "weight_group",
)
# A verification is one pass of at most 16 tokens a row.
MOST_DRAFTS = 15


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built. Names are vLLM's where it has them.

    dtype: "float32" or "bfloat16"; None takes bfloat16 on accelerators and float32 on the CPU.
    max_model_len: longest prompt + generation in tokens; None takes the model's own limit,
        ``ModelConfig.context_length``. Beyond it, a warning says so.
    max_num_seqs: requests that run at the same time.
    attention: "dense", or "lserve" with the settings in ``sparsity`` (None: ``SparsityConfig()``).
    kv_dtype: "auto" stores keys and values in ``dtype``; "int8" and "fp8" in 8 bits, with a scale
        per token and head; "int4" in 4, with a step and a lowest value for each half of a head.
    weights: None keeps them in ``dtype``, and codes of a checkpoint in Orbax format as they are.
        "int8" and "fp8" quantise the matrices at load, with a scale for each output, "int4" with a
        scale and a zero point for each group of inputs; the output layer gets "int8" then.
        "checkpoint" keeps the codes of a quantised checkpoint. They take a half or a quarter of the
        memory. On a Hopper GPU decode has a kernel for them: in bfloat16, on one device, where a
        matrix has a multiple of 128 inputs and of 64 outputs. Others XLA multiplies.
    weight_group: inputs of a group of "int4", of ``weights`` and ``draft_weights``: 32, 64 or 128.
        It must divide those of every matrix.
    prefill_dtype: type of both sides of prefill's products, "int8" or "fp8": each token's numbers
        are rounded as they come, with a scale of their own. None takes that of the weights. Codes
        of that type with a scale for each output are used as they are; all other matrices of the
        layers are held a second time, in 8 bits. Decode and the output layer stay as they are.
    kv_cache_bytes: memory for the retrieval pages; None takes ``memory_fraction`` of what the
        device has free, on a CPU 2 GiB, and at most 1 GiB for the windows of ``max_prefixes``.
    memory_fraction: share of the free device memory for the KV cache; the rest is for activations.
    enable_prefix_caching: whether prompts that were computed are remembered, as long as nobody
        wants their pages: a prompt that begins like one of them goes on from there.
    host_cache_bytes: host memory to which remembered prompts go when their pages are wanted, and
        from where they come back instead of being computed; 0: they are forgotten.
    max_prefixes: prompts, beside those that run, that there is room to remember, at most as many as
        ``kv_cache_bytes`` hold. Where heads stream, their prefill windows take memory of their own.
    relay: whether requests that begin alike read that together: "always", "never", or "auto", where
        it pays (see ``relay.py``).
    deterministic: a request's tokens do not depend on what else runs or ran; needs relay="never",
        and costs speed while few requests run. Prompts then share whole chunks of
        ``prefill_chunk_size`` tokens only, as they do with int8 storage. In exact mode how many
        tokens are verified together can change them, where two tokens tie but for rounding.
    exact: answers are those of dense attention, of its own sampling too: sparse steps, by
        ``sparsity``, only draft tokens, which dense attention verifies. Every head keeps all pages.
        Needs attention="lserve", and no relay="always".
    draft: where exact mode's drafts come from: "sparse", sparse steps, or "ngram", what followed
        the same two or three tokens before, in the prompt or the answer (prompt lookup).
    draft_weights: what sparse steps draft by: "int8", "int4" or "fp8", the matrices quantised at
        load, as ``weights`` would but for the embedding table, and held beside the floats; None:
        the weights themselves. A draft then reads less, and more are wrong; answers stay dense
        attention's with the floats.
    max_draft_tokens: most tokens that a request drafts before they are verified, in exact mode.
        Each drafts as many as pay by what was confirmed before; none where the context is short,
        or where bursts of dense steps took less time a token.
    prefill_chunk_size: prompt tokens run at once, a power of two; bounds activation memory.
    burst_steps: decode steps between two looks at the queue, at most 1,024; tokens are returned at
        that grain.
    backend: "mosaic", the Pallas kernels for Hopper GPUs; "reference", plain JAX, runs anywhere;
        "auto" takes the kernels on such a GPU.
    compilation_cache: directory in which compiled programs are kept, so that the next start neither
        traces nor compiles them; True: where the command lines keep theirs. What it holds is
        executed: a directory that others can write to is not used.
    warmup: what is compiled before the engine is there, several programs at the same time: "none",
        "auto", what the coming requests will surely need, or "full", for every number of slots,
        every length of a chunk and the usual ways to sample (see ``engine/warmup.py``). On a GPU
        "auto" goes on to what "full" has, while requests run.

    Raises ``ValueError`` or ``TypeError`` for a value that an option cannot have, ``ValueError``
    for settings that contradict each other, and ``NotImplementedError`` for kernels on a device
    that they are not for.
    """

    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 8
    attention: Literal["dense", "lserve"] = "dense"
    sparsity: SparsityConfig | None = None
    kv_dtype: KVDtype = "auto"
    weights: WeightForm | None = None
    weight_group: int = 32
    prefill_dtype: W8A8Kind | None = None
    kv_cache_bytes: int | None = None
    memory_fraction: float = 0.8
    enable_prefix_caching: bool = True
    host_cache_bytes: int = 0
    max_prefixes: int = 8
    relay: RelayMode = "auto"
    deterministic: bool = False
    exact: bool = False
    draft: DraftSource = "sparse"
    draft_weights: WeightKind | None = None
    max_draft_tokens: int = 7
    prefill_chunk_size: int = 8192
    burst_steps: int = 16
    backend: Backend = "auto"
    compilation_cache: bool | str | os.PathLike[str] = False
    warmup: Warmup = "none"

    def __post_init__(self):
        for name in (*_INTEGERS, "max_model_len", "kv_cache_bytes"):
            value = getattr(self, name)
            most = MOST_BURST_STEPS if name == "burst_steps" else INT32_MAX
            most = math.inf if name == "kv_cache_bytes" else most
            if value is not None or name in _INTEGERS:
                object.__setattr__(self, name, check_integer(name, value, most=most))
        for name in ("deterministic", "exact", "enable_prefix_caching"):
            check_bool(name, getattr(self, name))
        if not isinstance(self.sparsity, SparsityConfig | None):
            raise TypeError(f"sparsity={self.sparsity!r} must be a SparsityConfig or None")
        check_backend(self.backend)
        check_choice("attention", self.attention, ("dense", "lserve"))
        if self.attention == "dense" and self.sparsity is not None:
            raise ValueError(
                f"sparsity={self.sparsity} needs attention='lserve', got attention='dense'"
            )
        check_choice("kv_dtype", self.kv_dtype, ("auto", *KV_KINDS))
        if self.kv_dtype == "fp8":
            require_fp8("kv_dtype='fp8'")
        check_weights(self.weights, self.weight_group)
        check_prefill_dtype(self.prefill_dtype)
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs={self.max_num_seqs} must be at least 1")
        chunk = self.prefill_chunk_size
        if chunk < SMALLEST_CHUNK or chunk & (chunk - 1):
            raise ValueError(
                f"prefill_chunk_size={chunk} must be a power of two of at least {SMALLEST_CHUNK}"
            )
        check_mode(self.relay, self.deterministic)
        if self.exact and self.attention != "lserve":
            raise ValueError(
                f"exact=True needs attention='lserve', got {self.attention!r}: dense attention is "
                "exact already"
            )
        if self.exact and self.sparsity is not None and self.sparsity.prefill != "causal":
            raise ValueError(
                f"exact=True needs prefill='causal', got prefill={self.sparsity.prefill!r}: dense "
                "attention reads all of a prompt"
            )
        if self.exact and self.relay == "always":
            raise ValueError(
                "exact=True cannot have relay='always': verification reads each row by itself"
            )
        if not isinstance(self.compilation_cache, bool | str | os.PathLike):
            raise TypeError(
                f"compilation_cache={self.compilation_cache!r} must be True, False or a directory"
            )
        check_choice("warmup", self.warmup, get_args(Warmup))
        check_choice("draft", self.draft, get_args(DraftSource))
        if self.draft == "ngram" and not self.exact:
            raise ValueError("draft='ngram' needs exact=True: drafts are verified there")
        if self.draft == "ngram" and self.sparsity is not None:
            raise ValueError("draft='ngram' has no sparse steps, so that sparsity must be None")
        if self.draft_weights is not None:
            check_choice("draft_weights", self.draft_weights, WEIGHT_KINDS)
            if self.draft_weights == "fp8":
                require_fp8("draft_weights='fp8'")
            if not self.exact or self.draft != "sparse":
                raise ValueError(
                    f"draft_weights={self.draft_weights!r} needs exact=True and draft='sparse': "
                    "sparse steps draft by them"
                )
            if self.weights is not None:
                raise ValueError(
                    f"draft_weights={self.draft_weights!r} needs weights=None, got "
                    f"weights={self.weights!r}: they are quantised from floats, which verify"
                )
        if not 1 <= self.max_draft_tokens <= MOST_DRAFTS:
            raise ValueError(
                f"max_draft_tokens={self.max_draft_tokens} must lie in [1, {MOST_DRAFTS}]"
            )
        fraction = self.memory_fraction
        if not (is_real(fraction) and 0 < fraction <= 1):
            raise ValueError(f"memory_fraction={fraction!r} must lie in (0, 1]")
        if self.max_prefixes < 0:
            raise ValueError(f"max_prefixes={self.max_prefixes} must not be negative")
        bytes_on_host = check_integer("host_cache_bytes", self.host_cache_bytes, 0, most=math.inf)
        object.__setattr__(self, "host_cache_bytes", bytes_on_host)
        if bytes_on_host and not self.enable_prefix_caching:
            raise ValueError(
                f"host_cache_bytes={bytes_on_host} needs enable_prefix_caching=True: else nothing "
                "is remembered"
            )
        if self.burst_steps < 1:
            raise ValueError(f"burst_steps={self.burst_steps} must be at least 1")
        resolve_dtype(self.dtype)

    @property
    def resolved_sparsity(self) -> SparsityConfig | None:
        """The sparsity to run with, None for dense."""
        if self.attention == "dense":
            return None
        return SparsityConfig() if self.sparsity is None else self.sparsity


def resolve_dtype(dtype: str | None):
    """The JAX dtype of a name; None takes bfloat16 on accelerators and float32 on the CPU."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; known: {sorted(DTYPES)}")
    return DTYPES[dtype]


def check_backend(backend: Backend) -> None:
    """Raises ``NotImplementedError`` for kernels on a device that they are not for."""
    if resolve_backend(backend) == "mosaic" and resolve_backend("auto") != "mosaic":
        device = jax.devices()[0].device_kind
        raise NotImplementedError(f"{backend=} needs a Hopper GPU, the default device is {device}")


def with_shipped_shares(options: EngineOptions, source: ModelSource) -> EngineOptions:
    """What was measured best for a model, where it was: nobody has to know a pattern's name.

    Settings that name heads or a budget of tokens are left as they are, and so are checkpoints on
    disk, whatever their folder's name.
    """
    given = options.sparsity or SparsityConfig()
    says_which = given.pattern is not None or given.head_shares != "auto"
    says_how_many = given.token_budget is not None and not given.dense_heads
    if options.attention != "lserve" or options.draft == "ngram" or says_which or says_how_many:
        return options
    pattern = None if os.path.exists(source.name) else shipped_for(source.name)
    if pattern is None:
        return options
    sparsity = dataclasses.replace(given, pattern=pattern)
    return dataclasses.replace(options, sparsity=sparsity)

"""From a model and options to an engine: the one way in which engines are built."""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from convert.artefacts import cache_directory
from convert.head_shares import shipped_for
from convert.sources import ModelSource
from lserve_jax.attention.cache import CacheSpec, DraftSource, KVDtype, cache_bytes, make_spec
from lserve_jax.attention.config import MOST_BURST_STEPS, SparsityConfig
from lserve_jax.checks import INT32_MAX, check_bool, check_choice, check_integer, is_real
from lserve_jax.engine.buckets import SMALLEST_CHUNK
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.head_policy import head_policy
from lserve_jax.engine.program_files import ProgramFiles
from lserve_jax.engine.programs import Programs
from lserve_jax.engine.relay import RelayMode, check_mode
from lserve_jax.engine.runner import ModelRunner, tree_bytes
from lserve_jax.engine.warmup import Warmup, calls_beside, warmup_calls
from lserve_jax.engine.weights import Intake
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params, abstract_params, check_params, is_quantised
from lserve_jax.model.quantise import (
    WeightForm,
    check_groups,
    check_prefill_dtype,
    check_weights,
    require_fp8,
)
from pallas_kernels.api import (
    KV_KINDS,
    WEIGHT_KINDS,
    Backend,
    W8A8Kind,
    WeightKind,
    resolve_backend,
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_INTEGERS = (
    *("max_num_seqs", "max_prefixes", "prefill_chunk_size", "burst_steps", "max_draft_tokens"),
    "weight_group",
)
# A verification is one pass of at most 16 tokens a row.
MOST_DRAFTS = 15
# The CPU has no reported limit; more than this, and half of it for the windows of remembered
# prompts, is taken only when asked for.
CPU_CACHE_BYTES = 2 << 30


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


def build_engine(
    config: ModelConfig,
    params: Params | Callable[[], Params],
    options: EngineOptions,
    *,
    expected: Params | None = None,
    eos_token_ids: Sequence[int] = (),
    runner_class: type[ModelRunner] = ModelRunner,
    progress: bool = False,
) -> Engine:
    """An engine for ``params`` as ``convert.load`` returns them.

    Given a function that makes them, nobody but the engine holds them: quantised matrices are
    packed one by one, each freed before the next. It is called once options and ``config`` are
    found to agree.

    ``expected``: shapes and dtypes of what the function will return, bound to no device
    (``convert.expected_params``). Then the cache is planned by these, and programs are compiled
    while the function runs; Python looks for no cycles until they are. None: it runs first.

    ``eos_token_ids`` end a completion, beside the config's own. ``progress`` shows a bar on stderr
    while programs are compiled ahead of time.

    Raises ``ValueError`` where options and model contradict each other, no page of the cache fits
    or ``params`` are not as ``expected``, ``MemoryError`` where those do not fit, and
    ``NotImplementedError`` for what the kernels cannot run.
    """
    dtype, sparsity = resolve_dtype(options.dtype), options.resolved_sparsity
    kernels = resolve_backend(options.backend) == "mosaic"
    if kernels and dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"dtype={jnp.dtype(dtype).name!r} needs backend='reference' on a Hopper GPU: "
            "its kernels compute in bfloat16"
        )
    in_blocks = sparsity is not None and sparsity.prefill == "block_sparse"
    if kernels and in_blocks and config.head_dim not in (64, 128):
        raise NotImplementedError(
            f"prefill='block_sparse' needs heads of 64 or 128 channels in the kernels, got "
            f"head_dim={config.head_dim}: backend='reference' takes any"
        )
    max_model_len = _check_length(config, options.max_model_len)
    config = _choose_longrope(config, max_model_len)
    if options.draft == "ngram":
        sparsity = None  # there are no sparse steps
    if options.draft_weights is not None:
        leaves, _ = jax.tree.flatten_with_path(abstract_params(config))
        sizes = {".".join(str(key.key) for key in path): x.shape for path, x in leaves}
        check_groups(sizes, options.draft_weights, options.weight_group)
    policy = head_policy(config, sparsity, exact=options.exact)
    intake = Intake(
        config=config,
        partition=policy.partition,
        dtype=dtype,
        weights=None if options.weights == "checkpoint" else options.weights,
        weight_group=options.weight_group,
        packed=kernels,
        prefill_dtype=options.prefill_dtype,
        draft_weights=options.draft_weights,
    )
    alike = dataclasses.replace(options, warmup="none", compilation_cache=False)
    programs = Programs(_program_files(options), f"{config}\n{alike}")
    programs.preload()

    def make() -> Params:
        made = params() if callable(params) else params
        check_params(config, made)
        if config.tie_word_embeddings and "lm_head" in made:
            raise ValueError(
                "params have an lm_head, which a config with tie_word_embeddings=True has not"
            )
        coded = any(is_quantised(x) for x in jax.tree.leaves(made, is_leaf=is_quantised))
        if options.weights == "checkpoint" and not coded:
            raise ValueError(
                "weights='checkpoint' needs quantised weights; all of these are floats"
            )
        if options.draft_weights is not None and coded:
            raise ValueError(
                f"draft_weights={options.draft_weights!r} needs floats to quantise; these weights "
                "are codes already"
            )
        return made

    with programs.expect_compiling():
        if expected is None:
            shapes = prepared = intake.first(make)
        else:
            shapes, prepared = intake.expected(expected), None
        spec = make_spec(
            config,
            sparsity=sparsity,
            heads=policy.budgets,
            max_model_len=max_model_len,
            max_num_seqs=options.max_num_seqs,
            num_pages=1,
            max_prefixes=options.max_prefixes,
            kv_dtype=options.kv_dtype,
            exact=(options.max_draft_tokens, options.draft) if options.exact else None,
        )
        coming = tree_bytes(shapes) if prepared is None else 0
        num_pages = _plan_pages(config, spec, dtype, options, coming)
        spec = dataclasses.replace(spec, num_pages=num_pages)
        num_window_pages = _plan_windows(config, spec, dtype, options)
        spec = dataclasses.replace(spec, num_window_pages=num_window_pages)
        runner = runner_class(
            config,
            shapes,
            spec,
            dtype=dtype,
            prefill_dtype=options.prefill_dtype,
            backend=options.backend,
            chunk_size=options.prefill_chunk_size,
            programs=programs,
        )
        if prepared is not None:
            runner.begin(prepared)
        engine = Engine(
            runner,
            max_model_len=max_model_len,
            eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *eos_token_ids))),
            burst_steps=options.burst_steps,
            enable_prefix_caching=options.enable_prefix_caching,
            host_cache_bytes=options.host_cache_bytes,
            relay=options.relay,
            deterministic=options.deterministic,
            head_order=policy.partition.order,
            intake=intake,
        )
        calls = warmup_calls(engine, options.warmup)
        with programs.preparing(calls, progress=progress):
            read = intake.first(make, shapes) if prepared is None else None
        # After it: while programs are compiled that are kept, JAX keeps none of the small ones that
        # make caches.
        if read is not None:
            runner.begin(read)
    if options.warmup == "auto" and has_cores_beside():
        programs.prepare_beside(calls_beside(engine))
    return engine


def has_cores_beside() -> bool:
    """Whether compiling leaves requests what they run on: a device of its own, and some cores."""
    return jax.default_backend() != "cpu" and (os.cpu_count() or 1) >= 4


def _program_files(options: EngineOptions) -> ProgramFiles | None:
    """Where compiled programs are kept; None: nowhere.

    A policy of one's own is code that no name stands for: its programs are not kept.
    """
    kept, sparsity = options.compilation_cache, options.sparsity
    if kept is False or (sparsity is not None and sparsity.select is not None):
        return None
    return ProgramFiles(cache_directory() / "programs" if kept is True else kept)


def _check_length(config: ModelConfig, max_model_len: int | None) -> int:
    limit, window = config.context_length, config.sliding_window
    if max_model_len is None:
        return limit
    if max_model_len < 1:
        raise ValueError(f"{max_model_len=} must be a positive integer")
    if window is not None and max_model_len > window:
        raise ValueError(
            f"{max_model_len=} must not exceed the model's sliding_window={window}: "
            "sliding-window attention is not supported"
        )
    if max_model_len > limit:
        warnings.warn(
            f"{max_model_len=} exceeds {limit}, the tokens that the model's position embedding is "
            "made for; answers to longer prompts may be worse",
            stacklevel=3,
        )
    return max_model_len


def _choose_longrope(config: ModelConfig, max_model_len: int) -> ModelConfig:
    """LongRoPE with one set of frequencies for all sequences: the short one if all fit into it.

    Hugging Face takes a sequence's length. But then a sequence that outgrows the original length
    would need all of its cached keys again, and one prefix would not do for short and long ones.
    """
    rope = config.rope
    if rope.rope_type != "longrope":
        return config
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    chosen = rope.long_factor if max_model_len > original else rope.short_factor
    rope = dataclasses.replace(rope, long_factor=chosen, short_factor=chosen)
    return dataclasses.replace(config, rope=rope)


def _rounded(pages: int) -> int:
    """``pages`` without what is below its seven leading bits: less than a 64th."""
    low = max(pages.bit_length() - 7, 0)
    return pages >> low << low


def _plan_pages(
    config: ModelConfig, spec: CacheSpec, dtype, options: EngineOptions, coming: int
) -> int:
    """How many retrieval pages to allocate, given a spec with one page.

    ``coming``: bytes that parameters will take which are not there yet. Never more pages than can
    be used at once. Raises ``ValueError`` if not even one page fits, and ``MemoryError`` if those
    parameters do not.
    """
    sizes = cache_bytes(config, spec, dtype)
    page_bytes = sizes["retrieval"] + sizes["key_stats"]
    kv_cache_bytes, stats = options.kv_cache_bytes, None
    if kv_cache_bytes is None:
        stats = jax.local_devices()[0].memory_stats()  # None on the CPU
        kv_cache_bytes = CPU_CACHE_BYTES
        if stats is not None:
            free = stats["bytes_limit"] - stats["bytes_in_use"]
            if coming > free:
                raise MemoryError(
                    f"{coming} bytes for the weights, which weights='int8' or 'int4' makes fewer, "
                    f"where {free} are free"
                )
            free -= coming
            kv_cache_bytes = room_for_pages(sizes, free, options.memory_fraction)
    pages = kv_cache_bytes // max(page_bytes, 1)
    if stats is not None:
        # So that a start with a little less memory finds the programs of the one before.
        pages = _rounded(pages)
    if pages < 1:
        raise ValueError(f"{kv_cache_bytes=} holds no page: one takes {page_bytes} bytes")
    # Sequences of all slots, and prompts that none of them shares.
    return min((spec.max_num_seqs + options.max_prefixes) * spec.pages_per_sequence, pages)


def _plan_windows(config: ModelConfig, spec: CacheSpec, dtype, options: EngineOptions) -> int:
    """How many pages of prefill windows to allocate: of those in ``spec`` what can be used."""
    window = spec.prefill_window
    own = window.pages_with_behind  # of a prompt in prefill
    most = spec.num_pages + own  # a page that is remembered has one
    if options.kv_cache_bytes is None and jax.local_devices()[0].memory_stats() is None:
        page_bytes = cache_bytes(config, spec, dtype)["prefill_window"] // spec.num_window_pages
        # Beside the prompt in prefill at least one is remembered.
        room = max(CPU_CACHE_BYTES // 2 // max(page_bytes, 1), own + window.num_pages)
        most = min(most, room)
    return min(spec.num_window_pages, most)


def room_for_pages(sizes: Mapping[str, int], free: int, memory_fraction: float) -> int:
    """Bytes for retrieval pages where ``free`` are left beside the parameters.

    ``sizes``: ``cache_bytes`` of a spec with one page.
    """
    return max(int(memory_fraction * (free - sum(sizes.values()))), 0)


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

"""From a model and options to an engine: the one way in which engines are built."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from convert.artefacts import cache_directory
from lserve_jax.attention.cache import make_spec
from lserve_jax.cores import usable_cores
from lserve_jax.engine.array_bytes import tree_bytes
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.head_policy import head_policy
from lserve_jax.engine.options import EngineOptions, resolve_dtype
from lserve_jax.engine.page_plan import plan_pages, plan_windows
from lserve_jax.engine.program_files import ProgramFiles
from lserve_jax.engine.programs import Programs
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.warmup import calls_beside, warmup_calls
from lserve_jax.engine.weights import Intake
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params, abstract_params, check_params, is_quantised
from lserve_jax.model.quantise import check_groups
from pallas_kernels.api import resolve_backend


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
        num_pages = plan_pages(config, spec, dtype, options, coming)
        spec = dataclasses.replace(spec, num_pages=num_pages)
        num_window_pages = plan_windows(config, spec, dtype, options)
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
    return jax.default_backend() != "cpu" and usable_cores() >= 4


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

"""The wall between host and device: the only owner of parameters, caches and decode state.

The engine above it works with requests and NumPy arrays. The runner knows slots and pages, never
requests or text; it calls the jitted steps (``steps.py``) and returns their results unfetched, so
that the device works while the host goes on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.attention.attend import ChunkRows, PrefixGroups
from lserve_jax.attention.cache import (
    CacheSpec,
    LayerCache,
    cache_bytes,
    init_layer_cache,
    layer_cache_shapes,
)
from lserve_jax.engine.array_bytes import fingerprint, step_bytes, tree_bytes
from lserve_jax.engine.buckets import SMALLEST_CHUNK, bucket, buckets, row_counts
from lserve_jax.engine.calls import Call, places_of
from lserve_jax.engine.forced_steps import score_steps
from lserve_jax.engine.inputs import BurstInputs, Chunk, Start
from lserve_jax.engine.programs import Programs
from lserve_jax.engine.reads import selected_pages
from lserve_jax.engine.sampling import SamplingMode
from lserve_jax.engine.speculate import exact_burst
from lserve_jax.engine.state import (
    Burst,
    Caches,
    DecodeState,
    DecodeTables,
    ForcedSteps,
    Program,
    Sample,
    SlotStarts,
    StepScores,
)
from lserve_jax.engine.steps import (
    deactivate,
    decode_burst,
    insert,
    prefill_chunks,
    read_block,
    read_pages,
    write_block,
    write_pages,
)
from lserve_jax.engine.token_rules import TokenRules
from lserve_jax.engine.weights import EngineParams
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params, abstract_params
from pallas_kernels.api import MOST_SELECTED_PAGES, Backend, W8A8Kind, resolve_backend


class ModelRunner:
    """Runs jitted steps on parameters, caches and decode state that nobody else holds.

    Made of parameters, or of their shapes where they are bound to no device: its calls can be
    prepared by these. It runs once it has parameters and, with them, caches (``begin``).

    ``params`` have their heads in the order of ``spec``: retrieval first (``model/heads.py``).
    ``dtype`` is the compute dtype, ``prefill_dtype`` that of the products of prefill, for which
    ``params`` were made. ``chunk_size`` is the most tokens of a ``Chunk``. ``programs`` compile the
    steps, or have them in files; this runner's alone.

    Raises ``NotImplementedError`` for a token budget that the kernels cannot select.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: EngineParams,
        spec: CacheSpec,
        *,
        dtype,
        prefill_dtype: W8A8Kind | None = None,
        backend: Backend = "auto",
        chunk_size: int,
        programs: Programs | None = None,
    ):
        backend = resolve_backend(backend)
        most = max(spec.num_ranked(layer) for layer in range(config.num_hidden_layers))
        if backend == "mosaic" and most > MOST_SELECTED_PAGES:
            raise NotImplementedError(
                f"token_budget={spec.heads.token_budget} is more than {MOST_SELECTED_PAGES} "
                f"pages of selected_page_size={spec.selected_page_size}, which the kernel can "
                "select; lower the one or raise the other"
            )
        self.config, self.spec = config, spec
        self._set_params(params)
        self.dtype, self.backend, self.chunk_size = dtype, backend, chunk_size
        self.prefill_dtype = prefill_dtype
        self.parameter_bytes = tree_bytes(params)
        # Of what a step multiplies by, and of one that drafts.
        self.step_bytes, self.draft_step_bytes = map(step_bytes, (params.decode, params.draft))
        self.num_parameters = sum(x.size for x in jax.tree.leaves(abstract_params(config)))
        self.programs = Programs(None) if programs is None else programs
        self.programs.sharded = len(_devices(self.params)) > 1
        self.prompt_tokens = 0  # prefilled so far, padding left out
        self._program = Program(
            config=config, spec=spec, backend=backend, prefill_dtype=prefill_dtype
        )
        self._shapes: set[tuple] = set()  # that jitted functions were called with
        self._caches: Caches = self._cache_shapes()
        self._state = self._empty_state()

    def begin(self, params: EngineParams) -> None:
        """Runs these from now on, with an empty cache: the arrays whose shapes it was made of."""
        self._set_params(params)
        self.reset()

    def _bound(self, make: Callable[[], Any]) -> Any:
        """What ``make`` makes, on the device of the parameters, and bound to it if they are.

        As every step returns it. Bound to a device and not bound are two programs.
        """
        device = _own_device(self.params)
        with jax.default_device(device):
            made = make()
        return made if device is None else jax.device_put(made, device)

    def _cache_shapes(self) -> Caches:
        """What ``reset`` will make where parameters are bound to no device."""
        return [
            layer_cache_shapes(self.config, self.spec, layer, self.dtype)
            for layer in range(self.config.num_hidden_layers)
        ]

    def _empty_state(self) -> DecodeState:
        return self._bound(lambda: DecodeState.empty(self.spec))

    def reset(self) -> None:
        """Begins with an empty cache, also after a failure on the device.

        What a failed call was given to update in place is lost.
        """
        self._caches = []  # the old ones go first: there may be no room for both
        self._caches = self._bound(
            lambda: [
                init_layer_cache(self.config, self.spec, layer, self.dtype)
                for layer in range(self.config.num_hidden_layers)
            ]
        )
        self._state = self._empty_state()

    def update_params(self, make: Callable[[], EngineParams]) -> None:
        """Runs what ``make`` returns from now on: the same trees with other numbers.

        The old ones go first: there may be no room for both. If ``make`` fails there are none.
        """
        self._set_params(EngineParams({}, {}, {}))
        self._set_params(make())

    def _set_params(self, params: EngineParams) -> None:
        self.params, self.prefill_params, self.draft_params = params
        # Looked at for every request, and there are hundreds.
        self._params_leaves = jax.tree.leaves(params)

    def check_params(self) -> None:
        """Raises ``ValueError`` where an update failed, or somebody else donated what it shares."""
        if not self.params:
            raise ValueError(
                "the engine has no params since an update of them failed: update again"
            )
        if any(leaf.is_deleted() for leaf in self._params_leaves):
            raise ValueError(
                "the engine's params were donated to another computation or deleted: give it those "
                "that followed (update_params)"
            )

    @property
    def compilations(self) -> int:
        """Different shapes that jitted functions were called with."""
        return len(self._shapes)

    def padded(self, tokens: int) -> int:
        """Length of the next chunk of so many tokens, padding included."""
        return bucket(tokens, SMALLEST_CHUNK, self.chunk_size)

    def chunk_buckets(self) -> list[int]:
        """All lengths that ``padded`` can return."""
        return buckets(SMALLEST_CHUNK, self.chunk_size)

    def row_counts(self, size: int) -> list[int]:
        """How many prompts of that padded length a call can have, descending; the last is 1."""
        # The plain ops take one row after the other, so more rows would save them little.
        parameters = self.num_parameters if self.backend == "mosaic" else None
        most = self.spec.max_num_seqs
        return row_counts(size, most, most_tokens=self.chunk_size, parameters=parameters)

    def wait(self) -> None:
        """Returns when the device is idle. Raises ``RuntimeError`` if a computation failed."""
        jax.block_until_ready((self._caches, self._state))

    def memory_plan(self) -> dict[str, int]:
        """Bytes of the parameters and of each part of the cache (see ``attention/cache.py``)."""
        sizes = cache_bytes(self.config, self.spec, self.dtype)
        return {"parameters": self.parameter_bytes, **sizes}

    # Requests.

    def prefill(
        self, chunks: Sequence[Chunk], rows: int = 1
    ) -> tuple[jax.Array, Sample | None, jax.Array | None]:
        """Runs chunks of one padded length; returns the logits (float32) after their last tokens.

        The call has ``rows`` rows, one of ``row_counts``, and so have the logits [R, V];
        those behind the chunks mean nothing. Beside them what the model thought of a single chunk's
        ``following``, padded as the chunk is, and of block-sparse chunks the blocks that were
        attended, summed over layers and retrieval heads.
        """
        call = self.prefill_call(chunks, rows)
        what = *_judged(chunks[0]), chunks[0].block_sparse
        self.count_shape("prefill_chunks", *call.args[3].shape, *what)
        self.prompt_tokens += sum(len(chunk.tokens) for chunk in chunks)
        logits, self._caches, judged, attended = self.programs.run(call)
        return logits, judged, attended

    def prefill_call(self, chunks: Sequence[Chunk], rows: int = 1) -> Call:
        """What ``prefill`` runs."""
        [size] = {self.padded(len(chunk.tokens)) for chunk in chunks}
        following = chunks[0].following
        nothing = dataclasses.replace(
            chunks[0], tokens=np.zeros((0,), np.int32), start=0, prompt_length=1
        )
        filled = [*chunks, *[nothing] * (rows - len(chunks))]
        return Call.of(
            prefill_chunks,
            self._program,
            self.prefill_params,
            self._caches,
            _stacked([chunk.tokens for chunk in filled], size),
            ChunkRows(
                page_table=jnp.asarray(np.stack([chunk.page_table for chunk in filled])),
                window_table=jnp.asarray(np.stack([chunk.window_table for chunk in filled])),
                start=_int32([chunk.start for chunk in filled]),
                length=_int32([len(chunk.tokens) for chunk in filled]),
                prompt_length=_int32([chunk.prompt_length for chunk in filled]),
                whole_from=_int32([chunk.whole_from for chunk in filled]),
            ),
            None if following is None else jnp.asarray(_filled_up(following, size)),
            block_sparse=chunks[0].block_sparse,
            top=chunks[0].top_logprobs,
            keep_hidden=chunks[0].keep_hidden,
        )

    def insert(self, logits: jax.Array, starts: Sequence[Start]) -> Sample:
        """Gives slots to prefilled prompts; their first tokens, sampled from ``logits`` [R, V].

        There may be fewer of them than rows; the tokens behind theirs mean nothing.
        """
        call = self.insert_call(logits, starts)
        counts_no_tokens = self._state.output_counts is None
        how = call.static["mode"], counts_no_tokens, _rules_shape(call.args[-1])
        self.count_shape("insert", len(logits), *how)
        self._state, self._caches, first = self.programs.run(call)
        return first

    def insert_call(
        self, logits: jax.Array | jax.ShapeDtypeStruct, starts: Sequence[Start]
    ) -> Call:
        """What ``insert`` runs."""
        prompt_mask = self._prompt_masks(starts, logits.shape[0])
        filled = [*starts, *[starts[-1]] * (logits.shape[0] - len(starts))]
        sampling = self._state.sampling.with_rows([(x.slot, x.sampling_row) for x in filled])
        # Beyond the last slot is nobody's.
        slots = [x.slot if i < len(starts) else len(sampling.seed) for i, x in enumerate(filled)]
        rules = TokenRules.of([start.rules for start in filled])
        return Call.of(
            insert,
            self._program,
            self._caches,
            dataclasses.replace(self._state, sampling=sampling),
            logits,
            SlotStarts(
                slot=_int32(slots),
                prompt_length=_int32([len(start.prompt) for start in filled]),
                max_tokens=_int32([start.sampling.max_tokens for start in filled]),
                forced=_int32([start.forced for start in filled]),
                window_table=jnp.asarray(np.stack([start.window_table for start in filled])),
                prompt_mask=prompt_mask,
                history=self._histories(filled),
            ),
            jax.tree.map(jnp.asarray, rules),
            mode=SamplingMode.of([start.sampling for start in starts]),
        )

    def _prompt_masks(self, starts: Sequence[Start], rows: int) -> jax.Array | None:
        """The prompts' tokens, for penalties, once any request has asked for them; else None."""
        V = self.config.vocab_size
        if self._state.output_counts is None:
            if not any(start.sampling.uses_penalties for start in starts):
                return None
            shape = (self.spec.max_num_seqs, V)
            self._state = dataclasses.replace(
                self._state,
                output_counts=jnp.zeros(shape, jnp.int32),
                prompt_mask=jnp.zeros(shape, bool),
            )
        mask = np.zeros((rows, V), bool)
        for row, start in zip(mask, starts, strict=False):
            row[start.prompt] = True
        return jnp.asarray(mask)

    def _histories(self, starts: Sequence[Start]) -> jax.Array | None:
        """The prompts by position, where drafts are looked up; else None."""
        if self._state.history is None:
            return None
        return _stacked([start.prompt for start in starts], self._state.history.shape[1])

    def decode(self, inputs: BurstInputs) -> Burst:
        """Runs decode steps of the first B slots."""
        call = self.decode_call(inputs)
        groups = None if inputs.groups is None else inputs.groups.page_table.shape
        static = call.static["mode"], call.static.get("most_drafts")
        counts_no_tokens, rules = self._state.output_counts is None, _rules_shape(inputs.rules)
        self.count_shape(call.name, *inputs.forced.shape, groups, *static, counts_no_tokens, rules)
        self._state, self._caches, burst = self.programs.run(call)
        return burst

    def has_program(self, inputs: BurstInputs) -> bool:
        """Whether ``decode`` will surely not have to compile."""
        return self.programs.has(self.decode_call(inputs))

    def decode_call(self, inputs: BurstInputs) -> Call:
        """What ``decode`` runs."""
        begin = (self._program, self.params, self._caches, self._state)
        groups = inputs.groups if inputs.drafts is None else None
        tables = _tables(inputs.page_table, groups)
        steps = jnp.asarray(inputs.forced), jnp.int32(inputs.steps)
        rules = jax.tree.map(jnp.asarray, inputs.rules)
        if inputs.drafts is None:
            return Call.of(decode_burst, *begin, tables, *steps, rules, mode=inputs.mode)
        # Where nothing is drafted, a pass of one token a row is a step of dense attention.
        most = self.spec.max_drafts if inputs.drafts.any() else 0
        drafts = jnp.asarray(inputs.drafts)
        static = {"mode": inputs.mode, "most_drafts": most}
        own = self.draft_params if most and self.draft_params is not self.params else None
        return Call.of(exact_burst, *begin, tables, *steps, drafts, rules, own, **static)

    def selected_pages(self, slot: int) -> list[jax.Array]:
        """Physical pages that each layer's ranked heads chose for a slot at its last selection.

        Of each layer ``[Kq, R]`` int32, -1 behind a head's last.
        """
        self.count_shape("selected_pages")
        listed = [cache.listed for cache in self._caches]
        return selected_pages(self._program, listed, self._state.tail, jnp.int32(slot))

    def score(
        self,
        forced: ForcedSteps,
        first: int,
        *,
        page_table: np.ndarray,
        distributions: bool,
        keep_hidden: bool,
    ) -> StepScores:
        """Judges given tokens by decode steps ``first`` on, as many as ``forced`` (NumPy) has.

        ``page_table`` [B, M] is int32.
        """
        self.count_shape("score_steps", forced.tokens.shape, distributions, keep_hidden)
        call = Call.of(
            score_steps,
            self._program,
            self.params,
            self._caches,
            _tables(page_table, None),
            jax.tree.map(jnp.asarray, forced),
            jnp.int32(first),
            distributions=distributions,
            keep_hidden=keep_hidden,
        )
        scores, self._caches = self.programs.run(call)
        return scores

    def stop(self, slot: int) -> None:
        """The slot's request is gone; the device may be in the middle of a burst of it."""
        self._state = deactivate(self._state, jnp.int32(slot))

    # Prefixes.

    def read_pages(self, pages: np.ndarray, windows: np.ndarray) -> list[dict]:
        """Of each layer, retrieval pages with their statistics, and pages of prefill windows."""
        return read_pages(self._caches, jnp.asarray(pages), jnp.asarray(windows))

    def write_pages(self, kept: list[dict], pages: np.ndarray, windows: np.ndarray) -> None:
        """Puts back what ``read_pages`` read, on other pages; on none beyond those of a pool."""
        self._caches = write_pages(self._caches, kept, jnp.asarray(pages), jnp.asarray(windows))

    def read_block(self, pages: np.ndarray, windows: np.ndarray) -> list[jax.Array]:
        """What ``read_pages`` returns, as few arrays of one axis."""
        return self.programs.run(self.read_block_call(pages, windows))

    def read_block_call(self, pages: np.ndarray, windows: np.ndarray) -> Call:
        """What ``read_block`` runs."""
        return Call.of(read_block, self._caches, jnp.asarray(pages), jnp.asarray(windows))

    def write_block(self, block: list[jax.Array], pages: np.ndarray, windows: np.ndarray) -> None:
        """Puts back what ``read_block`` read, on other pages; on none beyond those of a pool."""
        self._caches = self.programs.run(self.write_block_call(block, pages, windows))

    def write_block_call(self, block: list[Any], pages: np.ndarray, windows: np.ndarray) -> Call:
        """What ``write_block`` runs."""
        return Call.of(write_block, self._caches, block, jnp.asarray(pages), jnp.asarray(windows))

    def block_shapes(self, pages: np.ndarray, windows: np.ndarray) -> list[jax.ShapeDtypeStruct]:
        """Of what ``read_block`` returns for these pages, where it lies when it comes back."""
        shapes = jax.eval_shape(read_block, self._caches, pages, windows)
        [(where, _)] = places_of(jax.tree.leaves(self._caches)[:1])
        return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in shapes]

    def page_shapes(self, pages: np.ndarray, windows: np.ndarray) -> list[dict]:
        """Shapes of what ``read_pages`` returns for these pages."""
        return jax.eval_shape(lambda caches: read_pages(caches, pages, windows), self._caches)

    def fingerprint(self) -> str:
        """A digest of architecture and weights, as ``array_bytes.fingerprint`` says."""
        return fingerprint(self.config, self.params)

    # Measurements and tests.

    def fill_caches(self, make: Callable[[LayerCache, int], LayerCache]) -> None:
        """Replaces what is cached: decode can be timed without a prefill, stale keys be spoilt.

        ``make`` gets a layer's cache, as ``jax.ShapeDtypeStruct``, and its number.
        """
        shapes = jax.eval_shape(lambda: self._caches)
        self._caches = []  # the memory of the old ones is needed
        self._caches = [make(cache, layer) for layer, cache in enumerate(shapes)]

    def read_cache(self, layer: int) -> LayerCache:
        """A copy of a layer's cache on the host."""
        return jax.device_get(self._caches[layer])

    def count_shape(self, *shape: object) -> None:
        """A jitted function was called with this shape."""
        self._shapes.add(shape)


def _filled_up(ids: np.ndarray, size: int) -> np.ndarray:
    filled = np.zeros((size,), np.int32)
    filled[: len(ids)] = ids
    return filled


def _stacked(rows: Sequence[np.ndarray], size: int) -> jax.Array:
    """Ids of each row ``[R, size]`` int32, filled up with 0."""
    return jnp.asarray(np.stack([_filled_up(ids, size) for ids in rows]))


def _int32(numbers: Sequence[int]) -> jax.Array:
    return jnp.asarray(np.array(numbers, np.int32))


def _judged(chunk: Chunk) -> tuple[bool, int, bool]:
    """What a program is compiled for of what is asked of a chunk's own tokens."""
    return chunk.following is None, chunk.top_logprobs, chunk.keep_hidden


def _rules_shape(rules: TokenRules | None) -> int | None:
    """What of rules a program is compiled for: None without, else the room for biased tokens."""
    return None if rules is None else rules.bias_ids.shape[1]


def _tables(page_table: np.ndarray, groups: PrefixGroups | None) -> DecodeTables:
    return DecodeTables(
        page_table=jnp.asarray(page_table),
        groups=jax.tree.map(jnp.asarray, groups),
    )


def _devices(params: Params) -> set[jax.Device]:
    places = places_of(jax.tree.leaves(params))
    return {device for sharding, _ in places for device in sharding.device_set}


def _own_device(params: Params) -> jax.Device | None:
    """The device to which parameters were bound; None where they follow, or lie on several."""
    devices, leaves = _devices(params), jax.tree.leaves(params)
    if len(devices) > 1 or not any(committed for _, committed in places_of(leaves)):
        return None
    return devices.pop()

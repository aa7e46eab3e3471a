"""The wall between host and device: the only owner of parameters, caches and decode state.

The engine above it works with requests and NumPy arrays. The runner knows slots and pages, never
requests or text; it calls the jitted steps (``steps.py``) and returns their results unfetched, so
that the device works while the host goes on.
"""

import dataclasses
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from lserve_jax.attention.attend import PrefixGroups
from lserve_jax.attention.cache import CacheSpec, LayerCache, cache_bytes, init_layer_cache
from lserve_jax.engine.buckets import SMALLEST_CHUNK, bucket, buckets
from lserve_jax.engine.forced_steps import score_steps
from lserve_jax.engine.inputs import BurstInputs, Chunk, Start
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
    SlotStart,
    StepScores,
    Windows,
)
from lserve_jax.engine.steps import (
    deactivate,
    decode_burst,
    insert,
    prefill_chunk,
    read_pages,
    restore_window,
    save_window,
    write_pages,
)
from lserve_jax.engine.token_rules import TokenRules
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params
from pallas_kernels.api import MOST_SELECTED_PAGES, Backend, resolve_backend


class ModelRunner:
    """Runs jitted steps on parameters, caches and decode state that nobody else holds.

    ``params`` have their heads in the order of ``spec``: retrieval first (``model/heads.py``).
    ``dtype`` is the compute dtype. ``chunk_size`` is the most tokens of a ``Chunk``.

    Raises ``NotImplementedError`` for a token budget that the kernels cannot select.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        spec: CacheSpec,
        *,
        dtype,
        backend: Backend = "auto",
        chunk_size: int,
    ):
        backend = resolve_backend(backend)
        most = max(spec.num_ranked(layer) for layer in range(config.num_hidden_layers))
        if backend == "mosaic" and most > MOST_SELECTED_PAGES:
            raise NotImplementedError(
                f"token_budget={spec.heads.token_budget} is more than {MOST_SELECTED_PAGES} "
                f"pages of selected_page_size={spec.selected_page_size}, which the kernel can "
                "select; lower the one or raise the other"
            )
        self.config, self.params, self.spec = config, params, spec
        self.dtype, self.backend, self.chunk_size = dtype, backend, chunk_size
        self.parameter_bytes = sum(device_bytes(x) for x in jax.tree.leaves(params))
        self.prompt_tokens = 0  # prefilled so far, padding left out
        self._program = Program(config=config, spec=spec, backend=backend)
        self._shapes: set[tuple] = set()  # that jitted functions were called with
        self.reset()

    def reset(self) -> None:
        """Begins with an empty cache, also after a failure on the device.

        What a failed call was given to update in place is lost.
        """
        self._caches: Caches = []  # the old ones go first: there may be no room for both
        device = _own_device(self.params)
        with jax.default_device(device):
            self._caches = [
                init_layer_cache(self.config, self.spec, layer, self.dtype)
                for layer in range(self.config.num_hidden_layers)
            ]
            self._state = DecodeState.empty(self.spec)
        if device is not None:
            # As every step returns them. Bound to a device and not bound are two programs.
            self._caches, self._state = jax.device_put((self._caches, self._state), device)

    def update_params(self, make: Callable[[], Params]) -> None:
        """Runs what ``make`` returns from now on: the same tree with other numbers.

        The old ones go first: there may be no room for both. If ``make`` fails there are none.
        """
        self.params = {}
        self.params = make()

    def check_params(self) -> None:
        """Raises ``ValueError`` where an update failed, or somebody else donated what it shares."""
        if not self.params:
            raise ValueError(
                "the engine has no params since an update of them failed: update again"
            )
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.params)):
            raise ValueError(
                "the engine's params were donated to another computation or deleted: give it those "
                "that followed (update_params)"
            )

    @property
    def has_prefix_kernel(self) -> bool:
        """Whether rows can read a prefix together: no kernel reads int8 pages that way."""
        return self.backend == "reference" or self.spec.kv_dtype != "int8"

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

    def wait(self) -> None:
        """Returns when the device is idle. Raises ``RuntimeError`` if a computation failed."""
        jax.block_until_ready((self._caches, self._state))

    def memory_plan(self) -> dict[str, int]:
        """Bytes of the parameters and of each part of the cache (see ``attention/cache.py``)."""
        sizes = cache_bytes(self.config, self.spec, self.dtype)
        return {"parameters": self.parameter_bytes, **sizes}

    # Requests.

    def prefill(self, chunk: Chunk) -> tuple[jax.Array, Sample | None]:
        """Runs a chunk; returns the logits ``[V]`` (float32) after its last token.

        Beside them what the model thought of ``chunk.following``, padded as the chunk is.
        """
        size = self.padded(len(chunk.tokens))
        following = None if chunk.following is None else _filled_up(chunk.following, size)
        what = following is None, chunk.top_logprobs, chunk.keep_hidden
        self.count_shape("prefill_chunk", size, *what)
        self.prompt_tokens += len(chunk.tokens)
        logits, self._caches, judged = prefill_chunk(
            self._program,
            self.params,
            self._caches,
            _filled_up(chunk.tokens, size),
            jnp.asarray(chunk.page_table),
            jnp.int32(chunk.start),
            jnp.int32(len(chunk.tokens)),
            jnp.int32(chunk.prompt_length),
            following,
            top=chunk.top_logprobs,
            keep_hidden=chunk.keep_hidden,
        )
        return logits, judged

    def insert(self, slot: int, logits: jax.Array, start: Start) -> Sample:
        """Gives a slot to a prefilled prompt; its first token, sampled from ``logits`` [V]."""
        prompt_mask = self._prompt_mask(start)
        sampling = self._state.sampling.with_row(slot, start.sampling_row)
        mode = SamplingMode.of([start.sampling])
        self.count_shape("insert", mode, prompt_mask is None, _rules_shape(start.rules))
        self._state, self._caches, first = insert(
            self._program,
            self._caches,
            dataclasses.replace(self._state, sampling=sampling),
            logits,
            SlotStart(
                slot=jnp.int32(slot),
                prompt_length=jnp.int32(len(start.prompt)),
                max_tokens=jnp.int32(start.sampling.max_tokens),
                forced=jnp.int32(start.forced),
                own_sinks=jnp.asarray(start.own_sinks),
                prompt_mask=prompt_mask,
                history=self._history(start),
            ),
            jax.tree.map(jnp.asarray, start.rules),
            mode=mode,
        )
        return first

    def _prompt_mask(self, start: Start) -> jax.Array | None:
        """The prompt's tokens, for penalties, once any request has asked for them; else None."""
        V = self.config.vocab_size
        if self._state.output_counts is None:
            if not start.sampling.uses_penalties:
                return None
            shape = (self.spec.max_num_seqs, V)
            self._state = dataclasses.replace(
                self._state,
                output_counts=jnp.zeros(shape, jnp.int32),
                prompt_mask=jnp.zeros(shape, bool),
            )
        mask = np.zeros((V,), bool)
        mask[start.prompt] = True
        return jnp.asarray(mask)

    def _history(self, start: Start) -> jax.Array | None:
        """The prompt by position, where drafts are looked up; else None."""
        if self._state.history is None:
            return None
        return _filled_up(start.prompt, self._state.history.shape[1])

    def decode(self, inputs: BurstInputs) -> Burst:
        """Runs decode steps of the first B slots."""
        groups = None if inputs.groups is None else inputs.groups.page_table.shape
        counts_no_tokens = self._state.output_counts is None
        if inputs.drafts is not None:
            return self._exact_burst(inputs, inputs.drafts)
        rules = _rules_shape(inputs.rules)
        shape = (*inputs.forced.shape, groups, inputs.mode, counts_no_tokens, rules)
        self.count_shape("decode_burst", *shape)
        self._state, self._caches, burst = decode_burst(
            self._program,
            self.params,
            self._caches,
            self._state,
            _tables(inputs.page_table, inputs.sink_page, inputs.groups),
            jnp.asarray(inputs.forced),
            jnp.int32(inputs.steps),
            jax.tree.map(jnp.asarray, inputs.rules),
            mode=inputs.mode,
        )
        return burst

    def _exact_burst(self, inputs: BurstInputs, drafts: np.ndarray) -> Burst:
        # Where nothing is drafted, a pass of one token a row is a step of dense attention.
        most = self.spec.max_drafts if drafts.any() else 0
        rows, counts_no_tokens = len(inputs.page_table), self._state.output_counts is None
        rules = _rules_shape(inputs.rules)
        self.count_shape("exact_burst", rows, inputs.mode, counts_no_tokens, most, rules)
        self._state, self._caches, burst = exact_burst(
            self._program,
            self.params,
            self._caches,
            self._state,
            _tables(inputs.page_table, inputs.sink_page, None),
            jnp.asarray(inputs.forced),
            jnp.int32(inputs.steps),
            jnp.asarray(drafts),
            jax.tree.map(jnp.asarray, inputs.rules),
            mode=inputs.mode,
            most_drafts=most,
        )
        return burst

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
        sink_page: np.ndarray,
        distributions: bool,
        keep_hidden: bool,
    ) -> StepScores:
        """Judges given tokens by decode steps ``first`` on, as many as ``forced`` (NumPy) has.

        ``page_table`` [B, M] and ``sink_page`` [B] are int32.
        """
        self.count_shape("score_steps", forced.tokens.shape, distributions, keep_hidden)
        scores, self._caches = score_steps(
            self._program,
            self.params,
            self._caches,
            _tables(page_table, sink_page, None),
            jax.tree.map(jnp.asarray, forced),
            jnp.int32(first),
            distributions=distributions,
            keep_hidden=keep_hidden,
        )
        return scores

    def stop(self, slot: int) -> None:
        """The slot's request is gone; the device may be in the middle of a burst of it."""
        self._state = deactivate(self._state, jnp.int32(slot))

    # Prefixes.

    def save_window(self, sink_page: int, num_pages: int) -> Windows:
        """After a prefix of ``num_pages`` pages was prefilled: what continues it.

        Its sinks are copied to the streaming pages from ``sink_page`` on.
        """
        kept = self._window_pages(num_pages)
        self.count_shape("save_window", kept)
        self._caches, windows = save_window(
            self._program, self._caches, jnp.int32(sink_page), num_pages=kept
        )
        return windows

    def restore_window(self, windows: Windows) -> None:
        """The next chunk continues the prefix that ``windows`` were saved of."""
        if any(window.k.size for window in windows):  # else no head streams
            self.count_shape("restore_window", windows[0].k.shape)
            self._caches = restore_window(self._caches, windows)

    def _window_pages(self, num_pages: int) -> int:
        """Pages of the prefill window that a prefix of ``num_pages`` fills, as a bucket."""
        return bucket(num_pages, 1, self.spec.prefill_window.num_pages)

    def read_pages(self, pages: np.ndarray, sink_pages: np.ndarray) -> list[dict]:
        """Of each layer, retrieval pages with their statistics, and streaming pages."""
        return read_pages(self._caches, jnp.asarray(pages), jnp.asarray(sink_pages))

    def write_pages(self, kept: list[dict], pages: np.ndarray, sink_pages: np.ndarray) -> None:
        """Puts back what ``read_pages`` read, on other pages."""
        self._caches = write_pages(self._caches, kept, jnp.asarray(pages), jnp.asarray(sink_pages))

    def prefix_shapes(
        self, pages: np.ndarray, sink_pages: np.ndarray
    ) -> tuple[list[dict], Windows]:
        """Shapes of what ``read_pages`` and ``save_window`` return for a prefix on these pages."""
        kept = self._window_pages(len(pages))
        return jax.eval_shape(
            lambda caches: (
                read_pages(caches, pages, sink_pages),
                [jax.tree.map(lambda x: x[:, :kept], cache.prefill_window) for cache in caches],
            ),
            self._caches,
        )

    def fingerprint(self) -> str:
        """A digest of architecture and weights: every number of every weight counts.

        Names, shapes and dtypes count too, and so does the order of heads.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        paths, _ = jax.tree.flatten_with_path(self.params)
        for path, leaf in paths:
            name = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}"
            digest.update(name.encode())
        for checksum in jax.device_get(_checksums(jax.tree.leaves(self.params))):
            digest.update(checksum.tobytes())
        return digest.hexdigest()[:32]

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


def _filled_up(ids: np.ndarray, size: int) -> jax.Array:
    filled = np.zeros((size,), np.int32)
    filled[: len(ids)] = ids
    return jnp.asarray(filled)


def _rules_shape(rules: TokenRules | None) -> int | None:
    """What of rules a program is compiled for: None without, else the room for biased tokens."""
    return None if rules is None else rules.bias_ids.shape[1]


def _tables(
    page_table: np.ndarray, sink_page: np.ndarray, groups: PrefixGroups | None
) -> DecodeTables:
    return DecodeTables(
        page_table=jnp.asarray(page_table),
        sink_page=jnp.asarray(sink_page),
        groups=jax.tree.map(jnp.asarray, groups),
    )


def _own_device(params: Params) -> jax.Device | None:
    """The device to which parameters were bound; None where they follow, or lie on several."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    devices = {device for leaf in leaves for device in leaf.devices()}
    if len(devices) > 1 or not any(leaf.committed for leaf in leaves):
        return None
    return devices.pop()


def device_bytes(x: Array | jax.ShapeDtypeStruct) -> int:
    """What an array takes on a device, which has two numbers of 4 bits in a byte."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.size * jnp.iinfo(x.dtype).bits // 8
    return x.size * x.dtype.itemsize


@jax.jit
def _checksums(weights: list[Array]) -> list[UInt32[Array, " 2"]]:
    """Two sums of each weight's bits, modulo 2^32, every number times an odd one of its place.

    So one changed number changes both, and numbers that trade places do too. A sum runs where the
    weight lies; nothing of a weight's size is made or fetched.
    """

    def checksum(x: Array) -> Array:
        if x.dtype == jnp.uint4:
            x = x.astype(jnp.uint8)
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).ravel()
        place = jax.lax.iota(jnp.uint32, bits.size)
        factors = [(place * jnp.uint32(m)) | jnp.uint32(1) for m in (2654435761, 2246822519)]
        return jnp.stack([jnp.sum(bits * factor, dtype=jnp.uint32) for factor in factors])

    return [checksum(x) for x in weights]

"""The two-way cache: what a window keeps, what moves into it after a prompt, and how much it takes.

Tests of attention use zero queries and keys: then every visible token has the same weight, the
output is the mean of their values, and with a random value for each position the mean tells which
positions were visible. The caches begin as NaN.
"""

import functools

import jax
import jax.numpy as jnp
import kv_oracle
import numpy as np
import pytest
from budgets import budgets_of
from numpy.testing import assert_allclose, assert_array_equal

from lserve_jax import ModelConfig, SparsityConfig
from lserve_jax.attention.attend import ChunkRows, decode_attend, prefill_attend
from lserve_jax.attention.cache import (
    CacheSpec,
    KVDtype,
    LayerCache,
    StreamingWindow,
    cache_bytes,
    fill_decode_windows,
    init_layer_cache,
    layer_cache_shapes,
    make_spec,
    token_bytes,
)
from lserve_jax.attention.selection import first_tail_page
from pallas_kernels.api import KV_KINDS

D = 16
CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=D,
    max_position_embeddings=4096,
)
# A mean of 2,000 float32 numbers of size 3; one token more or less in 500 moves it by 1e-3.
MEAN = {"atol": 2e-5, "rtol": 0}


def make(sparsity: SparsityConfig | None, max_model_len: int = 4096, **changes) -> CacheSpec:
    settings = {
        "max_num_seqs": 3,
        "num_pages": 40,
        "max_prefixes": 0,
        "kv_dtype": "auto",
        "heads": budgets_of((1, 2), sparsity),
    }
    return make_spec(CONFIG, sparsity=sparsity, max_model_len=max_model_len, **settings | changes)


def poisoned(spec: CacheSpec, layer: int = 0) -> LayerCache:
    def spoil(x: jax.ShapeDtypeStruct) -> jax.Array:
        value = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 127
        return jnp.asarray(np.full(x.shape, value, x.dtype))  # jnp.full compiles each shape

    return jax.tree.map(spoil, layer_cache_shapes(CONFIG, spec, layer, jnp.float32))


@pytest.mark.parametrize(("sink", "local"), [(2, 4), (0, 1), (1, 1)])
def test_ring_addresses(sink: int, local: int) -> None:
    """Sinks stay; the last ``local`` tokens never share a page, wherever they begin."""
    window = StreamingWindow(sink=16 * sink, local=16 * local, page_size=16)
    index = np.asarray(window.index(jnp.arange(50)))
    assert_array_equal(index[:sink], np.arange(sink))
    assert np.all((index[sink:] >= sink) & (index[sink:] < window.num_pages))
    assert window.num_pages == sink + local + 1
    positions = np.arange(700)
    for end in range(1, 701):
        seen = (positions < window.sink) | (positions >= end - window.local)
        pages = np.unique(positions[:end][seen[:end]] // 16)
        assert len(np.unique(index[pages])) == len(pages)


# 1 sink page and 2 local pages of 16 while decoding, 2 and 5 while prefilling.
SMALL = SparsityConfig(
    page_size=16,
    token_budget=64,
    reuse_interval=3,
    decode_sink=16,
    decode_local=32,
    prefill_sink=32,
    prefill_local=80,
)
# LServe's own sizes, but for the prefill window.
LARGE = SparsityConfig(token_budget=512, prefill_local=1024)


def ring_table(spec: CacheSpec, start: int, end: int) -> jax.Array:
    """Places for the prefill window of a chunk, the least there can be: a ring.

    Pages before the chunk lie where they were written; what it writes may overwrite those that it
    moves out of sight.
    """
    window, P = spec.prefill_window, spec.page_size
    number = np.arange(spec.pages_per_sequence)

    def newest(end: int) -> np.ndarray:
        last = (end - 1) // P
        kept = (number > last - window.local_pages) & (number <= last)
        return kept | ((number < window.sink_pages) & (number <= last))

    kept = np.where(number < start // P, newest(start), newest(end))
    return jnp.asarray(np.where(kept, np.asarray(window.index(jnp.asarray(number))), -1))


class Sequence:
    """One sequence in slot 1 whose token at position p has the value ``codes[p]`` in both heads.

    Head 0 is a retrieval head, head 1 streams.
    """

    def __init__(self, sparsity: SparsityConfig, max_len: int, chunk: int) -> None:
        rng = np.random.default_rng(0)
        self.sparsity, self.chunk = sparsity, chunk
        self.spec = make(sparsity, max_len, num_pages=-(-max_len // sparsity.page_size) + 3)
        self.table = rng.permutation(self.spec.num_pages)[: self.spec.pages_per_sequence]
        self.codes = rng.standard_normal((max_len + chunk, D), np.float32)
        self.zeros = np.zeros((1, chunk, 2, D), np.float32)
        self._prefill = jax.jit(self._prefill_chunk, donate_argnums=0)
        self._decode = {
            select: jax.jit(functools.partial(self._decode_step, select=select), donate_argnums=0)
            for select in (True, False)
        }
        finish = functools.partial(fill_decode_windows, spec=self.spec)
        self.finish = jax.jit(finish, donate_argnums=0)

    def _prefill_chunk(self, cache, values, window_table, start, length, total):
        table = jnp.asarray(self.table, jnp.int32)
        attend = prefill_attend(
            CONFIG,
            self.spec,
            ChunkRows(
                page_table=table[None],
                window_table=window_table[None],
                start=start[None],
                length=length[None],
                prompt_length=total[None],
                whole_from=start[None],
            ),
            self.chunk,
            backend="reference",
        )
        out, cache = attend(0, self.zeros, self.zeros, values, cache)
        return out[0], cache

    def _decode_step(self, cache, value, position, tail, *, select):
        # Row 1 is the sequence, row 0 an empty slot.
        table = jnp.stack([jnp.zeros_like(self.table), self.table]).astype(jnp.int32)
        active = jnp.array([False, True])
        positions, tails = (jnp.stack([x * 0, x]) for x in (position, tail))
        attend, attended = decode_attend(
            CONFIG,
            self.spec,
            table,
            None,
            positions,
            active,
            tails,
            select=select,
            backend="reference",
        )
        zero = jnp.zeros((2, 1, 2, D))
        out, cache = attend(0, zero, zero, zero.at[1].set(value[None]), cache)
        return (out[1, 0], attended[1]), cache

    def prefill(self, total: int) -> tuple[np.ndarray, LayerCache]:
        """Outputs ``[total, 2, D]`` of a prompt, and the cache with its decode window filled."""
        cache, outs = poisoned(self.spec), []
        for start in range(0, total, self.chunk):
            length = min(self.chunk, total - start)
            values = np.repeat(self.codes[None, start : start + self.chunk, None], 2, axis=2)
            values[:, length:] = np.nan  # padding
            table = ring_table(self.spec, start, start + length)
            out, cache = self._prefill(
                cache, values, table, *(jnp.int32(x) for x in (start, length, total))
            )
            outs.append(np.asarray(out)[:length])
        return np.concatenate(outs), self.finish(
            cache, slot=jnp.array([1]), length=jnp.array([total]), window_table=table[None]
        )

    def mean(self, seen: np.ndarray) -> np.ndarray:
        return self.codes[: len(seen)][seen].astype(np.float64).mean(axis=0)

    def decode(self, cache: LayerCache, first: int, steps: int) -> None:
        """Checks what both heads see at each of ``steps`` steps from position ``first`` on."""
        s = self.sparsity
        P = s.selected_page_size or s.logical_page_size
        for step in range(steps):
            position = first + step
            select = step % s.reuse_interval == 0
            if select:
                tail = (position - 1) // P
                assert tail == first_tail_page(jnp.array([position]), P)[0]
            value = np.repeat(self.codes[position][None], 2, axis=0)
            (out, attended), cache = self._decode[select](
                cache, value, jnp.int32(position), jnp.int32(tail)
            )
            j = np.arange(position + 1)
            streaming = (j < s.decode_sink) | (j > position - s.decode_local)
            # All scores are zero, and among equals the first pages win.
            retrieval = (j // P < s.token_budget // P - 1) | (j // P >= tail)
            for head, seen in enumerate((retrieval, streaming)):
                assert_allclose(out[head], self.mean(seen), **MEAN, err_msg=f"{position} {head}")
            # Layer 0 has one head of each class, layer 1 two retrieval heads.
            assert attended == 3 * retrieval.sum() + streaming.sum()


@pytest.fixture(scope="module")
def small() -> Sequence:
    return Sequence(SMALL, max_len=400, chunk=64)


@pytest.fixture(scope="module")
def large() -> Sequence:
    return Sequence(LARGE, max_len=2400, chunk=512)


def check_prompt(sequence: Sequence, total: int) -> LayerCache:
    """The lambda mask in prefill, whatever the window has overwritten."""
    out, cache = sequence.prefill(total)
    sink, local = sequence.sparsity.prefill_sink, sequence.sparsity.prefill_local
    for i in range(total):
        j = np.arange(i + 1)
        assert_allclose(out[i, 0], sequence.mean(j <= i), **MEAN)
        assert_allclose(out[i, 1], sequence.mean((j < sink) | (j > i - local)), **MEAN)
    return cache


@pytest.mark.parametrize("total", [1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 96, 113, 128, 257])
def test_prompt_then_decode(total: int, small: Sequence) -> None:
    """Prompts around the edges of pages, both windows and chunk; decode across two pages."""
    small.decode(check_prompt(small, total), total, 40)


@pytest.mark.parametrize("total", [257, 320, 321, 384, 385])
def test_ring_of_default_size_fills(total: int, large: Sequence) -> None:
    large.decode(check_prompt(large, total), total, 70)


def test_ring_after_2000_tokens_of_prompt(large: Sequence) -> None:
    large.decode(check_prompt(large, 2000), 2000, 130)


def test_ring_that_decode_goes_round_three_times(large: Sequence) -> None:
    """Five pages of 64 tokens, behind two that stay."""
    large.decode(large.prefill(1)[1], 1, 1100)


@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_fill_decode_window(kv_dtype: str) -> None:
    """Every length up to nine pages: all that decode can read is in the window, in whole pages.

    Other slots' rings stay as they are, also beside a slot that there is not. Codes are what the
    pool quantises to.
    """
    spec = make(SMALL, kv_dtype=kv_dtype)
    prefill_window, window = spec.prefill_window, spec.decode_window
    rng = np.random.default_rng(1)
    kind = None if kv_dtype == "auto" else kv_dtype
    codes = rng.standard_normal((9 * 16, 2, D), np.float32)  # [position, k or v, D]
    move = jax.jit(functools.partial(fill_decode_windows, spec=spec))
    for length in range(1, len(codes) + 1):
        table = ring_table(spec, 0, length)
        held = np.full((2, 1, prefill_window.num_pages, 16, D), np.nan, np.float32)
        page, offset = np.divmod(np.arange(length), 16)
        place = np.where(page < 2, page, 2 + (page - 2) % 6)
        held[:, 0][:, place, offset] = codes[:length].swapaxes(0, 1)  # the newest stays
        cache = poisoned(spec)
        before = cache.streaming
        moved = move(
            LayerCache(
                retrieval=cache.retrieval,
                key_stats=cache.key_stats,
                streaming=before,
                prefill_window=cache.prefill_window._replace(k=held[0], v=held[1]),
                listed=cache.listed,
            ),
            slot=np.array([2, 3], np.int32),
            length=np.array([length, 1], np.int32),
            window_table=np.stack([table, table]),
        ).streaming
        for part, name in enumerate(("k", "v")):
            stored, untouched = (
                [np.asarray(x[0]) for x in jax.tree.leaves((pool[part], pool[part + 2]))]
                for pool in (moved, before)
            )
            for new, old in zip(stored, untouched, strict=True):
                assert_array_equal(new[: 2 * window.num_pages], old[: 2 * window.num_pages])
            position = np.arange(length)
            kept = position[(position < window.sink) | (position >= length - window.local)]
            page, offset = np.divmod(kept, 16)
            place = 2 * window.num_pages + np.where(page < 1, page, 1 + (page - 1) % 3)
            tokens = [x[place, offset] for x in stored]
            error = np.abs(kv_oracle.values(*tokens) - codes[kept, part])
            bound = kv_oracle.bound(codes[kept, part], kind, *tokens[1:])
            assert np.all(error <= bound), (name, length)


def test_fill_decode_window_without_streaming_heads() -> None:
    spec = make(SMALL)
    cache = poisoned(spec, layer=1)
    table = jnp.full((spec.pages_per_sequence,), -1, jnp.int32)
    moved = fill_decode_windows(cache, spec, jnp.array([0]), jnp.array([5]), table[None])
    assert moved.streaming.k.shape == (0, 3 * 4, 16, D)


@pytest.mark.parametrize("kv_dtype", ["auto", *KV_KINDS])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cache_bytes(kv_dtype: KVDtype, dtype) -> None:
    """LServe's size formulas; and what is planned is what is allocated."""
    spec = make(SMALL, kv_dtype=kv_dtype)
    word = jnp.dtype(dtype).itemsize
    sizes = {"auto": D * word, "int8": D + 4, "fp8": D + 4, "int4": D // 2 + 8}
    token = 2 * sizes[kv_dtype]
    assert token_bytes(spec, D, dtype) == token
    heads, decode_window, prefill_window = 1 + 2, 1 + 2 + 1, 2 + 5 + 1
    plan = cache_bytes(CONFIG, spec, dtype)
    assert plan == {
        "retrieval": heads * 40 * 16 * token,
        "key_stats": heads * 40 * 2 * D * word,
        "streaming": 3 * decode_window * 16 * token,
        "prefill_window": prefill_window * 16 * 2 * D * word,
        "listed": 3 * heads * (3 + 2) * 4,  # budget less one page, and the longest tail
    }
    caches = [init_layer_cache(CONFIG, spec, layer, dtype) for layer in range(2)]
    assert sum(x.nbytes for x in jax.tree.leaves(caches)) == sum(plan.values())


def test_dense_cache_has_no_statistics() -> None:
    cache = init_layer_cache(CONFIG, make(None, heads=budgets_of((2, 2), None)), 0, jnp.float32)
    assert cache.key_stats is None
    assert cache.listed is None
    assert cache.retrieval.k.shape == (2, 40, 64, D)


def test_windows_are_no_longer_than_a_sequence() -> None:
    spec = make(SparsityConfig(), max_model_len=200)
    assert spec.pages_per_sequence == 4
    assert (spec.decode_window.sink, spec.decode_window.local) == (128, 256)
    assert (spec.prefill_window.sink, spec.prefill_window.local) == (128, 256)
    assert make(SparsityConfig()).prefill_window.local == 4096


def test_there_is_room_for_windows_of_remembered_prompts() -> None:
    """For that of the prompt in prefill and of each remembered, with half of one behind it."""
    for max_prefixes, pages in ((0, 8), (1, 2 * (8 + 3)), (3, 4 * (8 + 3))):
        assert make(SMALL, max_prefixes=max_prefixes).num_window_pages == pages

"""Tiny random models behind ``LLM``, and their whole output distribution at every step."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kv_oracle import NAN_WORD
from numpy.testing import assert_array_equal
from numpy.typing import ArrayLike, NDArray
from oracle_model import Oracle, log_softmax

from lserve_jax import LLM, ModelConfig, SamplingParams
from lserve_jax.attention.cache import LayerCache
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.request import Request
from lserve_jax.engine.sampling import SamplingMode
from lserve_jax.model.llama import Llama
from lserve_jax.model.params import Params

VOCAB = 96

Tokens = Sequence[int]


class Generation(NamedTuple):
    tokens: list[int]
    logprobs: NDArray[np.float64]  # [tokens, V]: the distribution that each token was drawn from


def tiny_config(
    *, layers: int, kv_heads: int, group: int = 1, max_len: int = 1024, **changes
) -> ModelConfig:
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=max_len,
    )
    return dataclasses.replace(config, **changes)


def tiny_params(config: ModelConfig, seed: int = 0) -> Params:
    """Random, with small embeddings and sharp attention.

    So what is attended decides what comes next, and greedy tokens do not soon repeat themselves.
    """
    return jax.tree.map(lambda x: x, _tiny_params(config, seed))  # a tree of the caller's own


@functools.cache
def _tiny_params(config: ModelConfig, seed: int) -> Params:
    params = fresh_params(config, seed)
    params["embed_tokens"]["embedding"] *= 0.25
    for layer in params["layers"].values():
        layer["self_attn"]["qkv_proj"]["kernel"] *= 1.5
    return params


def fresh_params(config: ModelConfig, seed: int = 0) -> Params:
    """The numbers of ``init_params`` up to rounding, which compiles a program for every config.

    Here each shape is one, and configs share most of their shapes: a second less for each config.
    """
    return nnx.to_pure_dict(nnx.split(Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(seed)))[1])


def write_pattern(directory: Path, gates: ArrayLike) -> str:
    """A head pattern as DuoAttention publishes them; its path, for ``SparsityConfig.pattern``."""
    directory.mkdir(exist_ok=True)
    np.savetxt(directory / "full_attention_heads.tsv", np.asarray(gates), delimiter="\t")
    sizes = {"sink_size": 128, "recent_size": 256}
    (directory / "config.json").write_text(json.dumps(sizes))
    return str(directory)


def random_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def poison(llm: LLM) -> None:
    """Overwrites all that the cache holds with values that spoil any result they get into.

    No request may run; what the engine remembers is forgotten first.
    """
    llm.reset_prefix_cache()

    def spoil(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        # Codes have scales that are NaN, of 4 bits words of two bf16; the others are selected
        # pages.
        value = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 127
        if x.dtype == jnp.int32 and "scale" in jax.tree_util.keystr(path):
            value = NAN_WORD
        return jnp.asarray(np.full(x.shape, value, x.dtype))  # jnp.full compiles each shape

    llm.engine.runner.fill_caches(lambda cache, layer: jax.tree.map_with_path(spoil, cache))


def sample_alike(monkeypatch: pytest.MonkeyPatch, params: Sequence[SamplingParams]) -> None:
    """From here on every batch is sampled in one mode, which does for all of ``params``.

    One program in place of one for every combination of them: for tests whose question that is not.
    ``test_sampling_rows`` shows that tokens are the same.
    """
    mode = SamplingMode.of(params)
    monkeypatch.setattr(SamplingMode, "of", lambda batch: mode)
    # Tokens are counted from the first request on.
    monkeypatch.setattr(SamplingParams, "uses_penalties", mode.penalties)


def generate(
    llm: LLM, prompts: Sequence[Tokens], max_tokens: int | Sequence[int]
) -> list[Generation]:
    """Greedy continuations."""
    if isinstance(max_tokens, int):
        max_tokens = [max_tokens] * len(prompts)
    sampling = [SamplingParams(temperature=0, max_tokens=n, logprobs=VOCAB) for n in max_tokens]
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling)
    generations = []
    for output in outputs:
        completion = output.outputs[0]
        rows = [[row[token] for token in range(VOCAB)] for row in completion.logprobs]
        generations.append(Generation(completion.token_ids, np.array(rows)))
    return generations


def expected(oracle: Oracle, prompt: Tokens, tokens: Tokens) -> NDArray[np.float64]:
    """What ``Generation.logprobs`` should be for these tokens; the oracle must be new."""
    logits = [oracle.prefill(prompt)[-1]]
    logits += [oracle.decode(token) for token in tokens[:-1]]
    return log_softmax(np.array(logits))


def record_ends(llm: LLM) -> list[tuple[list[int], LayerCache]]:
    """A list that fills up with the pages of every request, in the order in which they end.

    Beside them the first layer's cache at that moment: later its pages may be somebody else's.
    """
    engine, ends = llm.engine, []
    release = engine.scheduler.release

    def record(request: Request) -> None:
        if request.pages:  # it may be out already
            ends.append((request.pages, engine.runner.read_cache(0)))
        release(request)

    engine.scheduler.release = record
    return ends


def check_pages(engine: Engine) -> None:
    """Every page is held as often as it is named, every slot is free or has one request."""
    scheduler, spec = engine.scheduler, engine.spec
    cache, placed, prefixes = scheduler.prefix_cache, scheduler.placed(), engine.prefix_store.held
    tree, nodes = cache.tree, list(cache.tree.nodes())
    tree.check()
    if cache.host is not None:
        cache.host.check()
    shared = {node.page for node in nodes}
    held = np.zeros((spec.num_pages,), int)
    for pages in [r.pages for r in placed] + [list(shared)]:
        assert len(set(pages)) == len(pages)
        held[pages] += 1
    assert_array_equal(cache.pool.references, held)
    assert sorted(cache.pool.free) == np.flatnonzero(held == 0).tolist()
    # Nobody writes to a page that somebody else reads: what is shared belongs to the tree.
    assert set(np.flatnonzero(held > 1)) <= shared
    windows = np.zeros((spec.num_window_pages,), int)
    windows[[node.window for node in nodes if node.window >= 0]] += 1
    for request in placed:
        assert not request.window or request in scheduler.prefilling
        pages = list(request.window.values())
        assert len(set(pages)) == len(pages)
        windows[pages] += 1
    assert_array_equal(cache.windows.references, windows)
    assert sorted(cache.windows.free) == np.flatnonzero(windows == 0).tolist()
    # Each node is locked by those whose prompt it belongs to, and by pins.
    locks = dict.fromkeys(nodes, 0)
    paths = [r.node.path() for r in placed if r.node] + [p.pin.node.path() for p in prefixes]
    for path in paths:
        for node in path:
            locks[node] += 1
    assert all(node.locks == count for node, count in locks.items())
    assert tree.num_pinned == len({page for prefix in prefixes for page in prefix.pages})
    for request in scheduler.waiting:
        assert not request.pages and not request.window and request.node is None
    slots = [request.slot for request in placed] + scheduler.free_slots
    assert sorted(slots) == list(range(spec.max_num_seqs))
    for request in placed:
        path = [] if request.node is None else request.node.path()
        assert [node.page for node in path] == request.pages[: len(path)]
        assert not shared & set(request.pages[len(path) :])
        tokens = np.frombuffer(b"".join(node.key for node in path), np.int32)
        assert_array_equal(tokens, request.prompt[: len(tokens)])
        table = scheduler.page_table[request.slot]
        assert table[: len(request.pages)].tolist() == request.pages
        assert not request.finished
        assert len(request.pages) * spec.page_size >= request.prefilled
    for slot in scheduler.free_slots:
        assert not scheduler.page_table[slot].any()
    for prefix in prefixes:
        assert prefix.pins > 0 and prefix.ref_count >= 0
        # A prompt that begins with it is sure to go on from its end.
        longer = np.append(prefix.token_ids[: prefix.num_shared_tokens], np.int32(0))
        kind = spec.is_block_sparse(len(prefix.token_ids))
        assert tree.pinned_match(longer, None, kind) == len(prefix.pages)
    numbers = [request.number for request in scheduler.waiting]
    assert numbers == sorted(numbers)
    known = {r.request_id for r in [*placed, *scheduler.waiting]}
    assert known <= set(engine.unfinished)


def check_nothing_left(engine: Engine) -> None:
    check_pages(engine)
    assert not engine.has_unfinished_requests
    assert not engine.scheduler.waiting and not engine.scheduler.placed()
    metrics = engine.metrics()
    assert metrics.free_pages + metrics.pinned_pages == metrics.num_pages

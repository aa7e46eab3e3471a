"""Decoding with one prefix for many requests: RelayAttention, page sharing, or a copy each.

    python benchmarks/relay.py [--attention dense] [--prefixes 8192] [--requests 32 128]

Three ways to decode B requests that begin with the same S tokens and have 256 of their own:

    relay     the prefix is attended by all requests together, and joined with their own parts
    sharing   each request attends its whole sequence; the prefix's pages are shared
    copies    the same, with pages of its own for each; where the cache has room for them

Two levels. "engine": the real engine with Llama-3-8B's geometry, random bf16 weights and random
keys and values instead of computed prompts; the median wall time of a burst of decode steps. In
lserve mode sharing and copies select pages from prefix and own part alike, relay from the own part
only. "operator": the attention of one layer, dense, all 8 KV heads; the time of all kernels of a
call by the GPU's own counters, without launches, the mean of calls with prefixes of their own,
which together exceed the L2 cache.

Writes ``benchmarks/results/relay.json``, after every row, and a table and pictures beside it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jax.experimental.mosaic.gpu import profiler
from kernels import L2_BYTES
from llama_8b import (
    CONFIG,
    LSERVE,
    NO_CHUNKS,
    UncomputedPrompts,
    burst_seconds,
    options,
    random_params,
)
from machine import provenance
from report import write_relay

from lserve_jax.attention.config import SparsityConfig
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.relay import RelayMode, decide
from lserve_jax.model.params import Params
from pallas_kernels import api
from pallas_kernels.api import KVPages, OwnAttention, PageList

PRIVATE = 256  # tokens of each request after the prefix, when it begins to decode
BURST = 16
PAGE = SparsityConfig().page_size
WAYS = ("sharing", "relay", "copies")
RELAY_OF: dict[str, RelayMode] = {"sharing": "never", "relay": "always", "copies": "never"}
MOST_CALLS = 8  # of an operator, one after another

Level = Literal["engine", "operator"]


@dataclass(frozen=True, kw_only=True)
class Args:
    levels: tuple[Level, ...] = ("engine", "operator")
    """What to measure, in this order."""
    attention: tuple[Literal["dense", "lserve"], ...] = ("dense", "lserve")
    """Of the engine."""
    prefixes: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens, whole pages of 64."""
    requests: tuple[int, ...] = (32, 128, 8, 1)
    """Of the engine. Each number compiles a burst, and one more a prefix for relay."""
    operator_requests: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128)
    bursts: int = 3
    """Timed ones."""
    cache_bytes: int = 48 << 30
    """Of keys and values; what does not fit is left out."""
    output: Path = Path(__file__).parent / "results" / "relay.json"


def check(args: Args) -> None:
    for prefix in args.prefixes:
        if prefix < PAGE or prefix % PAGE:
            raise ValueError(f"a prefix of {prefix} tokens is no whole number of pages of {PAGE}")
    for requests in (*args.requests, *args.operator_requests):
        if requests < 1:
            raise ValueError(f"{requests} requests must be at least 1")


# The engine.


def engine_rows(
    params: Params, name: str, args: Args, rows: list[dict], save: Callable[[], None]
) -> None:
    """Adds to ``rows``; saves whenever it has measured something."""
    built = build_engine(
        CONFIG,
        params,
        options(
            LSERVE if name == "lserve" else None,
            max_num_seqs=max(args.requests),
            max_model_len=max(args.prefixes) + PRIVATE + BURST * (args.bursts + 3) + 1,
            kv_cache_bytes=args.cache_bytes,
            max_prefixes=1,
            burst_steps=BURST,
            prefill_chunk_size=NO_CHUNKS,
        ),
        runner_class=UncomputedPrompts,
    )
    rng = np.random.default_rng(0)
    for requests in args.requests:
        for tokens in args.prefixes:
            auto = decide(
                "auto",
                built.spec,
                token_bytes=built.units.heads_a_layer * built.units.token,
                prefix_tokens=tokens,
                private_tokens=PRIVATE,
                requests=requests,
            )
            row = {
                "attention": name,
                "prefix": tokens,
                "requests": requests,
                "auto": auto.used,
                "why": auto.reason,
            }
            rows.append(row)
            prefix = rng.integers(0, CONFIG.vocab_size, tokens)
            own = rng.integers(0, CONFIG.vocab_size, (requests, PRIVATE))
            prompts = [np.concatenate([prefix, tail]) for tail in own]
            for way in WAYS:
                if way == "relay" and requests == 1:  # there is nobody to read it with
                    row[way] = None
                    continue
                # One runner, and so one cache, for all engines, which run one after another.
                engine = Engine(
                    built.runner,
                    max_model_len=built.max_model_len,
                    eos_token_ids=(),
                    burst_steps=BURST,
                    enable_prefix_caching=False,
                    relay=RELAY_OF[way],
                )
                row[way] = engine_time(engine, way, prefix, prompts, args.bursts)
                save()


def engine_time(
    engine: Engine, way: str, prefix: np.ndarray, prompts: list[np.ndarray], bursts: int
) -> dict | None:
    """Milliseconds a step; None where the pages do not suffice."""
    length = len(prompts[0]) + BURST * (bursts + 3)
    pages = -(-length // PAGE) * len(prompts)
    if way != "copies":
        pages -= (len(prompts) - 1) * len(prefix) // PAGE
    if pages > engine.spec.num_pages:
        return None
    begin = time.perf_counter()
    held, before = None, engine.metrics()
    if way != "copies":
        held = engine.add_prefix(prefix)
    times = [1e3 * t / BURST for t in burst_seconds(engine, prompts, bursts)]
    after = engine.metrics()
    shared = after.prefix_tokens - before.prefix_tokens
    assert shared == (0 if held is None else len(prefix) * len(prompts))
    assert after.relay_bursts - before.relay_bursts == (bursts + 3 if way == "relay" else 0)
    assert after.preemptions == before.preemptions
    if held is not None:
        held.release()
    took = time.perf_counter() - begin
    print(
        f"{len(prefix):6d} + {PRIVATE}, {len(prompts):3d} requests, {way:8s}"
        f"{median(times):9.3f} ms ({min(times):.3f}-{max(times):.3f})  [{took:.0f} s]",
        flush=True,
    )
    return {
        "ms": median(times),
        "fastest": min(times),
        "slowest": max(times),
        "tokens_per_second": 1e3 * len(prompts) / median(times),
    }


# The operator.


def operator_row(tokens: int, requests: int, args: Args) -> dict:
    """Microseconds of one layer's attention, each way."""
    heads, D = CONFIG.num_key_value_heads, CONFIG.head_dim
    shared, private = tokens // PAGE, PRIVATE // PAGE
    slot_bytes = 4 * heads * D * PAGE
    once, each = shared + requests * private, requests * (shared + private)  # pages that are read
    calls = min(max(2, 1 + 2 * L2_BYTES // (once * slot_bytes)), MOST_CALLS)
    copies = min(calls, args.cache_bytes // (each * slot_bytes))
    num_pages = max(calls * once, copies * each)
    keys = jax.random.split(jax.random.key(0), 3)
    # The same page over and over: random bits for all would take the pool's memory again.
    k, v = (jax.random.normal(key, (heads, 1, PAGE, D), jnp.bfloat16) for key in keys[:2])
    pages = KVPages(jnp.repeat(k, num_pages, axis=1), jnp.repeat(v, num_pages, axis=1))
    none = KVPages(pages.k[:0], pages.v[:0])
    q = jax.random.normal(keys[2], (requests, heads * CONFIG.group_size, D), jnp.bfloat16)
    order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)

    def listed(ids: np.ndarray) -> tuple[PageList, PageList]:
        """All of ``ids`` ``[B, n]``, for every head; no streaming head lists anything."""
        stop = jnp.full((requests, 1), ids.shape[1] * PAGE, jnp.int32)
        retrieval = PageList(jnp.asarray(ids[:, None]), jnp.zeros_like(stop), stop)
        return retrieval, PageList(retrieval.page_ids[:, :, :1], stop * 0, stop * 0)

    def whole(q, pages, lists):
        return api.paged_attention(q, pages, none, *lists)[0]

    def relay(q, pages, lists):
        prefix, own = lists
        part = OwnAttention(*api.paged_attention(q, pages, none, *own), jnp.ones((len(q),), bool))
        return api.prefix_attention(q, pages, prefix, jnp.int32(tokens), part)[0]

    sets = order[: calls * once].reshape(calls, once)
    split = [(ids[:shared], ids[shared:].reshape(requests, private)) for ids in sets]
    alone = order[: copies * each].reshape(copies, requests, shared + private)
    lists = {
        "sharing": [
            listed(np.hstack([np.tile(prefix, (requests, 1)), own])) for prefix, own in split
        ],
        "relay": [(jnp.asarray(prefix), listed(own)) for prefix, own in split],
        "copies": [listed(ids) for ids in alone],
    }
    row: dict = {"prefix": tokens, "requests": requests}
    for way in WAYS:
        f = relay if way == "relay" else whole
        row[way] = microseconds(f, q, pages, lists[way]) if lists[way] else None
    times = "  ".join(f"{way} {row[way]:.1f} us" for way in WAYS if row[way] is not None)
    print(f"{tokens:6d} + {PRIVATE}, {requests:3d} requests: {times}", flush=True)
    return row


def microseconds(f: Callable, q: jax.Array, pages: KVPages, lists: list) -> float:
    """Of all kernels of a call, the median of three passes over ``lists``."""

    def all_calls(q, pages, lists):
        outs = []
        for each in lists:
            outs.append(f(q, pages, each))
            q, _ = lax.optimization_barrier((q, outs[-1]))  # one after another
        return outs

    measure = profiler.measure(jax.jit(all_calls), aggregate=False)
    passes = [sum(ms for _, ms in measure(q, pages, lists)[1]) for _ in range(3)]
    return 1e3 * median(passes) / len(lists)


def main(args: Args) -> None:
    check(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result: dict = {**provenance(), "private": PRIVATE, "engine": [], "operator": []}

    def save() -> None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")

    for level in args.levels:
        if level == "operator":
            for tokens in args.prefixes:
                for requests in args.operator_requests:
                    result["operator"].append(operator_row(tokens, requests, args))
                    save()
            continue
        params = random_params(CONFIG)
        for name in args.attention:
            print(f"engine, {name}", flush=True)
            engine_rows(params, name, args, result["engine"], save)
        del params
    write_relay(result, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Which estimate finds the blocks that matter in block-sparse prefill, on a real model and text.

    python benchmarks/block_choice.py [--lengths 8192]

Runs a text densely. In each layer, estimates rank the blocks of 128 keys for every KV head and tile
of 128 queries; at equal densities the attention that the best blocks hold is summed up (recall),
over the tiles of a text's second half. The first block, the tile's own and the one before it count
as chosen for all. Then for some thresholds: the density that the estimate in use asks for, and its
recall.

Needles: a prompt with eight pass keys ends with the question for one of them, or goes on with 1,024
tokens of text behind it. Recall is then of the attention that the question's tile pays to the block
of the needle asked for, summed over heads and layers. On any machine. Writes
``benchmarks/results/block_choice.json``.

    exact         true attention: what no estimate can pass
    sampled       true attention of the last of every 128, 64 or 32 queries. ``api.choose_blocks``
                  takes every 64th
    antidiagonal  XAttention: the mean over an antidiagonal of the scores of 16 (or 8) queries with
                  as many keys, in place of all of them
    pooled        the mean query of the tile with the mean key of the block (FlexPrefill, and
                  SpargeAttention without its test of how alike the tokens of a block are)
    vertical-slash  sums of the last 64 queries' attention by key and by distance, added up over
                  the pairs of a block (MInference)
"""

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float
from machine import provenance

from lserve_jax import LLM
from lserve_jax.eval.needle import needle_puzzle
from lserve_jax.eval.prompts import make_cases, read_text
from lserve_jax.model.bound import bind
from lserve_jax.model.rope import layer_angles, rotary_angles
from pallas_kernels import api, block_choice

BLOCK = api.BLOCK_KEYS
MASKED = -1e30
IN_USE = "sampled 64"

Shares = Float[Array, "K tiles blocks"]


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "smollm2-135m-instruct-32k"
    texts: tuple[str, ...] = ("documentation", "stories")
    lengths: tuple[int, ...] = (8192,)
    densities: tuple[float, ...] = (0.1, 0.25, 0.5)
    thresholds: tuple[float, ...] = (0.8, 0.9, 0.95)
    output: Path = Path(__file__).parent / "results" / "block_choice.json"


def exact(q: Array, k: Array) -> Float[Array, "H tiles blocks"]:
    """Each block's share of a tile's attention, the mean over its queries."""
    T, H, D = q.shape
    k = jnp.repeat(k, H // k.shape[1], axis=1)

    def of_tile(args: tuple[Array, Array]) -> Array:
        first, rows = args
        scores = jnp.einsum("qhd,thd->hqt", rows, k) / D**0.5
        position = first + jnp.arange(BLOCK)
        seen = jnp.arange(T)[None, None] <= position[None, :, None]
        attention = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
        return attention.mean(axis=1).reshape(H, -1, BLOCK).sum(axis=-1)

    tiles = q.reshape(-1, BLOCK, H, D)
    return jax.lax.map(of_tile, (jnp.arange(len(tiles)) * BLOCK, tiles)).swapaxes(0, 1)


def sampled(stride: int) -> Callable[[Array, Array], Shares]:
    """As ``api.choose_blocks``, with another stride."""

    def estimate(q: Array, k: Array) -> Shares:
        nothing = jnp.zeros((k.shape[1], 1, 64, k.shape[2]), q.dtype)
        pages, table = api.KVPages(nothing, nothing), jnp.zeros((1,), jnp.int32)
        block_choice.STRIDE, in_use = stride, block_choice.STRIDE
        make = block_choice.attention_shares.__wrapped__
        shares = make(q, k, pages, table, jnp.int32(0), jnp.int32(len(q)))
        block_choice.STRIDE = in_use
        return shares[..., 1:]  # without the history's

    return estimate


def antidiagonal(stride: int) -> Callable[[Array, Array], Shares]:
    def estimate(q: Array, k: Array) -> Shares:
        (T, H, D), K = q.shape, k.shape[1]
        rows = q.reshape(-1, stride, K, H // K, D)[:, ::-1]
        scores = jnp.einsum("iskgd,jskd->kgij", rows, k.reshape(-1, stride, K, D))
        seen = jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None]
        scores = jnp.where(seen, scores / (stride * D**0.5), MASKED)
        shares = jax.nn.softmax(scores, axis=-1).mean(axis=1)
        blocks = T // BLOCK
        return shares.reshape(K, blocks, -1, blocks, BLOCK // stride).mean(axis=2).sum(axis=-1)

    return estimate


def pooled(q: Array, k: Array) -> Shares:
    (T, H, D), K = q.shape, k.shape[1]
    rows = q.reshape(-1, BLOCK, K, H // K, D).mean(axis=1)
    columns = k.reshape(-1, BLOCK, K, D).mean(axis=1)
    scores = jnp.einsum("tkgd,bkd->kgtb", rows, columns) / D**0.5
    seen = jnp.tril(jnp.ones((T // BLOCK,) * 2, bool))[None, None]
    return jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).mean(axis=1)


def vertical_slash(q: Array, k: Array) -> Shares:
    (T, H, D), K = q.shape, k.shape[1]
    last = jnp.arange(T - 64, T)
    scores = jnp.einsum("qkgd,tkd->kgqt", q[last].reshape(64, K, H // K, D), k) / D**0.5
    distance = last[:, None] - jnp.arange(T)[None]
    attention = jax.nn.softmax(jnp.where(distance >= 0, scores, MASKED), axis=-1)
    attention = attention.mean(axis=1)  # [K, 64, T]
    vertical = attention.sum(axis=1).reshape(K, -1, BLOCK).sum(axis=-1)
    slash = jnp.zeros((K, T)).at[:, jnp.maximum(distance, 0)].add(attention)
    # Pairs of a tile and a block n blocks before it have distances of 128 n - 127 to 128 n + 127.
    padded = jnp.pad(slash, ((0, 0), (BLOCK - 1, BLOCK)))
    weight = (BLOCK - jnp.abs(jnp.arange(-BLOCK + 1, BLOCK))) / BLOCK
    n = jnp.arange(T // BLOCK)
    by_distance = (
        padded[:, n[:, None] * BLOCK + jnp.arange(2 * BLOCK - 1)[None]] * weight[None, None]
    ).sum(axis=-1)
    behind = n[:, None] - n[None]
    shares = by_distance[:, jnp.maximum(behind, 0)] + vertical[:, None]
    return jnp.where(behind >= 0, shares, 0.0)


def group_mean(shares: Float[Array, "H tiles blocks"], heads: int) -> Shares:
    return shares.reshape(heads, -1, *shares.shape[1:]).mean(axis=1)


ESTIMATES: dict[str, Callable[[Array, Array], Shares]] = {
    "exact": lambda q, k: group_mean(exact(q, k), k.shape[1]),
    "sampled 128": sampled(128),
    "sampled 64": sampled(64),
    "sampled 32": sampled(32),
    "antidiagonal 16": antidiagonal(16),
    "antidiagonal 8": antidiagonal(8),
    "pooled": pooled,
    "vertical-slash": vertical_slash,
}


def ranked(shares: Shares) -> tuple[Array, Array]:
    """Place of each block of a tile, the best first, and the shares in that order."""
    tile, block = (
        jnp.arange(shares.shape[1])[None, :, None],
        jnp.arange(shares.shape[2])[None, None],
    )
    seen = block <= tile
    always = seen & ((block == 0) | (block >= tile - 1))
    rank = jnp.where(always, jnp.inf, jnp.where(seen, shares, -1.0))
    order = jnp.argsort(-rank, axis=-1)
    return jnp.argsort(order, axis=-1), jnp.take_along_axis(shares, order, axis=-1)


def wanted(density: float, tiles: int) -> Array:
    """Blocks of each tile, [1, tiles, 1]."""
    there = jnp.arange(1, tiles + 1)[None, :, None]
    return jnp.maximum(jnp.ceil(density * there - 1e-4), jnp.minimum(there, 3)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("densities", "thresholds"))
def of_text(
    q: Array, k: Array, densities: tuple[float, ...], thresholds: tuple[float, ...]
) -> tuple[dict, list, list]:
    """Of each estimate the recall at ``densities``; densities and recalls at ``thresholds``."""
    truth = group_mean(exact(q, k), k.shape[1])
    tiles = truth.shape[1]
    late, there = slice(tiles // 2, None), jnp.arange(1, tiles + 1)[None, :, None]

    def recall(taken: Array) -> Array:
        return jnp.where(taken, truth, 0.0).sum(axis=-1)[:, late].mean()

    recalls = {}
    for name, estimate in ESTIMATES.items():
        place, shares = ranked(estimate(q, k))
        recalls[name] = [recall(place < wanted(density, tiles)) for density in densities]
    place, shares = ranked(ESTIMATES[IN_USE](q, k))
    before = jnp.cumsum(shares, axis=-1) - shares
    asked, found = [], []
    for threshold in thresholds:
        count = (before < threshold).sum(axis=-1, keepdims=True)
        count = jnp.clip(count, jnp.minimum(there, 3), there)
        asked.append(count[:, late].sum() / (there[:, late].sum() * len(truth)))
        found.append(recall(place < count))
    return recalls, asked, found


@partial(jax.jit, static_argnames=("densities",))
def of_needle(
    q: Array, k: Array, needle: Array, tile: Array, densities: tuple[float, ...]
) -> tuple[dict, Array]:
    """Attention of a tile to a block: of each estimate what is kept, and all that there is."""
    truth = exact(q, k)[:, tile, needle].reshape(k.shape[1], -1).sum(axis=1)
    kept = {}
    for name, estimate in ESTIMATES.items():
        place = ranked(estimate(q, k))[0]
        counts = [wanted(density, place.shape[1])[:, tile, 0] for density in densities]
        kept[name] = [
            jnp.where(place[:, tile, needle] < count, truth, 0.0).sum() for count in counts
        ]
    return kept, truth.sum()


def run(llm: LLM, ids: Sequence[int], look: Callable[[Array, Array], Any]) -> list[Any]:
    """What ``look`` says of each layer's rotated queries [T, H, D] and keys [T, Hk, D]."""
    runner = llm.engine.runner
    config, model = runner.config, bind(runner.config, runner.params)
    length = len(ids)
    cos, sin = rotary_angles(config, jnp.arange(length)[None], jnp.full((1,), length))

    def attend(layer: int, q: Array, k: Array, v: Array, cache: None) -> tuple[Array, Any]:
        angles = layer_angles(config, layer, cos, sin)
        q, k = api.apply_rotary(q, *angles), api.apply_rotary(k, *angles)
        return api.causal_attention(q, k, v)[0], jax.device_get(look(q[0], k[0]))

    tokens = jnp.asarray(ids, jnp.int32)[None]
    return model(tokens, attend, [None] * config.num_hidden_layers)[1]


def needle_prompts(llm: LLM, text: str, length: int, tail: int) -> list[tuple[list[int], int, int]]:
    """Token ids, the needle's block and the question's tile, of each question of a haystack."""
    ids, rng = read_text(llm.tokenizer, text, 2 * length), random.Random(0)
    puzzle = needle_puzzle("passkey", llm.tokenizer, ids, depths=8, rng=rng)
    cases = make_cases(
        llm.tokenizer, puzzle, source=text, length=length - tail, haystack=0, chat=True
    )
    prompts = []
    for case in cases:
        [answer] = case.question.answers
        digits = llm.tokenizer.encode(answer, add_special_tokens=False)
        at = next(i for i in range(length) if case.token_ids[i : i + len(digits)] == digits)
        prompts.append((case.token_ids + ids[:tail], at // BLOCK, (length - tail - 1) // BLOCK))
    return prompts


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {**provenance(), "model": args.model, "densities": args.densities}
    result |= {"thresholds": args.thresholds, "texts": [], "needles": []}
    llm = LLM(args.model, dtype="float32", kv_cache_bytes=1 << 24, max_num_seqs=1)
    for text, length in itertools.product(args.texts, args.lengths):
        ids = read_text(llm.tokenizer, text, length)[:length]
        layers = run(llm, ids, lambda q, k: of_text(q, k, args.densities, args.thresholds))
        recalls, asked, found = jax.tree.map(lambda *x: round(float(np.mean(x)), 4), *layers)
        row = {"text": text, "length": length, "recall": recalls}
        result["texts"].append(row | {"density": asked, "recall_there": found})
        print(f"{text}, {length} tokens: recall at densities {args.densities}", flush=True)
        show(recalls)
        for threshold, density, held in zip(args.thresholds, asked, found, strict=True):
            print(f"  threshold {threshold}: density {density:.3f}, recall {held:.3f}")
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    for tail, length in itertools.product((0, 1024), args.lengths):
        pairs = []
        for ids, needle, tile in needle_prompts(llm, args.texts[0], length, tail)[1::2]:
            place = jnp.int32(needle), jnp.int32(tile)
            pairs += run(
                llm, ids, lambda q, k, place=place: of_needle(q, k, *place, args.densities)
            )
        kept, whole = jax.tree.map(lambda *x: float(np.sum(x)), *pairs)
        shares = {name: [round(x / whole, 4) for x in row] for name, row in kept.items()}
        result["needles"].append({"length": length, "behind_question": tail, "kept": shares})
        print(f"needle, {length} tokens, {tail} of them behind the question", flush=True)
        show(shares)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def show(values: Mapping[str, Sequence[float]]) -> None:
    for name, row in values.items():
        print(f"  {name:20s}" + "".join(f" {x:.3f}" for x in row), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""How much true attention the sparse path sees: page recall, its picture, and prefill recall.

    llm = LLM("smollm2-135m-instruct-32k", attention="lserve", sparsity=SparsityConfig(...))
    recall = page_recall(llm, text, num_queries=64)
    plot_page_recall(recall, "recall.png")

From the shell: ``python -m lserve_jax.analysis --prompt-file book.txt --plot recall.png``.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it, no traceback

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float
from tyro.conf import OmitArgPrefixes, SuppressFixed, arg

from lserve_jax.attention.attend import WHOLE_TAIL, chosen_by
from lserve_jax.attention.cache import CacheSpec
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.attention.selection import choose_pages, first_tail_page
from lserve_jax.checks import check_integer
from lserve_jax.cli import exit_code, read_text
from lserve_jax.engine.head_policy import head_policy
from lserve_jax.llm import LLM
from lserve_jax.model.bound import bind
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Attend, Params
from lserve_jax.model.rope import layer_angles, rotary_angles
from lserve_jax.text_engine import Prompt
from pallas_kernels import api

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class PageRecall:
    """Share of the attention mass of dense attention that lserve attention covers, per query.

    The queries are the prompt's last tokens, as if each had just been generated: page selection
    runs every ``reuse_interval`` of them. Heads are numbered as in the checkpoint.
    """

    recall: Float[np.ndarray, "L H Q"]  # in [0, 1]; 1 means that nothing was lost
    positions: np.ndarray  # [Q] of the queries
    is_retrieval: np.ndarray  # [L, Hk] bool, which KV heads keep all pages; the others stream
    prompt_tokens: int
    sparsity: SparsityConfig
    policy: str  # which heads stream and what the others may read, in words

    @property
    def mean(self) -> Float[np.ndarray, "L H"]:
        return self.recall.mean(axis=2)

    def table(self) -> dict[str, np.ndarray]:
        """One row a layer, query head and query: columns of equal length, as for a data frame.

        ``layer``, ``head``, ``kv_head``, ``position`` (of the query), ``is_retrieval``, ``recall``.
        """
        (L, H, Q), Hk = self.recall.shape, self.is_retrieval.shape[1]
        layer, head, query = (x.ravel() for x in np.indices((L, H, Q)))
        kv_head = head // (H // Hk)
        return {
            "layer": layer,
            "head": head,
            "kv_head": kv_head,
            "position": self.positions[query],
            "is_retrieval": self.is_retrieval[layer, kv_head],
            "recall": self.recall.ravel(),
        }


def page_recall(llm: LLM, prompt: Prompt, *, num_queries: int = 64) -> PageRecall:
    """Runs ``prompt`` densely and measures what ``llm``'s sparsity would have covered.

    Every layer sees dense activations, so the figures of one layer do not include the losses of
    those before it. Memory: scores of ``num_queries`` x prompt for one layer, never T x T.

    Raises ``ValueError`` unless ``llm`` has ``attention="lserve"`` and the prompt has more than
    ``num_queries`` tokens and fits the model.
    """
    if llm.spec.sparsity is None:
        kind = "draft='ngram'" if llm.spec.draft == "ngram" else "'dense'"
        raise ValueError(f"page recall needs an LLM with attention='lserve', got {kind}")
    num_queries = check_integer("num_queries", num_queries)
    ids = llm.token_ids(prompt)
    if not 0 < num_queries < len(ids):
        raise ValueError(
            f"{num_queries=} must be positive and below the prompt's {len(ids)} tokens"
        )
    if len(ids) > llm.max_model_len:
        raise ValueError(f"the prompt's {len(ids)} tokens exceed {llm.max_model_len=}")
    spec, runner = llm.spec, llm.engine.runner
    config = runner.config
    padded = np.zeros((spec.page_size * -(-len(ids) // spec.page_size),), np.int32)
    padded[: len(ids)] = ids
    recall = np.asarray(
        _recall(
            config,
            spec,
            runner.params,
            jnp.asarray(padded),
            jnp.int32(len(ids)),
            num_queries=num_queries,
        )
    )
    policy = head_policy(config, spec.sparsity)
    partition = policy.partition
    is_retrieval = np.zeros((config.num_hidden_layers, config.num_key_value_heads), bool)
    for layer, heads in enumerate(partition.retrieval):
        is_retrieval[layer, list(heads)] = True
    return PageRecall(
        recall=_as_in_checkpoint(recall, partition.order),
        positions=np.arange(len(ids) - num_queries, len(ids)),
        is_retrieval=is_retrieval,
        prompt_tokens=len(ids),
        sparsity=llm.spec.sparsity,
        policy=policy.source,
    )


def _as_in_checkpoint(
    values: Float[np.ndarray, "L heads *rest"], order: Sequence[Sequence[int]]
) -> Float[np.ndarray, "L heads *rest"]:
    """Values of KV or query heads in the order of the params, with heads as the checkpoint has
    them; ``order`` [L, Hk] has its number for each KV head of the params."""
    kv_heads = np.asarray(order)
    L, Hk = kv_heads.shape
    G = values.shape[1] // Hk
    heads = (kv_heads[:, :, None] * G + np.arange(G)).reshape(L, -1)
    restored = np.empty_like(values)
    restored[np.arange(L)[:, None], heads] = values
    return restored


@partial(jax.jit, static_argnames=("config", "spec", "num_queries"))
def _recall(
    config: ModelConfig,
    spec: CacheSpec,
    params: Params,
    tokens: Array,  # [T] int32, padded to whole pages
    length: Array,  # [] int32
    *,
    num_queries: int,
) -> Float[Array, "L H Q"]:
    queries = length - num_queries + jnp.arange(num_queries)
    attend = _measuring_attend(config, spec, tokens.shape[0], length, queries)
    caches = [jnp.zeros((config.num_attention_heads, num_queries))] * config.num_hidden_layers
    _, covered = bind(config, params)(tokens[None], attend, caches)
    return jnp.stack(covered)


def _measuring_attend(
    config: ModelConfig, spec: CacheSpec, num_tokens: int, length: Array, queries: Array
) -> Attend:
    """Dense causal attention whose "cache" is the covered share ``[H, Q]`` of each layer."""
    sparsity, P, M = spec.sparsity, spec.page_size, num_tokens // spec.page_size
    assert sparsity is not None  # checked by page_recall
    logical = sparsity.logical_page_size
    position = jnp.arange(num_tokens)
    cos, sin = rotary_angles(config, position[None], length[None])
    table = jnp.arange(M)
    Q, D, C = queries.shape[0], config.head_dim, sparsity.reuse_interval
    # The query that selects for query i is the first of its interval.
    selecting = queries[(jnp.arange(Q) // C) * C]
    U = spec.selected_page_size
    tail = first_tail_page(selecting, U)
    page = jnp.arange(num_tokens // U)[None]
    in_tail = (page >= tail[:, None]) & (page <= queries[:, None] // U)  # [Q, M * P / U]
    window = spec.decode_window
    in_window = position[None] < window.sink
    in_window |= position[None] > queries[:, None] - window.local

    def attend(layer: int, q: Array, k: Array, v: Array, covered: Array) -> tuple[Array, Array]:
        angles = layer_angles(config, layer, cos, sin)
        q, k = api.apply_rotary(q, *angles)[0], api.apply_rotary(k, *angles)[0]
        Kq, Kd, Hk = spec.heads.num_ranked[layer], spec.heads.num_dense[layer], k.shape[1]
        nothing = api.KVPages(jnp.zeros((Hk, 1, P, D), k.dtype), jnp.zeros((Hk, 1, P, D), k.dtype))
        no_heads = jax.tree.map(lambda x: x[:0], nothing)
        out, _ = api.prefill_attention(
            q, k, v[0], nothing, no_heads, table, table, jnp.int32(0), length, sink=0, local=P
        )
        scores = jnp.einsum(
            "qkgd,tkd->qkgt",
            q[queries].reshape(Q, Hk, -1, D).astype(jnp.float32),
            k.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        causal = (position[None] <= queries[:, None])[:, None, None]
        mass = jax.nn.softmax(jnp.where(causal, scores * D**-0.5, -jnp.inf), axis=-1)
        # In exact mode heads that stream while drafting keep their pages, behind the dense ones.
        streaming = jnp.where(in_window[:, None, None], mass[:, Kq + Kd :], 0.0).sum(
            axis=-1
        )  # [Q, Ks, G]
        parts = [jnp.ones((Q, Kd, config.group_size)), streaming]  # dense heads cover all
        if Kq > 0:
            # Statistics of whole pages: pages before the tail hold no token newer than the query.
            pages = k[:, :Kq].reshape(M, P // logical, logical, Kq, D).astype(jnp.float32)
            stats = jnp.stack([pages.max(axis=2), pages.min(axis=2)], axis=2)  # [M, g, 2, Kq, D]
            page_scores = api.page_scores(
                q[selecting][:, : Kq * config.group_size],
                stats.transpose(3, 0, 1, 2, 4),
                jnp.broadcast_to(table[None], (Q, M)),
                selecting + 1,
                page_size=P,
                selected_page_size=U,
                lower_bound_weight=sparsity.lower_bound_weight,
            )
            if sparsity.select is None:
                selected = api.select_pages(
                    page_scores,
                    tail,
                    spec.wanted_pages(layer, tail),
                    num_pages=spec.num_ranked(layer),
                    sink_pages=spec.forced_sink_pages,
                )  # [Q, Kq, R]
            else:
                counts, selected = choose_pages(
                    spec,
                    layer,
                    sparsity.select,
                    q[selecting][:, : Kq * config.group_size],
                    page_scores,
                    stats.transpose(3, 0, 1, 2, 4),
                    jnp.broadcast_to(table[None], (Q, M)),
                    selecting + 1,
                    tail,
                )
                entry = jnp.arange(selected.shape[2])[None, None]
                selected = jnp.where(entry < counts[:, :, None], selected, -1)
            is_selected = (selected[..., None] == page[None, None]).any(axis=2) | in_tail[:, None]
            by_page = mass[:, :Kq].reshape(Q, Kq, config.group_size, -1, U).sum(axis=-1)
            ranked = jnp.where(is_selected[:, :, None], by_page, 0.0).sum(axis=-1)  # [Q, Kq, G]
            parts.insert(0, ranked)
        share = jnp.concatenate(parts, axis=1).reshape(Q, -1).T
        return out[None], share.astype(covered.dtype)

    return attend


@dataclass(frozen=True, kw_only=True)
class PrefillRecall:
    """What block-sparse prefill attends of a prompt. Heads are numbered as in the checkpoint.

    Streaming heads, which choose nothing, are NaN.
    """

    # Share of dense attention's mass in the blocks that a query's tile lists, mean over queries
    mass: Float[np.ndarray, "L H"]
    density: Float[np.ndarray, "L Hk"]  # blocks listed, as a share of those seen causally
    prompt_tokens: int


def prefill_recall(llm: LLM, prompt: Prompt) -> PrefillRecall:
    """Runs ``prompt`` densely and measures what ``llm``'s block-sparse prefill would have covered.

    Every layer sees dense activations. Dense heads and the last 128 tokens attend everything, as
    they do in an engine. ``prefill_min_tokens`` does not count, and chunks are taken to begin at
    multiples of 128 tokens. Time is that of dense attention, memory O(prompt).

    Raises ``ValueError`` unless ``llm`` has ``prefill="block_sparse"`` and the prompt, of at least
    one token, fits the model.
    """
    spec, runner = llm.spec, llm.engine.runner
    if spec.sparsity is None or spec.sparsity.prefill != "block_sparse":
        raise ValueError("prefill recall needs an LLM with prefill='block_sparse'")
    ids = llm.token_ids(prompt)
    if not 0 < len(ids) <= llm.max_model_len:
        raise ValueError(f"the prompt's {len(ids)} tokens must lie in [1, {llm.max_model_len=}]")
    config = runner.config
    padded = np.zeros((-(-len(ids) // api.BLOCK_KEYS) * api.BLOCK_KEYS,), np.int32)
    padded[: len(ids)] = ids
    tokens, length = jnp.asarray(padded), jnp.int32(len(ids))
    mass, density = jax.device_get(_prefill_recall(config, spec, runner.params, tokens, length))
    order = head_policy(config, spec.sparsity).partition.order
    return PrefillRecall(
        mass=_as_in_checkpoint(mass, order),
        density=_as_in_checkpoint(density, order),
        prompt_tokens=len(ids),
    )


@partial(jax.jit, static_argnames=("config", "spec"))
def _prefill_recall(
    config: ModelConfig,
    spec: CacheSpec,
    params: Params,
    tokens: Array,  # [T] int32, padded to whole tiles
    length: Array,  # [] int32
) -> tuple[Float[Array, "L H"], Float[Array, "L Hk"]]:
    T, D, G = tokens.shape[0], config.head_dim, config.group_size
    position = jnp.arange(T)
    cos, sin = rotary_angles(config, position[None], length[None])
    tiles = T // api.TILE_QUERIES
    whole = (length + api.BLOCK_KEYS - 1) // api.BLOCK_KEYS
    causal_blocks = (whole * (whole + 1) // 2).astype(jnp.float32)

    def attend(layer: int, q: Array, k: Array, v: Array, cache: None) -> tuple[Array, Any]:
        angles = layer_angles(config, layer, cos, sin)
        q, k = api.apply_rotary(q, *angles), api.apply_rotary(k, *angles)
        out, _ = api.causal_attention(q, k, v)
        Kr = spec.heads.num_retrieval[layer]
        mass = jnp.full((config.num_attention_heads,), jnp.nan)
        density = jnp.full((config.num_key_value_heads,), jnp.nan)
        if Kr == 0:
            return out, (mass, density)
        queries, keys = q[0, :, : Kr * G], k[0, :, :Kr]
        no_pages = api.KVPages(*[jnp.zeros((Kr, 1, spec.page_size, D), k.dtype)] * 2)
        blocks = api.choose_blocks(
            queries,
            keys,
            no_pages,
            jnp.zeros((1,), jnp.int32),
            jnp.int32(0),
            length,
            **chosen_by(spec),
            whole_from=length - WHOLE_TAIL,
            dense_heads=spec.heads.num_dense[layer],
            backend="reference",
        )

        def covered(args: tuple[Array, ...]) -> Array:
            """Sum of the mass that each query of a tile attends, [Kr, G]."""
            first, rows, ids, counts = args
            row = first + jnp.arange(api.TILE_QUERIES)
            scores = jnp.einsum(
                "qkgd,tkd->kgqt",
                rows.reshape(-1, Kr, G, D).astype(jnp.float32),
                keys.astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            causal = (position[None] <= row[:, None])[None, None]
            share = jax.nn.softmax(jnp.where(causal, scores * D**-0.5, -jnp.inf), axis=-1)
            entry = jnp.arange(ids.shape[1])[None]
            listed = jnp.zeros((Kr, tiles), bool)
            listed = listed.at[
                jnp.arange(Kr)[:, None], jnp.where(entry < counts[:, None], ids, tiles)
            ].set(True, mode="drop")
            by_block = share.reshape(Kr, G, -1, tiles, api.BLOCK_KEYS).sum(axis=-1)
            kept = jnp.where(listed[:, None, None], by_block, 0.0).sum(axis=-1)
            return jnp.where((row < length)[None, None], kept, 0.0).sum(axis=-1)

        of_tiles = (
            jnp.arange(tiles) * api.TILE_QUERIES,
            queries.reshape(tiles, api.TILE_QUERIES, Kr * G, D),
            blocks.ids.swapaxes(0, 1),
            blocks.counts.swapaxes(0, 1),
        )
        mean = jax.lax.map(covered, of_tiles).sum(axis=0) / length.astype(jnp.float32)
        attended = blocks.counts.sum(axis=1).astype(jnp.float32)
        density = density.at[:Kr].set(attended / causal_blocks)
        return out, (mass.at[: Kr * G].set(mean.reshape(-1)), density)

    _, found = bind(config, params)(tokens[None], attend, [None] * config.num_hidden_layers)
    mass, density = (jnp.stack(x) for x in zip(*found, strict=True))
    return mass, density


def require_matplotlib() -> None:
    """Raises ``ValueError`` if the extra ``plot`` is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'lserve-jax[plot]'")


def plot_page_recall(recall: PageRecall, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Mean recall by layer and query head, and its spread over layers, as a figure.

    ``path``: where to write it, as a PNG; None: nowhere.

    Raises ``ValueError`` if matplotlib (extra ``plot``) is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # not at the top: an optional dependency

    mean, (L, H) = recall.mean, recall.mean.shape
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    heat, curve = figure.subplots(1, 2, width_ratios=[3, 2])
    image = heat.imshow(mean.T, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=heat, label="share of attention mass covered")
    group = H // recall.is_retrieval.shape[1]
    streaming = np.argwhere(~np.repeat(recall.is_retrieval, group, axis=1))
    heat.scatter(*streaming.T, marker="s", s=6, color="red", label="streaming head")
    heat.set(xlabel="layer", ylabel="query head", title="page recall")
    if len(streaming):
        heat.legend(loc="upper right", fontsize="small")
    layers = np.arange(L)
    curve.plot(layers, mean.mean(axis=1), label="mean over heads")
    curve.fill_between(layers, mean.min(axis=1), mean.max(axis=1), alpha=0.2, label="min to max")
    curve.set(xlabel="layer", ylabel="recall", ylim=(0, 1.02))
    settings = recall.sparsity
    curve.set_title(
        f"{recall.prompt_tokens} tokens, {recall.policy}, "
        f"pages {settings.page_size}/{settings.logical_page_size}, by "
        f"{settings.resolved_selected_page_size}, C={settings.reuse_interval}",
        fontsize="medium",
    )
    curve.legend(fontsize="small")
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


@dataclass(frozen=True, kw_only=True)
class AnalysisArgs:
    """Measure which share of dense attention the selected pages cover, layer by layer."""

    model: str = "smollm2-135m-instruct"
    """Alias, checkpoint directory, .gguf file or Hugging Face id."""
    prompt_file: Annotated[Path, arg(metavar="FILE")]
    """Text to run (UTF-8)."""
    plot: Annotated[Path | None, arg(metavar="FILE.png", help_behavior_hint="")] = None
    """Also draw a picture (extra plot)."""
    num_queries: int = 64
    """Measure the last so many tokens of the text."""
    max_tokens: Annotated[int | None, arg(metavar="INT")] = None
    """Use only so many tokens of the text; default all."""
    sparsity: SuppressFixed[OmitArgPrefixes[SparsityConfig]] = field(default_factory=SparsityConfig)


def _main(args: AnalysisArgs) -> None:
    if args.plot is not None:
        require_matplotlib()  # before any long work
    if args.max_tokens is not None and args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens} must be at least 1")
    text = read_text(args.prompt_file, "prompt file")
    llm = LLM(
        args.model,
        max_num_seqs=1,
        attention="lserve",
        sparsity=args.sparsity,
        kv_cache_bytes=1 << 28,  # the measurement itself uses no cache
        progress=True,
    )
    ids = llm.token_ids(text)[: args.max_tokens]
    recall = page_recall(llm, {"prompt_token_ids": ids}, num_queries=args.num_queries)
    if args.plot is not None:
        plot_page_recall(recall, args.plot)
    print(f"{len(ids)} tokens, {args.num_queries} queries; share of attention mass covered")
    print(f"policy: {recall.policy}")
    print("layer   mean    min")
    for layer, heads in enumerate(recall.mean):
        print(f"{layer:5d}  {heads.mean():.3f}  {heads.min():.3f}")
    print(f"  all  {recall.mean.mean():.3f}  {recall.mean.min():.3f}")
    if args.sparsity.prefill != "block_sparse":
        return
    prefill = prefill_recall(llm, {"prompt_token_ids": ids})
    print("block-sparse prefill: attention mass covered, blocks attended of those seen causally")
    print("layer   mass    min  density    max")
    for layer, (mass, density) in enumerate(zip(prefill.mass, prefill.density, strict=True)):
        if np.isnan(mass).all():
            print(f"{layer:5d}  every head streams")
        else:
            mean, least = np.nanmean(mass), np.nanmin(mass)
            attended, most = np.nanmean(density), np.nanmax(density)
            print(f"{layer:5d}  {mean:.3f}  {least:.3f}    {attended:.3f}  {most:.3f}")
    if not np.isnan(prefill.mass).all():
        print(f"  all  {np.nanmean(prefill.mass):.3f}  {np.nanmin(prefill.mass):.3f}", end="    ")
        print(f"{np.nanmean(prefill.density):.3f}  {np.nanmax(prefill.density):.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m lserve_jax.analysis``: prints recall by layer, writes the picture; exit code."""

    def run() -> None:
        _main(tyro.cli(AnalysisArgs, args=argv, prog="python -m lserve_jax.analysis"))

    return exit_code(run, lower="--max-tokens or --num-queries")


if __name__ == "__main__":
    sys.exit(main())

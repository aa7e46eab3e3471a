"""Exact mode beside dense attention, with Llama-3-8B's geometry, on one GPU.

    python benchmarks/exact.py [--shapes 65536x8 524288x1 131072x1] [--drafts 4 6]
                               [--draft-weights bf16 int8 int4]

Both engines are real, weights are random bf16, and prompts are not computed, as in ``decode.py``.
Random weights confirm next to no draft, so acceptance is set: tokens are forced, which drafting and
verification both follow, and a tenth of the places, drawn at random but always the same ones, is
drafted wrong. All work is done as it would be. Half of the heads draft by windows, the others by
4096 tokens. Drafts run by the bf16 weights, or by codes of them (int4 in groups of 128, the output
layer in int8). A figure is the median wall time of a burst over its tokens. Writes
``benchmarks/results/exact.json``.
"""

import dataclasses
import gc
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
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

from lserve_jax.engine import speculate
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.inputs import BurstInputs
from lserve_jax.engine.state import Burst, DecodeState

BURST = 256  # tokens: rows wait for one another at its end
ACCEPTANCE = 0.9


def spoil(tokens: Any, state: DecodeState) -> Any:
    """A tenth of the drafts, the same ones whenever they are drafted, becomes another token."""
    T = tokens.shape[1]
    place = state.position[:, None] * 64 + jnp.arange(tokens.shape[0])[:, None]  # one a draft
    keys = jax.vmap(lambda x: jax.random.fold_in(jax.random.key(0), x))
    drawn = [keys((place + 64 * (1 + i))[:, 0]) for i in range(T - 1)]
    wrong = jnp.stack([jax.vmap(jax.random.uniform)(k) for k in drawn], axis=1) >= ACCEPTANCE
    return tokens.at[:, 1:].add(wrong.astype(jnp.int32))


class SetAcceptance(UncomputedPrompts):
    """Every token is forced, and every row drafts ``drafts`` tokens, a tenth of them wrong."""

    drafts = 0
    bursts: list[Burst]

    def reset(self) -> None:
        super().reset()
        self.bursts = []

    def decode(self, inputs: BurstInputs) -> Burst:
        shape = inputs.forced.shape
        forced = np.random.default_rng(0).integers(1, 1000, shape).astype(np.int32)
        rows = np.full((shape[1],), self.drafts, np.int32)
        burst = super().decode(dataclasses.replace(inputs, forced=forced, drafts=rows))
        self.bursts.append(burst)
        return burst


def spoilt_drafts() -> None:
    """Drafts of every engine from now on are spoilt."""
    draft = speculate.draft_sparse

    def spoilt(program, params, caches, state, *rest):
        tokens, caches, attended = draft(program, params, caches, state, *rest)
        return spoil(tokens, state), caches, attended

    speculate.draft_sparse = spoilt


@dataclass(frozen=True, kw_only=True)
class Args:
    shapes: tuple[str, ...] = ("65536x8", "524288x1", "131072x1")  # context x rows
    drafts: tuple[int, ...] = (4, 6)
    draft_weights: tuple[Literal["bf16", "int8", "int4"], ...] = ("bf16",)
    bursts: int = 3  # timed ones
    output: Path = Path(__file__).parent / "results" / "exact.json"


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about = provenance()
    spoilt_drafts()
    params, rows = random_params(CONFIG), []
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    for batch in sorted({batch for _, batch in shapes}, reverse=True):
        contexts = [context for context, n in shapes if n == batch]
        longest = max(contexts) + BURST * (args.bursts + 4) + 64
        settings = [*itertools.product(args.draft_weights, args.drafts), ("bf16", None)]
        for weights, drafts in settings:
            changes: dict[str, Any] = {}
            if drafts is not None:
                changes = {"exact": True, "max_draft_tokens": drafts, "weight_group": 128}
                changes["draft_weights"] = None if weights == "bf16" else weights
            engine = build_engine(
                CONFIG,
                params,
                options(
                    None if drafts is None else LSERVE,
                    max_num_seqs=batch,
                    max_model_len=longest,
                    max_prefixes=0,
                    kv_cache_bytes=batch * (longest + 64) * 131072 * 17 // 16,
                    burst_steps=BURST,
                    prefill_chunk_size=NO_CHUNKS,
                    **changes,
                ),
                runner_class=UncomputedPrompts if drafts is None else SetAcceptance,
            )
            engine.runner.wait()
            for context in contexts:
                begin = time.perf_counter()
                prompts = [np.zeros((context,), np.int32)] * batch
                row: dict[str, Any] = {"context": context, "batch": batch, "drafts": drafts}
                row["draft_weights"] = weights if drafts else None
                if isinstance(engine.runner, SetAcceptance):
                    engine.runner.drafts = drafts
                    engine.runner.bursts.clear()
                seconds = burst_seconds(engine, prompts, args.bursts)
                times = [1e3 * t / BURST for t in seconds]
                row |= {"ms_per_token": median(times), "fastest": min(times), "slowest": max(times)}
                if isinstance(engine.runner, SetAcceptance):
                    done = engine.runner.bursts
                    # Forced tokens count as known, not as confirmed.
                    verified = sum(int(burst.verified.sum()) for burst in done)
                    made = sum(int(burst.steps.sum()) for burst in done)
                    row["tokens_per_verification"] = made / verified
                rows.append(row)
                args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
                seconds_all = time.perf_counter() - begin
                print({**row, "seconds_in_all": round(seconds_all)}, flush=True)
            del engine  # the memory of its cache is needed, and it holds itself
            gc.collect()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

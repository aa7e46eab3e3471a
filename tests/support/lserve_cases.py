"""Tiny models under LServe: which heads stream, how the others select, and their oracles."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from oracle_model import Oracle, streaming_heads
from tiny_llm import poison, tiny_config, tiny_params, write_pattern

from convert.head_shares import save_head_shares
from lserve_jax import LLM, ModelConfig, SparsityConfig
from lserve_jax.model.head_shares import MISSED_AT, HeadSensitivity


class Case(NamedTuple):
    """A model, which of its heads stream, and how the others select pages."""

    config: ModelConfig
    gates: list[list[float]]
    fraction: float
    sizes: dict[str, int]
    # What each head may list of the context, 1 being everything and 0 a streaming head; None: all
    # heads have one budget, and stream by their gates.
    shares: list[list[float]] | None = None

    def sparsity(self, pattern: str) -> SparsityConfig:
        sizes = self.sizes
        if self.shares is not None:
            sizes = sizes | {"token_budget": None, "budget_share": 1.0}
        return SparsityConfig(pattern=pattern, streaming_fraction=self.fraction, **sizes)

    def params(self) -> dict:
        return tiny_params(self.config, seed=3)

    def oracle(self) -> Oracle:
        streaming = streaming_heads(self.gates, self.fraction)
        if self.shares is not None:
            streaming = [[share == 0 for share in layer] for layer in self.shares]
        return Oracle(
            self.config,
            self.params(),
            sparsity=SparsityConfig(**self.sizes),
            streaming=streaming,
            shares=self.shares,
        )

    def write(self, directory: Path) -> str:
        """The files that make the model's heads so; the directory."""
        path = write_pattern(directory, self.gates)
        if self.shares is not None:
            shares = np.asarray(self.shares)
            save_head_shares(path, that_wants(shares), np.where(shares > 0, shares, 1.0), {})
        return path


def that_wants(shares: np.ndarray) -> HeadSensitivity:
    """A sensitivity by which a head needs exactly its share, and one of share 0 nothing."""
    worth = np.where(shares > 0, 1.0, 0.0)
    missed = np.array([np.where(shares > at, 1.0, 0.0) for at in MISSED_AT])
    return HeadSensitivity(
        streaming=worth, selecting=worth, missed=missed, name="made up", context=1024
    )


def sizes(
    page: int,
    logical: int,
    budget: int,
    reuse: int,
    windows: tuple,
    *,
    selected: int | None = None,
    forced: int = 1,
) -> dict:
    sinks_and_locals = ("decode_sink", "decode_local", "prefill_sink", "prefill_local")
    return {
        "page_size": page,
        "logical_page_size": logical,
        "selected_page_size": selected,
        "token_budget": budget,
        "reuse_interval": reuse,
        "forced_sink_pages": forced,
        **dict(zip(sinks_and_locals, windows, strict=True)),
    }


CASES = {
    # Layer 0 has no retrieval head; in layer 1 the middle one of three heads moves to the front.
    "page 16, reuse 1": Case(
        tiny_config(layers=2, kv_heads=3),
        [[0.1, 0.2, 0.1], [0.2, 0.9, 0.3]],
        5 / 6,
        sizes(16, 16, 64, 1, (16, 32, 32, 64)),
    ),
    # Layer 1 has no streaming head.
    "page 32, reuse 4": Case(
        tiny_config(layers=2, kv_heads=2, group=2),
        [[0.2, 0.9], [0.8, 0.7]],
        0.25,
        sizes(32, 16, 128, 4, (32, 64, 64, 128), selected=32),
    ),
    # From here on one layer does where nothing is between layers: half as much to compile.
    # For caches of other types, and chunks of other sizes: of three heads the first moves to the
    # end.
    "page 32, one layer": Case(
        tiny_config(layers=1, kv_heads=3, group=2),
        [[0.2, 0.9, 0.8]],
        1 / 3,
        sizes(32, 16, 128, 4, (32, 64, 64, 128), selected=32),
    ),
    # No forced pages.
    "page 64, reuse 8": Case(
        tiny_config(layers=1, kv_heads=2, group=3),
        [[0.3, 0.8]],
        0.5,
        sizes(64, 16, 192, 8, (0, 64, 64, 64), selected=64, forced=0),
    ),
    # Logical pages are selected out of pages; between two selections more than one is filled.
    "page 64, selected 16, reuse 24": Case(
        tiny_config(layers=1, kv_heads=2, group=3),
        [[0.9, 0.1]],
        0.5,
        sizes(64, 16, 128, 24, (0, 64, 64, 64)),
    ),
    "page 64, selected 32, reuse 4": Case(
        tiny_config(layers=1, kv_heads=2, group=2),
        [[0.2, 0.9]],
        0.5,
        sizes(64, 16, 128, 4, (64, 64, 64, 128), selected=32),
    ),
    # Between two selections two pages and more are filled.
    "page 16, reuse 32": Case(
        tiny_config(layers=1, kv_heads=1, group=2),
        [[0.5]],
        0.0,
        sizes(16, 16, 80, 32, (16, 16, 16, 16), forced=2),
    ),
    # Heads of every kind in one layer, in an order that moves all of them; a layer in which none
    # ranks; shares that are below the least, and one above half.
    "shares": Case(
        tiny_config(layers=3, kv_heads=4, group=2),
        [[0.5] * 4] * 3,
        1 / 3,
        sizes(64, 16, 128, 4, (64, 64, 64, 128)),
        [[1.0, 1 / 128, 0, 3 / 8], [0, 1.0, 1.0, 0], [3 / 16, 1 / 4, 3 / 8, 0]],
    ),
    "shares, page 16, reuse 12": Case(
        tiny_config(layers=2, kv_heads=3, max_len=1536),
        [[0.5] * 3] * 2,
        0.0,
        sizes(16, 16, 128, 12, (16, 16, 16, 16)),
        [[3 / 8, 1.0, 1 / 4], [1 / 8, 3 / 16, 3 / 32]],
    ),
    # The ring of LServe's own sizes.
    "page 64, logical 32": Case(
        tiny_config(layers=1, kv_heads=2, max_len=2176),
        [[0.9, 0.1]],
        0.5,
        sizes(64, 32, 256, 4, (128, 256, 128, 512)),
    ),
}


def build(case: str, directory: Path, **settings: Any) -> LLM:
    """An LLM of a case with four slots and a poisoned cache; its pattern goes to ``directory``.

    Deterministic: four rows at every step, so one decode program to compile. Tests of batches that
    shrink say otherwise.
    """
    made = CASES[case]
    pattern = made.write(directory / case.replace(" ", "_"))
    settings = {
        "max_num_seqs": 4,
        "prefill_chunk_size": 64,
        "relay": "never",
        "deterministic": True,
    } | settings
    llm = LLM(
        (made.config, made.params()),
        attention="lserve",
        sparsity=made.sparsity(pattern),
        **settings,
    )
    poison(llm)
    return llm

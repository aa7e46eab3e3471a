"""Tiny models under LServe: which heads stream, how the others select, and their oracles."""

from pathlib import Path
from typing import Any, NamedTuple

from oracle_model import Oracle, streaming_heads
from tiny_llm import poison, tiny_config, tiny_params, write_pattern

from lserve_jax import LLM, ModelConfig, SparsityConfig


class Case(NamedTuple):
    """A model, which of its heads stream, and how the others select pages."""

    config: ModelConfig
    gates: list[list[float]]
    fraction: float
    sizes: dict[str, int]

    def sparsity(self, pattern: str) -> SparsityConfig:
        return SparsityConfig(pattern=pattern, streaming_fraction=self.fraction, **self.sizes)

    def params(self) -> dict:
        return tiny_params(self.config, seed=3)

    def oracle(self) -> Oracle:
        streaming = streaming_heads(self.gates, self.fraction)
        sparsity = SparsityConfig(**self.sizes)
        return Oracle(self.config, self.params(), sparsity=sparsity, streaming=streaming)


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
    # No forced pages.
    "page 64, reuse 8": Case(
        tiny_config(layers=2, kv_heads=2, group=3),
        [[0.3, 0.8], [0.9, 0.1]],
        0.5,
        sizes(64, 16, 192, 8, (0, 64, 64, 64), selected=64, forced=0),
    ),
    # Logical pages are selected out of pages; between two selections more than one is filled.
    "page 64, selected 16, reuse 24": Case(
        tiny_config(layers=2, kv_heads=2, group=3),
        [[0.3, 0.8], [0.9, 0.1]],
        0.5,
        sizes(64, 16, 128, 24, (0, 64, 64, 64)),
    ),
    "page 64, selected 32, reuse 4": Case(
        tiny_config(layers=2, kv_heads=2, group=2),
        [[0.2, 0.9], [0.8, 0.7]],
        0.25,
        sizes(64, 16, 128, 4, (64, 64, 64, 128), selected=32),
    ),
    # Between two selections two pages and more are filled.
    "page 16, reuse 32": Case(
        tiny_config(layers=2, kv_heads=1, group=2),
        [[0.5], [0.5]],
        0.0,
        sizes(16, 16, 80, 32, (16, 16, 16, 16), forced=2),
    ),
    # The ring of LServe's own sizes.
    "page 64, logical 32": Case(
        tiny_config(layers=2, kv_heads=2, max_len=2176),
        [[0.9, 0.1], [0.4, 0.2]],
        0.75,
        sizes(64, 32, 256, 4, (128, 256, 128, 512)),
    ),
}


def build(case: str, directory: Path, **settings: Any) -> LLM:
    """An LLM of a case with four slots and a poisoned cache; its pattern goes to ``directory``.

    Deterministic: four rows at every step, so one decode program to compile. Tests of batches that
    shrink say otherwise.
    """
    made = CASES[case]
    pattern = write_pattern(directory / case.replace(" ", "_"), made.gates)
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

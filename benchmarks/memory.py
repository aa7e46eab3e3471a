"""Which GPU's memory runs which model at which context, by the engine's own memory plan.

    python benchmarks/memory.py

Computed, on any machine: no weights are made. Writes ``docs/memory.md``.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import convert
from lserve_jax.attention.cache import CacheSpec, KVDtype, cache_bytes, make_spec
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.engine.array_bytes import device_bytes
from lserve_jax.engine.head_policy import head_policy
from lserve_jax.engine.options import EngineOptions
from lserve_jax.engine.page_plan import room_for_pages
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import abstract_params, is_quantised
from lserve_jax.model.quantise import quantise_params
from pallas_kernels.api import Weight, WeightKind, cannot_pack

# MiB, as nvidia-smi says it; of consumer cards and with error correction a little less or more.
OTHERS = {"12 GB": 12288, "16 GB": 16384, "24 GB": 24576, "48 GB": 46068}
HOPPER = {"H100, 80 GB": 81559, "H200, 141 GB": 143771}
XLA_SHARE = 0.95  # XLA_PYTHON_CLIENT_MEM_FRACTION
WEIGHTS: tuple[WeightKind | None, ...] = (None, "int8", "int4")
GROUP = 128
MOST = 1 << 20  # tokens


INTRODUCTION = f"""# Which memory runs which model

Written by `python benchmarks/memory.py`: computed by the engine's memory plan, not measured.

Longest context of one request in tokens, prompt and answer together, up to 1M; *no*: the weights do
not fit, or less than 1K tokens beside them. One slot and no held prefixes (`max_num_seqs=1`,
`max_prefixes=0`), `XLA_PYTHON_CLIENT_MEM_FRACTION={XLA_SHARE}`. Of what is free beside the weights,
`memory_fraction={EngineOptions().memory_fraction}` is for keys and values, the rest for
activations. What a model was trained for may be less than what fits.

`weights="int4"` is in groups of {GROUP}, with the output layer in int8. The embedding table has the
bits of the layers, but bfloat16 where it is the output layer too, as in the two smallest models.
GPUs other than Hopper have no kernels here: they use XLA. In the order of Hopper's kernels zero
points take no room of their own, hence the second number of gigabytes; the last two columns have
it.
"""


def _geometry(
    V: int, E: int, F: int, L: int, heads: tuple[int, int], D: int = 128, *, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        vocab_size=V,
        hidden_size=E,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=D,
        max_position_embeddings=MOST,
        tie_word_embeddings=tied,
    )


MODELS = {
    "Llama-3.2-1B": _geometry(128256, 2048, 8192, 16, (32, 8), 64, tied=True),
    "Llama-3.2-3B": _geometry(128256, 3072, 8192, 28, (24, 8), tied=True),
    "Llama-3.1-8B": _geometry(128256, 4096, 14336, 32, (32, 8)),
    "Qwen3-14B": _geometry(151936, 5120, 17408, 40, (40, 8)),
    "Qwen3-32B": _geometry(151936, 5120, 25600, 64, (64, 8)),
    "Llama-3.1-70B": _geometry(128256, 8192, 28672, 80, (64, 8)),
}


@dataclass(frozen=True, kw_only=True)
class Attention:
    title: str
    sparse: bool
    kv_dtype: KVDtype


ATTENTION = (
    Attention(title="Dense attention, keys and values in bfloat16", sparse=False, kv_dtype="auto"),
    Attention(
        title="lserve, half of the heads stream, keys and values in bfloat16",
        sparse=True,
        kv_dtype="auto",
    ),
    Attention(
        title="lserve, half of the heads stream, keys and values in int8 or fp8",
        sparse=True,
        kv_dtype="int8",
    ),
    Attention(
        title="lserve, half of the heads stream, keys and values in int4",
        sparse=True,
        kv_dtype="int4",
    ),
)


def parameter_bytes(config: ModelConfig, kind: WeightKind | None, *, packed: bool) -> int:
    """Of the parameters; what is not quantised is bfloat16. ``packed``: as on a Hopper GPU."""
    params = abstract_params(config)
    if kind is not None:
        params = jax.eval_shape(lambda tree: quantise_params(tree, kind, group=GROUP), params)
    total = 0
    for leaf in jax.tree.leaves(params, is_leaf=is_quantised):
        if not isinstance(leaf, Weight):
            parts = [jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)]
        elif packed and cannot_pack(leaf) is None:  # rounded zero points lie in bytes of the scales
            parts = [leaf.codes, leaf.scale]
        else:
            parts = [part for part in leaf if part is not None]
        total += sum(device_bytes(part) for part in parts)
    return total


def half_stream(config: ModelConfig, directory: Path) -> SparsityConfig:
    """Half of the heads of every layer stream: which, is no matter here."""
    gates = np.tile(np.arange(config.num_key_value_heads) % 2, (config.num_hidden_layers, 1))
    directory.mkdir(exist_ok=True)
    convert.save_pattern(directory, gates, {"sink_size": 128, "recent_size": 256})
    return SparsityConfig(pattern=str(directory), head_shares=None, streaming_fraction=0.5)


def plan(config: ModelConfig, attention: Attention, directory: Path) -> tuple[CacheSpec, dict]:
    """Sizes of a cache with one page, and its bytes."""
    sparsity = half_stream(config, directory) if attention.sparse else None
    spec = make_spec(
        config,
        sparsity=sparsity,
        heads=head_policy(config, sparsity).budgets,
        max_model_len=MOST,
        max_num_seqs=1,
        num_pages=1,
        max_prefixes=0,
        kv_dtype=attention.kv_dtype,
    )
    return spec, cache_bytes(config, spec, jnp.bfloat16)


def longest(spec: CacheSpec, sizes: dict[str, int], free: int) -> int:
    """Tokens that one request may have where ``free`` bytes are left beside the weights."""
    room = room_for_pages(sizes, free, EngineOptions().memory_fraction)
    return room // (sizes["retrieval"] + sizes["key_stats"]) * spec.page_size


def _tokens(count: int) -> str:
    if count >= MOST:
        return "1M"
    return f"{count // 1024}K" if count >= 1024 else "no"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables(directory: Path) -> str:
    """The document. ``directory`` is for what it needs on the way."""
    weights = {
        (name, kind): [parameter_bytes(config, kind, packed=x) for x in (False, True)]
        for name, config in MODELS.items()
        for kind in WEIGHTS
    }
    lines = [INTRODUCTION]
    for attention in ATTENTION:
        head = ["model", "weights", "GB", *OTHERS, *HOPPER]
        lines += [f"## {attention.title}", "", _row(head), "|" + "---|" * len(head)]
        for name, config in MODELS.items():
            spec, sizes = plan(config, attention, directory / name)
            for kind in WEIGHTS:
                plain, packed = weights[name, kind]
                free = [int(XLA_SHARE * (mib << 20)) - plain for mib in OTHERS.values()]
                free += [int(XLA_SHARE * (mib << 20)) - packed for mib in HOPPER.values()]
                found = [_tokens(longest(spec, sizes, n)) for n in free]
                held = " / ".join(sorted({f"{x / 1e9:.1f}" for x in (plain, packed)}, reverse=True))
                lines.append(_row([name, kind or "bfloat16", held, *found]))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        text = tables(Path(scratch))
    (Path(__file__).parents[1] / "docs" / "memory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

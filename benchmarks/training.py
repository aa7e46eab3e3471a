"""What a gradient of ``logits`` costs: time and peak memory by length, SmolLM2's geometry, float32.

    python benchmarks/training.py [--lengths 1024 2048 4096] [--dense-up-to 2048]

One sequence of random tokens, random weights, next-token loss. Rows: ``dense`` is an attention that
keeps all T x T scores (as ``logits`` had until 2026-11), passed as ``attend``; ``plain`` is
``logits`` as it is, ``remat`` with ``remat=True``. Each row runs in a process of its own; its peak
is that of the resident set, with parameters and gradients. Times are of the second of two calls,
without compiling.
Writes ``benchmarks/results/training.json``.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
import tyro
from machine import provenance

from lserve_jax import ModelConfig, logits
from lserve_jax.model.llama import init_params
from lserve_jax.model.params import Attend
from lserve_jax.model.rope import rotary_angles
from pallas_kernels import api

CONFIG = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


Kind = Literal["dense", "plain", "remat"]


@dataclass(frozen=True, kw_only=True)
class Args:
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    kinds: tuple[Kind, ...] = ("dense", "plain", "remat")
    dense_up_to: int = 2048
    """Longest row of ``dense``, which takes 15 GB at 2048 and 52 GB at 4096."""
    output: Path = Path(__file__).parent / "results" / "training.json"


def dense_attend(length: int) -> Attend:
    cos, sin = rotary_angles(CONFIG, jnp.arange(length)[None], jnp.array([length]))
    seen = jnp.tril(jnp.ones((length, length), bool))

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: None) -> tuple:
        B, T, H, D = q.shape
        q, k = (api.apply_rotary(x, cos, sin) for x in (q, k))
        q, highest = q.reshape(B, T, k.shape[2], -1, D), jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bqkgd,btkd->bkgqt", q, k, precision=highest) * D**-0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        out = jnp.einsum("bkgqt,btkd->bqkgd", weights, v, precision=highest)
        return out.reshape(B, T, H, D), None

    return attend


def measure(kind: str, length: int) -> dict[str, Any]:
    params = init_params(CONFIG)
    tokens = jax.random.randint(jax.random.key(0), (1, length + 1), 0, CONFIG.vocab_size)
    how = {"attend": dense_attend(length)} if kind == "dense" else {"remat": kind == "remat"}

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        rows = logits(CONFIG, params, tokens[:, :-1], **how)
        return optax.softmax_cross_entropy_with_integer_labels(rows, tokens[:, 1:]).mean()

    step = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()
    for _ in range(2):
        start = time.perf_counter()
        value, gradient = jax.block_until_ready(step(params, tokens))
        seconds = time.perf_counter() - start
        del gradient  # else two are alive
    return {
        "kind": kind,
        "length": length,
        "loss": float(value),
        "seconds": seconds,
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(args: Args) -> None:
    about, rows = provenance(), []
    for length in args.lengths:
        for kind in args.kinds:
            if kind == "dense" and length > args.dense_up_to:
                continue
            command = [sys.executable, __file__, kind, str(length)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], flush=True)
    args.output.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in get_args(Kind):
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main(tyro.cli(Args, description=__doc__))

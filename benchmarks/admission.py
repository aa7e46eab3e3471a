"""Milliseconds on the host between a long prompt and its first chunk.

    python benchmarks/admission.py [--tokens 131072] [--runs 9]

The prompt, a list of token ids, is checked, compared with held prefixes, queued and given pages in
this time; nothing of it waits for a device. The model is one tiny layer and computes no prompt.
Writes ``benchmarks/results/admission.json``.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from machine import provenance

from lserve_jax import ModelConfig, SamplingParams
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.inputs import Chunk
from lserve_jax.engine.options import EngineOptions
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.model.llama import init_params
from lserve_jax.text_engine import TextEngine


@dataclass(frozen=True, kw_only=True)
class Args:
    tokens: int = 131072
    runs: int = 9
    output: Path = Path(__file__).parent / "results" / "admission.json"


class FirstChunk(ModelRunner):
    """Notes when chunks arrive, and computes none."""

    def reset(self) -> None:
        super().reset()
        self.began: list[float] = []

    def prefill(self, chunk: Chunk) -> tuple[jax.Array, None, None]:
        self.began.append(time.perf_counter())
        return jnp.zeros((self.config.vocab_size,)), None, None


def main(args: Args) -> None:
    config = ModelConfig(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=args.tokens + 64,
    )
    options = EngineOptions(max_num_seqs=1)
    engine = build_engine(config, init_params(config), options, runner_class=FirstChunk)
    text = TextEngine(engine, None)
    sampling = SamplingParams(temperature=0, max_tokens=1)
    rng, times = np.random.default_rng(0), []
    for _ in range(args.runs + 1):
        prompt = {"prompt_token_ids": rng.integers(0, config.vocab_size, args.tokens).tolist()}
        start = time.perf_counter()
        text.submit(prompt, sampling)
        while text.has_unfinished_requests:
            text.step()
        times.append(1e3 * (engine.runner.began[0] - start))
        engine.runner.began.clear()
    times = times[1:]  # the first one compiles
    result = {
        **provenance(),
        "tokens": args.tokens,
        "milliseconds": median(times),
        "fastest": min(times),
        "slowest": max(times),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{args.tokens} ids: {median(times):.1f} ms ({min(times):.1f}-{max(times):.1f})")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

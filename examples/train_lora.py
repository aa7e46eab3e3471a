"""A LoRA adapter trained on a text, in plain JAX: packed rows, remat, optax, PEFT's format out.

    python examples/train_lora.py --text book.txt --output adapter [--model smollm2-135m-instruct]

The base stays as it is; only the adapter's matrices and their optimiser state are trained. Load it
with ``convert.load(model, adapter="adapter")``, or with PEFT.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import convert
from lserve_jax import logits
from lserve_jax.model import lora


@dataclass(frozen=True, kw_only=True)
class Args:
    text: Path
    output: Path
    model: str = "smollm2-135m-instruct"
    steps: int = 100
    batch: int = 4
    length: int = 512
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-3
    seed: int = 0


def main(args: Args) -> None:
    source = convert.resolve(args.model, progress=True)
    config, params = convert.load(source, dtype=jnp.float32, progress=True)
    tokenizer = convert.load_tokenizer(source.path)
    if tokenizer is None:
        raise SystemExit(f"model {args.model!r} has no tokenizer")
    ids = np.asarray(tokenizer.encode(args.text.read_text(encoding="utf-8")), np.int32)
    if len(ids) <= args.length:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, fewer than --length {args.length}")
    adapter = lora.init_adapter(config, rank=args.rank, seed=args.seed)
    optimizer = optax.adamw(args.learning_rate)
    state = optimizer.init(adapter)

    def loss(adapter: lora.Adapter, params: dict, rows: jax.Array) -> jax.Array:
        merged = lora.merge(params, adapter, alpha=args.alpha)
        scores = logits(config, merged, rows[:, :-1], remat=True)
        return optax.softmax_cross_entropy_with_integer_labels(scores, rows[:, 1:]).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter: lora.Adapter, state: optax.OptState, params: dict, rows: jax.Array) -> tuple:
        value, gradient = jax.value_and_grad(loss)(adapter, params, rows)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    rng = np.random.default_rng(args.seed)
    for i in range(args.steps):
        starts = rng.integers(0, len(ids) - args.length, args.batch)
        rows = jnp.asarray(np.stack([ids[s : s + args.length + 1] for s in starts]))
        adapter, state, value = step(adapter, state, params, rows)
        print(f"step {i + 1} loss {float(value):.4f}", flush=True)
    convert.save_adapter(args.output, config, adapter, alpha=args.alpha, base_model=args.model)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

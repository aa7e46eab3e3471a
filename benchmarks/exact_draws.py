"""Whether exact mode draws from dense attention's distribution: chi-square tests of many answers.

    python benchmarks/exact_draws.py [--draws 50000]

One prompt, answered over and over at temperature 1 by a tiny random model, each time with another
seed: by dense attention, by dense attention with other seeds, in exact mode with other seeds, and
by the sparse steps alone that draft there. Each is compared with the first: how often every token
came at each place, and every pair of neighbours. p values of the second and third are draws from
[0, 1]; those of the last say what the test can see. Runs on a CPU in a few minutes; writes
``benchmarks/results/exact_draws.json``.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax.scipy.special import gammaincc
from machine import provenance

from lserve_jax import LLM, ModelConfig, SamplingParams, SparsityConfig
from lserve_jax.engine.request import PromptIds, TokenOutput
from lserve_jax.model.llama import init_params

# Cells of a table with fewer answers, those of both sides together, count as one.
LEAST_IN_CELL = 10


@dataclass(frozen=True, kw_only=True)
class Args:
    draws: int = 50_000
    tokens: int = 6
    prompt: int = 513
    rows: int = 128
    drafts: int = 3
    output: Path = Path(__file__).parent / "results" / "exact_draws.json"


def model() -> tuple[ModelConfig, dict]:
    """Small embeddings and sharp attention: what is attended decides what comes next."""
    config = ModelConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    )
    params = init_params(config, 3)
    params["embed_tokens"]["embedding"] *= 0.25
    for layer in params["layers"].values():
        layer["self_attn"]["qkv_proj"]["kernel"] *= 1.5
    return config, params


def settings_of(name: str, args: Args) -> dict[str, Any]:
    if name.startswith("dense"):
        return {}
    exact = {"exact": True, "max_draft_tokens": args.drafts} if name == "exact" else {}
    sparsity = SparsityConfig(token_budget=48, page_size=64, logical_page_size=16)
    return {"attention": "lserve", "sparsity": sparsity} | exact


def draw(llm: LLM, prompt: list[int], args: Args, first_seed: int) -> tuple[np.ndarray, dict]:
    """Answers ``[draws, tokens]``, and what drafting came to."""
    engine, answers = llm.engine, np.full((args.draws, args.tokens), -1)
    ids = PromptIds.check(prompt, engine.config.vocab_size)
    sampling = SamplingParams(max_tokens=args.tokens, temperature=1.0, ignore_eos=True)
    prefix = engine.add_prefix(prompt[:-1])
    filled, added, ends = np.zeros(args.draws, int), 0, []

    def put(output: TokenOutput) -> None:
        row, new = int(output.request_id), output.token_ids
        answers[row, filled[row] : filled[row] + len(new)] = new
        filled[row] += len(new)
        if output.finish_reason is not None:
            ends.append(output.metrics)

    while added < args.draws or engine.has_unfinished_requests:
        while added < args.draws and engine.room:
            engine.add_request(str(added), ids, sampling, seed=first_seed + added)
            added += 1
        for output in engine.step():
            put(output)
    prefix.release()
    assert (answers >= 0).all()  # each answer has all of its tokens
    drafted = sum(end.drafted_tokens for end in ends)
    confirmed = sum(end.confirmed_tokens for end in ends)
    return answers, {"drafted": drafted, "acceptance": confirmed / max(drafted, 1)}


def chi_square(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of two samples of cell numbers, as many in each: statistic, degrees of freedom and p."""
    size = max(a.max(), b.max()) + 1
    counts = np.stack([np.bincount(x, minlength=size) for x in (a, b)]).astype(float)
    rare = counts.sum(axis=0) < LEAST_IN_CELL
    table = np.concatenate([counts[:, ~rare], counts[:, rare].sum(axis=1)[:, None]], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    # With as many draws on both sides half of a cell is expected on each.
    statistic = float(((table[0] - table[1]) ** 2 / table.sum(axis=0)).sum())
    freedom = table.shape[1] - 1
    return {
        "chi_square": statistic,
        "degrees_of_freedom": freedom,
        "p": float(gammaincc(freedom / 2, statistic / 2)),
    }


def compare(wanted: np.ndarray, got: np.ndarray, vocab: int) -> dict[str, list[dict]]:
    places = wanted.shape[1]
    tokens = [chi_square(wanted[:, i], got[:, i]) for i in range(places)]
    pairs = [
        chi_square(*(x[:, i] * vocab + x[:, i + 1] for x in (wanted, got)))
        for i in range(places - 1)
    ]
    return {"tokens": tokens, "pairs": pairs}


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    config, params = model()
    prompt = np.random.default_rng(1).integers(0, config.vocab_size, args.prompt).tolist()
    about, rows, dense = provenance(), [], None
    for number, name in enumerate(("dense", "dense, other seeds", "exact", "sparse")):
        llm = LLM(
            (config, jax.tree.map(lambda x: x, params)),
            dtype="float32",
            max_num_seqs=args.rows,
            max_model_len=args.prompt + args.tokens,
            max_prefixes=1,
            relay="never",
            burst_steps=8,
            **settings_of(name, args),
        )
        begin = time.perf_counter()
        answers, drafting = draw(llm, prompt, args, first_seed=number * args.draws)
        seconds = time.perf_counter() - begin
        row = {"setting": name, "draws": args.draws, "seconds": seconds, **drafting}
        if dense is None:
            dense = answers
        else:
            row |= compare(dense, answers, config.vocab_size)
            for kind in ("tokens", "pairs"):
                print(name, kind, "p =", *(f"{test['p']:.3g}" for test in row[kind]), flush=True)
        rows.append(row)
        print(f"{name}: {seconds:.0f} s, {drafting}", flush=True)
        args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

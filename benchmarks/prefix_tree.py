"""How long a look into the prefix tree takes: milliseconds of a match, and of an insertion.

    python benchmarks/prefix_tree.py [--nodes 100000] [--pages 512]

Prompts are random token ids, in groups that share their first half. No model and no device: the
tree is bookkeeping on the host. Writes ``benchmarks/results/prefix_tree.json``.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro
from machine import provenance

from lserve_jax.engine.pages import PagePool
from lserve_jax.engine.prefix_tree import PrefixTree

PAGE_SIZE = 64
GROUP = 16  # prompts that share their first half


@dataclass(frozen=True, kw_only=True)
class Args:
    nodes: int = 100_000
    """Least nodes of the tree."""
    pages: int = 512
    """Pages of a prompt."""
    looks: int = 200
    output: Path = Path(__file__).parent / "results" / "prefix_tree.json"


def prompts(args: Args, rng: np.random.Generator) -> list[np.ndarray]:
    """Random prompts whose pages are ``args.nodes`` nodes, each with a token behind them."""
    half = args.pages // 2
    found, nodes = [], 0
    while nodes < args.nodes:
        beginning = rng.integers(0, 1 << 17, half * PAGE_SIZE, dtype=np.int32)
        nodes += half
        for _ in range(GROUP):
            own = (args.pages - half) * PAGE_SIZE + 1
            rest = rng.integers(0, 1 << 17, own, dtype=np.int32)
            found.append(np.concatenate([beginning, rest]))
            nodes += args.pages - half
    return found


def milliseconds(seconds: list[float]) -> dict[str, float]:
    found = {"median": median(seconds), "least": min(seconds), "most": max(seconds)}
    return {name: 1e3 * value for name, value in found.items()}


def main(args: Args) -> None:
    rng = np.random.default_rng(0)
    known = prompts(args, rng)
    tree = PrefixTree(
        PagePool(len(known) * args.pages),
        PagePool(0),
        page_size=PAGE_SIZE,
        grain=1,
        window=None,
    )
    inserting, matching = [], []
    for prompt in known:
        pages = tree.pool.take(args.pages)
        began = time.perf_counter()
        node, held, _ = tree.insert(None, None, prompt, pages, [-1] * args.pages)
        inserting.append(time.perf_counter() - began)
        tree.pool.release(held)
        tree.unlock(node)
    for number in rng.integers(0, len(known), args.looks):
        began = time.perf_counter()
        node = tree.match(known[number], None)
        matching.append(time.perf_counter() - began)
        assert node is not None and node.depth == args.pages
    result: dict[str, Any] = {
        **provenance(),
        "nodes": tree.num_nodes,
        "pages": args.pages,
        "match_ms": milliseconds(matching),
        "insert_ms": milliseconds(inserting),
    }
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

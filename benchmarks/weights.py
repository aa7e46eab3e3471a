"""What quantised weights cost: perplexity and agreement of every kind beside the model as it is.

    python benchmarks/weights.py [--model smollm2-135m-instruct] [--windows 8]

Windows of two texts: 512 tokens are prefilled and the next 256 scored by decode steps, the same
ones for every kind. Differences are paired; the interval is that of 95 % over windows' means.
Writes ``benchmarks/results/weights.json``.
"""

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from machine import provenance

from lserve_jax import LLM
from lserve_jax.engine.scoring import score
from lserve_jax.eval.prompts import read_text
from pallas_kernels.api import WEIGHT_KINDS

PREFILLED, SCORED = 512, 256


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "smollm2-135m-instruct"
    windows: int = 8  # of each text
    dtype: Literal["float32", "bfloat16"] = "float32"
    output: Path = Path(__file__).parent / "results" / "weights.json"


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about, rows = provenance(), []
    base: dict[str, list] = {}
    for kind in (None, *WEIGHT_KINDS):
        llm = LLM(
            args.model,
            dtype=args.dtype,
            max_num_seqs=4,
            max_model_len=PREFILLED + SCORED + 1,
            kv_cache_bytes=1 << 29,
            weights=kind,
        )
        assert llm.tokenizer is not None  # the model has one
        for text in ("documentation", "stories"):
            ids = read_text(llm.tokenizer, text, PREFILLED + SCORED)
            room = len(ids) - PREFILLED - SCORED
            starts = [room * i // max(args.windows - 1, 1) for i in range(args.windows)]
            prompts = [ids[s : s + PREFILLED] for s in starts]
            continuations = [ids[s + PREFILLED : s + PREFILLED + SCORED] for s in starts]
            scores = score(llm.engine, prompts, continuations)
            base.setdefault(text, scores)
            change = [
                float(a.logprobs.mean() - b.logprobs.mean())
                for a, b in zip(base[text], scores, strict=True)
            ]
            row = {
                "weights": kind,
                "text": text,
                "parameter_bytes": llm.memory_plan()["parameters"],
                "perplexity": float(np.exp(-np.mean([s.logprobs.mean() for s in scores]))),
                "nats_from_unquantised": float(np.mean(change)),
                "interval": 1.96 * float(np.std(change, ddof=1)) / len(change) ** 0.5,
                "same_likeliest": float(
                    np.mean(
                        [
                            (a.likeliest == b.likeliest).mean()
                            for a, b in zip(base[text], scores, strict=True)
                        ]
                    )
                ),
                "tokens": args.windows * SCORED,
            }
            rows.append(row)
            args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            print(row, flush=True)
        del llm  # it holds itself
        gc.collect()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

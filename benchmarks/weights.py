"""What 8 and 4 bits cost: perplexity and agreement of weights, of prefill's products, of keys.

    python benchmarks/weights.py [--model smollm2-135m-instruct] [--windows 8]
    python benchmarks/weights.py --weights --prefill-dtypes int8 fp8 --output FILE
    python benchmarks/weights.py --weights --kv-dtypes int8 fp8 int4 --output FILE
    python benchmarks/weights.py --untied --weights int8 int4 --tables int8 int4 --output FILE

Windows of two texts: 512 tokens are prefilled and the next 256 scored by decode steps, the same
ones for every setting. "prompt" is of the 511 that prefill predicts itself. The first setting is
the model as it is; differences from it are paired, and intervals those of 95 % over windows' means.
A type of prefill's products is run with weights as they are and with weights of that type, one of
keys and values with weights as they are. ``--untied`` gives a tied model an output layer of its
own, with the table's numbers, so that the embedding table is rounded too; ``--tables`` rounds it
alone. Writes ``benchmarks/results/weights.json``.
"""

import dataclasses
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from machine import provenance

import convert
from lserve_jax import LLM, RequestOutput, SamplingParams
from lserve_jax.engine.scoring import score
from lserve_jax.eval.prompts import read_text
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params
from pallas_kernels.api import WEIGHT_KINDS, KVKind, W8A8Kind, WeightKind, quantize_weight

PREFILLED, SCORED = 512, 256


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "smollm2-135m-instruct"
    windows: int = 8  # of each text
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: tuple[WeightKind, ...] = WEIGHT_KINDS
    prefill_dtypes: tuple[W8A8Kind, ...] = ()
    kv_dtypes: tuple[KVKind, ...] = ()
    untied: bool = False
    tables: tuple[Literal["int8", "int4"], ...] = ()
    weight_group: int = 32
    output: Path = Path(__file__).parent / "results" / "weights.json"


def interval(change: np.ndarray) -> float:
    return 1.96 * float(np.std(change, ddof=1)) / len(change) ** 0.5


def own_logprobs(output: RequestOutput) -> list[float]:
    """Of a prompt's tokens but the first."""
    rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [row[token] for token, row in rows]


def untied(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model with an output layer of its own."""
    head = {"kernel": params["embed_tokens"]["embedding"].T}
    return dataclasses.replace(config, tie_word_embeddings=False), params | {"lm_head": head}


def with_table(params: Params, kind: WeightKind, group: int) -> Params:
    """The same parameters with rows of the embedding table rounded."""
    table = quantize_weight(params["embed_tokens"]["embedding"], kind=kind, group=group, axis=1)
    return params | {"embed_tokens": {"embedding": table}}


def main(args: Args) -> None:
    if args.tables and not args.untied:
        raise ValueError("--tables needs --untied: a table that is the output layer stays as it is")
    source = convert.resolve(args.model)
    tokenizer = convert.load_tokenizer(source.path)
    assert tokenizer is not None  # the model has one
    config, params = convert.load(source, dtype=args.dtype)
    if args.untied:
        config, params = untied(config, params)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about, rows = provenance(), []
    base: dict[str, tuple[list, list]] = {}
    settings = [{}, *({"weights": kind} for kind in args.weights)]
    for kind in args.prefill_dtypes:
        settings += [{"prefill_dtype": kind}, {"weights": kind, "prefill_dtype": kind}]
    settings += [{"kv_dtype": kind} for kind in args.kv_dtypes]
    settings += [{"table": kind} for kind in args.tables]
    for setting in settings:
        options = {"weights": None, "prefill_dtype": None, "kv_dtype": "auto"} | setting
        table = options.pop("table", None)
        tree = params if table is None else with_table(params, table, args.weight_group)
        llm = LLM(
            (config, tree),
            tokenizer=tokenizer,
            dtype=args.dtype,
            max_num_seqs=4,
            max_model_len=PREFILLED + SCORED + 1,
            kv_cache_bytes=1 << 29,
            weight_group=args.weight_group,
            **options,
        )
        for text in ("documentation", "stories"):
            ids = read_text(tokenizer, text, PREFILLED + SCORED)
            room = len(ids) - PREFILLED - SCORED
            starts = [room * i // max(args.windows - 1, 1) for i in range(args.windows)]
            prompts = [ids[s : s + PREFILLED] for s in starts]
            continuations = [ids[s + PREFILLED : s + PREFILLED + SCORED] for s in starts]
            scores = score(llm.engine, prompts, continuations)
            read = llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                SamplingParams(max_tokens=1, prompt_logprobs=0),
            )
            of_prompts = [own_logprobs(output) for output in read]
            first_scores, first_prompts = base.setdefault(text, (scores, of_prompts))
            change = [
                float(a.logprobs.mean() - b.logprobs.mean())
                for a, b in zip(first_scores, scores, strict=True)
            ]
            prompt_change = np.mean(first_prompts, axis=1) - np.mean(of_prompts, axis=1)
            row = {
                **options,
                "table": table,
                "text": text,
                "parameter_bytes": llm.memory_plan()["parameters"],
                "token_bytes": llm.engine.units.token * llm.engine.units.kv_heads,
                "perplexity": float(np.exp(-np.mean([s.logprobs.mean() for s in scores]))),
                "nats_from_unquantised": float(np.mean(change)),
                "interval": interval(np.array(change)),
                "same_likeliest": float(
                    np.mean(
                        [
                            (a.likeliest == b.likeliest).mean()
                            for a, b in zip(first_scores, scores, strict=True)
                        ]
                    )
                ),
                "prompt_perplexity": float(np.exp(-np.mean(of_prompts))),
                "prompt_nats_from_unquantised": float(prompt_change.mean()),
                "prompt_interval": interval(prompt_change),
                "tokens": args.windows * SCORED,
            }
            rows.append(row)
            args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            print(row, flush=True)
        del llm  # it holds itself
        gc.collect()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""One tiny model for tests of the engine, with a pool of pages that its slots can exhaust.

A retrieval and a streaming head, and 20 pages that four slots can want 64 of. Caches hold NaN
before anything runs. ``oracle`` is the float64 model that outputs are compared with.
"""

from typing import Any

from oracle_model import Oracle
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    check_pages,
    poison,
    tiny_config,
    tiny_params,
)

from lserve_jax import LLM, RequestOutput, SamplingParams, SparsityConfig
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.request import TokenOutput

P, PAGES, BUDGET, C = 16, 20, 48, 4
# One retrieval head, float32: keys, values and kmax, kmin of one logical page a page.
PAGE_BYTES = (2 * P + 2) * 16 * 4
SIZES = {
    "page_size": P,
    "token_budget": BUDGET,
    "reuse_interval": C,
    "decode_sink": 16,
    "decode_local": 32,
    "prefill_sink": 16,
    "prefill_local": 64,
}
CONFIG = tiny_config(layers=1, kv_heads=2, max_len=256)
ORACLE = {"atol": 2e-5, "rtol": 0}


def build(pattern: str, **settings: Any) -> LLM:
    """All four slots at every step, so one program a mode to compile, unless told otherwise."""
    settings = {
        "max_num_seqs": 4,
        "prefill_chunk_size": 64,
        "burst_steps": 8,
        "relay": "never",
        "deterministic": True,
    } | settings
    llm = LLM(
        (CONFIG, tiny_params(CONFIG)),
        attention="lserve",
        sparsity=SparsityConfig(pattern=pattern, **SIZES),
        kv_cache_bytes=PAGES * PAGE_BYTES,
        **settings,
    )
    poison(llm)
    return llm


def oracle(**changes: Any) -> Oracle:
    sparsity = SparsityConfig(**SIZES | changes)
    return Oracle(CONFIG, tiny_params(CONFIG), sparsity=sparsity, streaming=[[True, False]])


def greedy(max_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=VOCAB, **settings)


def run(llm: LLM, prompts: list[list[int]], sampling: Any, **settings: Any) -> list[RequestOutput]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, **settings)
    check_nothing_left(llm.engine)
    return outputs


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def drain(engine: Engine) -> list[TokenOutput]:
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
        check_pages(engine)
    return outputs

"""Scoring many short texts: ``LLM.score`` beside ``logits`` of one text at a time.

    python benchmarks/scores.py

Texts are random token ids, of lengths spread evenly around their mean: what the tokens are changes
no time. The first run of each side compiles and is given by itself; the least of the others counts,
since work of others only adds. Both sides must give the same log probabilities but for rounding.

Prints a table and writes ``benchmarks/results/scores.json``.
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from machine import about, provenance

import convert
from lserve_jax import LLM, logits

HERE = Path(__file__).resolve().parent
# Root mean square in float32. Rounding makes 1e-5, a single token may differ by 1e-3
# (docs/rollouts.md); a key too many or too few changes most tokens by more than 1e-2.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "smollm2-135m-instruct"
    """Model to run, as for lserve_jax.generate."""
    texts: int = 200
    tokens: int = 20_337
    """Of all texts together."""
    alone: int = 10
    """Texts that are also run one by one, padded to a multiple of 64."""
    runs: int = 3
    """Runs of LLM.score, after one that compiles."""
    output: Path = HERE / "results" / "scores.json"


def make_texts(count: int, tokens: int, vocab_size: int) -> list[np.ndarray]:
    """Random texts from half to one and a half of their mean length, ``tokens`` in all."""
    rng = np.random.default_rng(0)
    mean = tokens / count
    ends = np.linspace(0.5 * mean, 1.5 * mean, count).cumsum().round().astype(int)
    lengths = np.diff(ends, prepend=0)
    lengths[-1] += tokens - lengths.sum()
    return [rng.integers(0, vocab_size, n).astype(np.int32) for n in rng.permutation(lengths)]


def main(args: Args) -> None:
    llm = LLM(args.model, max_num_seqs=1, kv_cache_bytes=1 << 26)
    texts = make_texts(args.texts, args.tokens, llm.config.vocab_size)
    prompts = [{"prompt_token_ids": text} for text in texts]
    seconds, cpu_seconds = [], []
    for _ in range(args.runs + 1):
        begin, cpu = time.perf_counter(), time.process_time()
        scores = llm.score(prompts)
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu)
        print(f"LLM.score: {seconds[-1]:.1f} s, of CPU {cpu_seconds[-1]:.1f} s", flush=True)
    params = convert.load(args.model, dtype=llm.dtype)[1]

    @jax.jit
    def judge(params, tokens, following):
        predicted = jax.nn.log_softmax(logits(llm.config, params, tokens)[0])
        return jnp.take_along_axis(predicted, following[:, None], axis=1)[:, 0]

    alone, gaps = [], []
    for run in range(2):  # the first compiles
        begin = time.perf_counter()
        for text, new in zip(texts[: args.alone], scores, strict=False):
            padded = np.zeros(-(-len(text) // 64) * 64, np.int32)
            padded[: len(text)] = text
            given = np.asarray(judge(params, padded[None], np.roll(padded, -1)))
            gaps.append(given[: len(text) - 1] - new.logprobs)
        alone.append(time.perf_counter() - begin)
        print(f"logits of {args.alone} texts, run {run}: {alone[-1]:.1f} s", flush=True)
    gap = np.concatenate(gaps)
    rms = float(np.sqrt(np.mean(gap * gap)))
    if llm.dtype == jnp.float32 and not rms <= TOLERANCE:
        raise ValueError(f"score and logits differ by {rms:.1e} (root mean square)")
    result = {
        **provenance(),
        "model": args.model,
        "dtype": jnp.dtype(llm.dtype).name,
        "texts": args.texts,
        "tokens": args.tokens,
        "score_seconds": min(seconds[1:]),
        "score_cpu_seconds": min(cpu_seconds[1:]),  # of all threads together
        "score_first_seconds": seconds[0],
        "alone_texts": args.alone,
        "alone_tokens": int(sum(map(len, texts[: args.alone]))),
        "alone_seconds": alone[1],
        "largest_difference": float(np.abs(gap).max()),
        "rms_difference": rms,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    speeds = args.tokens / min(seconds[1:]), result["alone_tokens"] / alone[1]
    print(f"{about(result)}\n{speeds[0]:.0f} and {speeds[1]:.0f} tokens a second; {rms=:.1e}")


if __name__ == "__main__":
    main(tyro.cli(Args))

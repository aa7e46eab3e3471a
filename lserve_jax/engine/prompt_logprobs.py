"""What the model thinks of a prompt's own tokens, out of the prefill that runs them anyway."""

from collections.abc import Callable

from jax import lax
from jaxtyping import Array, Float, Int

from lserve_jax.engine.sampling import token_logprobs, top_logprobs
from lserve_jax.engine.state import Sample

# Of logits that exist at a time. Those of a chunk of 8192 tokens and a vocabulary of 49,152 would
# be 1.6 GB.
_BLOCK_BYTES = 1 << 26


def judge_tokens(
    unembed: Callable[[Array], Array],
    hidden: Float[Array, "T E"],
    following: Int[Array, " T"],
    top: int,
    vocab_size: int,
) -> Sample:
    """Log probabilities of the token ``following`` each position, and of the ``top`` likeliest.

    ``unembed`` makes logits ``[n, V]`` (float32) of hidden states ``[n, E]``. T is a power of two.
    For use under ``jit``. Logits exist for a block of positions at a time.
    """

    def judge(block: tuple[Array, Array]) -> Sample:
        hidden, following = block
        logits = unembed(hidden)
        ids, values = top_logprobs(logits, top)
        return Sample(
            token=following,
            logprob=token_logprobs(logits, following),
            top_ids=ids,
            top_logprobs=values,
        )

    T = following.shape[0]
    most = max(_BLOCK_BYTES // (4 * vocab_size), 1)
    rows = min(1 << (most.bit_length() - 1), T)
    blocks = hidden.reshape(T // rows, rows, -1), following.reshape(T // rows, rows)
    judged = lax.map(judge, blocks)
    return Sample(
        token=following,
        logprob=judged.logprob.reshape(T),
        top_ids=judged.top_ids.reshape(T, -1),
        top_logprobs=judged.top_logprobs.reshape(T, -1),
    )

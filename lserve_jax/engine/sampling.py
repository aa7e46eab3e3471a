"""From logits to the next token: how a batch of rows is sampled.

A row is one completion. ``SamplingParams`` is what its request says; ``sampling_row`` makes a row
of it and ``SamplingArrays`` holds B rows on the device, where the pure function ``sample`` serves
them all. What no row of a batch uses is left out when it is traced: ``SamplingMode``.

Names and meaning are vLLM's. The order of operations on a row's logits is vLLM's too:

1. ``logit_bias`` is added, and what ``allowed_token_ids``, ``bad_words`` or ``structured_outputs``
   do not allow is impossible (``token_rules.py``);
2. penalties: repetition, then frequency, then presence;
3. while fewer than ``min_tokens`` tokens are out, stop ids are impossible;
4. temperature 0: the argmax of these logits, and nothing below applies; else divide by it;
5. ``min_p``, then ``top_k``, then ``top_p`` (of the probabilities renormalised over what is left);
6. draw.

Log probabilities are those of the model itself, before step 1.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lserve_jax.checks import check_integer
from lserve_jax.engine.token_rules import TokenRules
from lserve_jax.sampling_params import SamplingParams

MAX_STOP_IDS = 32  # of one request, end-of-text ids included


@dataclass(frozen=True, kw_only=True)
class SamplingMode:
    """What some row of a batch uses; the rest is not computed. Static under ``jit``.

    A mode that covers more than the rows use gives the same tokens, only slower.
    """

    greedy_only: bool = False  # no row draws
    filters: bool = True  # some row uses top_k or top_p, so the vocabulary is ranked
    penalties: bool = False  # some row has penalties, so token counts are needed
    top_logprobs: int = 0  # N: no row asks for more top log probabilities

    @classmethod
    def of(cls, batch: Iterable[SamplingParams]) -> Self:
        """The least mode that covers ``batch``."""
        batch = tuple(batch)
        wanted = max((params.logprobs or 0 for params in batch), default=0)
        return cls(
            greedy_only=all(params.is_greedy for params in batch),
            filters=any(params.uses_filters for params in batch),
            penalties=any(params.uses_penalties for params in batch),
            top_logprobs=rounded_top(wanted),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingArrays:
    """The sampling parameters of B rows on the device. S is the room for stop ids."""

    temperature: Float[Array, " B"]  # float32; 0 where the row is greedy
    top_k: Int[Array, " B"]  # int32; 0 keeps all
    top_p: Float[Array, " B"]  # float32
    min_p: Float[Array, " B"]  # float32
    repetition_penalty: Float[Array, " B"]  # float32
    presence_penalty: Float[Array, " B"]  # float32
    frequency_penalty: Float[Array, " B"]  # float32
    seed: UInt32[Array, "B 2"]  # key data of the row's random stream
    min_tokens: Int[Array, " B"]  # int32
    stop_token_ids: Int[Array, "B S"]  # int32, end-of-text ids included; filled up with -1

    @classmethod
    def empty(cls, num_rows: int, max_stop_ids: int) -> Self:
        """``num_rows`` greedy rows without stop ids, with room for ``max_stop_ids`` (S) each."""
        row = sampling_row(SamplingParams(temperature=0), eos_token_ids=(), default_seed=0)
        row["stop_token_ids"] = np.full(max_stop_ids, -1, np.int32)
        return cls(
            **{name: jnp.asarray(np.stack([value] * num_rows)) for name, value in row.items()}
        )

    def with_rows(self, rows: Sequence[tuple[int, Mapping[str, np.ndarray]]]) -> "SamplingArrays":
        """A copy with other rows: (index, row made by ``sampling_row``), at least one.

        Compiled once for each number of rows, so the last may be given again.

        Raises ``ValueError`` if there is no such row or it has more stop ids than there is room.
        """
        num_rows, room = self.stop_token_ids.shape
        filled = []
        for index, row in rows:
            if not 0 <= index < num_rows:
                raise ValueError(f"row {index} must lie in [0, {num_rows})")
            stop_ids = row["stop_token_ids"]
            if len(stop_ids) > room:
                raise ValueError(
                    f"{len(stop_ids)} stop ids, those that end a text included, exceed the room "
                    f"for {room}"
                )
            stop_ids = np.pad(stop_ids, (0, room - len(stop_ids)), constant_values=-1)
            filled.append({**row, "stop_token_ids": stop_ids})
        new = {name: np.stack([row[name] for row in filled]) for name in filled[0]}
        return _set_rows(self, np.array([index for index, _ in rows], np.int32), new)


@jax.jit
def _set_rows(arrays: SamplingArrays, indices: Int[Array, " R"], rows: dict[str, Array]):
    return SamplingArrays(
        **{name: getattr(arrays, name).at[indices].set(value) for name, value in rows.items()}
    )


def check_stop_ids(params: SamplingParams, eos_token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises ``ValueError`` for a stop id outside the vocabulary, and for more than there is room.

    End-of-text ids take room too.
    """
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise ValueError(f"stop token id {token} is outside the vocabulary [0, {vocab_size})")
    count = len({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})
    if count > MAX_STOP_IDS:
        raise ValueError(f"{count} stop token ids, end-of-text ids included, exceed {MAX_STOP_IDS}")


def sampling_row(
    params: SamplingParams,
    *,
    eos_token_ids: Sequence[int],
    default_seed: int,
    completion: int = 0,
) -> dict[str, np.ndarray]:
    """One row of ``SamplingArrays`` on the host: its fields without their B axis.

    ``stop_token_ids`` has as many entries as there are ids. ``default_seed`` is used if the
    request has no seed of its own and should differ from request to request. ``completion``
    numbers the ``n`` completions of a request, so that each draws from a random stream of its own.

    Raises ``ValueError`` for a seed or a number that is no integer of at least 0.
    """
    default_seed = check_integer("seed", default_seed, 0, most=math.inf)
    completion = check_integer("completion", completion, 0)
    stop_ids = dict.fromkeys(
        (*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids))
    )
    seed = default_seed if params.seed is None else params.seed
    # SeedSequence hashes, so that neighbouring seeds and completions have unrelated keys; NumPy
    # promises that its result stays the same.
    key_data = np.random.SeedSequence([seed, completion]).generate_state(2, np.uint32)
    return {
        "temperature": np.asarray(0 if params.is_greedy else params.temperature, np.float32),
        "top_k": np.asarray(max(params.top_k, 0), np.int32),
        "top_p": np.asarray(params.top_p, np.float32),
        "min_p": np.asarray(params.min_p, np.float32),
        "repetition_penalty": np.asarray(params.repetition_penalty, np.float32),
        "presence_penalty": np.asarray(params.presence_penalty, np.float32),
        "frequency_penalty": np.asarray(params.frequency_penalty, np.float32),
        "seed": key_data,
        "min_tokens": np.asarray(params.min_tokens, np.int32),
        "stop_token_ids": np.array([*stop_ids], np.int32),
    }


def sample(
    logits: Float[Array, "B V"],
    arrays: SamplingArrays,
    *,
    step: Int[Array, " B"],
    mode: SamplingMode,
    output_counts: Int[Array, "B V"] | None = None,
    prompt_mask: Bool[Array, "B V"] | None = None,
    rules: TokenRules | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of every row (int32), and the model's log probability of it (float32).

    ``logits`` are float32. ``step`` (int32) is the number of tokens generated so far for the row.
    ``output_counts`` (int32: how often each token has been generated) and ``prompt_mask`` (which
    tokens the prompt holds) are read if ``mode.penalties`` is set. ``rules`` say which tokens the
    rows may have; None: any. Pure; for use under ``jit`` with ``mode`` static.

    A drawn token depends on the row's seed, ``step`` and logits only, not on the row's place in
    the batch or on other rows. Where logits tie the lower id comes first, for the argmax as for
    ``top_k``, which keeps exactly k.

    Raises ``ValueError`` for other logits than float32 or missing counts.
    """
    if logits.dtype != jnp.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    edited = logits if rules is None else rules.apply(logits)
    if mode.penalties:
        if output_counts is None or prompt_mask is None:
            raise ValueError("mode.penalties needs output_counts and prompt_mask")
        edited = _penalise(edited, arrays, output_counts, prompt_mask)
    edited = _forbid_stop_ids(edited, arrays, step)
    tokens = jnp.argmax(edited, axis=-1).astype(jnp.int32)
    if not mode.greedy_only:
        is_greedy = arrays.temperature == 0
        scaled = edited / jnp.where(is_greedy, 1.0, arrays.temperature)[:, None]
        scaled = _keep_min_p(scaled, arrays.min_p)
        if mode.filters:
            scaled = _keep_top(scaled, arrays.top_k, arrays.top_p)
        drawn = jnp.argmax(scaled + _gumbel_noise(scaled.shape[-1], arrays.seed, step), axis=-1)
        tokens = jnp.where(is_greedy, tokens, drawn.astype(jnp.int32))
    return tokens, token_logprobs(logits, tokens)


def token_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    """The model's log probability (float32) of each row's token."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    return (chosen - _log_sum_exp(logits))[:, 0]


def rounded_top(wanted: int) -> int:
    """How many top tokens to compute for ``wanted``: a power of two, so that little is compiled."""
    return 1 << (wanted - 1).bit_length() if wanted else 0


def top_logprobs(
    logits: Float[Array, "B V"], count: int
) -> tuple[Int[Array, "B N"], Float[Array, "B N"]]:
    """Each row's N likeliest tokens (int32) and the model's log probabilities of them (float32).

    ``logits`` are float32. N is ``count``, at most V. The likeliest come first, and of equally
    likely ones the lower id.
    """
    values, ids = jax.lax.top_k(logits, min(count, logits.shape[-1]))
    return ids.astype(jnp.int32), values - _log_sum_exp(logits)


def is_stop_token(tokens: Int[Array, " B"], arrays: SamplingArrays) -> Bool[Array, " B"]:
    """Whether each row's token is one of its stop ids."""
    return jnp.any(tokens[:, None] == arrays.stop_token_ids, axis=-1)


def _log_sum_exp(logits: Float[Array, "B V"]) -> Float[Array, "B 1"]:
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _penalise(
    logits: Float[Array, "B V"],
    arrays: SamplingArrays,
    output_counts: Int[Array, "B V"],
    prompt_mask: Bool[Array, "B V"],
) -> Float[Array, "B V"]:
    generated = output_counts > 0
    factor = jnp.where(prompt_mask | generated, arrays.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits -= arrays.frequency_penalty[:, None] * output_counts.astype(jnp.float32)
    return logits - jnp.where(generated, arrays.presence_penalty[:, None], 0.0)


def _forbid_stop_ids(
    logits: Float[Array, "B V"], arrays: SamplingArrays, step: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Makes the stop ids of rows that have not reached ``min_tokens`` impossible."""
    num_rows, vocab_size = logits.shape
    forbidden = (step < arrays.min_tokens)[:, None] & (arrays.stop_token_ids >= 0)
    # Ids that are not forbidden move past the vocabulary, where the scatter drops them.
    ids = jnp.where(forbidden, arrays.stop_token_ids, vocab_size)
    return logits.at[jnp.arange(num_rows)[:, None], ids].set(-jnp.inf, mode="drop")


def _keep_min_p(logits: Float[Array, "B V"], min_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(logits >= least, logits, -jnp.inf)


def _keep_top(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Keeps the ``top_k`` likeliest tokens, and of these the fewest that reach ``top_p``.

    Nothing is sorted: either filter keeps a head of the ranking, which ends at some value, and a
    bisection over the 32 bits of the values finds it exactly. That is 64 passes over the
    logits, an eighth of the time of XLA's sort of 49k values on a CPU.
    """
    vocab_size = logits.shape[-1]
    rank_key = _rank_key(logits)

    top_k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab_size), vocab_size)[:, None]
    last = _largest(lambda key: _count(rank_key >= key) >= top_k, num_rows=logits.shape[0])
    kept = _head(rank_key, last, top_k)

    # Probability is summed over the tail, which keeps its relative precision. Summed from the
    # head it comes near 1, where float32 has steps of 6e-8: more than most of 128k tokens have.
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(kept, weights, 0.0)
    spare = (1.0 - top_p)[:, None] * jnp.sum(weights, axis=-1, keepdims=True)

    def tail(key: UInt32[Array, "B 1"]) -> Float[Array, "B 1"]:
        return jnp.sum(jnp.where(rank_key < key, weights, 0.0), axis=-1, keepdims=True)

    last = _largest(lambda key: tail(key) <= spare, num_rows=logits.shape[0])
    last = jnp.minimum(last, jnp.max(rank_key, axis=-1, keepdims=True))  # the best always stays
    # Of the tokens that tie for the last place, as many are dropped as their weight allows.
    one = jnp.max(jnp.where(rank_key == last, weights, 0.0), axis=-1, keepdims=True)
    tied = jnp.floor((spare - tail(last)) / jnp.maximum(one, jnp.finfo(jnp.float32).tiny))
    size = _count(kept & (rank_key >= last))
    size -= jnp.clip(tied, 0.0, (size - 1).astype(jnp.float32)).astype(jnp.int32)
    return jnp.where(kept & _head(rank_key, last, size), logits, -jnp.inf)


def _rank_key(values: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the order of the float32 ``values``."""
    values = jnp.where(values == 0, 0.0, values)  # -0.0 ties with 0.0
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(
    holds: Callable[[UInt32[Array, "B 1"]], Bool[Array, "B 1"]], *, num_rows: int
) -> UInt32[Array, "B 1"]:
    """The largest key of which ``holds`` is true; it must be true of 0 and end only once."""

    def try_bit(i: Int[Array, ""], key: UInt32[Array, "B 1"]) -> UInt32[Array, "B 1"]:
        larger = key | (jnp.uint32(1 << 31) >> jnp.uint32(i))
        return jnp.where(holds(larger), larger, key)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros((num_rows, 1), jnp.uint32))


def _head(
    rank_key: UInt32[Array, "B V"], last: UInt32[Array, "B 1"], size: Int[Array, "B 1"]
) -> Bool[Array, "B V"]:
    """The first ``size`` of the ranking, which ends at ``last``; lower ids first in a tie."""
    above = rank_key > last
    ties = rank_key == last
    return above | (ties & (jnp.cumsum(ties, axis=-1, dtype=jnp.int32) <= size - _count(above)))


def _count(mask: Bool[Array, "B V"]) -> Int[Array, "B 1"]:
    return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)


def _gumbel_noise(
    vocab_size: int, seed: UInt32[Array, "B 2"], step: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Noise whose sum with logits has its argmax distributed as their softmax.

    "highest" makes each value from 64 random bits. The usual 23 end at 16, with which a token
    e^-20 times as likely as the best is never drawn; 128k of them have a share of 3e-4.
    """

    def row_noise(key_data, row_step):
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        key = jax.random.fold_in(key, row_step)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32, mode="highest")

    return jax.vmap(row_noise)(seed, step)

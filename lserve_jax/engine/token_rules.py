"""Which tokens a row may sample: decided on the host, applied on the device.

A request's ``RequestRules`` join what its parameters say of token ids with a ``Constraint`` that
somebody above the engine made of text. The device gets the result as an input of each call,
``TokenRules``, so no request's rules are compiled into a program.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lserve_jax.sampling_params import MAX_BIASED_TOKENS, SamplingParams


class Constraint(Protocol):
    """What the text of one completion allows as its next token. Nobody else may use it."""

    @property
    def is_static(self) -> bool:
        """Whether ``mask`` always returns the same; then ``accept`` need not be called."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        ...

    @property
    def error(self) -> Exception | None:
        """Why no further mask can be told, if so."""
        ...

    def mask(self) -> np.ndarray:
        """``[ceil(V / 32)]`` uint32: bit ``t % 32`` of word ``t // 32`` allows token t next."""
        ...

    def accept(self, token: int) -> None:
        """``token`` was generated."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """Which tokens B rows may sample. On the host, where it is made, of NumPy arrays."""

    allowed: UInt32[Array | np.ndarray, "B W"]  # packed as in ``Constraint.mask``
    bias_ids: Int[Array | np.ndarray, "B K"]  # filled up with V; K is 0 where no row has a bias
    bias: Float[Array | np.ndarray, "B K"]  # float32, added to the logits of these ids
    stepwise: Bool[Array | np.ndarray, " B"]  # the row takes one step a burst: see RequestRules

    @classmethod
    def of(cls, rows: "Sequence[RequestRules | None]") -> "TokenRules | None":
        """Of rows where None restricts nothing; None if no row does."""
        given = [row for row in rows if row is not None]
        if not given:
            return None
        free, vocab_size = all_tokens(given[0].vocab_size), given[0].vocab_size
        room = MAX_BIASED_TOKENS if any(row.bias for row in given) else 0
        ids = np.full((len(rows), room), vocab_size, np.int32)
        bias = np.zeros(ids.shape, np.float32)
        for i, row in enumerate(rows):
            if row is not None:
                ids[i, : len(row.bias)] = [*row.bias.keys()]
                bias[i, : len(row.bias)] = [*row.bias.values()]
        return cls(
            allowed=np.stack([free if row is None else row.allowed for row in rows]),
            bias_ids=ids,
            bias=bias,
            stepwise=np.array([row is not None and row.stepwise for row in rows]),
        )

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """``logits`` with the bias, and -inf where a token is not allowed."""
        num_rows, vocab_size = logits.shape
        rows = jnp.arange(num_rows)[:, None]
        logits = logits.at[rows, self.bias_ids].add(self.bias, mode="drop")
        bits = (
            self.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]
        ) & jnp.uint32(1)
        allowed = bits.reshape(num_rows, -1)[:, :vocab_size] != 0
        return jnp.where(allowed, logits, -jnp.inf)


class RequestRules:
    """Which tokens one request may sample next.

    vocab_size: V of the model, which may be padded beyond the tokenizer's.
    bias: what is added to the logits, by token id.
    stepwise: the next mask depends on the last token. A burst on the device cannot know it, so the
        request takes one step a burst.

    Raises ``ValueError`` where no token could be sampled.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        constraint: Constraint | None,
        *,
        stop_token_ids: Collection[int],
        vocab_size: int,
    ):
        self.vocab_size = vocab_size
        self.bias = dict(sampling.logit_bias or {})
        self.stepwise = constraint is not None and not constraint.is_static
        self._constraint, self._min_tokens = constraint, sampling.min_tokens
        self._accepted = 0
        self._not_stops = ~packed(stop_token_ids, vocab_size)
        self._fixed = all_tokens(vocab_size)
        if sampling.allowed_token_ids is not None:
            self._fixed = packed(sampling.allowed_token_ids, vocab_size)
        self._look()
        if self.error is not None:
            raise self.error
        if self.ended:
            least = f" before min_tokens={self._min_tokens}" if self._min_tokens else ""
            raise ValueError(
                "allowed_token_ids, bad_words and structured_outputs leave no token to begin "
                f"with{least}"
            )

    @property
    def error(self) -> Exception | None:
        """Why the request cannot go on, if so."""
        return None if self._constraint is None else self._constraint.error

    def accept(self, token: int) -> None:
        """``token`` was generated."""
        if self.stepwise:
            assert self._constraint is not None
            self._accepted += 1
            self._constraint.accept(token)
            self._look()

    def _look(self) -> None:
        """Sets ``allowed``, the next token's mask, and ``ended``: no token can follow."""
        self.allowed = self._fixed
        self.ended = self._constraint is not None and self._constraint.finished
        if self.ended:
            return
        if self._constraint is not None:
            self.allowed = self._fixed & self._constraint.mask()
        usable = self.allowed
        if self._accepted < self._min_tokens:  # the device allows no stop id yet
            usable = usable & self._not_stops
        self.ended = not usable.any()


def request_rules(
    sampling: SamplingParams,
    constraint: Constraint | None,
    eos_token_ids: Sequence[int],
    vocab_size: int,
) -> RequestRules | None:
    """The rules of a request; None where every token may be sampled as the model has it.

    Raises ``ValueError`` for an id outside the vocabulary, for what needs a constraint and has
    none, and where no token could be sampled.
    """
    for name in ("logit_bias", "allowed_token_ids"):
        for token in getattr(sampling, name) or ():
            if token >= vocab_size:
                raise ValueError(
                    f"{name} holds token id {token}, outside the vocabulary [0, {vocab_size})"
                )
    if sampling.needs_constraint and constraint is None:
        name = "bad_words" if sampling.bad_words else "structured_outputs"
        raise ValueError(f"{name} needs a constraint made by a tokenizer, as TextEngine makes it")
    if constraint is None and not sampling.logit_bias and sampling.allowed_token_ids is None:
        return None
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
    return RequestRules(sampling, constraint, stop_token_ids=stops, vocab_size=vocab_size)


def packed(token_ids: Collection[int], vocab_size: int) -> np.ndarray:
    """The mask (``Constraint.mask``) of these tokens and no other."""
    bits = np.zeros((-(-vocab_size // 32) * 32,), bool)
    bits[[*token_ids]] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


@functools.cache
def all_tokens(vocab_size: int) -> np.ndarray:
    """The mask (``Constraint.mask``) of the whole vocabulary; read-only."""
    mask = packed(range(vocab_size), vocab_size)
    mask.flags.writeable = False
    return mask

"""What crosses the wall from the engine to the runner: values of NumPy arrays and numbers."""

from dataclasses import dataclass

import numpy as np

from lserve_jax.attention.attend import PrefixGroups
from lserve_jax.engine.sampling import SamplingMode
from lserve_jax.engine.token_rules import RequestRules, TokenRules
from lserve_jax.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of a prompt to be prefilled."""

    tokens: np.ndarray  # [n] int32, not padded, at most ``chunk_size``
    page_table: np.ndarray  # [M] int32, of the sequence
    window_table: np.ndarray  # [M] int32, of its prefill window; -1: not kept
    start: int  # position of the first token
    prompt_length: int  # tokens of the whole prompt
    # [n] int32, or one less at the prompt's end: the token after each, where log probabilities of
    # the prompt's tokens are asked for
    following: np.ndarray | None = None
    top_logprobs: int = 0  # beside those, of so many likeliest tokens
    keep_hidden: bool = False  # beside those, hidden states
    block_sparse: bool = False  # whether retrieval heads choose what they attend
    whole_from: int = 0  # if so, a position, from which on they attend everything


@dataclass(frozen=True, kw_only=True)
class Start:
    """A prefilled prompt that begins to decode."""

    slot: int
    prompt: np.ndarray  # [n] int32
    sampling: SamplingParams
    sampling_row: dict[str, np.ndarray]  # ``sampling.sampling_row`` of it
    forced: int  # first token of a request that begins anew, else -1
    window_table: np.ndarray  # [M] int32, of its prefill window; -1: not kept
    rules: RequestRules | None  # None: its first token may be any


@dataclass(frozen=True, kw_only=True)
class BurstInputs:
    """What a burst of decode steps needs for its first B slots."""

    steps: int  # to run, a multiple of ``CacheSpec.burst_unit`` or 1; in exact mode tokens
    page_table: np.ndarray  # [B, M] int32
    groups: PrefixGroups | None  # with NumPy arrays
    # [most steps, B] int32, -1 where a token is sampled; fewer than ``burst_unit`` only if it is 1
    forced: np.ndarray
    rules: TokenRules | None  # None: every row may sample any token
    mode: SamplingMode
    # [B] int32, tokens that a row drafts before they are verified; None: not in exact mode
    drafts: np.ndarray | None

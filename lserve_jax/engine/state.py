"""What the jitted steps take and return: the state of decoding, tables, samples, scores."""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lserve_jax.attention.attend import PrefixGroups
from lserve_jax.attention.cache import CacheSpec, LayerCache
from lserve_jax.engine.sampling import MAX_STOP_IDS, SamplingArrays
from lserve_jax.model.config import ModelConfig
from pallas_kernels.api import Backend, W8A8Kind

Caches = list[LayerCache]


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is static about every jitted step: one argument, hashed and compared as a whole."""

    config: ModelConfig
    spec: CacheSpec
    backend: Backend
    prefill_dtype: W8A8Kind | None = None  # of prefill's products; None: as the parameters


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotStarts:
    """What slots must know of prefilled prompts, R of them, to decode them."""

    slot: Int[Array, " R"]  # beyond the last slot: there is no such prompt
    prompt_length: Int[Array, " R"]
    max_tokens: Int[Array, " R"]
    forced: Int[Array, " R"]  # first token of a request that begins anew, else -1
    window_table: Int[Array, "R M"]  # where its pages lie in the prefill window; -1: nowhere
    # Tokens of the prompts; given exactly when the state counts tokens for penalties.
    prompt_mask: Bool[Array, "R V"] | None
    history: Int[Array, "R N"] | None  # the prompts, filled up; given where the state has a history


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeTables:
    """Where the pages of a batch's sequences lie, as far as its steps can reach."""

    page_table: Int[Array, "B M"]  # retrieval page of each page of the row's sequence
    groups: PrefixGroups | None  # which rows read their prefix together; None: no row does


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepRows:
    """What the rows of a batch feed to the model in one decode step."""

    token: Int[Array, " B"]
    position: Int[Array, " B"]  # of the token in its sequence
    active: Bool[Array, " B"]  # False: the row computes but writes nothing
    tail: Int[Array, " B"]  # ``first_tail_page`` at the last selection; 0 when dense


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ForcedSteps:
    """Given tokens for the rows of a batch, to be judged by N decode steps."""

    # On the host, where they are put together, these are NumPy arrays.
    tokens: Int[Array | np.ndarray, "N B"]  # fed to the model
    wanted: Int[Array | np.ndarray, "N B"]  # whose log probability is asked for
    start: Int[Array | np.ndarray, " B"]  # position of the first token that the row ever feeds
    length: Int[Array | np.ndarray, " B"]  # steps in which the row takes part, counted from there


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepScores:
    """What the model thought of given tokens. Steps past a row's end have no meaning."""

    logprobs: Float[Array, "N B"]
    likeliest: Int[Array, "N B"]
    distributions: Float[Array, "N B V"]  # log probabilities; V is 0 unless asked for
    hidden: Float[Array, "N B E"]  # of the tokens fed; E is 0 unless asked for


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """What the decode loop knows of every slot (S of them)."""

    token: Int[Array, " S"]  # the token that the next step feeds to the model
    position: Int[Array, " S"]  # its position in the sequence
    active: Bool[Array, " S"]  # False: the slot is free or its request is finished
    generated: Int[Array, " S"]  # tokens generated so far, the first one from prefill included
    max_tokens: Int[Array, " S"]  # generation ends here
    tail: Int[Array, " S"]  # first page of the list attended without being selected; 0 when dense
    sampling: SamplingArrays  # per-slot sampling parameters
    # Present once some request has used penalties: they cost S * V entries.
    output_counts: Int[Array, "S V"] | None
    prompt_mask: Bool[Array, "S V"] | None
    # Tokens by position up to the newest one, where drafts are looked up; else None.
    history: Int[Array, "S N"] | None

    @classmethod
    def empty(cls, spec: CacheSpec) -> Self:
        """Every slot is free."""
        max_num_seqs, positions = spec.max_num_seqs, spec.pages_per_sequence * spec.page_size

        def zeros() -> Array:  # one buffer a field: donated buffers must not be shared
            return jnp.zeros((max_num_seqs,), jnp.int32)

        return cls(
            token=zeros(),
            position=zeros(),
            active=jnp.zeros((max_num_seqs,), bool),
            generated=zeros(),
            max_tokens=zeros(),
            tail=zeros(),
            sampling=SamplingArrays.empty(max_num_seqs, MAX_STOP_IDS),
            output_counts=None,
            prompt_mask=None,
            history=jnp.zeros((max_num_seqs, positions), jnp.int32)
            if spec.draft == "ngram"
            else None,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sample:
    """Tokens and what the model thought of them; a burst adds a leading axis of steps.

    They are sampled, or a prompt's own: then B counts positions.
    """

    token: Int[Array, " B"]  # -1 where nothing was sampled
    logprob: Float[Array, " B"]  # of the token, under the model's own distribution
    top_ids: Int[Array, "B N"]  # the N likeliest tokens, N as ``rounded_top`` says
    top_logprobs: Float[Array, "B N"]
    # Of a prompt's tokens, where asked for: what the logits after each are made of.
    hidden: Float[Array, "B E"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Burst:
    """What a burst of decode steps produced, for its first B slots."""

    samples: Sample  # leaves [steps, B, ...]; steps past a slot's end hold token -1
    steps: Int[Array, " B"]  # steps in which the slot was active
    bypassed: Int[Array, " B"]  # of these, steps whose history fitted the budget: nothing pruned
    selections: Int[Array, " B"]  # steps that chose pages anew
    scored: Int[Array, " B"]  # pages whose statistics these read, summed; one layer and KV head
    attended: Float[Array, " B"]  # tokens attended, summed over steps, layers and KV heads
    # In exact mode, where ``steps`` are tokens; else 0:
    verified: Int[Array, " B"]  # passes of dense attention
    judging: Int[Array, " B"]  # of these, passes over drafts, those of a replay left out
    drafted: Int[Array, " B"]  # tokens that they were given to judge
    confirmed: Int[Array, " B"]  # of these, those that it would have produced too

    @classmethod
    def empty(cls, steps: int, num_rows: int, num_top: int) -> Self:
        """Before the first of ``steps`` steps, with ``num_top`` log probabilities each."""
        nothing = jnp.zeros((num_rows,), jnp.int32)
        return cls(
            samples=Sample(
                token=jnp.full((steps, num_rows), -1, jnp.int32),
                logprob=jnp.zeros((steps, num_rows), jnp.float32),
                top_ids=jnp.zeros((steps, num_rows, num_top), jnp.int32),
                top_logprobs=jnp.zeros((steps, num_rows, num_top), jnp.float32),
            ),
            steps=nothing,
            bypassed=nothing,
            selections=nothing,
            scored=nothing,
            attended=jnp.zeros((num_rows,), jnp.float32),
            verified=nothing,
            judging=nothing,
            drafted=nothing,
            confirmed=nothing,
        )

"""Which pages of its context a request read for each of its tokens, where it asked for that.

What dense and streaming heads read follows from a token's position. What ranked heads chose does
not: it is fetched out of the cache behind each selection, so bursts of one selection run as long as
some request records (of one step for a request that takes one step a burst). The programs of a
burst are the same with and without.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from lserve_jax.attention.cache import CacheSpec, StreamingWindow
from lserve_jax.attention.selection import chosen_pages
from lserve_jax.engine.metrics import RelayDecision
from lserve_jax.engine.state import Program
from lserve_jax.model.config import ModelConfig

HeadKind = Literal["ranked", "dense", "streaming"]
HeadKinds = tuple[tuple[HeadKind, ...], ...]  # by layer and KV head, in checkpoint order

# Of one request. A layer of 8 ranked heads takes 1 KiB a selection where the context is 16K tokens.
MOST_BYTES = 64 << 20


def head_kinds(
    config: ModelConfig, spec: CacheSpec, order: Sequence[Sequence[int]] | None
) -> HeadKinds:
    """What each KV head reads.

    ``order[layer][place]`` is the checkpoint's number of the head at a place of the parameters;
    None: they are in the checkpoint's order. In exact mode every head is dense: sparse steps
    draft, but what is verified decides.
    """
    if order is None:
        order = [range(config.num_key_value_heads)] * config.num_hidden_layers
    every = []
    for layer, places in enumerate(order):
        ranked, dense = spec.heads.num_ranked[layer], spec.heads.num_dense[layer]
        kinds: list[HeadKind] = ["streaming"] * len(places)
        for place, head in enumerate(places):
            if spec.max_drafts is None and place < ranked:
                kinds[head] = "ranked"
            elif spec.max_drafts is not None or place < ranked + dense:
                kinds[head] = "dense"
        every.append(tuple(kinds))
    return tuple(every)


@functools.partial(jax.jit, static_argnames=("program",))
def selected_pages(
    program: Program,
    listed: list[Int[Array, "S Kr L"] | None],
    tail: Int[Array, " S"],
    slot: Int[Array, ""],
) -> list[Int[Array, "Kq R"]]:
    """What each layer's ranked heads chose for a slot at its last selection (``chosen_pages``).

    ``listed`` is that of the caches, ``tail`` that of the decode state.
    """
    nothing = jnp.zeros((0, 0), jnp.int32)
    return [
        nothing
        if lists is None
        else chosen_pages(program.spec, layer, lists[slot][None], tail[slot][None])[0]
        for layer, lists in enumerate(listed)
    ]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What ranked heads read at the steps from one selection to the next, the tail left out."""

    first_token: int  # of the answer, counted from 0: the first that was made with it
    together: int  # first tokens, whole pages, that the layers read together with other requests
    chosen: UInt8[np.ndarray, "L Hk n"]  # a bit a page, the lowest first; 0 for other heads


@dataclass(frozen=True, kw_only=True)
class PageReads:
    """Which pages of the context each KV head read for each token of an answer.

    A page here is what selection takes or leaves (``CacheSpec.selected_page_size``). Frozen:
    ``add`` returns another one.
    """

    page_size: int  # tokens
    prompt_tokens: int
    reuse_interval: int  # tokens that are made with one selection
    head_kinds: HeadKinds
    prefill_window: StreamingWindow  # what streaming heads read for the first token
    decode_window: StreamingWindow  # and for the others
    exact: bool  # exact mode: dense attention verified every token
    selections: tuple[Selection, ...] = ()
    dropped: int = 0  # older selections, which would have taken more than ``MOST_BYTES``

    @classmethod
    def of(cls, spec: CacheSpec, kinds: HeadKinds, prompt_tokens: int) -> Self:
        """Of a request that has not begun."""
        return cls(
            page_size=spec.selected_page_size,
            prompt_tokens=prompt_tokens,
            reuse_interval=spec.reuse_interval,
            head_kinds=kinds,
            prefill_window=spec.prefill_window,
            decode_window=spec.decode_window,
            exact=spec.max_drafts is not None,
        )

    @property
    def has_ranked(self) -> bool:
        """Whether some head chooses, so that there is something to record."""
        return any("ranked" in layer for layer in self.head_kinds)

    @property
    def nbytes(self) -> int:
        return sum(selection.chosen.nbytes for selection in self.selections)

    @property
    def first_known(self) -> int:
        """The first token, after token 0, of which ``pages`` knows."""
        return self.selections[0].first_token if self.dropped else 1

    def add(
        self,
        first_token: int,
        chosen: Sequence[Int[np.ndarray, "Kq R"]],
        page_table: Int[np.ndarray, " M"],
        decision: RelayDecision | None,
    ) -> Self:
        """With what was chosen for the tokens from ``first_token`` on.

        ``chosen``: of each layer, as ``attention.selection.chosen_pages`` returns it.
        ``page_table`` and ``decision``: of the sequence in that burst. A preempted request makes
        its tokens again, by the same selections: they are known already.
        """
        if self.selections and first_token <= self.selections[-1].first_token:
            return self
        position, P = self.position(first_token), self.decode_window.page_size
        cut = P // self.page_size
        page_table = page_table[: position // P + 1]
        by_id = np.argsort(page_table)
        count = position // self.page_size + 1
        read = np.zeros((len(self.head_kinds), len(self.head_kinds[0]), count), bool)
        for layer, ranked in enumerate(chosen):
            # Ranked heads keep the checkpoint's order among themselves.
            heads = [h for h, kind in enumerate(self.head_kinds[layer]) if kind == "ranked"]
            for head, pages in zip(heads, ranked, strict=True):
                pages = pages[pages >= 0]
                at = by_id[np.searchsorted(page_table, pages // cut, sorter=by_id)]
                read[layer, head, at * cut + pages % cut] = True
        selection = Selection(
            first_token=first_token,
            together=decision.prefix_tokens if decision is not None and decision.used else 0,
            chosen=np.packbits(read, axis=2, bitorder="little"),
        )
        reads = dataclasses.replace(self, selections=(*self.selections, selection))
        while reads.nbytes > MOST_BYTES and len(reads.selections) > 1:
            reads = dataclasses.replace(
                reads, selections=reads.selections[1:], dropped=reads.dropped + 1
            )
        return reads

    def position(self, token: int) -> int:
        """Of the query that made a token of the answer: that of the token before it."""
        return self.prompt_tokens + token - 1

    def pages(self, token: int) -> Bool[np.ndarray, "L Hk N"]:
        """Which pages were read for a token of the answer, counted from 0; N pages are its context.

        The first token is read off the prompt: there only streaming heads leave pages out.

        Raises ``ValueError`` for a token that is not recorded.
        """
        U, position = self.page_size, self.position(token)
        page, kinds = np.arange(position // U + 1), np.array(self.head_kinds)
        window = self.prefill_window if token == 0 else self.decode_window
        read = np.zeros((*kinds.shape, len(page)), bool)
        read[kinds == "dense"] = True
        read[kinds == "streaming"] = (page * U < window.sink) | (
            (page + 1) * U > position - window.local + 1
        )
        ranked = kinds == "ranked"
        if token == 0:
            read[ranked] = True
        elif self.has_ranked:
            selection = self._selection_of(token)
            together = selection.together
            own = self.position(selection.first_token) - together
            tail = (together + max(own - 1, 0)) // U
            chosen = np.unpackbits(selection.chosen, axis=2, count=len(page), bitorder="little")
            seen = chosen.astype(bool) | (page < together // U) | (page >= tail)
            read[ranked] = seen[ranked]
        return read

    def _selection_of(self, token: int) -> Selection:
        for selection in reversed(self.selections):
            if selection.first_token <= token < selection.first_token + self.reuse_interval:
                return selection
        raise ValueError(f"what was read for token {token} of the answer is not recorded")

"""How attention is made sparse: LServe's settings, one frozen dataclass."""

import os
from dataclasses import dataclass
from typing import Literal, get_args

from lserve_jax.attention.policy import Select
from lserve_jax.checks import check_choice, check_integer, check_path, is_real

Prefill = Literal["causal", "block_sparse"]

_INTEGERS = (
    *("page_size", "logical_page_size", "reuse_interval", "forced_sink_pages", "dense_heads"),
    *("prefill_sink", "prefill_local", "decode_sink", "decode_local", "prefill_min_tokens"),
)
# Steps without a look at the queue: nobody is admitted or cancelled meanwhile, results of all of
# them take memory, and pages for all must be free. Many seconds of a large model already.
MOST_BURST_STEPS = 1024
PAGE_SIZES = (16, 32, 64, 128)
LOGICAL_PAGE_SIZES = (16, 32)
# Where neither a budget nor what the heads are worth is known.
EVEN_BUDGET = 4096


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """LServe's settings; sizes are in tokens (LServe, arXiv 2502.14866).

    Raises ``ValueError`` naming values and rule where they do not fit together.
    """

    # A shipped head pattern's name or a directory in DuoAttention's format: which heads stream.
    pattern: str | None = None
    # What each head is worth: where ``calibrate --head-shares`` wrote it. "auto": beside the
    # pattern, if there; None or "none": LServe's own policy, by gates and with even budgets.
    head_shares: str | None = "auto"
    # Share of KV heads made streaming heads, of the least worth or by the lowest gates. None: 1/3
    # by worth (never one of the four of the greatest), 0.5 by gates, 0 if neither is known.
    streaming_fraction: float | None = None
    # At least so many heads read everything, those of the greatest worth in the whole model.
    dense_heads: int = 0
    # Share of the context's keys and values that a decode step may read, statistics included; mean
    # over all KV heads. None: 1/8 with head shares, else token_budget says.
    budget_share: float | None = None
    # Instead: tokens that each retrieval head may attend in a decode step, whatever the context;
    # histories that fit are attended whole. None: 4096 if there is no share either.
    token_budget: int | None = None
    # Tokens of a page of the KV cache: what is allocated and shared as a whole.
    page_size: int = 64
    # Statistics for page selection are kept per logical page.
    logical_page_size: int = 16
    # Tokens that selection takes or leaves together, and decode reads together. None: a logical
    # page. With page_size, whole pages, ranked by their best logical page, as published: faster to
    # select, but fewer places for the same budget, and it finds less.
    selected_page_size: int | None = None
    # A page scores the upper bound of q . k over its keys plus this share of the lower bound. With
    # 0 that is the upper bound alone, as published; with more, pages of unlike keys, whose bounds
    # are loose, rank lower.
    lower_bound_weight: float = 0.5
    # Decode steps between two page selections; they run as one burst, so at most 1,024.
    reuse_interval: int = 4
    # What retrieval heads attend while a prompt is read: everything, or blocks of 128 keys that
    # each 128 queries choose by the attention of two of them, the first and the newest always.
    # Heads that read everything in decode, and a prompt's last 128 tokens, attend everything.
    prefill: Prefill = "causal"
    # Blocks are the fewest that hold this share of the attention, as estimated; 1: all of them.
    prefill_threshold: float = 0.9
    # Instead: this share of the blocks, whatever they hold.
    prefill_density: float | None = None
    # Prompts of fewer tokens are read causally.
    prefill_min_tokens: int = 8192
    # Without a pattern no head streams, and these four do nothing.
    # While a prompt is read, streaming heads see its first `prefill_sink` tokens
    prefill_sink: int = 128
    # and the last `prefill_local`, the query's own included.
    prefill_local: int = 8192
    # While text is generated they see the first `decode_sink` tokens
    decode_sink: int = 128
    # and the last `decode_local`.
    decode_local: int = 256
    # First selected pages that always win: softmax parks surplus weight there.
    forced_sink_pages: int = 1
    # Chooses the pages instead of their scores, within the budget or not (``attention/policy.py``).
    # ``forced_sink_pages`` and ``lower_bound_weight`` are then up to it.
    select: Select | None = None

    def __post_init__(self):
        if self.select is not None and not callable(self.select):
            raise TypeError(f"select={self.select!r} must be a function or None")
        if self.pattern is not None:  # a path of any kind; kept as text, which JSON can hold
            if not isinstance(self.pattern, str | os.PathLike):
                raise TypeError(f"pattern={self.pattern!r} must be a name, a path or None")
            check_path("pattern", self.pattern)
            object.__setattr__(self, "pattern", os.fspath(self.pattern))
        shares = self.head_shares
        if shares is not None:
            if not isinstance(shares, str | os.PathLike):
                raise TypeError(f"head_shares={shares!r} must be 'auto', a name, a path or None")
            check_path("head_shares", shares)
            shares = None if shares in ("none", "None") else os.fspath(shares)
            object.__setattr__(self, "head_shares", shares)
        for name in _INTEGERS:
            object.__setattr__(self, name, check_integer(name, getattr(self, name)))
        for name in ("selected_page_size", "token_budget"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_integer(name, getattr(self, name)))
        fraction = self.streaming_fraction
        if fraction is not None and not (is_real(fraction) and 0.0 <= fraction <= 1.0):
            raise ValueError(f"streaming_fraction={fraction!r} must lie in [0, 1]")
        knows_heads = self.pattern is not None or shares not in (None, "auto")
        if fraction and not knows_heads:
            raise ValueError(
                f"streaming_fraction={fraction} needs a head pattern or head shares: "
                "which heads stream is learned"
            )
        if self.dense_heads < 0:
            raise ValueError(f"dense_heads={self.dense_heads} must not be negative")
        if self.dense_heads and shares is None:
            raise ValueError(
                f"dense_heads={self.dense_heads} needs head shares, got head_shares=None: "
                "which heads must read everything is measured"
            )
        budget = self.budget_share
        if budget is not None and not (is_real(budget) and 0.0 < budget <= 1.0):
            raise ValueError(f"budget_share={budget!r} must lie in (0, 1]")
        if budget is not None and self.token_budget is not None:
            raise ValueError(
                f"budget_share={budget} and token_budget={self.token_budget} are two budgets: "
                "give one of them"
            )
        for name, allowed in (
            ("page_size", PAGE_SIZES),
            ("logical_page_size", LOGICAL_PAGE_SIZES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {allowed}")
        page_size = self.page_size
        if page_size % self.logical_page_size:
            raise ValueError(
                f"{page_size=} must be a multiple of logical_page_size={self.logical_page_size}"
            )
        selected = self.resolved_selected_page_size
        if selected < 1 or page_size % selected or selected % self.logical_page_size:
            raise ValueError(
                f"selected_page_size={selected} must divide {page_size=} and be a multiple of "
                f"logical_page_size={self.logical_page_size}"
            )
        weight = self.lower_bound_weight
        if not (is_real(weight) and 0.0 <= weight <= 1.0):
            raise ValueError(f"lower_bound_weight={weight!r} must lie in [0, 1]")
        if not 1 <= self.reuse_interval <= MOST_BURST_STEPS:
            bounds = f"at least 1 and at most {MOST_BURST_STEPS}"
            raise ValueError(f"reuse_interval={self.reuse_interval} must be {bounds}")
        check_choice("prefill", self.prefill, get_args(Prefill))
        threshold, density = self.prefill_threshold, self.prefill_density
        if not (is_real(threshold) and 0.0 < threshold <= 1.0):
            raise ValueError(f"prefill_threshold={threshold!r} must lie in (0, 1]")
        if density is not None and not (is_real(density) and 0.0 < density <= 1.0):
            raise ValueError(f"prefill_density={density!r} must lie in (0, 1]")
        if density is not None and self.prefill != "block_sparse":
            raise ValueError(
                f"prefill_density={density} needs prefill='block_sparse', got {self.prefill!r}"
            )
        if self.prefill_min_tokens < 1:
            raise ValueError(f"prefill_min_tokens={self.prefill_min_tokens} must be at least 1")
        if self.forced_sink_pages < 0:
            raise ValueError(f"forced_sink_pages={self.forced_sink_pages} must not be negative")
        if self.token_budget is not None:
            self._check_token_budget(self.token_budget, selected)
        for name in ("prefill_sink", "prefill_local", "decode_sink", "decode_local"):
            size = getattr(self, name)
            if size % page_size or size < 0:
                raise ValueError(f"{name}={size} must be a multiple of {page_size=}")
        for name in ("sink", "local"):
            decode, prefill = getattr(self, f"decode_{name}"), getattr(self, f"prefill_{name}")
            if decode > prefill:
                raise ValueError(
                    f"decode_{name}={decode} must not exceed prefill_{name}={prefill}: "
                    "decode reads what prefill kept"
                )
        if self.decode_local < page_size:
            raise ValueError(f"decode_local={self.decode_local} must be at least {page_size=}")

    def _check_token_budget(self, budget: int, selected: int) -> None:
        if budget % selected:
            raise ValueError(
                f"token_budget={budget} must be a multiple of selected_page_size={selected}"
            )
        least = (self.forced_sink_pages + 2) * selected
        if budget < least:
            raise ValueError(
                f"token_budget={budget} must be at least {least}: "
                f"{self.forced_sink_pages} forced sink pages, one selected and the newest page "
                f"of {selected} tokens"
            )

    @property
    def resolved_selected_page_size(self) -> int:
        if self.selected_page_size is not None:
            return self.selected_page_size
        return self.logical_page_size

    @property
    def statistics_share(self) -> float:
        """What ranking a head's pages reads, a step on average, as a share of its keys and values.

        Two vectors a logical page, every ``reuse_interval`` steps, in the dtype of the keys.
        """
        return 1 / (self.logical_page_size * self.reuse_interval)

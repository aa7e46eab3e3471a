"""What a model is: the architecture numbers that every other module reads.

Frozen and hashable, so that a config can be a static argument of ``jax.jit``.
Dimension letters are those of ``docs/glossary.md``.
"""

from dataclasses import dataclass, field
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched to longer contexts.

    Fields carry Hugging Face's names. Which are used depends on ``rope_type``:
    ``default`` uses ``rope_theta`` only; ``linear`` and ``dynamic`` also ``factor``;
    ``llama3`` also the two frequency factors and the original length; ``yarn`` also the betas,
    ``attention_factor`` and the two ``mscale`` values.
    """

    rope_theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        known = ("default", "linear", "dynamic", "llama3", "yarn")
        if self.rope_type not in known:
            raise ValueError(f"rope_type={self.rope_type!r} is unknown; known types: {known}")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be positive")
        if self.factor < 1.0:
            raise ValueError(f"rope factor={self.factor} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of one Llama-family decoder.

    Raises ``ValueError`` where the numbers contradict each other.
    """

    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # Hk
    head_dim: int  # D
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # bias on q, k and v
    attention_out_bias: bool = False  # bias on the attention output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm over D on q and k before rotary embedding
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embedding")

    @property
    def group_size(self) -> int:
        """G: query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads


PAGE_SIZES = (16, 32, 64, 128)
LOGICAL_PAGE_SIZES = (16, 32)


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """LServe's settings; sizes are in tokens (LServe, arXiv 2502.14866).

    Raises ``ValueError`` naming values and rule where they do not fit together.
    """

    # A shipped head pattern's name or a directory in DuoAttention's format. Without a pattern
    # every head is a retrieval head.
    pattern: str | None = None
    # Share of KV heads made streaming heads, lowest gates first. None: 0.5 with a pattern, else 0.
    streaming_fraction: float | None = None
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
    # What a retrieval head may attend in one decode step; histories that fit are attended whole.
    token_budget: int = 4096
    # Decode steps between two page selections.
    reuse_interval: int = 4
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

    def __post_init__(self):
        fraction = self.streaming_fraction
        if fraction is not None and not 0.0 <= fraction <= 1.0:
            raise ValueError(f"streaming_fraction={fraction} must lie in [0, 1]")
        if self.pattern is None and fraction:
            raise ValueError(
                f"streaming_fraction={fraction} needs a head pattern: which heads stream is learned"
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
        if not 0.0 <= self.lower_bound_weight <= 1.0:
            raise ValueError(f"lower_bound_weight={self.lower_bound_weight} must lie in [0, 1]")
        if self.reuse_interval < 1:
            raise ValueError(f"reuse_interval={self.reuse_interval} must be at least 1")
        if self.forced_sink_pages < 0:
            raise ValueError(f"forced_sink_pages={self.forced_sink_pages} must not be negative")
        if self.token_budget % selected:
            raise ValueError(
                f"token_budget={self.token_budget} must be a multiple of "
                f"selected_page_size={selected}"
            )
        least = (self.forced_sink_pages + 2) * selected
        if self.token_budget < least:
            raise ValueError(
                f"token_budget={self.token_budget} must be at least {least}: "
                f"{self.forced_sink_pages} forced sink pages, one selected and the newest page "
                f"of {selected} tokens"
            )
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

    @property
    def resolved_selected_page_size(self) -> int:
        if self.selected_page_size is not None:
            return self.selected_page_size
        return self.logical_page_size

    @property
    def resolved_streaming_fraction(self) -> float:
        if self.streaming_fraction is not None:
            return self.streaming_fraction
        return 0.0 if self.pattern is None else 0.5

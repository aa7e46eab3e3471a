"""What a model is: the architecture numbers that every other module reads.

Frozen and hashable, so that a config can be a static argument of ``jax.jit``.
Dimension letters are those of ``docs/glossary.md``.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

_LONGEST = 2**31 - 1  # positions are int32
RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched to longer contexts.

    Fields carry Hugging Face's names. Which are used depends on ``rope_type``:
    ``default`` uses ``rope_theta`` only; ``linear`` and ``dynamic`` also ``factor``;
    ``llama3`` also the two frequency factors and the original length; ``yarn`` also the betas,
    ``attention_factor`` and the two ``mscale`` values; ``longrope`` the original length,
    ``factor``, ``attention_factor`` and one divisor for every pair of channels: ``short_factor``
    up to the original length, ``long_factor`` beyond.

    Raises ``ValueError`` for a number that makes no sense.
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
    long_factor: tuple[float, ...] = ()
    short_factor: tuple[float, ...] = ()

    def __post_init__(self):
        known = get_args(RopeType)
        if self.rope_type not in known:
            raise ValueError(f"rope_type={self.rope_type!r} is unknown; known types: {known}")
        if not 1 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta={self.rope_theta} must be finite and exceed 1")
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            _require_positive(name, getattr(self, name))
        for name in ("attention_factor", "original_max_position_embeddings"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"rope {name}={getattr(self, name)} must be finite, not negative")
        for name in ("long_factor", "short_factor"):
            for value in getattr(self, name):
                _require_positive(name, value)
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope factor={self.factor} must be finite and at least 1")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.rope_type == "yarn" and self.beta_slow > self.beta_fast:
            raise ValueError(
                f"beta_slow={self.beta_slow} must not exceed beta_fast={self.beta_fast}"
            )
        if self.rope_type == "longrope" and (self.original_max_position_embeddings or 2) < 2:
            raise ValueError("original_max_position_embeddings=1 must exceed 1 for longrope")


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:  # refuses NaN too
        raise ValueError(f"{name}={value} must be positive and finite")


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
    nope_layers: tuple[int, ...] = ()  # layers without rotary embedding
    sliding_window: int | None = None  # attention has none, so no sequence may be longer than it
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
        if not 0 <= self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must lie in [0, 1)")
        if any(layer not in range(self.num_hidden_layers) for layer in self.nope_layers):
            raise ValueError(
                f"nope_layers={self.nope_layers} must lie in [0, {self.num_hidden_layers})"
            )
        if self.sliding_window is not None and self.sliding_window < self.max_position_embeddings:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} must not exceed "
                f"sliding_window={self.sliding_window}: sliding-window attention is not supported"
            )
        if self.rope.rope_type == "dynamic" and self.head_dim < 4:
            raise ValueError(f"head_dim={self.head_dim} must be at least 4 for dynamic scaling")
        if self.rope.rope_type == "longrope":
            for name in ("long_factor", "short_factor"):
                if len(getattr(self.rope, name)) != self.head_dim // 2:
                    raise ValueError(
                        f"rope {name} must hold head_dim/2={self.head_dim // 2} numbers, "
                        f"got {len(getattr(self.rope, name))}"
                    )
        if self.context_length > _LONGEST:
            raise ValueError(
                f"the sequence length {self.context_length} (max_position_embeddings, rope factor) "
                "must be below 2^31"
            )

    @property
    def group_size(self) -> int:
        """G: query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def context_length(self) -> int:
        """Tokens that the position embedding is made for.

        ``linear``, ``dynamic`` and ``yarn`` stretch an original length by their factor; configs
        give that length as ``max_position_embeddings`` unless they name another, or the stretched
        one as ``max_position_embeddings``.
        """
        limit = self.max_position_embeddings
        if self.rope.rope_type in ("linear", "dynamic", "yarn"):
            original = self.rope.original_max_position_embeddings or limit
            limit = max(limit, int(original * self.rope.factor))
        return limit if self.sliding_window is None else min(limit, self.sliding_window)

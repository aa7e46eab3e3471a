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

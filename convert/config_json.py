"""``config.json`` to ``ModelConfig``, refusing by name what would change the mathematics.

Reads both of Hugging Face's forms: version 4 (``rope_theta``, ``rope_scaling``) and version 5
(``rope_parameters``). GGUF metadata and our own checkpoints come through here too, in an explicit
form (``model_type`` ``lserve_jax``) in which every flag that a family only implies is written out.
"""

import dataclasses
import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lserve_jax.model.config import ModelConfig, RopeConfig

EXPLICIT = "lserve_jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What a ``model_type`` implies, beyond its config's attributes."""

    flags: tuple[str, ...] = ()  # which of the four flags below its config may carry
    qkv_bias: bool = False
    out_bias_too: bool = False  # attention_bias also means the output projection
    qk_norm: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    window: int | None = None  # sliding_window when the config has none
    window_per_layer: bool = False  # off unless use_sliding_window, and then by layer


_FAMILIES = {
    "llama": _Family(flags=("attention_bias", "mlp_bias"), out_bias_too=True),
    "mistral": _Family(window=4096),
    # Qwen2 always has the three biases, whatever its config says of attention_bias.
    "qwen2": _Family(flags=("attention_bias",), qkv_bias=True, window=4096, window_per_layer=True),
    "qwen3": _Family(
        flags=("attention_bias",),
        out_bias_too=True,
        qk_norm=True,
        head_dim=128,
        window=4096,
        window_per_layer=True,
    ),
    EXPLICIT: _Family(flags=("attention_bias", "attention_out_bias", "mlp_bias", "qk_norm")),
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_HANDLED = (
    "model_type",
    *_SIZES,
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "hidden_act",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "bos_token_id",
    "eos_token_id",
)
# Version 4's spelling of rope_parameters; canonical() rewrites them.
_ROPE_V4 = ("rope_theta", "rope_scaling", "original_max_position_embeddings")
# Known not to change what the model computes.
_HARMLESS = (
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path"),
    *("_flash_attn_2_enabled", "architectures", "attention_dropout", "auto_map"),
    *("classifier_dropout", "dtype", "gradient_checkpointing", "id2label"),
    *(
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_sequence_length",
        "model_max_length",
    ),
    *("name_or_path", "num_labels", "pad_token_id", "pretraining_tp", "problem_type"),
    *("return_dict", "task_specific_params", "tokenizer_class", "torch_dtype"),
    *("transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed"),
    *("unsloth_version", "use_cache"),
    # Settings of sampling and beam search, which old configs carried.
    *("chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample"),
    *("length_penalty", "max_length", "min_length", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p"),
)

# Which fields of RopeConfig a rope_type uses; the others are ignored, as Hugging Face does.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROPE_HARMLESS = ("type", "partial_rotary_factor", "finetuned")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ``ValueError`` if ``path`` is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def canonical(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``raw`` with version 4's rope attributes rewritten as version 5's ``rope_parameters``."""
    config = {key: value for key, value in raw.items() if key not in _ROPE_V4}
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if "full_attention" in rope:  # one dict per kind of layer; the other kinds are refused
        rope = dict(rope["full_attention"])
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
    if raw.get("rope_theta") is not None:
        rope.setdefault("rope_theta", raw["rope_theta"])
    if raw.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    config["rope_parameters"] = rope
    return config


def override(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A canonical config with some attributes replaced, in version 4's or 5's spelling.

    ``rope_theta`` replaces the base alone; ``rope_scaling`` or ``rope_parameters`` replace all
    but the base, which they may bring along. Raises ``ValueError`` for an unknown attribute.
    """
    allowed = {*_HANDLED, *_ROPE_V4, *_FAMILIES[EXPLICIT].flags} - {"model_type"}
    for name in overrides:
        if name not in allowed:
            raise ValueError(
                f"config override {name!r} is unknown; known attributes: "
                f"{', '.join(sorted(allowed))}"
            )
    changed = canonical(overrides)
    rope = config["rope_parameters"]
    if "rope_scaling" in overrides or "rope_parameters" in overrides:
        rope = {key: rope[key] for key in ("rope_theta",) if key in rope}
    if "rope_theta" in overrides:
        changed["rope_parameters"]["rope_theta"] = overrides["rope_theta"]
    return {**config, **changed, "rope_parameters": {**rope, **changed["rope_parameters"]}}


def parse(config: Mapping[str, Any], *, where: str) -> ModelConfig:
    """The architecture that a canonical ``config`` describes; ``where`` names it in messages.

    Raises ``ValueError`` for a missing or malformed attribute and ``NotImplementedError`` for one
    that asks for mathematics the model does not have.
    """
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        known = ", ".join(name for name in _FAMILIES if name != EXPLICIT)
        raise NotImplementedError(
            f"{where}: model_type {kind!r} is not supported; supported types: {known}"
        )
    family = _FAMILIES[kind]
    refuse_unknown(config, {*_HANDLED, *_HARMLESS, *family.flags}, where=where)
    sizes = {name: _positive(name, config.get(name), where) for name in _SIZES}
    heads = sizes["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or family.head_dim or sizes["hidden_size"] // heads
    _refuse_activation(config, where)
    _refuse_window(config, family, sizes, where)
    attention_bias = family.qkv_bias or bool(config.get("attention_bias"))
    out_bias = attention_bias if family.out_bias_too else bool(config.get("attention_out_bias"))
    return ModelConfig(
        **sizes,
        num_key_value_heads=_positive("num_key_value_heads", kv_heads, where),
        head_dim=_positive("head_dim", head_dim, where),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config, explicit=kind == EXPLICIT, where=where),
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        attention_bias=attention_bias,
        attention_out_bias=out_bias,
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=family.qk_norm or bool(config.get("qk_norm")),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_token_ids(config.get("eos_token_id"), where),
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The explicit form of ``config``, which ``parse`` turns back into the same value."""
    attributes = dataclasses.asdict(config)
    rope = attributes.pop("rope")
    eos = attributes.pop("eos_token_ids")
    fields = ("rope_theta", "rope_type", *_ROPE_FIELDS[config.rope.rope_type])
    return {
        "model_type": EXPLICIT,
        **attributes,
        "eos_token_id": list(eos),
        "rope_parameters": {name: rope[name] for name in fields},
    }


def refuse_unknown(attributes: Mapping[str, Any], known: Iterable[str], *, where: str) -> None:
    """Raises ``NotImplementedError`` naming every attribute that is unknown and switched on."""
    known = set(known)
    strange = {
        name: value
        for name, value in attributes.items()
        if name not in known and value not in (None, False, 0, "", [], {})
    }
    if strange:
        shown = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in strange.items())
        raise NotImplementedError(
            f"{where}: not understood and may change the mathematics: {shown}"
        )


def _positive(name: str, value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {name} must be a positive integer, got {value!r}")
    return value


def _token_ids(value: int | list[int] | None, where: str) -> tuple[int, ...]:
    ids = [value] if isinstance(value, int) else value or []
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{where}: eos_token_id must be a token id or a list of them, got {value}")
    return tuple(ids)


def _refuse_activation(config: Mapping[str, Any], where: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise NotImplementedError(
            f"{where}: hidden_act {activation!r} is not supported; only 'silu' is"
        )


def _refuse_window(
    config: Mapping[str, Any], family: _Family, sizes: Mapping[str, int], where: str
) -> None:
    """A sliding window is harmless when switched off, or too wide to hide a token."""
    window = config.get("sliding_window", family.window)
    on = config.get("use_sliding_window", not family.window_per_layer) and window is not None
    if family.window_per_layer:
        on = on and config.get("max_window_layers", 28) < sizes["num_hidden_layers"]
    layers = config.get("layer_types")
    if layers is not None:
        if unknown := set(layers) - {"full_attention", "sliding_attention"}:
            raise NotImplementedError(
                f"{where}: layer_types {sorted(unknown)} are not supported; "
                "only 'full_attention' is"
            )
        slides = "sliding_attention" in layers
        on = slides if family.window_per_layer else on or slides
    longest = sizes["max_position_embeddings"]
    if on and (window is None or window < longest):
        raise NotImplementedError(
            f"{where}: sliding_window={window} hides tokens within max_position_embeddings="
            f"{longest}, and sliding-window attention is not supported; overriding "
            "max_position_embeddings with the window's size gives the model without it"
        )


def _rope(config: Mapping[str, Any], *, explicit: bool, where: str) -> RopeConfig:
    rope = dict(config["rope_parameters"])
    kind = rope.get("rope_type") or "default"
    if kind not in _ROPE_FIELDS:
        raise NotImplementedError(
            f"{where}: rope type {kind!r} is not supported; supported types: "
            f"{', '.join(_ROPE_FIELDS)}"
        )
    known = {"rope_type", "rope_theta", *_ROPE_HARMLESS, *sum(_ROPE_FIELDS.values(), ())}
    refuse_unknown(rope, known, where=f"{where}: rope_parameters")
    for holder in (config, rope):
        share = holder.get("partial_rotary_factor")
        if share not in (None, 1):
            raise NotImplementedError(
                f"{where}: partial_rotary_factor={share} is not supported; only 1 is"
            )
    if kind == "dynamic" and not explicit:
        # Hugging Face stretches beyond max_position_embeddings, whatever stands here.
        rope.pop("original_max_position_embeddings", None)
    original = rope.get("original_max_position_embeddings")
    if kind == "yarn" and rope.get("factor") is None and original:
        rope["factor"] = config["max_position_embeddings"] / original
    for name in _ROPE_REQUIRED.get(kind, ()):
        if rope.get(name) is None:
            raise ValueError(f"{where}: rope type {kind!r} needs {name}")
    used = {name: rope[name] for name in _ROPE_FIELDS[kind] if rope.get(name) is not None}
    for name, value in used.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"{where}: rope {name} must be a number, got {value!r}")
    return RopeConfig(rope_type=kind, rope_theta=float(rope.get("rope_theta") or 10000.0), **used)

"""``config.json`` to ``ModelConfig``, refusing by name what would change the mathematics.

Reads both of Hugging Face's forms: version 4 (``rope_theta``, ``rope_scaling``) and version 5
(``rope_parameters``). GGUF metadata and our own checkpoints come through here too, in an explicit
form (``model_type`` ``lserve_jax``) in which every flag that a family only implies is written out.
"""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from convert.json_values import flag, json_object, number, positive_int, shortened, token_ids
from lserve_jax.model.config import ModelConfig, RopeConfig

EXPLICIT = "lserve_jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What a ``model_type`` implies, beyond its config's attributes."""

    flags: tuple[str, ...] = ()  # which of _FLAGS its config may carry
    qkv_bias: bool = False
    out_bias_too: bool = False  # attention_bias also means the output projection
    qk_norm: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    window: int | None = None  # sliding_window when the config has none
    window_per_layer: bool = False  # off unless use_sliding_window, and then by layer
    full_layers: int | None = None  # max_window_layers when the config has none
    rope_theta: float = 10000.0
    original_length: int | None = None  # original_max_position_embeddings when it is not given
    rms_norm_eps: float = 1e-6
    tied: bool = False  # tie_word_embeddings when the config has none
    nope_interval: int | None = None  # of layers without rotary embedding, if it has such


_FLAGS = ("attention_bias", "attention_out_bias", "mlp_bias", "qk_norm")
FAMILIES = {
    "llama": _Family(flags=("attention_bias", "mlp_bias"), out_bias_too=True),
    "mistral": _Family(window=4096),
    # Qwen2 always has the three biases, whatever its config says of attention_bias.
    "qwen2": _Family(
        flags=("attention_bias",),
        qkv_bias=True,
        window=4096,
        window_per_layer=True,
        full_layers=28,
    ),
    "qwen3": _Family(
        flags=("attention_bias",),
        out_bias_too=True,
        qk_norm=True,
        head_dim=128,
        window=4096,
        window_per_layer=True,
        full_layers=28,
    ),
    "phi3": _Family(rms_norm_eps=1e-5, original_length=4096),
    "smollm3": _Family(
        flags=("attention_bias", "mlp_bias"),
        out_bias_too=True,
        window_per_layer=True,
        rope_theta=2e6,
        tied=True,
        nope_interval=4,
    ),
    EXPLICIT: _Family(flags=_FLAGS),
}

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_HANDLED = (
    "model_type",
    *SIZES,
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
_NOPE = ("no_rope_layers", "no_rope_layer_interval")
# Version 4's spelling of rope_parameters; canonical() rewrites them.
_ROPE_V4 = ("rope_theta", "rope_scaling", "original_max_position_embeddings")
# Known not to change what the model computes.
_HARMLESS = (
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path"),
    *("_flash_attn_2_enabled", "architectures", "attention_dropout", "auto_map"),
    *("attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout", "dtype"),
    *("embd_dropout", "embd_pdrop", "finetuning_task", "gradient_checkpointing", "hidden_dropout"),
    *("hidden_dropout_prob", "id2label", "initializer_range", "is_decoder", "is_llama_config"),
    *("keys_to_ignore_at_inference", "label2id", "max_sequence_length", "model_max_length"),
    *("name_or_path", "num_labels", "output_attentions", "output_hidden_states", "output_past"),
    *("pad_token_id", "prefix", "pretraining_tp", "problem_type", "resid_pdrop"),
    *("residual_dropout", "return_dict", "sep_token_id", "task_specific_params"),
    *("tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript"),
    *("transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed"),
    *("unsloth_version", "use_bfloat16", "use_cache"),
    # Settings of sampling and beam search, which old configs carried.
    *("bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate"),
    *("suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
)
# Known to change nothing at this value alone.
_NEUTRAL = {
    "add_cross_attention": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "qk_layernorm": False,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_bias": False,
    "use_mrope": False,
    "use_qk_norm": False,
    **dict.fromkeys(_FLAGS, False),  # those that a family cannot have
}

# Which fields of RopeConfig a rope_type uses; the others are ignored, as Hugging Face does.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("long_factor", "short_factor"),
    ),
}
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("long_factor", "short_factor"),
}
_ROPE_HARMLESS = ("type", "partial_rotary_factor", "finetuned")
_ROPE_RENAMED = {"su": "longrope"}  # Phi-3's first name for it


def canonical(raw: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """``raw`` with version 4's rope attributes rewritten as version 5's ``rope_parameters``.

    Raises ``ValueError`` where these are not objects; ``where`` names the file.
    """
    config = {key: value for key, value in raw.items() if key not in _ROPE_V4}
    rope = json_object("rope_scaling", raw.get("rope_scaling"), where)
    rope = rope or json_object("rope_parameters", raw.get("rope_parameters"), where)
    if "full_attention" in rope:  # one dict per kind of layer; the other kinds are refused
        rope = json_object("rope_parameters", rope["full_attention"], where)
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
    allowed = {*_HANDLED, *_ROPE_V4, *FAMILIES[EXPLICIT].flags} - {"model_type"}
    for name in overrides:
        if name not in allowed:
            raise ValueError(
                f"config override {name!r} is unknown; known attributes: "
                f"{', '.join(sorted(allowed))}"
            )
    changed = canonical(overrides, where="config override")
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
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(name for name in FAMILIES if name != EXPLICIT)
        raise NotImplementedError(
            f"{where}: model_type {kind!r} is not supported; supported types: {known}"
        )
    family = FAMILIES[kind]
    refuse_unknown(
        config,
        {*_HANDLED, *_HARMLESS, *family.flags, *_family_attributes(kind)},
        neutral=_NEUTRAL,
        where=where,
    )
    sizes = {name: positive_int(name, config.get(name), where) for name in SIZES}
    heads = sizes["num_attention_heads"]
    kv_heads = _given(config, "num_key_value_heads", heads)
    head_dim = _given(config, "head_dim", family.head_dim or sizes["hidden_size"] // heads)
    sizes["num_key_value_heads"] = positive_int("num_key_value_heads", kv_heads, where)
    sizes["head_dim"] = positive_int("head_dim", head_dim, where)
    _refuse_activation(config, where)
    flags = {name: flag(name, config.get(name), where) for name in _FLAGS}
    attention_bias = family.qkv_bias or flags["attention_bias"]
    bos = token_ids("bos_token_id", config.get("bos_token_id"), sizes["vocab_size"], where)
    if len(bos) > 1:
        raise ValueError(f"{where}: bos_token_id must be one token id, got {bos}")
    return _made(
        ModelConfig,
        where,
        **sizes,
        rms_norm_eps=float(
            number("rms_norm_eps", config.get("rms_norm_eps", family.rms_norm_eps), where)
        ),
        rope=_rope(config, kind, where),
        nope_layers=_nope_layers(config, kind, sizes["num_hidden_layers"], where),
        sliding_window=_window(config, family, sizes, where),
        tie_word_embeddings=flag(
            "tie_word_embeddings", config.get("tie_word_embeddings", family.tied), where
        ),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias if family.out_bias_too else flags["attention_out_bias"],
        mlp_bias=flags["mlp_bias"],
        qk_norm=family.qk_norm or flags["qk_norm"],
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=token_ids(
            "eos_token_id", config.get("eos_token_id"), sizes["vocab_size"], where
        ),
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The explicit form of ``config``, which ``parse`` turns back into the same value."""
    attributes = dataclasses.asdict(config)
    rope = attributes.pop("rope")
    eos = attributes.pop("eos_token_ids")
    fields = ("rope_theta", "rope_type", *ROPE_FIELDS[config.rope.rope_type])
    return {
        "model_type": EXPLICIT,
        **attributes,
        "eos_token_id": list(eos),
        "rope_parameters": {name: rope[name] for name in fields},
    }


def refuse_unknown(
    attributes: Mapping[str, Any],
    known: Iterable[str],
    *,
    where: str,
    neutral: Mapping[str, Any] | None = None,
) -> None:
    """Raises ``NotImplementedError`` naming every attribute that is unknown and not null.

    An attribute of ``neutral`` passes at the value given there. Any other value may change what
    is computed, also ``false`` and 0: some settings are on where they are absent.
    """
    known, neutral = set(known), neutral or {}
    strange = [
        f"{name}={reprlib.repr(value)}"
        for name, value in attributes.items()
        if name not in known and value is not None
        if name not in neutral or value != neutral[name]
    ]
    if strange:
        raise NotImplementedError(
            f"{where}: not understood and may change the mathematics: "
            f"{', '.join(shortened(strange))}"
        )


def _made[T](kind: type[T], where: str, **fields: Any) -> T:
    """``kind(**fields)``, whose errors name the file."""
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _given(config: Mapping[str, Any], name: str, default: int) -> Any:
    value = config.get(name)
    return default if value is None else value


def _family_attributes(kind: str) -> tuple[str, ...]:
    """Attributes that this ``model_type`` alone has."""
    if kind == EXPLICIT:
        return ("nope_layers",)
    return () if FAMILIES[kind].nope_interval is None else _NOPE


def _refuse_activation(config: Mapping[str, Any], where: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise NotImplementedError(
            f"{where}: hidden_act {activation!r} is not supported; only 'silu' is"
        )


def _nope_layers(
    config: Mapping[str, Any], kind: str, num_layers: int, where: str
) -> tuple[int, ...]:
    """The layers without rotary embedding."""
    if kind == EXPLICIT:
        listed = config.get("nope_layers") or []
        if not isinstance(listed, list | tuple):
            raise ValueError(f"{where}: nope_layers must be a list of layers, got {listed!r}")
        return tuple(listed)
    interval = FAMILIES[kind].nope_interval
    if interval is None:
        return ()
    uses_rope = config.get("no_rope_layers")
    if uses_rope is None:
        interval = positive_int(
            "no_rope_layer_interval", _given(config, "no_rope_layer_interval", interval), where
        )
        return tuple(range(interval - 1, num_layers, interval))
    if (
        not isinstance(uses_rope, list)
        or len(uses_rope) < num_layers
        or any(value not in (0, 1) for value in uses_rope)
    ):
        raise ValueError(
            f"{where}: no_rope_layers must be a list of 0 and 1 for each of {num_layers} layers, "
            f"got {reprlib.repr(uses_rope)}"
        )
    return tuple(i for i in range(num_layers) if not uses_rope[i])


def _window(
    config: Mapping[str, Any], family: _Family, sizes: Mapping[str, int], where: str
) -> int | None:
    """The window that no sequence may outgrow; None where it is switched off.

    Raises ``NotImplementedError`` for one that hides tokens within the model's limit.
    """
    window = config.get("sliding_window", family.window)
    if window is not None:
        window = positive_int("sliding_window", window, where)
    use = config.get("use_sliding_window")
    on = not family.window_per_layer if use is None else flag("use_sliding_window", use, where)
    if family.full_layers is not None:
        full_layers = number(
            "max_window_layers", _given(config, "max_window_layers", family.full_layers), where
        )
        on = on and full_layers < sizes["num_hidden_layers"]
    layers = config.get("layer_types")
    if layers is not None:
        if not isinstance(layers, list) or len(layers) != sizes["num_hidden_layers"]:
            raise ValueError(
                f"{where}: layer_types must be a list of {sizes['num_hidden_layers']} kinds, one "
                f"for each layer, got {reprlib.repr(layers)}"
            )
        known = ("full_attention", "sliding_attention")
        if unknown := sorted({str(kind) for kind in layers if kind not in known}):
            raise NotImplementedError(
                f"{where}: layer_types {unknown} are not supported; only 'full_attention' is"
            )
        slides = "sliding_attention" in layers
        if slides and window is None:
            raise ValueError(f"{where}: layer_types has 'sliding_attention', but no sliding_window")
        on = slides if family.window_per_layer else on or slides
    longest = sizes["max_position_embeddings"]
    if not on or window is None:
        return None
    if window < longest:
        raise NotImplementedError(
            f"{where}: sliding_window={window} hides tokens within max_position_embeddings="
            f"{longest}, and sliding-window attention is not supported; overriding "
            "max_position_embeddings with the window's size gives the model without it"
        )
    return window


def _rope(config: Mapping[str, Any], family: str, where: str) -> RopeConfig:
    rope = dict(config["rope_parameters"])
    kind = rope.get("rope_type")
    kind = "default" if kind is None else kind
    if isinstance(kind, str):
        kind = _ROPE_RENAMED.get(kind, kind)
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise NotImplementedError(
            f"{where}: rope type {kind!r} is not supported; supported types: "
            f"{', '.join(ROPE_FIELDS)}"
        )
    known = {"rope_type", "rope_theta", *_ROPE_HARMLESS, *sum(ROPE_FIELDS.values(), ())}
    refuse_unknown(rope, known, where=f"{where}: rope_parameters")
    for holder in (config, rope):
        share = holder.get("partial_rotary_factor")
        if share not in (None, 1):
            raise NotImplementedError(
                f"{where}: partial_rotary_factor={share} is not supported; only 1 is"
            )
    if rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = FAMILIES[family].original_length
    if kind == "dynamic" and family != EXPLICIT:
        # Hugging Face stretches beyond max_position_embeddings, whatever stands here.
        rope.pop("original_max_position_embeddings", None)
    original = rope.get("original_max_position_embeddings")
    if original is not None:
        original = positive_int("rope original_max_position_embeddings", original, where)
    if kind in ("yarn", "longrope") and rope.get("factor") is None and original:
        rope["factor"] = config["max_position_embeddings"] / original
        if kind == "longrope":
            rope["factor"] = max(rope["factor"], 1.0)
    for name in _ROPE_REQUIRED.get(kind, ()):
        if rope.get(name) is None:
            raise ValueError(f"{where}: rope type {kind!r} needs {name}")
    theta = rope.get("rope_theta")
    theta = FAMILIES[family].rope_theta if theta is None else theta
    return _made(
        RopeConfig,
        where,
        rope_type=kind,
        rope_theta=float(number("rope_theta", theta, where)),
        **{
            name: _rope_value(name, rope[name], where)
            for name in ROPE_FIELDS[kind]
            if rope.get(name) is not None
        },
    )


def _rope_value(name: str, value: Any, where: str) -> Any:
    if name == "truncate":
        return flag("rope truncate", value, where)
    if name in ("long_factor", "short_factor"):
        if not isinstance(value, list | tuple):
            raise ValueError(
                f"{where}: rope {name} must be a list of numbers, got {reprlib.repr(value)}"
            )
        return tuple(number(f"rope {name}", item, where) for item in value)
    return number(f"rope {name}", value, where)

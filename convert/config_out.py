"""``ModelConfig`` to Hugging Face's ``config.json``: what ``config_json`` reads, written."""

from typing import Any

from convert.config_json import FAMILIES, ROPE_FIELDS, SIZES, canonical, parse
from lserve_jax.model.config import ModelConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Hugging Face's ``config.json`` of the first ``model_type`` that can be ``config``.

    In version 4's spelling, which version 5 reads too. Raises ``NotImplementedError`` if there is
    none.
    """
    for kind in _ARCHITECTURES:
        attributes = _attributes_of(kind, config)
        if parse(canonical(attributes, where=kind), where=kind) == config:
            return attributes
    raise NotImplementedError(
        f"none of {', '.join(_ARCHITECTURES)} has all of what {config} describes"
    )


def _attributes_of(kind: str, config: ModelConfig) -> dict[str, Any]:
    """What ``kind`` can say of ``config``."""
    family, rope = FAMILIES[kind], config.rope
    names = (*SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
    eos = list(config.eos_token_ids)
    attributes = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "hidden_act": "silu",
        **{name: getattr(config, name) for name in (*names, *family.flags)},
        "rope_theta": rope.rope_theta,
        "pad_token_id": None,  # some types have one by default, which may exceed the vocabulary
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    fields = {name: getattr(rope, name) for name in ROPE_FIELDS[rope.rope_type]}
    if rope.rope_type != "default":
        given = {name: value for name, value in fields.items() if value is not None}
        attributes["rope_scaling"] = {"rope_type": rope.rope_type, **given}
    if family.nope_interval is not None:
        uses_rope = [int(i not in config.nope_layers) for i in range(config.num_hidden_layers)]
        attributes["no_rope_layers"] = uses_rope
    if family.window_per_layer:
        kinds = ("full_attention", "sliding_attention")
        slides = config.sliding_window is not None
        attributes["layer_types"] = [kinds[slides]] * config.num_hidden_layers
        attributes["use_sliding_window"] = slides
    if family.window is not None or family.window_per_layer:
        attributes["sliding_window"] = config.sliding_window
    return attributes

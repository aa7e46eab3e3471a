"""The one table of tensor names: Hugging Face, GGUF, and where each tensor lives in our tree.

LoRA adapters name modules as Hugging Face does, so the same table serves them. Shapes are not in
the table: they come from the model itself (``lserve_jax.model.params.abstract_params``).

A *leaf* is one array of the parameter tree, named by its dotted path. Query, key and value
projections share one leaf, as do gate and up: such a tensor is a *part* of its leaf, a range of
the last axis. Phi-3's checkpoints store these leaves whole.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from convert.json_values import shortened
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params, abstract_params

Naming = Literal["hf", "phi3", "gguf"]
_Row = tuple[str, str, str, str, bool]

# Hugging Face, GGUF, leaf, part, transposed. Checkpoints store a projection as [out, in]; our
# kernels are [in, out].
_MODEL: tuple[_Row, ...] = (
    ("model.embed_tokens.weight", "token_embd.weight", "embed_tokens.embedding", "all", False),
    ("model.norm.weight", "output_norm.weight", "norm.scale", "all", False),
    ("lm_head.weight", "output.weight", "lm_head.kernel", "all", True),
)
_LAYER_PREFIXES = ("model.layers.{}.", "blk.{}.", "layers.{}.")
_LAYER: tuple[_Row, ...] = (
    ("input_layernorm.weight", "attn_norm.weight", "input_layernorm.scale", "all", False),
    ("self_attn.q_proj.weight", "attn_q.weight", "self_attn.qkv_proj.kernel", "q", True),
    ("self_attn.k_proj.weight", "attn_k.weight", "self_attn.qkv_proj.kernel", "k", True),
    ("self_attn.v_proj.weight", "attn_v.weight", "self_attn.qkv_proj.kernel", "v", True),
    ("self_attn.q_proj.bias", "attn_q.bias", "self_attn.qkv_proj.bias", "q", False),
    ("self_attn.k_proj.bias", "attn_k.bias", "self_attn.qkv_proj.bias", "k", False),
    ("self_attn.v_proj.bias", "attn_v.bias", "self_attn.qkv_proj.bias", "v", False),
    ("self_attn.q_norm.weight", "attn_q_norm.weight", "self_attn.q_norm.scale", "all", False),
    ("self_attn.k_norm.weight", "attn_k_norm.weight", "self_attn.k_norm.scale", "all", False),
    ("self_attn.o_proj.weight", "attn_output.weight", "self_attn.o_proj.kernel", "all", True),
    ("self_attn.o_proj.bias", "attn_output.bias", "self_attn.o_proj.bias", "all", False),
    (
        "post_attention_layernorm.weight",
        "ffn_norm.weight",
        "post_attention_layernorm.scale",
        "all",
        False,
    ),
    ("mlp.gate_proj.weight", "ffn_gate.weight", "mlp.gate_up_proj.kernel", "gate", True),
    ("mlp.up_proj.weight", "ffn_up.weight", "mlp.gate_up_proj.kernel", "up", True),
    ("mlp.gate_proj.bias", "ffn_gate.bias", "mlp.gate_up_proj.bias", "gate", False),
    ("mlp.up_proj.bias", "ffn_up.bias", "mlp.gate_up_proj.bias", "up", False),
    ("mlp.down_proj.weight", "ffn_down.weight", "mlp.down_proj.kernel", "all", True),
    ("mlp.down_proj.bias", "ffn_down.bias", "mlp.down_proj.bias", "all", False),
)

# What Phi-3 has in place of the parts of these leaves.
_PHI3_LAYER: tuple[_Row, ...] = (
    ("self_attn.qkv_proj.weight", "", "self_attn.qkv_proj.kernel", "all", True),
    ("mlp.gate_up_proj.weight", "", "mlp.gate_up_proj.kernel", "all", True),
    *(row for row in _LAYER if row[3] == "all"),
)

# Tables of rotary frequencies, which the config determines.
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope_freqs\.weight")


@dataclass(frozen=True, kw_only=True)
class TensorSlot:
    """Where one tensor of a checkpoint goes."""

    hf: str
    gguf: str
    leaf: str
    leaf_shape: tuple[int, ...]
    columns: slice  # the tensor's part of the leaf's last axis
    transposed: bool

    def name(self, naming: Naming) -> str:
        return self.gguf if naming == "gguf" else self.hf

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor as a checkpoint stores it."""
        shape = (*self.leaf_shape[:-1], self.columns.stop - self.columns.start)
        return shape[::-1] if self.transposed else shape

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor's place in ``leaf``, oriented as a checkpoint stores it."""
        part = leaf[..., self.columns]
        return part.T if self.transposed else part


def tensor_slots(config: ModelConfig, naming: Naming = "hf") -> list[TensorSlot]:
    """One slot for every tensor that a checkpoint of this ``config`` must hold."""
    layer_rows = _PHI3_LAYER if naming == "phi3" else _LAYER
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}
    columns = _columns(config)

    def fill_in(rows: tuple[_Row, ...], prefixes: tuple[str, ...]) -> list[TensorSlot]:
        found = []
        for *names, part, transposed in rows:
            hf, gguf, leaf = (prefix + name for prefix, name in zip(prefixes, names, strict=True))
            if leaf in shapes:
                whole = slice(0, shapes[leaf][-1])
                found.append(
                    TensorSlot(
                        hf=hf,
                        gguf=gguf,
                        leaf=leaf,
                        leaf_shape=shapes[leaf],
                        columns=columns.get(part, whole),
                        transposed=transposed,
                    )
                )
        return found

    result = fill_in(_MODEL, ("", "", ""))
    for i in range(config.num_hidden_layers):
        result += fill_in(layer_rows, tuple(prefix.format(i) for prefix in _LAYER_PREFIXES))
    assert {slot.leaf for slot in result} == set(shapes), "the model has a leaf without a name"
    return result


def _columns(config: ModelConfig) -> dict[str, slice]:
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    F = config.intermediate_size
    return {
        "q": slice(0, q),
        "k": slice(q, q + kv),
        "v": slice(q + kv, q + 2 * kv),
        "gate": slice(0, F),
        "up": slice(F, 2 * F),
    }


def tied_names(naming: Naming) -> tuple[str, str]:
    """The names of the embedding table and of the output projection, which may be one tensor."""
    (hf_embedding, embedding, *_), _, (hf_head, head, *_) = _MODEL
    return (embedding, head) if naming == "gguf" else (hf_embedding, hf_head)


def is_derived(name: str) -> bool:
    """Whether a checkpoint may hold tensor ``name`` although the model has no place for it."""
    return _DERIVED.fullmatch(name) is not None


def refuse_more_layers(num_layers: Any, num_tensors: int, *, where: str) -> None:
    """Raises ``ValueError`` for more layers than tensors, before work is done for each layer."""
    if isinstance(num_layers, int) and num_layers > num_tensors:
        raise ValueError(
            f"{where}: num_hidden_layers={num_layers}, but there are {num_tensors} tensors"
        )


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Raises one ``ValueError`` that counts missing, unexpected and misshapen tensors.

    It lists the first of them.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [name for name in found if found[name] != expected.get(name, found[name])]
    if not missing and not unexpected and not misshapen:
        return
    lines = [f"missing: {name}, expected {expected[name]}" for name in missing]
    lines += [f"unexpected: {name}, found {found[name]}" for name in unexpected]
    lines += [
        f"misshapen: {name}, found {found[name]}, expected {expected[name]}" for name in misshapen
    ]
    raise ValueError(
        f"{where} does not hold the tensors its config describes "
        f"({len(missing)} missing, {len(unexpected)} unexpected, {len(misshapen)} misshapen):\n  "
        + "\n  ".join(shortened(lines))
    )


def flatten(params: Params) -> dict[str, Any]:
    """The leaves of a nested dict by dotted path, such as ``layers.0.mlp.down_proj.kernel``."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{path}": leaf for path, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of ``flatten``; layer indices become ints again."""
    params: dict[Any, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = params
        for key in parents:
            node = node.setdefault(int(key) if key.isdigit() else key, {})
        node[last] = leaf
    return params

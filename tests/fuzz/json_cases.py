"""Mutated config.json, tokenizer files, chat templates, and our own checkpoints."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import HOSTILE, NO_OBJECTS, Case, Expect, cut, flip, in_copy, paths, replaced, with_file
from cases import without as lacking

_MORE_KEYS = (
    *("sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "is_causal"),
    *("partial_rotary_factor", "rope_parameters", "num_experts", "quantization_config"),
    *("original_max_position_embeddings", "attention_out_bias", "attention_bias", "mlp_bias"),
    *("no_rope_layers", "some_new_attribute", "dtype", "torch_dtype"),
)
_ROPE = {
    **{"factor": 2.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0},
}
_ROPE_KEYS = (
    *("rope_type", "factor", "original_max_position_embeddings", "low_freq_factor"),
    *("high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale"),
    *("mscale_all_dim", "truncate", "rope_theta"),
)


def config_cases(base: Path) -> Iterator[Case]:
    source, file = base / "hf", "config.json"
    config = json.loads((source / file).read_text())
    raw, draw = (source / file).read_bytes(), random.Random(5)

    def case(label: str, value: Any, expect: Expect = "any") -> Case:
        return Case(label, expect, with_file(source, file, value))

    yield case("as it is", config, "same")
    for key in (*config, *_MORE_KEYS):
        for label, value in HOSTILE.items():
            yield case(f"{key} {label}", {**config, key: value})
        if key in config:
            yield case(f"no {key}", lacking(config, (key,)))
    for kind in ("linear", "dynamic", "llama3", "yarn", "longrope", "su", "default"):
        scaling = {"rope_type": kind, **_ROPE}
        for key in _ROPE_KEYS:
            for label, value in HOSTILE.items():
                changed = {**config, "rope_scaling": {**scaling, key: value}}
                yield case(f"{kind} {key} {label}", changed)
    equal = {"rope_type": "llama3", **_ROPE, "low_freq_factor": 4.0}
    yield case("llama3 low is high", {**config, "rope_scaling": equal}, "refuse")
    for key, values in {
        "num_attention_heads": (3, 8),
        "num_hidden_layers": (1, 3),
        "vocab_size": (47, 49, 10**12),
        "hidden_size": (31, 64),
        "head_dim": (7, 16),
        "bos_token_id": ([1, 2], 48, "<s>"),
        "max_position_embeddings": (2**31,),
    }.items():
        for value in values:
            yield case(f"{key} is {value}", {**config, key: value}, "refuse")
    for label, content in NO_OBJECTS.items():
        yield case(f"file is {label}", content, "refuse")
    for number in range(100):
        yield case(f"bit {number}", flip(raw, draw))
        yield case(f"cut {number}", cut(raw.strip(), draw), "refuse")
    ours = json.loads((base / "orbax" / file).read_text())
    for key in ours:
        for label, value in HOSTILE.items():
            changed = with_file(base / "orbax", file, {**ours, key: value})
            yield Case(f"orbax: {key} {label}", "any", changed)


def tokenizer_cases(base: Path) -> Iterator[Case]:
    source = base / "hf"

    def case(label: str, file: str, value: Any, expect: Expect = "any") -> Case:
        return Case(f"{file}: {label}", expect, with_file(source, file, value))

    file = "tokenizer.json"
    raw, draw = (source / file).read_bytes(), random.Random(9)
    whole = json.loads(raw)
    yield case("as it is", file, whole, "same")
    for path in paths(whole, longest=8):
        name = ".".join(map(str, path))
        for label, value in HOSTILE.items():
            if label not in ("2^31", "10^6"):  # ids that make large tables
                yield case(f"{name} {label}", file, replaced(whole, path, value))
        yield case(f"no {name}", file, lacking(whole, path))
    for number in range(80):
        yield case(f"cut {number}", file, cut(raw.strip(), draw), "refuse")
        yield case(f"bit {number}", file, flip(raw, draw))
    for label, change in {
        "more tokens than the model": {"vocab": {**whole["model"]["vocab"], "zz": 1000}},
        "no tokens": {"vocab": {}, "merges": []},
        "an id that is negative": {"vocab": {**whole["model"]["vocab"], "zz": -1}},
    }.items():
        yield case(label, file, {**whole, "model": {**whole["model"], **change}})
    bad = {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": False}
    yield case("a wrong expression", file, {**whole, "pre_tokenizer": bad}, "refuse")
    config = json.loads((source / "tokenizer_config.json").read_text())
    values = {
        **HOSTILE,
        **{"token": {"content": "<|bos|>"}, "no content": {"x": 1}, "number": {"content": 5}},
        **{"named": [{"name": "default", "template": "x"}], "unnamed": [{"template": "x"}]},
        **{"no template": [{"name": "default"}], "unknown": "<nowhere>", "by id": {"48": "x"}},
        **{"new": {"48": {"content": "<new>"}}, "gap": {"99": {"content": "<new>"}}},
    }
    keys = (*config, "add_bos_token", "unk_token", "pad_token", "bos_token", "mask_token")
    keys += ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder")
    for key in dict.fromkeys((*keys, "model_max_length", "chat_template")):
        for label, value in values.items():
            yield case(f"{key} {label}", "tokenizer_config.json", {**config, key: value})
    for label, value in values.items():
        yield case(f"a token {label}", "added_tokens.json", {"<new>": value})
        yield case(f"a marker {label}", "special_tokens_map.json", {"eos_token": value})
        yield case(f"ends {label}", "generation_config.json", {"eos_token_id": value})
    for name in (
        *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
        "added_tokens.json",
    ):
        for label, content in NO_OBJECTS.items():
            yield case(label, name, content, "refuse")
    for number, text in enumerate(_TEMPLATES):
        yield case(f"{number}", "chat_template.jinja", text.encode())
    yield case("no UTF-8", "chat_template.jinja", b"\xff\xfe", "refuse")


# Templates with mistakes; none that would run without end elsewhere.
_TEMPLATES = (
    *("{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{% break %}", "{% include 'x' %}", "{% import 'x' as y %}"),
    *("{% extends 'x' %}", "{% if %}", "{{", "{% endfor %}", "{{ x.y.z }}", "{{ messages.x.y }}"),
    *("{{ raise_exception('no') }}", "{{ raise_exception() }}", "{{ strftime_now(1) }}"),
    *("{{ messages | nothing }}", "{{ messages is nothing }}", "{{ messages[0](1) }}"),
    *("{{ ''.__class__ }}", "{{ messages.append(1) }}", "{{ messages | tojson(indent='') }}"),
    *("{{ range(10**9) }}", "{{ range(10**9) | list }}", "{{ namespace() | tojson }}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ none | length }}", "{{ 5 % 0 }}"),
    *("{% for a, b in messages %}{% endfor %}", "{% for a in 5 %}{% endfor %}", "{{ loop }}"),
    *("{% set messages.x = 1 %}", "{% call f() %}{% endcall %}", "{{ caller() }}", "{{ -'a' }}"),
    *("{% generation %}", "{% raw %}", "{# open", "{{ 'a' | int(base=99) }}", "{{ {}[[]] }}"),
    *("{{ '%d' % 'a' }}", "{{ '{0.__class__}'.format(1) }}", "{{ '{'.format(1) }}"),
    *("{{ messages | map('nothing') | list }}", "{{ messages | sort }}", "{{ 'a'.encode('x') }}"),
)


def orbax_cases(base: Path) -> Iterator[Case]:
    source, draw = base / "orbax", random.Random(3)
    yield Case("as it is", "same", in_copy(source, lambda target: None))
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        file, raw = str(path.relative_to(source)), path.read_bytes()

        def remove(target: Path, file: str = file) -> None:
            (target / file).unlink()

        def folder(target: Path, file: str = file) -> None:
            (target / file).unlink()
            (target / file).mkdir()

        yield Case(f"no {file}", "any", in_copy(source, remove))
        yield Case(f"{file} is a folder", "any", in_copy(source, folder))
        contents = {"garbage": b"\xde\xad" * 50, "object": b"{}", **NO_OBJECTS}
        contents |= {f"cut {number}": cut(raw, draw) for number in range(4) if raw}
        contents |= {f"bit {number}": flip(raw, draw) for number in range(8) if raw}
        for label, content in contents.items():
            yield Case(f"{file}: {label}", "any", with_file(source, file, content))

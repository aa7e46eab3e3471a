"""Mutated safetensors files, their index, and LoRA adapters."""

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cases import HOSTILE, NO_OBJECTS, Case, Expect, cut, flip, in_copy, with_file

_INDEX = "model.safetensors.index.json"


def _parse(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _pack(header: Any, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(header: dict, name: str, **changes: Any) -> dict:
    return {**header, name: {**header[name], **changes}}


def safetensors_cases(base: Path) -> Iterator[Case]:
    source = base / "hf"
    for name, expect, raw in _files(source / "model.safetensors"):
        yield Case(name, expect, with_file(source, "model.safetensors", raw))
    yield from _index_cases(base / "sharded")


def _files(path: Path) -> Iterator[tuple[str, Expect, bytes]]:
    header, data = _parse(path)
    raw, draw = path.read_bytes(), random.Random(1)
    yield "as it is", "same", raw
    size = len(raw) - len(data) - 8
    for length in (0, 1, size - 1, size + 1, size + 8, 10**6, 10**9, 2**32, 2**63, 2**64 - 1):
        yield f"header of {length}", "refuse", _pack(header, data, length)
    names = [name for name in header if name != "__metadata__"]
    for name in names[::2]:
        for dtype in ("F16", "F64", "I8", "I32", "U8", "F8_E4M3", "BOOL", "XX", "", None, 5):
            yield f"{name}: {dtype}", "refuse", _pack(_entry(header, name, dtype=dtype), data)
        shape, (start, stop) = header[name]["shape"], header[name]["data_offsets"]
        shapes: list[Any] = [[], [0], [-1], [2**63], [2**32, 2**32], [1.5], ["a"], None, "ab"]
        shapes += [[*shape, 1], [*shape, 2], [2 * size for size in shape], [2**64]]
        for other in shapes:
            yield f"{name}: {other}", "refuse", _pack(_entry(header, name, shape=other), data)
        places: list[Any] = [[start + 4, stop + 4], [start, stop - 4], [stop, start], [start]]
        places += [[start, 2**63], [-1, stop], [start, stop, stop], None, ["a", "b"]]
        places += [[2**64 - 1, 2**64 - 1], [len(data), len(data) + stop - start]]
        for other in places:
            moved = _entry(header, name, data_offsets=other)
            yield f"{name} at {other}", "refuse", _pack(moved, data)
        for field in ("dtype", "shape", "data_offsets"):
            fields = {key: value for key, value in header[name].items() if key != field}
            yield f"{name} without {field}", "refuse", _pack({**header, name: fields}, data)
        rest = {key: value for key, value in header.items() if key != name}
        yield f"no {name}", "refuse", _pack(rest, data)
    second = json.dumps(header)[:-1] + f', "{names[0]}": {json.dumps(header[names[1]])}}}'
    yield "a name twice", "refuse", _pack(second.encode(), data)
    for label, content in NO_OBJECTS.items():
        yield f"header is {label}", "refuse", _pack(content, data)
        yield f"file is {label}", "refuse", content
    yield "more bytes", "refuse", raw + b"xxxx"
    for number in range(60):
        yield f"cut {number}", "refuse", cut(raw, draw)
    for number in range(300):
        yield f"bit {number}", "any", flip(raw, draw, 0, 8 + size)


def _index_cases(source: Path) -> Iterator[Case]:
    index = json.loads((source / _INDEX).read_text())
    places = index["weight_map"]
    name = next(iter(places))
    file = places[name]

    def case(label: str, expect: Expect, value: Any) -> Case:
        return Case(f"index: {label}", expect, with_file(source, _INDEX, value))

    yield case("as it is", "same", index)
    for other in ("missing.safetensors", "", "..", ".", "a\0b", "config.json", "x" * 300):
        yield case(f"{other[:20]!r}", "refuse", {"weight_map": {**places, name: other}})
    for other in (f"../{file}", f"/{file}", f"./{file}", f"sub/{file}"):
        moved = {key: other if value == file else value for key, value in places.items()}
        yield case(f"{other!r}", "refuse", {"weight_map": moved})
    for label, value in HOSTILE.items():
        if not isinstance(value, str):
            yield case(f"a file is {label}", "refuse", {"weight_map": {**places, name: value}})
        yield case(f"weight_map is {label}", "refuse", {"weight_map": value})
    for label, content in NO_OBJECTS.items():
        yield case(label, "refuse", content)
    yield case("one file for all", "refuse", {"weight_map": dict.fromkeys(places, file)})
    changes: dict[str, tuple[Expect, Callable[[Path], object]]] = {
        "no shard": ("refuse", lambda target: (target / file).unlink()),
        "a cut shard": ("refuse", lambda t: (t / file).write_bytes((t / file).read_bytes()[:-9])),
        "a shard that is a folder": (
            "refuse",
            lambda target: ((target / file).unlink(), (target / file).mkdir()),
        ),
        "a shard that is a link": (
            "same",
            lambda t: (
                shutil.move(t / file, t.parent / "o"),
                (t / file).symlink_to(t.parent / "o"),
            ),
        ),
    }
    for label, (expect, change) in changes.items():
        yield Case(f"index: {label}", expect, in_copy(source, change))


def lora_cases(base: Path) -> Iterator[Case]:
    source = base / "lora"
    weights, settings = "adapter_model.safetensors", "adapter_config.json"
    config = json.loads((source / settings).read_text())
    header, data = _parse(source / weights)
    raw, draw = (source / weights).read_bytes(), random.Random(4)
    yield Case("as it is", "same", in_copy(source, lambda target: None))
    keys = (*config, "use_dora", "modules_to_save", "layer_replication", "fan_in_fan_out")
    for key in (*keys, "trainable_token_indices", "lora_bias", "megatron_config"):
        for label, value in HOSTILE.items():
            changed = with_file(source, settings, {**config, key: value})
            yield Case(f"{key} {label}", "any", changed)
        rest = {name: value for name, value in config.items() if name != key}
        yield Case(f"no {key}", "any", with_file(source, settings, rest))
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in ("(((", "*", ".*", "q_proj"):
            for value in (4, 8, 0, -1, None, "4", 1.5, [4]):
                changed = with_file(source, settings, {**config, key: {pattern: value}})
                yield Case(f"{key} {pattern} {value}", "any", changed)
    for name in header:
        rows, columns = header[name]["shape"]
        for shape in ([columns, rows], [rows * columns], [rows, columns, 1], [2 * rows, columns]):
            moved = _pack(_entry(header, name, shape=shape), data)
            yield Case(f"{name}: {shape}", "refuse", with_file(source, weights, moved))
        for other in ("x", name.replace("layers.0", "layers.9"), name.replace("_proj", "kv_proj")):
            renamed = {(other if key == name else key): value for key, value in header.items()}
            if len(renamed) == len(header) and other != name:
                packed = _pack(renamed, data)
                yield Case(f"{name} is {other}", "refuse", with_file(source, weights, packed))
        rest = {key: value for key, value in header.items() if key != name}
        yield Case(f"no {name}", "refuse", with_file(source, weights, _pack(rest, data)))
    yield Case("no tensors", "refuse", with_file(source, weights, _pack({}, b"")))
    yield Case("NaN", "refuse", with_file(source, weights, _pack(header, b"\xff" * len(data))))
    for file in (weights, settings):

        def remove(target: Path, file: str = file) -> None:
            (target / file).unlink()

        yield Case(f"no {file}", "refuse", in_copy(source, remove))
        for label, content in NO_OBJECTS.items():
            yield Case(f"{file} is {label}", "refuse", with_file(source, file, content))
    for number in range(60):
        yield Case(f"cut {number}", "refuse", with_file(source, weights, cut(raw, draw)))
    for number in range(120):
        flipped = flip(raw, draw, 0, len(raw) - len(data))
        yield Case(f"bit {number}", "any", with_file(source, weights, flipped))

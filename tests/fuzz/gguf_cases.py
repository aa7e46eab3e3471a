"""Mutated GGUF files."""

import copy
import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case, Expect, cut, flip

U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = 4, 5, 6, 7, 8, 9, 10, 11, 12
CODES = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"},
    **{U64: "<Q", I64: "<q", F64: "<d"},
}
# Typed values put in the place of any other; an array is its element type and its values.
VALUES: dict[str, tuple[int, Any]] = {
    **{"text": (STRING, "abc"), "empty text": (STRING, "")},
    **{"negative": (I32, -1), "-2^63": (I64, -(2**63)), "zero": (U32, 0), "one": (U32, 1)},
    **{"three": (U32, 3), "2^31-1": (U32, 2**31 - 1), "2^64-1": (U64, 2**64 - 1)},
    **{"10^6": (U64, 10**6), "3.5": (F32, 3.5), "nan": (F32, math.nan), "inf": (F32, math.inf)},
    **{"0.0": (F32, 0.0), "10^308": (F64, 1e308), "true": (BOOL, True), "false": (BOOL, False)},
    **{"numbers": (ARRAY, (U32, [1, 2])), "texts": (ARRAY, (STRING, ["a", "b"]))},
    **{"no numbers": (ARRAY, (U32, [])), "arrays": (ARRAY, (ARRAY, [(U32, [1])]))},
}
ADDED_KEYS = (
    *("general.alignment", "general.type", "split.count", "llama.attention.sliding_window"),
    *("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.expert_count"),
    *("llama.rope.scaling.original_context_length", "llama.attention.causal"),
    *("llama.rope.dimension_count", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.scores"),
    *("tokenizer.ggml.eot_token_id", "tokenizer.ggml.unknown_token_id"),
    *("tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_space_prefix"),
    *("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"),
)


class Packed(bytes):
    """A value that is written as it is."""


@dataclass
class File:
    """A GGUF file in parts that can be changed one by one."""

    keys: list[list]  # name, type, value
    tensors: list[list]  # name, dims, type, offset
    data: bytes
    fields: list[int]  # where in the file each key and tensor begins
    header: int  # where the data begin
    version: int = 3
    magic: bytes = b"GGUF"
    num_tensors: int | None = None  # as written; None: as many as there are
    num_keys: int | None = None
    num_dims: int | None = None  # of the first tensor

    def key(self, name: str) -> list:
        return next(key for key in self.keys if key[0] == name)

    def put(self, name: str, kind: int, value: Any) -> None:
        self.keys = [key for key in self.keys if key[0] != name] + [[name, kind, value]]

    def drop(self, name: str) -> None:
        self.keys = [key for key in self.keys if key[0] != name]


def parse(raw: bytes) -> File:
    """``raw`` in parts; it must be a right file."""
    place = 4

    def take(code: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from(code, raw, place)
        place += struct.calcsize(code)
        return value

    def text() -> str:
        nonlocal place
        size = take("<Q")
        place += size
        return raw[place - size : place].decode()

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind != ARRAY:
            return take(CODES[kind])
        kind, count = take("<I"), take("<Q")
        return kind, [value(kind) for _ in range(count)]

    version, num_tensors, num_keys = take("<I"), take("<Q"), take("<Q")
    fields, keys, tensors = [], [], []
    for _ in range(num_keys):
        fields.append(place)
        name, kind = text(), take("<I")
        keys.append([name, kind, value(kind)])
    for _ in range(num_tensors):
        fields.append(place)
        name, dims = text(), [take("<Q") for _ in range(take("<I"))]
        tensors.append([name, dims, take("<I"), take("<Q")])
    header = -(-place // 32) * 32
    return File(keys, tensors, raw[header:], fields, header, version=version)


def pack(file: File) -> bytes:
    """``file`` as bytes; numbers too large for their field wrap around."""

    def text(value: str | bytes) -> bytes:
        raw = value.encode() if isinstance(value, str) else value
        return struct.pack("<Q", len(raw)) + raw

    def value(kind: int, content: Any) -> bytes:
        if isinstance(content, Packed):
            return content
        if kind == STRING:
            return text(content)
        if kind != ARRAY:
            return struct.pack(CODES[kind], content)
        kind, values = content
        return struct.pack("<IQ", kind, len(values)) + b"".join(value(kind, v) for v in values)

    num_tensors = len(file.tensors) if file.num_tensors is None else file.num_tensors
    num_keys = len(file.keys) if file.num_keys is None else file.num_keys
    raw = file.magic + struct.pack("<IQQ", file.version, num_tensors, num_keys)
    for name, kind, content in file.keys:
        raw += text(name) + struct.pack("<I", kind) + value(kind, content)
    for number, (name, dims, kind, offset) in enumerate(file.tensors):
        count = len(dims) if number or file.num_dims is None else file.num_dims
        raw += text(name) + struct.pack("<I", count)
        raw += b"".join(struct.pack("<Q", size % 2**64) for size in dims)
        raw += struct.pack("<IQ", kind, offset % 2**64)
    return raw + bytes(-len(raw) % 32) + file.data


def gguf_cases(base: Path) -> Iterator[Case]:
    for name in ("f32", "q8", "pieces"):
        raw = (base / f"{name}.gguf").read_bytes()
        file = parse(raw)
        assert pack(file) == raw
        yield Case(f"{name}: as it is", "same", _writes(raw))
        yield from _damaged_bytes(name, raw, file)
        yield from _wrong_values(name, file)
    file = parse((base / "f32.gguf").read_bytes())
    for label, expect, change in (*_counts(), *_tensors(file), *_vocabulary()):
        yield Case(f"f32: {label}", expect, _changed(file, change))


def _writes(raw: bytes) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        (directory / "m.gguf").write_bytes(raw)
        return directory / "m.gguf"

    return build


def _changed(file: File, change: Callable[[File], object]) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        copied = copy.deepcopy(file)
        change(copied)
        return _writes(pack(copied))(directory)

    return build


def _damaged_bytes(name: str, raw: bytes, file: File) -> Iterator[Case]:
    draw = random.Random(name)
    places = {0, 1, 4, 8, 16, 23, 24, file.header - 1, file.header, len(raw) - 64}
    places |= {place + near for place in file.fields for near in (-1, 0, 1, 8)}
    for place in sorted(place for place in places if 0 <= place < len(raw)):
        yield Case(f"{name}: cut at {place}", "refuse", _writes(raw[:place]))
    for number in range(60):
        yield Case(f"{name}: cut {number}", "refuse", _writes(cut(raw, draw)[:-32]))
    for number in range(300):
        flipped = flip(raw, draw, 4, file.header)
        yield Case(f"{name}: bit {number}", "any", _writes(flipped))
    for number in range(100):
        damaged = raw
        for _ in range(draw.choice([2, 4, 16])):
            damaged = flip(damaged, draw, 4, file.header)
        yield Case(f"{name}: bits {number}", "any", _writes(damaged))
    for number in range(60):
        place = draw.choice(file.fields)
        length = draw.choice([0, 1, 10**6, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
        damaged = raw[:place] + struct.pack("<Q", length) + raw[place + 8 :]
        yield Case(f"{name}: length {length} {number}", "refuse", _writes(damaged))
    for size in (1, 31, 32, 4096):
        yield Case(f"{name}: {size} bytes more", "refuse", _writes(raw + b"x" * (size + 32)))


def _wrong_values(name: str, file: File) -> Iterator[Case]:
    present = [key for key, _, _ in file.keys if name == "f32" or key.startswith("tokenizer")]
    for key in (*present, *(ADDED_KEYS if name != "q8" else ())):
        for label, (kind, value) in VALUES.items():

            def put(file: File, key=key, kind=kind, value=value) -> None:
                file.put(key, kind, value)

            yield Case(f"{name}: {key} {label}", "any", _changed(file, put))
        if key in present:

            def drop(file: File, key=key) -> None:
                file.drop(key)

            yield Case(f"{name}: no {key}", "any", _changed(file, drop))

            def twice(file: File, key=key) -> None:
                file.keys.append(list(file.key(key)))

            yield Case(f"{name}: {key} twice", "refuse", _changed(file, twice))


Change = tuple[str, Expect, Callable[[File], object]]


def _counts() -> Iterator[Change]:
    for version in (0, 1, 4, 2**32 - 1, 0x03000000):
        yield f"version {version}", "refuse", lambda f, v=version: setattr(f, "version", v)
    yield "version 2", "same", lambda f: setattr(f, "version", 2)
    yield "another magic", "refuse", lambda f: setattr(f, "magic", b"GGUX")
    for count in (0, 1, 2**16, 2**32, 2**40, 2**63, 2**64 - 1):
        yield f"{count} tensors", "refuse", lambda f, n=count: setattr(f, "num_tensors", n)
        yield f"{count} keys", "refuse", lambda f, n=count: setattr(f, "num_keys", n)
    for count in (0, 5, 100, 2**20, 2**32 - 1):
        yield f"{count} dims", "refuse", lambda f, n=count: setattr(f, "num_dims", n)
    for key in ("tokens", "merges", "token_type"):
        key = f"tokenizer.ggml.{key}"
        for count in (0, 1, 2**31, 2**40, 2**60, 2**63, 2**64 - 1):
            for kind in (STRING, I32, 0, F64, ARRAY):
                packed = Packed(struct.pack("<IQ", kind, count) + bytes(64))
                yield (
                    f"{key}: {count} of {kind}",
                    "refuse",
                    lambda f, k=key, p=packed: f.put(k, ARRAY, p),
                )
        for kind in (13, 99, 2**32 - 1):
            packed = Packed(struct.pack("<IQ", kind, 4) + bytes(64))
            yield f"{key}: of type {kind}", "refuse", lambda f, k=key, p=packed: f.put(k, ARRAY, p)
    for kind in (13, 14, 255, 2**32 - 1):
        yield f"a key of type {kind}", "refuse", lambda f, k=kind: f.put("x", k, Packed(b""))
    for alignment in (0, 3, 7, 48, 4096, 2**31, 2**40):
        yield (
            f"alignment {alignment}",
            "refuse",
            lambda f, a=alignment: f.put("general.alignment", U64, a),
        )


def _tensors(file: File) -> Iterator[Change]:
    def field(number: int, place: int, value: Any) -> Callable[[File], None]:
        return lambda f: f.tensors[number].__setitem__(place, value)

    for number, (name, dims, _, offset) in enumerate(file.tensors):
        for other in (0, 1, 31, offset + 4, offset + 32, offset - 32, 2**20, 2**63, 2**64 - 32):
            if other != offset:
                yield f"{name} at {other}", "refuse", field(number, 3, other)
        for other in (1, 2, 3, 8, 12, 14, 16, 24, 26, 28, 30, 31, 36, 39, 99, 2**32 - 1):
            yield f"{name} of type {other}", "refuse", field(number, 2, other)
        shapes = [[], [0], [*dims, 0], [1], [2**63, 2], [2**32, 2**32], [2**64 - 1], [1] * 5]
        shapes += [dims[::-1] if dims[::-1] != dims else [*dims, 2], [2 * dims[0], *dims[1:]]]
        for shape in shapes:
            yield f"{name} {shape}", "refuse", field(number, 1, shape)
        for label, other in (("another name", "blk.x"), ("no name", ""), ("a long name", "x" * 99)):
            yield f"{name}: {label}", "refuse", field(number, 0, other)
        yield f"no {name}", "refuse", lambda f, n=number: f.tensors.pop(n)
        yield f"{name} twice", "refuse", lambda f, n=number: f.tensors.append(list(f.tensors[n]))
    end = len(file.data)
    for label, content in (("zeros", bytes(16)), ("NaN", b"\xff" * 16)):

        def factors(f: File, content: bytes = content) -> None:
            f.tensors.append(["rope_freqs.weight", [4], 0, end])
            f.data += content + bytes(16)

        yield f"frequency factors of {label}", "refuse", factors


def _vocabulary() -> Iterator[Change]:
    def tokens(f: File) -> list:
        return f.key("tokenizer.ggml.tokens")[2][1]

    yield "a token fewer", "any", lambda f: tokens(f).pop()
    yield "a token twice", "refuse", lambda f: tokens(f).__setitem__(5, tokens(f)[6])
    yield "an empty token", "any", lambda f: tokens(f).__setitem__(40, "")
    yield "an empty control token", "any", lambda f: tokens(f).__setitem__(1, "")
    yield "a token that is no text", "refuse", lambda f: tokens(f).__setitem__(5, b"\xff\xfe")
    yield "a long token", "any", lambda f: tokens(f).__setitem__(40, "x" * 2**20)
    merges = (ARRAY, (STRING, ["a", "b c d", ""]))
    yield "merges of other tokens", "refuse", lambda f: f.put("tokenizer.ggml.merges", *merges)
    kinds = (ARRAY, (I32, [99] * 48))
    yield "tokens of unknown type", "any", lambda f: f.put("tokenizer.ggml.token_type", *kinds)
    for name in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        for token_id in (-1, 48, 2**31 - 1, -(2**31)):
            yield (
                f"{name} is {token_id}",
                "refuse",
                lambda f, n=name, i=token_id: f.put(f"tokenizer.ggml.{n}_token_id", I32, i),
            )

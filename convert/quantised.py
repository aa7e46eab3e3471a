"""Quantised Hugging Face checkpoints: their tensors as weights in float32, read row by row.

Formats: compressed-tensors (pack-quantized, int-quantized, float-quantized, naive-quantized), AWQ,
GPTQ (v1 and v2, act-order too) and block fp8. A module ``x`` has its codes and scales in tensors of
its own, such as ``x.qweight``; here they become one tensor ``x.weight`` of [out, in]. Which modules
are quantised, in how many bits and groups, is read from the tensors themselves and then held
against what the config says (``quantisation_config``); so lists of modules left out need no rule of
their own.

Layouts were checked against the libraries that write them (``tests/convert/quantised``);
``docs/formats.md`` lists what each may contain.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from convert.codes import Coded, CodedRows, numbers
from convert.json_values import shortened
from convert.quantisation_config import Quantisation
from convert.stream import FileTensor

# In an int32 of AWQ's, nibble i belongs to column 8 j + _AWQ_ORDER[i].
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Of activations and of the cache: weights alone are quantised here, and need none of these.
_NOT_WEIGHTS = ("input_scale", "input_zero_point", "input_global_scale", "k_scale", "v_scale")


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A tensor as it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    # Part of it: rows [start, stop) of the first axis, and columns of the second where it has one.
    read: Callable[..., np.ndarray]

    def all(self) -> np.ndarray:
        return self.read(0, self.shape[0])

    def columns(self, start: int, stop: int) -> np.ndarray:
        return self.read(0, self.shape[0], start, stop)


def dequantised(
    tensors: Mapping[str, RawTensor], quantised: Quantisation, where: str
) -> dict[str, FileTensor]:
    """The checkpoint's weights by name, quantised ones in float32.

    Raises ``ValueError`` naming a tensor that is missing, misshapen or left over.
    """
    readers = {
        "compressed-tensors": _compressed_weight,
        "awq": _awq_weight,
        "gptq": _gptq_weight,
        "fp8": _fp8_weight,
    }
    modules: dict[str, dict[str, RawTensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    quantised.check_targets(modules)
    found: dict[str, FileTensor] = {}
    for module, parts in modules.items():
        parts = {part: x for part, x in parts.items() if part not in _NOT_WEIGHTS}
        plain = {"bias", "weight"}
        if not parts.keys() <= plain or _holds_codes(parts.get("weight")):
            weight = readers[quantised.method](_Module(module, parts, quantised, where))
            found[f"{module}.weight"] = weight
            plain = {"bias"}
        for part in plain & parts.keys():
            x = parts[part]
            _expect(x, ("float32", "float16", "bfloat16"), where)
            found[x.name] = FileTensor(name=x.name, shape=x.shape, rows=x.read)
    return found


def _holds_codes(weight: RawTensor | None) -> bool:
    return weight is not None and weight.dtype not in ("float32", "float16", "bfloat16")


class _Module:
    """The tensors of one quantised module, taken one by one."""

    def __init__(self, name: str, parts: dict[str, RawTensor], quantised: Quantisation, where: str):
        self.name, self.where, self.quantised = name, where, quantised
        self._parts = {part: x for part, x in parts.items() if part != "bias"}

    def take(
        self, part: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None
    ) -> RawTensor:
        """A tensor that must be there, of one of these dtypes and this shape."""
        if part not in self._parts:
            raise ValueError(
                f"{self.where}: {self.name} is quantised by {self.quantised.method} and has no "
                f"{part}; it has {', '.join(shortened(sorted(self._parts)))}"
            )
        x = self._parts.pop(part)
        _expect(x, dtypes, self.where)
        if shape is not None:
            fits = len(shape) == len(x.shape) and all(
                wanted in (None, size) for wanted, size in zip(shape, x.shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("any" if n is None else str(n) for n in shape)
                raise ValueError(f"{self.where}: {x.name} has shape {x.shape}, expected [{wanted}]")
        return x

    def optional(
        self, part: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None
    ) -> RawTensor | None:
        return self.take(part, dtypes, shape) if part in self._parts else None

    def scale(self, part: str) -> RawTensor:
        return self.take(part, ("float32", "float16", "bfloat16"))

    def groups(self, inputs: int, count: int, scales: str) -> int:
        """Inputs of a group, given how many groups there are."""
        if count < 1 or inputs % count:
            raise ValueError(
                f"{self.where}: {self.name}.{scales} has {count} groups for {inputs} inputs, "
                "which they do not divide"
            )
        self.quantised.check_groups(f"{self.where}: {self.name}.{scales}", count, inputs)
        return inputs // count

    def done(
        self,
        shape: tuple[int, int],
        rows: Callable[[int, int], np.ndarray] | None = None,
        *,
        coded: Coded | None = None,
        uncoded: str | None = None,
    ) -> FileTensor:
        """The weight, once nothing is left over: ``coded``, or ``rows`` and why it is not."""
        if self._parts:
            names = ", ".join(shortened(sorted(x.name for x in self._parts.values())))
            raise NotImplementedError(
                f"{self.where}: {names} beside quantised weights are not supported"
            )
        if rows is None:
            assert coded is not None
            rows = partial(numbers, coded)
        return FileTensor(
            name=f"{self.name}.weight", shape=shape, rows=rows, coded=coded, uncoded=uncoded
        )


def _expect(x: RawTensor, dtypes: tuple[str, ...], where: str) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"{where}: {x.name} has dtype {x.dtype}, expected {' or '.join(dtypes)}")


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [...] to uint8 [..., 32 / bits], the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = words.view(np.uint32)[..., None] >> shifts
    return (codes & np.uint32((1 << bits) - 1)).astype(np.uint8)


# compressed-tensors


def _compressed_weight(module: _Module) -> FileTensor:
    packed = module.optional("weight_packed", ("int32",), (None, None))
    if packed is None:
        return _scaled_weight(module, "weight_scale", "weight_zero_point")
    shape = module.take("weight_shape", ("int64", "int32"), (2,)).all()
    out, inputs = (int(n) for n in shape)
    columns = packed.shape[1]
    bits = next((b for b in (4, 8) if columns == -(-inputs * b // 32)), None)
    if packed.shape[0] != out or bits is None:
        raise ValueError(
            f"{module.where}: {packed.name} has shape {packed.shape}, which holds no [{out}, "
            f"{inputs}] of 4 or 8 bits, as {module.name}.weight_shape says"
        )
    module.quantised.check_bits(f"{module.where}: {packed.name}", bits)
    scale = module.take("weight_scale", ("float32", "float16", "bfloat16"), (out, None))
    group = module.groups(inputs, scale.shape[1], "weight_scale")
    per = 32 // bits
    zero = module.optional("weight_zero_point", ("int32",), (-(-out // per), scale.shape[1]))

    # 8 bits are stored with 128 added; less that they are an int8.
    lower = 0 if bits == 4 else 128

    def rows(start: int, stop: int) -> CodedRows:
        codes = _unpack(packed.read(start, stop), bits).reshape(stop - start, -1)[:, :inputs]
        scales = scale.read(start, stop).astype(np.float32)
        points = None
        if zero is None and bits == 4:  # signed codes are stored with half of their range added
            points = np.full_like(scales, 8)
        elif zero is not None:
            first = start // per  # zero points are packed along the outputs
            words = zero.read(first, -(-stop // per))
            points = _unpack(words, bits).transpose(0, 2, 1).reshape(-1, words.shape[1])
            points = points[start - first * per :][: stop - start].astype(np.float32) - lower
        if lower:
            codes = (codes.astype(np.int16) - lower).astype(np.int8)
        return CodedRows(codes, scales, points)

    dtype, has_zero = ("uint4", True) if bits == 4 else ("int8", zero is not None)
    coded = Coded(dtype=dtype, groups=inputs // group, has_zero=has_zero, rows=rows)
    return module.done((out, inputs), coded=coded)


def _scaled_weight(module: _Module, scale_name: str, zero_name: str | None) -> FileTensor:
    """Codes [out, in], int8 or fp8, with scales for the tensor, a channel, a group or a block."""
    codes = module.take("weight", ("int8", "float8_e4m3fn"), (None, None))
    out, inputs = codes.shape
    scale = module.scale(scale_name)
    tall, wide = _blocks(module, scale, (out, inputs))
    zero = None
    if zero_name is not None:
        zero = module.optional(zero_name, ("int8", "float8_e4m3fn"), scale.shape)

    def spread(x: RawTensor, start: int, stop: int) -> np.ndarray:
        if len(x.shape) < 2:  # one for all
            return np.asarray(x.all() if x.shape else x.read(), np.float32).reshape(1, 1)
        first = start // tall
        part = x.read(first, -(-stop // tall)).astype(np.float32)
        part = np.repeat(part, tall, axis=0)[start - first * tall :][: stop - start]
        return np.repeat(part, wide, axis=1)[:, :inputs]

    group = math.gcd(inputs, wide)  # less than a block where the last one is cut short

    def coded_rows(start: int, stop: int) -> CodedRows:
        def grouped(x: RawTensor) -> np.ndarray:
            each = spread(x, start, stop)  # [rows or 1, in or 1]
            return np.broadcast_to(each[:, ::group], (stop - start, inputs // group))

        return CodedRows(
            codes.read(start, stop), grouped(scale), None if zero is None else grouped(zero)
        )

    coded = Coded(
        dtype=codes.dtype, groups=inputs // group, has_zero=zero is not None, rows=coded_rows
    )
    return module.done((out, inputs), coded=coded)


def _blocks(module: _Module, scale: RawTensor, shape: tuple[int, int]) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    if scale.shape in ((), (1,)):
        return shape
    if len(scale.shape) == 2:
        out, inputs = shape
        tall, wide = scale.shape
        if tall == out and wide >= 1 and inputs % wide == 0:  # a channel, or groups of one
            return 1, inputs // wide
        for block in module.quantised.block_sizes():
            if scale.shape == (-(-out // block[0]), -(-inputs // block[1])):
                return block[0], block[1]
    raise ValueError(
        f"{module.where}: {scale.name} has shape {scale.shape}, which is no scale for the tensor, "
        f"a channel, a group or a block of weights {list(shape)}"
    )


# fp8 with scales of blocks


def _fp8_weight(module: _Module) -> FileTensor:
    return _scaled_weight(module, "weight_scale_inv", None)


# AWQ


def _awq_weight(module: _Module) -> FileTensor:
    packed = module.take("qweight", ("int32",), (None, None))
    inputs, out = packed.shape[0], 8 * packed.shape[1]
    scale = module.take("scales", ("float16", "float32", "bfloat16"), (None, out))
    group = module.groups(inputs, scale.shape[0], "scales")
    zero = module.take("qzeros", ("int32",), (scale.shape[0], packed.shape[1]))

    def unpack(words: np.ndarray) -> np.ndarray:
        """[n, w] to [8 w, n]."""
        codes = np.empty((*words.shape, 8), np.uint8)
        codes[..., _AWQ_ORDER] = _unpack(words, 4)
        return codes.reshape(len(words), -1).T

    def rows(start: int, stop: int) -> CodedRows:
        first, last = start // 8, -(-stop // 8)
        inside = slice(start - 8 * first, stop - 8 * first)
        codes, points = (
            unpack(np.ascontiguousarray(x.columns(first, last)))[inside] for x in (packed, zero)
        )
        scales = scale.columns(start, stop).T.astype(np.float32)
        return CodedRows(codes, scales, points.astype(np.float32))

    coded = Coded(dtype="uint4", groups=inputs // group, has_zero=True, rows=rows)
    return module.done((out, inputs), coded=coded)


# GPTQ


def _gptq_weight(module: _Module) -> FileTensor:
    settings = module.quantised.settings
    bits = settings["bits"]
    per = 32 // bits
    packed = module.take("qweight", ("int32",), (None, None))
    inputs, out = per * packed.shape[0], packed.shape[1]
    scale = module.take("scales", ("float16", "float32", "bfloat16"), (None, out))
    groups = scale.shape[0]
    zero = module.take("qzeros", ("int32",), (groups, -(-out // per)))
    index = module.optional("g_idx", ("int32",), (inputs,))
    if index is None:
        of_input = np.arange(inputs) // module.groups(inputs, groups, "scales")
    else:
        module.quantised.check_groups(f"{module.where}: {scale.name}", groups, inputs)
        of_input = index.all()
        if of_input.min() < 0 or of_input.max() >= groups:
            raise ValueError(
                f"{module.where}: {index.name} must lie in [0, {groups - 1}], got "
                f"{of_input.min()} to {of_input.max()}"
            )
    # Version 1 stores each zero point less one, with borrows between those of a word: a word is
    # put right as a whole.
    first_version = (settings.get("checkpoint_format") or "gptq") == "gptq"
    ones = np.uint32(sum(1 << (bits * i) for i in range(per)) if first_version else 0)

    def parts(start: int, stop: int) -> CodedRows:
        codes = _unpack(np.ascontiguousarray(packed.columns(start, stop)), bits)  # [n, o, per]
        codes = codes.transpose(1, 0, 2).reshape(stop - start, -1)
        first = start // per
        words = np.ascontiguousarray(zero.columns(first, -(-stop // per))).view(np.uint32) + ones
        points = _unpack(words.view(np.int32), bits).reshape(groups, -1)
        points = points[:, start - first * per :][:, : stop - start].T.astype(np.float32)
        scales = scale.columns(start, stop).T.astype(np.float32)
        if bits == 8:  # less half of their range they are an int8
            codes, points = (codes.astype(np.int16) - 128).astype(np.int8), points - 128
        return CodedRows(codes, scales, points)

    def rows(start: int, stop: int) -> np.ndarray:
        codes, scales, points = parts(start, stop)
        assert points is not None  # as above
        return (codes.astype(np.float32) - points[:, of_input]) * scales[:, of_input]

    if inputs % groups or np.any(of_input != np.arange(inputs) // (inputs // groups)):
        uncoded = f"{module.name}.g_idx scatters the inputs of a group (act-order)"
        return module.done((out, inputs), rows, uncoded=uncoded)
    dtype = "uint4" if bits == 4 else "int8"
    return module.done(
        (out, inputs), coded=Coded(dtype=dtype, groups=groups, has_zero=True, rows=parts)
    )

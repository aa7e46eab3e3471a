"""What 128 threads compute from packed words, by PTX's own definitions, against plain products.

The functions that emit PTX run with NumPy in MLIR's place: a value is an array with a row for each
thread. Instructions are interpreted as the PTX manual defines them.
"""

import itertools
import re
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from packed_cases import KINDS, normal, random_weight

from pallas_kernels.hopper import code_blocks, decode_operands, quant_operands
from pallas_kernels.kv_codes import CODE_TYPES, KV_KINDS, KVKind, values
from pallas_kernels.packed import group_size, pack_weight
from pallas_kernels.types import PackedWeight, Weight

THREADS = np.arange(128)
WARP, G, T = THREADS // 32, THREADS % 32 // 4, THREADS % 4
PAIRS = np.array([0, 1, 8, 9, 16, 17, 24, 25])  # of 32 inputs, those of a thread less its first


def as_bf16(x: np.ndarray) -> np.ndarray:
    """[threads, 2] float32 of registers of two bf16 each, the low half first."""
    return x[:, None].view(np.uint32).view(ml_dtypes.bfloat16).astype(np.float32)


def from_bf16(x: np.ndarray) -> np.ndarray:
    rounded = x.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rounded.astype(np.float32), x)  # codes are exact
    return rounded.view(np.uint32)[:, 0]


def lut(a, b, c, table: int) -> np.ndarray:
    found = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            masks = (y if i >> bit & 1 else ~y for y, bit in ((a, 2), (b, 1), (c, 0)))
            found |= np.bitwise_and.reduce(list(masks))
    return found


def select_bytes(a, b, selector: int) -> np.ndarray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for byte in range(4):
        index = selector >> 4 * byte & 0xF
        assert index < 8  # no copies of the sign
        result |= (both >> np.uint64(8 * index) & np.uint64(0xFF)).astype(np.uint32) << 8 * byte
    return result


def as_float32(x: np.ndarray) -> np.ndarray:
    return x.view(np.float32)


def run_ptx(text: str, *operands: np.ndarray) -> np.ndarray:
    registers = {f"${i + 1}": x for i, x in enumerate(operands)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full(128, int(name, 0), np.uint32)

    for line in filter(None, (part.strip() for part in text.split(";"))):
        op, to, *names = re.split(r",?\s+", line)
        match op:
            case ".reg":
                continue
            case "mov.b32" if to.startswith("{"):  # its halves
                registers[to[1:]] = value(names[1]) & 0xFFFF
                to, result = names[0][:-1], value(names[1]) >> 16
            case "mov.b32":
                result = value(names[0])
            case "shr.b32":
                result = value(names[0]) >> int(names[1])
            case "shf.r.wrap.b32":
                both, by = (value(x).astype(np.uint64) for x in names[1::-1]), int(names[2])
                high, low = both
                result = ((high << np.uint64(32) | low) >> np.uint64(by)).astype(np.uint32)
            case "xor.b32":
                result = value(names[0]) ^ value(names[1])
            case "and.b32":
                result = value(names[0]) & value(names[1])
            case "lop3.b32":
                result = lut(*map(value, names[:3]), int(names[3], 16))
            case "prmt.b32":
                result = select_bytes(value(names[0]), value(names[1]), int(names[2], 16))
            case "sub.bf16x2":
                result = from_bf16(as_bf16(value(names[0])) - as_bf16(value(names[1])))
            case "mul.bf16x2":
                result = from_bf16(as_bf16(value(names[0])) * as_bf16(value(names[1])))
            case "cvt.rn.f16x2.e4m3x2":
                pair = value(names[0]).astype(np.uint16)[:, None].view(ml_dtypes.float8_e4m3fn)
                result = pair.astype(np.float16).view(np.uint32)[:, 0]
            case "cvt.f32.f16":
                result = value(names[0]).astype(np.uint16).view(np.float16).astype(np.float32)
            case "mul.rn.f32":
                result = as_float32(value(names[0])) * as_float32(value(names[1]))
            case "fma.rn.f32":
                a, b, c = (as_float32(value(name)).astype(np.float64) for name in names)
                result = (a * b + c).astype(np.float32)  # what is tested fits into a float64
            case "cvt.rn.bf16x2.f32":  # the upper half first
                high, low = (as_float32(value(name)) for name in names)
                pair = np.stack([low, high], axis=1).astype(ml_dtypes.bfloat16)
                result = pair.view(np.uint32)[:, 0]
            case _:
                raise AssertionError(f"{op} is not known here")
        registers[to] = result.view(np.uint32) if result.dtype == np.float32 else result
    return registers["$0"]


def mma(_, operands: list[np.ndarray], text: str, constraints: str) -> list[np.ndarray]:
    """m16n8k16, by the manual's tables of which thread has which element."""
    assert "m16n8k16.row.col.f32.bf16.bf16.f32" in text and constraints.count("r") == 6
    a, b = np.zeros((4, 16, 16)), np.zeros((4, 16, 8))  # of each warp
    for i, register in enumerate(operands[:4]):
        for half, x in enumerate(as_bf16(register).T):
            a[WARP, G + 8 * (i % 2), 2 * T + half + 8 * (i // 2)] = x
    for i, register in enumerate(operands[4:6]):
        for half, x in enumerate(as_bf16(register).T):
            b[WARP, 2 * T + half + 8 * i, G] = x
    c = a @ b
    places = ((0, 0), (0, 1), (8, 0), (8, 1))
    return [
        s + c[WARP, G + row, 2 * T + column]
        for s, (row, column) in zip(operands[6:], places, strict=True)
    ]


@pytest.fixture(autouse=True)
def numpy_for_mlir(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SimpleNamespace(get=lambda *_: None, get_signless=lambda _: None)
    literal = SimpleNamespace(get=lambda _, value: value)
    fakes = {
        "ir": SimpleNamespace(
            F32Type=kind, IntegerType=kind, VectorType=kind, FloatAttr=literal, IntegerAttr=literal
        ),
        "arith": SimpleNamespace(
            constant=lambda _, value: np.full(
                128, value, np.float64 if isinstance(value, float) else np.uint32
            )
        ),
        "vector": SimpleNamespace(
            extract=lambda x, _, index: x[:, index[0]],
            bitcast=lambda _, x: x.view(np.uint32),
            from_elements=lambda _, values: np.stack(values, axis=1),
        ),
        "llvm": SimpleNamespace(
            StructType=SimpleNamespace(get_literal=lambda _: None),
            inline_asm=mma,
            extractvalue=lambda _, x, index: x[index[0]],
        ),
        "asm": run_ptx,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(quant_operands, name, fake)


def registers(values: list[np.ndarray], *shape: int) -> SimpleNamespace:
    array = np.empty(len(values), object)
    array[:] = values
    return SimpleNamespace(registers=array.reshape(shape) if shape else array)


def loaded_words(block: np.ndarray, code_rows: int) -> SimpleNamespace:
    """As a warpgroup loads a block: thread t has 16 bytes of each 2048."""
    loads = block[:code_rows].astype(np.int32).reshape(-1, 128, 4).view(np.uint32)
    return registers(list(loads))


def loaded_x(x: np.ndarray) -> SimpleNamespace:
    """x bf16 [N, 128]: of each 32 inputs and 8 rows thread 4 g + t has 4 pairs of row g."""
    tiles = [
        x[8 * j + G[:, None], 32 * c + 2 * T[:, None] + PAIRS]
        for j in range(len(x) // 8)
        for c in range(4)
    ]
    return registers(tiles, len(x) // 8, 4)


def matrix(values: list[np.ndarray], N: int) -> np.ndarray:
    """[64, N] of what threads hold in the layout of wgmma's accumulators."""
    result = np.full((64, N), np.nan)
    for i, pair in enumerate(values):
        j, half = divmod(i, 2)
        for e in range(2):
            result[16 * WARP + 8 * half + G, 8 * j + 2 * T + e] = pair[:, e]
    return result


def loaded_offsets(packed: PackedWeight, weight: Weight, block: int, group: int) -> list:
    """What ``scale_and_zero`` has for thread 4 g + t: pairs of rows g and g + 8 of its warp."""
    if packed.zeros != "byte":
        return []
    zero = np.asarray(weight.zero)[group, 64 * block :].astype(np.float32)
    pairs = (16 + zero).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) * 0x10001
    return [registers([pairs[16 * WARP + 8 * h + G] for h in range(2)])]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_products_of_a_block(kind: str, rows: int = 8) -> None:
    """As wgmma takes codes from registers, and as mma.sync multiplies them."""
    weight, x = random_weight(kind, 256, 128), np.asarray(normal(0, rows, 256))
    packed = pack_weight(weight)
    group = group_size(packed)
    parts = 1 if group is None else 128 // group
    each, code_rows = 128 // parts, 32 if packed.codes != "uint4" else 16
    # As if each code stood for itself, less what the operands take off.
    codes = np.asarray(weight.codes).astype(np.float64)
    if packed.zeros == "byte":
        codes -= np.repeat(np.asarray(weight.zero, np.float64), each, axis=0)
    elif packed.codes == "uint4":
        codes -= quant_operands.CODE_OFFSET
    for block, k, part in itertools.product(range(2), range(2), range(parts)):
        words = loaded_words(np.asarray(packed.words[block, k]), code_rows)
        tile = loaded_x(x[:, 128 * k : 128 * (k + 1)])
        offsets = loaded_offsets(packed, weight, block, k * parts + part)
        operands = quant_operands._operands_a(packed.codes, words, offsets, part, parts)
        own = slice(128 * k + part * each, 128 * k + (part + 1) * each)
        numbers = codes[own, 64 * block : 64 * block + 64].T
        assert_array_equal(matrix([as_bf16(x) for x in operands], each), numbers)
        got = quant_operands._products(operands, tile, part, parts, rows)
        wanted = numbers @ x[:, own].T.astype(np.float64)
        np.testing.assert_allclose(matrix(got, rows), wanted, rtol=0, atol=1e-9)


def test_sums_of_x() -> None:
    """``row_totals`` multiplies with ones."""
    x = np.asarray(normal(0, 8, 128))
    ones = [np.full(128, 0x3F803F80, np.uint32)] * 8
    for part in range(4):
        got = matrix(quant_operands._products(ones, loaded_x(x), part, 4, 8), 8)
        wanted = x[:, 32 * part : 32 * part + 32].astype(np.float64).sum(axis=1)
        np.testing.assert_allclose(got, np.broadcast_to(wanted, (64, 8)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("inputs", [128, 256, 512, 1024, 1792])
def test_planes_of_x(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``store_planes`` puts into shared memory ``load_planes`` has as operand B of each block.

    And no bank is asked twice by the eight threads whose 16 bytes are read at a time.
    """

    def store(own, ref, at, alignment):
        plane, column = (x.astype(int) for x in at)
        assert not (2 * column % alignment).any() and own.shape[1] * 2 == alignment
        for i, numbers in enumerate(own.T):
            ref[plane, column + i] = numbers

    def load(_, ref, at, alignment):
        row, plane, column = (np.broadcast_to(x.astype(int), 128) for x in at)
        places = row * ref.strides[0] + plane * ref.strides[1] + column * ref.strides[2]
        assert not (places % alignment).any()
        for eight in np.split(places[:32] // 16 % 8, 4):  # a wave: 8 threads, 128 bytes
            assert len(set(eight)) == 8
        return ref[row[:, None], plane[:, None], column[:, None] + np.arange(8)]

    numpy = {
        **{"addi": np.add, "muli": np.multiply, "divui": np.floor_divide, "remui": np.remainder},
        "constant": lambda _, value: np.full(128, value),
        "index_cast": lambda _, x: x,
    }
    monkeypatch.setattr(quant_operands, "arith", SimpleNamespace(**numpy))
    slices = {"extract_strided_slice": lambda _, x, at, size, __: x[:, at[0] : at[0] + size[0]]}
    kept = SimpleNamespace(**slices, store=store, load=load)
    monkeypatch.setattr(quant_operands, "vector", kept)
    kind = SimpleNamespace(get=lambda *_: None, get_signless=lambda _: None)
    literal = SimpleNamespace(get=lambda _, value: value)
    names = ("IntegerType", "IndexType", "VectorType", "BF16Type")
    ir = SimpleNamespace(**dict.fromkeys(names, kind), IntegerAttr=literal)
    monkeypatch.setattr(quant_operands, "ir", ir)
    monkeypatch.setattr(quant_operands.utils, "thread_idx", lambda: THREADS)
    monkeypatch.setattr(quant_operands, "_array", lambda _, __, values: values)
    monkeypatch.setattr(
        quant_operands.plgpu, "inline_mgpu", lambda **_: lambda f: lambda *xs: f(None, *xs)
    )

    x = np.random.default_rng(0).standard_normal((8, inputs)).astype(np.float32)
    planes = np.full((8, 4, inputs // 4 + quant_operands.PLANE_PADDING), np.nan, ml_dtypes.bfloat16)
    x = x.astype(planes.dtype)
    each = quant_operands.row_layout(inputs).to_mgpu().vec_size
    for row in range(8):
        values = list(x[row].reshape(-1, 128, each))
        loaded = registers(values)
        loaded.layout, loaded.shape = SimpleNamespace(vec_size=each), (inputs,)
        quant_operands.store_planes(planes[row, :, : inputs // 4], loaded)
    for k in range(inputs // 128):
        got = quant_operands.load_planes(planes[:, :, 32 * k : 32 * k + 32])
        wanted = loaded_x(x[:, 128 * k : 128 * k + 128]).registers.reshape(-1)
        for ours, theirs in zip(got, wanted, strict=True):
            assert_array_equal(ours, theirs)


def test_codes_of_values() -> None:
    """Every byte, at every place of a word: of pages of fp8 and of int4."""
    every = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 4))
    for four in np.split(np.random.default_rng(0).permuted(every, axis=0), 2):
        word = np.ascontiguousarray(four).view(np.uint32)[:, 0]
        pairs = [as_bf16(run_ptx(text, word)) for text in decode_operands.E4M3_PAIRS]
        wanted = four.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        wanted = np.where(np.isnan(wanted), np.copysign(480, wanted), wanted)
        assert_array_equal(np.concatenate(pairs, axis=1), wanted)
        for half, texts in zip((four & 15, four >> 4), decode_operands.NIBBLE_PAIRS, strict=True):
            pairs = [as_bf16(run_ptx(text, word)) for text in texts]
            assert_array_equal(np.concatenate(pairs, axis=1), half / 64)


@pytest.mark.parametrize("kind", KV_KINDS)
def test_codes_times_their_scales(kind: KVKind) -> None:
    """Every byte at every place, bit for bit what ``values`` makes of it, rounded to bf16."""
    rng = np.random.default_rng(0)
    every = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 4))
    for four in np.split(rng.permuted(every, axis=0), 2):
        word = np.ascontiguousarray(four).view(np.uint32)[:, 0]
        scale = rng.lognormal(sigma=3, size=128).astype(np.float32)
        if kind == "int4":
            words = rng.integers(1 << 14, size=(2, 2, 128)) + 0x3000  # bf16 of usual sizes
            words = (words[0] << 16 | words[1]).astype(np.int32)
            scales = tuple(map(jnp.asarray, words))
            wanted = values(jnp.asarray(four), scales)
        else:
            scales = (jnp.asarray(scale),)
            wanted = values(jnp.asarray(four.view(CODE_TYPES[kind])), scales[0])
        factors = code_blocks.factors(scales, kind)
        pairs = [
            as_bf16(run_ptx(text, word, *(np.asarray(x).view(np.uint32) for x in of_token)))
            for texts, of_token in zip(code_blocks.PAIRS[kind], factors, strict=True)
            for text in texts
        ]
        wanted = np.asarray(wanted).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert_array_equal(np.concatenate(pairs, axis=1), wanted)

"""Kernels run under Mosaic GPU's interpreter on a CPU, and every data race fails its test."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import callback as jax_callback
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import kv_codes
from pallas_kernels.hopper import (
    code_blocks,
    decode_operands,
    quant_rows,
    query_tiles,
    shared_kernel,
)


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Interprets on a CPU. JAX 0.11 only records a race, so it is looked up after the test."""
    if jax.default_backend() != "cpu":
        yield
        return
    state = interpret_pallas_call.gpu_callbacks
    state.reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    found = state._races is not None and state._races.races_found
    state.reset_gpu_interpret_mode_state()
    assert not found, "the interpreter found a data race"


@pytest.fixture(autouse=True)
def plain_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's every load, store and wait is a callback, and it computes in NumPy.

    JAX makes a device array of each of a callback's ten or twenty numbers first: half its time.
    """

    def call(*arguments: np.ndarray, callback: Callable, **how: Any) -> Any:
        return jax.tree.map(np.asarray, callback(*arguments))

    def number(x: Any) -> Any:
        return x.item() if isinstance(x, np.ndarray) else to_int(x)

    if jax.default_backend() == "cpu":
        to_int = shared_memory._to_int
        monkeypatch.setattr(jax_callback, "io_callback_impl", call)
        monkeypatch.setattr(shared_memory, "_to_int", number)


@pytest.fixture(autouse=True)
def arrays_as_long_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs a kernel where it is traced, and checks every access's bounds."""
    if jax.default_backend() == "cpu":
        monkeypatch.setattr(shared_kernel, "lowered_once", shared_kernel.lowered_by_itself)


@pytest.fixture(autouse=True)
def wgmma_from_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's wgmma takes no operand from registers: a plain product stands in for it.

    It reads v as registers are loaded, which must be committed before a copy overwrites v; in
    return that read is checked for races.
    """

    def add_product(acc, p, v, meanwhile=lambda: None):
        total = acc + jnp.dot(p, v[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        meanwhile()
        return total

    if jax.default_backend() == "cpu":
        for module in (query_tiles, quant_rows):
            monkeypatch.setattr(module, "add_product", add_product)


@pytest.fixture(autouse=True)
def codes_in_plain_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs no PTX, and no wgmma from registers."""

    def register_matmul(a, b, m, n, dtype):
        return jnp.dot(a, b[...], preferred_element_type=dtype)

    def nibbles_as_bf16(codes, layout):
        halves = codes & 15, codes >> 4
        return tuple((half.astype(jnp.float32) / 64).astype(jnp.bfloat16) for half in halves)

    def e4m3_as_bf16(codes, layout):
        return jnp.where(jnp.isnan(codes), 480.0, codes.astype(jnp.float32)).astype(jnp.bfloat16)

    def numbers(codes, scales, kind, layout):
        if kind != "int4":
            return ((codes.astype(jnp.float32) * scales[0]).astype(jnp.bfloat16),)
        halves = zip((codes & 15, codes >> 4), map(kv_codes.word_values, scales), strict=True)
        return tuple(
            (half.astype(jnp.float32) * step + lowest).astype(jnp.bfloat16)
            for half, (step, lowest) in halves
        )

    if jax.default_backend() == "cpu":
        for stand_in in (register_matmul, nibbles_as_bf16, e4m3_as_bf16):
            monkeypatch.setattr(decode_operands, stand_in.__name__, stand_in)
        monkeypatch.setattr(code_blocks, "numbers", numbers)

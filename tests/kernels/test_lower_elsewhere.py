"""Kernels that another process lowers are those that this one would have made; no GPU."""

import gc
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from compile_offline import INT4, packed_arguments, prefix_arguments
from jax._src.lib import mosaic_gpu_dialect
from jax.extend.mlir import ir
from jax.interpreters import mlir
from test_shared_kernel import (  # fixtures, too: nothing runs here
    append_chunk,
    arrays_as_long_as_they_are,  # noqa: F401
    attend,
    attend_chunk,
    interpreter,  # noqa: F401
    score,
    select,
    wgmma_from_registers,  # noqa: F401
)

from pallas_kernels.hopper import lower_elsewhere, shared_kernel
from pallas_kernels.hopper.fused_linear import fused_linear
from pallas_kernels.hopper.lower_elsewhere import Processes, lowerings
from pallas_kernels.hopper.prefix_attention import prefix_attention
from pallas_kernels.hopper.quant_linear import packed_linear
from pallas_kernels.hopper.quant_rows import packed_rows


@pytest.fixture(autouse=True)
def nothing_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_kernel, "_kept", {})


@pytest.fixture
def processes() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def linear(x, kernel, residual):
    return fused_linear(x, kernel, None, None, None, residual, gated=False, epsilon=1e-5)


def packed(*arguments):
    return packed_linear(*arguments, gated=False, epsilon=1e-5)


def rows(*arguments):
    return packed_rows(*arguments, dtype=jnp.bfloat16)


def all_kernels() -> jax.stages.Traced:
    """One program with a kernel of each kind, in functions inside of functions."""
    ops = [attend(3), append_chunk(3), attend_chunk(3), score(3), select(3)]
    x, kernel = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((2, 128), (128, 128)))
    ops.append((linear, (x, kernel, x)))
    ops.append((packed, packed_arguments(**INT4, residual=True, K=128, out=128)))
    ops.append((rows, packed_arguments(**INT4, K=128, out=128, rows=9)[:2]))
    ops.append((prefix_attention, prefix_arguments(rows=5)))

    def run(arguments):
        return [jax.jit(op)(*own) for (op, _), own in zip(ops, arguments, strict=True)]

    return jax.jit(run).trace([own for _, own in ops])


def plain(attributes: dict[str, str]) -> dict[str, str]:
    """Code as text, without the number by which JAX 0.11 tells dumped kernels apart."""
    context = mlir.make_ir_context()
    mosaic_gpu_dialect.register_dialect(context)
    context.load_all_available_dialects()
    context.allow_unregistered_dialects = True  # code has a version of its own
    with context:
        config = ir.DictAttr(ir.Attribute.parse(attributes["mhlo.backend_config"]))
        code = ir.Module.parse(ir.StringAttr(config["module"]).value_bytes)
        text = code.operation.get_asm(enable_debug_info=False)
    text = re.sub(r'dump_basename = "\w+"', "", text)
    return {**attributes, "mhlo.backend_config": text}


def lowered(traced: jax.stages.Traced) -> str:
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_they_are_the_same(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = all_kernels()
    expected = {lowering: shared_kernel.lower(lowering) for lowering in lowerings(traced.jaxpr)}
    assert len(expected) == 11  # attention of decode and of a prefix has two
    for begun in processes.begin(traced.jaxpr):
        begun.result()
    kept = shared_kernel._kept
    assert {key: plain(kept[key]) for key in kept} == {key: plain(expected[key]) for key in kept}
    assert processes.begin(traced.jaxpr) == []
    monkeypatch.setattr(shared_kernel, "lower", None)  # nothing more is lowered here
    assert lowered(traced).count("kernel_hash") == 11


def test_processes_that_began_early_do_the_work(processes: Processes) -> None:
    processes.start()
    early = list(processes._all)
    op, arguments = select(3)
    for begun in processes.begin(jax.jit(op).trace(*arguments).jaxpr):
        begun.result()
    assert len(shared_kernel._kept) == 1
    assert len(early) == 2 and processes._all == early
    processes.close()
    assert all(process.returncode is not None for process in early)


def test_processes_that_nobody_closes_end_with_their_owner() -> None:
    """As where an engine cannot be built, or no request ever comes."""
    owner = Processes(1)
    owner.start()
    [process] = owner._all
    del owner
    gc.collect()
    assert process.returncode is not None


def test_a_process_without_work_ends_without_a_word() -> None:
    """As where the program that began it is killed: only the pipe's end tells."""
    code = (
        "import os; from pallas_kernels.hopper.lower_elsewhere import Processes;"
        "Processes(1).start(); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True)
    assert done.stderr == b""


def test_a_kernel_that_no_process_lowers_is_lowered_here(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lower_elsewhere.sys, "executable", "/nowhere/python")
    op, arguments = select(3)
    traced = jax.jit(op).trace(*arguments)
    with caplog.at_level(logging.WARNING):
        for begun in processes.begin(traced.jaxpr) * 2:
            begun.result()
    assert [r.getMessage() for r in caplog.records if "did not lower a kernel" in r.getMessage()]
    assert not shared_kernel._kept
    lowered(traced)
    assert len(shared_kernel._kept) == 1

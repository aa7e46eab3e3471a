"""CTAs of a cluster hand what they hold to the first of them: Hopper's distributed shared memory.

A thread's registers go to the thread of the same number there, so that they lie in memory as they
come, 8 bytes a thread: no bank is asked twice. The interpreter knows no such memory.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic import MATRIX

# A thread's place of 8 bytes, from the start of those of its warpgroup.
_ADDRESS = "{ .reg .b32 a; mov.u32 a, %tid.x; and.b32 a, a, 127; mad.lo.u32 a, a, 8, "


def store_in_first(ref, matrix) -> None:
    """Stores ``matrix`` [64, N] float32, in ``MATRIX``, in the first CTA's ``ref`` [64, N].

    That CTA has begun: where there are clusters Mosaic lets their CTAs meet at a kernel's start.
    """

    def store(_, ref, matrix) -> None:
        base = _address(ref)
        for i, pair in enumerate(matrix.registers.flat):
            values = [vector.extract(pair, [], [j]) for j in range(2)]
            text = (
                f"{_ADDRESS} $0; mapa.shared::cluster.u32 a, a, 0; "
                f"st.shared::cluster.v2.f32 [a + {1024 * i}], {{$1, $2}}; }}"
            )
            _run(text, "r,f,f,~{memory}", base, *values)

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), MATRIX))(store)(ref, matrix)


def load_stored(ref):
    """[64, N] float32 in ``MATRIX``, as ``store_in_first`` stored it, in the first CTA."""
    shape = ref.shape

    def load(_, ref) -> fa.FragmentedArray:
        f32 = ir.F32Type.get()
        layout, base = MATRIX.to_mgpu(), _address(ref)
        registers = np.empty(layout.registers_shape(shape), object)
        for i in range(registers.size):
            text = f"{_ADDRESS} $2; ld.shared.v2.f32 {{$0, $1}}, [a + {1024 * i}]; }}"
            pair: Any = llvm.inline_asm(
                llvm.StructType.get_literal([f32] * 2),
                [base],
                text,
                "=f,=f,r,~{memory}",
                has_side_effects=True,
            )
            values = [llvm.extractvalue(f32, pair, [j]) for j in range(2)]
            registers.flat[i] = vector.from_elements(ir.VectorType.get((2,), f32), values)
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=MATRIX)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(load)(ref)


def meet() -> None:
    """Waits for all threads of the cluster; what they stored before is seen after it."""

    def barrier(_) -> None:
        _run("barrier.cluster.arrive.release.aligned;", "~{memory}")
        _run("barrier.cluster.wait.acquire.aligned;", "~{memory}")

    plgpu.inline_mgpu()(barrier)()


def _address(ref: ir.Value) -> ir.Value:
    """Of shared memory, 32 bits."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _run(text: str, constraints: str, *operands: ir.Value) -> None:
    nothing = ir.Type.parse("!llvm.void")
    llvm.inline_asm(nothing, list(operands), text, constraints, has_side_effects=True)

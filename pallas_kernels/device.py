"""Which machine this is, which kernels it has, and how far they reach.

Imports no Pallas, which takes a second that users of a CPU need not wait: an op's kernel is
imported when it is first called.
"""

import importlib
from collections.abc import Callable
from typing import Literal

import jax

from pallas_kernels import reference

Backend = Literal["auto", "mosaic", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "mosaic", "reference")

# The kernels of each machine: the module that holds the function of an op's name.
KERNELS: dict[str, dict[str, str]] = {
    "hopper": {
        "append_kv": "pallas_kernels.hopper.kv_append_token",
        "append_kv_chunk": "pallas_kernels.hopper.kv_append_chunk",
        "block_scores": "pallas_kernels.hopper.block_scores",
        "fused_linear": "pallas_kernels.hopper.fused_linear",
        "packed_codes": "pallas_kernels.hopper.quant_unpack",
        "packed_linear": "pallas_kernels.hopper.quant_linear",
        "packed_numbers": "pallas_kernels.hopper.quant_unpack",
        "packed_product": "pallas_kernels.hopper.quant_linear",
        "packed_rows_linear": "pallas_kernels.hopper.quant_rows",
        "packed_rows_product": "pallas_kernels.hopper.quant_rows",
        "page_scores": "pallas_kernels.hopper.page_scores",
        "paged_attention": "pallas_kernels.hopper.decode_attention",
        "prefill_attention": "pallas_kernels.hopper.prefill_attention",
        "prefix_attention": "pallas_kernels.hopper.prefix_attention",
        "select_pages": "pallas_kernels.hopper.page_selection",
        "verify_attention": "pallas_kernels.hopper.verify_attention",
    }
}

# Pages that ``select_pages`` has a kernel for.
MOST_SELECTED_PAGES = 4096

# Rows up to which ``fused_linear`` runs its kernel. With more, XLA's matrix product is faster.
MOST_LINEAR_ROWS = 4

# Rows up to which a kernel for packed weights does what is around the product as well, and up to
# which there is one for the product (docs/kernels.md, "More than 8 rows"). With more they are
# unpacked first (``linear_ops.py``).
MOST_FUSED_PACKED_ROWS = 8
MOST_PACKED_ROWS = 512


def is_hopper(device: jax.Device) -> bool:
    """Compute capability 9.x: H100, H200."""
    return device.platform == "gpu" and str(device.compute_capability).startswith("9.")


def has_fp8(device: jax.Device) -> bool:
    """Whether a device has numbers of 8 bits: a GPU from compute capability 8.9 on, any CPU.

    >>> import jax
    >>> has_fp8(jax.devices("cpu")[0])
    True
    """
    if device.platform != "gpu":
        return True
    major, _, minor = str(device.compute_capability).partition(".")
    return major.isdigit() and (int(major), int(minor or 0)) >= (8, 9)


def machine() -> str | None:
    """The entry of ``KERNELS`` for the default device; None if there is none."""
    return "hopper" if is_hopper(jax.devices()[0]) else None


def resolve_backend(backend: Backend) -> Literal["mosaic", "reference"]:
    """What "auto" means: "mosaic", the Pallas kernels, if the default device is a Hopper GPU.

    It depends on nothing else: a shape or dtype that a kernel does not cover raises
    ``NotImplementedError`` there, with the reason, and is not silently computed the slow way.

    >>> resolve_backend("reference")
    'reference'
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{backend=} is unknown; known: {BACKENDS}")
    if backend != "auto":
        return backend
    return "reference" if machine() is None else "mosaic"


def implementation(op: str, backend: Backend) -> Callable:
    """The function that runs ``op``: plain JAX, or this machine's kernel.

    Without a GPU "mosaic" means Hopper's kernels, under Mosaic GPU's interpreter.
    """
    if resolve_backend(backend) == "reference":
        return getattr(reference, op)
    kernels = KERNELS[machine() or "hopper"]
    return getattr(importlib.import_module(kernels[op]), op)

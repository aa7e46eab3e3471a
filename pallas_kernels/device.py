"""Which devices the kernels are for. Apart, so that asking does not import Pallas."""

import jax


def is_hopper(device: jax.Device) -> bool:
    """Compute capability 9.x: H100, H200."""
    return device.platform == "gpu" and str(device.compute_capability).startswith("9.")

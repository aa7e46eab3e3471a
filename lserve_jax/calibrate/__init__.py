"""A head pattern for a model: ``python -m lserve_jax.calibrate``."""

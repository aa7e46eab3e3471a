"""What sparsity does to quality: ``python -m lserve_jax.eval`` (docs/quality.md)."""

"""Mosaic GPU kernels for Hopper GPUs (H100, H200): one file an op, and what ops share."""

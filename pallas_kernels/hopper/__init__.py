"""Mosaic GPU kernels for Hopper GPUs (H100, H200), one file a family of ops."""

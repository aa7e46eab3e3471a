"""Attention over pages for long-context inference: arrays in, arrays out.

The public ops are in ``api``. ``reference`` is their specification and what a CPU runs, ``hopper``
the kernels of Hopper GPUs. ``types`` says what ops take beside plain arrays, ``checks`` what they
refuse, ``device`` which implementation runs.
"""

"""What holds for every op: shapes and dtypes of results, vmap, shard_map, bfloat16, donation."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from op_examples import ACCEPTED, T, evaluate, example, jitted
from tiny_checkpoints import process_environment

from pallas_kernels import api

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("op", ACCEPTED)
def test_shapes_and_dtypes_of_results(op: str) -> None:
    arguments, result = ACCEPTED[op]
    assert evaluate(op, arguments) == result


def test_the_table_of_accepted_arguments_covers_every_op() -> None:
    types = {
        "Backend",
        "BlockList",
        "KVPages",
        "OwnAttention",
        "PackedWeight",
        "PageList",
        "W8A8Weight",
        "Weight",
    }
    types |= {"BlockList", "KVKind", "W8A8Kind", "WeightKind", "LoweringProcesses"}
    limits = {
        "MOST_FUSED_PACKED_ROWS",
        "MOST_LINEAR_ROWS",
        "MOST_PACKED_ROWS",
        "MOST_SELECTED_PAGES",
        "WEIGHT_GROUPS",
        "WEIGHT_KINDS",
        "W8A8_KINDS",
        "KV_KINDS",
        "BLOCK_KEYS",
        "TILE_QUERIES",
    }
    others = types | limits | {"check_range", "check_selection", "has_fp8", "has_w8a8_codes"}
    others |= {"resolve_backend", "cannot_pack", "packed_shape", "value_checks"}
    assert set(ACCEPTED) | others == set(api.__all__)


@pytest.mark.parametrize(
    "op", ["paged_attention", "verify_attention", "merge_attention", "page_scores"]
)
def test_vmap_over_queries(op: str) -> None:
    """As with several queries over one cache: everything but the first argument is shared."""
    arguments = example(op)
    name = next(iter(arguments))
    batch = jnp.stack([arguments[name], 0.5 * arguments[name][::-1]])
    axes = {key: 0 if key == name else None for key in arguments}
    mapped = jax.jit(jax.vmap(jitted(op), in_axes=(axes,)))(arguments | {name: batch})
    for i in range(2):
        single = jitted(op)(arguments | {name: batch[i]})
        for x, y in zip(jax.tree.leaves(mapped), jax.tree.leaves(single), strict=True):
            assert_allclose(x[i], y, atol=1e-6, rtol=0)


def test_vmap_of_prefill_over_sequences_of_unequal_length() -> None:
    """Each with its own queries, tables, start and length over shared pools."""
    first = example("prefill_attention")
    changed = {
        "q": 0.5 * first["q"],
        "page_table": jnp.array([0, 2, 1, 4]),
        "start": jnp.int32(3),
        "length": jnp.int32(9),
    }
    batch = first | {name: jnp.stack([first[name], x]) for name, x in changed.items()}
    axes = {name: 0 if name in changed else None for name in first}
    mapped = jax.jit(jax.vmap(jitted("prefill_attention"), in_axes=(axes,)))(batch)
    for i, (arguments, length) in enumerate(((first, T), (first | changed, 9))):
        single = jitted("prefill_attention")(arguments)
        for x, y in zip(mapped, single, strict=True):
            assert_allclose(np.asarray(x)[i, :length], np.asarray(y)[:length], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("op", "dtypes"),
    [
        ("paged_attention", "bfloat16 float32"),
        ("prefill_attention", "bfloat16 float32"),
        ("verify_attention", "bfloat16 float32"),
        ("merge_attention", "bfloat16 float32"),
        ("append_kv", "bfloat16 " * 6),
        ("append_kv_chunk", "bfloat16 " * 5),
        ("page_scores", "float32"),
        ("apply_rotary", "bfloat16"),
        ("quantize_kv", "int8 float32"),
    ],
)
def test_bfloat16(op: str, dtypes: str) -> None:
    """Arithmetic stays float32: only arguments are rounded, and results, once."""
    arguments = example(op)
    narrow = arguments | {
        name: jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.bfloat16), x)
        for name, x in arguments.items()
        if name not in ("cos", "sin", "lses")  # float32 by contract
    }
    wide = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.float32), narrow)
    results, truths = (jax.tree.leaves(jitted(op)(x)) for x in (narrow, wide))
    assert [x.dtype.name for x in results] == dtypes.split()
    for result, truth in zip(results, truths, strict=True):
        # Fused differently, float32 may differ in its last bits and bfloat16 round the other way.
        tolerance = {"rtol": 2**-7} if result.dtype == jnp.bfloat16 else {"atol": 1e-5}
        assert_allclose(np.asarray(result, float), np.asarray(truth, float), **tolerance)


@pytest.mark.parametrize("op", ["append_kv", "append_kv_chunk"])
def test_donated_pools_are_updated_in_place(op: str) -> None:
    """A donation that XLA cannot use would be a warning, hence an error, and leave the buffer."""
    arguments = example(op)
    names = ("retrieval", "streaming", "key_stats")
    jax.jit(getattr(api, op), donate_argnames=names)(**arguments)
    assert all(x.is_deleted() for name in names for x in jax.tree.leaves(arguments[name]))


def test_ops_under_shard_map_equal_the_ops_on_one_device() -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.support.sharded_ops"]
    environment = process_environment()
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr

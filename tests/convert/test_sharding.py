"""Loading rules on four CPU devices, and ``logits`` over what they placed.

A script of its own process: the number of devices is set before JAX starts.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoints import run_script

import convert

SCRIPT = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import convert
from convert.names import flatten
from lserve_jax import logits

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
tokens = np.random.default_rng(0).integers(0, 40, (4, 12)).astype(np.int32)
ids = np.repeat(np.int32([[1, 2]]), [5, 7], axis=1).repeat(4, axis=0)


def check(source, combinations):
    config, params = convert.load(source, dtype=jnp.float32)

    def run(params, tokens, ids):
        return logits(config, params, tokens, segment_ids=ids)

    def loss(params, tokens, ids):
        return logits(config, params, tokens, segment_ids=ids, remat=True).var()

    wanted = jax.jit(run)(params, tokens, ids)
    gradient = jax.jit(jax.grad(loss))(params, tokens, ids)
    for axis_type, (shape, rule, axis, cut) in combinations:
        mesh = jax.make_mesh(shape, ("dp", "tp"), axis_types=(axis_type, axis_type))
        _, placed = convert.load(source, dtype=jnp.float32, sharding=rule(mesh, axis))
        specs = {path: leaf.sharding.spec for path, leaf in flatten(placed).items()}
        assert specs["layers.0.self_attn." + cut[0]] == P(*cut[1]), specs
        assert specs["layers.0.input_layernorm.scale"] == P()
        by_rows = NamedSharding(mesh, P("dp"))
        args = placed, *(jax.device_put(x, by_rows) for x in (tokens, ids))
        for f in (run, jax.jit(run)):
            made = f(*args)
            np.testing.assert_allclose(np.asarray(made), wanted, atol=1e-5)
            if axis_type == AxisType.Explicit:
                assert made.sharding.spec[0] == "dp", made.sharding
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(np.asarray(jax.jit(run)(*args)), wanted, atol=1e-5)
            grads = jax.jit(jax.grad(loss))(*args)
        for path, x in flatten(grads).items():
            np.testing.assert_allclose(x, flatten(gradient)[path], atol=1e-4)
            if axis_type == AxisType.Explicit:
                assert x.sharding.is_equivalent_to(flatten(placed)[path].sharding, x.ndim), path


tp = ((2, 2), convert.tensor_parallel, "tp", ("qkv_proj.kernel", (None, "tp")))
fsdp = ((4, 1), convert.fsdp, "dp", ("o_proj.kernel", ("dp",)))
for model, combinations in (
    ("llama3-gqa-ropellama3", ((AxisType.Explicit, tp), (AxisType.Auto, fsdp))),
    ("llama-tied", ((AxisType.Auto, tp), (AxisType.Explicit, fsdp))),
):
    check(Path(sys.argv[1]) / model, combinations)
print("ok")
"""


def test_logits_over_sharded_parameters(conformance: Path) -> None:
    """Of two models, each over shards of both rules: in one process, they share programs.

    Every model, rule and kind of mesh axis meets every other; all three together would be twice
    the programs.
    """
    assert run_script(SCRIPT, conformance) == "ok\n"


def test_an_axis_that_the_mesh_does_not_have() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    for rule in (convert.tensor_parallel, convert.fsdp):
        with pytest.raises(
            ValueError, match=r"axis='tp' must be one of the mesh's axes, \('data',\)"
        ):
            rule(mesh, "tp")

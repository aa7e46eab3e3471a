"""Loading rules on four CPU devices, and ``logits`` over what they placed.

A script of its own process: the number of devices is set before JAX starts.
"""

import jax
import numpy as np
import pytest
from tiny_checkpoints import run_script

import convert

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import convert
from convert.names import flatten
from lserve_jax import logits

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
source, kind = sys.argv[1:3]
shape, rule, axis, cut = {
    "tp": ((2, 2), convert.tensor_parallel, "tp", ("qkv_proj.kernel", (None, "tp"))),
    "fsdp": ((4, 1), convert.fsdp, "dp", ("o_proj.kernel", ("dp",))),
}[kind]
tokens = np.random.default_rng(0).integers(0, 40, (4, 12)).astype(np.int32)
ids = np.repeat(np.int32([[1, 2]]), [5, 7], axis=1).repeat(4, axis=0)
config, params = convert.load(source, dtype=jnp.float32)


def loss(params, tokens, ids):
    return logits(config, params, tokens, segment_ids=ids, remat=True).var()


wanted = logits(config, params, jnp.asarray(tokens), segment_ids=jnp.asarray(ids))
gradient = jax.jit(jax.grad(loss))(params, tokens, ids)
for axis_type in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh(shape, ("dp", "tp"), axis_types=(axis_type, axis_type))
    _, placed = convert.load(source, dtype=jnp.float32, sharding=rule(mesh, axis))
    specs = {path: leaf.sharding.spec for path, leaf in flatten(placed).items()}
    assert specs["layers.0.self_attn." + cut[0]] == P(*cut[1]), specs
    assert specs["layers.0.input_layernorm.scale"] == P()
    by_rows = NamedSharding(mesh, P("dp"))
    args = placed, *(jax.device_put(x, by_rows) for x in (tokens, ids))

    def run(params, tokens, ids):
        return logits(config, params, tokens, segment_ids=ids)

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
print("ok")
"""


@pytest.mark.parametrize("kind", ["tp", "fsdp"])
@pytest.mark.parametrize("model", ["llama3-gqa-ropellama3", "llama-tied"])
def test_logits_over_sharded_parameters(conformance, model: str, kind: str) -> None:
    cache = str(jax.config.jax_compilation_cache_dir)
    printed = run_script(SCRIPT, conformance / model, kind, JAX_COMPILATION_CACHE_DIR=cache)
    assert printed == "ok\n"


def test_an_axis_that_the_mesh_does_not_have() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    for rule in (convert.tensor_parallel, convert.fsdp):
        with pytest.raises(
            ValueError, match=r"axis='tp' must be one of the mesh's axes, \('data',\)"
        ):
            rule(mesh, "tp")

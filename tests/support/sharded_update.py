"""New weights for an engine whose weights are sharded over two CPU devices.

A script, run by test_update_params.py: the number of devices is set before JAX starts. Its only
argument is the directory of the compilation cache.
"""

import sys
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec
from tiny_llm import tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

CONFIG = tiny_config(layers=1, kv_heads=2)
MESH = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))


def sharding(path: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path)
    spec = Spec(None, "tp") if "qkv_proj" in name else Spec("tp") if "o_proj" in name else Spec()
    return NamedSharding(MESH, spec)


def sharded(params: dict) -> dict:
    return jax.tree.map_with_path(lambda path, x: jax.device_put(x, sharding(path)), params)


def tokens(llm: LLM) -> list[int]:
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return llm.generate({"prompt_token_ids": [3] * 20}, sampling)[0].outputs[0].token_ids


options: dict = {"max_model_len": 256, "max_num_seqs": 2}
expected = [tokens(LLM((CONFIG, tiny_params(CONFIG, seed)), **options)) for seed in (0, 1)]
llm = LLM((CONFIG, sharded(tiny_params(CONFIG))), **options)
assert [tokens(llm) for _ in range(2)] == [expected[0]] * 2

compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
)
# Weights that come in the same sharding, and such that were made on one device.
for seed, put in ((1, sharded), (0, lambda params: params), (1, lambda params: params)):
    params = put(tiny_params(CONFIG, seed))
    compiled.clear()
    llm.update_params(params)
    assert tokens(llm) == expected[seed]
    assert not compiled, compiled
    for path, leaf in jax.tree.flatten_with_path(llm.engine.params)[0]:
        assert leaf.sharding == sharding(path), (path, leaf.sharding)

# On Explicit axes, as jax.make_mesh makes them by default, the engine runs on Auto ones.
EXPLICIT = jax.make_mesh((2,), ("tp",))
cut = jax.tree.map_with_path(
    lambda path, x: jax.device_put(x, NamedSharding(EXPLICIT, sharding(path).spec)),
    tiny_params(CONFIG),
)
llm = LLM((CONFIG, cut), **options)
assert tokens(llm) == expected[0]
llm.update_params(jax.tree.map(lambda x: x, cut))
assert tokens(llm) == expected[0]

"""Kept programs of engines whose weights lie on a second CPU device, or on two.

A script, run by test_programs.py: the number of devices is set before JAX starts. Its arguments are
the directories of JAX's compilation cache and of the programs.
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


def on_both(path: Any, x: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path)
    spec = Spec(None, "tp") if "qkv_proj" in name else Spec("tp") if "o_proj" in name else Spec()
    return jax.device_put(x, NamedSharding(MESH, spec))


def tokens(llm: LLM) -> list[int]:
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    return llm.generate({"prompt_token_ids": [3] * 20}, sampling)[0].outputs[0].token_ids


params, options = tiny_params(CONFIG), {"max_model_len": 128, "max_num_seqs": 2}
expected = tokens(LLM((CONFIG, params), **options))
for placed in (
    jax.tree.map_with_path(on_both, params),
    jax.device_put(params, jax.devices()[1]),
    params,
):
    made = {}
    for source in ("compiled", "loaded"):
        llm = LLM((CONFIG, placed), **options, compilation_cache=sys.argv[2])
        assert [tokens(llm) for _ in range(2)] == [expected] * 2
        made[source] = [program.name for program in llm.engine.runner.programs.times]
        assert {program.source for program in llm.engine.runner.programs.times} == {source}
    assert sorted(made["compiled"]) == sorted(made["loaded"]), made

"""Two CPU devices, and how a tiny model's weights lie on both.

For scripts: the number of devices is set before JAX starts.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec
from tiny_llm import tiny_config

from lserve_jax import LLM, SamplingParams
from lserve_jax.outputs import CompletionOutput

jax.config.update("jax_num_cpu_devices", 2)

CONFIG = tiny_config(layers=1, kv_heads=2)
MESH = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))


def sharding(path: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path)
    spec = Spec(None, "tp") if "qkv_proj" in name else Spec("tp") if "o_proj" in name else Spec()
    return NamedSharding(MESH, spec)


def sharded(params: dict) -> dict:
    return jax.tree.map_with_path(lambda path, x: jax.device_put(x, sharding(path)), params)


def complete(llm: LLM, count: int, prompt: Sequence[int], **asked: Any) -> CompletionOutput:
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **asked)
    return llm.generate({"prompt_token_ids": list(prompt)}, sampling)[0].outputs[0]


def tokens(llm: LLM, count: int, prompt: Sequence[int] = (3,) * 20) -> list[int]:
    return complete(llm, count, prompt).token_ids

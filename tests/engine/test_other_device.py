"""An engine whose parameters lie on another than the default device."""

from pathlib import Path

from tiny_checkpoints import run_script

SCRIPT = """
import sys
import jax, jax.numpy as jnp
import convert
from lserve_jax import LLM, SamplingParams, SparsityConfig

jax.config.update("jax_num_cpu_devices", 2)
compiled = 0


def count(name, *_, **__):
    global compiled
    compiled += name == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(count)
other = jax.sharding.SingleDeviceSharding(jax.devices()[1])
for options in ({}, {"attention": "lserve", "sparsity": SparsityConfig(token_budget=256)}):
    tokens = []
    for sharding in (None, other):
        model = convert.load(sys.argv[1], dtype=jnp.float32, sharding=sharding)
        llm = LLM(model, kv_cache_bytes=1 << 22, max_num_seqs=2, **options)
        sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        for call in range(2):
            before, shapes = compiled, llm.engine.metrics().compilations
            [output] = llm.generate({"prompt_token_ids": [3, 5] * 40}, sampling)
            tokens.append(output.outputs[0].token_ids)
            llm.reset_prefix_cache()  # the rest of a remembered prompt is a shorter chunk
            if call == 1:
                assert compiled == before, "the second call compiled"
                assert llm.engine.metrics().compilations == shapes
    assert tokens == [tokens[0]] * 4
print("ok")
"""


def test_it_compiles_once_and_gives_the_same_tokens(conformance: Path) -> None:
    model = conformance / "llama3-gqa-ropellama3"
    assert run_script(SCRIPT, model) == "ok\n"

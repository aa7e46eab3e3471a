"""New weights for an engine whose weights are sharded over two CPU devices.

A script, run by test_update_params.py.
"""

import jax
from jax.sharding import NamedSharding
from tiny_llm import tiny_params
from two_devices import CONFIG, complete, sharded, sharding, tokens

from lserve_jax import LLM

options: dict = {"max_model_len": 256, "max_num_seqs": 2}
expected = [tokens(LLM((CONFIG, tiny_params(CONFIG, seed)), **options), 8) for seed in (0, 1)]
plain = expected[0]
llm = LLM((CONFIG, sharded(tiny_params(CONFIG))), **options)
assert [tokens(llm, 8) for _ in range(2)] == [plain] * 2

compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
)
# Weights that come in the same sharding, and such that were made on one device.
for seed, put in ((1, sharded), (0, lambda params: params), (1, lambda params: params)):
    params = put(tiny_params(CONFIG, seed))
    compiled.clear()
    llm.update_params(params)
    assert tokens(llm, 8) == expected[seed]
    assert not compiled, compiled
    for path, leaf in jax.tree.flatten_with_path(llm.engine.params)[0]:
        assert leaf.sharding == sharding(path), (path, leaf.sharding)

# Prefill in 8 bits: its matrices are made where those of decode lie, and made again there.
options["prefill_dtype"] = "int8"
expected = [tokens(LLM((CONFIG, tiny_params(CONFIG, seed)), **options), 8) for seed in (0, 1)]
llm = LLM((CONFIG, sharded(tiny_params(CONFIG))), **options)
assert [tokens(llm, 8) for _ in range(2)] == [expected[0]] * 2
for seed, put in ((1, sharded), (0, lambda params: params)):
    params = put(tiny_params(CONFIG, seed))
    compiled.clear()
    llm.update_params(params)
    assert tokens(llm, 8) == expected[seed]
    assert not compiled, compiled
    layer = llm.engine.runner.prefill_params["layers"][0]["self_attn"]
    for name, axis in (("qkv_proj", 0), ("o_proj", 1)):  # codes are transposed
        codes = layer[name]["kernel"].codes
        half = [n // 2 if i == axis else n for i, n in enumerate(codes.shape)]
        assert codes.sharding.shard_shape(codes.shape) == tuple(half), (name, codes.sharding)

# Prompts are remembered, and go to host memory and back, bit for bit: one of these has room.
documents = [[number] * 200 for number in (5, 7)]
room: dict = {"max_num_seqs": 1, "max_model_len": 256, "max_prefixes": 0, "relay": "never"}
alone = LLM((CONFIG, tiny_params(CONFIG)), enable_prefix_caching=False, **room)
answers = [tokens(alone, 4, document) for document in documents]
room |= {"deterministic": True, "prefill_chunk_size": 64, "host_cache_bytes": 1 << 24}
remembering = LLM((CONFIG, sharded(tiny_params(CONFIG))), **room)
cold: dict = {}
for number in (0, 0, 1, 0):
    made = complete(remembering, 4, documents[number], logprobs=3)
    assert made.token_ids == answers[number]
    assert cold.setdefault(number, made.logprobs) == made.logprobs
metrics = remembering.engine.metrics()
assert metrics.prefix_tokens == 2 * 192 and metrics.host_pages > 0, metrics

del options["prefill_dtype"]
# On Explicit axes, as jax.make_mesh makes them by default, the engine runs on Auto ones.
EXPLICIT = jax.make_mesh((2,), ("tp",))
cut = jax.tree.map_with_path(
    lambda path, x: jax.device_put(x, NamedSharding(EXPLICIT, sharding(path).spec)),
    tiny_params(CONFIG),
)
llm = LLM((CONFIG, cut), **options)
assert tokens(llm, 8) == plain
llm.update_params(jax.tree.map(lambda x: x, cut))
assert tokens(llm, 8) == plain

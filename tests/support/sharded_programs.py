"""Kept programs of engines whose weights lie on a second CPU device, or on two.

A script, run by test_programs.py. Its argument is the directory of the programs.
"""

import sys

import jax
from tiny_llm import tiny_params
from two_devices import CONFIG, sharded, tokens

from lserve_jax import LLM

params, options = tiny_params(CONFIG), {"max_model_len": 128, "max_num_seqs": 2}
expected = tokens(LLM((CONFIG, params), **options), 40)
for placed in (
    sharded(params),
    jax.device_put(params, jax.devices()[1]),
    params,
):
    made = {}
    for source in ("compiled", "loaded"):
        llm = LLM((CONFIG, placed), **options, compilation_cache=sys.argv[1])
        assert [tokens(llm, 40) for _ in range(2)] == [expected] * 2
        made[source] = [program.name for program in llm.engine.runner.programs.times]
        assert {program.source for program in llm.engine.runner.programs.times} == {source}
    assert sorted(made["compiled"]) == sorted(made["loaded"]), made

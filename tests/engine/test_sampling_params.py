"""Sampling parameters, and how they become rows and modes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_oracle import (
    random_logits,
)

from lserve_jax.engine import sampling
from lserve_jax.engine.sampling import (
    SamplingArrays,
    SamplingMode,
    sample,
    sampling_row,
)
from lserve_jax.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"n": 10**9}, "n must be at most 16384, got 1000000000"),
        ({"n": 2, "temperature": 0}, "n=2 needs temperature > 0"),
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number at least 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"top_k": -2}, "top_k must be an integer of at least -1, got -2"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"top_p": 0}, "top_p=0 must be greater than 0"),
        ({"top_p": 1.01}, r"top_p=1.01 must be a finite number in \[0.0, 1.0\]"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.0}, "seed must be an integer"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": None}, "max_tokens must be an integer"),
        ({"min_tokens": -1}, "min_tokens must be an integer of at least 0"),
        ({"min_tokens": 17}, "min_tokens=17 must not exceed max_tokens=16"),
        ({"stop": ""}, "non-empty strings"),
        ({"stop": ["a", ""]}, "non-empty strings"),
        ({"stop": [1]}, "non-empty strings"),
        ({"stop_token_ids": [-1]}, "every entry of stop_token_ids must be an integer"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is too close to 0"),
        ({"repetition_penalty": -1}, "repetition_penalty=-1"),
        ({"presence_penalty": 2.1}, r"presence_penalty=2.1 must be a finite number in \[-2.0"),
        ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1"),
        ({"logprobs": -1}, "logprobs must be an integer of at least 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be an integer of at least 0, got -1"),
        ({"prompt_logprobs": True}, "prompt_logprobs must be an integer of at least 0, got True"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs must be an integer of at least 0, got 1.5"),
        ({"prompt_logprobs": 0, "max_tokens": -1}, "max_tokens must be an integer of at least 0"),
        ({"prompt_logprobs": 0, "max_tokens": 0, "n": 2}, "n=2 needs max_tokens > 0"),
        (
            {"prompt_logprobs": 0, "max_tokens": 0, "min_tokens": 1},
            "min_tokens=1 must not exceed max_tokens=0",
        ),
    ],
)
def test_wrong_parameters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


def test_parameters_keep_sequences_as_tuples():
    params = SamplingParams(stop="\n", stop_token_ids=[1, np.int64(2)], logprobs=0, top_k=-1)
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (1, 2)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert hash(params) == hash(dataclasses.replace(params))


def test_mode_is_the_least_that_covers_the_batch():
    greedy = SamplingParams(temperature=0, top_k=5)
    assert SamplingMode.of([greedy, greedy]) == SamplingMode(greedy_only=True, filters=False)
    mode = SamplingMode.of([greedy, SamplingParams(logprobs=3), SamplingParams(logprobs=1)])
    assert mode == SamplingMode(filters=False, top_logprobs=4)  # a power of two
    assert SamplingMode.of([SamplingParams(top_p=0.9)]).filters
    assert SamplingMode.of([SamplingParams(top_k=1)]).filters
    assert not SamplingMode.of([SamplingParams(top_k=-1, min_p=0.1)]).filters
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingMode.of([greedy, SamplingParams(**{name: 0.5})]).penalties


def test_rows_change_without_recompilation():
    traces = 0

    @functools.partial(jax.jit, static_argnames="mode")
    def counted(logits, arrays, step, mode):
        nonlocal traces
        traces += 1
        return sample(logits, arrays, step=step, mode=mode)

    mode = SamplingMode(filters=False)
    logits, step = random_logits(3), jnp.zeros((3,), jnp.int32)
    arrays = SamplingArrays.empty(3, 4)
    rows_compiled = sampling._set_rows._cache_size()
    for i, params in enumerate(
        [
            SamplingParams(temperature=0.5, top_k=3, stop_token_ids=(1, 2)),
            SamplingParams(top_p=0.5, seed=3, min_tokens=2),
            SamplingParams(temperature=0, stop_token_ids=(1, 2, 3)),
        ]
    ):
        row = sampling_row(params, eos_token_ids=(9,), default_seed=0)
        arrays = arrays.with_rows([(i, row)])
        counted(logits, arrays, step, mode)
    assert traces == 1
    assert sampling._set_rows._cache_size() <= rows_compiled + 1
    assert arrays.stop_token_ids.tolist() == [[1, 2, 9, -1], [9, -1, -1, -1], [1, 2, 3, 9]]
    assert arrays.temperature.tolist() == [0.5, 1.0, 0.0]


def test_rows_that_do_not_fit_are_refused():
    arrays = SamplingArrays.empty(2, 2)
    row = sampling_row(SamplingParams(stop_token_ids=(1, 2)), eos_token_ids=(3,), default_seed=0)
    with pytest.raises(ValueError, match=r"3 stop ids.* room for 2"):
        arrays.with_rows([(0, row)])
    row["stop_token_ids"] = row["stop_token_ids"][:2]
    for index in (-1, 2):
        with pytest.raises(ValueError, match=rf"row {index} must lie in \[0, 2\)"):
            arrays.with_rows([(index, row)])


def test_sample_refuses_other_logits_and_missing_counts():
    arrays, step = SamplingArrays.empty(1, 1), jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match="logits must be float32, got bfloat16"):
        sample(jnp.zeros((1, 4), jnp.bfloat16), arrays, step=step, mode=SamplingMode())
    with pytest.raises(ValueError, match="needs output_counts and prompt_mask"):
        sample(jnp.zeros((1, 4), jnp.float32), arrays, step=step, mode=SamplingMode(penalties=True))

"""Quantised checkpoints that the libraries themselves wrote: logits of their own dequantised weights.

``quantised/make_*.py`` made the files, with the libraries' versions in their heads.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import convert
from lserve_jax import logits

HERE = Path(__file__).parent / "quantised"
CASES = sorted(path.name for path in HERE.iterdir() if (path / "expected.npz").is_file())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_librarys(case):
    config, params = convert.load(HERE / case, dtype=jnp.float32)
    expected = np.load(HERE / case / "expected.npz")
    got = logits(config, params, jnp.asarray(expected["tokens"], jnp.int32))[0]
    # The same weights, to the bit or to bfloat16 scales' rounding; sums of a few hundred products.
    assert_allclose(got, expected["logits"], atol=1e-4, rtol=0)


def test_there_are_cases_of_every_format():
    formats = {
        json.loads((HERE / case / "config.json").read_text())["quantization_config"]["quant_method"]
        for case in CASES
    }
    assert formats >= {"compressed-tensors"}

"""Adapters that PEFT wrote, against the logits of PEFT itself.

tests/data/peft holds two random Qwen2 models of one layer, with tied embeddings and without, and
adapters of PEFT 0.21.2 with every parameter random. ``golden.npz`` has the logits of the adapted
model as PEFT computes them unmerged (transformers 5.24.0, float32).
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import convert
from lserve_jax import logits

PEFT = Path(__file__).parents[1] / "data" / "peft"
NAMES = sorted(path.parent.name for path in PEFT.glob("*/golden.npz"))
# Both sides compute in float32; logits of size 20, sums of some dozens of terms in another order.
TOLERANCE = {"atol": 2e-4, "rtol": 0}


@pytest.mark.parametrize("source", ["hf", "orbax"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_peft(tmp_path, name, source):
    golden = np.load(PEFT / name / "golden.npz")
    base = PEFT / str(golden["base"])
    if source == "orbax":
        convert.save(tmp_path / "orbax", *convert.load(base))
        base = tmp_path / "orbax"
    config, params = convert.load(base, adapter=PEFT / name)
    found = logits(config, params, jnp.asarray(golden["input_ids"]))
    np.testing.assert_allclose(found, golden["logits"], **TOLERANCE)
    adapted = convert.ModelSource(name=name, path=base, adapter=PEFT / name)
    assert convert.read_config(adapted) == config


def test_an_adapter_alone_is_no_model():
    with pytest.raises(ValueError, match=r"dora holds a LoRA adapter .*give the model and"):
        convert.load(PEFT / "dora")

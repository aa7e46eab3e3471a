"""transformers opens what ``export_hf`` wrote, PEFT what ``save_adapter`` wrote."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import convert
from lserve_jax import logits
from lserve_jax.model import lora

pytest.importorskip("transformers", reason="needs the extra transformers")

PEER = Path(__file__).parents[1] / "support" / "transformers_peer.py"
CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"


def peer(directory: Path, tokens: np.ndarray, *names: str) -> list[np.ndarray]:
    np.save(directory / "ids.npy", tokens)
    output = directory / "logits.npz"
    command = [sys.executable, str(PEER), str(directory / "ids.npy"), str(output), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(output) as found:
        return [found[name] for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in CONFORMANCE.iterdir()))
def test_transformers_has_the_same_logits(tmp_path: Path, name: str) -> None:
    """As from the checkpoint that it came from: on one machine the same sums."""
    config, params = convert.load(CONFORMANCE / name, dtype=jnp.float32)
    convert.export_hf(tmp_path / "out", config, params, max_shard_bytes=200_000)
    tokens = np.load(CONFORMANCE / name / "golden.npz")["input_ids"]
    made, wanted = peer(tmp_path, tokens, str(tmp_path / "out"), str(CONFORMANCE / name))
    # Phi-3, whose projections transformers multiplies as one, becomes a Llama with three.
    tolerance = 2e-5 if name == "phi3-longrope" else 1e-5
    assert_allclose(made, wanted, atol=tolerance, rtol=0)


@pytest.mark.slow
def test_peft_applies_a_saved_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra transformers")
    config, params = convert.load(CONFORMANCE / "llama3-gqa-ropellama3", dtype=jnp.float32)
    targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    adapter = lora.init_adapter(config, rank=3, targets=targets)
    adapter = jax.tree.map(lambda x: x + 0.05, adapter)
    convert.export_hf(tmp_path / "out", config, params)
    convert.save_adapter(tmp_path / "adapter", config, adapter, alpha=6.0)
    tokens = np.arange(24).reshape(2, 12)
    name = f"{tmp_path / 'out'}+{tmp_path / 'adapter'}"
    base, made = peer(tmp_path, tokens, str(tmp_path / "out"), name)
    wanted = logits(config, lora.merge(params, adapter, alpha=6.0), jnp.asarray(tokens))
    assert_allclose(made, wanted, atol=1e-4, rtol=0)
    assert np.abs(made - base).max() > 0.1

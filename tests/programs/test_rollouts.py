"""The example of rollouts and training in one process, on a tiny model."""

import importlib.util
from pathlib import Path

import jax
import pytest
from tiny_checkpoints import write_chat_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "rollouts.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("rollouts", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rollouts_learn_on_policy_and_compile_once(example, tmp_path, capsys):
    model = str(write_chat_model(tmp_path / "model"))
    args = example.Arguments(model=model, iterations=60, max_tokens=12, learning_rate=0.01)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integer counts
        done = example.train(args)
    assert len(capsys.readouterr().out.splitlines()) == 60
    # Slots are taken in the order in which requests end, so a burst of fewer rows may be new
    # in the second iteration; then there is none.
    assert done[0].compilations > 0
    assert sum(new.compilations for new in done[2:]) == 0
    # Weights of size 1 make logits of some hundreds, which are rounded at 1e-5.
    assert max(new.gap for new in done) < 2e-3
    rewards = [new.reward for new in done]
    assert sum(rewards[-10:]) > 1.5 * sum(rewards[:10])
    assert done[-1].peak_memory < 1.02 * done[9].peak_memory

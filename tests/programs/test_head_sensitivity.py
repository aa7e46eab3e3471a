"""What one head is worth: against a float64 model that is cut by hand, and where it is known."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
from oracle_model import Oracle, log_softmax
from tiny_llm import random_prompts, tiny_config, tiny_params

from lserve_jax import SparsityConfig
from lserve_jax.calibrate.layers import stack_layers
from lserve_jax.calibrate.sensitivity import SINK_PAGES, Measurement, combine, measure, passes
from lserve_jax.model.head_shares import MEASURED_SHARE, MISSED_AT

CONFIG = tiny_config(layers=2, kv_heads=2, group=2, max_len=4096)
# 130 pages of 16 tokens at the end: a share of 1/32 is four of them throughout.
MEASUREMENT = Measurement(context=2059, window=21, decode_sink=32, decode_local=64)
SPARSITY = SparsityConfig(page_size=16, token_budget=64, decode_sink=32, decode_local=64)
TOKENS = np.array(random_prompts(5, [MEASUREMENT.length])[0], np.int32)
STREAMING, SELECTING = 0, 1


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


def run(params, config=CONFIG, measurement=MEASUREMENT, heads_per_pass=3, **options):
    return measure(
        config,
        stack_layers(params),
        measurement,
        TOKENS,
        heads_per_pass=heads_per_pass,
        backend="reference",
        **options,
    )


class CutOracle(Oracle):
    """Dense but for one head, whose mask in decode is that of ``Oracle``; the prompt is dense."""

    cut: tuple[int, int] | None = None
    missed: dict[tuple[int, int], list[list[float]]] | None = None

    def cut_head(self, layer: int, head: int, kind: int) -> "CutOracle":
        one = copy.deepcopy(self)
        one.cut, one.streaming[layer][head] = (layer, head), kind == STREAMING
        return one

    def _step_mask(self, layer, head, queries):
        if self.missed is not None:
            self.missed.setdefault((layer, head), []).append(self._miss(layer, head, queries[0]))
        if (layer, head) == self.cut:
            return super()._step_mask(layer, head, queries)
        return np.ones((1, self.length), bool)

    def _miss(self, layer, head, queries) -> list[float]:
        """Mass outside of what each of MISSED_AT would list, the last selection's ranking."""
        U, position = self.selected_page_size, self.length - 1
        if self.steps % self.sparsity.reuse_interval == 0:
            tail, forced = (position - 1) // U, self.sparsity.forced_sink_pages
            scores = {page: self._score(layer, head, page, queries) for page in range(forced, tail)}
            best = sorted(scores, key=lambda page: (-scores[page], page))
            counts = [round(share * (position + 1) / U) - 1 - forced for share in MISSED_AT]
            self.chosen[layer, head] = [
                [*range(forced), *best[: max(count, 0)], *range(tail, tail + 3)] for count in counts
            ]
        scores = queries @ self.keys[layer][:, head].T / np.sqrt(queries.shape[-1])
        mass = np.exp(log_softmax(scores)).mean(axis=0)
        page = np.arange(self.length) // U
        return [mass[~np.isin(page, listed)].sum() for listed in self.chosen[layer, head]]


@pytest.fixture(scope="module")
def prompted(params):
    """The oracle after the context."""
    oracle = CutOracle(CONFIG, params, sparsity=SPARSITY)
    oracle.prefill(TOKENS[: MEASUREMENT.context])
    return oracle


def distributions(oracle):
    return np.array([log_softmax(oracle.decode(token)) for token in TOKENS[MEASUREMENT.context :]])


def test_losses_are_those_of_a_model_cut_by_hand(params, prompted):
    losses, missed = run(params)
    dense = copy.deepcopy(prompted)
    dense.missed = {}
    log_p = distributions(dense)
    expected, expected_missed = np.empty((2, 2, 2)), np.empty((len(MISSED_AT), 2, 2))
    for (layer, head), of_steps in dense.missed.items():
        expected_missed[:, layer, head] = np.mean(of_steps, axis=0)
        for kind in (STREAMING, SELECTING):
            oracle = prompted.cut_head(layer, head, kind)
            log_q = distributions(oracle)
            expected[kind, layer, head] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
            if kind == SELECTING:
                # Two pages by score beside the sink: what float32 might choose otherwise is far.
                assert len(oracle.chosen[layer, head]) == 3 and oracle.closest_call > 1e-4
    assert expected.min() > 1e-3 and expected.max() > 2 * expected.min()
    # KL of float32 logits: sums of 96 terms of about 1e-2, each to 1e-6.
    np.testing.assert_allclose(losses, expected, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(missed, expected_missed, rtol=1e-4)
    assert (np.diff(missed, axis=0) <= 0).all() and (missed[0] > missed[-1]).all()


def test_how_many_heads_run_together_does_not_matter(params):
    calls = []
    one, _ = run(params, heads_per_pass=1, on_pass=lambda: calls.append(1))
    all_at_once, _ = run(params, heads_per_pass=5)  # more than there are
    assert len(calls) == len(passes(CONFIG, 1)) == 4
    np.testing.assert_allclose(one, all_at_once, rtol=1e-4)  # rounding of another batch


def test_a_head_that_the_output_projection_ignores_is_worth_nothing(params):
    layers = {i: dict(layer) for i, layer in params["layers"].items()}
    out = layers[1]["self_attn"]["o_proj"]["kernel"]  # [H * D, E]
    group = CONFIG.group_size * CONFIG.head_dim
    layers[1]["self_attn"] = layers[1]["self_attn"] | {
        "o_proj": {"kernel": out.at[group : 2 * group].set(0.0)}
    }
    losses, missed = run(params | {"layers": layers})
    assert (np.abs(losses[:, 1, 1]) < 1e-7).all()
    assert (np.delete(losses.reshape(2, -1), 3, axis=1) > 1e-3).all()
    sensitivity = combine(losses[None], missed[None], name="x", context=2059)
    assert sensitivity.worth[1, 1] == 0.0 and (sensitivity.worth > 0).sum() == 3


def test_one_layer_and_one_head():
    config = tiny_config(layers=1, kv_heads=1, max_len=4096)
    losses, missed = run(tiny_params(config), config, heads_per_pass=1)
    assert losses.shape == (2, 1, 1) and (losses > 1e-3).all()
    sensitivity = combine(losses[None], missed[None], name="x", context=2059)
    # Nothing tells its loss from rounding.
    assert sensitivity.worth.tolist() == [[0.0]]


def test_combine_takes_the_mean_over_windows_less_the_noise():
    rng = np.random.default_rng(0)
    losses = rng.random((4, 2, 5, 4)).astype(np.float32)
    missed = rng.random((4, len(MISSED_AT), 5, 4)).astype(np.float32)
    sensitivity = combine(losses, missed, name="x", context=7)
    for i, field in enumerate((sensitivity.streaming, sensitivity.selecting)):
        mean = losses[:, i].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(
            field, np.maximum(mean - np.quantile(mean, 0.1), 0.0), atol=1e-12
        )
        assert (field == 0).sum() == 2
    np.testing.assert_allclose(sensitivity.missed, missed.mean(axis=0), atol=1e-7)
    assert (sensitivity.name, sensitivity.context) == ("x", 7)


def test_a_loss_that_is_not_finite_is_named(params):
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(FloatingPointError, match="loss is nan at layer 0, head 0"):
        run(broken)


def test_layers_without_rotary_embedding_are_refused(params):
    config = dataclasses.replace(CONFIG, nope_layers=(1,))
    with pytest.raises(NotImplementedError, match=r"without rotary embedding \(\(1,\)\)"):
        run(params, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"windows": 0}, "windows=0 must be at least 1"),
        ({"decode_sink": -1}, "decode_sink=-1 must be at least 0"),
        ({"decode_local": 0}, "decode_local=0 must be at least 1"),
        ({"reuse_interval": 0}, "reuse_interval=0 must be at least 1"),
        ({"logical_page_size": 0}, "logical_page_size=0 must be at least 1"),
        ({"lower_bound_weight": 1.5}, r"lower_bound_weight=1\.5 must lie in \[0, 1\]"),
        ({"lower_bound_weight": float("nan")}, r"lower_bound_weight=nan must lie in \[0, 1\]"),
        ({"context": 1535}, r"context=1535 must be at least 1536: a share of 0\.03125 is less"),
        ({"decode_local": 16384}, "context=16384 must be at least 16512, decode_sink=128 and"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Measurement(**changes)
    assert MEASURED_SHARE == 1 / 32


def test_cuts_are_what_decode_does_by_default():
    served, measured = SparsityConfig(), Measurement()
    for name in (
        *("decode_sink", "decode_local", "logical_page_size", "reuse_interval"),
        "lower_bound_weight",
    ):
        assert getattr(measured, name) == getattr(served, name)
    assert served.resolved_selected_page_size == measured.logical_page_size
    assert served.forced_sink_pages == SINK_PAGES

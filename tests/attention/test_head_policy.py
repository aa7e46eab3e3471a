"""Which heads stream, are dense, and what the others may list: from files to budgets."""

import dataclasses
import itertools

import numpy as np
import pytest
from lserve_cases import that_wants
from numpy.testing import assert_allclose, assert_array_equal
from oracle_model import Oracle
from tiny_llm import random_prompts, tiny_config, tiny_params, write_pattern

from convert.head_shares import save_head_shares, shipped_for
from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.attention.attend import alike_layers
from lserve_jax.attention.budgets import HeadBudgets
from lserve_jax.attention.cache import make_spec
from lserve_jax.engine.head_policy import head_policy
from lserve_jax.model.head_shares import MISSED_AT, SHARES, HeadSensitivity, fit_shares

CONFIG = tiny_config(layers=3, kv_heads=4)
GATES = np.arange(12).reshape(3, 4) / 12


def random_sensitivity(seed: int, shape: tuple[int, int] = (3, 4)) -> HeadSensitivity:
    """Losses over three orders of magnitude; less is missed the more is listed."""
    rng = np.random.default_rng(seed)
    missed = -np.sort(-rng.random((len(MISSED_AT), *shape)), axis=0)
    selecting = 10 ** rng.uniform(-4, -1, shape)
    return HeadSensitivity(
        streaming=selecting * rng.uniform(0.5, 3, shape),
        selecting=selecting,
        missed=missed,
        name="random",
        context=4096,
    )


@pytest.fixture
def directory(tmp_path):
    """Gates, and the sensitivity of seed 0."""
    sensitivity = random_sensitivity(0)
    path = write_pattern(tmp_path / "pattern", GATES)
    save_head_shares(path, sensitivity, np.full((3, 4), 0.125), {})
    return path


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5])
def test_fit_is_nearly_the_best(seed: int, budget: float) -> None:
    """Against every combination of shares: greedy loses at most its last step to the bound."""
    sensitivity = random_sensitivity(seed, (1, 3))
    losses = sensitivity.losses()[:, 0]  # [shares, heads]
    shares = fit_shares(sensitivity, budget, np.zeros((1, 3), bool))[0]
    chosen = [SHARES.index(share) for share in shares]
    loss = losses[chosen, range(3)].sum()
    options = itertools.product(range(len(SHARES)), repeat=3)
    best = min(
        losses[list(option), range(3)].sum()
        for option in options
        if sum(SHARES[i] for i in option) <= 3 * budget + 1e-12
    )
    assert np.mean(shares) <= budget
    # What one more step of the head that gains most would save is the most that greedy can miss.
    most = max(losses[i, h] - losses[j, h] for h, i in enumerate(chosen) for j in range(i, 10))
    assert best <= loss <= best + most + 1e-12


def test_fit_counts_statistics_windows_and_dense_heads() -> None:
    sensitivity = random_sensitivity(7)
    streams = sensitivity.least_sensitive(1 / 4)
    dense = sensitivity.most_sensitive(2)
    shares = fit_shares(
        sensitivity, 0.3, streams, dense=dense, statistics=1 / 64, window=384 / 4096
    )
    assert_array_equal(shares[streams], 0)
    assert_array_equal(shares[dense], 1)
    ranked = (shares > 0) & (shares < 1)
    cost = shares.sum() + ranked.sum() / 64 + streams.sum() * 384 / 4096
    assert cost <= 0.3 * 12
    without = fit_shares(sensitivity, 0.3, streams, dense=dense)
    assert without.sum() > shares.sum()
    # Less than the least for all: nobody gets more.
    poor = fit_shares(sensitivity, 0.001, np.zeros((3, 4), bool))
    assert_array_equal(poor, SHARES[0])
    for budget in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="budget_share"):
            fit_shares(sensitivity, budget, streams)


def test_losses_go_with_what_is_missed() -> None:
    """At the two points that were measured they are what was measured; between, proportional."""
    missed = np.array([0.8, 0.7, 0.6, 0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.0])[:, None, None]
    sensitivity = HeadSensitivity(
        streaming=np.full((1, 1), 3.0),
        selecting=np.full((1, 1), 1.0),
        missed=missed,
        name="x",
        context=1024,
    )
    # 1/128: 1 + 2 * 0.3 / 0.4; 1/64: 1 + 2 * 0.2 / 0.4; 1/16 on: missed / 0.4; all: 0.
    wanted = [2.5, 2.0, 1.0, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0, 0.0]
    assert_allclose(sensitivity.losses()[:, 0, 0], wanted, rtol=1e-12)


def test_protected_heads_never_stream() -> None:
    sensitivity = random_sensitivity(3)
    assert sensitivity.least_sensitive(1.0).sum() == 8
    assert not (sensitivity.least_sensitive(1.0) & sensitivity.most_sensitive(4)).any()
    assert sensitivity.least_sensitive(0.25).sum() == 3
    worth = sensitivity.worth
    assert (
        worth[sensitivity.least_sensitive(0.25)].max() < worth[sensitivity.most_sensitive(9)].min()
    )


def test_policies(directory: str, tmp_path) -> None:
    sensitivity = random_sensitivity(0)

    def of(**settings) -> tuple:
        policy = head_policy(CONFIG, SparsityConfig(**settings))
        return policy, policy.partition, policy.budgets

    # A third streams by worth, the others have shares.
    policy, partition, budgets = of(pattern=directory)
    streams = sensitivity.least_sensitive(1 / 3)
    assert [list(heads) for heads in partition.streaming] == [
        np.flatnonzero(layer).tolist() for layer in streams
    ]
    assert budgets.token_budget is None and budgets.shares is not None
    assert "0.125 of the context" in policy.source
    # The same without gates.
    assert of(head_shares=directory)[1] == partition
    # LServe's own.
    policy, partition, budgets = of(pattern=directory, head_shares=None)
    assert partition.streaming == ((0, 1, 2, 3), (0, 1), ())
    assert budgets == HeadBudgets.even((0, 2, 4), 4096)
    assert policy.source == "4096 tokens a head, streaming by gates"
    # Dense heads beside even budgets.
    _, partition, budgets = of(pattern=directory, dense_heads=2, token_budget=512)
    dense = [np.flatnonzero(layer).tolist() for layer in sensitivity.most_sensitive(2)]
    assert [list(heads) for heads in partition.dense] == dense
    assert budgets.token_budget == 512
    # Dense heads among shares.
    _, partition, _ = of(pattern=directory, dense_heads=3, streaming_fraction=0.0)
    assert sum(partition.num_dense) >= 3 and sum(map(len, partition.streaming)) == 0
    # Nothing known of heads: the same for all.
    _, partition, budgets = of()
    assert budgets == HeadBudgets.even((4, 4, 4), 4096)
    _, partition, budgets = of(budget_share=0.25)
    assert budgets.shares == ((0.25 - 1 / 64,) * 4,) * 3
    assert head_policy(CONFIG, None).budgets == HeadBudgets.dense((4, 4, 4))
    # Shares without a sensitivity are taken as they are; 1 is a dense head.
    (tmp_path / "given").mkdir()
    np.savetxt(tmp_path / "given" / "head_shares.tsv", [[0.5, 1, 0.25, 1]] * 3, delimiter="\t")
    given = str(tmp_path / "given")
    _, partition, budgets = of(head_shares=given)
    assert partition.order == ((0, 2, 1, 3),) * 3
    assert budgets.shares == ((0.5, 0.25),) * 3
    for setting in ({"dense_heads": 1}, {"budget_share": 0.5}, {"streaming_fraction": 0.5}):
        (name,) = setting
        with pytest.raises(ValueError, match=rf"{name}=.*needs head_sensitivity\.tsv"):
            of(head_shares=given, **setting)


def test_what_does_not_fit(directory: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"head_shares=.* \(3, 4\).*the model has \(2, 4\)"):
        head_policy(tiny_config(layers=2, kv_heads=4), SparsityConfig(pattern=directory))
    with pytest.raises(ValueError, match=r"dense_heads=13 must lie in \[0, 12\]"):
        head_policy(CONFIG, SparsityConfig(pattern=directory, dense_heads=13))
    with pytest.raises(ValueError, match=r"budget_share=0\.001 cannot be met: .* take 0\.0"):
        head_policy(CONFIG, SparsityConfig(pattern=directory, budget_share=0.001))
    even = SparsityConfig(head_shares=None, budget_share=0.02)
    with pytest.raises(ValueError, match=r"budget_share=0\.02 cannot be met: .* take 0\.02344 of"):
        head_policy(CONFIG, even)
    gates = write_pattern(tmp_path / "gates", GATES)
    for pattern in (gates, None):
        with pytest.raises(ValueError, match=r"dense_heads=1 needs head shares: pattern=.*none"):
            head_policy(CONFIG, SparsityConfig(pattern=pattern, dense_heads=1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_retrieval": (2,), "num_dense": (3,)}, "3 dense and 0 windowed of 2"),
        ({"num_retrieval": (2,), "num_dense": (1,), "num_windowed": (2,)}, "2 windowed of 2"),
        ({"num_retrieval": (2,), "num_dense": (0, 0)}, "num_dense names 2 layers"),
        ({"num_retrieval": (2,), "num_dense": (0,)}, "neither share nor budget"),
        ({"num_retrieval": (2,), "num_dense": (0,), "shares": ((0.5,),)}, "shares are for"),
        (
            {"num_retrieval": (1,), "num_dense": (0,), "shares": ((0.5,),), "token_budget": 64},
            "two budgets",
        ),
    ],
)
def test_budgets_that_contradict_themselves(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HeadBudgets(**settings)


def test_memory_follows_the_heads() -> None:
    """Statistics for ranked heads only; lists as wide as the layer's largest share."""
    heads = HeadBudgets(
        num_retrieval=(3, 2, 4), num_dense=(1, 2, 0), shares=((0.25, 0.125), (), (0.0625,) * 4)
    )
    spec = make_spec(
        CONFIG,
        sparsity=SparsityConfig(),
        heads=heads,
        max_model_len=16384,
        max_num_seqs=2,
        num_pages=4,
        max_prefixes=0,
        kv_dtype="auto",
    )
    assert [spec.num_ranked(layer) for layer in range(3)] == [255, 0, 63]
    assert [spec.num_listed(layer) for layer in range(3)] == [1024, 1024, 65]
    assert spec.most_tokens(0, 1) == (257 * 16, 129 * 16, 16384, 7 * 64)


def test_dense_heads_alone_are_dense_attention(tmp_path) -> None:
    """All heads dense: the tokens of dense attention; and what a step reads says so."""
    config = tiny_config(layers=1, kv_heads=4)
    shares, sensitivity = np.full((1, 4), 0.125), random_sensitivity(0, (1, 4))
    directory = write_pattern(tmp_path / "one", GATES[:1])
    save_head_shares(directory, sensitivity, shares, {})
    prompt = {"prompt_token_ids": random_prompts(3, [700])[0]}
    params = SamplingParams(max_tokens=20, temperature=0.0)
    answers, reads = [], []
    for settings in (
        {"attention": "dense"},
        {
            "attention": "lserve",
            "sparsity": SparsityConfig(
                pattern=directory, dense_heads=4, token_budget=64, streaming_fraction=1.0
            ),
        },
    ):
        llm = LLM((config, tiny_params(config)), max_num_seqs=1, **settings)
        (output,) = llm.generate([prompt], params)
        answers.append(output.outputs[0].token_ids)
        metrics = output.metrics
        reads.append(metrics.kv_bytes_read_per_step / metrics.dense_kv_bytes_read_per_step)
    assert answers[0] == answers[1]
    assert reads == [1.0, 1.0]


def test_layers_that_attention_treats_alike() -> None:
    config = dataclasses.replace(tiny_config(layers=6, kv_heads=4), nope_layers=(5,))
    heads = HeadBudgets(
        num_retrieval=(2, 1, 2, 2, 2, 1),
        num_dense=(0, 0, 0, 1, 0, 0),
        shares=((0.1, 0.2), (0.1,), (0.1, 0.2), (0.1,), (0.2, 0.2), (0.1,)),
    )

    def alike(**settings) -> list[int]:
        sparsity = SparsityConfig(head_shares=None, streaming_fraction=0.0, **settings)
        sizes = {"max_model_len": 256, "max_num_seqs": 1, "num_pages": 9, "max_prefixes": 1}
        spec = make_spec(config, sparsity=sparsity, heads=heads, kv_dtype="auto", **sizes)
        return alike_layers(config, spec)

    # The last is not rotated.
    assert alike() == [0, 1, 0, 3, 4, 5]
    assert alike(select=lambda candidates: ...) == [0, 1, 2, 3, 4, 5]


def test_a_step_reads_its_budget() -> None:
    """At the calibration's context, statistics counted; what heads want exceeds it."""
    wanted = np.array([[0.375, 0.375, 0.25, 0.25]] * 3)
    nobody = np.zeros((3, 4), bool)
    fitted = fit_shares(that_wants(wanted), 0.25, nobody, statistics=1 / 64)
    assert 0.25 - 1 / 64 < (fitted + 1 / 64).mean() <= 0.25
    heads = HeadBudgets(
        num_retrieval=(4,) * 3, num_dense=(0,) * 3, shares=tuple(map(tuple, fitted.tolist()))
    )
    spec = make_spec(
        CONFIG,
        sparsity=SparsityConfig(),
        heads=heads,
        max_model_len=16384,
        max_num_seqs=1,
        num_pages=4,
        max_prefixes=0,
        kv_dtype="auto",
    )
    assert spec.tokens_listed(16384) == pytest.approx(16384 * fitted.mean())


def test_shipped_shares_are_found_by_the_models_name() -> None:
    wanted = "SmolLM2-135M-Instruct-32K"
    assert shipped_for("smollm2-135m-instruct-32k") == wanted
    assert shipped_for("HuggingFaceTB/SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"
    # Gates without shares; no such model; nothing like a name.
    for name in ("meta-llama/Llama-3.1-8B-Instruct", "gpt-2", "../x/y/z"):
        assert shipped_for(name) is None


def test_shipped_shares_fit_their_models() -> None:
    """Both models have 30 layers with 3 KV heads; some heads of each kind are left."""
    config = tiny_config(layers=30, kv_heads=3)
    for name in ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-32K"):
        policy = head_policy(config, SparsityConfig(pattern=name))
        assert sum(map(len, policy.partition.streaming)) == 30
        assert 1 <= sum(policy.partition.num_dense) <= 6
        assert sum(policy.budgets.num_ranked) >= 50


@pytest.mark.parametrize(
    ("max_len", "logical", "selected", "forced"),
    [(960, 16, 16, 1), (1088, 16, 64, 0), (1088, 32, 32, 5), (128, 16, 16, 1), (320, 32, 64, 2)],
)
def test_wanted_pages_at_every_length(
    max_len: int, logical: int, selected: int, forced: int
) -> None:
    """Against the oracle's count, up to the last position; what a list has room for is enough."""
    shares = (1 / 128, 1 / 32, 3 / 32, 3 / 16, 1 / 4, 3 / 8, 0.1, 0.97)
    config = tiny_config(layers=1, kv_heads=8)
    sparsity = SparsityConfig(
        logical_page_size=logical, selected_page_size=selected, forced_sink_pages=forced
    )
    heads = HeadBudgets(num_retrieval=(8,), num_dense=(0,), shares=(shares,))
    spec = make_spec(
        config,
        sparsity=sparsity,
        heads=heads,
        max_model_len=max_len,
        max_num_seqs=1,
        num_pages=1,
        max_prefixes=0,
        kv_dtype="auto",
    )
    tails = np.arange(max_len // selected)
    got = np.asarray(spec.wanted_pages(0, tails))
    assert got.max() <= spec.num_ranked(0)
    oracle = Oracle(config, {}, sparsity=sparsity, shares=[list(shares)])  # it only counts
    for tail in tails:
        oracle.tail = int(tail)
        wanted = [min(oracle._count(0, head), tail) for head in range(8)]
        assert_array_equal(np.minimum(got[tail], tail), wanted)
        assert bool(spec.prunes(tails[tail : tail + 1])[0]) == any(w < tail for w in wanted)


def test_shares_of_a_million_tokens() -> None:
    """A list is never longer than what can be selected, 65,536 tokens; below it shares count."""
    config, shares = tiny_config(layers=1, kv_heads=3), (1 / 32, 1 / 8, 3 / 8)
    heads = HeadBudgets(num_retrieval=(3,), num_dense=(0,), shares=(shares,))
    spec = make_spec(
        config,
        sparsity=SparsityConfig(),
        heads=heads,
        max_model_len=1 << 20,
        max_num_seqs=1,
        num_pages=1,
        max_prefixes=0,
        kv_dtype="auto",
    )
    assert spec.most_wanted(0) == (2047, 4096, 4096)
    tails = np.array([8191, 10_923, 32_767, 65_535])
    wanted = [[255, 1023, 3071], [340, 1365, 4096], [1023, 4095, 4096], [2047, 4096, 4096]]
    assert_array_equal(spec.wanted_pages(0, tails), wanted)
    # Two pages of the tail beside them; what a draft is thought to read has the same bound.
    assert spec.num_listed(0) == 4096 + 2
    assert spec.tokens_listed(1 << 20) == (32_768 + 2 * 65_536) / 3

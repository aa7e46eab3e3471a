"""Selection policies of one's own in the engine, against the model run without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from numpy.testing import assert_allclose
from tiny_llm import check_nothing_left, random_prompts, tiny_config, tiny_params

from lserve_jax import LLM, ModelConfig, SamplingParams, SparsityConfig
from lserve_jax.analysis import page_recall
from lserve_jax.attention.policy import Candidates
from lserve_jax.attention.selection import choose_pages
from lserve_jax.model.bound import bind
from lserve_jax.model.rope import rotary_angles
from pallas_kernels import api

CONFIG = tiny_config(layers=1, kv_heads=2, group=2, max_len=512)
# For a policy that does not treat all layers alike.
TWO_LAYERS = dataclasses.replace(CONFIG, num_hidden_layers=2)
SPARSITY = SparsityConfig(page_size=16, token_budget=96, reuse_interval=4, forced_sink_pages=0)
[PROMPT] = random_prompts(0, [230])
STEPS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)


def built_in(pages: Candidates):
    """What the engine does without a policy."""
    selected = api.select_pages(
        pages.scores, pages.candidates, pages.wanted, num_pages=pages.most, sink_pages=0
    )
    return jnp.minimum(pages.wanted, pages.candidates[:, None]), selected


def by_middle(pages: Candidates):
    """The pages whose middle key, between the bounds, is nearest to the group's mean query."""
    B, K, N = pages.scores.shape
    middle = pages.key_stats.astype(jnp.float32).mean(axis=(3, 4))  # [B, Kq, N, D]
    query = pages.query.reshape(B, K, -1, middle.shape[-1]).mean(axis=2)
    scores = jnp.einsum("bkd,bknd->bkn", query, middle)
    outside = jnp.arange(N)[None, None] >= pages.candidates[:, None, None]
    best = jax.lax.top_k(jnp.where(outside, -jnp.inf, scores), pages.most)[1]
    return jnp.minimum(pages.wanted, pages.candidates[:, None]), best


def at_random(pages: Candidates):
    """Three pages, others in every layer, head and selection."""
    B, K, N = pages.scores.shape
    key = jax.random.fold_in(jax.random.key(pages.layer), pages.length.sum())
    draws = jax.random.uniform(key, (B, K, N))
    outside = jnp.arange(N)[None, None] >= pages.candidates[:, None, None]
    best = jax.lax.top_k(jnp.where(outside, -1.0, draws), 3)[1]
    return jnp.full((B, K), 3), best


def first_and_last(pages: Candidates):
    """Page 0 and, of head 1, also the newest that may be chosen: an answer can be written down."""
    B, K, _ = pages.scores.shape
    counts = jnp.broadcast_to(jnp.arange(1, K + 1)[None], (B, K))
    last = jnp.broadcast_to(pages.candidates[:, None] - 1, (B, K))
    return counts, jnp.stack([jnp.zeros_like(last), last], axis=2)


def build(select=None, config: ModelConfig = CONFIG) -> LLM:
    return LLM(
        (config, tiny_params(config, seed=3)),
        attention="lserve",
        sparsity=dataclasses.replace(SPARSITY, select=select),
        max_num_seqs=2,
        prefill_chunk_size=256,
    )


def run(llm: LLM):
    [output] = llm.generate({"prompt_token_ids": PROMPT}, GREEDY)
    check_nothing_left(llm.engine)
    return output.outputs[0]


def test_the_built_in_policy_as_ones_own_changes_nothing() -> None:
    own, plain = run(build(built_in)), run(build())
    assert own.token_ids == plain.token_ids
    assert_allclose(own.token_logprobs, plain.token_logprobs, atol=1e-6)
    for field in ("attention_tokens", "attended_tokens", "tokens_attended"):
        if hasattr(own.metrics, field):
            assert getattr(own.metrics, field) == getattr(plain.metrics, field)


def test_what_is_chosen_is_what_is_attended() -> None:
    """Decode steps against attention with a mask that says the same, token by token."""
    answer = run(build(first_and_last))
    text = [*PROMPT, *answer.token_ids]
    n, U = len(PROMPT), SPARSITY.resolved_selected_page_size
    seen = np.tril(np.ones((2, len(text), len(text)), bool))
    for position in range(n, len(text)):
        selecting = n + (position - n) // 4 * 4
        tail = (selecting - 1) // U  # the first page that is attended in any case
        seen[0, position, U : tail * U] = False
        seen[1, position, U : (tail - 1) * U] = False
    positions = jnp.arange(len(text))[None]
    cos, sin = rotary_angles(CONFIG, positions, positions.max(axis=1) + 1)

    def attend(layer, q, k, v, cache):
        q, k = api.apply_rotary(q, cos, sin), api.apply_rotary(k, cos, sin)
        q = q.reshape(1, len(text), 2, 2, -1)
        scores = jnp.einsum("bqkgd,btkd->bkgqt", q, k) * CONFIG.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(jnp.asarray(seen)[None, :, None], scores, -jnp.inf))
        return jnp.einsum("bkgqt,btkd->bqkgd", weights, v).reshape(1, len(text), 4, -1), None

    @jax.jit
    def of_the_text(params):
        model = bind(CONFIG, params)
        hidden, _ = model(jnp.asarray([text]), attend, [None])
        return jax.nn.log_softmax(model.unembed(hidden[0]))

    params = tiny_params(CONFIG, seed=3)
    logprobs = np.asarray(of_the_text(params))
    expected = logprobs[np.arange(n - 1, len(text) - 1), answer.token_ids]
    assert_allclose(answer.token_logprobs, expected, atol=3e-5)
    dense = LLM((CONFIG, params)).score({"prompt_token_ids": PROMPT}, [answer.token_ids])
    assert np.abs(dense[0].logprobs - answer.token_logprobs).max() > 0.01


@pytest.mark.parametrize(("policy", "config"), [(by_middle, CONFIG), (at_random, TWO_LAYERS)])
def test_other_policies_run_and_are_scored_as_they_ran(policy, config: ModelConfig) -> None:
    llm = build(policy, config)
    answer = run(llm)
    assert answer.token_ids == run(llm).token_ids
    [new] = llm.score({"prompt_token_ids": PROMPT}, [answer.token_ids])
    assert_allclose(new.logprobs, answer.token_logprobs, atol=3e-5)
    recall = page_recall(llm, {"prompt_token_ids": PROMPT}, num_queries=8)
    plain = page_recall(build(config=config), {"prompt_token_ids": PROMPT}, num_queries=8)
    assert 0 < recall.mean.mean() < 1
    assert not np.allclose(recall.recall, plain.recall)


def chosen(select, tail: int = 5):
    llm = build(select)
    spec = llm.spec
    arrays = (
        np.ones((1, 4, 16), np.float32),
        np.zeros((1, 2, 32), np.float32),
        np.ones((2, 40, 1, 2, 16), np.float32),
        np.arange(32, dtype=np.int32)[None],
        np.array([tail * 16 + 1], np.int32),
        np.array([tail], np.int32),
    )
    # One program, in place of one for every operation.
    return jax.jit(lambda: choose_pages(spec, 0, select, *map(jnp.asarray, arrays)))


def test_pages_out_of_range_are_clamped_or_reported() -> None:
    def wild(pages: Candidates):
        return jnp.array([[9, 2]]), jnp.array([[[-3, 7, 1], [0, 4, 99]]])

    counts, pages = chosen(wild)()
    assert counts.tolist() == [[3, 2]]
    assert pages.tolist() == [[[0, 4, 1], [0, 4, 4]]]

    def reported(select) -> str | None:
        with api.value_checks():
            error, _ = checkify.checkify(chosen(select))()
        return error.get()

    message = reported(wild)
    assert (
        message is not None and "counts of selected pages must lie in [0, 3], got 2 to 9" in message
    )
    outside = lambda pages: (jnp.array([[1, 2]]), jnp.array([[[0, 7], [0, 5]]]))  # noqa: E731
    message = reported(outside)
    assert message is not None and "must lie before page 5 of its sequence, got page 5" in message
    within = lambda pages: (jnp.array([[1, 1]]), jnp.array([[[0, 7], [4, 5]]]))  # noqa: E731
    assert reported(within) is None


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ((jnp.ones((1, 2)), jnp.zeros((1, 2, 3), jnp.int32)), "must return integers"),
        ((jnp.ones((2,), jnp.int32), jnp.zeros((1, 2, 3), jnp.int32)), "must return integers"),
        ((jnp.ones((1, 2), jnp.int32), jnp.zeros((1, 2, 6), jnp.int32)), "it may get 5"),
    ],
)
def test_results_of_other_shapes_are_refused(result, message) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(lambda pages: result)()


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="select='best' must be a function or None"):
        SparsityConfig(select="best")  # pyrefly: ignore

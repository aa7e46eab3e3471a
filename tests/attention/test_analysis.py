"""Page recall against its definition, written out in NumPy on the model's own queries and keys."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose
from oracle_model import log_softmax
from tiny_checkpoints import save_character_tokenizer
from tiny_llm import fresh_params

from lserve_jax import LLM, ModelConfig, SparsityConfig
from lserve_jax.analysis import main, page_recall, plot_page_recall, prefill_recall
from lserve_jax.model.bound import bind
from lserve_jax.model.rope import rotary_angles
from pallas_kernels.api import apply_rotary

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    max_position_embeddings=512,
    nope_layers=(1,),
)
SPARSITY = SparsityConfig(
    page_size=16, token_budget=96, reuse_interval=4, decode_sink=16, decode_local=32
)
TOKENS = np.random.default_rng(0).integers(0, 96, 300).tolist()


@pytest.fixture(scope="module")
def params():
    # Larger weights than a fresh model's: attention must not be flat, or every page is the same.
    return jax.tree.map(lambda x: x * 2 if x.ndim == 2 else x, fresh_params(CONFIG))


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    """By halves: one streaming head in layer 0, three in layer 1, none in layer 2."""
    directory = tmp_path_factory.mktemp("pattern")
    (directory / "full_attention_heads.tsv").write_text("1\t0.1\t1\n0.2\t0.3\t0.1\n1\t1\t1\n")
    (directory / "config.json").write_text('{"sink_size": 16, "recent_size": 32}')
    return str(directory)


def queries_and_keys(params, tokens=TOKENS):
    """Rotated q ``[L, T, H, D]`` and k ``[L, T, Hk, D]`` of dense attention, checkpoint order."""
    return [[np.asarray(x, np.float64) for x in layer] for layer in _seen(params, tuple(tokens))]


@functools.partial(jax.jit, static_argnums=1)  # one program, in place of one for every operation
def _seen(params, tokens):
    seen = []
    positions = jnp.arange(len(tokens))[None]
    cos, sin = rotary_angles(CONFIG, positions, jnp.array([len(tokens)]))

    def attend(layer, q, k, v, cache):
        if layer != 1:  # which has no rotary embedding
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        seen.append((q[0], k[0]))
        scores = jnp.einsum("bqkgd,btkd->bkgqt", q.reshape(*q.shape[:2], 3, 2, 16), k) / 4
        visible = np.tril(np.ones((1, 1, 1, len(tokens), len(tokens)), bool))
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        return jnp.einsum("bkgqt,btkd->bqkgd", weights, v).reshape(q.shape), None

    bind(CONFIG, params)(jnp.asarray(tokens)[None], attend, [None] * 3)
    return seen


def covered_positions(q, k, is_retrieval, query, selecting):
    """Positions that one KV head reads for ``query`` when its pages were chosen at ``selecting``.

    q ``[T, G, D]`` and k ``[T, D]`` of that head.
    """
    if not is_retrieval:
        return [t for t in range(query + 1) if t < 16 or t > query - 32]
    tail = (selecting - 1) // 16
    scores = []
    for page in range(tail):
        keys = k[page * 16 : page * 16 + 16]
        high, low = keys.max(axis=0), keys.min(axis=0)
        upper = [np.maximum(g * high, g * low).sum() for g in q[selecting]]
        lower = [np.minimum(g * high, g * low).sum() for g in q[selecting]]
        scores.append(max(u + l / 2 for u, l in zip(upper, lower, strict=True)))
    ranked = sorted(range(tail), key=lambda page: (page != 0, -scores[page], page))
    pages = {*ranked[: 96 // 16 - 1], *range(tail, query // 16 + 1)}
    return [t for t in range(query + 1) if t // 16 in pages]


@pytest.mark.parametrize(
    ("streaming_fraction", "layer_1"), [(0.33, [False, True, False]), (0.45, [False] * 3)]
)
def test_recall_is_its_definition(params, pattern, streaming_fraction, layer_1):
    sparsity = dataclasses.replace(SPARSITY, pattern=pattern, streaming_fraction=streaming_fraction)
    llm = LLM((CONFIG, params), attention="lserve", sparsity=sparsity)
    recall = page_recall(llm, {"prompt_token_ids": TOKENS}, num_queries=6)
    assert recall.is_retrieval.tolist() == [[True, False, True], layer_1, [True] * 3]
    expected = np.zeros((3, 6, 6))
    for layer, (q, k) in enumerate(queries_and_keys(params)):
        for head in range(6):
            group = q[:, head // 2 * 2 : head // 2 * 2 + 2]
            for i, query in enumerate(range(294, 300)):
                logits = k[: query + 1, head // 2] @ q[query, head] / 4
                mass = np.exp(logits - logits.max())
                read = covered_positions(
                    group,
                    k[:, head // 2],
                    recall.is_retrieval[layer, head // 2],
                    query,
                    294 + i // 4 * 4,
                )
                expected[layer, head, i] = mass[read].sum() / mass.sum()
    assert expected.min() < 0.9  # else the test could not see a wrong page
    np.testing.assert_allclose(recall.recall, expected, atol=1e-5)  # float32 softmax of 300 keys
    assert recall.positions.tolist() == list(range(294, 300))


def test_a_budget_for_everything_loses_nothing(params):
    sparsity = SparsityConfig(page_size=16, token_budget=512)
    llm = LLM((CONFIG, params), attention="lserve", sparsity=sparsity)
    recall = page_recall(llm, {"prompt_token_ids": TOKENS}, num_queries=5)
    np.testing.assert_allclose(recall.recall, 1.0, atol=1e-6)


@pytest.fixture(scope="module")
def recall(params, pattern):
    """Of the last six tokens; the same programs as in ``test_recall_is_its_definition``."""
    sparsity = dataclasses.replace(SPARSITY, pattern=pattern, streaming_fraction=0.45)
    llm = LLM((CONFIG, params), attention="lserve", sparsity=sparsity)
    return page_recall(llm, {"prompt_token_ids": TOKENS}, num_queries=6)


def test_plot_is_a_picture(recall, tmp_path):
    figure = plot_page_recall(recall, tmp_path / "recall.png")
    assert len(figure.axes) == 3  # heads, their colours, layers
    assert plot_page_recall(recall).axes[0].get_title() == "page recall"
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_recall_as_a_table(recall):
    table = recall.table()
    assert {len(column) for column in table.values()} == {3 * 6 * 6}
    for layer, head, position in ((0, 5, 295), (1, 2, 299), (2, 0, 297)):
        row = (table["layer"] == layer) & (table["head"] == head) & (table["position"] == position)
        assert table["recall"][row].tolist() == [recall.recall[layer, head, position - 294]]
        assert table["kv_head"][row].tolist() == [head // 2]
        assert table["is_retrieval"][row].tolist() == [recall.is_retrieval[layer, head // 2]]


@pytest.mark.parametrize(
    ("prompt", "num_queries", "message"),
    [
        (TOKENS, 300, "num_queries=300 must be positive and below the prompt's 300 tokens"),
        (TOKENS * 2, 8, "the prompt's 600 tokens exceed llm.max_model_len=512"),
    ],
)
def test_bad_prompts_are_refused(params, prompt, num_queries, message):
    llm = LLM((CONFIG, params), attention="lserve", sparsity=SPARSITY)
    with pytest.raises(ValueError, match=message):
        page_recall(llm, {"prompt_token_ids": prompt}, num_queries=num_queries)


@pytest.mark.parametrize("num_queries", [None, "5", 1.5, True, np.array([1, 2])])
def test_a_number_of_queries_is_an_integer(params, num_queries):
    llm = LLM((CONFIG, params), attention="lserve", sparsity=SPARSITY)
    with pytest.raises(ValueError, match="num_queries must be an integer, got"):
        page_recall(llm, {"prompt_token_ids": TOKENS}, num_queries=num_queries)


def test_dense_has_no_recall(params):
    with pytest.raises(ValueError, match="attention='lserve', got 'dense'"):
        page_recall(LLM((CONFIG, params)), {"prompt_token_ids": TOKENS})


def test_command_line_names_a_missing_file(capsys):
    assert main(["--prompt-file", "nowhere.txt"]) == 2
    assert "nowhere.txt" in capsys.readouterr().err


def test_command_line_prints_both_tables(conformance, tmp_path, capsys):
    """The last row of either is over all layers, which have as many heads each."""
    directory, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(conformance / "llama-tied", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    save_character_tokenizer(directory, [chr(32 + i) for i in range(160)])
    text.write_text("".join(map(chr, np.random.default_rng(2).integers(40, 120, 900))))
    words = ["--model", str(directory), "--prompt-file", str(text), "--max-tokens", "880"]
    words += ["--num-queries", "8", "--prefill", "block_sparse", "--prefill-threshold", "0.1"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for head in ("layer   mean    min", "layer   mass    min  density    max"):
        table = [line.split() for line in lines[lines.index(head) + 1 :]]
        end = [row[0] for row in table].index("all")
        rows = np.array([row[1:] for row in table[: end + 1]], float)
        # Printed to three digits.
        assert_allclose(rows[-1, 0], rows[:-1, 0].mean(), atol=1e-3, rtol=0)
        assert rows[-1, 1] == rows[:-1, 1].min()
    assert rows[-1, 2] < 0.95 and rows[-1, 3] == rows[:-1, 3].max()


def test_prefill_recall_is_the_mass_of_the_blocks(params, pattern):
    tokens = np.random.default_rng(1).integers(0, 96, 880).tolist()
    config = dataclasses.replace(CONFIG, max_position_embeddings=1024)
    sparsity = dataclasses.replace(
        SPARSITY,
        pattern=pattern,
        streaming_fraction=0.5,
        prefill="block_sparse",
        prefill_threshold=0.3,
    )
    llm = LLM((config, params), attention="lserve", sparsity=sparsity)
    recall = prefill_recall(llm, {"prompt_token_ids": tokens})
    streams = [[False, True, False], [True, True, True], [False, False, False]]
    assert np.isnan(recall.density).tolist() == streams
    listed = []
    for layer, (q, k) in enumerate(queries_and_keys(params, tokens)):
        for head in range(3):
            own = q[:, 2 * head : 2 * head + 2]
            if streams[layer][head]:
                assert np.isnan(recall.mass[layer, 2 * head : 2 * head + 2]).all()
                continue
            shares = oracle.block_shares(own, k[:, head : head + 1], 0)
            lists = oracle.fewest_blocks(shares, 0, 0.3)
            lists[0][5:] = [list(range(6)), list(range(7))]  # they hold the last 128 tokens
            listed += [len(tile) for tile in lists[0][:5]]
            density = sum(map(len, lists[0])) / sum(range(1, 8))
            assert recall.density[layer, head] == pytest.approx(density)
            mask = oracle.block_mask(0, 880, lists)[0]
            for i in range(2):
                scores = np.where(np.tri(880, dtype=bool), own[:, i] @ k[:, head].T / 4, -np.inf)
                mass = np.where(mask, np.exp(log_softmax(scores)), 0.0).sum(axis=1).mean()
                # float32 over three layers.
                assert recall.mass[layer, 2 * head + i] == pytest.approx(mass, abs=1e-4)
    assert {3, 4} & set(listed[-2:]) and recall.mass[2].min() < 0.97  # that something is left out
    with pytest.raises(ValueError, match=r"the prompt's 0 tokens must lie in \[1, "):
        prefill_recall(llm, {"prompt_token_ids": []})
    dense = LLM((CONFIG, params))
    with pytest.raises(ValueError, match="prefill recall needs an LLM with prefill='block_sparse'"):
        prefill_recall(dense, {"prompt_token_ids": tokens})

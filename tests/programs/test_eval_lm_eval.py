"""The harness's adapter on a small local task, against the same quantities computed directly."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from oracle_model import log_softmax
from tiny_llm import VOCAB, tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams, logits
from lserve_jax.tokenizer import Tokenizer

# Packages below the harness warn about themselves when they are imported.
pytestmark = pytest.mark.filterwarnings("default")

CONFIG = tiny_config(layers=1, kv_heads=2, max_len=256, eos_token_ids=(VOCAB - 1,))
# float32 roundings of log probabilities, summed over tens of tokens.
CLOSE = {"abs": 1e-3}

DOCUMENTS = [
    {"context": "The capital of France", "choices": [" is Paris", " is Rome", " eats"], "gold": 0},
    {"context": "2 plus 2 makes", "choices": [" 4", " 5", " a big fish"], "gold": 2},
    {"context": "Once upon a time", "choices": [" there", " under", "!"], "gold": 1},
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    """A random model of single printable characters (95, and the end of a text)."""
    characters = {chr(32 + i): i for i in range(95)} | {"\n": 95}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=characters, merges=[]))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = Tokenizer(
        backend=backend,
        markers={},
        eos_token_ids=(VOCAB - 1,),
        chat_template="{% for m in messages %}<{{ m.content }}>{% endfor %}",
    )
    return LLM(
        (CONFIG, tiny_params(CONFIG, seed=1)),
        tokenizer=tokenizer,
        max_num_seqs=4,
        max_model_len=64,
        burst_steps=8,
    )


@pytest.fixture(scope="module")
def model(llm):
    from lserve_jax.eval.lm_eval import LServeLM

    return LServeLM(llm, max_gen_toks=6)


def log_probabilities(llm: LLM, ids: list[int]) -> np.ndarray:
    """[len(ids) - 1, V] float64: after every token but the last."""
    config, params = llm.engine.config, llm.engine.runner.params
    padded = np.zeros((1, config.max_position_embeddings), np.int32)  # one shape for all
    padded[0, : len(ids)] = ids
    out = jax.jit(logits, static_argnums=0)(config, params, padded)
    return log_softmax(np.asarray(out[0, : len(ids) - 1], np.float64))


def direct(llm: LLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    rows = log_probabilities(llm, context + continuation)[-len(continuation) :]
    greedy = rows.argmax(axis=-1).tolist() == continuation
    return float(rows[np.arange(len(continuation)), continuation].sum()), greedy


def write_task(directory: Path, kind: str, **settings: object) -> None:
    (directory / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)) + "\n")
    task = {
        "task": f"tiny_{kind}",
        "output_type": kind,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(directory / "documents.jsonl")},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{context}}",
        **settings,
    }
    (directory / f"{kind}.yaml").write_text(json.dumps(task))  # YAML is a superset of JSON


def evaluate(model, directory: Path, kind: str, **arguments: object) -> tuple[dict, list[dict]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    task = f"tiny_{kind}"
    found = lm_eval.simple_evaluate(
        model,
        tasks=[task],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        bootstrap_iters=0,
        **arguments,
    )
    return found["results"][task], found["samples"][task]


@pytest.mark.slow
def test_multiple_choice(llm, model, tmp_path):
    write_task(
        tmp_path,
        "multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="gold",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    results, samples = evaluate(model, tmp_path, "multiple_choice")
    right = 0
    for sample in samples:
        document = sample["doc"]
        encode = llm.tokenizer.encode
        pairs = [(encode(document["context"]), encode(choice)) for choice in document["choices"]]
        expected = [direct(llm, *pair) for pair in pairs]
        for (logprob, greedy), (response,) in zip(expected, sample["resps"], strict=True):
            assert float(response[0]) == pytest.approx(logprob, **CLOSE)
            assert str(response[1]) == str(greedy)
        right += max(range(3), key=lambda i: expected[i][0]) == document["gold"]
    assert results["acc,none"] == pytest.approx(right / 3)


def test_generation_through_the_chat_template(llm, model, tmp_path):
    write_task(
        tmp_path,
        "generate_until",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["zq"], "max_gen_toks": 9},
        metric_list=[{"metric": "exact_match"}],
    )
    _, samples = evaluate(model, tmp_path, "generate_until", apply_chat_template=True)
    for sample in samples:
        ((context, _),) = sample["arguments"]
        assert context == f"<{sample['doc']['context']}>"
        params = SamplingParams(temperature=0, max_tokens=9, stop="zq")
        ((answer,),) = sample["resps"]
        assert answer == llm.generate(context, params)[0].outputs[0].text


def test_a_task_that_begins_the_answer_has_it_continued(llm, model, tmp_path):
    write_task(
        tmp_path,
        "generate_until",
        doc_to_target="{{choices[0]}}",
        gen_prefix="The answer is",
        generation_kwargs={"until": ["zq"], "max_gen_toks": 9},
        metric_list=[{"metric": "exact_match"}],
    )
    _, samples = evaluate(model, tmp_path, "generate_until", apply_chat_template=True)
    for sample in samples:
        ((context, _),) = sample["arguments"]
        assert context == f"<{sample['doc']['context']}><The answer is"


def instances(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, x, i) for i, x in enumerate(arguments)]


def test_rolling_likelihood_of_texts_longer_than_the_model(llm, model):
    texts = ["Short.", "A text of more than sixty-four characters: " + "it goes on and on. " * 5]
    found = model.loglikelihood_rolling(
        instances("loglikelihood_rolling", *((t,) for t in texts)), disable_tqdm=True
    )
    end, encode = VOCAB - 1, llm.tokenizer.encode
    assert found[0] == pytest.approx(direct(llm, [end], encode(texts[0]))[0], **CLOSE)
    # 64 tokens of room: a first window of the end token and 63, then windows that predict 63 more
    # with one token of context, the last one with as many as fit.
    ids, total = encode(texts[1]), 0.0
    assert 126 < len(ids) < 189
    total += direct(llm, [end], ids[:63])[0]
    total += direct(llm, ids[62:63], ids[63:126])[0]
    rest = ids[126:]
    total += direct(llm, ids[126 - (64 - len(rest)) : 126], rest)[0]
    assert found[1] == pytest.approx(total, **CLOSE)


def test_contexts_that_are_too_long_lose_their_beginning(llm, model):
    context, continuation = "x" * 30 + "y" * 40, " end"
    ((found, _),) = model.loglikelihood(
        instances("loglikelihood", (context, continuation)), disable_tqdm=True
    )
    encode = llm.tokenizer.encode
    assert found == pytest.approx(
        direct(llm, encode(context)[-60:], encode(continuation))[0], **CLOSE
    )
    (text,) = model.generate_until(
        instances("generate_until", ("y" * 90, {"max_gen_toks": 4})), disable_tqdm=True
    )
    params = SamplingParams(temperature=0, max_tokens=4)
    assert text == llm.generate("y" * 60, params)[0].outputs[0].text


def test_an_empty_context_begins_with_the_end_of_text(llm, model):
    ((found, _),) = model.loglikelihood(instances("loglikelihood", ("", "ab")), disable_tqdm=True)
    expected, _ = direct(llm, [VOCAB - 1], llm.tokenizer.encode("ab"))
    assert math.isfinite(found) and found == pytest.approx(expected, **CLOSE)


def test_sampling_arguments_are_taken_or_refused(model):
    params = model._sampling_params({"do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 6)
    assert model._sampling_params({"until": ["a", ""]}).stop == ("a",)
    assert model._sampling_params({"do_sample": False, "temperature": 0.7}).is_greedy
    with pytest.raises(ValueError, match="num_beams"):
        model._sampling_params({"num_beams": 4})


def test_registered_under_its_name(conformance):
    from lm_eval.api.registry import get_model

    from lserve_jax.eval.lm_eval import LServeLM

    assert get_model("lserve_jax") is LServeLM
    for arguments, message in (
        ("attention=dense", "must have model="),
        ("model=x,attention=lserve,bugdet=1", "unknown key 'bugdet'"),
        (f"model={conformance / 'llama-tied'},attention=lserve,budget=256", "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            LServeLM.create_from_arg_string(arguments, {"batch_size": 1})


def test_the_registered_model_reads_no_prefix_together(llm, conformance, tmp_path):
    from lserve_jax.eval.lm_eval import LServeLM

    shutil.copytree(conformance / "llama-tied", tmp_path / "model")
    llm.tokenizer.save(tmp_path / "model")
    arguments = f"model={tmp_path / 'model'},attention=lserve,budget=256"
    model = LServeLM.create_from_arg_string(arguments, {"batch_size": 1})
    assert model.llm.engine.relay == "never"


def test_models_that_the_harness_cannot_use_are_refused(llm):
    from lserve_jax.eval.lm_eval import LServeLM

    config = tiny_config(layers=1, kv_heads=1)
    model = config, tiny_params(config)
    with pytest.raises(ValueError, match="no tokenizer"):
        LServeLM(LLM(model))
    endless = dataclasses.replace(llm.tokenizer, eos_token_ids=())
    with pytest.raises(ValueError, match="end-of-text token"):
        LServeLM(LLM(model, tokenizer=endless))

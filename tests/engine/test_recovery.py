"""What goes wrong in the middle leaves an engine that works, and what cannot work is refused."""

import jax
import pytest
from tiny_llm import check_nothing_left, tiny_config, tiny_params

import lserve_jax.engine.runner
from lserve_jax import LLM, SamplingParams, SparsityConfig

CONFIG = tiny_config(layers=1, kv_heads=2)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [4, 5]}]


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM((CONFIG, tiny_params(CONFIG)), max_model_len=64, max_num_seqs=2)


def test_a_failed_device_call_is_survived(llm, monkeypatch):
    """What the call was to update in place is gone; the next call must not touch it."""
    before = tokens(llm)
    burst = lserve_jax.engine.runner.decode_burst

    def fail(*args, **kwargs):
        burst(*args, **kwargs)  # consumes the donated caches and state
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lserve_jax.engine.runner, "decode_burst", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tokens(llm)
    monkeypatch.undo()
    check_nothing_left(llm.engine)
    assert tokens(llm) == before


def test_out_of_memory_says_how_much_and_which_options_to_lower(llm, monkeypatch):
    lower = "lower max_model_len, max_num_seqs or kv_cache_bytes"
    large = tiny_config(layers=2, kv_heads=2, max_len=2**30)
    options = {"max_model_len": 2**30, "max_num_seqs": 1000, "kv_cache_bytes": 10**15}
    wanted = "out of memory: Out of memory allocating [0-9]+ bytes"
    with pytest.raises(MemoryError, match=f"^{wanted}; {lower}$"):
        LLM((large, tiny_params(large)), **options)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(lserve_jax.engine.runner, "decode_burst", fail)
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nIt")
    with pytest.raises(MemoryError, match=f"^{wanted}; {lower}$"):
        tokens(llm)
    error = jax.errors.JaxRuntimeError("INTERNAL: no")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: no"):
        tokens(llm)
    monkeypatch.undo()
    check_nothing_left(llm.engine)


def test_a_prompt_that_fails_while_a_prefix_waits_for_it_is_gone(monkeypatch):
    """A prefix finishes prompts in prefill first; one of three chunks fails as it is inserted."""
    llm = LLM((CONFIG, tiny_params(CONFIG)), max_model_len=256, prefill_chunk_size=64)
    before, engine = tokens(llm), llm.engine
    llm.text_engine.submit({"prompt_token_ids": [3] * 160}, GREEDY)
    engine.step()
    assert engine.scheduler.prefilling

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(lserve_jax.engine.runner, "insert", fail)
    with pytest.raises(RuntimeError, match="no"):
        engine.add_prefix([7] * 80)
    monkeypatch.undo()
    check_nothing_left(engine)
    with pytest.raises(ValueError, match="the engine was reset while requests"):
        llm.text_engine.step()  # else who waits for it would wait for ever
    assert tokens(llm) == before


def test_a_call_inside_a_call_is_refused(llm):
    def nested(request: int, completion: int, text: str) -> None:
        tokens(llm)

    llm.engine.add_request("mine", [1, 2], GREEDY, seed=0)
    with pytest.raises(ValueError, match="still busy with another call's requests"):
        llm.generate(PROMPTS, GREEDY, on_text=nested)
    llm.engine.cancel("mine")
    assert [new.finish_reason for new in llm.engine.stream()] == ["cancelled"]
    check_nothing_left(llm.engine)


def test_more_forced_pages_than_a_sequence_has():
    """Every page is forced then, which is dense attention."""
    model = (CONFIG, tiny_params(CONFIG))
    sparsity = SparsityConfig(page_size=64, forced_sink_pages=4, token_budget=512)
    sparse = LLM(model, max_model_len=100, attention="lserve", sparsity=sparsity)
    assert tokens(sparse) == tokens(LLM(model, max_model_len=100))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 2**31}, "top_k must be at most 2147483647"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids must be at most 2147483647"),
        ({"temperature": 1e39}, r"temperature=1e\+39 must be a finite number"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty=1e-46 is too close to 0"),
    ],
)
def test_values_that_devices_cannot_hold(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_stop_ids_lie_in_the_vocabulary(llm):
    params = SamplingParams(temperature=0, stop_token_ids=[CONFIG.vocab_size])
    with pytest.raises(ValueError, match=r"stop token id .* is outside the vocabulary"):
        llm.generate(PROMPTS, params)

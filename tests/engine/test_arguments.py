"""What cannot be meant is refused by an error that names the argument, its value and the rule."""

import dataclasses
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llm import VOCAB, check_nothing_left, random_prompts, tiny_config, tiny_params

import convert
from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.engine.options import EngineOptions
from lserve_jax.text_engine import TextEngine
from lserve_jax.tokenizer import Tokenizer

CONFIG = tiny_config(layers=1, kv_heads=1)
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
MODEL = (CONFIG, tiny_params(CONFIG))
IDS = {"prompt_token_ids": [1, 2, 3]}
SPAN = np.timedelta64(2, "s")  # an integer to NumPy, a number to nobody


@pytest.fixture(scope="module")
def chatting(tokenizer: Tokenizer) -> LLM:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return LLM(MODEL, tokenizer=dataclasses.replace(tokenizer, chat_template=template))


def build() -> LLM:
    return LLM(MODEL, max_model_len=256, max_num_seqs=2, burst_steps=4)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"seed": None}, "seed must be an integer of at least 0, got None"),
        ({"max_model_len": 1.5}, "max_model_len must be an integer, got 1.5"),
        ({"max_model_len": 128.0}, "max_model_len must be an integer, got 128.0"),
        ({"max_model_len": "128"}, "max_model_len must be an integer, got '128'"),
        ({"max_num_seqs": 2.0}, "max_num_seqs must be an integer, got 2.0"),
        ({"max_num_seqs": "2"}, "max_num_seqs must be an integer, got '2'"),
        ({"max_num_seqs": True}, "max_num_seqs must be an integer, got True"),
        ({"max_num_seqs": None}, "max_num_seqs must be an integer, got None"),
        ({"max_prefixes": 1.0}, "max_prefixes must be an integer, got 1.0"),
        ({"host_cache_bytes": -1}, "host_cache_bytes must be an integer of at least 0, got -1"),
        ({"host_cache_bytes": 9}, "host_cache_bytes=9 holds no page: one takes [0-9]+ bytes"),
        (
            {"host_cache_bytes": 1 << 20, "enable_prefix_caching": False},
            "host_cache_bytes=1048576 needs enable_prefix_caching=True",
        ),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching=1 must be True or False"),
        ({"prefill_chunk_size": 128.0}, "prefill_chunk_size must be an integer, got 128.0"),
        ({"burst_steps": [4]}, r"burst_steps must be an integer, got \[4\]"),
        ({"kv_cache_bytes": 1e9}, "kv_cache_bytes must be an integer, got 1000000000.0"),
        ({"memory_fraction": "0.5"}, r"memory_fraction='0.5' must lie in \(0, 1\]"),
        ({"memory_fraction": math.nan}, "memory_fraction=nan must lie in"),
        ({"deterministic": "no"}, "deterministic='no' must be True or False"),
        ({"sparsity": {"page_size": 64}}, "sparsity=.* must be a SparsityConfig or None"),
        ({"dtype": ["float32"]}, "dtype .* is unknown; known"),
        ({"dtype": np.float32}, "dtype .* is unknown; known"),
        ({"tokenizer": "smollm2"}, "tokenizer must be what convert.load_tokenizer returns"),
        ({"adapter": 5}, "adapter=5 must be the directory of an adapter"),
        ({"adapter": ""}, "adapter='' must not be empty"),
        ({"max_model_len": True}, "max_model_len must be an integer, got True"),
        ({"max_num_seqs": SPAN}, "max_num_seqs must be an integer, got np.timedelta64"),
        ({"memory_fraction": SPAN}, "memory_fraction=np.timedelta64.* must lie in"),
        ({"burst_steps": 1025}, "burst_steps must be at most 1024, got 1025"),
        ({"attention": np.array(["dense", "a"])}, "attention=array.* must be 'dense' or 'lserve'"),
        (
            {"kv_dtype": np.array(["int8", "a"])},
            "kv_dtype=array.* must be 'auto', 'int8', 'fp8' or",
        ),
        ({"relay": np.array(["auto", "a"])}, "relay=array.* must be 'auto', 'always' or 'never'"),
        ({"backend": np.array(["auto", "a"])}, "backend=array.* is unknown; known"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        LLM(MODEL, **options)


@pytest.mark.parametrize("model", [None, 5, [CONFIG, {}], (CONFIG,), ({}, {})])
def test_models(model: Any) -> None:
    with pytest.raises(TypeError, match=r"must be (an alias, a path or a|the) pair"):
        LLM(model)


def test_an_empty_name_is_no_model() -> None:
    with pytest.raises(ValueError, match="model='' must not be empty"):
        LLM("")


def test_integers_of_numpy_become_those_of_python() -> None:
    options = {"max_model_len": 64, "max_num_seqs": 4, "burst_steps": 2, "kv_cache_bytes": 1 << 20}
    for kind in (np.int64, np.uint8, np.array, jnp.asarray):
        built = EngineOptions(
            **{n: kind(v) for n, v in options.items() if kind is not np.uint8 or v < 256}
        )
        assert built.max_model_len == 64
        assert {type(v) for n, v in vars(built).items() if n in options} <= {int, type(None)}
    sparsity = SparsityConfig(page_size=np.int64(32), selected_page_size=np.int32(16))
    assert sparsity == SparsityConfig(page_size=32, selected_page_size=16)
    assert {type(sparsity.page_size), type(sparsity.selected_page_size)} == {int}
    sampling = SamplingParams(max_tokens=np.int64(3), seed=np.uint8(5), stop_token_ids=np.arange(2))
    assert sampling == SamplingParams(max_tokens=3, seed=5, stop_token_ids=[0, 1])
    numbers = (sampling.max_tokens, sampling.seed, *sampling.stop_token_ids)
    assert {type(number) for number in numbers} == {int}
    llm = LLM(MODEL, max_model_len=np.int64(64), max_num_seqs=np.int64(1), burst_steps=np.int64(4))
    [output] = llm.generate(IDS, SamplingParams(temperature=0, max_tokens=np.int64(3)))
    assert len(output.outputs[0].token_ids) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 64.0}, "page_size must be an integer, got 64.0"),
        ({"logical_page_size": "16"}, "logical_page_size must be an integer, got '16'"),
        ({"selected_page_size": 16.0}, "selected_page_size must be an integer, got 16.0"),
        ({"token_budget": 4096.0}, "token_budget must be an integer, got 4096.0"),
        ({"dense_heads": None}, "dense_heads must be an integer, got None"),
        ({"reuse_interval": 1.5}, "reuse_interval must be an integer, got 1.5"),
        ({"decode_local": 256.0}, "decode_local must be an integer, got 256.0"),
        ({"forced_sink_pages": True}, "forced_sink_pages must be an integer, got True"),
        ({"lower_bound_weight": "0.5"}, "lower_bound_weight='0.5' must lie in"),
        ({"streaming_fraction": "half"}, "streaming_fraction='half' must lie in"),
        ({"pattern": 5}, "pattern=5 must be a name, a path or None"),
        ({"pattern": ""}, "pattern='' must not be empty"),
        ({"reuse_interval": 1025}, "reuse_interval=1025 must be at least 1 and at most 1024"),
    ],
)
def test_sparsity(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SparsityConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": None}, "stop=None must be a string or a sequence of strings"),
        ({"stop": 5}, "stop=5 must be a string or a sequence of strings"),
        ({"stop": b"a"}, "stop=b'a' must be a string or a sequence of strings"),
        ({"stop": {"a": 1}}, "stop={'a': 1} must be a string or a sequence of strings"),
        ({"stop": np.array("a")}, "stop=array.* must be a string or a sequence of strings"),
        ({"stop_token_ids": {1: 2}}, "stop_token_ids={1: 2} must be a sequence of integers"),
        ({"stop_token_ids": bytearray(b"a")}, "stop_token_ids=.* must be a sequence of integers"),
        ({"stop_token_ids": [True]}, "entry of stop_token_ids must be an integer .*, got True"),
        ({"max_tokens": SPAN}, "max_tokens must be an integer .*, got np.timedelta64"),
        ({"temperature": SPAN}, "temperature=np.timedelta64.* must be a finite number"),
        ({"stop_token_ids": None}, "stop_token_ids=None must be a sequence of integers"),
        ({"stop_token_ids": 5}, "stop_token_ids=5 must be a sequence of integers"),
        ({"stop_token_ids": "12"}, "stop_token_ids='12' must be a sequence of integers"),
        ({"stop_token_ids": [1.0]}, "entry of stop_token_ids must be an integer .*, got 1.0"),
        ({"ignore_eos": "no"}, "ignore_eos='no' must be True or False"),
        ({"skip_special_tokens": 0}, "skip_special_tokens=0 must be True or False"),
        ({"include_stop_str_in_output": None}, "include_stop_str_in_output=None must be True"),
    ],
)
def test_sampling(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        (None, None, "prompts must be a prompt or a list of them, got None"),
        (5, None, "prompts must be a prompt or a list of them, got 5"),
        ([5], None, "a prompt must be text or hold 'prompt_token_ids', got 5"),
        ([1, 2], None, "a prompt must be text or hold 'prompt_token_ids', got 1"),
        ({**IDS, "cache_slat": "a"}, None, "prompt_token_ids, cache_salt, and no 'cache_slat'"),
        ({"prompt_token_ids": [1.0]}, None, "token id 1.0 must be an integer"),
        ({"prompt_token_ids": np.array([1.5])}, None, "token id .*1.5.* must be an integer"),
        ({"prompt_token_ids": None}, None, "token ids must be a list of integers, got None"),
        ({"prompt_token_ids": 5}, None, "token ids must be a list of integers, got 5"),
        ({"prompt_token_ids": [[1], [2, 3]]}, None, "must be a list of integers, got lists"),
        ({"prompt_token_ids": [[1, 2]]}, None, r"a list of integers, got shape \(1, 2\)"),
        ({"prompt_token_ids": [1, True]}, None, "prompt token id True must be an integer"),
        ({**IDS, "prompt": 5}, None, "'prompt' beside 'prompt_token_ids' must be .*, got 5"),
        (IDS, {"max_tokens": 5}, "sampling_params must be SamplingParams .* got {'max_tokens': 5}"),
        (IDS, [{"max_tokens": 5}], "sampling must be SamplingParams, got {'max_tokens': 5}"),
        (IDS, 5, "sampling_params must be SamplingParams or a list of them, got 5"),
    ],
)
def test_generate(llm: LLM, prompts: Any, sampling: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        llm.generate(prompts, sampling)
    check_nothing_left(llm.engine)


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], ValueError, r"messages=\[\] must hold at least one message"),
        ({"role": "user", "content": "a"}, TypeError, "messages=.* must be a list of messages"),
        ("Hello", TypeError, "messages='Hello' must be a list of messages"),
        (None, TypeError, "messages=None must be a list of messages"),
        ([5], TypeError, "a conversation must be a list of messages, got 5"),
        (np.array(["a", "b"]), TypeError, "messages=array.* must be a list of messages"),
    ],
)
def test_chat(llm: LLM, messages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.chat(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": 5}, "tools must be a list of mappings .*, got 5"),
        ({"tools": np.zeros(2)}, "tools must be a list of mappings .*, got array"),
        ({"tools": [5]}, r"tools must be a list of mappings .*, got \[5\]"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt='yes' must be True or False"),
        ({"continue_final_message": 1}, "continue_final_message=1 must be True or False"),
    ],
)
def test_options_of_chat(chatting: LLM, options: dict[str, Any], message: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=message):
        chatting.chat(messages, **options)
    for wrong in (5, None, np.array(["a", "b"]), {}):
        with pytest.raises(ValueError, match="messages must be a non-empty list"):
            chatting.tokenizer.apply_chat_template(wrong)


def test_a_tokenizer(tokenizer: Tokenizer) -> None:
    for ids, message in (
        ([1.5], "token id 1.5 must be an integer"),
        ([True], "token id True must be an integer"),
        ("12", "ids='12' must be a list of token ids"),
        (b"12", "ids=b'12' must be a list of token ids"),
        ({1: 2}, "ids={1: 2} must be a list of token ids"),
        (np.array([1.0]), "token id .*1.0.* must be an integer"),
        (np.array([SPAN]), "token id .*timedelta64.* must be an integer"),
        ([[1]], r"token id \[1\] must be an integer"),
        (None, "ids=None must be a list of token ids"),
        (5, "ids=5 must be a list of token ids"),
        (np.array(5), r"ids=array\(5\) must be a list of token ids"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(ids)
    with pytest.raises(ValueError, match=r"token id 1.5 must be an integer"):
        tokenizer.stream().step(1.5)
    with pytest.raises(ValueError, match="add_special_tokens='no' must be True or False"):
        tokenizer.encode("a", add_special_tokens="no")
    for call in (tokenizer.stream, lambda **flag: tokenizer.decode([1], **flag)):
        with pytest.raises(ValueError, match="skip_special_tokens=0 must be True or False"):
            call(skip_special_tokens=0)
    with pytest.raises(TypeError, match="directory=None must be a path"):
        tokenizer.save(None)
    ids = tokenizer.encode("the sea")
    for same in (np.array(ids), jnp.array(ids), np.array(ids, np.uint16), iter(ids)):
        assert tokenizer.decode(same) == "the sea"


@pytest.mark.parametrize("path", [None, 5, b"a", ""])
def test_paths(llm: LLM, tmp_path: Path, path: Any) -> None:
    held = llm.prefix({"prompt_token_ids": [1, 2]})
    for call in (
        llm.load_prefix,
        held.save,
        convert.load,
        convert.load_pattern,
        convert.load_tokenizer,
        lambda path: convert.lora.load_adapter(path),
    ):
        with pytest.raises((TypeError, ValueError), match=r"=.* must (be a path|not be empty)"):
            call(path)


@pytest.mark.parametrize("kind", [np.array, jnp.array, tuple])
def test_arrays_of_ids_are_lists_of_ids(kind: Callable) -> None:
    llm, [ids] = build(), random_prompts(2, [150])
    requests = [({"prompt_token_ids": kind(ids)}, GREEDY)] * 3
    plain = llm.generate({"prompt_token_ids": ids}, GREEDY)[0].outputs[0].token_ids
    for _, output in llm.stream(requests):
        assert output.outputs[0].token_ids == plain
        assert output.num_cached_tokens == 128
    assert llm.engine.add_prefix(kind(ids)).num_shared_tokens == 128


def test_a_text_engine(llm: LLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="engine must be what build_engine returns, got None"):
        TextEngine(None, None)
    with pytest.raises(TypeError, match=r"tokenizer must be what .* returns, got 5"):
        TextEngine(llm.engine, 5)
    for request_id in ([], None, 0):
        with pytest.raises(ValueError, match=r"no request with id .* is waiting or running"):
            TextEngine(llm.engine, None).cancel(request_id)
        with pytest.raises(ValueError, match=r"no request with id .* is waiting or running"):
            llm.engine.cancel(request_id)
        with pytest.raises(TypeError, match=r"request_id=.* must be a text"):
            llm.engine.add_request(request_id, [1], GREEDY, seed=0)


def test_prefixes_streams_and_requests(llm: LLM) -> None:
    for wrong in (np.array([1, 2]), "auto", 5, [None]):
        with pytest.raises(TypeError, match=r"shared_prefix=.* must be a Prefix or None"):
            llm.generate(IDS, GREEDY, shared_prefix=wrong)
    for wrong in (5, "ab", (IDS,), (IDS, GREEDY, 1), IDS):
        with pytest.raises(TypeError, match=r"requests must give pairs of a prompt and .* at 1"):
            list(llm.stream([(IDS, GREEDY), wrong]))
    with pytest.raises(ValueError, match=r"prefix token id 1.5 must be an integer"):
        llm.engine.add_prefix([1.5])
    with pytest.raises(ValueError, match=r"prefix token ids .*, got shape \(1, 2\)"):
        llm.engine.add_prefix([[1, 2]])
    with pytest.raises(ValueError, match=f"prefix token id {VOCAB} is outside"):
        llm.engine.add_prefix([VOCAB])
    for wrong in (5, None, "", {}, np.array(5)):
        with pytest.raises(TypeError, match=r"requests=.* must give pairs of a prompt and"):
            list(llm.stream(wrong))
    with pytest.raises(TypeError, match="sampling must be SamplingParams, got None"):
        llm.engine.add_request("a", [1], None, seed=0)
    with pytest.raises(ValueError, match=r"completion must be an integer of at least 0, got 1\.5"):
        llm.engine.add_request("a", [1], GREEDY, seed=0, completion=1.5)
    with pytest.raises(TypeError, match="on_text=5 must be a function"):
        llm.generate(IDS, GREEDY, on_text=5)
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        llm.engine.add_request("a", [1], GREEDY, seed=-1)
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        TextEngine(llm.engine, None, seed=-1)
    for deadline in (0, -1, "5", math.nan, True):
        with pytest.raises(ValueError, match=r"deadline=.* must be positive"):
            llm.engine.add_request("a", [1], GREEDY, seed=0, deadline=deadline)
        with pytest.raises(ValueError, match=r"deadline=.* must be positive"):
            TextEngine(llm.engine, None).submit(IDS, GREEDY, deadline=deadline)
    check_nothing_left(llm.engine)


# Calls that meet.


def test_a_reset_does_not_end_a_stream_silently() -> None:
    llm = build()
    llm.engine.add_request("a", [1, 2], GREEDY, seed=0)
    stream = llm.engine.stream()
    next(stream)
    llm.engine.reset()
    with pytest.raises(ValueError, match="the engine was reset while requests ran"):
        list(stream)
    requests = llm.stream((IDS, GREEDY) for _ in range(9))
    next(requests)
    llm.engine.reset()
    with pytest.raises(ValueError, match=r"the engine was reset while requests .* ran"):
        list(requests)
    check_nothing_left(llm.engine)
    assert len(llm.generate(IDS, GREEDY)[0].outputs[0].token_ids) == 20


def test_a_reset_loses_the_requests_before_it_only() -> None:
    text = TextEngine(build().engine, None)
    lost = text.submit(IDS, GREEDY)
    text.step()
    text.engine.reset()
    kept = text.submit(IDS, GREEDY)
    with pytest.raises(ValueError, match=rf"was reset while requests \['{lost}'\] ran"):
        text.step()
    deltas = []
    while text.has_unfinished_requests:
        deltas += text.step()
    assert {delta.request_id for delta in deltas} == {kept}


def test_cancelling_after_a_reset_names_the_request() -> None:
    text = TextEngine(build().engine, None)
    lost = text.submit(IDS, SamplingParams(n=2, max_tokens=9))
    text.engine.reset()
    kept = text.submit(IDS, GREEDY)
    with pytest.raises(ValueError, match=f"reset while request '{lost}' ran: it is gone"):
        text.cancel(lost)
    text.cancel(kept)
    with pytest.raises(ValueError, match=rf"was reset while requests \['{lost}'\] ran"):
        text.step()
    with pytest.raises(ValueError, match=f"no request with id '{lost}' is waiting or running"):
        text.cancel(lost)
    [*ends] = text.step()
    assert {(delta.request_id, delta.finish_reason) for delta in ends} == {(kept, "cancelled")}
    assert not text.has_unfinished_requests
    check_nothing_left(text.engine)


def test_threads_take_turns() -> None:
    llm = build()
    prompts = [[{"prompt_token_ids": ids}] for ids in random_prompts(0, [20, 30, 40, 25])]
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    together: dict[int, Any] = {}
    start = threading.Barrier(len(prompts))

    def call(number: int) -> None:
        start.wait()
        try:
            for _ in range(3):
                [output] = llm.generate(prompts[number], GREEDY)
                together[number] = output.outputs[0].token_ids
        except ValueError as error:
            together[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(len(prompts))] == alone
    check_nothing_left(llm.engine)


def test_a_call_beside_an_open_stream_is_refused_and_spoils_nothing() -> None:
    llm = build()
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(1, [20] * 5)]
    alone = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    stream = llm.stream((prompt, GREEDY) for prompt in prompts)
    found = dict([next(stream)])
    errors: list[Exception] = []

    def call() -> None:
        try:
            llm.generate(prompts[0], GREEDY)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "still busy with another call's requests" in str(errors[0])
    found |= dict(stream)
    assert [found[i].outputs[0].token_ids for i in range(5)] == alone


def test_a_stream_that_finds_others_at_work_leaves_them_alone() -> None:
    llm = build()
    mine = llm.stream((IDS, GREEDY) for _ in range(1))
    next(mine)  # its only request is done, but it is not at its end
    other = llm.stream((IDS, GREEDY) for _ in range(4))
    next(other)
    with pytest.raises(ValueError, match="still busy with another call's requests"):
        next(mine)
    assert len(list(other)) == 3
    check_nothing_left(llm.engine)

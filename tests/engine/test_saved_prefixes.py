"""Prefixes in files, and prefixes that are refused."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from relay_cases import CONFIG, Build, P, assert_same, prompts_with, run
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    check_pages,
    random_prompts,
    tiny_params,
)

from lserve_jax import SamplingParams
from lserve_jax.engine.prefix import _digest

pytestmark = pytest.mark.usefixtures("all_slots")

# Saved prefixes.


@pytest.mark.parametrize(
    ("attention", "kv_dtype"),
    [("lserve", "auto"), ("dense", "int8"), ("dense", "fp8"), ("lserve", "int4")],
)
def test_save_and_load(attention: str, kv_dtype: str, build: Build, tmp_path: Path) -> None:
    """In another engine, on other pages, bit for bit the same."""
    [ids] = random_prompts(19, [130])
    prompts = prompts_with(ids, 20, [9, 40])
    path = tmp_path / "prefix.safetensors"
    settings = {"kv_dtype": kv_dtype, "deterministic": True}
    first = build(attention, **settings)
    prefix = first.prefix({"prompt_token_ids": ids})
    prefix.save(path)
    wanted = run(first, prompts, 12, prefix)
    second = build(attention, **settings)
    second.prefix({"prompt_token_ids": random_prompts(21, [70])[0]})  # takes the first pages
    loaded = second.load_prefix(path)
    assert loaded.pages != prefix.pages
    assert second.engine.metrics().prompt_tokens == 64
    for one, other in zip(run(second, prompts, 12, loaded), wanted, strict=True):
        assert one.tokens == other.tokens
        assert_array_equal(one.logprobs, other.logprobs)


def test_of_a_loaded_prefix_only_windows_that_were_saved_are_there(
    build: Build, tmp_path: Path
) -> None:
    """A prompt that leaves it before its end finds no window there, and computes one."""
    [ids] = random_prompts(22, [20 * P])
    first, second = build(), build()
    first.prefix({"prompt_token_ids": ids}).save(tmp_path / "prefix")
    second.load_prefix(tmp_path / "prefix")
    prompts = prompts_with(ids[: 15 * P], 23, [20])
    assert_same(run(second, prompts, 4), run(first, prompts, 4))
    check_pages(second.engine)


def test_a_saved_prefix_without_a_page_and_one_loaded_twice(build: Build, tmp_path: Path) -> None:
    llm = build()
    for length in (0, 5, 40):
        llm.prefix({"prompt_token_ids": [7] * length}).save(tmp_path / "prefix")
        other = build()
        one, again = (other.load_prefix(tmp_path / "prefix") for _ in "ab")
        assert one.num_shared_tokens == length // P * P
        assert (one is again) == (length >= P)
        check_pages(other.engine)


def test_only_a_new_or_regular_file_is_written(build: Build, tmp_path: Path) -> None:
    """A device would be gone, and a file in its place."""
    prefix = build().prefix({"prompt_token_ids": [7] * 40})
    os.mkfifo(pipe := tmp_path / "pipe")
    for path in (pipe, tmp_path):
        with pytest.raises(ValueError, match=f"prefix file '{path}' must be new or a regular file"):
            prefix.save(path)
    assert pipe.is_fifo()


def test_files_that_do_not_fit(build: Build, tmp_path: Path) -> None:
    llm = build()
    path = tmp_path / "prefix.safetensors"
    llm.prefix({"prompt_token_ids": random_prompts(22, [130])[0]}).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    free = llm.engine.metrics().free_pages
    with pytest.raises(ValueError, match=r"prefix\.safetensors' is broken"):
        llm.load_prefix(path)
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match="is broken: its digest does not match"):
        llm.load_prefix(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is broken"):
        llm.load_prefix(path)
    with pytest.raises(ValueError, match="does not exist"):
        llm.load_prefix(tmp_path / "none")
    assert llm.engine.metrics().free_pages == free
    path.write_bytes(whole)
    other = build()
    other.engine.runner.params = tiny_params(CONFIG, seed=1)
    for wrong, part in (
        (build("dense"), "page size"),
        (build(kv_dtype="int8"), "kv_dtype"),
        (other, "model"),
    ):
        with pytest.raises(ValueError, match=f"made with another {part}"):
            wrong.load_prefix(path)
        check_nothing_left(wrong.engine)


def test_a_file_with_other_arrays_or_ids_is_broken(build: Build, tmp_path: Path) -> None:
    """The digest covers what arrays hold, not their names and shapes, and anyone can make it."""
    llm, path = build(), tmp_path / "prefix.safetensors"
    held = llm.prefix({"prompt_token_ids": [1] * 40})
    held.save(path)
    held.release()
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def refused(message: str, arrays: dict, token_ids: str = metadata["token_ids"]) -> None:
        digest = _digest(token_ids, arrays)
        save_file(arrays, path, {**metadata, "token_ids": token_ids, "digest": digest})
        with pytest.raises(ValueError, match=message):
            llm.load_prefix(path)
        check_nothing_left(llm.engine)

    for name in arrays:
        others = {other: value for other, value in arrays.items() if other != name}
        value, named = (
            arrays[name],
            rf"safetensors' is broken: {re.escape(name)} must be float32 \(",
        )
        refused(rf"{named}.*, found nothing", others)
        refused(rf"{named}.*, found int32 \(", {**others, name: value.view(np.int32)})
        refused(rf"{named}.*, found float32 \(", {**others, name: value.reshape(-1)})
    for token_ids, message in (
        ("null", "prefix token ids must be a list of integers, got None"),
        ("{}", "prefix token ids must be a list of integers, got {}"),
        ("[1.5]", "prefix token id 1.5 must be an integer"),
        (f"[{10**12}]", f"prefix token id {10**12} is outside the vocabulary"),
        (f"[{10**30}]", f"prefix token id {10**30} is outside the vocabulary"),
        ("[" * 100_000, "is broken: its token_ids are no JSON"),
        ("[1", "is broken: its token_ids are no JSON"),
        ("[]", r"is broken: its tokens fill no page, but it holds \["),
    ):
        refused(message, arrays, token_ids)


def test_prefixes_that_are_refused(build: Build) -> None:
    llm = build(kv_cache_bytes=20_000)
    pages = llm.spec.num_pages
    with pytest.raises(ValueError, match="600 tokens, more than max_model_len=512"):
        llm.prefix({"prompt_token_ids": [1] * 600})
    with pytest.raises(ValueError, match=f"token id {VOCAB} is outside the vocabulary"):
        llm.prefix({"prompt_token_ids": [1, VOCAB]})
    with pytest.raises(ValueError, match=rf"needs 32 pages of 16 tokens, {pages} of {pages} are"):
        llm.prefix({"prompt_token_ids": [1] * 512})
    llm.engine.add_request("a", [1] * 60, SamplingParams(max_tokens=9), seed=0)
    with pytest.raises(ValueError, match=r"would leave .; request 'a' can need 5"):
        llm.prefix({"prompt_token_ids": [2] * 16 * (pages - 4)})
    list(llm.engine.stream())
    held = llm.prefix({"prompt_token_ids": [2] * 16 * (pages - 4)})
    with pytest.raises(ValueError, match=f"the request needs 5 pages .* has {pages}, .* held by"):
        llm.generate({"prompt_token_ids": [1] * 60}, SamplingParams(max_tokens=9))
    with pytest.raises(ValueError, match=r"prompt 1 does not begin with the prefix.*at token 2"):
        prompts = [{"prompt_token_ids": [2] * 100}, {"prompt_token_ids": [2, 2, 3]}]
        llm.generate(prompts, shared_prefix=held)
    with pytest.raises(TypeError, match="shared_prefix='on' must be a Prefix or None"):
        llm.generate({"prompt_token_ids": [1]}, shared_prefix="on")
    check_pages(llm.engine)

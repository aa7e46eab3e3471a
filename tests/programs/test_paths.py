"""Wherever a path is taken, any ``os.PathLike`` will do."""

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_llm import tiny_config, tiny_params, write_pattern

import convert
from lserve_jax import LLM, SamplingParams, SparsityConfig

GREEDY = SamplingParams(temperature=0, max_tokens=3)


class Named:
    """A path of somebody else's making."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [Path, Named])
def test_models_and_prefixes(kind: type, conformance: Path, tmp_path: Path) -> None:
    checkpoint = conformance / "llama3-gqa-ropellama3"
    llm = LLM(kind(checkpoint), max_num_seqs=1, kv_cache_bytes=1 << 22)
    prompt = {"prompt_token_ids": [1, 2, 3]}
    same = LLM(str(checkpoint), max_num_seqs=1, kv_cache_bytes=1 << 22).generate(prompt, GREEDY)
    assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == same[0].outputs[0].token_ids
    prefix = llm.prefix({"prompt_token_ids": list(range(70))})
    prefix.save(kind(tmp_path / "prefix.safetensors"))
    prefix.release()
    llm.load_prefix(kind(tmp_path / "prefix.safetensors")).release()


@pytest.mark.parametrize("kind", [Path, Named])
def test_conversion(kind: type, conformance: Path, tmp_path: Path) -> None:
    source = convert.resolve(kind(conformance / "mistral"))
    assert source.path == conformance / "mistral"
    config, params = convert.load(kind(conformance / "mistral"))
    convert.save(
        kind(tmp_path / "orbax"), config, params, tokenizer_from=kind(conformance / "mistral")
    )
    again, _ = convert.load(kind(tmp_path / "orbax"))
    assert again == config
    assert convert.load_tokenizer(kind(conformance / "mistral")) is None


@pytest.mark.parametrize("kind", [Path, Named])
def test_patterns(kind: type, tmp_path: Path) -> None:
    write_pattern(tmp_path / "half", [[0.1, 0.9]])
    sizes = {"sink_size": 128, "recent_size": 256}
    convert.save_pattern(kind(tmp_path / "half"), np.array([[0.1, 0.9]]), sizes)
    gates = convert.load_pattern(kind(tmp_path / "half")).gates
    np.testing.assert_array_equal(gates, [[0.1, 0.9]])
    sparsity = SparsityConfig(pattern=kind(tmp_path / "half"))
    assert sparsity.pattern == os.fspath(tmp_path / "half")
    config = tiny_config(layers=1, kv_heads=2)
    llm = LLM((config, tiny_params(config)), attention="lserve", sparsity=sparsity)
    assert llm.spec.heads.num_retrieval == (1,)

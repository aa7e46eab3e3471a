"""LoRA adapters: merged weights against a float64 computation, and each variant refused by name."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import (
    LLAMA,
    Tensors,
    expected_leaves,
    model_config,
    random_tensors,
    write_gguf,
    write_hf,
)

import convert
from convert.names import flatten
from lserve_jax import LLM, SamplingParams
from pallas_kernels.api import WEIGHT_KINDS, Weight, dequantize_weight

# With more rows in the output layer than are converted at a time.
BASE = {**LLAMA, "vocab_size": 300}
RANK = 4
ALPHA = 6
CONFIG = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": ["q_proj"],
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
}
TARGETS = {  # module -> rank
    "model.layers.0.self_attn.q_proj": RANK,
    "model.layers.1.self_attn.v_proj": RANK,
    "model.layers.0.self_attn.o_proj": RANK,
    "model.layers.1.mlp.up_proj": RANK,
    "model.layers.0.mlp.down_proj": RANK,
    "lm_head": RANK,
}


def matrices(tensors: Tensors, targets: dict[str, int] = TARGETS) -> Tensors:
    rng = np.random.default_rng(1)
    result = {}
    for module, rank in targets.items():
        rows, columns = tensors[f"{module}.weight"].shape
        prefix = f"base_model.model.{module}."
        result[f"{prefix}lora_A.weight"] = rng.standard_normal((rank, columns), np.float32)
        result[f"{prefix}lora_B.weight"] = rng.standard_normal((rows, rank), np.float32)
    return result


def write_adapter(directory: Path, matrices: Tensors, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(matrices, directory / "adapter_model.safetensors")
    return directory


def merged(tensors: Tensors, adapter: Tensors, scale: dict[str, float]) -> Tensors:
    """In float64."""
    result = dict(tensors)
    for module, factor in scale.items():
        a, b = (
            adapter[f"base_model.model.{module}.lora_{side}.weight"].astype(np.float64)
            for side in "AB"
        )
        result[f"{module}.weight"] = tensors[f"{module}.weight"] + factor * (b @ a)
    return result


def assert_merged(params, expected: Tensors) -> None:
    found = flatten(params)
    for leaf, value in expected_leaves(expected).items():
        # Sums of four float32 products of size 10: rounding errors of some 1e-6.
        np.testing.assert_allclose(found[leaf], value, atol=1e-5, rtol=0, err_msg=leaf)


@pytest.mark.parametrize("source", ["hf", "gguf", "orbax"])
def test_merged_weights_from_every_source(tmp_path, source):
    tensors = random_tensors(BASE)
    adapter = matrices(tensors)
    write_adapter(tmp_path / "adapter", adapter)
    if source == "gguf":
        path = write_gguf(tmp_path / "model.gguf", model_config(BASE), tensors)
    else:
        path = write_hf(tmp_path / "hf", BASE, tensors)
    if source == "orbax":
        config, params = convert.load(path)
        path = tmp_path / "orbax"
        convert.save(path, config, params)
    _, params = convert.load(path, adapter=tmp_path / "adapter")
    assert_merged(params, merged(tensors, adapter, dict.fromkeys(TARGETS, ALPHA / RANK)))


def test_a_merged_adapter_remembers_prompts(tmp_path):
    """Cold and warm are the same bit for bit, and not what the base model says."""
    tensors = random_tensors(BASE)
    path = write_hf(tmp_path / "hf", BASE, tensors)
    adapter = write_adapter(tmp_path / "adapter", matrices(tensors))
    prompt = {"prompt_token_ids": np.random.default_rng(2).integers(0, 300, 100).tolist()}
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=5, ignore_eos=True)

    def run(llm: LLM) -> tuple[list[dict[int, float]], int]:
        [output] = llm.generate(prompt, sampling)
        return output.outputs[0].logprobs, output.num_cached_tokens

    settings = {"prefill_chunk_size": 64, "deterministic": True, "relay": "never"}
    llm = LLM(path, adapter=adapter, **settings)
    cold, warm = run(llm), run(llm)
    assert cold == (warm[0], 0) and warm[1] == 64
    assert run(LLM(path, **settings))[0] != cold[0]


# Whole groups of 32 inputs in every matrix.
WIDE = BASE | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_quantised_weights_are_merged_only_where_rounding_is_asked_for(tmp_path, kind):
    tensors = random_tensors(WIDE)
    adapter = matrices(tensors)
    write_adapter(tmp_path / "adapter", adapter)
    floats, codes = write_hf(tmp_path / "hf", WIDE, tensors), tmp_path / "codes"
    config, base = convert.load(floats, weights=kind)
    convert.save(codes, config, base)
    for weights in (None, "checkpoint"):
        with pytest.raises(
            ValueError,
            match=rf"^{codes}: the adapter changes lm_head.weight, whose codes are kept; "
            r"weights='int8', 'int4' or 'fp8' merges it into floats and rounds these again$",
        ):
            convert.load(codes, adapter=tmp_path / "adapter", weights=weights)
    other = "fp8" if kind == "int8" else "int8"
    with pytest.raises(ValueError, match=rf"^{codes}: .* quantised already, .*weights='{other}'"):
        convert.load(codes, adapter=tmp_path / "adapter", weights=other)

    _, params = convert.load(codes, adapter=tmp_path / "adapter", weights=kind)
    # What the codes stand for, and the adapter: rounded as any other floats.
    stand_for = jax.tree.map(
        lambda x: dequantize_weight(x) if isinstance(x, Weight) else x,
        base,
        is_leaf=lambda x: isinstance(x, Weight),
    )
    convert.save(tmp_path / "floats", config, stand_for)
    _, wanted = convert.load(tmp_path / "floats", adapter=tmp_path / "adapter", weights=kind)
    for (path, one), other in zip(
        jax.tree.flatten_with_path(params)[0], jax.tree.leaves(wanted), strict=True
    ):
        # A matrix that is not changed keeps its scales; rounded again they move in the last bits.
        np.testing.assert_allclose(
            one.astype(jnp.float32), other.astype(jnp.float32), rtol=1e-5, err_msg=str(path)
        )
    kept = params["layers"][0]["mlp"]["gate_up_proj"]["kernel"]
    jax.tree.map(
        np.testing.assert_array_equal, kept, base["layers"][0]["mlp"]["gate_up_proj"]["kernel"]
    )


def test_an_adapter_on_codes_of_a_library(tmp_path):
    """Floats, or rounded again; codes that are kept are refused before anything is read."""
    awq = Path(__file__).parent / "quantised" / "awq-g32"
    module = "model.layers.0.self_attn.q_proj"
    _, base = convert.load(awq, dtype="float32")
    adapter = matrices({f"{module}.weight": np.zeros((64, 128), np.float32)}, {module: RANK})
    write_adapter(tmp_path / "adapter", adapter)
    _, params = convert.load(awq, dtype="float32", adapter=tmp_path / "adapter")
    kernel = base["layers"][0]["self_attn"]["qkv_proj"]["kernel"][:, :64]
    added = merged({f"{module}.weight": kernel.T}, adapter, {module: ALPHA / RANK})
    got = np.asarray(params["layers"][0]["self_attn"]["qkv_proj"]["kernel"])
    np.testing.assert_allclose(got[:, :64].T, added[f"{module}.weight"], atol=1e-5, rtol=0)
    _, codes = convert.load(awq, adapter=tmp_path / "adapter", weights="int8")
    rounded = np.asarray(dequantize_weight(codes["layers"][0]["self_attn"]["qkv_proj"]["kernel"]))
    # Half a step of 127 to either side.
    assert (abs(rounded - got) <= np.abs(got).max(axis=0) / 254 * 1.001).all()
    with pytest.raises(ValueError, match=rf"adapter changes {module}.* weights=None leaves them"):
        convert.load(awq, adapter=tmp_path / "adapter", weights="checkpoint")


def test_codes_that_an_adapter_leaves_alone_are_kept(tmp_path):
    tensors = random_tensors(WIDE)
    norm = {"base_model.model.model.norm.weight": np.full(64, 0.5, np.float32)}
    write_adapter(tmp_path / "adapter", norm, target_modules=[], modules_to_save=["norm"])
    config, base = convert.load(write_hf(tmp_path / "hf", WIDE, tensors), weights="int4")
    convert.save(tmp_path / "codes", config, base)
    _, params = convert.load(tmp_path / "codes", adapter=tmp_path / "adapter")
    np.testing.assert_array_equal(params["norm"]["scale"], 0.5)
    jax.tree.map(np.testing.assert_array_equal, params | {"norm": None}, base | {"norm": None})


def test_merging_happens_in_float32_before_the_cast(tmp_path):
    """With weights in bfloat16, adding in bfloat16 would round twice."""
    tensors = random_tensors(BASE, jnp.bfloat16)
    adapter = matrices(tensors)
    path = write_hf(tmp_path / "hf", BASE, tensors)
    write_adapter(tmp_path / "adapter", adapter)
    _, params = convert.load(path, adapter=tmp_path / "adapter")
    wide = {name: value.astype(np.float64) for name, value in tensors.items()}
    expected = expected_leaves(merged(wide, adapter, dict.fromkeys(TARGETS, ALPHA / RANK)))
    for leaf, value in flatten(params).items():
        assert value.dtype == jnp.bfloat16
        wrong = np.asarray(value) != expected[leaf].astype(jnp.bfloat16)
        # Only where float32 and float64 straddle the middle of two bfloat16 values.
        assert wrong.mean() < 1e-3, leaf


def test_rank_stabilised_scale(tmp_path):
    tensors = random_tensors(BASE)
    adapter = matrices(tensors)
    path = write_hf(tmp_path / "hf", BASE, tensors)
    write_adapter(tmp_path / "adapter", adapter, use_rslora=True)
    _, params = convert.load(path, adapter=tmp_path / "adapter")
    assert_merged(params, merged(tensors, adapter, dict.fromkeys(TARGETS, ALPHA / math.sqrt(RANK))))


@pytest.mark.parametrize("alpha", [-2, 0, 0.5])
def test_any_finite_alpha_is_a_scale(tmp_path, alpha):
    tensors = random_tensors(BASE)
    adapter = matrices(tensors)
    path = write_hf(tmp_path / "hf", BASE, tensors)
    write_adapter(tmp_path / "adapter", adapter, lora_alpha=alpha)
    _, params = convert.load(path, adapter=tmp_path / "adapter")
    assert_merged(params, merged(tensors, adapter, dict.fromkeys(TARGETS, alpha / RANK)))


def test_ranks_and_alphas_by_module(tmp_path):
    tensors = random_tensors(BASE)
    q0, q1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    up = "model.layers.0.mlp.up_proj"
    adapter = matrices(tensors, {q0: 2, q1: 3, up: RANK})
    path = write_hf(tmp_path / "hf", BASE, tensors)
    write_adapter(
        tmp_path / "adapter",
        adapter,
        # The first pattern that fits counts; a pattern must fit a whole dotted tail.
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 3, "q_proj": 2, "p_proj": 9},
        alpha_pattern={"up_proj": 5, "self_attn": 7},
    )
    _, params = convert.load(path, adapter=tmp_path / "adapter")
    scale = {q0: ALPHA / 2, q1: ALPHA / 3, up: 5 / RANK}
    assert_merged(params, merged(tensors, adapter, scale))


def test_adapters_in_half_precision_with_the_old_names(tmp_path):
    tensors = random_tensors(BASE)
    adapter = {k: v.astype(jnp.bfloat16) for k, v in matrices(tensors).items()}
    path = write_hf(tmp_path / "hf", BASE, tensors)
    old = {name.replace(".weight", ".default.weight"): value for name, value in adapter.items()}
    write_adapter(tmp_path / "adapter", old)
    _, params = convert.load(path, adapter=tmp_path / "adapter")
    assert_merged(params, merged(tensors, adapter, dict.fromkeys(TARGETS, ALPHA / RANK)))


def test_an_adapter_that_brings_its_config_overrides(tmp_path):
    tensors = random_tensors(BASE)
    path = write_hf(tmp_path / "hf", BASE, tensors)
    write_adapter(tmp_path / "adapter", matrices(tensors))
    source = convert.ModelSource(
        name="alias",
        path=path,
        adapter=tmp_path / "adapter",
        overrides={"rope_theta": 2e6, "max_position_embeddings": 512},
    )
    config, _ = convert.load(source, overrides={"max_position_embeddings": 1024})
    assert (config.rope.rope_theta, config.max_position_embeddings) == (2e6, 1024)
    with pytest.raises(ValueError, match="'alias' brings an adapter of its own"):
        convert.load(source, adapter=tmp_path / "adapter")


VARIANTS = {
    "peft_type 'LOHA' is not supported": {"peft_type": "LOHA"},
    "fan_in_fan_out=True": {"fan_in_fan_out": True},
    "layer_replication=": {"layer_replication": [[0, 2]]},
    "lora_bias=True": {"lora_bias": True},
    "trainable_token_indices=": {"trainable_token_indices": [1]},
    "init_lora_weights='pissa' is not supported": {"init_lora_weights": "pissa"},
    "brand_new=1": {"brand_new": 1},
}


@pytest.mark.parametrize("message", VARIANTS)
def test_variants_of_lora_are_refused_by_name(tmp_path, message):
    tensors = random_tensors(BASE)
    path = write_hf(tmp_path / "hf", BASE, tensors)
    adapter = write_adapter(tmp_path / "adapter", matrices(tensors), **VARIANTS[message])
    with pytest.raises(NotImplementedError, match=message):
        convert.load(path, adapter=adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "query_key_value"], "modules_to_save": ["score"]},
        {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": ["gate_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]},
        {"target_modules": r".*\.(q|gate)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.down_proj"]},
        {"target_modules": None},
    ],
)
def test_lists_of_modules_may_name_what_the_model_lacks_or_leaves_out(tmp_path, changes):
    tensors = random_tensors(BASE)
    adapter = matrices(tensors)
    path = write_hf(tmp_path / "hf", BASE, tensors)
    write_adapter(tmp_path / "adapter", adapter, **changes)
    _, params = convert.load(path, adapter=tmp_path / "adapter")
    assert_merged(params, merged(tensors, adapter, dict.fromkeys(TARGETS, ALPHA / RANK)))


def test_a_tied_model_misses_its_output_layer_too(tmp_path):
    tied = {**BASE, "tie_word_embeddings": True}
    tensors = random_tensors(tied)
    targets = {name: rank for name, rank in TARGETS.items() if name != "lm_head"}
    path = write_hf(tmp_path / "hf", tied, tensors)
    adapter = matrices(tensors, targets)
    write_adapter(tmp_path / "adapter", adapter, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="target_modules names 'lm_head', but"):
        convert.load(path, adapter=tmp_path / "adapter")


def test_broken_adapters_are_refused(tmp_path):
    tensors = random_tensors(BASE)
    path = write_hf(tmp_path / "hf", BASE, tensors)
    good = matrices(tensors)
    q = "base_model.model.model.layers.0.self_attn.q_proj"

    def refused(message: str, adapter: Tensors, **changes: object) -> None:
        directory = write_adapter(tmp_path / "adapter", adapter, **changes)
        with pytest.raises(ValueError, match=message):
            convert.load(path, adapter=directory)

    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    refused(
        r"model.embed_tokens has no lora_embedding_B",
        {**good, embedding: np.zeros((4, 48), np.float32)},
    )
    refused(
        r"neither LoRA matrices nor .*: base_model.model.lm_head.lora_C.weight \(4, 48\)",
        {**good, "base_model.model.lm_head.lora_C.weight": np.zeros((4, 48), np.float32)},
    )
    refused(
        r"layers.2.self_attn.q_proj.weight: the model has no such tensor",
        {
            name.replace("layers.1", "layers.2").replace("v_proj", "q_proj"): value
            for name, value in good.items()
        },
    )
    wide = {**good, f"{q}.lora_A.weight": np.zeros((RANK, 33), np.float32)}
    refused(r"self_attn.q_proj.weight: found \(32, 33\), expected \(32, 32\)", wide)
    without = {name: value for name, value in good.items() if name != f"{q}.lora_B.weight"}
    refused(r"model.layers.0.self_attn.q_proj has no lora_B", without)
    refused(r"lm_head has matrices \(4, 32\) and \(300, 4\), but its rank is 8", good, r=8)
    refused(
        r"adapter_config.json: r must be a positive integer below 2\^31, got None", good, r=None
    )
    refused(r"lora_alpha must be a finite number, got '8'", good, lora_alpha="8")
    refused(r"lora_alpha must be a finite number, got nan", good, lora_alpha=math.nan)
    refused(r"use_rslora must be true or false, got 'no'", good, use_rslora="no")
    refused(r"rank_pattern must be an object, got 5", good, rank_pattern=5)
    refused(r"rank_pattern has '\(\(', which is no pattern", good, rank_pattern={"((": 2})
    refused(
        r"alpha_pattern\['.*'\] must be a finite number, got None", good, alpha_pattern={".*": None}
    )
    refused(r"bias must be 'none', 'all' or 'lora_only', got 'some'", good, bias="some")
    refused(r"adapter_model.safetensors holds no tensors", {})
    refused(
        r"q_proj.lora_A.weight holds values that are not finite",
        {**good, f"{q}.lora_A.weight": np.full((RANK, 32), np.nan, np.float32)},
    )
    refused(
        r"holds a tensor twice, again as .*q_proj.lora_A",
        {**good, f"{q}.lora_A.default.weight": good[f"{q}.lora_A.weight"]},
    )
    refused(r"lm_head has no lora_magnitude_vector", good, use_dora=True)
    magnitude = {f"{q}.lora_magnitude_vector": np.ones(32, np.float32)}
    refused(r"q_proj has lora_magnitude_vector, which the adapter's config", {**good, **magnitude})
    refused(
        r"adapter_config.json: modules_to_save names 'embed_tokens', but adapter_model.safetensors",
        good,
        modules_to_save=["embed_tokens"],
    )
    refused(r"modules_to_save names 'lm_head'", good, modules_to_save=["lm_head"])  # low rank only
    refused(r"target_modules names 'gate_proj'", good, target_modules=["q_proj", "gate_proj"])
    refused(r"target_modules must be a list of names, got 5", good, target_modules=5)
    refused(r"modules_to_save must be a list of names, got \[5\]", good, modules_to_save=[5])
    replaced = {"base_model.model.lm_head.weight": np.zeros((301, 32), np.float32)}
    refused(r"lm_head.weight: found \(301, 32\), expected \(300, 32\)", {**good, **replaced})

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "adapter" / name).unlink()
        (tmp_path / "adapter" / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} must be a file, and is a directory"):
            convert.load(path, adapter=tmp_path / "adapter")
        (tmp_path / "adapter" / name).rmdir()
        with pytest.raises(ValueError, match=f"adapter has no {name}"):
            convert.load(path, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("warmup", ["none", "auto"])
def test_an_adapter_with_an_output_layer_of_its_own_runs_with_it(tmp_path, warmup):
    """On a tied model: which ties no more, and that is known before the weights are read."""
    tied = {**BASE, "tie_word_embeddings": True}
    tensors = random_tensors(tied)
    path = write_hf(tmp_path / "hf", tied, tensors)
    own = np.random.default_rng(3).standard_normal((300, 32), np.float32)
    adapter = {"base_model.model.lm_head.weight": own}
    write_adapter(tmp_path / "adapter", adapter, target_modules=[], modules_to_save=["lm_head"])
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def tokens(llm: LLM) -> list[int]:
        return llm.generate({"prompt_token_ids": [3, 5]}, sampling)[0].outputs[0].token_ids

    wanted = tokens(LLM(convert.load(path, adapter=tmp_path / "adapter"), max_model_len=64))
    llm = LLM(path, adapter=tmp_path / "adapter", max_model_len=64, warmup=warmup)
    assert tokens(llm) == wanted != tokens(LLM(path, max_model_len=64))
    assert not llm.config.tie_word_embeddings
    config, params = convert.load(path, adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match="params have an lm_head"):
        LLM((dataclasses.replace(config, tie_word_embeddings=True), params))

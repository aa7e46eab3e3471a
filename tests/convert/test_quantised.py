"""Quantised checkpoints that the libraries wrote: logits of their own dequantised weights.

``quantised/make_*.py`` made the files, with the libraries' versions in their heads.
"""

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tiny_checkpoints import LLAMA, random_tensors, write_hf

import convert
from lserve_jax import LLM, SamplingParams, logits
from lserve_jax.engine.options import EngineOptions
from lserve_jax.model.heads import HeadPartition, permute_heads
from pallas_kernels.api import Weight, has_fp8

HERE = Path(__file__).parent / "quantised"
CASES = sorted(path.name for path in HERE.iterdir() if (path / "expected.npz").is_file())
DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "I32": np.int32,
    "I64": np.int64,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, by its own reading of the format."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[8 + size :][slice(*x["data_offsets"])], DTYPES[x["dtype"]])
        .reshape(x["shape"])
        .copy()
        for name, x in header.items()
    }


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, body = {}, b""
    for name, x in tensors.items():
        end = len(body) + x.nbytes
        header[name] = {
            "dtype": names[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [len(body), end],
        }
        body += x.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edited(tmp_path: Path, case: str, edit) -> Path:
    """A copy of a case after ``edit(config, tensors)``."""
    shutil.copytree(HERE / case, tmp_path / case)
    config = json.loads((tmp_path / case / "config.json").read_text())
    tensors = read(tmp_path / case / "model.safetensors")
    edit(config, tensors)
    (tmp_path / case / "config.json").write_text(json.dumps(config))
    write(tmp_path / case / "model.safetensors", tensors)
    return tmp_path / case


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_librarys(case):
    config, params = convert.load(HERE / case, dtype=jnp.float32)
    expected = np.load(HERE / case / "expected.npz")
    got = logits(config, params, jnp.asarray(expected["tokens"], jnp.int32))[0]
    # The same weights to the bit; sums of a few hundred products.
    assert_allclose(got, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_codes_are_kept(case):
    """In memory as they are stored, and the same logits; through the engine, with heads moved."""
    if "act-order" in case:
        with pytest.raises(NotImplementedError, match=r"\.g_idx scatters .*act-order.*cannot"):
            convert.load(HERE / case, weights="checkpoint")
        return
    config, params = convert.load(HERE / case, dtype=jnp.float32, weights="checkpoint")
    layer = params["layers"][0]
    kernels = [layer["self_attn"]["qkv_proj"]["kernel"], layer["mlp"]["gate_up_proj"]["kernel"]]
    wanted = "uint4" if "int4" in case or "awq" in case else "int8"
    for kernel in kernels:
        assert isinstance(kernel, Weight)
        assert kernel.codes.dtype == ("float8_e4m3fn" if "fp8" in case else wanted)
    expected = np.load(HERE / case / "expected.npz")
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    got = logits(config, params, tokens)[0]
    # Scales apply to sums here, to weights there.
    assert_allclose(got, expected["logits"], atol=1e-4, rtol=0)
    partition = HeadPartition(retrieval=((1,),), streaming=((0,),))
    moved = logits(config, permute_heads(config, params, partition), tokens)[0]
    assert_allclose(moved, expected["logits"], atol=1e-4, rtol=0)


def test_what_has_no_codes_to_keep(tmp_path):
    directory = write_hf(tmp_path / "floats", LLAMA, random_tensors(LLAMA))
    with pytest.raises(ValueError, match="holds no quantised matrices, whose codes"):
        LLM(directory, weights="checkpoint")
    convert.save(tmp_path / "orbax", *convert.load(directory))
    with pytest.raises(ValueError, match="holds no quantised weights, whose codes could be kept"):
        LLM(tmp_path / "orbax", weights="checkpoint")
    with pytest.raises(ValueError, match="needs quantised weights; all of these are floats"):
        LLM(convert.load(directory), weights="checkpoint")


def test_an_engine_keeps_codes():
    llm = LLM(str(HERE / "ct-int8-channel"), max_model_len=64, weights="checkpoint")
    floats = LLM(str(HERE / "ct-int8-channel"), max_model_len=64)
    assert llm.memory_plan()["parameters"] < 0.5 * floats.memory_plan()["parameters"]
    prompt = {"prompt_token_ids": [3, 1, 4, 1, 5]}
    sampling = SamplingParams(max_tokens=8, temperature=0)
    one, other = (x.generate([prompt], sampling)[0].outputs[0].token_ids for x in (llm, floats))
    assert one == other
    model = convert.load(HERE / "ct-int8-channel", weights="checkpoint")
    with pytest.raises(ValueError, match=r"_proj.kernel is quantised already, as int8 .* again"):
        LLM(model, max_model_len=64, weights="int4")


def test_there_are_cases_of_every_format():
    said = [
        json.loads((HERE / case / "config.json").read_text())["quantization_config"]
        for case in CASES
    ]
    assert {x["quant_method"] for x in said} == {"compressed-tensors", "awq", "gptq"}
    formats = {x["format"] for x in said if "format" in x}
    assert formats == {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized"}


def test_block_fp8(tmp_path):
    """As DeepSeek and Qwen publish it: the same numbers as compressed-tensors' blocks."""

    def as_fp8(config, tensors):
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        }
        for name in [*tensors]:
            if name.endswith(".weight_scale"):
                tensors[f"{name}_inv"] = tensors.pop(name)

    directory = edited(tmp_path, "ct-fp8-block", as_fp8)
    config, params = convert.load(directory, dtype=jnp.float32)
    expected = np.load(HERE / "ct-fp8-block" / "expected.npz")
    got = logits(config, params, jnp.asarray(expected["tokens"], jnp.int32))[0]
    assert_allclose(got, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("said", ["weight_block_size", "block_structure", None])
def test_block_sizes(tmp_path, said):
    """Blocks of another size, as the config says; or of the usual one where it says nothing."""
    size = [32, 64] if said else [128, 128]

    def reblocked(config, tensors):
        settings = config["quantization_config"]
        if said == "weight_block_size":
            config["quantization_config"] = {"quant_method": "fp8", said: size}
        else:
            scheme = settings["config_groups"]["group_0"]["weights"]
            scheme["block_structure"] = size if said else None
        for name in [*tensors]:
            if name.endswith(".weight_scale"):
                out, inputs = tensors[name.removesuffix("_scale")].shape
                blocks = -(-out // size[0]), -(-inputs // size[1])
                # Each block has the scale of the larger block that holds it.
                rows, columns = (np.arange(n) * m // 128 for n, m in zip(blocks, size, strict=True))
                scale = tensors.pop(name)[rows][:, columns]
                tensors[name + "_inv" * (said == "weight_block_size")] = np.ascontiguousarray(scale)

    directory = edited(tmp_path, "ct-fp8-block", reblocked)
    _, got = convert.load(directory)
    _, wanted = convert.load(HERE / "ct-fp8-block")
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_scale_without_an_axis(tmp_path):
    """One number for a tensor, stored as a scalar and not as a list of one."""

    def without_axis(config, tensors):
        for name in [*tensors]:
            if name.endswith(".weight_scale"):
                tensors[name] = tensors[name].reshape(())

    directory = edited(tmp_path, "ct-fp8-tensor", without_axis)
    expected = np.load(HERE / "ct-fp8-tensor" / "expected.npz")
    for form in (None, "checkpoint"):
        config, params = convert.load(directory, dtype=jnp.float32, weights=form)
        got = logits(config, params, jnp.asarray(expected["tokens"], jnp.int32))[0]
        assert_allclose(got, expected["logits"], atol=1e-4, rtol=0)


def test_activation_and_cache_scales_are_passed_over(tmp_path):
    """They are of numbers that stay floats here."""

    def with_scales(config, tensors):
        for name in ("q_proj.input_scale", "k_proj.k_scale", "v_proj.v_scale"):
            tensors[f"model.layers.0.self_attn.{name}"] = np.full(1, 7, np.float32)

    directory = edited(tmp_path, "ct-fp8-channel", with_scales)
    got, wanted = (convert.load(path)[1] for path in (directory, HERE / "ct-fp8-channel"))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_quantised_model_generates_and_converts(tmp_path):
    llm = LLM(str(HERE / "gptq-int4-g32"), max_model_len=64)
    (output,) = llm.generate(
        [{"prompt_token_ids": [3, 1, 4, 1, 5]}], SamplingParams(max_tokens=5, temperature=0)
    )
    config, params = convert.load(HERE / "gptq-int4-g32")
    convert.save(tmp_path / "orbax", config, params)
    again = LLM(str(tmp_path / "orbax"), max_model_len=64)
    (same,) = again.generate(
        [{"prompt_token_ids": [3, 1, 4, 1, 5]}], SamplingParams(max_tokens=5, temperature=0)
    )
    assert output.outputs[0].token_ids == same.outputs[0].token_ids


Q = "model.layers.0.self_attn.q_proj"


def set_config(**changes):
    return lambda config, tensors: config["quantization_config"].update(changes)


def set_scheme(**changes):
    return lambda config, tensors: config["quantization_config"]["config_groups"]["group_0"][
        "weights"
    ].update(changes)


def set_targets(*targets):
    return lambda config, tensors: config["quantization_config"]["config_groups"]["group_0"].update(
        targets=[*targets]
    )


def drop(part):
    return lambda config, tensors: tensors.pop(f"{Q}.{part}")


def put(part, values):
    return lambda config, tensors: tensors.update({f"{Q}.{part}": values})


@pytest.mark.parametrize(
    ("case", "edit", "words"),
    [
        ("awq-g32", set_config(quant_method="bitsandbytes"), "quantised by bitsandbytes"),
        (
            "awq-g32",
            set_config(quant_method="hqq"),
            r"config.json: .* quantised by hqq .* not supp",
        ),
        (
            "awq-g32",
            set_config(group_size=0),
            r"group_size must be a positive integer or -1, got 0",
        ),
        ("awq-g32", set_config(group_size="32"), "group_size must be .* or -1, got '32'"),
        (
            "awq-g32",
            set_config(group_size=64),
            r"_proj.scales has \d groups for \d+ inputs, and .*config.json says group_size=64$",
        ),
        ("awq-g32", set_config(bits=3), "AWQ of 3 bits is not supported; only 4 is"),
        ("awq-g32", set_config(version="gemv"), "version 'gemv' of AWQ"),
        ("awq-g32", drop("qzeros"), r"q_proj is quantised by awq and has no qzeros"),
        ("awq-g32", drop("qweight"), r"q_proj is quantised by awq and has no qweight"),
        ("awq-g32", put("scales", np.ones((3, 64), np.float16)), "3 groups for 128 inputs"),
        ("awq-g32", put("scales", np.ones((4, 60), np.float16)), r"scales has shape \(4, 60\)"),
        ("awq-g32", put("qzeros", np.ones((4, 8), np.int8)), "qzeros has dtype int8, expected int"),
        ("awq-g32", put("other", np.ones(4, np.float32)), "q_proj.other beside quantised weights"),
        ("gptq-int4-g32", set_config(bits=3), "GPTQ of 3 bits is not supported; 4 and 8 are"),
        (
            "gptq-int4-g32",
            set_config(group_size=-1),
            r"_proj.scales has \d groups for \d+ inputs, and .*config.json says group_size=-1$",
        ),
        (
            "gptq-v2-int4-g32-act-order",
            set_config(group_size=16),
            r"_proj.scales has \d groups for \d+ inputs, and .*config.json says group_size=16$",
        ),
        (
            "gptq-int4-g32",
            set_config(dynamic={"+:.*down_proj": {"bits": 8}, "-:lm_head": {}}),
            r"dynamic '\+:\.\*down_proj' of GPTQ has 8 bits where others have 4",
        ),
        ("gptq-int4-g32", set_config(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
        (
            "gptq-int4-g32",
            put("g_idx", np.full(128, 4, np.int32)),
            r"g_idx must lie in \[0, 3\], got 4 to 4",
        ),
        ("gptq-int4-g32", put("g_idx", np.zeros(64, np.int32)), r"g_idx has shape \(64,\)"),
        ("ct-pack-int4-g32", set_config(format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
        (
            "ct-pack-int4-g32",
            set_scheme(num_bits=3),
            "config.json: weights of 3 bits of type int are not supported; supported: int of 4",
        ),
        (
            "ct-pack-int4-g32",
            set_scheme(num_bits=8),
            r"_proj.weight_packed holds codes of 4 bits, and .*config.json says num_bits=8$",
        ),
        (
            "ct-pack-int4-g32",
            set_scheme(group_size=128),
            r"weight_scale has \d groups for \d+ inputs, and .*config.json says group_size=128",
        ),
        (
            "ct-pack-int4-g32",
            set_targets("Linear", "model.layers.7.mlp.down_proj"),
            r"config.json: config_groups.group_0 is for 'model.layers.7.mlp.down_proj', a layer",
        ),
        (
            "ct-pack-int4-g32",
            set_targets("re:.*experts.*"),
            r"config_groups.group_0 is for '\.\*experts\.\*', a layer that the checkpoint does not",
        ),
        ("ct-pack-int4-g32", set_targets("re:["), r"has 're:\[', which is no regular expression"),
        ("ct-pack-int4-g32", set_targets(7), r"targets must be a list of names, got \[7\]"),
        (
            "ct-pack-int4-g32",
            lambda _, tensors: tensors.update(
                {
                    name.replace("layers.0", "layers.7"): x
                    for name, x in [*tensors.items()]
                    if "o_proj" in name
                }
            ),
            r"unexpected: model.layers.7.self_attn.o_proj.weight",
        ),
        ("ct-pack-int4-g32", drop("weight_shape"), "has no weight_shape"),
        ("ct-pack-int4-g32", drop("weight_scale"), "has no weight_scale"),
        (
            "ct-pack-int4-g32",
            put("weight_shape", np.array([64, 100])),
            r"holds no \[64, 100\] of 4 or 8 bits",
        ),
        (
            "ct-pack-int4-g32",
            put("weight_g_idx", np.zeros(128, np.int32)),
            "weight_g_idx beside quantised weights are not supported",
        ),
        (
            "ct-int8-channel",
            put("weight_scale", np.ones((3, 1), np.float32)),
            r"weight_scale has shape \(3, 1\), which is no scale",
        ),
        (
            "ct-int8-channel",
            put("weight_scale", np.full((64, 1), np.nan, np.float32)),
            "holds values that are not finite",
        ),
        ("ct-fp8-channel", drop("weight_scale"), "has no weight_scale"),
    ],
)
def test_bad_checkpoints(tmp_path, case, edit, words):
    directory = edited(tmp_path, case, edit)
    with pytest.raises((ValueError, NotImplementedError), match=words):
        convert.load(directory)


def test_schemes_that_name_their_layers(tmp_path):
    """By name, by a pattern beside one that matches nothing, and beside a class."""
    for number, targets in enumerate(
        (
            ("model.layers.0.self_attn.q_proj",),
            ("re:.*self_attn.*", "re:.*experts.*"),
            ("Linear", "Embedding"),
        )
    ):
        directory = edited(tmp_path / str(number), "ct-pack-int4-g32", set_targets(*targets))
        got, wanted = (convert.load(x)[1] for x in (directory, HERE / "ct-pack-int4-g32"))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "gfx942"])
def test_fp8_on_a_gpu_without_it(tmp_path, monkeypatch, capability):
    """Refused before anything is read, whoever asks for it; other weights load there."""
    config, params = convert.load(HERE / "ct-fp8-channel", weights="checkpoint")
    convert.save(tmp_path / "orbax", config, params)
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA X", compute_capability=capability)
    devices = jax.devices()
    monkeypatch.setattr("lserve_jax.model.quantise.jax.devices", lambda: [gpu])
    words = f"needs a GPU with fp8, of compute capability 8.9 or more; NVIDIA X has {capability}$"
    for model, weights, what in (
        (
            HERE / "ct-fp8-channel",
            "checkpoint",
            r"model\.layers\.0\.\S*weight, whose codes are fp8,",
        ),
        (tmp_path / "orbax", None, r"layers\.0\.\S*kernel, whose codes are fp8,"),
        (HERE / "awq-g32", "fp8", "weights='fp8'"),
    ):
        with pytest.raises(NotImplementedError, match=f"{what} {words}"):
            convert.load(model, weights=weights)
    for option in ("weights", "prefill_dtype", "kv_dtype"):
        with pytest.raises(NotImplementedError, match=f"{option}='fp8' {words}"):
            EngineOptions(**{option: "fp8"})
    gpu.compute_capability = "8.9"
    assert has_fp8(gpu)
    monkeypatch.setattr("lserve_jax.model.quantise.jax.devices", lambda: devices)
    EngineOptions(weights="fp8")


def test_codes_without_a_word_in_the_config_are_refused(tmp_path):
    directory = edited(
        tmp_path, "ct-int8-channel", lambda config, _: config.pop("quantization_config")
    )
    with pytest.raises(NotImplementedError, match=r"is stored as I8; .*say how they are quantised"):
        convert.load(directory)

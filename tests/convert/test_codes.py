"""Quantised trees in files of ours: written, restored, made from floats on the way."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_checkpoints import LLAMA, random_tensors, run_script, write_hf

import convert
from convert.__main__ import main
from lserve_jax import LLM
from lserve_jax.model.quantise import quantise_params
from pallas_kernels.api import WEIGHT_KINDS, Weight

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "quantised"
# Inputs in whole groups of 32, 64 and 128, in every matrix.
WIDE = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, expected)


def is_weight(x) -> bool:
    return isinstance(x, Weight)


@pytest.fixture
def floats(tmp_path) -> Path:
    return write_hf(tmp_path / "floats", WIDE, random_tensors(WIDE, ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rounded_on_the_way_and_back(tmp_path, kind, tied):
    """A block of rows after another, as the whole tree at once; and through files unchanged."""
    raw = WIDE | {"tie_word_embeddings": tied}
    directory = write_hf(tmp_path / "hf", raw, random_tensors(raw, ml_dtypes.bfloat16))
    config, params = convert.load(directory, weights=kind, weight_group=64)
    assert_same(params, quantise_params(convert.load(directory)[1], kind, group=64))
    convert.save(tmp_path / "orbax", config, params)
    found_config, found = convert.load(tmp_path / "orbax")
    assert found_config == config
    assert_same(found, params)
    assert_same(convert.load(tmp_path / "orbax", weights="checkpoint")[1], params)
    # A dtype is that of what stays floats.
    _, wide = convert.load(tmp_path / "orbax", dtype="float32")
    assert wide["norm"]["scale"].dtype == jnp.float32
    assert is_weight(wide["embed_tokens"]["embedding"]) != tied
    assert_same(*(tree["layers"][0]["mlp"]["down_proj"] for tree in (wide, params)))


@pytest.mark.parametrize("case", sorted(path.name for path in HERE.iterdir() if path.is_dir()))
def test_codes_of_the_libraries_come_back(tmp_path, case):
    if "act-order" in case:
        return  # no codes to keep: test_quantised.py
    config, params = convert.load(HERE / case, weights="checkpoint")
    convert.save(tmp_path / "orbax", config, params)
    assert_same(convert.load(tmp_path / "orbax")[1], params)


def test_two_codes_of_4_bits_take_a_byte(tmp_path, floats):
    convert.save(tmp_path / "int4", *convert.load(floats, weights="int4"))
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(tmp_path / "int4" / "params").item_metadata
    leaf = "layers.1.mlp.down_proj.kernel"
    assert stored[f"{leaf}.codes"].dtype == np.uint8
    assert stored[f"{leaf}.codes"].shape == (128, 128)  # of [256, 128]
    assert stored[f"{leaf}.scale"].shape == stored[f"{leaf}.zero"].shape == (8, 128)
    assert stored["lm_head.kernel.codes"].dtype == np.int8
    table = "embed_tokens.embedding"
    assert stored[f"{table}.codes"].dtype == np.uint8
    assert stored[f"{table}.codes"].shape == (48, 64)  # of [48, 128], along the channels
    assert stored[f"{table}.scale"].shape == stored[f"{table}.zero"].shape == (48, 4)


@pytest.mark.parametrize("weights", [None, *WEIGHT_KINDS])
def test_the_command(tmp_path, floats, weights):
    """The command, and ``LLM`` at load, make the same model; its checkpoint needs no word."""
    options = [] if weights is None else ["--weights", weights, "--group", "64"]
    assert main([str(floats), str(tmp_path / "out"), *options]) == 0
    _, found = convert.load(tmp_path / "out")
    assert_same(found, convert.load(floats, weights=weights, weight_group=64)[1])
    settings = {"max_model_len": 64, "weight_group": 64}
    made = [
        llm.engine.params
        for llm in (
            LLM(tmp_path / "out", max_model_len=64),
            LLM(tmp_path / "out", weights=weights, **settings),
            LLM(floats, weights=weights, **settings),
            LLM(convert.load(floats), weights=weights, **settings),
        )
    ]
    for other in made[1:]:
        assert_same(other, made[0])


def test_the_command_on_quantised_checkpoints(tmp_path):
    """Floats unless it is told to keep the codes, or to make others."""
    awq = HERE / "awq-g32"
    dtypes = {"": None, "checkpoint": "uint4", "int8": "int8"}
    for weights, dtype in dtypes.items():
        out = tmp_path / f"out{weights}"
        assert main([str(awq), str(out), *(["--weights", weights] if weights else [])]) == 0
        kernel = convert.load(out)[1]["layers"][0]["mlp"]["down_proj"]["kernel"]
        assert is_weight(kernel) == (dtype is not None)
        assert dtype is None or kernel.codes.dtype == dtype
    # Ours stay as they are, whether told so or not.
    for weights in ([], ["--weights", "checkpoint"], ["--weights", "int8"]):
        out = tmp_path / f"again{len(list(tmp_path.iterdir()))}"
        assert main([str(tmp_path / "outint8"), str(out), *weights]) == 0
        assert_same(*(convert.load(path)[1] for path in (out, tmp_path / "outint8")))


def test_codes_are_not_turned_into_others(tmp_path, floats, capsys):
    int4 = tmp_path / "int4"
    assert main([str(floats), str(int4), "--weights", "int4"]) == 0
    for options, words in (
        (["int8"], "kernel is quantised already, as uint4 with 32 inputs to a scale"),
        (["int4", "--group", "64"], "weights='int4' in groups of 64 would round it again"),
    ):
        capsys.readouterr()
        out = tmp_path / "out"
        assert main([str(int4), str(out), "--weights", *options]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {int4}: layers.0.") and words in line
        assert not out.exists()
    assert main([str(floats), str(out), "--group", "48"]) == 2
    assert "weight_group=48 must be one of (32, 64, 128)" in capsys.readouterr().err


def test_floats_in_orbax_format_are_rounded(tmp_path, floats):
    convert.save(tmp_path / "orbax", *convert.load(floats))
    for kind in WEIGHT_KINDS:
        found = convert.load(tmp_path / "orbax", dtype="float32", weights=kind)[1]
        assert_same(found, convert.load(floats, dtype="float32", weights=kind)[1])


def test_groups_that_do_not_divide(tmp_path):
    raw = LLAMA | {"hidden_size": 96, "head_dim": 24}
    directory = write_hf(tmp_path / "hf", raw, random_tensors(raw))
    convert.save(tmp_path / "orbax", *convert.load(directory))
    for path in (directory, tmp_path / "orbax"):
        with pytest.raises(
            ValueError, match=r"kernel has 96 inputs, which weight_group=64 does not"
        ):
            convert.load(path, weights="int4", weight_group=64)


def rewrite(path: Path, edit) -> None:
    """Writes the arrays of a checkpoint anew after ``edit`` of them by name."""
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(path / "params")
        edit(arrays)
        shutil.rmtree(path / "params")
        checkpointer.save(path / "params", arrays)
    (path / "files.json").unlink()


DOWN, TABLE = "layers.0.mlp.down_proj.kernel", "embed_tokens.embedding"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda x: x.pop(f"{DOWN}.scale"), f"{DOWN} has codes, and {DOWN}.scale is missing"),
        (lambda x: x.pop(f"{DOWN}.codes"), r"1 missing, 2 unexpected.*\n.*missing: " + DOWN),
        (
            lambda x: x.update({f"{DOWN}.scale": jnp.ones((7, 128))}),
            rf"{DOWN}.scale is float32 \(7, 128\), expected float32 for groups that divide 256 inp",
        ),
        (
            lambda x: x.update({f"{DOWN}.zero": jnp.ones((4, 128))}),
            rf"{DOWN}.zero is float32 \(4, 128\), expected",
        ),
        (
            lambda x: x.update({f"{DOWN}.scale": jnp.ones((8, 128), jnp.bfloat16)}),
            rf"{DOWN}.scale is bfloat16 \(8, 128\), expected float32",
        ),
        (
            lambda x: x.update({f"{DOWN}.codes": jnp.ones((128, 128), jnp.int32)}),
            rf"{DOWN}.codes is int32 \(128, 128\), expected two axes of int8, float8_e4m3fn or",
        ),
        (
            lambda x: x.update({f"{DOWN}.codes": jnp.ones((64, 128), jnp.uint8)}),
            rf"misshapen: {DOWN}, found \(128, 128\), expected \(256, 128\)",
        ),
        (
            lambda x: x.update({f"{DOWN}.scale": jnp.full((8, 128), jnp.nan)}),
            rf"{DOWN}.scale holds values that are not finite",
        ),
        (
            lambda x: x.update({f"{TABLE}.scale": jnp.ones((4, 128))}),
            rf"{TABLE}.scale is float32 \(4, 128\), expected float32 for groups that divide 128 "
            "inputs, times 48 rows",
        ),
        (
            lambda x: x.update({"layers.7.mlp.down_proj.kernel.codes": x[f"{DOWN}.codes"]}),
            "layers.7.mlp.down_proj.kernel has codes, and .* is missing",
        ),
    ],
)
def test_bad_files(tmp_path, floats, edit, words):
    path = tmp_path / "int4"
    convert.save(path, *convert.load(floats, weights="int4"))
    rewrite(path, edit)
    with pytest.raises(ValueError, match=rf"(?s)^{path}.*{words}"):
        convert.load(path)


def test_parts_lie_together_on_several_devices(tmp_path):
    support = Path(__file__).parents[1] / "support"
    script = (support / "sharded_codes.py").read_text()
    run_script(script, tmp_path, PYTHONPATH=f"{ROOT}:{support}")

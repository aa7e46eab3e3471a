"""The notebooks run on a tiny model, with the constants of their first code cell replaced."""

import os
from pathlib import Path

import pytest
from tiny_checkpoints import process_environment, write_chat_model

nbformat = pytest.importorskip("nbformat", reason="extra notebooks")
nbclient = pytest.importorskip("nbclient", reason="extra notebooks")
pytest.importorskip("ipykernel", reason="extra notebooks")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
CONSTANTS = {
    "page_recall": {"PROMPT_TOKENS": 300, "NUM_QUERIES": 8, "PAGE_SIZE": 16, "BUDGETS": (64, 128)},
    "rollouts": {
        **{"PROMPTS": ("A", "Say b."), "ANSWERS": 3, "MAX_TOKENS": 6, "ITERATIONS": 2},
        "LEARNING_RATE": 1e-2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    constants = {"MODEL": str(write_chat_model(tmp_path / "model")), **CONSTANTS[path.stem]}
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    names = {line.split(" = ")[0] for line in first.source.splitlines()}
    assert names == constants.keys()
    first.source = "\n".join(f"{name} = {value!r}" for name, value in constants.items())
    environment = process_environment(PYTHONPATH=str(ROOT), IPYTHONDIR=str(tmp_path / "ipython"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3")
    client.execute(cwd=os.fspath(tmp_path))  # raises CellExecutionError, with the traceback
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output for output in outputs if output.output_type == "stream"] == []  # no warnings
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert {"image/png", "text/html"} <= kinds  # figures and tables


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_all_are_tested():
    assert [path.stem for path in NOTEBOOKS] == sorted(CONSTANTS)

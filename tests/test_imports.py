"""Imports go one way, and the map of the code names every file.

The rules are those of docs/architecture.md; they are read from the source, not from what happens
to be loaded.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lserve_jax", "pallas_kernels", "convert")
ARCHITECTURE = ROOT / "docs" / "architecture.md"

# What each package may import beside the standard library and itself.
ALLOWED = {
    "pallas_kernels": {"jax", "numpy", "jaxtyping"},
    "convert": {
        *("jax", "numpy", "jaxtyping", "flax", "orbax", "safetensors", "gguf", "tqdm", "tyro"),
        *("huggingface_hub", "lserve_jax.config", "lserve_jax.llama", "lserve_jax.tokenizer"),
    },
    "lserve_jax": {
        *("jax", "numpy", "jaxtyping", "flax", "tokenizers", "jinja2", "gguf", "tqdm", "tyro"),
        *("matplotlib", "optax", "safetensors", "lm_eval", "convert", "pallas_kernels.api"),
    },
}

# Modules of lserve_jax from the bottom up; a module imports only from rows above its own.
LAYERS = (
    ("config",),
    ("linear", "rope", "sampling", "gguf_tokenizer", "prefix"),
    ("tokenizer", "llama", "cache"),
    ("page_selection", "relay"),
    ("attention", "metrics"),
    ("functional", "decode", "gate_training", "request"),
    ("scheduler",),
    ("engine", "passkeys"),
    ("outputs", "stats"),
    ("llm",),
    ("analysis", "batch"),
    ("generate", "calibrate"),
    ("eval.prompts", "eval.scoring", "eval.settings", "eval.report"),
    ("eval.needle", "eval.ruler", "eval.language", "eval.model", "eval.lm_eval"),
    ("eval.study",),
    ("eval.__main__",),
)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it.

    ``from a import b`` counts as ``a.b`` where that is a module of ours, else as ``a``.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (ROOT / f"{whole.replace('.', '/')}.py").exists()
                names.add(whole if is_module else str(node.module))
    return names


def forbidden(package: str, name: str) -> bool:
    parts = name.split(".")
    if parts[0] == package or parts[0] in sys.stdlib_module_names:
        return False
    prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
    return not prefixes & ALLOWED[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in sorted(imports(path))
        if forbidden(package, name)
    ]
    assert not wrong, "\n".join(wrong)


def test_lserve_jax_modules_import_downwards():
    rank = {module: i for i, row in enumerate(LAYERS) for module in row}
    wrong = []
    for path in modules("lserve_jax"):
        module = ".".join(path.relative_to(ROOT / "lserve_jax").with_suffix("").parts)
        if path.stem == "__init__":
            continue
        assert module in rank, f"{path.name} has no place in LAYERS"
        for name in imports(path):
            package, _, imported = name.partition(".")
            if package != "lserve_jax" or not imported:
                continue
            if rank[imported] >= rank[module]:
                wrong.append(f"{module} (row {rank[module]}) imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_allowed_third_party_packages_are_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["hub"], *extras["plot"], *extras["eval"]]
    declared = {re.split(r"[<>=]", name)[0] for name in wanted}
    imported_as = {"orbax-checkpoint": "orbax", "lm-eval": "lm_eval"}
    declared = {imported_as.get(name, name) for name in declared}
    allowed = {name.split(".")[0] for names in ALLOWED.values() for name in names}
    assert allowed - set(PACKAGES) == declared - {"jaxlib"}


def mapped_files() -> set[str]:
    """Paths that begin a line of the map: the fenced block under "## Map"."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    block = re.search(r"^## Map\n.*?^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block, "docs/architecture.md has no fenced block under '## Map'"
    folder, files = "", set()
    for line in block.group(1).splitlines():
        if not line.strip():
            continue
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            files |= set() if folder else {name}
        else:
            files.add(folder + name)
    return files


def test_the_map_names_every_file_and_no_other():
    mapped = mapped_files()
    absent = [name for name in mapped if not (ROOT / name).exists()]
    assert not absent, f"in the map but not in the tree: {absent}"
    folders = (*PACKAGES, "benchmarks", "examples")
    present = {str(path.relative_to(ROOT)) for folder in folders for path in modules(folder)}
    present |= {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    unmapped = sorted(name for name in present - mapped if not name.endswith("__init__.py"))
    assert not unmapped, f"in the tree but not in the map: {unmapped}"


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "docs/glossary.md"])
def test_documents_point_at_files_that_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    paths = re.findall(
        r"`((?:lserve_jax|pallas_kernels|convert|tests|benchmarks|examples|docs)/[\w./-]+)`", text
    )
    absent = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    absent += [path for path in paths if not (ROOT / path).exists()]
    assert not absent, f"{document} points at {absent}"

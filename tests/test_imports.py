"""Imports go one way, and the map of the code names every file.

The rules are those of docs/architecture.md; they are read from the source, not from what happens
to be loaded.
"""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lserve_jax", "pallas_kernels", "convert")
ARCHITECTURE = ROOT / "docs" / "architecture.md"

# What each package may import beside the standard library, itself and the rooms below it.
ALLOWED = {
    "pallas_kernels": {"jax", "numpy", "jaxtyping"},
    "convert": {
        *("jax", "numpy", "jaxtyping", "flax", "orbax", "safetensors", "gguf", "tqdm", "tyro"),
        *("huggingface_hub", "tokenizers"),
    },
    "lserve_jax": {
        *("jax", "numpy", "jaxtyping", "flax", "tokenizers", "jinja2", "tqdm", "tyro"),
        *("matplotlib", "optax", "safetensors", "lm_eval"),
        *("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance"),
    },
}

# Rooms from the bottom up: a folder, or a file that stands by itself. A module imports from its own
# room and from rows above its own.
ROOMS = (
    (
        *("pallas_kernels", "lserve_jax.checks", "lserve_jax.cores", "lserve_jax.lazy"),
        "lserve_jax.template_bounds",
    ),
    (
        *("lserve_jax.model", "lserve_jax.sampling_params"),
        *("lserve_jax.chat_template", "lserve_jax.control_text"),
    ),
    ("lserve_jax.tokenizer",),
    ("lserve_jax.attention", "convert"),
    ("lserve_jax.engine", "lserve_jax.functional"),
    ("lserve_jax.outputs", "lserve_jax.stats", "lserve_jax.memory", "lserve_jax.constraints"),
    ("lserve_jax.text_engine", "lserve_jax.cli"),
    ("lserve_jax.llm",),
    ("lserve_jax.analysis", "lserve_jax.batch", "lserve_jax.async_engine", "lserve_jax.model_args"),
    ("lserve_jax.generate", "lserve_jax.calibrate", "lserve_jax.eval", "convert.__main__"),
    ("lserve_jax.serve",),
    ("lserve_jax.scripts",),
)
# What a room takes of the package below it, where that is not all.
DOORS = {
    "pallas_kernels": ("pallas_kernels.api",),
    "convert": (
        *("lserve_jax.checks", "lserve_jax.cores", "lserve_jax.model", "lserve_jax.tokenizer"),
        "pallas_kernels.api",  # the types of what parameters hold
    ),
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it.

    ``from a import b`` counts as ``a.b`` where that is a module of ours, else as ``a``.
    """
    return {
        name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imports_of(node)
    }


def imports_of(node: ast.AST) -> set[str]:
    """The names that one statement imports; none if it is no import."""
    names = set()
    if isinstance(node, ast.Import):
        names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{ast.unparse(node)} is a relative import"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            is_module = (ROOT / f"{whole.replace('.', '/')}.py").exists()
            names.add(whole if is_module else str(node.module))
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    rooms = [r for row in ROOMS for r in row if module == r or module.startswith(f"{r}.")]
    assert rooms, f"{module} has no place in ROOMS"
    return max(rooms, key=len)  # a program stands above the room in whose folder it lies


def imports_of_all() -> dict[str, set[str]]:
    """What every module of the three packages imports; the packages' own ``__init__`` left out."""
    paths = [path for package in PACKAGES for path in modules(package)]
    return {module_name(p): imports(p) for p in paths if module_name(p) != "lserve_jax"}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in sorted(imports(path))
        if (top := name.split(".")[0]) not in {*sys.stdlib_module_names, *PACKAGES}
        and top not in ALLOWED[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_import_downwards():
    rank = {room: i for i, row in enumerate(ROOMS) for room in row}
    wrong = []
    for module, names in imports_of_all().items():
        room = room_of(module)
        for name in names:
            # The version is all that the package's own __init__ gives to its modules.
            if name.split(".")[0] not in PACKAGES or name == "lserve_jax":
                continue
            other = room_of(name)
            if other != room and rank[other] >= rank[room]:
                wrong.append(f"{module} imports {name}, which is not below it")
            elif other == "pallas_kernels" and room != other and name not in DOORS[other]:
                wrong.append(f"{module} imports {name}: kernels are reached through api")
            elif room == "convert" and not {other, name} & {"convert", *DOORS[room]}:
                wrong.append(f"{module} imports {name}: convert takes {DOORS[room]} only")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_files_import_one_another_in_a_circle():
    graph = {m: {n for n in names if n != m} for m, names in imports_of_all().items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        # Who reads a checkpoint does not load the engine,
        ("import convert", ("lserve_jax.attention", "lserve_jax.engine", "lserve_jax.llm")),
        # nor who names the package any of it; no one loads Pallas before a kernel is called.
        ("import lserve_jax", ("jax", "flax", "lserve_jax.model")),
        ("from lserve_jax import LLM", ("jax.experimental.pallas", "pallas_kernels.hopper")),
        # No program loads what only tracing, training or pictures need.
        ("import lserve_jax.generate", ("flax", "optax", "orbax", "matplotlib", "starlette")),
        ("from pallas_kernels import api", ("lserve_jax", "jax.experimental.pallas", "flax")),
    ],
)
def test_what_an_import_does_not_load(program, absent):
    command = f"import sys; {program}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def declared_packages(*extras: str) -> set[str]:
    """Import names of what the project and these extras declare, not of what those need in turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    names = {re.split(r"[<>=\[]", name)[0] for name in wanted}
    imported_as = {"orbax-checkpoint": "orbax"}
    return {imported_as.get(name, name).replace("-", "_") for name in names}


def test_allowed_third_party_packages_are_declared_dependencies():
    allowed = {name.split(".")[0] for names in ALLOWED.values() for name in names}
    declared = declared_packages("hub", "plot", "eval", "serve")
    assert allowed - set(PACKAGES) == declared - {"jaxlib"}


def test_tests_import_only_what_their_extra_declares():
    # What some package happens to bring along may be gone with its next release.
    tests = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "tests" / "support").glob("*.py")]
    ours = {path.stem for path in ROOT.rglob("*.py")} | {"shapes"} | set(PACKAGES)
    extras = ("hub", "plot", "eval", "serve", "test", "transformers")
    declared = declared_packages(*extras) | {"selenium"}  # by tests/browser/run
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(tests)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        for name in imports_of(node)
        if name.split(".")[0] not in {*sys.stdlib_module_names, *ours, *declared}
    ]
    assert not wrong, "\n".join(wrong)


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

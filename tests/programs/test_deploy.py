"""The files of examples/deploy name options, scripts and folders that exist."""

import configparser
import re
import shlex
import tomllib
from pathlib import Path

import tyro

from lserve_jax.serve.__main__ import ServeArgs

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def options(command: list[str]) -> ServeArgs:
    """Those of a command line of the installed program."""
    program, *given = command
    assert Path(program).name in PROJECT["project"]["scripts"]
    return tyro.cli(ServeArgs, args=given)


def test_the_unit_leaves_time_for_answers_to_finish():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "lserve.service")
    service = unit["Service"]
    command = shlex.split(service["ExecStart"])
    assert command.pop() == "$LSERVE_ARGS"
    assert int(service["TimeoutStopSec"]) > options(command).shutdown_seconds
    assert service["KillSignal"] == "SIGTERM"


def test_the_image_has_what_is_installed():
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*wheel, "pyproject.toml", PROJECT["project"]["readme"]} <= set(copied)
    [install] = [line for line in lines if "pip install" in line]
    extras = re.search(r"\[(.*)\]", install).group(1).split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    [entry] = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert options(re.findall(r'"(.*?)"', entry)).host == "0.0.0.0"

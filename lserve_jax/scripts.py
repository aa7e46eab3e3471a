"""Where the installed programs begin: ``lserve-generate`` and the others of ``pyproject.toml``.

Their modules take seconds to import. Ctrl-C meanwhile ends them as it ends ``python -m ...``:
without a traceback.
"""

import importlib
import signal


def generate() -> int:
    return _run("lserve_jax.generate")


def convert() -> int:
    return _run("convert.__main__")


def calibrate() -> int:
    return _run("lserve_jax.calibrate.__main__")


def evaluate() -> int:
    return _run("lserve_jax.eval.__main__")


def serve() -> int:
    return _run("lserve_jax.serve.__main__")


def _run(module: str) -> int:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # main hears it again
    return importlib.import_module(module).main()

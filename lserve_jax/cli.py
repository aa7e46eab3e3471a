"""What the command lines share: how options show in help, files of text, exit codes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
from tyro.conf import FlagCreatePairsOff, arg

from convert.artefacts import cache_directory

# An option without a value.
Switch = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]


def flag(metavar: str, otherwise: str) -> object:
    """How help shows an option: what follows it, and what happens without it."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {otherwise})")


def enable_compile_cache() -> None:
    """Keeps compiled code between starts, so that the second one is quick."""
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "jit"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file, without a byte order mark; an error names it as ``what``.

    Raises ``ValueError`` for a file that does not exist or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{what} {str(path)!r} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {str(path)!r} is not UTF-8: {error}") from None


def read_stdin() -> str:
    """The text on standard input, as ``read_text`` gives a file's; an error says what is wrong."""
    if sys.stdin is None:  # as Python has it where a shell says <&-
        raise ValueError("standard input is closed, and the prompt was to come from it")
    try:
        return sys.stdin.read().removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not text: {error}") from None


def exit_code(program: Callable[[], None]) -> int:
    """Runs ``program``; 0, or 2 with one sentence on stderr for what its user can mend."""
    try:
        program()
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # what shells report for Ctrl-C
    return 0

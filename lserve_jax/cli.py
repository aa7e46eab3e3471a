"""What the command lines share: how options show in help, files of text, exit codes."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, Any, TextIO

import jax
from tyro.conf import FlagCreatePairsOff, arg

from convert.artefacts import cache_directory
from lserve_jax.engine.program_files import make_own_directory
from lserve_jax.memory import memory_wanted

# An option without a value.
Switch = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]


def flag(metavar: str, otherwise: str) -> object:
    """How help shows an option: what follows it, and what happens without it."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {otherwise})")


def keep_compiled(cache: bool) -> bool:
    """Whether an ``LLM`` keeps its programs between starts: its ``compilation_cache``.

    If so JAX keeps its own, those of all other functions, in a directory beside them. Neither is
    done where others can write to that one.
    """
    if not cache:
        return False
    directory = cache_directory() / "jit"
    try:
        make_own_directory(directory)
    except OSError as error:
        print(f"nothing compiled is kept: {error}", file=sys.stderr)
        return False
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return True


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


def exit_code(
    program: Callable[[], None],
    *,
    lower: str = "--max-model-len, --max-num-seqs or --kv-cache-bytes",
) -> int:
    """Runs ``program``, which parses its command line too; the exit code.

    0; 2 with one sentence on stderr for what its user can mend; 130 after Ctrl-C; 141 where the
    reader of standard output has gone, as in ``| head``. The last two are what shells report, and
    nothing is said. ``lower`` names the options that decide how much memory is needed.
    """
    _stand_in_for_closed_streams()
    stdout, sys.stdout = sys.stdout, _Stdout(sys.stdout)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # so it was during the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            program()
        finally:
            flush_stdout()
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        return _refuse(str(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        wanted = memory_wanted(error.__cause__) or memory_wanted(error)
        if wanted is None:
            raise
        return _refuse(f"out of memory: {wanted}; lower {lower}")
    finally:
        sys.stdout = stdout
    return 0


class _Stdout:
    """Standard output, named by its errors; also those of a text longer than its buffer."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with _named_as_stdout():
            return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def flush_stdout() -> None:
    """Raises ``OSError`` that names standard output if it cannot be written."""
    with _named_as_stdout():
        sys.stdout.flush()


@contextlib.contextmanager
def _named_as_stdout() -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_stdout()
        raise OSError(f"standard output cannot be written: {error}") from None


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _stand_in_for_closed_streams() -> None:
    """Python has None for a stream that was closed before it began, as by ``>&-`` in a shell.

    What goes to stderr is lost then; what goes to stdout fails when it is written.
    """
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


def _forget_stdout() -> None:
    """Nobody takes what is left in its buffer; at its end Python would try again, and complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)

"""A service with OpenAI's API: ``python -m lserve_jax.serve --model … --port 8000``.

Its log goes to stderr, a line of JSON a request. SIGTERM and Ctrl-C end it: what runs is finished,
within ``--shutdown-seconds``.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it, no traceback

import asyncio
import gc
import logging
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import tyro
import uvicorn
from tyro.conf import DisallowNone, UseAppendAction

from lserve_jax.async_engine import AsyncEngine
from lserve_jax.cli import exit_code, flag
from lserve_jax.engine.relay import RelayMode
from lserve_jax.model_args import ModelArgs
from lserve_jax.serve.app import KEEP_ALIVE_SECONDS, create_app
from lserve_jax.serve.service import Service, ServiceOptions

log = logging.getLogger("lserve_jax.serve")

_KEY_VARIABLE = "LSERVE_API_KEY"
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServeArgs(ModelArgs):
    """Serve a Llama-family model with OpenAI's API.

    Clients take http://HOST:PORT/v1 as their base URL; a page to chat with is at /.
    """

    host: Annotated[str, flag("HOST", "this machine only")] = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one: give an --api-key then."""
    port: int = 8000
    """Port to listen at; 0 takes a free one, which the log names."""
    api_key: Annotated[
        UseAppendAction[tuple[str, ...]], flag("KEY", f"${_KEY_VARIABLE}, else none is needed")
    ] = ()
    """A key that opens the service; may be given several times."""
    served_model_name: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME", "as --model")] = ()
    """The model's name for clients; may be given several times."""

    max_num_seqs: int = 8
    """So many completions run at the same time."""
    warmup: Literal["none", "auto", "full"] = "auto"
    """Compile before it says ready: what a short request alone needs, or all usual shapes."""
    max_queue: int = 256
    """So many more may wait; beyond it a request is answered 429."""
    relay: RelayMode = "auto"
    """Whether requests that begin alike read that together; auto: where it pays."""
    max_prefixes: int = 8
    """With lserve attention: prompts, beside those that run, whose windows there is room for."""
    deadline: Annotated[float | None, flag("SECONDS", "none")] = None
    """After so long an answer ends as it is, unless its request says otherwise."""
    max_body_bytes: int = 16 << 20
    """Longest body of a request."""
    shutdown_seconds: int = 30
    """How long answers may take to finish after SIGTERM."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """info: a line a request; warning: only what goes wrong."""


def _names(args: ServeArgs) -> tuple[str, ...]:
    if args.served_model_name:
        return args.served_model_name
    # Of a directory the last part: clients should not have to know where it lies.
    return (Path(args.model).name if os.path.exists(args.model) else args.model,)


def _keys(args: ServeArgs) -> tuple[str, ...]:
    given = os.environ.get(_KEY_VARIABLE)
    keys = args.api_key or (() if given is None else (given,))
    if not all(keys):
        raise ValueError(f"--api-key and ${_KEY_VARIABLE} must not be empty")
    for key in keys:
        if key != key.strip() or not key.isprintable():
            raise ValueError("an API key must not begin or end with a space or hold control codes")
    if not keys and args.host not in _THIS_MACHINE:
        log.warning("no API key is set: whoever reaches %s can use the service", args.host)
    return keys


def _check(args: ServeArgs) -> None:
    for name, least in (("max_queue", 0), ("max_body_bytes", 1024), ("shutdown_seconds", 0)):
        value = getattr(args, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.deadline is not None and not args.deadline > 0:
        raise ValueError(f"--deadline {args.deadline} must be positive")


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s", force=True)
    logging.getLogger("lserve_jax").setLevel(level.upper())
    # Of uvicorn's own lines only what goes wrong: ours say the rest.
    logging.getLogger("uvicorn").setLevel("WARNING")


def _main(args: ServeArgs) -> None:
    _check(args)
    _log_to_stderr(args.log_level)
    keys = _keys(args)
    with _listener(args) as listener:
        _serve(args, keys, listener)


def _serve(args: ServeArgs, keys: tuple[str, ...], listener: socket.socket) -> None:
    llm = args.load(
        max_num_seqs=args.max_num_seqs,
        max_prefixes=args.max_prefixes,
        relay=args.relay,
        seed=secrets.randbits(31),  # of requests that give none
    )
    options = ServiceOptions(
        model_names=_names(args),
        api_keys=keys,
        max_queue=args.max_queue,
        max_body_bytes=args.max_body_bytes,
        deadline=args.deadline,
    )
    service = Service(engine=AsyncEngine(llm.text_engine), options=options)
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,  # ours has the request's id
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=args.shutdown_seconds,
    )
    # What is there now stays. Python's collector would go through all of it now and then, and no
    # answer goes on meanwhile.
    gc.collect()
    gc.freeze()
    _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says where it listens once it does, and what it waits for at its end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving at http://{shown}:{port}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets answers finish, the second one ends them."""
        if self.should_exit:
            self._loop.call_soon_threadsafe(self._end_answers)
            return
        super().handle_exit(sig, frame)
        log.info(
            "shutting down: %d requests may finish within %s s; a second signal ends them now",
            len(self.server_state.tasks),
            self.config.timeout_graceful_shutdown,
        )

    def _end_answers(self) -> None:
        for task in self.server_state.tasks:
            task.cancel()


def _listener(args: ServeArgs) -> socket.socket:
    """Bound before a model is loaded, so that a port that is taken is said at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(
            f"cannot listen at --host {args.host} --port {args.port}: {error}"
        ) from None
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: this process's); returns the exit code."""

    def run() -> None:
        prog = "python -m lserve_jax.serve"
        _main(tyro.cli(ServeArgs, args=argv, prog=prog, config=(DisallowNone,)))

    return exit_code(run, lower="--max-model-len, --max-num-seqs or --kv-cache-bytes")


if __name__ == "__main__":
    sys.exit(main())

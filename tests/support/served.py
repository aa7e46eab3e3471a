"""A tiny model behind a real HTTP server on a free port, and its tokenizer with a chat template."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import uvicorn
from tiny_checkpoints import LLAMA, process_environment, random_tensors, write_hf
from tiny_llm import tiny_config, tiny_params

from lserve_jax import LLM
from lserve_jax.async_engine import AsyncEngine
from lserve_jax.serve.app import KEEP_ALIVE_SECONDS, create_app
from lserve_jax.serve.service import Service, ServiceOptions
from lserve_jax.tokenizer import Tokenizer

MODEL = "tiny"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIALS = ("<|im_start|>", "<|im_end|>")


def byte_tokenizer(template: str = TEMPLATE) -> Tokenizer:
    """A token for each byte, and two special ones; an answer ends at ``<|im_end|>``."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIALS))
    end = backend.token_to_id("<|im_end|>")
    return Tokenizer(
        backend=backend,
        markers={"eos_token": "<|im_end|>"},
        eos_token_ids=(end,),
        chat_template=template,
    )


def tiny_llm(tokenizer: Tokenizer | None = None, *, layers: int = 1, **options: Any) -> LLM:
    """Random weights over the vocabulary of ``byte_tokenizer``."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    vocabulary = tokenizer.vocab_size
    config = tiny_config(layers=layers, kv_heads=2, max_len=2048, vocab_size=vocabulary)
    options = {"max_num_seqs": 4, "max_model_len": 1024, "burst_steps": 4} | options
    return LLM((config, tiny_params(config)), tokenizer=tokenizer, **options)


def write_served_model(directory: Path, *, length: int = 1024, template: str = TEMPLATE) -> str:
    """A random checkpoint of ``length`` tokens of context with ``byte_tokenizer``; its path."""
    tokenizer = byte_tokenizer(template)
    (end,) = tokenizer.eos_token_ids
    config = LLAMA | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": length}
    config |= {"bos_token_id": None, "eos_token_id": end}
    tokenizer.save(write_hf(directory, config, random_tensors(config)))
    return str(directory)


class _Server(uvicorn.Server):
    """Says when it listens, in place of being asked again and again."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@dataclass(kw_only=True)
class Served:
    """A running server."""

    llm: LLM
    service: Service
    url: str  # without a slash at its end
    port: int
    server: _Server = field(repr=False)


@contextlib.contextmanager
def serve(llm: LLM, **options: Any) -> Iterator[Served]:
    """Serves ``llm`` until the block ends; ``options`` are those of ``ServiceOptions``."""
    service = Service(
        engine=AsyncEngine(llm.text_engine),
        options=ServiceOptions(**{"model_names": (MODEL,)} | options),
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        server.listening.wait()
        port = listener.getsockname()[1]
        yield Served(
            llm=llm, service=service, url=f"http://127.0.0.1:{port}", port=port, server=server
        )
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def program(
    *options: str, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen, str]]:
    """``python -m lserve_jax.serve`` in a process of its own, listening: (process, its URL).

    It compiles what is asked for, with the tests' cache of compiled code.
    """
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lserve_jax.serve", "--port", "0"),
            *("--no-cache", "--warmup", "none", *options),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(**(env or {})),
    )
    assert process.stderr is not None
    try:
        seen = []
        while "serving at" not in (line := process.stderr.readline()):
            assert line, "".join(seen)
            seen.append(line)
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()

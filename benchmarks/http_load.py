"""The server in a process of its own, and streams from it whose tokens are timed."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm


@dataclass(kw_only=True)
class Timeline:
    """When a request came and when its tokens did; seconds since the run began."""

    arrival: float
    times: list[float] = field(default_factory=list)  # of each chunk
    tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that a prefix had
    text: str = ""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival

    @property
    def e2el(self) -> float:
        return self.times[-1] - self.arrival

    @property
    def tpot(self) -> float:
        """0 for a single token."""
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def itl(self) -> list[float]:
        return np.diff(self.times).tolist()


def cpu_seconds(process: int) -> float:
    """What a process has used of all cores."""
    # Behind its name, in parentheses: fields 14 and 15 of proc(5), in clock ticks.
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def server(options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """``python -m lserve_jax.serve`` at a free port of this machine: (its URL, its process).

    Raises ``RuntimeError``, with what it said, if it ends before it listens.
    """
    command = [sys.executable, "-m", "lserve_jax.serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("serving at "):
                    break
            else:
                raise RuntimeError(f"the server ended before it listened: {''.join(said)}")
            # Its log would fill the pipe, and it would wait for a reader.
            reader = threading.Thread(target=process.stderr.read)
            reader.start()
            yield said[-1].split()[-1], process.pid
        finally:
            process.terminate()
        reader.join()


def connection(url: str, api_key: str | None) -> dict[str, Any]:
    """What httpx's clients take; they wait as long as it takes."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"base_url": url, "headers": headers, "timeout": None}


def counters(client: httpx.Client) -> dict[str, float]:
    """The server's counters and gauges, by name without ``lserve:``."""
    families = text_string_to_metric_families(_checked(client.get("/metrics")).text)
    samples = [s for f in families if f.type in ("counter", "gauge") for s in f.samples]
    return {s.name.removeprefix("lserve:"): s.value for s in samples if len(s.labels) == 1}


@contextlib.contextmanager
def held_prefixes(client: httpx.Client, prefixes: Sequence[np.ndarray]) -> Iterator[None]:
    """The server holds ``prefixes`` until the block ends."""
    names = []
    try:
        for prefix in prefixes:
            answer = client.post("/v1/prefixes", json={"prompt": prefix.tolist()})
            names.append(_checked(answer).json()["id"])
        yield
    finally:
        for name in names:
            _checked(client.delete(f"/v1/prefixes/{name}"))


def run_streams(
    options: Mapping[str, Any],
    bodies: Sequence[Mapping[str, Any]],
    arrivals: Sequence[float] | np.ndarray,
    *,
    title: str,
) -> list[Timeline]:
    """Streams of /v1/completions, each asked for when its time has come.

    ``options`` are those of ``connection``. Raises ``RuntimeError`` if any is refused or broken.
    """
    return asyncio.run(_run_streams(options, bodies, arrivals, title))


async def _run_streams(
    options: Mapping[str, Any],
    bodies: Sequence[Mapping[str, Any]],
    arrivals: Sequence[float] | np.ndarray,
    title: str,
) -> list[Timeline]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    lines = [Timeline(arrival=float(arrival)) for arrival in arrivals]
    with tqdm(total=len(bodies), desc=title, unit="request") as bar:
        async with httpx.AsyncClient(**options, limits=limits) as client:
            begin = time.perf_counter()

            async def one(line: Timeline, content: bytes) -> None:
                await asyncio.sleep(line.arrival - (time.perf_counter() - begin))
                await _stream(client, content, line, begin)
                bar.update()

            streamed = {"stream": True, "stream_options": {"include_usage": True}}
            contents = [json.dumps({**body, **streamed}).encode() for body in bodies]
            await asyncio.gather(*map(one, lines, contents))
    return lines


async def _stream(client: httpx.AsyncClient, content: bytes, line: Timeline, begin: float) -> None:
    """One request; what comes of it goes into ``line``."""
    async with client.stream("POST", "/v1/completions", content=content) as answer:
        if answer.is_error:
            await answer.aread()
        _checked(answer)
        async for event in answer.aiter_lines():
            if not event.startswith("data: {"):
                continue
            now = time.perf_counter() - begin
            chunk = json.loads(event.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(f"a stream broke: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                line.times.append(now)
                line.text += choice["text"]
            if chunk["usage"] is not None:
                line.tokens = chunk["usage"]["completion_tokens"]
                line.cached_tokens = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        raise RuntimeError(f"{answer.request.url} answered {answer.status_code}: {answer.text}")
    return answer

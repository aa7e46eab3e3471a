"""From requests that are ready to run to an answer, whole or as a stream of chunks.

Chats and completions differ in what a choice looks like, and in nothing else.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lserve_jax.outputs import CompletionOutput, RequestOutput, TextDelta
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.serve import wire
from lserve_jax.serve.bodies import GenerationBody
from lserve_jax.serve.http import EventStream, log_fields, unless_gone
from lserve_jax.serve.service import Service, outputs
from lserve_jax.text_engine import CheckedPrompt

Choice = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Requests that are ready to run, and how their answer is written.

    object: what a whole answer is called; ``chunk_object`` a part of one.
    choice: (position of the prompt, its output, one of its completions) to a choice.
    chunks: (position of the prompt, what is new) to choices of a chunk; none: no chunk is sent.
    record_reads: what its tokens read can be asked for by ``id``, once it is through.
    """

    id: str
    object: str
    chunk_object: str
    service: Service
    body: GenerationBody
    prompts: list[CheckedPrompt]
    sampling: SamplingParams  # of every prompt
    choice: Callable[[int, RequestOutput, CompletionOutput], Choice]
    chunks: Callable[[int, TextDelta], list[Choice]]
    record_reads: bool = False  # of the only completion

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and chunk begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.service.now(),
            "model": self.service.model_name,
        }


async def respond(request: Request, answer: Answer) -> Response:
    """Runs the requests; they are cancelled when the client goes."""
    log_fields(request).update(id=answer.id, prompt_tokens=answer.prompt_tokens)
    if answer.body.stream:
        events = _events(answer, log_fields(request))
        await anext(events)  # what is refused is refused before the status is out
        return EventStream(events)
    whole = await unless_gone(request.receive, _whole(answer))
    if whole is None:
        return Response(status_code=499)  # nobody reads it
    body, used = whole
    log_fields(request).update(
        completion_tokens=used["completion_tokens"],
        cached_tokens=used["prompt_tokens_details"]["cached_tokens"],
    )
    return Response(body, media_type="application/json")


def _run(answer: Answer) -> AbstractAsyncContextManager[AsyncIterable[tuple[int, TextDelta]]]:
    return answer.service.run(
        answer.prompts,
        [answer.sampling] * len(answer.prompts),
        answer.body.deadline,
        record_reads=answer.record_reads,
    )


def _keep_reads(answer: Answer, output: RequestOutput) -> None:
    if answer.record_reads:
        answer.service.reads.add(answer.id, output.prompt_token_ids, output.outputs[0])


async def _whole(answer: Answer) -> tuple[bytes, dict[str, Any]]:
    """The answer's JSON and its usage."""
    async with _run(answer) as stream:
        done = await outputs(stream)
    for output in done:
        _keep_reads(answer, output)
    # Log probabilities of long prompts take seconds to write down.
    return await asyncio.to_thread(_written, answer, done)


def _written(answer: Answer, done: list[RequestOutput]) -> tuple[bytes, dict[str, Any]]:
    choices = [
        answer.choice(position, output, completion)
        for position, output in enumerate(done)
        for completion in output.outputs
    ]
    usage = wire.usage_of(done)
    whole = {**answer.head(answer.object), "choices": choices, "usage": usage}
    return bytes(JSONResponse(whole).body), usage


async def _events(answer: Answer, logged: dict[str, Any]) -> AsyncGenerator[bytes]:
    """The answer in chunks; the first event is empty: the requests were taken."""
    body = answer.body
    head = answer.head(answer.chunk_object)
    completion_tokens = 0
    cached: dict[int, int] = {}  # by position of the prompt

    def usage() -> dict[str, Any]:
        return wire.usage(answer.prompt_tokens, completion_tokens, sum(cached.values()))

    async with _run(answer) as stream:
        yield b""
        async for position, delta in stream:
            if delta.error is not None:
                raise delta.error
            completion_tokens += len(delta.token_ids)
            if delta.num_cached_tokens is not None:
                cached[position] = delta.num_cached_tokens
            logged["completion_tokens"] = completion_tokens
            logged["cached_tokens"] = sum(cached.values())
            if delta.output is not None:
                _keep_reads(answer, delta.output)
            choices = answer.chunks(position, delta)
            if not choices:
                continue
            chunk = {**head, "choices": choices}
            if body.wants_continuous_usage:
                chunk["usage"] = usage()
            elif body.wants_usage:
                chunk["usage"] = None
            yield wire.event(chunk)
    if body.wants_usage:
        yield wire.event({**head, "choices": [], "usage": usage()})
    yield wire.DONE

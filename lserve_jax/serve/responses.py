"""POST /v1/responses: OpenAI's newer way to ask for a text, whole or as a stream of typed events.

A request becomes a chat, and its answer an output of one message. Nothing is stored: a client
sends the whole conversation each time.
"""

import itertools
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lserve_jax.outputs import RequestOutput, TextDelta
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.serve import wire
from lserve_jax.serve.bodies import HARMLESS, Body, ChatBody
from lserve_jax.serve.chat import chat_prompt
from lserve_jax.serve.errors import ApiError, as_api_error
from lserve_jax.serve.http import EventStream, log_error, log_fields, read_body, unless_gone
from lserve_jax.serve.service import Service, outputs
from lserve_jax.text_engine import CheckedPrompt

# Fields of chats that responses may have too; chats check them.
AS_IN_CHATS = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "stop", "stop_token_ids"),
        *("ignore_eos", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("skip_special_tokens", "include_stop_str_in_output", "deadline", "logit_bias"),
        *("allowed_token_ids", "bad_words", "cache_salt"),
    }
)
# They steer what no model here has, or how events are padded.
_HARMLESS = HARMLESS | {"reasoning", "max_tool_calls", "stream_options", "prompt_cache_options"}
_STATE = ("previous_response_id", "conversation", "prompt")
_LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


class ResponsesBody(Body):
    """POST /v1/responses."""

    model: str | None = None
    input: Annotated[str | list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    metadata: dict[str, str] = Field(default_factory=dict)  # comes back as it is
    # What else to show: log probabilities, there is nothing more.
    include: list[str] = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: dict[str, Any] = Field(default_factory=dict)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"  # "auto" would drop parts of the input

    @model_validator(mode="after")
    def _no_unknown_fields(self) -> "ResponsesBody":
        for name in self.model_extra or ():
            if name in _STATE:
                raise ApiError(
                    f"{name} needs stored responses, and none are stored here: send the whole "
                    "conversation as input",
                    param=name,
                    code="unsupported_parameter",
                )
            if name not in _HARMLESS | AS_IN_CHATS:
                raise self.unknown(name)
        return self

    @model_validator(mode="after")
    def _text_only(self) -> "ResponsesBody":
        if self.tools or self.tool_choice not in ("auto", "none"):
            raise ApiError("tools are not served here: use /v1/chat/completions", param="tools")
        return self

    @property
    def text_format(self) -> Mapping[str, Any]:
        """What the text must be. Raises ``ApiError`` where it is no format."""
        given = self.text.get("format") or {"type": "text"}
        kind = given.get("type") if isinstance(given, Mapping) else None
        if kind not in ("text", "json_object", "json_schema"):
            raise ApiError(
                "text.format must be an object of the type 'text', 'json_object' or "
                f"'json_schema', got {given!r:.100}",
                param="text.format",
            )
        if kind == "json_schema" and not isinstance(given.get("schema"), Mapping):
            raise ApiError("text.format.schema must be an object", param="text.format.schema")
        known = ("type", "name", "description", "schema", "strict")
        for name in given:
            if name not in (known if kind == "json_schema" else ("type",)):
                raise ApiError(
                    f"text.format.{name:.100} is not known here and could change the answer",
                    param=f"text.format.{name:.100}",
                )
        return given

    @property
    def wants_logprobs(self) -> bool:
        return _LOGPROBS in self.include or self.top_logprobs is not None

    def chat(self) -> ChatBody:
        """The chat that it is. Raises ``ApiError`` for input that is no text."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [_message(item, f"input[{i}]") for i, item in enumerate(self.input)]
        passed = {k: v for k, v in (self.model_extra or {}).items() if k in AS_IN_CHATS}
        form = self.text_format
        if form["type"] == "json_schema":
            form = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
        return ChatBody.model_validate(
            {**passed, "model": self.model, "messages": messages, "response_format": form}
        )


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An item of the input as a message of a chat."""
    kind = item.get("type", "message")
    if kind != "message":
        raise ApiError(
            f"{where}.type {kind!r:.100} is not served here: only messages are", param=where
        )
    role, content = item.get("role"), item.get("content")
    if role not in ("developer", "system", "user", "assistant"):
        raise ApiError(
            f"{where}.role must be 'developer', 'system', 'user' or 'assistant', got {role!r:.100}",
            param=f"{where}.role",
        )
    if isinstance(content, list):
        content = "\n".join(_part(p, f"{where}.content[{i}]") for i, p in enumerate(content))
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(_TEXT_PARTS[kind]) if kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise ApiError(f"{where} must be text, as input_text, got type {kind!r:.100}", param=where)
    return text


async def responses(request: Request) -> Response:
    """An answer to a text or a conversation; it is cancelled when the client goes."""
    service: Service = request.app.state.service
    body = await read_body(request, ResponsesBody, service.options.max_body_bytes)
    service.check_model(body.model)
    chat = body.chat()
    prompt, asked = await chat_prompt(service, chat)
    most = body.max_output_tokens or service.max_tokens(prompt, param="input")
    sampling = chat.sampling(
        max_tokens=most,
        logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
        structured_outputs=asked.constraint,
    )
    await service.compile(sampling, param="text.format")
    reply = _Reply(service, body, chat, prompt, sampling)
    log_fields(request).update(id=reply.id, prompt_tokens=len(prompt.ids))
    if body.stream:
        events = reply.events(log_fields(request))
        await anext(events)  # what is refused is refused before the status is out
        return EventStream(events)
    whole = await unless_gone(request.receive, reply.whole())
    if whole is None:
        return Response(status_code=499)  # nobody reads it
    used = whole["usage"]
    log_fields(request).update(
        completion_tokens=used["output_tokens"],
        cached_tokens=used["input_tokens_details"]["cached_tokens"],
    )
    return JSONResponse(whole)


class _Reply:
    """One response on its way."""

    def __init__(
        self,
        service: Service,
        body: ResponsesBody,
        chat: ChatBody,
        prompt: CheckedPrompt,
        sampling: SamplingParams,
    ):
        self.id, self._item_id = wire.new_id("resp"), wire.new_id("msg")
        self._service, self._body, self._chat = service, body, chat
        self._prompt, self._sampling = prompt, sampling
        self._created = service.now()
        self._numbers = itertools.count()  # of events

    def _run(self):
        return self._service.run([self._prompt], [self._sampling], self._chat.deadline)

    async def whole(self) -> dict[str, Any]:
        async with self._run() as stream:
            (output,) = await outputs(stream)
        return self._ended(output)

    async def events(self, logged: dict[str, Any]) -> AsyncGenerator[bytes]:
        """All events; the first one is empty: the request was taken."""
        async with self._run() as stream:
            yield b""
            try:
                async for event in self._told(stream, logged):
                    yield event
            except Exception as error:  # whatever it is: the client must hear of it
                log_error(error)
                told = {"code": "server_error", "message": as_api_error(error).message}
                yield self._event("response.failed", response=self._state("failed", error=told))

    async def _told(
        self, stream: AsyncIterable[tuple[int, TextDelta]], logged: dict[str, Any]
    ) -> AsyncGenerator[bytes]:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=self._state("in_progress"))
        yield self._event("response.in_progress", response=self._state("in_progress"))
        begun = self._item("in_progress", [])
        yield self._event("response.output_item.added", output_index=0, item=begun)
        yield self._event("response.content_part.added", **place, part=_text_part("", []))
        text, logprobs, tokens, output = "", [], 0, None
        async for _, delta in stream:
            if delta.error is not None:
                raise delta.error
            tokens += len(delta.token_ids)
            logged["completion_tokens"] = tokens
            logged["cached_tokens"] = delta.num_cached_tokens
            new = self._logprobs(delta.token_ids, delta.logprobs)
            text, logprobs, output = text + delta.text, logprobs + new, delta.output
            if delta.text or new:
                yield self._event(
                    "response.output_text.delta", **place, delta=delta.text, logprobs=new
                )
        assert output is not None
        done = self._ended(output)
        yield self._event("response.output_text.done", **place, text=text, logprobs=logprobs)
        yield self._event("response.content_part.done", **place, part=_text_part(text, logprobs))
        yield self._event("response.output_item.done", output_index=0, item=done["output"][0])
        yield self._event(f"response.{done['status']}", response=done)

    def _event(self, kind: str, **data: Any) -> bytes:
        event = wire.event({"type": kind, "sequence_number": next(self._numbers), **data})
        return b"event: " + kind.encode() + b"\n" + event

    def _ended(self, output: RequestOutput) -> dict[str, Any]:
        (completion,) = output.outputs
        logprobs = self._logprobs(completion.token_ids, completion.logprobs)
        reason = completion.finish_reason
        # OpenAI's reason, where it has one; "deadline" is ours.
        why = {"length": "max_output_tokens", "deadline": "deadline"}.get(reason)
        status = "completed" if why is None else "incomplete"
        return self._state(
            status,
            output=[self._item(status, [_text_part(completion.text, logprobs)])],
            incomplete_details=None if why is None else {"reason": why},
            usage=_usage(output),
        )

    def _item(self, status: str, content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _state(self, status: str, **known: Any) -> dict[str, Any]:
        """The response as it stands."""
        body = self._body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._service.model_name,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": self._chat.temperature,
            "top_p": self._chat.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "text": {"format": body.text_format},
            "tools": [],
            "tool_choice": body.tool_choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "truncation": body.truncation,
            "background": False,
            "store": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "metadata": body.metadata,
            **known,
        }

    def _logprobs(
        self, token_ids: list[int], rows: list[dict[int, float]] | None
    ) -> list[dict[str, Any]]:
        if rows is None:
            return []
        tokenizer, top = self._service.tokenizer, self._body.top_logprobs or 0
        return wire.chat_logprobs(tokenizer, token_ids, rows, top)["content"]


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(output: RequestOutput) -> dict[str, Any]:
    used = wire.usage_of([output])
    cached = used["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used["total_tokens"],
    }

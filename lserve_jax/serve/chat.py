"""POST /v1/chat/completions."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lserve_jax.outputs import CompletionOutput, RequestOutput, TextDelta
from lserve_jax.serve import wire
from lserve_jax.serve.answers import Answer, Choice, respond
from lserve_jax.serve.bodies import ChatBody
from lserve_jax.serve.http import read_body
from lserve_jax.serve.messages import template_messages
from lserve_jax.serve.response_format import (
    FORMAT_FIELDS,
    TOOL_FIELDS,
    AnswerFormat,
    answer_format,
)
from lserve_jax.serve.service import Service
from lserve_jax.serve.tool_calls import Delta, ToolCall, ToolCallParser, parse_tool_calls
from lserve_jax.text_engine import CheckedPrompt, Prompt


async def chat_completions(request: Request) -> Response:
    """An answer to a conversation, whole or streamed; it may be one that calls tools."""
    service: Service = request.app.state.service
    body = await read_body(request, ChatBody, service.options.max_body_bytes)
    service.check_model(body.model)
    prompt, asked = await chat_prompt(service, body)
    wanted = body.max_completion_tokens or body.max_tokens
    if wanted is None:
        wanted = service.max_tokens(prompt, param="messages")
    # Where markers of calls are special tokens, calls are read from a text that shows them.
    markers = () if asked.tool_format is None else asked.tool_format.markers
    shows_specials = any(marker in service.tokenizer.control_tokens for marker in markers)
    sampling = body.sampling(
        max_tokens=wanted,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        skip_special_tokens=body.skip_special_tokens and not shows_specials,
        structured_outputs=asked.constraint,
    )
    await service.compile(sampling, param=asked.source)
    choices = _Choices(service, body, asked)
    answer = Answer(
        id=wire.new_id("chatcmpl"),
        object="chat.completion",
        chunk_object="chat.completion.chunk",
        service=service,
        body=body,
        prompts=[prompt],
        sampling=sampling,
        choice=choices.whole,
        chunks=choices.chunks,
        record_reads=body.record_reads,
    )
    return await respond(request, answer)


async def chat_prompt(service: Service, body: ChatBody) -> tuple[CheckedPrompt, AnswerFormat]:
    """A conversation and its tools as the chat template writes them, and what its answer must be.

    No text in it becomes a control token.
    """
    tokenizer = service.tokenizer
    fields = {name: getattr(body, name) for name in (*FORMAT_FIELDS, *TOOL_FIELDS)}
    asked = answer_format(fields, service.tool_format, tokenizer.control_tokens)
    opens = body.add_generation_prompt

    def make() -> Prompt:
        chat = tokenizer.chat_prompt(
            template_messages(body.messages, service.tool_format),
            add_generation_prompt=not body.continue_final_message if opens is None else opens,
            continue_final_message=body.continue_final_message,
            tools=asked.tools,
            values=body.chat_template_kwargs,
        )
        service.engine.text.check_length(chat.text)
        return {"prompt": chat.text, "prompt_token_ids": chat.encode()}

    return await service.prompt(make, body.cache_salt), asked


class _Choices:
    """The choices of one chat, whole or in parts."""

    def __init__(self, service: Service, body: ChatBody, asked: AnswerFormat):
        self.service, self.body, self.form = service, body, asked.tool_format
        self._begun: set[int] = set()  # completions of which something was sent
        self._called: set[int] = set()  # completions that called a tool
        self._parsers: dict[int, ToolCallParser] = {}

    def whole(self, _: int, output: RequestOutput, completion: CompletionOutput) -> Choice:
        content, calls = completion.text, []
        if self.form is not None:
            content, calls = parse_tool_calls(self.form, completion.text)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs),
            "finish_reason": _finish_reason(completion.finish_reason, bool(calls)),
            "stop_reason": wire.stop_reason(completion.finish_reason, completion.stop_reason),
        }

    def chunks(self, _: int, delta: TextDelta) -> list[Choice]:
        index, new = delta.index, self._new(delta)
        if not new and delta.logprobs is None and delta.finish_reason is None:
            return []  # what came may be the beginning of a call
        # The role comes with the first text: a chunk before it would make the first token look
        # earlier than it is.
        role = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        choice = {
            "index": index,
            "delta": {**role, **new},
            "logprobs": self._logprobs(delta.token_ids, delta.logprobs),
            "finish_reason": _finish_reason(delta.finish_reason, index in self._called),
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = wire.stop_reason(delta.finish_reason, delta.stop_reason)
        return [choice]

    def _new(self, delta: TextDelta) -> dict[str, Any]:
        """What is new of a message."""
        if self.form is None:
            return {"content": delta.text}
        parser = self._parsers.setdefault(delta.index, ToolCallParser(self.form))
        parts: list[Delta] = parser.feed(delta.text)
        if delta.finish_reason is not None:
            parts += parser.finish()
        new: dict[str, Any] = {}
        if content := "".join(part.content for part in parts):
            new["content"] = content
        calls = [(part.index, part.call) for part in parts if part.call is not None]
        if calls:
            self._called.add(delta.index)
            new["tool_calls"] = [{"index": index, **_call(call)} for index, call in calls]
        return new

    def _logprobs(
        self, token_ids: list[int], rows: list[dict[int, float]] | None
    ) -> dict[str, Any] | None:
        if rows is None:
            return None
        top = self.body.top_logprobs or 0
        return wire.chat_logprobs(self.service.tokenizer, token_ids, rows, top)


def _finish_reason(reason: str | None, called: bool) -> str | None:
    return "tool_calls" if called and reason == "stop" else wire.finish_reason(reason)


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}

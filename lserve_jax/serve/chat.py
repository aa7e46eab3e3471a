"""POST /v1/chat/completions."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lserve_jax.outputs import CompletionOutput, RequestOutput, TextDelta
from lserve_jax.serve import wire
from lserve_jax.serve.answers import Answer, Choice, respond
from lserve_jax.serve.bodies import ChatBody
from lserve_jax.serve.http import read_body
from lserve_jax.serve.service import Service
from lserve_jax.text_engine import CheckedPrompt, Prompt


async def chat_completions(request: Request) -> Response:
    """An answer to a conversation, whole or streamed."""
    service: Service = request.app.state.service
    body = await read_body(request, ChatBody, service.options.max_body_bytes)
    service.check_model(body.model)
    prompt = await chat_prompt(service, body)
    wanted = body.max_completion_tokens or body.max_tokens
    if wanted is None:
        wanted = service.max_tokens(prompt, param="messages")
    choices = _Choices(service, body)
    answer = Answer(
        id=wire.new_id("chatcmpl"),
        object="chat.completion",
        chunk_object="chat.completion.chunk",
        service=service,
        body=body,
        prompts=[prompt],
        sampling=body.sampling(
            max_tokens=wanted, logprobs=(body.top_logprobs or 0) if body.logprobs else None
        ),
        choice=choices.whole,
        chunks=choices.chunks,
    )
    return await respond(request, answer)


async def chat_prompt(service: Service, body: ChatBody) -> CheckedPrompt:
    """A conversation as the model sees it."""
    tokenizer = service.tokenizer
    opens = body.add_generation_prompt

    def make() -> Prompt:
        text = tokenizer.apply_chat_template(
            body.messages,
            add_generation_prompt=not body.continue_final_message if opens is None else opens,
            continue_final_message=body.continue_final_message,
        )
        service.engine.text.check_length(text)
        ids = tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    return await service.prompt(make)


class _Choices:
    """The choices of one chat, whole or in parts."""

    def __init__(self, service: Service, body: ChatBody):
        self.service, self.body = service, body
        self._begun: set[int] = set()  # completions of which something was sent

    def whole(self, _: int, output: RequestOutput, completion: CompletionOutput) -> Choice:
        return {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs),
            "finish_reason": wire.finish_reason(completion.finish_reason),
            "stop_reason": wire.stop_reason(completion.finish_reason, completion.stop_reason),
        }

    def chunks(self, _: int, delta: TextDelta) -> list[Choice]:
        # The role comes with the first text: a chunk before it would make the first token look
        # earlier than it is.
        role = {} if delta.index in self._begun else {"role": "assistant"}
        self._begun.add(delta.index)
        choice = {
            "index": delta.index,
            "delta": {**role, "content": delta.text},
            "logprobs": self._logprobs(delta.token_ids, delta.logprobs),
            "finish_reason": wire.finish_reason(delta.finish_reason),
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = wire.stop_reason(delta.finish_reason, delta.stop_reason)
        return [choice]

    def _logprobs(
        self, token_ids: list[int], rows: list[dict[int, float]] | None
    ) -> dict[str, Any] | None:
        if rows is None:
            return None
        top = self.body.top_logprobs or 0
        return wire.chat_logprobs(self.service.tokenizer, token_ids, rows, top)

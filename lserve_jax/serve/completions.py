"""POST /v1/completions."""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lserve_jax.outputs import CompletionOutput, RequestOutput, TextDelta
from lserve_jax.serve import wire
from lserve_jax.serve.answers import Answer, Choice, respond
from lserve_jax.serve.bodies import CompletionBody
from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.http import read_body
from lserve_jax.serve.response_format import FORMAT_FIELDS, answer_format
from lserve_jax.serve.service import Service
from lserve_jax.text_engine import CheckedPrompt

# OpenAI's, where a request gives no length.
_MAX_TOKENS = 16
_MOST_PROMPTS = 2048


async def completions(request: Request) -> Response:
    """Goes on with one text or several, whole or streamed."""
    service: Service = request.app.state.service
    body = await read_body(request, CompletionBody, service.options.max_body_bytes)
    service.check_model(body.model)
    if len(body.prompt) > _MOST_PROMPTS:
        raise ApiError(
            f"prompt has {len(body.prompt)} prompts, at most {_MOST_PROMPTS} can be", param="prompt"
        )
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError("echo with logprobs comes whole: it cannot be streamed", param="echo")
    prompts = []
    for given in body.prompt:
        as_prompt = given if isinstance(given, str) else {"prompt_token_ids": given}
        prompts.append(await service.prompt(lambda as_prompt=as_prompt: as_prompt, body.cache_salt))
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    scored = body.echo and (body.logprobs is not None or max_tokens == 0)
    fields = {name: getattr(body, name) for name in FORMAT_FIELDS}
    asked = answer_format(fields, None, {})
    sampling = body.sampling(
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=(body.logprobs or 0) if scored else None,
        structured_outputs=asked.constraint,
    )
    await service.compile(sampling, param=asked.source)
    choices = _Choices(service, body, prompts)
    answer = Answer(
        id=wire.new_id("cmpl"),
        object="text_completion",
        chunk_object="text_completion",
        service=service,
        body=body,
        prompts=prompts,
        sampling=sampling,
        choice=choices.whole,
        chunks=choices.chunks,
    )
    return await respond(request, answer)


class _Choices:
    """The choices of one request, whole or in parts."""

    def __init__(self, service: Service, body: CompletionBody, prompts: list[CheckedPrompt]):
        self.service, self.body, self.prompts = service, body, prompts
        self._sent: dict[int, int] = {}  # characters of each choice

    def whole(self, position: int, output: RequestOutput, completion: CompletionOutput) -> Choice:
        echoed = self._echoed(position)
        logprobs = None
        if completion.logprobs is not None:
            ids, rows, offset = completion.token_ids, completion.logprobs, 0
            if output.prompt_logprobs is not None:
                ids = [*output.prompt_token_ids, *ids]
                rows = [*output.prompt_logprobs, *rows]
            logprobs = self._logprobs(ids, rows, offset)
        return {
            "index": self._index(position, completion.index),
            "text": echoed + completion.text,
            "logprobs": logprobs,
            "finish_reason": wire.finish_reason(completion.finish_reason),
            "stop_reason": wire.stop_reason(completion.finish_reason, completion.stop_reason),
        }

    def chunks(self, position: int, delta: TextDelta) -> list[Choice]:
        index, text = self._index(position, delta.index), delta.text
        if index not in self._sent:
            text = self._echoed(position) + text
        logprobs = None
        if delta.logprobs is not None:
            logprobs = self._logprobs(delta.token_ids, delta.logprobs, self._sent.get(index, 0))
        self._sent[index] = self._sent.get(index, 0) + len(text)
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": wire.finish_reason(delta.finish_reason),
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = wire.stop_reason(delta.finish_reason, delta.stop_reason)
        return [choice]

    def _index(self, position: int, completion: int) -> int:
        return position * self.body.n + completion

    def _echoed(self, position: int) -> str:
        if not self.body.echo:
            return ""
        prompt = self.prompts[position]
        if prompt.text is not None:
            return prompt.text
        return self.service.tokenizer.decode(
            prompt.ids.ids, skip_special_tokens=self.body.skip_special_tokens
        )

    def _logprobs(
        self, ids: list[int], rows: Sequence[dict[int, float] | None], offset: int
    ) -> dict[str, Any]:
        top = self.body.logprobs or 0
        return wire.completion_logprobs(self.service.tokenizer, ids, rows, top, offset)

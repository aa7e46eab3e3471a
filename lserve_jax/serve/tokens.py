"""POST /tokenize and /detokenize, GET /tokenizer_info: the tokenizer for clients without one.

Fields are vLLM's; lm-eval's ``tokenizer_backend=remote`` lives on these three.
"""

import asyncio
from typing import Annotated, Any

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lserve_jax.serve.bodies import Body, ChatBody, TokenIds
from lserve_jax.serve.chat import chat_prompt
from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.http import read_body
from lserve_jax.serve.service import Service


class TextBody(Body):
    """A conversation, or the ``prompt`` that classes after it have."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tools: Any = None  # of the conversation
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TextBody":
        if (getattr(self, "prompt", None) is None) == (self.messages is None):
            raise ApiError("give either prompt or messages", param="prompt")
        return self

    def chat(self) -> ChatBody:
        """The conversation, as chats take it."""
        given = ("messages", "tools", "add_generation_prompt", "continue_final_message")
        return ChatBody.model_validate({name: getattr(self, name) for name in given})


class TokenizeBody(TextBody):
    """POST /tokenize."""

    prompt: str | None = None
    add_special_tokens: bool | None = None  # None: for a prompt; a chat template writes its own
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _special_tokens_of_prompts(self) -> "TokenizeBody":
        if self.messages is not None and self.add_special_tokens:
            raise ApiError(
                "add_special_tokens is for a prompt: a chat template writes them itself",
                param="add_special_tokens",
            )
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


async def tokenize(request: Request) -> Response:
    """The token ids of a text or a conversation; a special token that is spelt out becomes its
    id in a ``prompt``."""
    service: Service = request.app.state.service
    body = await read_body(request, TokenizeBody, service.options.max_body_bytes)
    service.check_model(body.model)
    tokenizer = service.tokenizer
    if body.prompt is None:
        ids = (await chat_prompt(service, body.chat()))[0].ids.ids.tolist()
    else:
        special = body.add_special_tokens is not False

        def encode(text: str) -> list[int]:
            service.engine.text.check_length(text)
            return tokenizer.encode(text, special)

        ids = await asyncio.to_thread(encode, body.prompt)
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": service.max_model_len,
        "tokens": ids,
    }
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.backend.id_to_token(token_id) for token_id in ids]
    return JSONResponse(answer)


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens written out."""
    service: Service = request.app.state.service
    body = await read_body(request, DetokenizeBody, service.options.max_body_bytes)
    service.check_model(body.model)
    text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """What a client needs to render chats itself: special tokens and the chat template."""
    service: Service = request.app.state.service
    tokenizer = service.tokenizer
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return JSONResponse(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: tokenizer.markers.get(name) for name in names},
            "chat_template": tokenizer.chat_template,
            "model_max_length": service.max_model_len,
            "vocab_size": tokenizer.vocab_size,
        }
    )

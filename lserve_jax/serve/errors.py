"""OpenAI's error body, for everything that can go wrong: {"error": {message, type, param, code}}.

It is the one form of which every client shows the message.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from lserve_jax.async_engine import EngineClosed, EngineFailed

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
# Fields that a prompt is made of, by route.
_PROMPTS = ("prompt", "messages", "input")
# Clients wait as long as this says, up to 60 or 120 s; a queue has moved on by then.
_RETRY_AFTER_SECONDS = "1"


class ApiError(Exception):
    """An answer other than 200.

    param: the field of the body that is wrong.
    code: a word that a program can test, such as "context_length_exceeded".
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def logged(self) -> dict[str, str]:
        """What the log says of it: no text, which could hold what is not ours."""
        told = {"error": self.code or self.body["error"]["type"], "param": self.param}
        return {name: value[:200] for name, value in told.items() if value is not None}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": _RETRY_AFTER_SECONDS} if self.status in (429, 503) else None
        return JSONResponse(self.body, self.status, headers)

    def event(self) -> bytes:
        """In the middle of a stream. Without the line ``event: error`` load tools count it as an
        answer."""
        return b"event: error\ndata: " + json.dumps(self.body).encode() + b"\n\n"


def as_api_error(error: Exception, fields: Collection[str] = ()) -> ApiError:
    """What a request is told of an error; ``fields`` are those that its message may name first.

    An error that nobody expected is shown by its kind only: its text can hold what is not the
    client's.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _of_validation(error)
    if isinstance(error, EngineClosed):
        return ApiError(str(error), status=503, code="shutting_down")
    if isinstance(error, MemoryError):
        return ApiError(str(error), status=503, code="out_of_memory")
    if isinstance(error, FloatingPointError):
        return ApiError(str(error), status=500, code="not_finite")
    if isinstance(error, EngineFailed):
        return ApiError("the engine failed; the request can be sent again", status=500)
    if isinstance(error, ValueError | TypeError):
        message = str(error)
        too_long = "max_model_len" in message
        named = re.match(r"\w+", message)
        param = named.group() if named and named.group() in fields else None
        if too_long or message.startswith(("prompt ", "the prompt ")):
            param = next((name for name in _PROMPTS if name in fields), None)
        code = "context_length_exceeded" if too_long else None
        return ApiError(message, param=param, code=code)
    return ApiError(f"internal error: {type(error).__name__}", status=500)


def _of_validation(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {first['msg']}")
    message = first["msg"].removeprefix("Value error, ")
    where = "" if param is None else f"{param}: "
    given = first["input"]
    shown = "" if isinstance(given, Mapping | list) else f", got {given!r:.100}"
    if first["type"] == "missing":
        shown = ""
    return ApiError(f"{where}{message}{shown}", param=param)


async def http_error(_: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such route, no such method."""
    assert isinstance(error, HTTPException)
    answer = ApiError(str(error.detail), status=error.status_code).response()
    answer.headers.update(error.headers or {})
    return answer


async def api_error(_: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response()

"""What every request meets: its id and log line, keys, bounds of its body, and its client's end."""

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lserve_jax.serve.errors import ApiError, as_api_error

log = logging.getLogger("lserve_jax.serve")

# A client that sends slower than this holds a connection open for nothing.
BODY_SECONDS = 60.0
# Parsing more than this would hold up the event loop, and every stream with it.
_PARSED_AT_ONCE = 64 << 10
SHUTTING_DOWN = ApiError("the server is shutting down", status=503, code="shutting_down")
# What a client may call its request: anything else could forge lines of the log.
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestLog:
    """Gives every request an id, its client's own if it sent one, and logs it as a line of JSON.

    A request that is cancelled, because the server ends and waits no longer, is told so. Handlers
    add fields by ``log_fields(request).update(…)``. No text of prompts, answers or keys is ever
    logged.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began, status = time.perf_counter(), 499  # 499: the client left before an answer
        fields: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "log": fields}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # nobody else cancels a request's task
            fields["error"] = SHUTTING_DOWN.code
            if status == 499:
                await SHUTTING_DOWN.response()(scope, receive, send_with_id)
        finally:
            line = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.perf_counter() - began, 6),
                **fields,
            }
            # Probes come every few seconds, for ever.
            routine = scope["path"] in ("/health", "/metrics") and status == 200
            log.log(logging.DEBUG if routine else logging.INFO, json.dumps(line))


def log_fields(request: Request) -> dict[str, Any]:
    """What the request's log line says beside its path and status."""
    return request.state.log


class ApiKeys:
    """Refuses requests to ``paths`` (beginnings of them) without one of ``keys``."""

    def __init__(self, app: ASGIApp, keys: Collection[str], paths: tuple[str, ...]):
        self.app, self.keys, self.paths = app, [key.encode() for key in keys], paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = scope["type"] == "http" and scope["path"].startswith(self.paths)
        if wanted and not self._has_key(Headers(scope=scope)):
            error = ApiError(
                "a valid API key is needed: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )
            answer = error.response()
            answer.headers["WWW-Authenticate"] = "Bearer"
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        # All are compared, each in constant time: nothing is to be learned from how long it takes.
        # Starlette reads the bytes of headers as Latin-1.
        raw = given.strip().encode("latin-1")
        same = [hmac.compare_digest(raw, key) for key in self.keys]
        return kind.lower() == "bearer" and any(same)


async def read_body[B: BaseModel](request: Request, model: type[B], most_bytes: int) -> B:
    """The body, bounded before it is parsed.

    Raises ``ApiError`` for one that is too long or comes too slowly, pydantic's error for one that
    is not what ``model`` says.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most_bytes:
        raise _too_long(most_bytes)
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > most_bytes:
                    raise _too_long(most_bytes)
    except TimeoutError:
        raise ApiError(f"the body took longer than {BODY_SECONDS:.0f} s", status=408) from None
    if len(data) <= _PARSED_AT_ONCE:
        return model.model_validate_json(bytes(data))
    return await asyncio.to_thread(model.model_validate_json, bytes(data))


def _too_long(most_bytes: int) -> ApiError:
    return ApiError(
        f"the body is longer than {most_bytes} bytes", status=413, code="body_too_large"
    )


async def unless_gone[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` returns; it is cancelled, and None returned, when the client goes.

    The request's body must have been read: what comes next of a client is its end.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_end_of_client(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _end_of_client(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: what ``events`` yields, until it or the client ends.

    An error in the middle becomes an event: the status is out already.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]):
        self.events = events
        self.status_code = 200
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        logged = scope["state"]["log"]
        try:
            if await unless_gone(receive, self._send_all(send, logged)) is None:
                logged["error"] = "client_gone"
        except asyncio.CancelledError:  # the server ends
            await send(_body(SHUTTING_DOWN.event()))
            await send(_body(b"", more=False))
            raise

    async def _send_all(self, send: Send, logged: dict[str, Any]) -> bool:
        async with contextlib.aclosing(self.events) as events:
            try:
                async for event in events:
                    await send(_body(event))
            except Exception as error:  # whatever it is: the client must not take it for an end
                log_error(error)
                told = as_api_error(error)
                logged.update(told.logged)
                await send(_body(told.event()))
        await send(_body(b"", more=False))
        return True


def _body(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def log_error(error: Exception) -> None:
    """Errors that are nobody's but ours, with their traceback."""
    if as_api_error(error).status >= 500:
        log.error("request failed", exc_info=error)


type Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def answering(fields: Collection[str] = ()) -> Callable[[Handler], Handler]:
    """Around a handler: every error becomes OpenAI's body; ``fields`` may be named by it."""

    def around(handler: Handler) -> Handler:
        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except ClientDisconnect:  # in the middle of its body
                log_fields(request)["error"] = "client_gone"
                return Response(status_code=499)
            except Exception as error:  # the server goes on, whatever one request met
                log_error(error)
                told = as_api_error(error, fields)
                log_fields(request).update(told.logged)
                return told.response()

        return answer

    return around

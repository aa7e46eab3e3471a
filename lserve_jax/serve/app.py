"""The routes, and what stands around all of them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lserve_jax import __version__
from lserve_jax.serve.bodies import ChatBody, CompletionBody
from lserve_jax.serve.chat import chat_completions
from lserve_jax.serve.completions import completions
from lserve_jax.serve.errors import ApiError, http_error
from lserve_jax.serve.http import ApiKeys, RequestLog, answering
from lserve_jax.serve.metrics import metrics
from lserve_jax.serve.page_files import page_routes
from lserve_jax.serve.prefixes import (
    PrefixBody,
    PrefixRegistry,
    list_prefixes,
    of_one_prefix,
    register_prefix,
)
from lserve_jax.serve.responses import AS_IN_CHATS, ResponsesBody, responses
from lserve_jax.serve.service import Service
from lserve_jax.serve.tokens import (
    DetokenizeBody,
    TokenizeBody,
    detokenize,
    tokenize,
    tokenizer_info,
)

# The beginnings of paths that need a key, where there are keys.
_GUARDED = ("/v1", "/tokenize", "/detokenize", "/tokenizer_info")
# Before a connection without a request is closed: longer than clients (httpx 5, a load balancer
# mostly 60) keep one. Else it is closed now and then while a request is on its way.
KEEP_ALIVE_SECONDS = 75


def create_app(service: Service) -> Starlette:
    """An ASGI application around ``service``, whose engine it starts and closes."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async with service.engine:
            yield

    keys, middleware = service.options.api_keys, [Middleware(RequestLog)]
    if keys:
        middleware.append(Middleware(ApiKeys, keys=keys, paths=_GUARDED))
    chat = answering(ChatBody.model_fields)(chat_completions)
    texts = answering(CompletionBody.model_fields)(completions)
    answers = answering({*ResponsesBody.model_fields, *AS_IN_CHATS})(responses)
    plain = answering()
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", texts, methods=["POST"]),
            Route("/v1/responses", answers, methods=["POST"]),
            Route("/v1/models", plain(_models), methods=["GET"]),
            Route("/v1/models/{name:path}", plain(_one_model), methods=["GET"]),
            *_prefix_routes(),
            Route("/tokenize", answering(TokenizeBody.model_fields)(tokenize), methods=["POST"]),
            Route(
                "/detokenize", answering(DetokenizeBody.model_fields)(detokenize), methods=["POST"]
            ),
            Route("/tokenizer_info", plain(tokenizer_info), methods=["GET"]),
            Route("/health", plain(_health), methods=["GET"]),
            Route("/metrics", plain(metrics), methods=["GET"]),
            Route("/version", plain(_version), methods=["GET"]),
            Route("/v1/reads/{id}", plain(_reads), methods=["GET"]),
            Route("/v1/reads/{id}/{token}", plain(_reads_of_token), methods=["GET"]),
            *page_routes(),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    app.state.prefixes = PrefixRegistry(service)
    return app


def _prefix_routes() -> list[Route]:
    register = answering(PrefixBody.model_fields)(register_prefix)
    one = "/v1/prefixes/{name}"

    def route(path: str, verb: Callable[[PrefixRegistry, str], dict[str, Any]], method: str):
        return Route(path, answering()(of_one_prefix(verb)), methods=[method])

    return [
        Route("/v1/prefixes", register, methods=["POST"]),
        Route("/v1/prefixes", answering()(list_prefixes), methods=["GET"]),
        route(one, PrefixRegistry.show, "GET"),
        route(f"{one}/pin", PrefixRegistry.pin, "POST"),
        route(one, PrefixRegistry.release, "DELETE"),
    ]


async def _models(request: Request) -> Response:
    service: Service = request.app.state.service
    cards = [_card(service, name) for name in service.options.model_names]
    return JSONResponse({"object": "list", "data": cards})


async def _one_model(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(request.path_params["name"])
    return JSONResponse(_card(service, request.path_params["name"]))


async def _reads(request: Request) -> Response:
    """The context of an answer that recorded what it read, page by page."""
    service: Service = request.app.state.service
    completion_id = request.path_params["id"]
    context = service.reads.context  # which turns a long prompt into text
    described = await asyncio.to_thread(context, completion_id, service.tokenizer)
    return JSONResponse(described)


async def _reads_of_token(request: Request) -> Response:
    """Which pages each head read for one of its tokens."""
    service: Service = request.app.state.service
    completion_id, token = request.path_params["id"], request.path_params["token"]
    return JSONResponse(await asyncio.to_thread(service.reads.token, completion_id, token))


def _card(service: Service, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "lserve-jax",
        "root": service.model_name,
        "max_model_len": service.max_model_len,
    }


async def _health(request: Request) -> Response:
    """200 while requests can run."""
    service: Service = request.app.state.service
    if not service.engine.is_open:
        raise ApiError("the engine does not run", status=503, code="engine_closed")
    return Response(status_code=200)


async def _version(_: Request) -> Response:
    return JSONResponse({"version": __version__})

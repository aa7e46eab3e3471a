"""/v1/prefixes: beginnings that many requests share, computed once and kept until released.

Every prompt is remembered as long as nobody wants its pages; a registered prefix is there for
certain. ``usage.prompt_tokens_details.cached_tokens`` says how many tokens either saved.

    POST   /v1/prefixes            {"prompt": text or token ids} or {"messages": [...]}
    GET    /v1/prefixes            all that are held
    GET    /v1/prefixes/ID
    POST   /v1/prefixes/ID/pin     one more release is needed
    DELETE /v1/prefixes/ID         releases it once; the last time it is a prompt like any other
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lserve_jax.engine.prefix import Prefix
from lserve_jax.serve import wire
from lserve_jax.serve.bodies import TokenIds
from lserve_jax.serve.chat import chat_prompt
from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.http import Handler, log_fields, read_body
from lserve_jax.serve.service import Service
from lserve_jax.serve.tokens import TextBody


class PrefixBody(TextBody):
    """POST /v1/prefixes."""

    prompt: str | TokenIds | None = None


class PrefixRegistry:
    """The prefixes that clients registered, by id. Only the engine's thread calls its methods."""

    def __init__(self, service: Service):
        self._service = service
        self._held: dict[str, tuple[int, Prefix]] = {}  # with when each was registered, Unix time

    def add(self, token_ids: np.ndarray, param: str) -> dict[str, Any]:
        """Computes a prefix, or pins the one of the same tokens once more."""
        engine = self._service.engine.text.engine
        cache = engine.scheduler.prefix_cache
        block_sparse = engine.spec.is_block_sparse(len(token_ids))
        if cache.whole_pages(len(token_ids), block_sparse) == 0:
            least = engine.spec.page_size * cache.tree.grain_of(block_sparse)
            raise ApiError(
                f"the prefix has {len(token_ids)} tokens that are sure to stay: pieces of {least} "
                f"are shared, so at least {least} are needed",
                param=param,
            )
        prefix = engine.add_prefix(token_ids)
        for name, (_, held) in self._held.items():
            if held is prefix:
                return self._card(name)
        name = wire.new_id("prefix")
        self._held[name] = self._service.now(), prefix
        return self._card(name)

    def cards(self) -> list[dict[str, Any]]:
        """All that are held."""
        for name, (_, prefix) in list(self._held.items()):
            if prefix.is_released:  # the engine began anew
                del self._held[name]
        return [self._card(name) for name in self._held]

    def show(self, name: str) -> dict[str, Any]:
        """How it stands."""
        self._find(name)
        return self._card(name)

    def pin(self, name: str) -> dict[str, Any]:
        """One more ``release`` is needed."""
        self._service.engine.text.engine.add_prefix(self._find(name).token_ids)
        return self._card(name)

    def release(self, name: str) -> dict[str, Any]:
        """Gives up one pin; requests that run keep the pages until they end."""
        prefix = self._find(name)
        prefix.release()
        card = self._card(name)
        if prefix.is_released:
            del self._held[name]
        return {**card, "deleted": prefix.is_released}

    def _find(self, name: str) -> Prefix:
        _, prefix = self._held.get(name, (0, None))
        if prefix is None or prefix.is_released:
            raise ApiError(
                f"no prefix {name!r:.100} is held here", status=404, code="prefix_not_found"
            )
        return prefix

    def _card(self, name: str) -> dict[str, Any]:
        created, prefix = self._held[name]
        return {
            "id": name,
            "object": "prefix",
            "created": created,
            "tokens": len(prefix.token_ids),
            "shared_tokens": prefix.num_shared_tokens,
            "pages": len(prefix.pages),
            "pins": prefix.pins,
            "requests": prefix.ref_count,
        }


async def register_prefix(request: Request) -> Response:
    """Computes a prefix; a long one holds up what runs until the device has it."""
    service: Service = request.app.state.service
    body = await read_body(request, PrefixBody, service.options.max_body_bytes)
    service.check_model(body.model)
    given = body.prompt
    if given is None:
        prompt, _ = await chat_prompt(service, body.chat())
    else:
        as_prompt = given if isinstance(given, str) else {"prompt_token_ids": given}
        prompt = await service.prompt(lambda: as_prompt)
    # Of a text the last token is left out: it could be another one where the text goes on.
    ids = prompt.ids.ids if isinstance(given, list) else prompt.ids.ids[:-1]
    registry: PrefixRegistry = request.app.state.prefixes
    param = "messages" if given is None else "prompt"
    card = await service.engine.call(registry.add, ids, param)
    log_fields(request).update(id=card["id"], prompt_tokens=card["tokens"])
    return JSONResponse(card)


async def list_prefixes(request: Request) -> Response:
    """All prefixes."""
    service: Service = request.app.state.service
    registry: PrefixRegistry = request.app.state.prefixes
    return JSONResponse({"object": "list", "data": await service.engine.call(registry.cards)})


def of_one_prefix(verb: Callable[[PrefixRegistry, str], dict[str, Any]]) -> Handler:
    """A route that does ``verb`` to the prefix that its path names."""

    async def handle(request: Request) -> Response:
        service: Service = request.app.state.service
        registry: PrefixRegistry = request.app.state.prefixes
        name = request.path_params["name"]
        return JSONResponse(await service.engine.call(verb, registry, name))

    return handle

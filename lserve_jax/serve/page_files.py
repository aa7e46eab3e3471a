"""The page's files, served with headers that let it load nothing else."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": "index.html",
    "/page.js": "page.js",
    "/page.css": "page.css",
    "/icon.svg": "icon.svg",
}
HEADERS = {
    # No inline script or style, nothing from elsewhere, no frame around it.
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a newer version's files are asked for
}


def page_routes() -> list[Route]:
    """Routes of the page: ``/`` and the files that it loads. They need no API key."""
    return [
        Route(path, _endpoint(_FOLDER / name), methods=["GET"]) for path, name in _FILES.items()
    ]


def _endpoint(path: Path) -> Callable[[Request], Coroutine[Any, Any, FileResponse]]:
    async def send(request: Request) -> FileResponse:
        return FileResponse(path, headers=HEADERS)

    return send

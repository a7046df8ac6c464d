"""`/console`: the page to watch and use a server with. It is files; all it shows it asks of the routes, with a key if
one is needed."""

from __future__ import annotations

from html import escape
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from softbatch.server.version import VERSION

CONSOLE = "/console"
ASSETS = f"{CONSOLE}/assets"
FILES = Path(__file__).parent / "console"
# The page shows texts of clients and of the model: nothing but its own files may run, and no text can become markup.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked anew each time, so that a server of another version is not shown by files of this one.
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        reply = await super().get_response(path, scope)
        reply.headers.update(HEADERS)
        return reply


def install_console(app: FastAPI) -> None:
    page = (FILES / "index.html").read_text(encoding="utf-8").replace("{version}", escape(VERSION))

    @app.get(CONSOLE, include_in_schema=False)
    async def console(request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        return Response(page.replace("{root}", escape(root)), headers=HEADERS, media_type="text/html; charset=utf-8")

    app.mount(ASSETS, _Files(directory=FILES), name="console-assets")

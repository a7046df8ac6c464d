"""`/docs`: the routes to read and to try out, without a request to any other host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.staticfiles import StaticFiles

DOCS = "/docs"
ASSETS = f"{DOCS}/assets"
FILES = Path(__file__).parent / "swagger_ui"
# Swagger UI asks a validator on the internet about documents of other hosts than localhost, unless told not to.
PARAMETERS = {"validatorUrl": None, "persistAuthorization": True}


def install_docs(app: FastAPI, *, has_keys: bool) -> None:
    """With keys, the page has a field for one, which its requests then carry."""

    @app.get(DOCS, include_in_schema=False)
    async def page(request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=app.title,
            swagger_js_url=f"{root}{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{root}{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{root}{ASSETS}/favicon-32x32.png",
            swagger_ui_parameters=PARAMETERS,
        )

    app.mount(ASSETS, StaticFiles(directory=FILES), name="docs-assets")
    if has_keys:
        _ask_for_a_key(app)


def _ask_for_a_key(app: FastAPI) -> None:
    make = app.openapi

    def with_key() -> dict[str, Any]:
        document = make()
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        return document

    app.openapi = with_key  # type: ignore[method-assign]

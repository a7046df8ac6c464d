"""`/docs`: the routes to read and to try out, without a request to any other host."""

from __future__ import annotations

from copy import deepcopy
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
    make = app.openapi

    def document() -> dict[str, Any]:
        made = deepcopy(make())  # FastAPI keeps it
        _tell_of_streams(made)
        if has_keys:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"key": []}]
        return made

    app.openapi = document  # type: ignore[method-assign]


def _tell_of_streams(document: dict[str, Any]) -> None:
    """OpenAPI 3.1 has no word for events, and FastAPI calls a stream a string, if need be one that is an object."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for reply in operation.get("responses", {}).values():
                stream = reply.get("content", {}).get("text/event-stream")
                if stream is not None:
                    shape = {"$ref": stream["schema"]["$ref"]} if "$ref" in stream["schema"] else None
                    stream["schema"] = {"description": "events; behind `data:` stands JSON"}
                    if shape is not None:
                        stream["schema"] |= {"contentMediaType": "application/json", "contentSchema": shape}

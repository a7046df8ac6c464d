"""create_app(): puts the routes and the middlewares around the services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, RedirectResponse, Response
from starlette.middleware.cors import CORSMiddleware

from softbatch.server.http.auth import AuthMiddleware
from softbatch.server.http.body_limit import BodyLimitMiddleware
from softbatch.server.http.console_page import install_console
from softbatch.server.http.content_encoding import ContentEncodingMiddleware
from softbatch.server.http.cut_off import CutOffMiddleware
from softbatch.server.http.deployment_name import DeploymentNameMiddleware
from softbatch.server.http.docs_page import install_docs
from softbatch.server.http.errors import install_handlers
from softbatch.server.http.full_house import FullHouseMiddleware
from softbatch.server.http.head_and_slashes import HeadAndSlashesMiddleware
from softbatch.server.http.request_log import RequestLogMiddleware
from softbatch.server.routes import ROUTERS, SERVING_PATHS
from softbatch.server.services import Services
from softbatch.server.settings import Settings
from softbatch.server.version import VERSION

if TYPE_CHECKING:
    from softbatch.server.observability.tracing import Tracing


def create_app(services: Services) -> FastAPI:
    app = FastAPI(
        title="softbatch",
        version=VERSION,
        summary="Language model serving with continuous batching and compressed prompts",
        description=_DESCRIPTION,
        docs_url=None,  # FastAPI's own pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # a slash too many is taken off before
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse, summary="Prometheus metrics")
    def metrics() -> Response:
        return Response(services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    install_docs(app, has_keys=bool(services.settings.api_key or services.settings.admin_key))
    if not services.settings.no_console:
        install_console(app)
    install_handlers(app)
    # Innermost, so that it looks at a request whose key and size are right.
    app.add_middleware(FullHouseMiddleware, check_room=lambda: services.admission.check_room(), paths=SERVING_PATHS)
    add_middlewares(app, services.settings, services.tracing)
    return app


def add_middlewares(app: FastAPI, settings: Settings, tracing: Tracing | None = None) -> None:
    """From the innermost to the outermost."""
    app.add_middleware(DeploymentNameMiddleware)
    app.add_middleware(ContentEncodingMiddleware)
    app.add_middleware(
        BodyLimitMiddleware,
        max_upload_bytes=settings.max_prompt_mib << 20,
        max_file_bytes=settings.max_batch_file_bytes,
    )
    app.add_middleware(AuthMiddleware, api_keys=settings.api_key, admin_keys=settings.admin_key)
    app.add_middleware(HeadAndSlashesMiddleware)
    app.add_middleware(CutOffMiddleware)
    app.add_middleware(RequestLogMiddleware, tracing=tracing)
    if settings.allow_origin:
        # Outside of the API keys: a browser's question whether it may ask carries none.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origin,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=3600,
        )


_DESCRIPTION = """
Ask many questions about a few long contexts: each context is compressed once into a **soft prompt**, registered
under a name, and every request that names it is answered as if the whole context stood in front of it.

Name a soft prompt as `model` (or in the field `soft_prompt`) of any request that generates.
"""

"""One router per resource."""

from __future__ import annotations

from fastapi import APIRouter

from softbatch.server.http.errors import TGI_PATHS
from softbatch.server.routes import (
    chat,
    completions,
    compressions,
    embeddings,
    generate,
    health,
    info,
    messages,
    models,
    queue,
    responses,
    score,
    soft_prompts,
    tokenize,
)

# Whose requests go to the engine.
SERVING_PATHS = TGI_PATHS | {chat.ROUTE, completions.ROUTE, score.ROUTE}

ROUTERS: tuple[APIRouter, ...] = (
    generate.router,
    completions.router,
    chat.router,
    messages.router,
    responses.router,
    score.router,
    embeddings.router,
    models.router,
    soft_prompts.router,
    compressions.router,
    tokenize.router,
    queue.router,
    info.router,
    health.router,
)

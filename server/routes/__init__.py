"""One router per resource."""

from __future__ import annotations

from fastapi import APIRouter

from softbatch.server.http.errors import TGI_PATHS
from softbatch.server.routes import (
    batches,
    chat,
    completions,
    compressions,
    embeddings,
    files,
    generate,
    health,
    info,
    messages,
    models,
    queue,
    response_stream,
    responses,
    score,
    soft_prompts,
    tokenize,
)

# Whose requests go to the engine.
SERVING_PATHS = TGI_PATHS | {route.ROUTE for route in (chat, completions, embeddings, messages, response_stream, score)}

# Those that the lines of a batch may ask.
BATCH_ROUTERS: tuple[APIRouter, ...] = (chat.router, completions.router, embeddings.router, responses.router)

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
    files.router,
    batches.router,
    tokenize.router,
    queue.router,
    info.router,
    health.router,
)

"""`GET /v1/models`."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response

from softbatch.prompt_store.stores.store import StoredPrompt
from softbatch.server.http.errors import unknown_model
from softbatch.server.routes.common import engine_info, is_base_model, json_reply, services_of
from softbatch.server.schemas.base import ERROR_REPLIES
from softbatch.server.schemas.models import ModelCard, ModelList
from softbatch.server.services import Services

router = APIRouter(prefix="/v1/models", tags=["models"], responses=ERROR_REPLIES)
STARTED_AT = int(time.time())


@router.get("", response_model=ModelList, summary="What `model` may name (OpenAI)")
async def list_models(request: Request) -> Response:
    """The base model first, then every soft prompt that was made for it."""
    services = services_of(request)
    stored = await asyncio.to_thread(services.store.list)
    cards = [_base_card(services), *(_card(services, prompt) for prompt in stored if _fits(services, prompt))]
    return json_reply(ModelList(data=cards))


@router.get("/{model:path}", response_model=ModelCard, summary="One of them (OpenAI)")
async def get_model(request: Request, model: str) -> Response:
    services = services_of(request)
    # A model may be named by its path, whose first slash is lost behind the route's own.
    if is_base_model(services, model) or is_base_model(services, f"/{model}"):
        return json_reply(_base_card(services))
    stored = await asyncio.to_thread(services.store.list)
    for prompt in stored:
        if prompt.name == model and _fits(services, prompt):
            return json_reply(_card(services, prompt))
    raise unknown_model(model)


def _base_card(services: Services) -> ModelCard:
    name = services.model_name
    max_model_len = engine_info(services).model.max_model_len
    return ModelCard(id=name, created=STARTED_AT, root=name, parent=None, max_model_len=max_model_len)


def _card(services: Services, prompt: StoredPrompt) -> ModelCard:
    base = _base_card(services)
    return base.model_copy(update={"id": prompt.name, "created": prompt.created_at, "parent": base.id})


def _fits(services: Services, prompt: StoredPrompt) -> bool:
    return prompt.manifest.model.fingerprint == services.spec.fingerprint

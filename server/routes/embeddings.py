"""`POST /v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import math
import sys
from array import array
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.errors import invalid
from softbatch.server.requests.embedding import EmbeddingOrder, Embeddings
from softbatch.server.routes.common import fields_named, json_reply, named_soft_prompt, services_of
from softbatch.server.schemas.base import ERROR_REPLIES
from softbatch.server.schemas.embeddings import Embedding, EmbeddingReply, EmbeddingRequest, EmbeddingUsage

router = APIRouter(tags=["embeddings"], responses=ERROR_REPLIES)
ROUTE = "/v1/embeddings"


@router.post(ROUTE, response_model=EmbeddingReply, summary="Texts as vectors (OpenAI)")
async def create_embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Of each text the model's last hidden states, pooled to one vector, whose length is one."""
    services = services_of(request)
    size = services.spec.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        raise invalid("dimensions", f"the model's vectors have {size} numbers; ask for at most so many")
    soft_prompt = named_soft_prompt(services, body.model, body.soft_prompt)
    order = EmbeddingOrder(
        inputs=body.input,
        pooling=body.pooling or services.settings.embedding_pooling,
        soft_prompt=soft_prompt,
        add_special_tokens=body.add_special_tokens,
        priority=body.priority,
        cache_salt=body.cache_salt,
        user=body.user,
        timeout=body.timeout,
        route=ROUTE,
    )
    with fields_named({}, model=body.model if body.model == soft_prompt else None):
        embeddings = await until_disconnect(request, services.embedder.embed(order))
    # Thousands of vectors are millions of digits.
    return await asyncio.to_thread(_reply, body, body.model or services.model_name, embeddings)


def _reply(body: EmbeddingRequest, model: str, embeddings: Embeddings) -> Response:
    data = []
    for index, vector in enumerate(embeddings.vectors):
        numbers = array("f", _of_length_one(vector[: body.dimensions]))
        if body.encoding_format == "float":
            data.append(Embedding(index=index, embedding=numbers.tolist()))
            continue
        if sys.byteorder == "big":
            numbers.byteswap()
        data.append(Embedding(index=index, embedding=base64.b64encode(numbers.tobytes()).decode()))
    tokens = embeddings.prompt_tokens
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return json_reply(EmbeddingReply(data=data, model=model, usage=usage))


def _of_length_one(vector: Sequence[float]) -> list[float]:
    """A vector of nothing but zeros stays one."""
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]

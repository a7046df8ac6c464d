"""`POST /tokenize` and `/detokenize`. Long texts take a while, so the work is done in a thread."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from softbatch.prompt_store.manifest import Replaces
from softbatch.server.routes.common import (
    check_token_ids,
    engine_info,
    json_reply,
    manifest_of,
    means_base_model,
    services_of,
)
from softbatch.server.schemas.base import ERROR_REPLIES
from softbatch.server.schemas.tokenize import (
    DetokenizeReply,
    DetokenizeRequest,
    PlacedToken,
    PlacedTokens,
    TokenizeReply,
    TokenizeRequest,
)
from softbatch.server.services import Services

router = APIRouter(tags=["tokens"], responses=ERROR_REPLIES)


@router.post(
    "/tokenize",
    response_model=TokenizeReply | PlacedTokens,
    summary="Text or messages to token ids (vLLM, text-generation-inference)",
)
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """With `messages` and a soft prompt as `model`: the tokens that follow the soft prompt."""
    services = services_of(request)
    max_model_len = engine_info(services).model.max_model_len
    replaces = await asyncio.to_thread(_replaces, services, body.model)

    def work() -> TokenizeReply | PlacedTokens:
        if body.inputs is not None:
            return _placed(services, body.inputs, body.add_special_tokens is not False and replaces == "nothing")
        if body.messages is not None:
            turns = services.dialect.history([message.as_turn() for message in body.messages])
            text, special = (
                services.text.render(turns, replaces, "answer" if body.add_generation_prompt else "turn"),
                False,
            )
        else:
            # A soft prompt that stands for the beginning of the text stands for BOS too.
            text, special = body.prompt or "", replaces == "nothing"
        if body.add_special_tokens is not None:
            special = body.add_special_tokens
        ids = services.text.encode(text, special)
        strings = services.text.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return TokenizeReply(count=len(ids), max_model_len=max_model_len, tokens=ids, token_strs=strings)

    return json_reply(await asyncio.to_thread(work))


def _placed(services: Services, text: str, add_special_tokens: bool) -> PlacedTokens:
    encoding = services.text.backend.encode(text, add_special_tokens=add_special_tokens)
    tokens = zip(encoding.ids, encoding.offsets, strict=True)
    return PlacedTokens([PlacedToken(id=i, text=text[at:end], start=at, stop=end) for i, (at, end) in tokens])


@router.post("/detokenize", response_model=DetokenizeReply, summary="Token ids to text (vLLM)")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Special tokens are part of the text."""
    services = services_of(request)
    await asyncio.to_thread(_replaces, services, body.model)
    check_token_ids(body.tokens, engine_info(services).model.vocab_size, "tokens")
    text = await asyncio.to_thread(services.text.decode, body.tokens, False)
    return json_reply(DetokenizeReply(prompt=text))


def _replaces(services: Services, model: str | None) -> Replaces:
    """What the soft prompt named by `model` stands for. Raises ApiError 404."""
    manifest = manifest_of(services, None if means_base_model(services, model) else model)
    return "nothing" if manifest is None else manifest.replaces

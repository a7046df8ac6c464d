"""`POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.sse import NamedEventStream
from softbatch.server.requests.choices import gather
from softbatch.server.requests.generation import GenerationRequest
from softbatch.server.routes.common import (
    fields_named,
    json_reply,
    manifest_of,
    named_soft_prompt,
    services_of,
    start_all,
)
from softbatch.server.routes.message_stream import PING, MessageStream, begun_reply, stop_reason_of, usage_so_far
from softbatch.server.schemas.messages import (
    ANTHROPIC_ERRORS,
    CountTokensRequest,
    MessageReply,
    MessagesRequest,
    TextContent,
    TokenCountReply,
)
from softbatch.server.services import Services

router = APIRouter(tags=["generate"], responses=ANTHROPIC_ERRORS)
ROUTE = "/v1/messages"
_NAMES = {"prompt": "messages"}


class MessageEvents(NamedEventStream):
    """Ends like all others; a quiet stream is kept open by the event that Anthropic has for it."""

    ping = b"event: ping\ndata: %b\n\n" % PING


@router.post(ROUTE, response_model=MessageReply, summary="Answer a conversation (Anthropic)")
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """API keys are taken from the header `x-api-key` too.

    With `stream: true` the reply is a stream of named events, from `message_start` to `message_stop`.
    """
    services = services_of(request)
    wanted = _request(services, body)
    model = body.model or services.model_name
    if body.stream:
        (generation,) = await until_disconnect(request, start_all(services, body, [wanted], _NAMES))
        return MessageEvents(MessageStream(body, model, generation).events(), [generation], ROUTE)

    async def complete() -> Response:
        generations = await start_all(services, body, [wanted], _NAMES)
        (choice,) = await gather(generations)
        return json_reply(
            begun_reply(generations[0], model).model_copy(
                update={
                    "content": [TextContent(text=choice.text)] if choice.text else [],
                    **stop_reason_of(body, generations[0], choice.finish_reason, choice.stop_reason).model_dump(),
                    "usage": usage_so_far(generations[0]),
                }
            )
        )

    return await until_disconnect(request, complete())


@router.post(
    f"{ROUTE}/count_tokens", response_model=TokenCountReply, summary="Count a conversation's tokens (Anthropic)"
)
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """As many as `usage` counts of the same request."""
    services = services_of(request)
    soft_prompt = named_soft_prompt(services, body.model, body.soft_prompt)

    def work() -> int:
        manifest = manifest_of(services, soft_prompt)
        replaces = "nothing" if manifest is None else manifest.replaces
        token_ids = services.text.encode(services.text.render(body.turns, replaces), add_special_tokens=False)
        return len(token_ids) + (0 if manifest is None else manifest.num_virtual_tokens)

    with fields_named(_NAMES):
        return json_reply(TokenCountReply(input_tokens=await asyncio.to_thread(work)))


def _request(services: Services, body: MessagesRequest) -> GenerationRequest:
    return GenerationRequest(
        prompt=body.turns,
        params=body.sampling_params,
        seed=body.sampler_seed,
        max_tokens=body.max_tokens,
        may_clip=True,
        stop=tuple(body.stop_sequences),
        soft_prompt=named_soft_prompt(services, body.model, body.soft_prompt),
        priority=body.priority,
        cache_salt=body.cache_salt,
        user=body.metadata.user_id,
        output_format=body.output_format,
        timeout=body.timeout,
        route=ROUTE,
    )

"""`POST /v1/responses`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.errors import ApiError
from softbatch.server.request_failures import shown
from softbatch.server.requests.choices import gather
from softbatch.server.requests.generation import GenerationRequest
from softbatch.server.routes.common import json_reply, named_soft_prompt, services_of, start_all
from softbatch.server.routes.response_stream import (
    ROUTE,
    ResponseEvents,
    ResponseStream,
    begun_response,
    ended_response,
    status_of,
    whole_text,
)
from softbatch.server.schemas.base import ERROR_REPLIES
from softbatch.server.schemas.responses import ResponseReply, ResponsesRequest
from softbatch.server.services import Services

router = APIRouter(tags=["generate"], responses=ERROR_REPLIES)
_NAMES = {"prompt": "input", "max_tokens": "max_output_tokens"}


@router.post(ROUTE, response_model=ResponseReply, summary="Answer a conversation (OpenAI's Responses)")
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """No response is kept, whatever `store` says: `previous_response_id` gets 404.

    With `stream: true` the reply is a stream of named events, from `response.created` to `response.completed` or
    `response.incomplete`.
    """
    services = services_of(request)
    if body.previous_response_id is not None:
        raise ApiError(
            404,
            f"there is no response {shown(body.previous_response_id)}: this server keeps none; send the whole "
            "conversation as 'input'",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    wanted = _request(services, body)
    model = body.model or services.model_name
    if body.stream:
        (generation,) = await until_disconnect(request, start_all(services, body, [wanted], _NAMES))
        return ResponseEvents(ResponseStream(body, model, generation), generation)

    async def complete() -> Response:
        (generation,) = generations = await start_all(services, body, [wanted], _NAMES)
        (choice,) = await gather(generations)
        text = whole_text(body, choice.text, choice.tokens)
        begun = begun_response(body, model, generation)
        return json_reply(ended_response(begun, generation, text, status_of(choice.finish_reason)))

    return await until_disconnect(request, complete())


def _request(services: Services, body: ResponsesRequest) -> GenerationRequest:
    return GenerationRequest(
        prompt=body.turns,
        params=body.sampling_params,
        seed=body.sampler_seed,
        max_tokens=body.max_output_tokens,
        soft_prompt=named_soft_prompt(services, body.model, body.soft_prompt),
        priority=body.priority,
        cache_salt=body.cache_salt,
        user=body.user,
        output_format=body.text.output_format("text"),
        timeout=body.timeout,
        route=ROUTE,
    )

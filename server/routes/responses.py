"""`POST /v1/responses`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.errors import ApiError
from softbatch.server.request_failures import shown
from softbatch.server.requests.choices import gather
from softbatch.server.requests.generation import GenerationRequest
from softbatch.server.routes.common import fields_named, json_reply, named_soft_prompt, services_of, start_all
from softbatch.server.routes.response_stream import ROUTE, ResponseEvents, ResponseStream, whole_response
from softbatch.server.schemas.base import ERROR_REPLIES, STREAM_REPLY
from softbatch.server.schemas.responses import ResponseReply, ResponsesRequest
from softbatch.server.services import Services
from softbatch.server.tools.dialect import ChatPlan

router = APIRouter(tags=["generate"], responses=ERROR_REPLIES)
_NAMES = {"prompt": "input", "max_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort"}


@router.post(
    ROUTE, response_model=ResponseReply, responses=STREAM_REPLY, summary="Answer a conversation (OpenAI's Responses)"
)
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
    plan = _plan(services, body)
    wanted = _request(services, body, plan)
    model = body.model or services.model_name
    if body.stream:
        (generation,) = await until_disconnect(request, start_all(services, body, [wanted], _NAMES))
        return ResponseEvents(ResponseStream(body, plan, model, generation), generation)

    async def complete() -> Response:
        (choice,) = await gather(await start_all(services, body, [wanted], _NAMES))
        return json_reply(whole_response(body, plan, model, choice))

    return await until_disconnect(request, complete())


def _plan(services: Services, body: ResponsesRequest) -> ChatPlan:
    with fields_named(_NAMES):
        return services.dialect.plan(
            body.turns,
            body.tool_use,
            fields=services.dialect.template_fields({}, body.effort),
            output_format=body.text.output_format("text"),
            has_soft_prompt=named_soft_prompt(services, body.model, body.soft_prompt) is not None,
        )


def _request(services: Services, body: ResponsesRequest, plan: ChatPlan) -> GenerationRequest:
    return GenerationRequest(
        prompt=plan.conversation,
        params=body.sampling_params,
        seed=body.sampler_seed,
        max_tokens=body.max_output_tokens,
        soft_prompt=named_soft_prompt(services, body.model, body.soft_prompt),
        priority=body.priority,
        cache_salt=body.cache_salt,
        user=body.user,
        output_format=plan.output_format,
        timeout=body.timeout,
        recall=body.recall,
        shown_tokens=plan.shown_tokens,
        route=ROUTE,
    )

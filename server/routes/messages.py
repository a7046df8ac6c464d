"""`POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.sse import NamedEventStream
from softbatch.server.requests.choices import gather
from softbatch.server.requests.generation import GenerationRequest
from softbatch.server.routes.common import (
    fields_named,
    json_reply,
    named_soft_prompt,
    services_of,
    start_all,
)
from softbatch.server.routes.message_stream import PING, MessageStream, whole_message
from softbatch.server.schemas.base import STREAM_REPLY
from softbatch.server.schemas.messages import (
    ANTHROPIC_ERRORS,
    ConversationFields,
    CountTokensRequest,
    MessageReply,
    MessagesRequest,
    TokenCountReply,
)
from softbatch.server.services import Services
from softbatch.server.tools.dialect import ChatPlan

router = APIRouter(tags=["generate"], responses=ANTHROPIC_ERRORS)
ROUTE = "/v1/messages"


class MessageEvents(NamedEventStream):
    """Ends like all others; a quiet stream is kept open by the event that Anthropic has for it."""

    ping = b"event: ping\ndata: %b\n\n" % PING


@router.post(ROUTE, response_model=MessageReply, responses=STREAM_REPLY, summary="Answer a conversation (Anthropic)")
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """API keys are taken from the header `x-api-key` too.

    With `stream: true` the reply is a stream of named events, from `message_start` to `message_stop`.
    """
    services = services_of(request)
    plan = _plan(services, body)
    wanted, names = _request(services, body, plan), _names(body)
    model = body.model or services.model_name
    if body.stream:
        (generation,) = await until_disconnect(request, start_all(services, body, [wanted], names))
        return MessageEvents(MessageStream(body, plan, model, generation).events(), [generation], ROUTE)

    async def complete() -> Response:
        (choice,) = await gather(await start_all(services, body, [wanted], names))
        return json_reply(whole_message(body, plan, model, choice))

    return await until_disconnect(request, complete())


@router.post(
    f"{ROUTE}/count_tokens", response_model=TokenCountReply, summary="Count a conversation's tokens (Anthropic)"
)
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """As many as `usage` counts of the same request."""
    services = services_of(request)
    soft_prompt = named_soft_prompt(services, body.model, body.soft_prompt)
    conversation = _plan(services, body).conversation
    with fields_named(_names(body), model=body.model if body.model == soft_prompt else None):
        lease = await services.leases.acquire(soft_prompt) if soft_prompt is not None else None
        try:
            counted = await services.recaller.count(conversation, lease, body.recall, body.chat_end)
        finally:
            services.admission.release(lease)
    return json_reply(TokenCountReply(input_tokens=counted))


def _names(body: ConversationFields) -> dict[str, str]:
    """What the fields of a generation are called here."""
    schemas = {f"tools.{index}.parameters": f"tools.{index}.input_schema" for index in range(len(body.tools))}
    effort = "thinking" if body.output_config.effort is None else "output_config.effort"
    return {"prompt": "messages", "continue_final_message": "messages", "reasoning_effort": effort, **schemas}


def _plan(services: Services, body: ConversationFields) -> ChatPlan:
    with fields_named(_names(body)):
        return services.dialect.plan(
            body.turns,
            body.tool_use,
            fields=services.dialect.template_fields({}, body.effort),
            output_format=body.output_format,
            chat_end=body.chat_end,
            has_soft_prompt=named_soft_prompt(services, body.model, body.soft_prompt) is not None,
        )


def _request(services: Services, body: MessagesRequest, plan: ChatPlan) -> GenerationRequest:
    return GenerationRequest(
        prompt=plan.conversation,
        chat_end=body.chat_end,
        params=body.sampling_params,
        seed=body.sampler_seed,
        max_tokens=body.max_tokens,
        may_clip=True,
        stop=tuple(body.stop_sequences),
        soft_prompt=named_soft_prompt(services, body.model, body.soft_prompt),
        priority=body.priority,
        cache_salt=body.cache_salt,
        user=body.metadata.user_id,
        output_format=plan.output_format,
        timeout=body.timeout,
        recall=body.recall,
        shown_tokens=plan.shown_tokens,
        route=ROUTE,
    )

"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.sse import EventStream
from softbatch.server.requests.choices import Choice, gather
from softbatch.server.requests.generation import Generation, GenerationRequest
from softbatch.server.routes.chat_stream import ChatStream, finish_reason_of, logprobs_of
from softbatch.server.routes.common import (
    fields_named,
    json_reply,
    named_soft_prompt,
    recalled_of,
    services_of,
    shown_tokens,
    start_all,
    usage_of,
)
from softbatch.server.schemas.base import ERROR_REPLIES, STREAM_REPLY
from softbatch.server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    FunctionCalled,
    ToolCall,
)
from softbatch.server.services import Services
from softbatch.server.tools.dialect import ChatPlan
from softbatch.server.tools.message_parts import ReadMessage

router = APIRouter(tags=["generate"], responses=ERROR_REPLIES)
ROUTE = "/v1/chat/completions"


@router.post(ROUTE, response_model=ChatCompletion, responses=STREAM_REPLY, summary="Answer a conversation (OpenAI)")
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """With a soft prompt that stands for the system turn, a system message begins the first user turn.

    With `stream: true` the reply is a stream of events `data: {...}`, ended by `data: [DONE]`.
    """
    services = services_of(request)
    plan = _plan(services, body)
    requests = _requests(services, body, plan)
    if body.stream:
        generations = await until_disconnect(request, start_all(services, body, requests, _names(body)))
        stream = ChatStream(body, plan, generations, _reply_fields(services, body, generations))
        return EventStream(stream.events(), generations, ROUTE)

    async def complete() -> Response:
        generations = await start_all(services, body, requests, _names(body))
        choices = [_choice(body, plan, index, choice) for index, choice in enumerate(await gather(generations))]
        usage = usage_of(generations, body.n)
        reply = _reply_fields(services, body, generations)
        recalled = recalled_of([generations[0].recalled], body.return_recalled)
        prompt_ids = generations[0].prompt_ids if body.return_token_ids else None
        fields: dict[str, Any] = {"recalled": recalled, "prompt_token_ids": prompt_ids}
        return json_reply(ChatCompletion(**reply, choices=choices, usage=usage, **fields))

    return await until_disconnect(request, complete())


def _names(body: ChatCompletionRequest) -> dict[str, str]:
    """What the fields of a generation are called here."""
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return {"prompt": "messages", "max_tokens": limit}


def _plan(services: Services, body: ChatCompletionRequest) -> ChatPlan:
    soft_prompt = named_soft_prompt(services, body.model, body.soft_prompt)
    with fields_named(body.names_of_thinking):
        return services.dialect.plan(
            [message.as_turn() for message in body.messages],
            body.tool_use,
            fields=services.dialect.template_fields(body.template_fields, body.effort),
            output_format=body.output_format,
            chat_end=body.chat_end,
            has_soft_prompt=soft_prompt is not None,
        )


def _requests(services: Services, body: ChatCompletionRequest, plan: ChatPlan) -> list[GenerationRequest]:
    soft_prompt = named_soft_prompt(services, body.model, body.soft_prompt)
    return [
        GenerationRequest(
            prompt=plan.conversation,
            params=body.sampling_params(body.num_logprobs),
            seed=body.seed_of(choice),
            max_tokens=body.token_limit,
            stop=tuple(body.stop),
            include_stop=body.include_stop_str_in_output,
            shown_tokens=plan.shown_tokens if body.skip_special_tokens else services.text.tokens.hidden,
            truncate=body.truncate_prompt_tokens,
            bad_words=tuple(body.bad_words),
            chat_end=body.chat_end,
            soft_prompt=soft_prompt,
            priority=body.priority,
            cache_salt=body.cache_salt,
            user=body.user,
            output_format=plan.output_format,
            timeout=body.timeout,
            recall=body.recall,
            route=ROUTE,
        )
        for choice in range(body.n)
    ]


def _reply_fields(services: Services, body: ChatCompletionRequest, generations: Sequence[Generation]) -> dict[str, Any]:
    """What the reply and all chunks of a stream have in common."""
    return {
        "id": f"chatcmpl-{generations[0].request_id}",
        "created": generations[0].created,
        "model": body.model or services.model_name,
    }


def _choice(body: ChatCompletionRequest, plan: ChatPlan, index: int, choice: Choice) -> ChatChoice:
    reader = plan.reader(choice.generation.prompt_ids)
    message = ReadMessage.of([*reader.push(choice.text), *reader.finish()])
    calls = [
        ToolCall(id=call.id, function=FunctionCalled(name=call.name, arguments=call.arguments))
        for call in message.calls
    ]
    return ChatChoice(
        index=index,
        message=AssistantMessage(
            content=None if calls and not message.content else message.content,
            tool_calls=calls or None,
            reasoning_content=message.reasoning or None,
            reasoning=message.reasoning or None,
        ),
        logprobs=logprobs_of(shown_tokens(body, choice.tokens)) if body.logprobs else None,
        finish_reason=finish_reason_of(choice.finish_reason or "stop", has_calls=bool(calls)),
        stop_reason=choice.stop_reason,
        token_ids=[token.id for token in choice.tokens] if body.return_token_ids else None,
    )

"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.sse import DONE, EventStream
from softbatch.server.requests.choices import gather, merge
from softbatch.server.requests.generation import Generation, GenerationRequest, Token
from softbatch.server.routes.common import (
    FINISH_REASONS,
    ChunkTemplate,
    json_reply,
    named_soft_prompt,
    services_of,
    start_all,
    usage_of,
)
from softbatch.server.schemas.base import ERROR_REPLIES, STREAM_REPLY
from softbatch.server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    TokenLogprob,
)
from softbatch.server.schemas.sampling import StreamOptions
from softbatch.server.services import Services

router = APIRouter(tags=["generate"], responses=ERROR_REPLIES)
ROUTE = "/v1/chat/completions"


@router.post(ROUTE, response_model=ChatCompletion, responses=STREAM_REPLY, summary="Answer a conversation (OpenAI)")
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """With a soft prompt that stands for the system turn, a system message begins the first user turn.

    With `stream: true` the reply is a stream of events `data: {...}`, ended by `data: [DONE]`.
    """
    services = services_of(request)
    requests = _requests(services, body)
    if body.stream:
        generations = await until_disconnect(request, start_all(services, body, requests, _names(body)))
        reply = _reply_fields(services, body, generations)
        return EventStream(_events(body, generations, reply), generations, ROUTE)

    async def complete() -> Response:
        generations = await start_all(services, body, requests, _names(body))
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=choice.text),
                logprobs=_logprobs(choice.tokens) if body.logprobs else None,
                finish_reason=FINISH_REASONS[choice.finish_reason or "stop"],
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(await gather(generations))
        ]
        usage = usage_of(generations, body.n)
        reply = _reply_fields(services, body, generations)
        return json_reply(ChatCompletion(**reply, choices=choices, usage=usage))

    return await until_disconnect(request, complete())


def _names(body: ChatCompletionRequest) -> dict[str, str]:
    """What the fields of a generation are called here."""
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return {"prompt": "messages", "max_tokens": limit}


def _requests(services: Services, body: ChatCompletionRequest) -> list[GenerationRequest]:
    soft_prompt = named_soft_prompt(services, body.model, body.soft_prompt)
    turns = [message.as_turn() for message in body.messages]
    return [
        GenerationRequest(
            prompt=turns,
            params=body.sampling_params(body.num_logprobs),
            seed=body.seed_of(choice),
            max_tokens=body.token_limit,
            stop=tuple(body.stop),
            soft_prompt=soft_prompt,
            priority=body.priority,
            cache_salt=body.cache_salt,
            user=body.user,
            output_format=body.output_format,
            timeout=body.timeout,
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


async def _events(
    body: ChatCompletionRequest, generations: Sequence[Generation], reply: dict[str, Any]
) -> AsyncGenerator[str | bytes, None]:
    options = body.stream_options or StreamOptions()

    def chunk(choice: ChatChunkChoice) -> ChatCompletionChunk:
        usage = usage_of(generations, body.n) if options.continuous_usage_stats else None
        return ChatCompletionChunk(**reply, choices=[choice], usage=usage)

    # What all but the first and the last chunks of a choice look like, unless log-probabilities are asked for.
    ordinary = ChatDelta(content=ChunkTemplate.TEXT)
    templates = [ChunkTemplate(chunk(ChatChunkChoice(index=i, delta=ordinary))) for i in range(len(generations))]
    begun: set[int] = set()
    async with aclosing(merge(generations)) as deltas:
        async for index, delta in deltas:
            if index not in begun:
                # Only now: load generators take the first chunk for the first token.
                begun.add(index)
                first = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
                yield chunk(first).model_dump_json()
            logprobs = _logprobs(delta.tokens) if body.logprobs else None
            if not delta.text and not (logprobs and logprobs.content) and delta.finish_reason is None:
                continue
            if logprobs is None and delta.finish_reason is None and not options.continuous_usage_stats:
                yield templates[index].fill(delta.text)
                continue
            content = delta.text if delta.text or delta.finish_reason is None else None
            last = chunk(
                ChatChunkChoice(
                    index=index,
                    delta=ChatDelta(content=content),
                    logprobs=logprobs,
                    finish_reason=FINISH_REASONS.get(delta.finish_reason or ""),
                    stop_reason=delta.stop_reason,
                )
            )
            yield last.model_dump_json()
    if options.include_usage:
        usage = ChatCompletionChunk(**reply, choices=[], usage=usage_of(generations, body.n))
        yield usage.model_dump_json()
    yield DONE


def _logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    content = []
    for token in tokens:
        top = [TokenLogprob(token=t.text, logprob=t.logprob, bytes=list(t.utf8)) for t in token.top]
        content.append(
            ChatTokenLogprob(
                token=token.text,
                logprob=token.logprob if token.logprob is not None else 0.0,
                bytes=list(token.utf8),
                top_logprobs=top,
            )
        )
    return ChatLogprobs(content=content)

"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.sse import DONE, EventStream
from softbatch.server.requests.choices import Choice, best_first, gather, merge
from softbatch.server.requests.generation import Delta, Generation, GenerationRequest, Token
from softbatch.server.requests.scored_prompt import scored_prompt
from softbatch.server.routes.common import (
    FINISH_REASONS,
    ChunkTemplate,
    json_reply,
    named_soft_prompt,
    recalled_of,
    services_of,
    shown_tokens,
    start_all,
    usage_of,
)
from softbatch.server.schemas.base import ERROR_REPLIES, STREAM_REPLY
from softbatch.server.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    PromptAlternative,
    ScoredChoice,
)
from softbatch.server.schemas.sampling import StreamOptions
from softbatch.server.services import Services

router = APIRouter(tags=["generate"], responses=ERROR_REPLIES)
ROUTE = "/v1/completions"


@router.post(ROUTE, response_model=Completion, responses=STREAM_REPLY, summary="Continue a text (OpenAI)")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """`prompt` is a text, token ids, or a list of either; every prompt gets `n` choices, numbered in order.

    With `stream: true` the reply is a stream of events `data: {...}`, ended by `data: [DONE]`.
    """
    services = services_of(request)
    requests = _requests(services, body)
    if body.stream:
        generations = await until_disconnect(request, start_all(services, body, requests))
        reply = _reply_fields(services, body, generations)
        events = _events(services, body, generations, reply)
        return EventStream(events, generations, ROUTE)

    async def complete() -> Response:
        generations = await start_all(services, body, requests)
        choices = _choices(services, body, await gather(generations))
        usage = usage_of(generations, body.num_made)
        reply = _reply_fields(services, body, generations)
        recalled = recalled_of([each.recalled for each in generations[:: body.num_made]], body.return_recalled)
        return json_reply(Completion(**reply, choices=choices, usage=usage, recalled=recalled))

    return await until_disconnect(request, complete())


def _requests(services: Services, body: CompletionRequest) -> list[GenerationRequest]:
    soft_prompt = named_soft_prompt(services, body.model, body.soft_prompt)
    return [
        GenerationRequest(
            prompt=prompt,
            params=body.sampling_params(0 if body.logprobs is None and body.num_made > body.n else body.logprobs),
            seed=body.seed_of(choice),
            max_tokens=body.max_tokens,
            stop=tuple(body.stop),
            include_stop=body.include_stop_str_in_output,
            shown_tokens=frozenset() if body.skip_special_tokens else services.text.tokens.hidden,
            truncate=body.truncate_prompt_tokens,
            bad_words=tuple(body.bad_words),
            soft_prompt=soft_prompt,
            add_special_tokens=body.add_special_tokens,
            priority=body.priority,
            cache_salt=body.cache_salt,
            user=body.user,
            output_format=body.output_format,
            timeout=body.timeout,
            recall=body.passages,
            # The choices of one reply share the scores of the first.
            score_prompt=body.score_prompt if choice == 0 or body.stream else None,
            route=ROUTE,
        )
        for prompt in body.prompt
        for choice in range(body.num_made)
    ]


def _choices(services: Services, body: CompletionRequest, choices: Sequence[Choice]) -> list[CompletionChoice]:
    made: list[CompletionChoice] = []
    for at, prompt in enumerate(body.prompt):
        mine = choices[at * body.num_made : (at + 1) * body.num_made]
        generation = mine[0].generation
        echo, echoed = _echo(services, body, prompt, generation)
        of_prompt = _prompt_logprobs(services, body, generation)
        for choice in mine if body.num_made == body.n else best_first(mine)[: body.n]:
            fields: dict[str, Any] = {
                "index": len(made),
                "text": echo + choice.text,
                "logprobs": None
                if body.logprobs is None
                else _joined(echoed, _logprobs(body, choice.tokens, len(echo))),
                "finish_reason": FINISH_REASONS[choice.finish_reason or "stop"],
                "stop_reason": choice.stop_reason,
                "token_ids": [token.id for token in choice.tokens] if body.return_token_ids else None,
                "prompt_token_ids": generation.prompt_ids if body.return_token_ids else None,
            }
            if of_prompt is None:
                made.append(CompletionChoice(**fields))
            else:
                made.append(ScoredChoice(**fields, prompt_logprobs=of_prompt))
    return made


def _echo(
    services: Services, body: CompletionRequest, prompt: str | list[int], generation: Generation
) -> tuple[str, CompletionLogprobs | None]:
    """What the reply begins with, once the generation has brought something."""
    if not body.echo:
        return "", None
    if body.logprobs is None:
        return prompt if isinstance(prompt, str) else services.text.decode(prompt, body.skip_special_tokens), None
    scored = scored_prompt(services.text, prompt, generation.prompt_ids, generation.prompt_scores, body.logprobs)
    logprobs = _logprobs(body, scored.tokens, 0)
    if scored.places is not None:
        logprobs.text_offset = list(scored.places)
    return scored.text, logprobs


def _joined(first: CompletionLogprobs | None, second: CompletionLogprobs) -> CompletionLogprobs:
    if first is None:
        return second
    return CompletionLogprobs(**{name: [*values, *getattr(second, name)] for name, values in first})


def _prompt_logprobs(
    services: Services, body: CompletionRequest, generation: Generation
) -> list[dict[int, PromptAlternative] | None] | None:
    """As vLLM reports them."""
    if body.prompt_logprobs is None:
        return None
    reply: list[dict[int, PromptAlternative] | None] = [None]
    for token_id, score in zip(generation.prompt_ids[1:], generation.prompt_scores, strict=True):
        found = {token_id: (score.logprob, score.rank)}
        top = zip(score.top_ids[: body.prompt_logprobs], score.top_logprobs, strict=False)
        for rank, (top_id, logprob) in enumerate(top, start=1):
            found.setdefault(top_id, (logprob, rank))
        piece = services.text.piece
        reply.append(
            {
                each: PromptAlternative(logprob=logprob, rank=rank, decoded_token=piece(each))
                for each, (logprob, rank) in found.items()
            }
        )
    return reply


def _reply_fields(services: Services, body: CompletionRequest, generations: Sequence[Generation]) -> dict[str, Any]:
    """What the reply and all chunks of a stream have in common."""
    return {
        "id": f"cmpl-{generations[0].request_id}",
        "created": generations[0].created,
        "model": body.model or services.model_name,
    }


async def _events(
    services: Services, body: CompletionRequest, generations: Sequence[Generation], reply: dict[str, Any]
) -> AsyncGenerator[str | bytes, None]:
    options = body.stream_options or StreamOptions()

    def chunk(
        index: int,
        text: str,
        delta: Delta | None = None,
        logprobs: CompletionLogprobs | None = None,
        is_first: bool = False,
    ) -> Completion:
        with_ids = body.return_token_ids and delta is not None
        choice = CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=FINISH_REASONS.get(delta.finish_reason or "") if delta else None,
            stop_reason=delta.stop_reason if delta else None,
            token_ids=[token.id for token in delta.tokens] if delta and with_ids else None,
            prompt_token_ids=generations[index].prompt_ids if with_ids and is_first else None,
        )
        usage = usage_of(generations[index : index + 1], 1) if options.continuous_usage_stats else None
        return Completion(**reply, choices=[choice], usage=usage)

    # What all but the last chunks of a choice look like, unless log-probabilities are asked for.
    templates = [ChunkTemplate(chunk(index, ChunkTemplate.TEXT)) for index in range(len(generations))]
    if (recalled := recalled_of([each.recalled for each in generations[:: body.n]], body.return_recalled)) is not None:
        yield Completion(**reply, choices=[], recalled=recalled).model_dump_json()
    has_begun = [False] * len(generations)
    offsets = [0] * len(generations)
    async with aclosing(merge(generations)) as deltas:
        async for index, delta in deltas:
            echo, echoed, logprobs = "", None, None
            is_first = not has_begun[index]
            if is_first:
                has_begun[index] = True
                echo, echoed = _echo(services, body, body.prompt[index // body.n], generations[index])
            text = echo + delta.text
            if body.logprobs is not None:
                logprobs = _joined(echoed, _logprobs(body, delta.tokens, offsets[index] + len(echo)))
                offsets[index] += len(echo) + sum(_characters_begun(token) for token in delta.tokens)
            has_ids = body.return_token_ids and bool(delta.tokens or is_first)
            if not (text or has_ids or (logprobs and logprobs.tokens) or delta.finish_reason):
                continue
            is_ordinary = logprobs is None and not has_ids and delta.finish_reason is None
            if is_ordinary and not options.continuous_usage_stats:
                yield templates[index].fill(text)
            else:
                yield chunk(index, text, delta, logprobs, is_first).model_dump_json()
    if options.include_usage:
        yield Completion(**reply, choices=[], usage=usage_of(generations, body.n)).model_dump_json()
    yield DONE


def _logprobs(body: CompletionRequest, tokens: Sequence[Token], offset: int) -> CompletionLogprobs:
    """`offset` is how many characters the tokens before have begun."""
    reply = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token in shown_tokens(body, tokens):
        # Two tokens may have the same text; the better one comes first and stays.
        top: dict[str, float] = {}
        for other in token.top:
            top.setdefault(other.text, other.logprob)
        if token.logprob is not None:
            top.setdefault(token.text, token.logprob)
        reply.tokens.append(token.text)
        reply.token_logprobs.append(token.logprob)
        reply.top_logprobs.append(top or None)
        reply.text_offset.append(offset - (token.utf8[:1] > b"\x7f" and token.utf8[0] < 0xC0))
        offset += _characters_begun(token)
    return reply


def _characters_begun(token: Token) -> int:
    """All bytes of a character but the first are from 0x80 to 0xBF."""
    return len(token.utf8) if token.utf8.isascii() else sum(byte & 0xC0 != 0x80 for byte in token.utf8)

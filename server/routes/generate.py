"""`POST /generate`, `/generate_stream` and `/`, as text-generation-inference has them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.sse import EventStream
from softbatch.server.requests.choices import Choice, best_first, gather, merge
from softbatch.server.requests.generation import Generation, GenerationRequest, Token
from softbatch.server.routes.common import fields_named, json_reply, named_soft_prompt, recalled_of, services_of
from softbatch.server.schemas.base import STREAM_REPLY
from softbatch.server.schemas.generate import (
    GENERATE_ERROR_REPLIES,
    BestOfSequence,
    CompatGenerateRequest,
    GenerateDetails,
    GeneratedToken,
    GenerateFinishReason,
    GenerateReply,
    GenerateRequest,
    GenerateStreamRequest,
    InputToken,
    StreamDetails,
    StreamEvent,
)
from softbatch.server.schemas.sampling import SEED_MASK
from softbatch.server.services import Services

router = APIRouter(tags=["generate"], responses=GENERATE_ERROR_REPLIES)
# What the fields of a generation are called here.
NAMES = {
    "prompt": "inputs",
    "max_tokens": "parameters.max_new_tokens",
    "min_tokens": "parameters.min_new_tokens",
    "soft_prompt": "parameters.soft_prompt",
    "recall": "parameters.recall",
}
FINISH_REASONS: Mapping[str, GenerateFinishReason] = {
    "eos": "eos_token",
    "stop": "stop_sequence",
    "length": "length",
    "timeout": "length",
}

# Stands in the last event of a stream whose time is over with no token left to send; clients expect one in each event.
NO_TOKEN = Token(id=0, text="", special=True, utf8=b"")


@router.post("/generate", response_model=GenerateReply, summary="Continue a text (text-generation-inference)")
async def generate(request: Request, body: GenerateRequest) -> Response:
    """The headers x-queue-time, x-inference-time and x-time-per-token are milliseconds."""
    services = services_of(request)
    choices = await until_disconnect(request, _complete(services, body, "/generate"))
    return json_reply(_reply(services, body, choices), headers=_timings(choices[0].generation))


@router.post(
    "/generate_stream", response_model=StreamEvent, responses=STREAM_REPLY, summary="The same as a stream of tokens"
)
async def generate_stream(request: Request, body: GenerateStreamRequest) -> Response:
    """Events `data: {...}`, one per token; the last one has `generated_text` and `details`."""
    return await until_disconnect(request, _stream(services_of(request), body, "/generate_stream"))


@router.post(
    "/invocations",
    response_model=list[GenerateReply],
    responses=STREAM_REPLY,
    summary="The same for platforms that call it so (SageMaker)",
)
@router.post(
    "/", response_model=list[GenerateReply], responses=STREAM_REPLY, summary="Either of both, by the field `stream`"
)
async def compat_generate(request: Request, body: CompatGenerateRequest) -> Response:
    """The route that the clients of huggingface_hub call. Without `stream` the reply is a list of one."""
    services = services_of(request)
    if body.stream:
        return await until_disconnect(request, _stream(services, body, "/"))
    choices = await until_disconnect(request, _complete(services, body, "/"))
    text = f"[{_reply(services, body, choices).model_dump_json()}]"
    return Response(text, headers=_timings(choices[0].generation), media_type="application/json")


async def _complete(services: Services, body: GenerateRequest, route: str) -> list[Choice]:
    """The best one first."""
    parameters = body.parameters
    request = _request(services, body, parameters.details or parameters.best_of > 1, route)
    requests = [
        replace(
            request,
            seed=None if parameters.seed is None else (parameters.seed + at) & SEED_MASK,
            score_prompt=0 if parameters.scores_input else None,
        )
        for at in range(parameters.best_of)
    ]
    with fields_named(NAMES, model=body.model if body.model == request.soft_prompt else None):
        generations = await services.generator.start_many(requests)
    return best_first(await gather(generations))


async def _stream(services: Services, body: GenerateRequest, route: str) -> Response:
    request = _request(services, body, True, route)
    with fields_named(NAMES, model=body.model if body.model == request.soft_prompt else None):
        generation = await services.generator.start(request)
    return EventStream(_events(services, body, generation), [generation], route)


def _request(services: Services, body: GenerateRequest, with_logprobs: bool, route: str) -> GenerationRequest:
    parameters = body.parameters
    return GenerationRequest(
        prompt=body.inputs,
        params=parameters.sampling_params(parameters.top_n_tokens if with_logprobs else None),
        seed=None if parameters.seed is None else parameters.seed & SEED_MASK,
        max_tokens=parameters.max_new_tokens,
        stop=tuple(parameters.stop),
        include_stop=True,
        soft_prompt=named_soft_prompt(services, body.model, parameters.soft_prompt or parameters.adapter_id),
        truncate=parameters.truncate,
        output_format=parameters.output_format,
        timeout=parameters.timeout,
        # A prompt that is scored is the one that the client has sent.
        recall=0 if parameters.scores_input else parameters.recall,
        route=route,
    )


def _reply(services: Services, body: GenerateRequest, choices: Sequence[Choice]) -> GenerateReply:
    best, *others = choices
    text = _prefix(body) + best.text
    recalled = recalled_of([best.generation.recalled], body.parameters.return_recalled)
    if not body.parameters.details:
        return GenerateReply(generated_text=text, recalled=recalled)
    sequences = [
        BestOfSequence(generated_text=_prefix(body) + other.text, **_details(services, body, other)) for other in others
    ]
    details = GenerateDetails(**_details(services, body, best), best_of_sequences=sequences or None)
    return GenerateReply(generated_text=text, details=details, recalled=recalled)


def _details(services: Services, body: GenerateRequest, choice: Choice) -> dict[str, Any]:
    top_tokens = None
    if body.parameters.top_n_tokens:
        top_tokens = [_alternatives(services, token) for token in choice.tokens]
    return {
        "finish_reason": FINISH_REASONS[choice.finish_reason or "stop"],
        "stop_reason": _timed_out(choice.finish_reason),
        "generated_tokens": choice.generation.completion_tokens,
        "seed": _seed(body, choice.generation),
        "prefill": _input_tokens(services, choice.generation) if body.parameters.scores_input else [],
        "tokens": [_token(token) for token in choice.tokens],
        "top_tokens": top_tokens,
    }


def _input_tokens(services: Services, generation: Generation) -> list[InputToken]:
    logprobs = [None, *(score.logprob for score in generation.prompt_scores)]
    return [
        InputToken(id=token_id, text=services.text.piece(token_id), logprob=logprob)
        for token_id, logprob in zip(generation.prompt_ids, logprobs, strict=True)
    ]


async def _events(
    services: Services, body: GenerateRequest, generation: Generation
) -> AsyncGenerator[str | bytes, None]:
    pieces = [_prefix(body)]
    index = 0
    unsent = ""
    async with aclosing(merge([generation])) as deltas:
        async for _, delta in deltas:
            pieces.append(delta.text)
            # Text may be certain before the token is that it is a part of.
            unsent += delta.text
            tokens = delta.tokens
            if not tokens and delta.finish_reason is not None:
                tokens = (NO_TOKEN,)
            if not tokens:
                continue
            texts, unsent = _texts(tokens, unsent), ""
            for position, (token, text) in enumerate(zip(tokens, texts, strict=True), 1):
                index += 1
                is_last = delta.finish_reason is not None and position == len(tokens)
                yield StreamEvent(
                    index=index,
                    token=_token(token).model_copy(update={"text": text}),
                    top_tokens=_alternatives(services, token) if body.parameters.top_n_tokens else None,
                    generated_text="".join(pieces) if is_last else None,
                    details=_stream_details(body, generation, delta.finish_reason) if is_last else None,
                ).model_dump_json()


def _texts(tokens: Sequence[Token], text: str) -> list[str]:
    """What each token adds; joined over all events, the generated text. Special tokens show their own."""
    texts = [token.text if token.special else "" for token in tokens]
    if text:
        # Behind the text there can only be special tokens.
        ordinary = [position for position, token in enumerate(tokens) if not token.special]
        texts[ordinary[-1] if ordinary else -1] = text
    return texts


def _stream_details(body: GenerateRequest, generation: Generation, finish_reason: str | None) -> StreamDetails:
    return StreamDetails(
        finish_reason=FINISH_REASONS[finish_reason or "stop"],
        stop_reason=_timed_out(finish_reason),
        generated_tokens=generation.completion_tokens,
        seed=_seed(body, generation),
        input_length=generation.virtual_tokens + generation.prompt_tokens,
        recalled=recalled_of([generation.recalled], body.parameters.return_recalled),
    )


def _timed_out(finish_reason: str | None) -> Literal["timeout"] | None:
    return "timeout" if finish_reason == "timeout" else None


def _prefix(body: GenerateRequest) -> str:
    return body.inputs if body.parameters.return_full_text else ""


def _seed(body: GenerateRequest, generation: Generation) -> int | None:
    return generation.seed if body.parameters.samples else None


def _token(token: Token) -> GeneratedToken:
    return GeneratedToken(id=token.id, text=token.text, logprob=token.logprob or 0.0, special=token.special)


def _alternatives(services: Services, token: Token) -> list[GeneratedToken]:
    return [
        GeneratedToken(id=t.id, text=t.text, logprob=t.logprob, special=services.text.is_special(t.id))
        for t in token.top
    ]


def _timings(generation: Generation) -> dict[str, str]:
    inference = generation.total_seconds - generation.queue_seconds
    tokens = generation.completion_tokens
    return {
        "x-total-time": _milliseconds(generation.total_seconds),
        "x-queue-time": _milliseconds(generation.queue_seconds),
        "x-inference-time": _milliseconds(inference),
        "x-time-per-token": _milliseconds(inference / max(tokens, 1)),
        "x-prompt-tokens": str(generation.virtual_tokens + generation.prompt_tokens),
        "x-generated-tokens": str(tokens),
    }


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))

"""`POST /v1/score`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from softbatch.server.http.disconnect import until_disconnect
from softbatch.server.http.errors import invalid
from softbatch.server.requests.prompt_encoder import Prompt
from softbatch.server.requests.scoring import Scores
from softbatch.server.requests.text import Message
from softbatch.server.routes.common import fields_named, json_reply, named_soft_prompt, recalled_of, services_of
from softbatch.server.schemas.base import ERROR_REPLIES
from softbatch.server.schemas.replies import CachedTokens, Usage
from softbatch.server.schemas.score import ScoredCandidate, ScoredToken, ScoreReply, ScoreRequest
from softbatch.server.services import Services

router = APIRouter(tags=["score"], responses=ERROR_REPLIES)
ROUTE = "/v1/score"


@router.post(ROUTE, response_model=ScoreReply, summary="Log-probabilities of given answers")
async def score(request: Request, body: ScoreRequest) -> Response:
    """log Pr(y | soft prompt or context or nothing, input) of each candidate y, per token and summed."""
    services = services_of(request)
    soft_prompt = named_soft_prompt(services, body.model, body.soft_prompt)
    if soft_prompt is not None and body.context is not None:
        raise invalid("context", "a soft prompt already stands for a context: send only one of them")
    work = services.scorer.score(
        _prompt(services, body), body.candidates, soft_prompt=soft_prompt, recall=body.recall, end=body.end, route=ROUTE
    )
    names = {"prompt": "input" if body.messages is None else "messages"}
    with fields_named(names, model=body.model if body.model == soft_prompt else None):
        scores = await until_disconnect(request, work)
    return json_reply(_reply(services, body, soft_prompt, scores))


def _prompt(services: Services, body: ScoreRequest) -> Prompt:
    """As the context would have stood in front when a soft prompt was made of it: in the system turn."""
    if not services.text.tokenizer.chat_template:
        if body.messages is not None:
            raise invalid("messages", "this model has no chat template; send 'input'")
        return "\n\n".join(services.text.quote(part) for part in (body.context, body.input) if part)
    turns: list[Message] = [{"role": "user", "content": body.input or ""}]
    if body.messages is not None:
        turns = services.dialect.history([message.as_turn() for message in body.messages])
    return [{"role": "system", "content": body.context}, *turns] if body.context is not None else turns


def _reply(services: Services, body: ScoreRequest, soft_prompt: str | None, scores: Scores) -> ScoreReply:
    totals = [candidate.logprob for candidate in scores.candidates]
    shares = _normalised(totals)
    return ScoreReply(
        model=services.model_name,
        soft_prompt=soft_prompt,
        best=max(range(len(totals)), key=totals.__getitem__),
        candidates=[
            ScoredCandidate(
                index=index,
                text=body.candidates[index],
                logprob=totals[index],
                probability=shares[index],
                tokens=[
                    ScoredToken(id=token_id, text=services.text.piece(token_id), logprob=logprob)
                    for token_id, logprob in zip(candidate.token_ids, candidate.logprobs, strict=True)
                ],
            )
            for index, candidate in enumerate(scores.candidates)
        ],
        usage=_usage(scores),
        recalled=recalled_of([scores.recalled], body.return_recalled),
    )


def _usage(scores: Scores) -> Usage:
    prompt = scores.virtual_tokens + scores.prompt_tokens
    scored = sum(len(candidate.token_ids) for candidate in scores.candidates)
    return Usage(
        prompt_tokens=prompt + scored,
        completion_tokens=0,
        total_tokens=prompt + scored,
        prompt_tokens_details=CachedTokens(
            cached_tokens=scores.virtual_tokens, recalled_tokens=scores.recalled.tokens or None
        ),
    )


def _normalised(logprobs: Sequence[float]) -> list[float]:
    """Shares that add up to one."""
    most = max(logprobs)
    weights = [math.exp(logprob - most) for logprob in logprobs]
    return [weight / sum(weights) for weight in weights]

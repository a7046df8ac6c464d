"""What the routes share: the way to the server's parts, the meaning of `model`, replies as JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, cast

import msgspec
from fastapi import Request, Response
from pydantic import BaseModel

from softbatch.prompt_store.manifest import Manifest, SoftPromptError
from softbatch.scheduler.protocol import Ready
from softbatch.server.http.errors import invalid, unavailable, unknown_model
from softbatch.server.observability.request_record import current
from softbatch.server.request_failures import Failure
from softbatch.server.requests.generation import Generation, GenerationRequest, Token
from softbatch.server.requests.recall import Recalled
from softbatch.server.schemas.models import PLACEHOLDERS
from softbatch.server.schemas.replies import CachedTokens, RecalledPassage, Usage
from softbatch.server.schemas.sampling import FinishReason, OpenAIRequest, QueuedRequest
from softbatch.server.services import Services

# What OpenAI calls the ends of a text.
FINISH_REASONS: Mapping[str, FinishReason] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    # Clients parse no other word; `stop_reason` says which of the two it was.
    "timeout": "length",
}


def services_of(request: Request) -> Services:
    """Raises ApiError 503 until the app has wired its parts together."""
    services = getattr(request.app.state, "services", None)
    if services is None:
        raise unavailable("the server is starting", code="starting")
    return cast(Services, services)


def engine_info(services: Services) -> Ready:
    """What the engine said about itself and its model. Raises ApiError 503 until it has."""
    info = services.supervisor.info
    if info is None:
        raise unavailable("the engine is starting", code="starting")
    return info


def is_base_model(services: Services, name: str) -> bool:
    return name in (services.model_name, services.settings.model)


def means_base_model(services: Services, name: str | None) -> bool:
    """Whether `model` names the base model, or nothing: some clients have to send a name and know none."""
    if name is None or is_base_model(services, name):
        return True
    return name in PLACEHOLDERS and not services.settings.strict_model_names and not services.store.is_known(name)


def named_soft_prompt(services: Services, model: str | None, soft_prompt: str | None) -> str | None:
    """The soft prompt that both fields ask for together. Whether it exists shows when it is used. Notes what was asked
    for in the request's record."""
    current().model = model or services.model_name
    if model is None or means_base_model(services, model):
        return soft_prompt
    if soft_prompt not in (None, model):
        raise invalid("soft_prompt", "'model' already names another soft prompt: send only one of them")
    return model


def manifest_of(services: Services, soft_prompt: str | None) -> Manifest | None:
    """What a soft prompt says of itself; None without one. Reads the disk. Raises ApiError 404."""
    if soft_prompt is None:
        return None
    try:
        return services.store.get(soft_prompt).manifest
    except SoftPromptError as error:
        raise unknown_model(soft_prompt) from error


@contextlib.contextmanager
def fields_named(names: Mapping[str, str], *, model: str | None = None) -> Iterator[None]:
    """Let errors from below name the fields as this route's clients know them, also where a message begins with one;
    `model` is the soft prompt's name when it came in the field of that name."""
    try:
        yield
    except Failure as error:
        before = error.param
        if model is not None and error.param == "soft_prompt":
            if error.code == "soft_prompt_not_found":
                raise unknown_model(model) from error
            error.param = "model"
        error.param = names.get(error.param or "", error.param)
        if before and error.message.startswith(f"{before}: "):
            error.message = f"{error.param}{error.message.removeprefix(before)}"
        raise


async def start_all(
    services: Services,
    body: QueuedRequest,
    requests: Sequence[GenerationRequest],
    names: Mapping[str, str] = MappingProxyType({}),
) -> list[Generation]:
    """Start all choices of a request, or none. Raises Failure; `names` as in `fields_named`."""
    with fields_named(names, model=body.model if body.model == requests[0].soft_prompt else None):
        return await services.generator.start_many(requests)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises ApiError for a token that the model does not have."""
    if token_ids and max(token_ids) >= vocab_size:
        at = next(index for index, token_id in enumerate(token_ids) if token_id >= vocab_size)
        raise invalid(f"{param}.{at}", f"the model's token ids are 0 to {vocab_size - 1}", code="token_id")


def usage_of(generations: Sequence[Generation], choices_per_prompt: int) -> Usage:
    """Counts a prompt once, however many choices it has."""
    prompts = generations[::choices_per_prompt]
    virtual = sum(generation.virtual_tokens for generation in prompts)
    prompt_tokens = virtual + sum(generation.prompt_tokens for generation in prompts)
    completion_tokens = sum(generation.completion_tokens for generation in generations)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=CachedTokens(
            cached_tokens=sum(generation.cached_tokens for generation in prompts),
            recalled_tokens=sum(generation.recalled.tokens for generation in prompts) or None,
        ),
    )


def recalled_of(recalled: Sequence[Recalled], wanted: bool) -> list[RecalledPassage] | None:
    """For a reply's opt-in field, None where it is not wanted."""
    if not wanted:
        return None
    found = [passage for one in recalled for passage in one.passages]
    return [RecalledPassage(text=passage.text, start=passage.start, end=passage.end) for passage in found]


def shown_tokens(body: OpenAIRequest, tokens: Sequence[Token]) -> Sequence[Token]:
    """The tokens as log-probabilities name them: by their texts, or by their ids."""
    if not body.return_tokens_as_token_ids:
        return tokens
    return [
        msgspec.structs.replace(
            token,
            text=f"token_id:{token.id}",
            top=tuple(msgspec.structs.replace(other, text=f"token_id:{other.id}") for other in token.top),
        )
        for token in tokens
    ]


class ChunkTemplate:
    """Chunks of a stream that differ in one text alone: `chunk` is written once, and each text put into its place.

    `chunk` holds `ChunkTemplate.TEXT` where the text belongs. Its model stays the one definition of the wire's shape.
    """

    TEXT = "\0text\0"

    def __init__(self, chunk: BaseModel) -> None:
        place = msgspec.json.encode(self.TEXT)
        self._before, self._behind = chunk.model_dump_json().encode().split(place)

    def fill(self, text: str) -> bytes:
        return b"%b%b%b" % (self._before, msgspec.json.encode(text), self._behind)


def visible_owner(services: Services) -> str | None:
    """Whose requests, files and batches the client may see; None: everybody's. Keys without admins among them are
    equals, each with its own."""
    record = current()
    sees_all = not record.owner or (record.is_admin and bool(services.settings.admin_key))
    return None if sees_all else record.owner


def json_reply(model: BaseModel, status: Literal[200, 201] = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(model.model_dump_json(), status, headers, media_type="application/json")

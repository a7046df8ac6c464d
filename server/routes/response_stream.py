"""The events of a response's stream, and what they share with a whole one."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from softbatch.server.http.errors import ApiError, error_json
from softbatch.server.http.sse import NamedEventStream
from softbatch.server.requests.generation import Delta, Generation, Token
from softbatch.server.routes.chat_stream import logprobs_of
from softbatch.server.routes.common import usage_of
from softbatch.server.schemas.chat import ChatTokenLogprob
from softbatch.server.schemas.responses import (
    IncompleteDetails,
    InputDetails,
    ItemEvent,
    ItemStatus,
    OutputMessage,
    OutputTextDelta,
    OutputTextDone,
    PartEvent,
    ResponseEvent,
    ResponseReply,
    ResponsesRequest,
    ResponseText,
    ResponseUsage,
)

ROUTE = "/v1/responses"


class ResponseStream:
    """One stream; owns the numbers of its events, from 0 on."""

    def __init__(self, body: ResponsesRequest, model: str, generation: Generation) -> None:
        self._body = body
        self._model = model
        self._generation = generation
        self._item = message_id(generation)
        self._is_open = False
        self._pieces: list[str] = []
        self._logprobs: list[ChatTokenLogprob] = []
        self._next = 0

    async def events(self) -> AsyncGenerator[str | bytes, None]:
        for kind in ("response.created", "response.in_progress"):
            yield self._response_event(kind, begun_response(self._body, self._model, self._generation))
        async with aclosing(aiter(self._generation)) as deltas:
            async for delta in deltas:
                for event in self._events_of(delta):
                    yield event

    def number(self) -> int:
        """That of the next event."""
        self._next += 1
        return self._next - 1

    def _events_of(self, delta: Delta) -> Iterator[str]:
        if not self._is_open:
            self._is_open = True
            yield self._item_event("response.output_item.added", "in_progress", [])
            yield self._part_event("response.content_part.added", ResponseText(text=""))
        logprobs = _logprobs(self._body, delta.tokens)
        if delta.text or logprobs:
            self._pieces.append(delta.text)
            self._logprobs += logprobs
            event = OutputTextDelta(
                sequence_number=self.number(), item_id=self._item, output_index=0, delta=delta.text, logprobs=logprobs
            )
            yield event.model_dump_json()
        if delta.finish_reason is not None:
            yield from self._end(delta.finish_reason)

    def _end(self, finish_reason: str) -> Iterator[str]:
        text = ResponseText(text="".join(self._pieces), logprobs=self._logprobs)
        done = OutputTextDone(
            sequence_number=self.number(),
            item_id=self._item,
            output_index=0,
            text=text.text,
            logprobs=text.logprobs,
        )
        yield done.model_dump_json()
        yield self._part_event("response.content_part.done", text)
        status = status_of(finish_reason)
        yield self._item_event("response.output_item.done", status, [text])
        reply = ended_response(
            begun_response(self._body, self._model, self._generation), self._generation, text, status
        )
        yield self._response_event(f"response.{status}", reply)

    def _response_event(self, kind: str, reply: ResponseReply) -> str:
        return ResponseEvent(type=kind, sequence_number=self.number(), response=reply).model_dump_json()

    def _item_event(self, kind: str, status: ItemStatus, content: list[ResponseText]) -> str:
        item = OutputMessage(id=self._item, status=status, content=content)
        return ItemEvent(type=kind, sequence_number=self.number(), output_index=0, item=item).model_dump_json()

    def _part_event(self, kind: str, part: ResponseText) -> str:
        return PartEvent(
            type=kind, sequence_number=self.number(), item_id=self._item, output_index=0, part=part
        ).model_dump_json()


class ResponseEvents(NamedEventStream):
    """A stream that fails ends with the event 'error'."""

    def __init__(self, stream: ResponseStream, generation: Generation) -> None:
        super().__init__(stream.events(), [generation], ROUTE)
        self._stream = stream

    def error_event(self, error: ApiError) -> str:
        """The error's fields are in the event, as the API has them, and again as on all routes: clients look there."""
        shape: dict[str, Any] = json.loads(error_json(error, ROUTE))
        known = {name: shape["error"][name] for name in ("code", "message", "param")}
        number = {"sequence_number": self._stream.number()}
        return json.dumps({"type": "error", **known, **number, **shape}, separators=(",", ":"))


def message_id(generation: Generation) -> str:
    return f"msg_{generation.request_id}"


def begun_response(body: ResponsesRequest, model: str, generation: Generation) -> ResponseReply:
    """A response without output."""
    wanted = body.text.format
    form: dict[str, Any] = {"type": wanted.type}
    if wanted.schema_text is not None:
        form |= {"name": wanted.name, "strict": wanted.strict, "schema": json.loads(wanted.schema_text)}
    return ResponseReply(
        id=f"resp_{generation.request_id}",
        created_at=generation.created,
        status="in_progress",
        instructions=body.instructions or None,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata,
        model=model,
        output=[],
        temperature=body.temperature,
        text={"format": form},
        top_logprobs=body.top_logprobs,
        top_p=body.top_p,
        usage=None,
        user=body.user or None,
    )


def ended_response(
    begun: ResponseReply, generation: Generation, text: ResponseText, status: ItemStatus
) -> ResponseReply:
    usage = usage_of([generation], 1)
    return begun.model_copy(
        update={
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": None if status == "completed" else IncompleteDetails(reason="max_output_tokens"),
            "output": [OutputMessage(id=message_id(generation), status=status, content=[text])],
            "usage": ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
                output_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
        }
    )


def whole_text(body: ResponsesRequest, text: str, tokens: Sequence[Token]) -> ResponseText:
    return ResponseText(text=text, logprobs=_logprobs(body, tokens))


def status_of(finish_reason: str | None) -> ItemStatus:
    return "incomplete" if finish_reason in ("length", "timeout") else "completed"


def _logprobs(body: ResponsesRequest, tokens: Sequence[Token]) -> list[ChatTokenLogprob]:
    return [] if body.num_logprobs is None else logprobs_of(tokens).content

"""The events of a response's stream; a whole response is what its last event has."""

from __future__ import annotations

import codecs
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import accumulate
from typing import Any

from pydantic import BaseModel

from softbatch.server.http.errors import ApiError, error_json
from softbatch.server.http.sse import NamedEventStream
from softbatch.server.requests.choices import Choice
from softbatch.server.requests.generation import Delta, Generation
from softbatch.server.routes.chat_stream import logprobs_of
from softbatch.server.routes.part_reader import PartReader
from softbatch.server.routes.response_reply import begun_response, ended_response
from softbatch.server.schemas.chat import ChatTokenLogprob
from softbatch.server.schemas.responses import (
    ItemEvent,
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    PartEvent,
    ReasoningText,
    ResponseEvent,
    ResponseReply,
    ResponsesRequest,
    ResponseText,
    TextEvent,
)
from softbatch.server.tools.dialect import ChatPlan
from softbatch.server.tools.message_parts import CallArguments, CallStart, ContentPart, MessagePart

ROUTE = "/v1/responses"
_NAMES = {OutputMessage: "output_text", OutputReasoning: "reasoning_text", OutputCall: "function_call_arguments"}


class ResponseStream:
    """One stream; owns the numbers of its events and the items of its output.

    An item is open from its first piece until another one begins. `reply` is the response so far.
    """

    def __init__(self, body: ResponsesRequest, plan: ChatPlan, model: str, generation: Generation) -> None:
        self.reply: ResponseReply = begun_response(body, model, generation)
        self._has_logprobs = body.num_logprobs is not None
        self._generation = generation
        self._reader = PartReader(plan, generation)
        self._items: list[OutputItem] = []
        self._open: OutputItem | None = None
        self._pieces: list[str] = []
        self._logprobs: list[ChatTokenLogprob] = []
        self._untold: list[ChatTokenLogprob] = []  # of tokens whose text has not come yet
        self._next = 0

    async def events(self) -> AsyncGenerator[str | bytes, None]:
        for kind in ("response.created", "response.in_progress"):
            yield self._response_event(kind)
        async with aclosing(aiter(self._generation)) as deltas:
            async for delta in deltas:
                for event in self.events_of(delta):
                    yield event.model_dump_json()

    def number(self) -> int:
        """That of the next event."""
        self._next += 1
        return self._next - 1

    def events_of(self, delta: Delta) -> Iterator[BaseModel]:
        for piece in _by_token(delta) if self._has_logprobs else (delta,):
            yield from self._events_of_piece(piece)

    def _events_of_piece(self, delta: Delta) -> Iterator[BaseModel]:
        self._untold += logprobs_of(delta.tokens).content if self._has_logprobs else []
        parts = self._reader.read(delta)
        is_last = delta.finish_reason is not None
        for part in parts:
            yield from self._events_of_part(part)
        if is_last:
            # No output is a message too, and the last tokens may have no text of their own.
            if self._open is None or (self._untold and isinstance(self._open, OutputMessage)):
                yield from self._events_of_part(ContentPart(""))
            status: ItemStatus = "incomplete" if delta.finish_reason in ("length", "timeout") else "completed"
            yield from self._close(status)
            self.reply = ended_response(self.reply, self._generation, self._items, status)
            yield ResponseEvent(type=f"response.{status}", sequence_number=self.number(), response=self.reply)

    def _events_of_part(self, part: MessagePart) -> Iterator[BaseModel]:
        number = f"{self._generation.request_id}_{len(self._items)}"
        match part:
            case ContentPart(text):
                if not isinstance(self._open, OutputMessage):
                    self._untold = _ending(self._untold, text)
                    yield from self._begin(OutputMessage(id=f"msg_{number}", status="in_progress", content=[]))
                self._logprobs += self._untold
                yield self._text_event("delta", delta=text, logprobs=self._untold)
                self._untold = []
            case CallStart(_, call_id, name):
                call = OutputCall(id=f"fc_{number}", status="in_progress", call_id=call_id, name=name, arguments="")
                yield from self._begin(call)
                self._untold = []
                return
            case CallArguments(_, text):
                yield self._text_event("delta", delta=text)
                self._untold = []
            case _:
                text = part.text
                self._untold = []
                if not isinstance(self._open, OutputReasoning):
                    yield from self._begin(OutputReasoning(id=f"rs_{number}", status="in_progress", content=[]))
                yield self._text_event("delta", delta=text)
        self._pieces.append(text)

    def _begin(self, item: OutputItem) -> Iterator[BaseModel]:
        yield from self._close("completed")
        self._open = item
        yield self._item_event("added", item)
        if isinstance(item, OutputMessage):
            yield self._part_event("added", ResponseText(text=""))
        elif isinstance(item, OutputReasoning):
            yield self._part_event("added", ReasoningText(text=""))

    def _close(self, status: ItemStatus) -> Iterator[BaseModel]:
        if self._open is None:
            return
        text, item = "".join(self._pieces), self._open
        if isinstance(item, OutputCall):
            yield self._text_event("done", arguments=text, name=item.name)
            done: OutputItem = item.model_copy(update={"arguments": text, "status": status})
        else:
            is_message = isinstance(item, OutputMessage)
            part = ResponseText(text=text, logprobs=self._logprobs) if is_message else ReasoningText(text=text)
            yield self._text_event("done", text=text, logprobs=self._logprobs if is_message else None)
            yield self._part_event("done", part)
            done = item.model_copy(update={"content": [part], "status": status})
        yield self._item_event("done", done)
        self._items.append(done)
        self._open, self._pieces, self._logprobs = None, [], []

    def _response_event(self, kind: str) -> str:
        return ResponseEvent(type=kind, sequence_number=self.number(), response=self.reply).model_dump_json()

    def _item_event(self, kind: str, item: OutputItem) -> ItemEvent:
        return ItemEvent(
            type=f"response.output_item.{kind}",
            sequence_number=self.number(),
            output_index=len(self._items),
            item=item,
        )

    def _part_event(self, kind: str, part: ResponseText | ReasoningText) -> PartEvent:
        assert self._open is not None
        return PartEvent(
            type=f"response.content_part.{kind}",
            sequence_number=self.number(),
            item_id=self._open.id,
            output_index=len(self._items),
            part=part,
        )

    def _text_event(self, kind: str, **fields: Any) -> TextEvent:
        assert self._open is not None
        return TextEvent(
            type=f"response.{_NAMES[type(self._open)]}.{kind}",
            sequence_number=self.number(),
            item_id=self._open.id,
            output_index=len(self._items),
            content_index=None if isinstance(self._open, OutputCall) else 0,
            **fields,
        )


def _by_token(delta: Delta) -> Iterator[Delta]:
    """Each token with its own text, so that its log-probability is told with the part that it belongs to."""
    tokens = delta.tokens
    if len(tokens) < 2 or b"".join(token.utf8 for token in tokens) != delta.text.encode():
        yield delta
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens[:-1]:
        yield Delta(decoder.decode(token.utf8), (token,))
    yield Delta(decoder.decode(tokens[-1].utf8, True), tokens[-1:], delta.finish_reason, delta.stop_reason)


def _ending(tokens: list[ChatTokenLogprob], text: str) -> list[ChatTokenLogprob]:
    """Those from the one on that begins the text; before it stand marks, which no item has."""
    parts = [bytes(token.bytes) for token in tokens]
    start = b"".join(parts).rfind(text.encode()) if text else 0
    if start <= 0:
        return tokens
    ends = accumulate(map(len, parts))
    return [token for token, end in zip(tokens, ends, strict=True) if end > start]


def whole_response(body: ResponsesRequest, plan: ChatPlan, model: str, choice: Choice) -> ResponseReply:
    """As the last event of a stream has it in which all comes at once."""
    stream = ResponseStream(body, plan, model, choice.generation)
    for _ in stream.events_of(choice.as_delta):
        pass
    return stream.reply


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

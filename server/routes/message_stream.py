"""The events of an Anthropic message's stream, and what they share with a whole one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

import msgspec

from softbatch.server.requests.choices import Choice
from softbatch.server.requests.generation import Delta, Generation
from softbatch.server.routes.common import ChunkTemplate, usage_of
from softbatch.server.routes.part_reader import PartReader
from softbatch.server.schemas.messages import (
    BlockDelta,
    BlockStart,
    BlockStop,
    InputJsonDelta,
    MessageContent,
    MessageDelta,
    MessageEnd,
    MessageReply,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    TextContent,
    TextDelta,
    ThinkingContent,
    ThinkingDelta,
    ToolUseContent,
)
from softbatch.server.tools.dialect import ChatPlan
from softbatch.server.tools.message_parts import CallArguments, CallStart, ContentPart, MessagePart

PING = b'{"type":"ping"}'


class MessageStream:
    """One stream; owns the numbers of its blocks. A block is open from its first piece until another one begins."""

    def __init__(self, body: MessagesRequest, plan: ChatPlan, model: str, generation: Generation) -> None:
        self._body = body
        self._model = model
        self._generation = generation
        self._reader = PartReader(plan, generation)
        self._index = 0
        self._open: type[MessageContent] | None = None
        self._text: ChunkTemplate | None = None  # of the open block, if it is one of text

    async def events(self) -> AsyncGenerator[str | bytes, None]:
        is_begun = False
        async with aclosing(aiter(self._generation)) as deltas:
            async for delta in deltas:
                if not is_begun:
                    # Only now: load generators take the first events for the first token.
                    is_begun = True
                    yield MessageStart(message=begun_reply(self._generation, self._model)).model_dump_json()
                    yield PING
                for event in self._events_of(delta):
                    yield event

    def _events_of(self, delta: Delta) -> Iterator[str | bytes]:
        for part in self._reader.read(delta):
            yield from self._events_of_part(part)
        if delta.finish_reason is not None:
            yield from self._close()
            end = end_of(
                self._body, self._generation, delta.finish_reason, delta.stop_reason, has_calls=self._reader.has_calls
            )
            yield MessageDelta(delta=end, usage=usage_so_far(self._generation)).model_dump_json()
            yield MessageStop().model_dump_json()

    def _events_of_part(self, part: MessagePart) -> Iterator[str | bytes]:
        match part:
            case ContentPart(text):
                if self._text is None:
                    yield from self._begin(TextContent(text=""))
                    chunk = BlockDelta(index=self._index, delta=TextDelta(text=ChunkTemplate.TEXT))
                    self._text = ChunkTemplate(chunk)
                yield self._text.fill(text)
            case CallStart(_, call_id, name):
                yield from self._begin(ToolUseContent(id=call_id, name=name, input={}))
            case CallArguments(_, text):
                yield BlockDelta(index=self._index, delta=InputJsonDelta(partial_json=text)).model_dump_json()
            case _:
                if self._open is not ThinkingContent:
                    yield from self._begin(ThinkingContent(thinking=""))
                yield BlockDelta(index=self._index, delta=ThinkingDelta(thinking=part.text)).model_dump_json()

    def _begin(self, block: MessageContent) -> Iterator[str]:
        yield from self._close()
        self._open = type(block)
        yield BlockStart(index=self._index, content_block=block).model_dump_json()

    def _close(self) -> Iterator[str]:
        if self._open is not None:
            yield BlockStop(index=self._index).model_dump_json()
            self._open = self._text = None
            self._index += 1


def whole_message(body: MessagesRequest, plan: ChatPlan, model: str, choice: Choice) -> MessageReply:
    generation = choice.generation
    reader = PartReader(plan, generation)
    blocks = _blocks(reader.read_text(choice.text, is_last=True))
    end = end_of(body, generation, choice.finish_reason, choice.stop_reason, has_calls=reader.has_calls)
    return begun_reply(generation, model).model_copy(
        update={"content": blocks, "stop_reason": end.stop_reason, "stop_sequence": end.stop_sequence}
    )


def _blocks(parts: Iterable[MessagePart]) -> list[MessageContent]:
    """Those of a stream: texts stay where they are among the calls."""
    begun: list[tuple[MessageContent, list[str]]] = []
    for part in parts:
        match part:
            case CallStart(_, call_id, name):
                begun.append((ToolUseContent(id=call_id, name=name, input={}), []))
                continue
            case ContentPart():
                block: MessageContent = TextContent(text="")
            case CallArguments():
                block = begun[-1][0]
            case _:
                block = ThinkingContent(thinking="")
        if not begun or type(begun[-1][0]) is not type(block):
            begun.append((block, []))
        begun[-1][1].append(part.text)
    return [_filled(block, "".join(pieces)) for block, pieces in begun]


def _filled(block: MessageContent, text: str) -> MessageContent:
    match block:
        case TextContent():
            return TextContent(text=text)
        case ThinkingContent():
            return ThinkingContent(thinking=text)
        case _:
            return ToolUseContent(id=block.id, name=block.name, input=_input(text))


def begun_reply(generation: Generation, model: str) -> MessageReply:
    """A message without content."""
    return MessageReply(
        id=f"msg_{generation.request_id}", model=model, content=[], stop_reason=None, usage=usage_so_far(generation)
    )


def usage_so_far(generation: Generation) -> MessageUsage:
    usage = usage_of([generation], 1)
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
    )


def end_of(
    body: MessagesRequest,
    generation: Generation,
    finish_reason: str | None,
    stop_reason: str | int | None,
    *,
    has_calls: bool,
) -> MessageEnd:
    """Why the message ends, in Anthropic's words."""
    if finish_reason == "length" and generation.completion_tokens < body.max_tokens:
        return MessageEnd(stop_reason="model_context_window_exceeded", stop_sequence=None)
    if finish_reason in ("length", "timeout"):
        return MessageEnd(stop_reason="max_tokens", stop_sequence=None)
    if has_calls:
        return MessageEnd(stop_reason="tool_use", stop_sequence=None)
    if finish_reason == "stop":
        return MessageEnd(stop_reason="stop_sequence", stop_sequence=str(stop_reason))
    return MessageEnd(stop_reason="end_turn", stop_sequence=None)


def _input(arguments: str) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

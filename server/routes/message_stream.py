"""The events of an Anthropic message's stream, and what they share with a whole one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from softbatch.server.requests.generation import Delta, Generation
from softbatch.server.routes.common import ChunkTemplate, usage_of
from softbatch.server.schemas.messages import (
    BlockDelta,
    BlockStart,
    BlockStop,
    MessageDelta,
    MessageEnd,
    MessageReply,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    StopReason,
    TextContent,
    TextDelta,
)

PING = b'{"type":"ping"}'


class MessageStream:
    """One stream; owns the numbers of its blocks. A block is open from its first piece until another kind follows."""

    def __init__(self, body: MessagesRequest, model: str, generation: Generation) -> None:
        self._body = body
        self._model = model
        self._generation = generation
        self._index = 0
        self._text: ChunkTemplate | None = None  # of the open block of text

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
        if delta.text:
            if self._text is None:
                yield BlockStart(index=self._index, content_block=TextContent(text="")).model_dump_json()
                self._text = ChunkTemplate(BlockDelta(index=self._index, delta=TextDelta(text=ChunkTemplate.TEXT)))
            yield self._text.fill(delta.text)
        if delta.finish_reason is not None:
            yield from self._close_block()
            end = stop_reason_of(self._body, self._generation, delta.finish_reason, delta.stop_reason)
            yield MessageDelta(delta=end, usage=usage_so_far(self._generation)).model_dump_json()
            yield MessageStop().model_dump_json()

    def _close_block(self) -> Iterator[str]:
        if self._text is not None:
            yield BlockStop(index=self._index).model_dump_json()
            self._text = None
            self._index += 1


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


def stop_reason_of(
    body: MessagesRequest, generation: Generation, finish_reason: str | None, stop_reason: str | int | None
) -> MessageEnd:
    """In Anthropic's words."""
    reason: StopReason = "end_turn"
    if finish_reason == "stop":
        return MessageEnd(stop_reason="stop_sequence", stop_sequence=str(stop_reason))
    if finish_reason == "timeout":
        reason = "max_tokens"
    if finish_reason == "length":
        has_all = generation.completion_tokens >= body.max_tokens
        reason = "max_tokens" if has_all else "model_context_window_exceeded"
    return MessageEnd(stop_reason=reason, stop_sequence=None)

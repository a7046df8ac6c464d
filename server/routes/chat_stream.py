"""The events of a chat completion's stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from softbatch.server.http.sse import DONE
from softbatch.server.requests.choices import merge
from softbatch.server.requests.generation import Delta, Generation, Token
from softbatch.server.routes.common import FINISH_REASONS, ChunkTemplate, recalled_of, shown_tokens, usage_of
from softbatch.server.schemas.chat import (
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    ChatTokenLogprob,
    FunctionDelta,
    TokenLogprob,
    ToolCallDelta,
)
from softbatch.server.schemas.sampling import StreamOptions
from softbatch.server.tools.dialect import ChatPlan
from softbatch.server.tools.message_parts import (
    CallArguments,
    CallStart,
    ContentPart,
    MessagePart,
    ReasoningPart,
)


class ChatStream:
    """One stream; owns a reader for each of its choices if an output can be more than text."""

    def __init__(
        self, body: ChatCompletionRequest, plan: ChatPlan, generations: Sequence[Generation], reply: dict[str, Any]
    ) -> None:
        self._body = body
        self._generations = generations
        self._reply = reply
        self._options = body.stream_options or StreamOptions()
        self._readers = [plan.reader(one.prompt_ids) for one in generations] if plan.reads else []
        self._tells_tokens = body.logprobs or body.return_token_ids
        # What all but the first and the last chunks of a choice look like, unless log-probabilities are asked for.
        ordinary = ChatDelta(content=ChunkTemplate.TEXT)
        self._templates = [
            ChunkTemplate(self._chunk(ChatChunkChoice(index=i, delta=ordinary))) for i in range(len(generations))
        ]

    async def events(self) -> AsyncGenerator[str | bytes, None]:
        begun: set[int] = set()
        recalled = recalled_of([self._generations[0].recalled], self._body.return_recalled)
        if recalled is not None:
            yield ChatCompletionChunk(**self._reply, choices=[], recalled=recalled).model_dump_json()
        async with aclosing(merge(self._generations)) as deltas:
            async for index, delta in deltas:
                if index not in begun:
                    # Only now: load generators take the first chunk for the first token.
                    begun.add(index)
                    first = self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")))
                    if self._body.return_token_ids:
                        first.prompt_token_ids = self._generations[index].prompt_ids
                    yield first.model_dump_json()
                for event in self._events_of(index, delta):
                    yield event
        if self._options.include_usage:
            usage = usage_of(self._generations, self._body.n)
            yield ChatCompletionChunk(**self._reply, choices=[], usage=usage).model_dump_json()
        yield DONE

    def _chunk(self, choice: ChatChunkChoice) -> ChatCompletionChunk:
        mine = self._generations[choice.index : choice.index + 1]
        usage = usage_of(mine, 1) if self._options.continuous_usage_stats else None
        return ChatCompletionChunk(**self._reply, choices=[choice], usage=usage)

    def _events_of(self, index: int, delta: Delta) -> Iterator[str | bytes]:
        # In the first chunk that there is.
        about_tokens = self._about(delta.tokens)
        is_plain = not self._tells_tokens and not self._options.continuous_usage_stats
        parts = self._parts(index, delta)
        is_last = delta.finish_reason is not None
        # The last text and the end are one chunk; calls and reasoning end before it.
        end = parts.pop() if is_last and parts and isinstance(parts[-1], ContentPart) else None
        for part in parts:
            if is_plain and isinstance(part, ContentPart):
                yield self._templates[index].fill(part.text)
                continue
            choice = ChatChunkChoice(index=index, delta=_delta_of(part), **about_tokens)
            about_tokens = {}
            yield self._chunk(choice).model_dump_json()
        if not is_last and about_tokens and delta.tokens:
            choice = ChatChunkChoice(index=index, delta=ChatDelta(content=""), **about_tokens)
            yield self._chunk(choice).model_dump_json()
        if is_last:
            has_calls = bool(self._readers) and self._readers[index].num_calls > 0
            choice = ChatChunkChoice(
                index=index,
                delta=_delta_of(end) if end else ChatDelta(),
                **about_tokens,
                finish_reason=finish_reason_of(delta.finish_reason or "", has_calls=has_calls),
                stop_reason=delta.stop_reason,
            )
            yield self._chunk(choice).model_dump_json()

    def _about(self, tokens: Sequence[Token]) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if self._body.logprobs:
            about["logprobs"] = logprobs_of(shown_tokens(self._body, tokens))
        if self._body.return_token_ids:
            about["token_ids"] = [token.id for token in tokens]
        return about

    def _parts(self, index: int, delta: Delta) -> list[MessagePart]:
        if not self._readers:
            return [ContentPart(delta.text)] if delta.text else []
        reader = self._readers[index]
        return reader.push(delta.text) + (reader.finish() if delta.finish_reason is not None else [])


def _delta_of(part: MessagePart) -> ChatDelta:
    match part:
        case ContentPart(text):
            return ChatDelta(content=text)
        case ReasoningPart(text):
            return ChatDelta(reasoning_content=text, reasoning=text)
        case CallStart(index, call_id, name):
            function = FunctionDelta(name=name, arguments="")
            return ChatDelta(tool_calls=[ToolCallDelta(index=index, id=call_id, type="function", function=function)])
        case CallArguments(index, text):
            return ChatDelta(tool_calls=[ToolCallDelta(index=index, function=FunctionDelta(arguments=text))])


def finish_reason_of(reason: str, *, has_calls: bool) -> ChatFinishReason:
    """In OpenAI's words."""
    finish: ChatFinishReason = FINISH_REASONS[reason]
    return "tool_calls" if has_calls and finish == "stop" else finish


def logprobs_of(tokens: Sequence[Token]) -> ChatLogprobs:
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

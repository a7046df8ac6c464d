"""From the text of one output to the parts of a message."""

from __future__ import annotations

from softbatch.server.requests.generation import Delta, Generation
from softbatch.server.tools.dialect import ChatPlan
from softbatch.server.tools.message_parts import ContentPart, MessagePart


class PartReader:
    """Reads the deltas of one generation, or its whole text, as what `plan` says an output can be."""

    def __init__(self, plan: ChatPlan, generation: Generation) -> None:
        self._reader = plan.reader(generation.prompt_ids) if plan.reads else None

    @property
    def has_calls(self) -> bool:
        return self._reader is not None and self._reader.num_calls > 0

    def read(self, delta: Delta) -> list[MessagePart]:
        return self.read_text(delta.text, is_last=delta.finish_reason is not None)

    def read_text(self, text: str, *, is_last: bool) -> list[MessagePart]:
        if self._reader is None:
            return [ContentPart(text)] if text else []
        return self._reader.push(text) + (self._reader.finish() if is_last else [])

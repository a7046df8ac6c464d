"""A response as it is begun, and as it has ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from softbatch.server.requests.generation import Generation
from softbatch.server.routes.common import usage_of
from softbatch.server.schemas.responses import (
    IncompleteDetails,
    InputDetails,
    ItemStatus,
    OutputItem,
    ResponseReply,
    ResponsesRequest,
    ResponseUsage,
)


def begun_response(body: ResponsesRequest, model: str, generation: Generation) -> ResponseReply:
    """A response without output."""
    wanted = body.text.format
    form: dict[str, Any] = {"type": wanted.type}
    if wanted.schema_text is not None:
        form |= {"name": wanted.name, "strict": wanted.strict, "schema": json.loads(wanted.schema_text)}
    choice = body.tool_choice
    is_word = choice.type in ("auto", "none", "required")
    return ResponseReply(
        id=f"resp_{generation.request_id}",
        created_at=generation.created,
        status="in_progress",
        instructions=body.instructions or None,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata,
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning={"effort": body.effort, "summary": None},
        temperature=body.temperature,
        text={"format": form},
        tool_choice=choice.type if is_word else choice.model_dump(exclude_unset=True),
        tools=[tool.model_dump() for tool in body.tools],
        top_logprobs=body.top_logprobs,
        top_p=body.top_p,
        usage=None,
        user=body.user or None,
    )


def ended_response(
    begun: ResponseReply, generation: Generation, output: Sequence[OutputItem], status: ItemStatus
) -> ResponseReply:
    usage = usage_of([generation], 1)
    return begun.model_copy(
        update={
            "status": status,
            "completed_at": generation.ended_at if status == "completed" else None,
            "incomplete_details": None if status == "completed" else IncompleteDetails(reason="max_output_tokens"),
            "output": list(output),
            "usage": ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
                output_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
        }
    )

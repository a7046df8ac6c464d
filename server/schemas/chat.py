"""`POST /v1/chat/completions`: OpenAI's request and reply."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from softbatch.server.request_failures import shown
from softbatch.server.schemas.base import Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.replies import RecalledPassages, Usage, is_none
from softbatch.server.schemas.sampling import (
    MAX_TOP_LOGPROBS,
    STOP_REASON,
    UNSUPPORTED,
    FinishReason,
    OpenAIRequest,
    TokenCount,
    at_most_items,
)

MAX_MESSAGES = 1024
MAX_PARTS = 64


class TextPart(RequestModel):
    is_open: ClassVar[bool] = True
    unsupported: ClassVar[Neutral] = {
        "image_url": (),
        "input_audio": (),
        "file": (),
        "audio": (),
        "image": (),
        "video": (),
    }

    type: Literal["text"]
    text: Text


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise refusal("content", "must be a text or a list of parts such as {'type': 'text', 'text': '...'}")
    for index, part in enumerate(value[:MAX_PARTS]):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            message = f"parts of type {shown(kind)} are not supported, only 'text'"
            raise refusal("unsupported_part", message, f"{index}.type")
    return value


class ChatMessage(RequestModel):
    """One turn. `developer` is the newer name of `system`. Templates read nothing else of a turn than what is here.
    Control tokens that the content spells out, such as `<|im_end|>`, are text."""

    is_open: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"name"})
    unsupported: ClassVar[Neutral] = {
        "type": ("message", "text"),
        "refusal": ("",),
        "audio": ({},),
        "images": ([],),
        "tool_calls": ([],),
        "tool_call_id": ("",),
        "function_call": ({},),
        "reasoning": ("",),
        "reasoning_content": ("",),
        "reasoning_details": ([],),
        "thinking": ("",),
        "prefix": (False,),
        "partial": (False,),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        Field(fail_fast=True),
        at_most_items(MAX_PARTS),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
    ] = Field(description="a text, or a list of text parts")

    def as_turn(self) -> dict[str, str]:
        """The turn as chat templates want it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


def _not_empty(value: object) -> object:
    if isinstance(value, list) and not value:
        raise refusal("too_short", "at least one message is needed")
    return value


Messages = Annotated[list[ChatMessage], Field(fail_fast=True), BeforeValidator(_not_empty), at_most_items(MAX_MESSAGES)]


class ChatCompletionRequest(OpenAIRequest):
    """Answer a conversation. Fields of OpenAI's API that this server does not support are refused."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m",
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "max_tokens": 32,
                    "temperature": 0,
                }
            ]
        }
    )
    unsupported: ClassVar[Neutral] = {
        **UNSUPPORTED,
        "tools": ([],),
        # Without tools there is nothing to choose.
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "enable_thinking": (),
        "thinking": (),
        "best_of": (1,),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "documents": ([],),
        "chat_template": (),
        "chat_template_kwargs": ({},),
    }

    messages: Messages
    max_completion_tokens: TokenCount | None = Field(
        default=None, description="left out: the server's --default-max-tokens, see /info"
    )
    max_tokens: TokenCount | None = Field(default=None, description="older name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS, description="alternatives per token")

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @model_validator(mode="after")
    def _is_consistent(self) -> ChatCompletionRequest:
        self.check_stream_options()
        self.check_lengths(
            self.token_limit, "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        )
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "only allowed with 'logprobs': true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            message = "is the older name of max_completion_tokens: send only one of them"
            raise refusal("max_tokens", message, "max_tokens")
        return self


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] = Field(
        description="UTF-8; of a chosen token its part of the content, so that all of them joined are the content"
    )


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = Field(description=STOP_REASON)


class ChatCompletion(BaseModel):
    """The reply to a request without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: None = None
    usage: Usage
    recalled: RecalledPassages = None


class ChatDelta(BaseModel):
    """What a chunk adds; a field that adds nothing is left out."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    content: str | None = Field(default=None, exclude_if=is_none)


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = Field(default=None, exclude_if=is_none)


class ChatCompletionChunk(BaseModel):
    """One event of a stream; `usage` is null in all but the last, `recalled` in the first alone."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: None = None
    usage: Usage | None = None
    recalled: RecalledPassages = None

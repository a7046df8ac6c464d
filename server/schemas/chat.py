"""`POST /v1/chat/completions`: OpenAI's request and reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from softbatch.server.request_failures import shown
from softbatch.server.requests.text import ChatEnd
from softbatch.server.schemas.base import Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.replies import SYSTEM_FINGERPRINT, RecalledPassages, Usage, is_none
from softbatch.server.schemas.sampling import (
    MAX_TOP_LOGPROBS,
    STOP_REASON,
    UNSUPPORTED,
    FinishReason,
    OpenAIRequest,
    TokenCount,
    at_most_items,
)
from softbatch.server.schemas.thinking import ThinkingFields
from softbatch.server.schemas.tools import MAX_CALLS, CallMade, Identifier, ToolFields

ChatFinishReason = FinishReason | Literal["tool_calls"]
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


def _as_text_part(part: object) -> object:
    """Parts of /v1/responses, and of turns that were refused, are texts too."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in ("input_text", "output_text"):
        return {**part, "type": "text"}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise refusal("content", "must be a text or a list of parts such as {'type': 'text', 'text': '...'}")
    value = [_as_text_part(part) for part in value[: MAX_PARTS + 1]]
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            message = f"parts of type {shown(kind)} are not supported, only 'text'"
            raise refusal("unsupported_part", message, f"{index}.type")
    return value


class ChatMessage(RequestModel):
    """One turn. `developer` is the newer name of `system`. `tool` is the result of a call, `name` the tool's.
    Control tokens that the content spells out, such as `<|im_end|>`, are text."""

    is_open: ClassVar[bool] = True
    unsupported: ClassVar[Neutral] = {
        "type": ("message", "text"),
        "refusal": ("",),
        "audio": ({},),
        "images": ([],),
        "function_call": ({},),
        "reasoning_details": ([],),
        "thinking": ("",),
    }
    instead: ClassVar[Mapping[str, str]] = {
        "function_call": "a call is sent back in 'tool_calls', and its result in a turn of the role 'tool'"
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart],
        Field(fail_fast=True),
        at_most_items(MAX_PARTS),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
    ] = Field(default=[], description="a text, or a list of text parts; null if an assistant's turn has none")
    tool_calls: Annotated[list[CallMade], Field(fail_fast=True), at_most_items(MAX_CALLS)] = Field(
        default=[], description="the calls of an assistant's turn"
    )
    tool_call_id: Identifier = Field(default="", description="of the call that a tool's turn answers")
    name: Text = Field(default="", description="only of tools: which of them it was")
    reasoning_content: Text = Field(default="", description="of an assistant's turn; templates leave most of it out")
    reasoning: Text = Field(default="", description="another name of reasoning_content")
    prefix: bool = Field(default=False, description="the last message's: as continue_final_message; of Mistral's API")
    partial: bool = Field(default=False, description="another name of prefix; of Qwen's API")

    @model_validator(mode="before")
    @classmethod
    def _may_say_nothing(cls, data: object) -> object:
        """An assistant's turn of nothing but thoughts comes back so."""
        if isinstance(data, dict) and data.get("role") == "assistant" and data.get("content", "") is None:
            return {**data, "content": ""}
        return data

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if "content" not in self.model_fields_set and self.role != "tool" and not self.tool_calls:
            raise PydanticCustomError("missing", "field required", {"param": "content"})
        if self.role != "assistant":
            for field in ("tool_calls", "reasoning_content", "reasoning", "prefix", "partial"):
                if getattr(self, field):
                    raise refusal("role", "only an assistant's turn has it", field)
        if self.role != "tool" and self.tool_call_id:
            raise refusal("role", "only a tool's turn has it", "tool_call_id")
        return self

    def as_turn(self) -> dict[str, Any]:
        """The turn as chat templates want it."""
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": "\n".join(part.text for part in self.content)}
        if self.tool_calls:
            turn["tool_calls"] = [call.as_call() for call in self.tool_calls]
        if self.role == "tool":
            turn |= {"tool_call_id": self.tool_call_id} | ({"name": self.name} if self.name else {})
        if reasoning := self.reasoning_content or self.reasoning:
            turn |= {"reasoning_content": reasoning, "reasoning": reasoning}
        return turn


def _unbounded(value: object) -> object:
    """-1 is how some say that they name no limit."""
    return None if value == -1 and not isinstance(value, bool) else value


def _not_empty(value: object) -> object:
    if isinstance(value, list) and not value:
        raise refusal("too_short", "at least one message is needed")
    return value


Limit = Annotated[TokenCount | None, BeforeValidator(_unbounded, json_schema_input_type=int | None)]
Messages = Annotated[list[ChatMessage], Field(fail_fast=True), BeforeValidator(_not_empty), at_most_items(MAX_MESSAGES)]


def refuse_begun(messages: list[ChatMessage], message: str) -> None:
    for index, turn in enumerate(messages):
        if turn.prefix or turn.partial:
            field = f"messages.{index}.{'prefix' if turn.prefix else 'partial'}"
            raise refusal("begun_answer", message, field)


class ChatCompletionRequest(ThinkingFields, ToolFields, OpenAIRequest):
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
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "include_reasoning": (True,),
        "separate_reasoning": (True,),
        "stream_reasoning": (True,),
        "reasoning_format": ("auto", "deepseek", "parsed"),
        "parse_tool_calls": (True,),
        "best_of": (1,),
        "echo": (False,),
        "add_special_tokens": (False,),
        "documents": ([],),
        "chat_template": (),
    }
    # `{}` is a search with its defaults.
    asks_if_empty: ClassVar[frozenset[str]] = frozenset({"web_search_options"})
    instead: ClassVar[Mapping[str, str]] = {
        "functions": "what replaced it is: 'tools': [{'type': 'function', 'function': {...}}]",
        "function_call": "what replaced it is 'tool_choice'",
        "prompt_logprobs": "/v1/completions reports them of a text, and /v1/score scores answers in a chat",
    }
    without_effect: ClassVar[frozenset[str]] = OpenAIRequest.without_effect - ToolFields.model_fields.keys()

    messages: Messages
    max_completion_tokens: Limit = Field(
        default=None, description="left out, or -1: the server's --default-max-tokens, see /info"
    )
    max_tokens: Limit = Field(default=None, description="older name of max_completion_tokens")
    add_generation_prompt: bool | None = Field(
        default=None, description="false: no assistant's turn is begun; not from OpenAI's API"
    )
    continue_final_message: bool = Field(
        default=False, description="the answer goes on with the last message; not from OpenAI's API"
    )
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS, description="alternatives per token")

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def chat_end(self) -> ChatEnd:
        last = self.messages[-1]
        if self.continue_final_message or last.prefix or last.partial:
            return "open turn"
        return "turn" if self.add_generation_prompt is False else "answer"

    @model_validator(mode="after")
    def _is_consistent(self) -> ChatCompletionRequest:
        self.check_stream_options()
        refuse_begun(self.messages[:-1], "only the last message can be gone on with")
        if self.chat_end == "open turn" and self.add_generation_prompt:
            message = "not together with 'add_generation_prompt': true, which begins a new turn"
            raise refusal("continue_final_message", message, "continue_final_message")
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


class FunctionCalled(BaseModel):
    """`arguments` is the JSON text that the model has written."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCalled


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null if there is nothing beside calls")
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=is_none)
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    reasoning: str | None = Field(default=None, exclude_if=is_none, description="the same")


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None = Field(description=STOP_REASON)
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)


class ChatCompletion(BaseModel):
    """The reply to a request without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str = SYSTEM_FINGERPRINT
    usage: Usage
    recalled: RecalledPassages = None
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)


class FunctionDelta(BaseModel):
    name: str | None = Field(default=None, exclude_if=is_none)
    arguments: str


class ToolCallDelta(BaseModel):
    """The first of a call has its id, type and name; those behind it add to its arguments."""

    index: int
    id: str | None = Field(default=None, exclude_if=is_none)
    type: Literal["function"] | None = Field(default=None, exclude_if=is_none)
    function: FunctionDelta


class ChatDelta(BaseModel):
    """What a chunk adds; a field that adds nothing is left out."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[ToolCallDelta] | None = Field(default=None, exclude_if=is_none)
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    reasoning: str | None = Field(default=None, exclude_if=is_none)


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: str | int | None = Field(default=None, exclude_if=is_none)
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)


class ChatCompletionChunk(BaseModel):
    """One event of a stream; `usage` is null in all but the last, `recalled` in the first alone."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str = SYSTEM_FINGERPRINT
    usage: Usage | None = None
    recalled: RecalledPassages = None
    prompt_token_ids: list[int] | None = Field(
        default=None, exclude_if=is_none, description="in the first chunk, with `return_token_ids`"
    )

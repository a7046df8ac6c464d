"""`POST /v1/messages`: Anthropic's request and reply."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from softbatch.scheduler.protocol import SamplingParams
from softbatch.server.requests.output_format import OutputFormat
from softbatch.server.requests.text import ChatEnd
from softbatch.server.schemas.base import MAX_INT32, Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.chat import MAX_MESSAGES
from softbatch.server.schemas.joined_turns import joined_turns
from softbatch.server.schemas.message_blocks import MessageTurn, Texts
from softbatch.server.schemas.message_tools import MessageToolFields
from softbatch.server.schemas.sampling import SEED_MASK, QueuedRequest, Recall, Seed, StopStrings, at_most_items
from softbatch.server.schemas.structured import SchemaText
from softbatch.server.schemas.tools import MAX_CALLS

# In all turns together: each block may become a turn of its own.
MAX_BLOCKS = 4096


def _of_bounded_size(value: object) -> object:
    if not isinstance(value, list):
        return value
    if not value:
        raise refusal("too_short", "at least one message is needed")
    contents = [turn.get("content") for turn in value if isinstance(turn, dict)]
    blocks = sum(len(content) for content in contents if isinstance(content, list))
    if blocks > MAX_BLOCKS:
        raise refusal("too_long", f"at most {MAX_BLOCKS} blocks in all turns are allowed, not {blocks}")
    return value


class JsonFormat(RequestModel):
    """The output is JSON that follows the schema."""

    type: Literal["json_schema"]
    schema_text: SchemaText = Field(alias="schema")


class OutputConfig(RequestModel):
    """The form of the output, and how much to think for it."""

    format: JsonFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="of thinking, if the model's chat template knows it"
    )


class MessageMetadata(RequestModel):
    """Who asks."""

    is_open: ClassVar[bool] = True

    user_id: Text = Field(
        default="", description="users have equal shares of the server if API keys do not tell them apart"
    )


class ConversationFields(MessageToolFields, QueuedRequest):
    """What a message is to answer; the whole of a request to count tokens."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"cache_control", "service_tier", "inference_geo", "speed"})
    unsupported: ClassVar[Neutral] = {
        "container": (),
        "mcp_servers": ([],),
        "context_management": (),
    }

    messages: Annotated[
        list[MessageTurn], Field(fail_fast=True), BeforeValidator(_of_bounded_size), at_most_items(MAX_MESSAGES)
    ] = Field(description="turns of one speaker that follow each other are one turn")
    system: Texts = Field(default=[], description="what the model is to know and do: a text, or a list of blocks")
    output_config: OutputConfig = Field(default=OutputConfig())
    recall: Recall = None

    @model_validator(mode="after")
    def _can_go_on(self) -> ConversationFields:
        if self.chat_end == "answer":
            return self
        last = f"messages.{len(self.messages) - 1}"
        if any(block.type != "text" for block in self.messages[-1].content):
            message = "only a text can be gone on with; end with the user's turn"
            raise refusal("unsupported_role", message, f"{last}.role")
        return self

    @model_validator(mode="after")
    def _calls_few_at_once(self) -> ConversationFields:
        calls = 0
        for index, turn in enumerate(self.messages):
            calls = calls + sum(block.type == "tool_use" for block in turn.content) if turn.role == "assistant" else 0
            if calls > MAX_CALLS:
                message = f"at most {MAX_CALLS} calls are allowed in one turn, and in turns that follow each other"
                raise refusal("too_long", message, f"messages.{index}.content")
        return self

    @property
    def chat_end(self) -> ChatEnd:
        """A last turn of the assistant is the beginning of the answer."""
        return "open turn" if self.messages[-1].role == "assistant" else "answer"

    @property
    def turns(self) -> list[dict[str, Any]]:
        """As chat templates want them."""
        system = [{"role": "system", "content": block.text} for block in self.system]
        return joined_turns([*system, *(turn for message in self.messages for turn in message.turns())])

    @property
    def effort(self) -> str | None:
        """Of thinking; None: as the model does it."""
        return self.output_config.effort or self.thinking_effort

    @property
    def output_format(self) -> OutputFormat | None:
        wanted = self.output_config.format
        if wanted is None:
            return None
        return OutputFormat("json_schema", wanted.schema_text, "output_config.format.schema")


class CountTokensRequest(ConversationFields):
    """A conversation whose tokens are to be counted. Some send what they would send to have it answered."""

    without_effect: ClassVar[frozenset[str]] = ConversationFields.without_effect | {
        "max_tokens",
        "stream",
        "stop_sequences",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "metadata",
    }
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "What is the sea?"}]}]}
    )


class MessagesRequest(ConversationFields):
    """Answer a conversation. Fields of Anthropic's API that this server does not support are refused."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m",
                    "max_tokens": 32,
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                }
            ]
        }
    )

    max_tokens: int = Field(
        ge=0, le=MAX_INT32, description="at most this many tokens, or as many as fit; 0: only compute the prompt"
    )
    stop_sequences: StopStrings = Field(default=[], description="the text ends before the first of these strings")
    stream: bool = False
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 always takes the most likely token")
    top_p: float = Field(default=1.0, ge=0, le=1, description="0 always takes the most likely token")
    top_k: int = Field(default=0, ge=-1, le=MAX_INT32, description="0 or -1: off")
    seed: Seed | None = Field(default=None, description="only this server's")
    metadata: MessageMetadata = Field(default=MessageMetadata())

    @property
    def sampling_params(self) -> SamplingParams:
        """`max_tokens` and `seed` are the generator's to set."""
        return SamplingParams(
            temperature=self.temperature if self.top_p > 0 else 0.0, top_p=self.top_p or 1.0, top_k=max(self.top_k, 0)
        )

    @property
    def sampler_seed(self) -> int | None:
        return None if self.seed is None else self.seed & SEED_MASK


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageUsage(BaseModel):
    """All tokens of the prompt are `input_tokens` plus `cache_read_input_tokens`. The latter are the soft prompt's
    virtual tokens, and what the prefix cache had."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class TextContent(BaseModel):
    type: Literal["text"] = "text"
    text: str


class ThinkingContent(BaseModel):
    """What the model has thought. There is no signature: it may be sent back as it is, or left out."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class ToolUseContent(BaseModel):
    """A call that the client is to make; without `input` if the model was cut off in it."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


MessageContent = TextContent | ThinkingContent | ToolUseContent


class MessageReply(BaseModel):
    """The assistant's turn; without any text, thought or call its content is empty."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[MessageContent]
    stop_reason: StopReason | None = Field(
        description="'model_context_window_exceeded' if there was no room for max_tokens; 'max_tokens' also at the end "
        "of its time"
    )
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageStart(BaseModel):
    """The first event of a stream. The first field of every event, its type, is its name too."""

    type: Literal["message_start"] = "message_start"
    message: MessageReply


class BlockStart(BaseModel):
    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: MessageContent


class TextDelta(BaseModel):
    type: Literal["text_delta"] = "text_delta"
    text: str


class ThinkingDelta(BaseModel):
    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class InputJsonDelta(BaseModel):
    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


class BlockDelta(BaseModel):
    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class BlockStop(BaseModel):
    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class MessageEnd(BaseModel):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(BaseModel):
    """The last event but one."""

    type: Literal["message_delta"] = "message_delta"
    delta: MessageEnd
    usage: MessageUsage


class MessageStop(BaseModel):
    type: Literal["message_stop"] = "message_stop"


class TokenCountReply(BaseModel):
    """All tokens of the prompt, a soft prompt's virtual ones included."""

    input_tokens: int


class MessageErrorBody(BaseModel):
    type: str = Field(examples=["invalid_request_error"])
    message: str = Field(examples=["temperature: input should be less than or equal to 2"])
    param: str | None = Field(examples=["temperature"])
    code: str | None = Field(examples=["less_than_equal"])


class MessageErrorReply(BaseModel):
    """Every reply other than 2xx, and the last event of a stream that fails."""

    type: Literal["error"] = "error"
    error: MessageErrorBody


ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": MessageErrorReply, "description": "The request cannot be served; the message says why"},
    "5XX": {"model": MessageErrorReply, "description": "The server cannot serve the request now"},
}

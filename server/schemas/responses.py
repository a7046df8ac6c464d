"""`POST /v1/responses`: OpenAI's newer request, its reply, and the events of its stream."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from softbatch.scheduler.protocol import SamplingParams
from softbatch.server.schemas.base import Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.chat import ChatTokenLogprob
from softbatch.server.schemas.joined_turns import joined_turns
from softbatch.server.schemas.replies import is_none
from softbatch.server.schemas.response_items import InputItems, TextConfig
from softbatch.server.schemas.response_tools import ResponseToolFields
from softbatch.server.schemas.sampling import (
    MAX_TOP_LOGPROBS,
    SEED_MASK,
    QueuedRequest,
    Recall,
    Seed,
    TokenCount,
    at_most_items,
)

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16

# What a client may ask to have shown, if it is there: of all but the first, nothing ever is.
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Note = Annotated[str, StringConstraints(max_length=512)]


class ReasoningConfig(RequestModel):
    """How a model that can think before it answers is to do it. Thoughts are shown whole, so there is no summary."""

    unsupported: ClassVar[Neutral] = {"summary": ("auto",), "generate_summary": ("auto",)}

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None, description="if the model's chat template knows it; 'none' is always allowed"
    )


class ResponseStreamOptions(RequestModel):
    """Asks for padding that hides how long the texts are, or for none."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})


class ResponsesRequest(ResponseToolFields, QueuedRequest):
    """Answer a conversation. Nothing of it is kept: send the whole conversation each time.

    Fields of OpenAI's API that this server does not support are refused.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2-135m", "input": "What is the capital of France?", "max_output_tokens": 32}]
        }
    )
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "max_tool_calls",
        }
    )
    unsupported: ClassVar[Neutral] = {
        "background": (False,),
        "conversation": (),
        "context_management": ([],),
        "prompt": (),
        "truncation": ("disabled",),
        "modalities": (["text"],),
        "moderation": (),
    }

    input: InputItems = Field(description="a text, or a list of turns; an earlier output can be sent back as it came")
    instructions: Text = Field(default="", description="what the model is to know and do; in front of all turns")
    max_output_tokens: TokenCount | None = Field(
        default=None, description="left out: the server's --default-max-tokens, see /info"
    )
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 always takes the most likely token")
    top_p: float = Field(default=1.0, ge=0, le=1, description="0 always takes the most likely token")
    top_logprobs: int = Field(
        default=0, ge=0, le=MAX_TOP_LOGPROBS, description=f"alternatives per token, if `include` has {LOGPROBS}"
    )
    include: Annotated[list[Includable], at_most_items(16)] = Field(default=[], description="what more to report")
    text: TextConfig = TextConfig()
    reasoning: ReasoningConfig | None = None
    seed: Seed | None = Field(default=None, description="only this server's")
    metadata: Annotated[dict[Note, Note], Field(max_length=MAX_METADATA)] = Field(
        default={}, description="comes back as it is"
    )
    user: Text = Field(
        default="",
        description="who asks, if API keys do not tell: users have equal shares of the server, as keys have",
    )
    recall: Recall = None
    previous_response_id: Text | None = Field(
        default=None, description="refused: no response is kept; send the whole conversation as `input`"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> ResponsesRequest:
        if self.top_logprobs and LOGPROBS not in self.include:
            raise refusal("top_logprobs", f"only allowed with {LOGPROBS!r} in 'include'", "top_logprobs")
        return self

    @property
    def turns(self) -> list[dict[str, Any]]:
        """As chat templates want them."""
        front = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return joined_turns([*front, *(item.turn for item in self.input)])

    @property
    def effort(self) -> str | None:
        return self.reasoning.effort if self.reasoning is not None else None

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if LOGPROBS in self.include else None

    @property
    def sampling_params(self) -> SamplingParams:
        """`max_tokens` and `seed` are the generator's to set."""
        return SamplingParams(
            temperature=self.temperature if self.top_p > 0 else 0.0,
            top_p=self.top_p or 1.0,
            logprobs=self.num_logprobs,
        )

    @property
    def sampler_seed(self) -> int | None:
        return None if self.seed is None else self.seed & SEED_MASK


class ResponseText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[None] = []
    logprobs: list[ChatTokenLogprob] = []


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(BaseModel):
    """What the assistant says."""

    id: str
    type: Literal["message"] = "message"
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[ResponseText]


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(BaseModel):
    """What the model has thought."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: ItemStatus
    summary: list[None] = []
    content: list[ReasoningText]


class OutputCall(BaseModel):
    """A call that the client is to make."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputDetails(BaseModel):
    cached_tokens: int = Field(
        description="virtual tokens of the soft prompt, computed once for everybody, and prompt tokens found in the "
        "prefix cache"
    )
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseReply(BaseModel):
    """`status` is 'incomplete' if the output ends with max_output_tokens, or with its time.

    Fields of the request come back as this server has understood them; `store` is always false.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: ItemStatus
    background: Literal[False] = False
    completed_at: int | None = None
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(BaseModel):
    """The first events of a stream, 'response.created' and 'response.in_progress', and the last, 'response.completed'
    or 'response.incomplete'. The first field of every event, its type, is its name too."""

    type: str
    sequence_number: int
    response: ResponseReply


class ItemEvent(BaseModel):
    """'response.output_item.added' and 'response.output_item.done'."""

    type: str
    sequence_number: int
    output_index: int
    item: OutputItem


class PartEvent(BaseModel):
    """'response.content_part.added' and 'response.content_part.done'."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    part: ResponseText | ReasoningText


class TextEvent(BaseModel):
    """'response.output_text.delta' with `delta`, and '.done' with `text`; so have 'response.reasoning_text' without
    `logprobs`, and 'response.function_call_arguments' with `arguments` and without `content_index`."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int | None = Field(default=None, exclude_if=is_none)
    delta: str | None = Field(default=None, exclude_if=is_none)
    text: str | None = Field(default=None, exclude_if=is_none)
    arguments: str | None = Field(default=None, exclude_if=is_none)
    name: str | None = Field(default=None, exclude_if=is_none)
    logprobs: list[ChatTokenLogprob] | None = Field(default=None, exclude_if=is_none)

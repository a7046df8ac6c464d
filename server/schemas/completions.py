"""`POST /v1/completions`: OpenAI's request and reply."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from softbatch.server.schemas.base import MAX_INT32, Neutral, refusal
from softbatch.server.schemas.replies import SYSTEM_FINGERPRINT, RecalledPassages, Usage, is_none
from softbatch.server.schemas.sampling import (
    MAX_CHOICES_PER_PROMPT,
    MAX_TOP_LOGPROBS,
    STOP_REASON,
    UNSUPPORTED,
    FinishReason,
    OpenAIRequest,
)

MAX_PROMPTS = 64
MAX_CHOICES = 64
MAX_PROMPT_TOKENS = 1 << 18

Prompt = str | list[int]
_EXPECTED = "must be a text, a list of token ids, or a list of texts or of such lists"


def token_ids(value: object, param: str = "") -> list[int]:
    """`value` as token ids. Whether the model has these tokens is for whoever knows the model."""
    if not isinstance(value, list):
        raise refusal("prompt", "must be a list of token ids", param)
    if len(value) > MAX_PROMPT_TOKENS:
        raise refusal("too_long", f"at most {MAX_PROMPT_TOKENS} token ids are allowed, not {len(value)}", param)
    for index, item in enumerate(value):
        # bool is an int to isinstance
        if type(item) is not int or not 0 <= item <= MAX_INT32:
            message = f"a token id is an integer from 0 to {MAX_INT32}"
            raise refusal("token_id", message, f"{param}.{index}" if param else str(index))
    return value


def _text(value: object, param: str = "") -> str:
    if not isinstance(value, str):
        raise refusal("prompt", "must be a text, as the other items are", param)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refusal("prompt", "must be valid Unicode, without lone surrogates", param) from None
    return value


def one_or_several(limit: int, noun: str) -> PlainValidator:
    """A text, token ids, or at most `limit` of either, as a list."""

    def check(value: object) -> list[Prompt]:
        if isinstance(value, str):
            return [_text(value)]
        if not isinstance(value, list) or not value:
            raise refusal("prompt", _EXPECTED)
        if isinstance(value[0], str | list):
            if len(value) > limit:
                raise refusal("too_long", f"at most {limit} {noun} are allowed, not {len(value)}")
            check_one = _text if isinstance(value[0], str) else token_ids
            return [check_one(item, str(index)) for index, item in enumerate(value)]
        return [token_ids(value)]

    return PlainValidator(check, json_schema_input_type=str | list[int] | list[str] | list[list[int]])


Prompts = Annotated[list[Prompt], one_or_several(MAX_PROMPTS, "prompts")]


def _none_if_false(value: object) -> object:
    """Chat completions switch their log-probabilities off so."""
    return None if value is False else value


Alternatives = Annotated[
    Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None,
    BeforeValidator(_none_if_false, json_schema_input_type=int | None),
]


class CompletionRequest(OpenAIRequest):
    """Continue one text or several. Fields of OpenAI's API that this server does not support are refused."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 16}]
        }
    )
    unsupported: ClassVar[Neutral] = {**UNSUPPORTED, "suffix": ("",)}

    prompt: Prompts = Field(description="text, token ids, or a list of either")
    max_tokens: int = Field(
        default=16, ge=0, le=MAX_INT32, description="at most this many tokens per choice; 0: only compute the prompt"
    )
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CHOICES_PER_PROMPT,
        description="so many choices are made for each prompt; the n with the highest log-probability per token are "
        "told, best first",
    )
    logprobs: Alternatives = Field(default=None, description="alternatives per token; 0: the chosen one alone")
    prompt_logprobs: Alternatives = Field(
        default=None,
        description="alternatives per prompt token, reported by token id; not in streams; not from OpenAI's API",
    )
    echo: bool = Field(
        default=False, description="begin the text with the prompt; with `logprobs` also its tokens' log-probabilities"
    )
    add_special_tokens: bool = Field(default=True, description="as the tokenizer does it, e.g. BOS in front")

    @model_validator(mode="after")
    def _is_consistent(self) -> CompletionRequest:
        self.check_stream_options()
        self.check_lengths(self.max_tokens, "max_tokens")
        if self.best_of is not None and 1 < self.best_of < self.n:
            raise refusal("best_of", f"must not be less than n ({self.n})", "best_of")
        if self.stream and self.num_made > self.n:
            message = "not available with 'stream': true, as the best are known at the end; leave it out"
            raise refusal("unsupported_field", message, "best_of")
        if self.stream and self.prompt_logprobs is not None:
            message = "not available with 'stream': true; send 'echo': true and 'logprobs', or do not stream"
            raise refusal("unsupported_field", message, "prompt_logprobs")
        if self.recall and (self.echo or self.prompt_logprobs is not None):
            raise refusal("unsupported_field", "not available together with 'echo' or 'prompt_logprobs'", "recall")
        if len(self.prompt) * self.num_made > MAX_CHOICES:
            name = "n" if self.num_made == self.n else "best_of"
            message = (
                f"prompts times {name} must be at most {MAX_CHOICES}, not {len(self.prompt)} times {self.num_made}"
            )
            raise refusal("too_long", message, name)
        return self

    @property
    def passages(self) -> int | None:
        """None: what the registration says. A prompt that is shown or scored is one that the client has sent."""
        return 0 if self.echo or self.prompt_logprobs is not None else self.recall

    @property
    def num_made(self) -> int:
        """Choices that are generated for each prompt."""
        return max(self.best_of or self.n, self.n)

    @property
    def score_prompt(self) -> int | None:
        """How many alternatives of each prompt token are wanted; None: prompts are not scored."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


class CompletionLogprobs(BaseModel):
    """OpenAI's legacy format: four lists with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of a prompt")
    top_logprobs: list[dict[str, float] | None] = Field(description="the alternatives, the chosen token among them")
    text_offset: list[int] = Field(description="where the token begins, in characters")


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = Field(description=STOP_REASON)
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    prompt_token_ids: list[int] | None = Field(
        default=None, exclude_if=is_none, description="with `return_token_ids`; of a stream in a choice's first chunk"
    )


class PromptAlternative(BaseModel):
    """`rank` is its place among all tokens; the most probable one has 1."""

    logprob: float
    rank: int
    decoded_token: str


class ScoredChoice(CompletionChoice):
    """A choice of a request with `prompt_logprobs`."""

    prompt_logprobs: list[dict[int, PromptAlternative] | None] = Field(
        description="of each prompt token: its own id and those of the alternatives; null for the first one"
    )


class Completion(BaseModel):
    """The reply, and with `stream` every chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[ScoredChoice | CompletionChoice]
    system_fingerprint: str = SYSTEM_FINGERPRINT
    usage: Usage | None = None
    recalled: RecalledPassages = None

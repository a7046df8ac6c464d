"""`POST /generate`, `/generate_stream` and `/`: text-generation-inference's request and reply."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softbatch.scheduler.protocol import SamplingParams
from softbatch.server.requests.output_format import OutputFormat
from softbatch.server.schemas.base import ERROR_REPLIES, MAX_INT32, Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.replies import RecalledPassages, is_none
from softbatch.server.schemas.sampling import (
    MAX_CHOICES_PER_PROMPT,
    MAX_TOP_LOGPROBS,
    OTHER_SAMPLERS,
    SAMPLER_SETTINGS,
    BaseOrSoftPrompt,
    Milliseconds,
    ModelName,
    Recall,
    ReturnRecalled,
    StopStrings,
    TokenCount,
)
from softbatch.server.schemas.structured import GrammarParameter


class GenerateParameters(RequestModel):
    """How to continue the input. What text-generation-inference has and this server does not, is refused."""

    without_effect: ClassVar[frozenset[str]] = SAMPLER_SETTINGS
    unsupported: ClassVar[Neutral] = {
        **OTHER_SAMPLERS,
        "n": (1,),
        "num_return_sequences": (1,),
        "use_cache": (True,),
        "typical_p": (1.0,),
        "watermark": (False,),
        "response_format": (),
        "presence_penalty": (0.0,),
        "min_p": (0.0,),
        "logit_bias": ({},),
        "use_beam_search": (False,),
        "length_penalty": (1.0,),
    }

    max_new_tokens: TokenCount = 100
    do_sample: bool | None = Field(
        default=None,
        description="false always takes the most likely token, whatever the temperature; left out: true if "
        "temperature, top_k or top_p ask for sampling, as in text-generation-inference",
    )
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 always takes the most likely token")
    top_k: int = Field(default=0, ge=-1, le=MAX_INT32, description="0 or -1: off")
    top_p: float = Field(default=1.0, ge=0, le=1, description="0 always takes the most likely token")
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, le=2**64 - 1)
    best_of: int = Field(
        default=1,
        ge=1,
        le=MAX_CHOICES_PER_PROMPT,
        description="so many texts are made, and the one with the highest log-probability per token is told",
    )
    decoder_input_details: bool = Field(default=False, description="with `details`: report the input's tokens too")
    stop: StopStrings = Field(default=[], description="the text ends with the first of these strings, and keeps it")
    ignore_eos_token: bool = Field(default=False, description="go on after end-of-text")
    min_new_tokens: int = Field(
        default=0, ge=0, le=MAX_INT32, description="the text does not end before it has so many tokens"
    )
    truncate: TokenCount | None = Field(default=None, description="keep only the last so many tokens")
    return_full_text: bool = Field(default=False, description="begin the text with the input")
    details: bool = Field(default=False, description="also report every token")
    top_n_tokens: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS, description="alternatives per token")
    soft_prompt: ModelName | None = Field(default=None, description="name of the soft prompt to prepend")
    recall: Recall = None
    return_recalled: ReturnRecalled = False
    grammar: GrammarParameter | None = Field(default=None, description="what the text must follow")
    adapter_id: ModelName | None = Field(default=None, description="another name of soft_prompt")
    timeout_ms: Milliseconds | None = Field(
        default=None, description="as on OpenAI's routes; not from text-generation-inference's API"
    )

    @property
    def timeout(self) -> float | None:
        """In seconds."""
        return None if self.timeout_ms is None else self.timeout_ms / 1000

    @property
    def scores_input(self) -> bool:
        return self.details and self.decoder_input_details

    @property
    def samples(self) -> bool:
        if self.do_sample is False or self.temperature == 0 or self.top_p == 0:
            return False
        return bool(self.do_sample) or self.temperature != 1.0 or self.top_k > 0 or self.top_p != 1.0

    @property
    def output_format(self) -> OutputFormat | None:
        return self.grammar.as_format("parameters.grammar") if self.grammar is not None else None

    def sampling_params(self, logprobs: int | None) -> SamplingParams:
        """`max_tokens` and `seed` are the generator's to set."""
        return SamplingParams(
            temperature=self.temperature if self.samples else 0.0,
            top_k=max(self.top_k, 0),
            top_p=self.top_p or 1.0,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=logprobs,
            ignore_eos=self.ignore_eos_token,
            min_tokens=self.min_new_tokens,
        )

    @model_validator(mode="after")
    def _is_consistent(self) -> GenerateParameters:
        if self.recall and self.scores_input:
            raise refusal("unsupported_field", "not available together with 'decoder_input_details'", "recall")
        if self.soft_prompt and self.adapter_id and self.soft_prompt != self.adapter_id:
            raise refusal("adapter_id", "is another name of soft_prompt: send only one of them", "adapter_id")
        if self.min_new_tokens > self.max_new_tokens:
            message = f"must not be more than max_new_tokens ({self.max_new_tokens})"
            raise refusal("min_tokens", message, "min_new_tokens")
        return self


class GenerateRequest(RequestModel):
    """Continue one text."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": "The capital of France is", "parameters": {"max_new_tokens": 16}}]}
    )
    # Of a hosted service, whose clients send them to every server.
    without_effect: ClassVar[frozenset[str]] = frozenset({"options"})
    # The two routes say by their names whether they stream.
    unsupported: ClassVar[Neutral] = {"stream": (False,)}

    inputs: Text
    model: BaseOrSoftPrompt | None = Field(
        default=None, description="as on OpenAI's routes; not from text-generation-inference's API"
    )
    parameters: GenerateParameters = Field(default_factory=GenerateParameters)


def _check_stream(parameters: GenerateParameters) -> None:
    for name, is_asked in (("best_of", parameters.best_of > 1), ("decoder_input_details", parameters.scores_input)):
        if is_asked:
            raise refusal("unsupported_field", "not available in streams; leave it out", f"parameters.{name}")


class GenerateStreamRequest(GenerateRequest):
    unsupported: ClassVar[Neutral] = {"stream": (True,)}

    @model_validator(mode="after")
    def _can_stream(self) -> GenerateStreamRequest:
        _check_stream(self.parameters)
        return self


class CompatGenerateRequest(GenerateRequest):
    unsupported: ClassVar[Neutral] = {}

    stream: bool = False

    @model_validator(mode="after")
    def _can_stream(self) -> CompatGenerateRequest:
        if self.stream:
            _check_stream(self.parameters)
        return self


class GenerateErrorReply(BaseModel):
    """Every reply other than 2xx on these routes, and the last event of a stream that fails."""

    error: str = Field(examples=["parameters.top_p: input should be less than or equal to 1"])
    error_type: str = Field(examples=["validation"])
    param: str | None = Field(examples=["parameters.top_p"])
    code: str | None = Field(examples=["less_than_equal"])


GENERATE_ERROR_REPLIES: dict[int | str, dict[str, Any]] = {
    status: {**reply, "model": GenerateErrorReply} for status, reply in ERROR_REPLIES.items()
}

GenerateFinishReason = Literal["length", "eos_token", "stop_sequence"]
TimedOut = Annotated[
    Literal["timeout"] | None,
    Field(exclude_if=is_none, description="with the finish reason 'length', if the request's time was over"),
]


class GeneratedToken(BaseModel):
    id: int
    text: str
    logprob: float
    special: bool


class InputToken(BaseModel):
    id: int
    text: str
    logprob: float | None = Field(description="null for the first one")


class TextDetails(BaseModel):
    finish_reason: GenerateFinishReason
    stop_reason: TimedOut = None
    generated_tokens: int
    seed: int | None = Field(description="null when nothing was drawn at random")
    prefill: list[InputToken] = Field(default=[], description="with `decoder_input_details`")
    tokens: list[GeneratedToken]
    top_tokens: list[list[GeneratedToken]] | None = Field(default=None, exclude_if=is_none)


class BestOfSequence(TextDetails):
    generated_text: str


class GenerateDetails(TextDetails):
    best_of_sequences: list[BestOfSequence] | None = Field(
        default=None, exclude_if=is_none, description="with `best_of`: the other texts"
    )


class GenerateReply(BaseModel):
    generated_text: str
    details: GenerateDetails | None = Field(default=None, exclude_if=is_none)
    recalled: RecalledPassages = None


class StreamDetails(BaseModel):
    finish_reason: GenerateFinishReason
    stop_reason: TimedOut = None
    generated_tokens: int
    seed: int | None
    input_length: int
    recalled: RecalledPassages = None


class StreamEvent(BaseModel):
    """One event per token; the last one has the whole text, and the details."""

    index: int = Field(description="counts the tokens from 1")
    token: GeneratedToken
    top_tokens: list[GeneratedToken] | None = Field(default=None, exclude_if=is_none)
    generated_text: str | None
    details: StreamDetails | None

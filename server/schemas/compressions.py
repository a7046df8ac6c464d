"""`/v1/compressions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from softbatch.prompt_store.compression.compression_settings import (
    BOUNDS,
    MAX_INSTRUCTION_CHARS,
    MAX_MINUTES,
    CompressionSettings,
)
from softbatch.prompt_store.compression.data.examples import MAX_ACCEPTED, MAX_EXAMPLES, MAX_TEXT
from softbatch.prompt_store.stores.kept_text import DEFAULT_RECALL, MAX_RECALL
from softbatch.server.schemas.base import RequestModel, Text, refusal
from softbatch.server.schemas.sampling import at_most_items

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]


def _within(setting: str) -> Any:
    """The bounds that the setting has on the command line as well."""
    low, high = BOUNDS[setting]
    return Field(ge=low, le=high)


ShortText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]


class Question(RequestModel):
    """A question to train on; without `output` the model's own answer is taken. One with `accept` is for measuring: an
    answer that contains one of these texts is right, and training never sees the question."""

    input: ShortText
    output: ShortText | None = None
    accept: Annotated[list[ShortText], at_most_items(MAX_ACCEPTED)] = Field(default=[])


class CompressionRequestBody(RequestModel):
    """A context to learn a soft prompt for, and how."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "manual",
                    "context": "The harbour office opens at seven. Ring the brass bell twice before you enter. …",
                    "objective": "kl",
                    "virtual_tokens": 64,
                    "minutes": 10,
                }
            ]
        }
    )

    name: str = Field(min_length=1, max_length=128, description="what requests will call the soft prompt")
    context: Text = Field(description="the text that the soft prompt will stand for")
    objective: Literal["kl", "nll", "mixed"] = Field(
        default="kl",
        description="kl keeps the model's uncertainty, nll reproduces its answers, mixed weighs both",
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="weight of nll in mixed")
    kind: Literal["kv", "embeddings"] = "kv"
    virtual_tokens: Annotated[int, _within("virtual_tokens")] = 64
    questions: Annotated[list[Question], at_most_items(MAX_EXAMPLES)] = Field(
        default=[], description="questions of your own; they are trained on beside those made from the context"
    )
    instruction: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_INSTRUCTION_CHARS,
        description="put before the context and compressed with it",
    )
    minutes: float | None = Field(
        default=None, gt=0, le=MAX_MINUTES, description="budget for everything; 10 when neither this nor steps is sent"
    )
    steps: Annotated[int, _within("steps")] | None = Field(
        default=None, description="training steps, however long they take"
    )
    seed: Annotated[int, _within("seed")] = 0
    answer_tokens: Annotated[int, _within("max_answer_tokens")] = Field(
        default=CompressionSettings.max_answer_tokens,
        description="how much of an answer is trained on, your own included",
    )
    model_questions: Annotated[int, _within("model_questions")] = Field(
        default=0,
        description="questions asked by the model itself, beside those from templates; small models ask poor ones",
    )

    keep_text: bool = Field(
        default=False, description="keep the context, private to the server, so that requests can recall passages of it"
    )
    recall: int | None = Field(
        default=None,
        ge=0,
        le=MAX_RECALL,
        description=f"passages of the kept text that a request gets which does not say; left out: {DEFAULT_RECALL}",
    )

    preview: bool = Field(
        default=False,
        description="register the soft prompt as a preview before training begins; the trained one takes its place",
    )

    @model_validator(mode="after")
    def _has_one_length(self) -> CompressionRequestBody:
        if self.minutes is not None and self.steps is not None:
            raise refusal("minutes", "send either 'minutes' or 'steps'", "minutes")
        return self


class JobProgress(BaseModel):
    """Where the running phase stands: loading, self_study, gold, estimate, preview, answers, teacher, matching,
    training or evaluation. `elapsed` and `expected` are seconds of the whole run; `note` says that its budget is too
    short."""

    phase: str
    done: int
    total: int
    loss: float | None
    seconds_left: float | None
    elapsed: float | None
    expected: float | None
    note: str | None


class JobErrorBody(BaseModel):
    code: str
    message: str
    param: str | None


class CompressionJob(BaseModel):
    """A compression in the manner of OpenAI's fine-tuning jobs. Times are Unix seconds."""

    id: str
    object: Literal["compression.job"] = "compression.job"
    status: Status
    name: str
    created_at: int
    started_at: int | None
    finished_at: int | None
    progress: JobProgress | None
    soft_prompt: str | None = Field(description="what to name in requests, once the job has succeeded")
    preview: str | None = Field(description="what to name until then: its preview is registered")
    fidelity: dict[str, Any] | None = Field(description="the figures of the report")
    error: JobErrorBody | None


class CompressionJobList(BaseModel):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[CompressionJob]

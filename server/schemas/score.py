"""`POST /v1/score`: which of these answers would the model choose?"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softbatch.server.schemas.base import RequestModel, Text, refusal
from softbatch.server.schemas.chat import Messages, refuse_begun
from softbatch.server.schemas.replies import RecalledPassages, Usage
from softbatch.server.schemas.sampling import BaseOrSoftPrompt, ModelName, Recall, ReturnRecalled, at_most_items

MAX_CANDIDATES = 256


class ScoreRequest(RequestModel):
    """Candidates y are scored as answers to the input z, given a soft prompt, a context, or nothing."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "input": "What is the capital of France?",
                    "candidates": ["Paris.", "Lyon.", "The capital of France is Paris."],
                }
            ]
        }
    )

    model: BaseOrSoftPrompt | None = Field(default=None, description="the base model, or the name of a soft prompt")
    soft_prompt: ModelName | None = None
    recall: Recall = None
    return_recalled: ReturnRecalled = False
    input: Text | None = Field(default=None, description="the user's turn")
    messages: Messages | None = Field(default=None, description="or a whole conversation, instead of `input`")
    context: Text | None = Field(default=None, description="put into the system turn; not together with a soft prompt")
    candidates: Annotated[list[Text], at_most_items(MAX_CANDIDATES)] = Field(
        min_length=1, description=f"the answers to compare, at most {MAX_CANDIDATES}"
    )
    end: bool = Field(
        default=True,
        description="a candidate is a whole answer: the token that ends the turn is scored too. Without it a candidate "
        "may be the beginning of a longer answer, and a shorter one never scores below its own continuation",
    )

    @model_validator(mode="after")
    def _is_one_of_both(self) -> ScoreRequest:
        if (self.input is None) == (self.messages is None):
            raise refusal("input", "send either 'input' or 'messages'", "input")
        refuse_begun(self.messages or [], "no message is gone on with here; leave it out")
        return self


class ScoredToken(BaseModel):
    id: int
    text: str
    logprob: float


class ScoredCandidate(BaseModel):
    """`logprob` is the natural logarithm of Pr(candidate | …); `probability` is its share among the candidates."""

    index: int
    text: str
    logprob: float
    probability: float
    tokens: list[ScoredToken]


class ScoreReply(BaseModel):
    """Candidates in the order they were sent; `best` is the index of the most probable."""

    object: Literal["score"] = "score"
    model: str
    soft_prompt: str | None
    best: int
    candidates: list[ScoredCandidate]
    usage: Usage
    recalled: RecalledPassages = None

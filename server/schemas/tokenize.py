"""`POST /tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, RootModel, StringConstraints, model_validator

from softbatch.server.schemas.base import Neutral, RequestModel, refusal
from softbatch.server.schemas.chat import Messages, refuse_begun
from softbatch.server.schemas.completions import token_ids
from softbatch.server.schemas.sampling import BaseOrSoftPrompt, at_most_items

MAX_TEXT_CHARS = 1 << 20
MAX_TOKENS = 1 << 18


class TokenizeRequest(RequestModel):
    """A text or a conversation, exactly one of them. `inputs` is text-generation-inference's name of a text, and gets
    its reply: a list."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "The capital of France is"}]})
    without_effect: ClassVar[frozenset[str]] = frozenset({"parameters"})
    unsupported: ClassVar[Neutral] = {
        "continue_final_message": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
    }

    model: BaseOrSoftPrompt | None = None
    prompt: Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)] | None = None
    inputs: Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)] | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        default=None,
        description="left out: true for a text; false for messages, as their template writes them",
    )
    add_generation_prompt: bool = Field(default=True, description="messages: end where the answer begins")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _is_one_of_both(self) -> TokenizeRequest:
        if [self.prompt, self.inputs, self.messages].count(None) != 2:
            raise refusal("prompt", "send either 'prompt' or 'messages'", "prompt")
        refuse_begun(self.messages or [], "no message is gone on with here; leave it out")
        return self


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class PlacedToken(BaseModel):
    """A token, and where its text stands in the input, in characters."""

    id: int
    text: str
    start: int
    stop: int


class PlacedTokens(RootModel[list[PlacedToken]]):
    """text-generation-inference's reply."""


class DetokenizeRequest(RequestModel):
    """Token ids."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [504, 3575, 282, 4649, 314]}]})

    model: BaseOrSoftPrompt | None = None
    tokens: Annotated[
        list[int],
        PlainValidator(token_ids, json_schema_input_type=list[int]),
        at_most_items(MAX_TOKENS),
    ]


class DetokenizeReply(BaseModel):
    prompt: str

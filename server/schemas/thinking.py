"""How a model that can think before it answers is to do it, in the words of chat completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from softbatch.server.schemas.base import RequestModel, refusal
from softbatch.server.schemas.tools import as_bounded


class ThinkingSwitch(RequestModel):
    """DeepSeek's and GLM's way to switch thinking on or off; how long it may be is up to the model."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"budget_tokens", "clear_thinking"})

    type: Literal["enabled", "disabled", "auto"]


class ThinkingFields(RequestModel):
    """What the chat template is given beside the conversation, and the several names that this has."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None, description="if the model's chat template knows it; 'none' is always allowed"
    )
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(as_bounded)] = Field(
        default={}, description="given to the chat template, which must read them; not from OpenAI's API"
    )
    enable_thinking: bool | None = Field(
        default=None, description="one of chat_template_kwargs, as Qwen's API has it; not from OpenAI's API"
    )
    thinking: ThinkingSwitch | None = Field(
        default=None, description="as DeepSeek's API has it; 'disabled' is always allowed; not from OpenAI's API"
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> ThinkingFields:
        """An effort beside a switch of the template's own is no contradiction: models have one or the other."""
        said = {
            "thinking": {"enabled": True, "disabled": False}.get(self.thinking.type) if self.thinking else None,
            "reasoning_effort": self.reasoning_effort and self.reasoning_effort != "none",
            "enable_thinking": self.enable_thinking,
        }
        told = {name: value for name, value in said.items() if value is not None}
        own = self.chat_template_kwargs.get("enable_thinking")
        if self.enable_thinking is not None and own is not None:
            told["chat_template_kwargs"] = own
        first = next(iter(told), "")
        for name, value in told.items():
            if value is not told[first]:
                raise refusal("thinking", f"says the contrary of {first}: send only one of them", name)
        return self

    @property
    def effort(self) -> str | None:
        """None: as the model does it."""
        switched = {"enabled": "medium", "disabled": "none", "auto": None}
        return self.reasoning_effort or (switched[self.thinking.type] if self.thinking is not None else None)

    @property
    def template_fields(self) -> dict[str, Any]:
        own = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return own | self.chat_template_kwargs

    @property
    def names_of_thinking(self) -> dict[str, str]:
        """What the first two fields are called in the request if another name of them was sent."""
        names = {"reasoning_effort": "thinking"} if self.reasoning_effort is None and self.thinking else {}
        if self.enable_thinking is not None and not self.chat_template_kwargs:
            names["chat_template_kwargs"] = "enable_thinking"
        return names

"""What the forms of calls and of reasoning are called, in the code and on the command line."""

from __future__ import annotations

from typing import Literal

CallFormatName = Literal[
    "hermes", "llama3_json", "mistral", "mistral_list", "gemma", "functiongemma", "gemma4", "pythonic", "qwen3_coder"
]
ReasoningName = Literal["think", "mistral", "gemma4"]
CallParser = Literal["auto", "none"] | CallFormatName
ReasoningParser = Literal["auto", "none"] | ReasoningName

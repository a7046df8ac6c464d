"""What the served model speaks: how tools reach it, and how reasoning and calls are read from its outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta

from softbatch.server.request_failures import InvalidGrammar, InvalidPrompt, shown
from softbatch.server.requests.output_format import OutputFormat
from softbatch.server.requests.text import ChatEnd, ChatPrompt, TextProcessor
from softbatch.server.tools.call_formats import CALL_FORMATS, CallFormat
from softbatch.server.tools.call_grammar import follows, tool_format
from softbatch.server.tools.message_reader import MessageReader, ReasoningFormat
from softbatch.server.tools.parser_names import CallFormatName, CallParser, ReasoningName, ReasoningParser
from softbatch.server.tools.tool import ToolUse
from softbatch.server.tools.tool_prompt import ToolPrompt, Turn

REASONING_FORMATS: dict[ReasoningName, ReasoningFormat] = {
    "think": ReasoningFormat("<think>", "</think>", ("<think>", "</think>")),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]", ("[THINK]", "[/THINK]")),
    "gemma4": ReasoningFormat("<|channel>thought", "<channel|>", ("<|channel>", "<channel|>")),
}
# What only the template writes of a form, or tells the model to write; the first that is there decides. Those without
# a name are forms that are not read: such models are told to write another one.
_SIGNS: tuple[tuple[str, CallFormatName | None], ...] = (
    ("<parameter=", "qwen3_coder"),
    ("<function=", None),
    ("<arg_key>", None),
    ("[ARGS]", "mistral"),
    ("[TOOL_CALLS]", "mistral_list"),
    ("<start_function_call>", "functiongemma"),
    ("<|tool_call>call:", "gemma4"),
    ("<tool_call>", "hermes"),
    ("[func_name1(", "pythonic"),
    ("<|python_start|>", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"),
    ("tool_code", "gemma"),
)
# What every template is given; nobody else may set it.
_OWN_FIELDS = {"messages", "tools", "custom_tools", "documents", "add_generation_prompt", "continue_final_message"}
_TAIL_TOKENS = 16


@dataclass(frozen=True)
class ChatPlan:
    """How one conversation is put to the model and its output is read. The first three are fields of a
    GenerationRequest."""

    conversation: ChatPrompt
    output_format: OutputFormat | None
    shown_tokens: frozenset[int]
    _calls: CallFormat | None
    _reasoning: ReasoningFormat | None
    _use: ToolUse
    _text: TextProcessor

    @property
    def reads(self) -> bool:
        """Whether an output can be anything but text."""
        return self._calls is not None or self._reasoning is not None

    def reader(self, prompt_ids: Sequence[int]) -> MessageReader:
        """One for each choice; `prompt_ids` are what its output follows."""
        reasoning = self._reasoning
        is_thinking = reasoning is not None and self._opens_reasoning(reasoning, prompt_ids)
        return MessageReader(
            self._calls, reasoning, self._use.signatures, is_thinking=is_thinking, parallel=self._use.parallel
        )

    def _opens_reasoning(self, reasoning: ReasoningFormat, prompt_ids: Sequence[int]) -> bool:
        tail = self._text.decode(prompt_ids[-_TAIL_TOKENS:], skip_special_tokens=False)
        return tail.rstrip().endswith(reasoning.opening)


class Dialect:
    """Chosen from the chat template's text unless it is named. `parses_calls` none: no tools are taken."""

    def __init__(self, text: TextProcessor, calls: CallParser = "auto", reasoning: ReasoningParser = "auto") -> None:
        self._text = text
        self._template = _template_of(text.tokenizer)
        self._added = {token.content: i for i, token in text.backend.get_added_tokens_decoder().items()}
        found = next((name for sign, name in _SIGNS if sign in self._template), None)
        name = None if calls == "none" else found or "hermes" if calls == "auto" else calls
        self.calls = CALL_FORMATS[name] if name else None
        self.reasoning = self._reasoning_format(reasoning)
        own = calls not in ("auto", "none") or found is not None
        self._prompt = ToolPrompt(text.tokenizer, self.calls or CALL_FORMATS["hermes"], is_templates_own=own)

    def plan(
        self,
        turns: Sequence[Turn],
        use: ToolUse,
        *,
        fields: Mapping[str, Any] | None = None,
        output_format: OutputFormat | None = None,
        has_soft_prompt: bool = False,
        chat_end: ChatEnd = "answer",
    ) -> ChatPlan:
        """Raises InvalidPrompt, or InvalidGrammar for an `output_format` that cannot stand beside tools."""
        calls = self.calls if use.tools else None
        if use.tools and calls is None:
            raise InvalidPrompt("this server reads no calls of tools (--tool-call-parser none)", param="tools")
        conversation = self._prompt.conversation(turns, use.tools, fields or {}, has_soft_prompt=has_soft_prompt)
        shown = {*(calls.tokens if calls else ())}
        if self.reasoning is not None:
            shown |= {*self.reasoning.tokens}
        return ChatPlan(
            conversation,
            self._format(conversation, use, output_format, chat_end),
            frozenset(self._added[token] for token in shown if token in self._added),
            calls,
            self.reasoning if output_format is None or output_format.kind != "grammar" else None,
            use,
            self._text,
        )

    def history(self, turns: Sequence[Turn]) -> list[Turn]:
        """Turns with calls and results as the chat template wants them."""
        return self._prompt.history(turns)

    def template_fields(self, wanted: Mapping[str, Any], effort: str | None = None) -> dict[str, Any]:
        """What the template is given of `chat_template_kwargs` and `reasoning_effort`. Raises InvalidPrompt for what it
        does not read; that nothing of a kind be done is granted by a template that knows nothing of it."""
        fields = {}
        for name, value in wanted.items():
            if name in self._variables:
                fields[name] = value
            elif value is not None and value is not False:
                known = ", ".join(sorted(self._variables)) or "none"
                message = f"the model's chat template reads no {shown(name)}; what it reads: {known}"
                raise InvalidPrompt(message, param="chat_template_kwargs")
        if effort is None:
            return fields
        if "reasoning_effort" in self._variables:
            return {"reasoning_effort": effort} | fields
        switch = next((name for name in ("enable_thinking", "thinking") if name in self._variables), None)
        if switch is not None:
            return {switch: effort != "none"} | fields
        if effort != "none":
            message = "the model's chat template knows no effort of reasoning; leave it out or send 'none'"
            raise InvalidPrompt(message, param="reasoning_effort")
        return fields

    @cached_property
    def _variables(self) -> frozenset[str]:
        """What clients may give to the template."""
        try:
            environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
            # A tag that transformers has beside Jinja's, around what assistants say.
            template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self._template)
            names = jinja2.meta.find_undeclared_variables(environment.parse(template))
        except jinja2.TemplateError:
            return frozenset()
        own = {*_OWN_FIELDS, *self._text.tokenizer.special_tokens_map, "raise_exception", "strftime_now"}
        return frozenset(names - own)

    def _format(
        self, conversation: ChatPrompt, use: ToolUse, form: OutputFormat | None, chat_end: ChatEnd
    ) -> OutputFormat | None:
        if form is not None and use.required:
            raise InvalidGrammar(
                f"{form.param}: not together with a tool that must be called: the output cannot be both",
                param=form.param,
            )
        begun = conversation.turns[-1]["content"] or "" if chat_end == "open turn" else ""
        if form is not None and form.kind == "grammar":
            if use.tools:
                raise InvalidGrammar(f"{form.param}: not together with tools; send one of them", param=form.param)
            return form.behind(begun)
        # An answer that has begun has no thoughts before it.
        reasoning = self.reasoning if chat_end != "open turn" else None
        is_thinking = False
        if reasoning is not None and (use.tools or form is not None):
            is_thinking = self._prompt_of(conversation).rstrip().endswith(reasoning.opening)
        if use.tools and self.calls is not None:
            found = tool_format(self.calls, use, self._added.get, reasoning, form, is_thinking=is_thinking)
            # Calls come behind whatever is begun; an answer in a form may have begun with it.
            return replace(found, begun=form.behind(begun).begun) if found and form is not None else found
        if form is not None and reasoning is not None:
            return follows(reasoning, self._added.get, form, is_thinking=is_thinking)
        return form and form.behind(begun)

    def _prompt_of(self, conversation: ChatPrompt) -> str:
        """As far as its end tells. Turns that the template takes only beside a soft prompt are left out."""
        try:
            return self._text.render(conversation)
        except InvalidPrompt:
            return self._text.render(ChatPrompt([{"role": "user", "content": "x"}], conversation.fields))

    def _reasoning_format(self, wanted: ReasoningParser) -> ReasoningFormat | None:
        if wanted == "none":
            return None
        if wanted != "auto":
            return REASONING_FORMATS[wanted]
        for found in REASONING_FORMATS.values():
            if found.closing in self._template or {found.opening, found.closing} <= self._added.keys():
                return found
        return None


def _template_of(tokenizer: Any) -> str:
    """The one for tools, if there are several."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = templates.get("tool_use") or templates.get("default")
    return templates or ""

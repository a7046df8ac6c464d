"""Tools, calls and their results on the way to the model: through its chat template, or in words if that knows none."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from softbatch.prompt_store.template import TemplateError, render_chat
from softbatch.server.requests.text import ChatPrompt
from softbatch.server.tools.call_formats import MISTRAL_ID_LENGTH, CallFormat, example
from softbatch.server.tools.tool import Tool

Turn = Mapping[str, Any]
Fields = Mapping[str, Any]
_SEPARATOR = "\n\n"
_INSTRUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

To call a function, answer in exactly this form, with the arguments as JSON:
{example}"""


class ToolPrompt:
    """Owns what a chat template is known to write, which is found out by rendering once.

    Turns come as OpenAI's API has them: `content` is text, a call's arguments are JSON text.
    """

    def __init__(self, tokenizer: Any, call_format: CallFormat, *, is_templates_own: bool) -> None:
        """`is_templates_own`: the template tells the model to write calls in this form; else we do."""
        self._tokenizer = tokenizer
        self._calls = call_format
        self._is_templates_own = is_templates_own

    def conversation(
        self, turns: Sequence[Turn], tools: Sequence[Tool], fields: Fields, *, has_soft_prompt: bool
    ) -> ChatPrompt:
        history = self.history(turns)
        described = [tool.as_json() for tool in tools]
        beside = None
        if tools and has_soft_prompt:
            beside = ChatPrompt(_with_system(self._beside_soft_prompt(described), history), fields)
        if not tools:
            return ChatPrompt(history, fields)
        if self.knows_tools:
            return ChatPrompt(history, {**fields, "tools": described}, beside)
        return ChatPrompt(self._instructed(described, history), fields, beside)

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template writes tools, and tells to call them in a form that is read here."""
        if not self._is_templates_own:
            return False
        name = _mark()
        rendered = self._render([_user("x")], {"tools": [Tool(name, name).as_json()]})
        return rendered is not None and name in rendered

    @cached_property
    def takes_system_turns(self) -> bool:
        system, user = _mark(), _mark()
        rendered = self._render([{"role": "system", "content": system}, _user(user)], {})
        return rendered is not None and 0 <= rendered.find(system) < rendered.find(user)

    @cached_property
    def arguments_kind(self) -> type[dict[str, Any]] | type[str] | None:
        """What the template wants a call's arguments to be; None if it writes no calls, or no results."""
        if not self._is_templates_own:
            return None
        name, key, result = (_mark() for _ in range(3))
        for arguments in ({key: "1"}, json.dumps({key: "1"})):
            call = _call("a" * MISTRAL_ID_LENGTH, name, arguments)
            answer = {"role": "tool", "tool_call_id": call["id"], "name": name, "content": result}
            calls = {"role": "assistant", "content": "", "tool_calls": [call]}
            rendered = self._render([_user("x"), calls, answer], {"tools": [Tool(name).as_json()]})
            # A dict written as it is shows in Python's quotes, a text that is encoded once more in escaped ones.
            is_written = rendered is not None and name in rendered and result in rendered
            if is_written and rendered is not None and re.search(f'(?<![\\\\\'])"?{key}"?\\s*[:=>]', rendered):
                return dict if isinstance(arguments, dict) else str
        return None

    @cached_property
    def writes_several_calls(self) -> bool:
        """Whether the template takes a turn with two calls."""
        arguments: object = {} if self.arguments_kind is dict else "{}"
        calls = [_call(letter * MISTRAL_ID_LENGTH, _mark(), arguments) for letter in "ab"]
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        results = [{"role": "tool", "tool_call_id": call["id"], "name": "x", "content": "x"} for call in calls]
        return self._render([_user("x"), turn, *results], {}) is not None

    def _render(self, turns: Sequence[Turn], fields: Fields) -> str | None:
        try:
            return render_chat(self._tokenizer, turns, fields=fields)
        except TemplateError:
            return None

    def _instructed(self, described: list[dict[str, Any]], history: list[Turn]) -> list[Turn]:
        """With the tools told in a system turn or, if the template has none, by the first user."""
        if self.takes_system_turns:
            return _with_system(self._instruction(described), history)
        at = next((i for i, turn in enumerate(history) if turn["role"] == "user"), None)
        if at is None:
            return _with_system(self._instruction(described), history)
        told = {**history[at], "content": f"{self._instruction(described)}{_SEPARATOR}{history[at]['content']}"}
        return [*history[:at], told, *history[at + 1 :]]

    def _instruction(self, described: list[dict[str, Any]]) -> str:
        tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in described)
        return _INSTRUCTION.format(tools=tools, example=example(self._calls))

    def _beside_soft_prompt(self, described: list[dict[str, Any]]) -> str:
        """What stands in the first user turn: the template's own words behind a system turn, if they can be told."""
        system, user = _mark(), _mark()
        turns = [{"role": "system", "content": system}, _user(user)]
        plain, told = self._render(turns, {}), self._render(turns, {"tools": described})
        if plain is None or told is None or not self.knows_tools or system not in plain:
            return self._instruction(described)
        end = plain.index(system) + len(system)
        before, behind = plain[:end], plain[end:]
        text = told[len(before) : len(told) - len(behind)]
        if f"{before}{text}{behind}" != told or not text.strip():
            return self._instruction(described)
        return text.strip()

    def history(self, turns: Sequence[Turn]) -> list[Turn]:
        """Turns with calls and results as the template wants them."""
        if not any(turn.get("tool_calls") or turn["role"] == "tool" for turn in turns):
            return list(turns)
        kind = self.arguments_kind
        names = {call["id"]: call["function"]["name"] for turn in turns for call in turn.get("tool_calls") or ()}
        if kind is None:
            return _merged(self._in_words(turn) for turn in turns)
        if any(len(turn.get("tool_calls") or ()) > 1 for turn in turns) and not self.writes_several_calls:
            turns = _one_by_one(turns)
        history: list[Turn] = []
        for turn in turns:
            new = dict(turn)
            if turn.get("tool_calls"):
                new["tool_calls"] = [self._call_for_template(call, kind) for call in turn["tool_calls"]]
            elif turn["role"] == "tool":
                call_id = turn.get("tool_call_id", "")
                new |= {"tool_call_id": self._id(call_id), "name": turn.get("name") or names.get(call_id, "")}
            history.append(new)
        return history

    def _call_for_template(self, call: Mapping[str, Any], kind: type) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"].strip() or "{}"
        return _call(self._id(call["id"]), function["name"], _decoded(arguments) if kind is dict else arguments)

    def _id(self, call_id: str) -> str:
        """Mistral's templates refuse ids of any other length than their own."""
        is_mistral = self._calls.name.startswith("mistral")
        if not is_mistral or (len(call_id) == MISTRAL_ID_LENGTH and call_id.isalnum()):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:MISTRAL_ID_LENGTH]

    def _in_words(self, turn: Turn) -> Turn:
        """Calls as the model would write them, results as a user's words."""
        if turn["role"] == "tool":
            return _user(f"<tool_response>\n{turn['content']}\n</tool_response>")
        calls = turn.get("tool_calls")
        if not calls:
            return turn
        written = self._calls.write(
            [(call["function"]["name"], call["function"]["arguments"].strip() or "{}") for call in calls]
        )
        return {"role": "assistant", "content": f"{turn['content']}\n{written}" if turn["content"] else written}


def _mark() -> str:
    return f"m{secrets.token_hex(12)}"


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _call(call_id: str, name: str, arguments: object) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _decoded(arguments: str) -> object:
    """What a client sends back may be broken JSON, as the model has written it."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _with_system(text: str, history: Sequence[Turn]) -> list[Turn]:
    """Behind what the system turn says already."""
    first = history[0]
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}{_SEPARATOR}{text}".strip()}, *history[1:]]
    return [{"role": "system", "content": text}, *history]


def _one_by_one(turns: Sequence[Turn]) -> list[Turn]:
    """Each call of a turn in one of its own, with its result behind it."""
    split: list[Turn] = []
    results = {turn.get("tool_call_id"): turn for turn in turns if turn["role"] == "tool"}
    moved: set[int] = set()
    for turn in turns:
        calls = turn.get("tool_calls") or ()
        if len(calls) < 2:
            split += [turn] if id(turn) not in moved else []
            continue
        for number, call in enumerate(calls):
            split.append({**turn, "content": "" if number else turn["content"], "tool_calls": [call]})
            result = results.get(call["id"])
            if result is not None:
                split.append(result)
                moved.add(id(result))
    return split


def _merged(turns: Any) -> list[Turn]:
    """Results, and what the user says behind them, are one turn: many templates want turns to alternate."""
    merged: list[list[Turn]] = []
    for turn in turns:
        before = merged[-1][-1] if merged else None
        follows_result = before is not None and str(before["content"]).endswith("</tool_response>")
        if before is not None and follows_result and before["role"] == turn["role"] == "user":
            merged[-1].append(turn)
        else:
            merged.append([turn])
    return [one[0] if len(one) == 1 else _user("\n".join(str(turn["content"]) for turn in one)) for one in merged]

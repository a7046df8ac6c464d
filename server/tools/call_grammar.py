"""What an output with tools must follow, as a grammar in llguidance's Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from softbatch.server.request_failures import InvalidGrammar
from softbatch.server.requests.output_format import JSON_WHITESPACE, OutputFormat
from softbatch.server.requests.schema_formats import without_other_formats
from softbatch.server.tools.call_formats import CallFormat
from softbatch.server.tools.message_reader import ReasoningFormat
from softbatch.server.tools.tool import Tool, ToolUse
from softbatch.server.tools.xml_grammar import ElementRules, with_slashes_escaped

# The id of a token that the tokenizer never makes of several others; None for other words.
TokenId = Callable[[str], int | None]
# A model that is unsure of itself goes on calling.
MAX_MORE_CALLS = 31
# Four times what the one schema of an output may have.
MAX_GRAMMAR_CHARS = 1 << 18
_OPEN_ENDED = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "unevaluatedProperties", "if")
_ANY_TEXT = "/(?s:.*)/"
_BLANKS = r"/[ \n\r\t]{0,8}/"


def tool_format(
    calls: CallFormat,
    use: ToolUse,
    token_id: TokenId,
    reasoning: ReasoningFormat | None,
    form: OutputFormat | None,
    *,
    is_thinking: bool,
) -> OutputFormat | None:
    """Calls of the required tools; or, if none is, text in the `form` asked for, or with calls that follow the schemas
    of strict tools; None if nothing is asked for. Behind reasoning, if the model reasons. Raises InvalidGrammar."""
    grammar = _Grammar(calls, use, token_id)
    if use.required:
        start, param = grammar.calls([tool for tool in use.tools if tool.name in use.required]), "tools"
    elif form is not None:
        free = grammar.form(form)
        start, param = f"({grammar.calls(use.tools)} | {free})" if use.tools else free, form.param
    elif any(tool.strict for tool in use.tools) and calls.is_marked:
        start, param = grammar.text_and_calls(), "tools"
    else:
        return None
    if reasoning is not None:
        start = f"{grammar.reasoning(reasoning, is_thinking)} {start}"
    text = "\n".join([f"start: {start}", *grammar.rules, ""])
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidGrammar(
            f"tools: too large to be enforced together: {len(text)} characters of grammar, and {MAX_GRAMMAR_CHARS} are "
            "allowed; send fewer tools, or smaller schemas",
            param="tools",
        )
    return OutputFormat("grammar", text, param, parts=tuple(grammar.parts))


def follows(reasoning: ReasoningFormat, token_id: TokenId, form: OutputFormat, *, is_thinking: bool) -> OutputFormat:
    """The form, behind reasoning."""
    grammar = _Grammar(None, ToolUse(), token_id)
    start = f"start: {grammar.reasoning(reasoning, is_thinking)} {grammar.form(form)}"
    return OutputFormat("grammar", "\n".join([start, *grammar.rules, ""]), form.param, parts=(form,))


class _Grammar:
    """Collects rules; `parts` are what of them the client wrote, to be named if the grammar cannot be compiled."""

    def __init__(self, calls: CallFormat | None, use: ToolUse, token_id: TokenId) -> None:
        self._calls = calls
        self._use = use
        self._token_id = token_id
        self._splits = calls is not None and calls.bare == "{" and not calls.is_marked
        self.rules: list[str] = []
        self.parts: list[OutputFormat] = []

    def calls(self, tools: Sequence[Tool]) -> str:
        assert self._calls is not None
        call = self._call(tools)
        more = f" ({self._words(self._calls.between)} {call}){{0,{MAX_MORE_CALLS}}}" if self._use.parallel else ""
        return f"{self._words(self._calls.before)} {call}{more} {self._words(self._calls.behind)}".strip()

    def text_and_calls(self) -> str:
        """Any text; but behind each mark a call must follow."""
        assert self._calls is not None
        mark = self._calls.marks[0]
        before = f"{self._calls.before}{self._calls.head}"
        inside = self._calls.before.removeprefix(mark) if before.startswith(mark) else ""
        call = f"{self._words(inside)} {self._call(self._use.tools, mark)} {self._words(self._calls.behind)}"
        times = "*" if self._use.parallel else "?"
        # Without a mark, a text that begins as a call may be read as one.
        first = "" if not self._calls.bare else f"[ \\n]*[^ \\n{re.escape(self._calls.bare)}]"
        token = self._token_id(mark)
        if token is not None:
            # What reads as a call without the token in front is none that could be followed.
            others = "".join(f" & ~/(?s:.*){_escaped(other)}(?s:.*)/" for other in self._calls.marks[1:])
            self.rules += [f"FIRST: /{first}(?s:.*)/{others}", f"TEXT: /(?s:.+)/{others}"]
            bare = f"{self._call(self._use.tools)} | " if self._calls.bare else ""
            return f"({bare}FIRST? (<[{token}]> {call} TEXT?){times})"
        self.rules.append(f"marked[suffix={json.dumps(mark)}]: {_ANY_TEXT}")
        others = "|".join(map(_escaped, self._calls.marks))
        self.rules.append(f"REST: /(?s:.+)/ & ~/(?s:.*)({others})(?s:.*)/")
        return f"(marked {call}){times} REST?"

    def reasoning(self, reasoning: ReasoningFormat, is_thinking: bool) -> str:
        token = self._token_id(reasoning.closing)
        if token is not None:
            self.rules += ["THOUGHT: /(?s:.+)/", f"thought: THOUGHT? <[{token}]>"]
        else:
            self.rules.append(f"thought[suffix={json.dumps(reasoning.closing)}]: {_ANY_TEXT}")
        self.rules.append(f"BLANKS: {_BLANKS}")
        if is_thinking:
            return "thought BLANKS"
        return f"({self._words(reasoning.opening, reasoning.tokens)} thought BLANKS)?"

    def form(self, form: OutputFormat) -> str:
        self.parts.append(form)
        if form.kind == "json_schema":
            schema = without_other_formats(json.loads(form.text))
            return _json_of(schema if isinstance(schema, dict) else {} if schema else {"not": {}}, lenient=False)
        if form.kind == "choice":
            return "(" + " | ".join(map(_quoted, json.loads(form.text))) + ")"
        if form.kind == "regex":
            self.rules.append(f"FORM: /{with_slashes_escaped(form.text)}/")
            return "FORM"
        raise ValueError(form.kind)

    def _call(self, tools: Sequence[Tool], mark: str = "") -> str:
        """One call of any of them. `mark` has been written already."""
        assert self._calls is not None
        names = []
        for tool in tools:
            name = f"call_{self._use.tools.index(tool)}"
            names.append(name)
            head = self._calls.head.replace("NAME", tool.name)
            if mark and not self._calls.before:
                head = head.removeprefix(mark)
            schema = _schema_of(tool)
            arguments = self._arguments(name, schema, lenient=not tool.strict)
            rule = f"{name}: {self._words(head)} {arguments} {self._words(self._calls.tail)}".rstrip()
            if rule in self.rules:
                continue
            self.rules.append(rule)
            part = OutputFormat("json_schema", json.dumps(_guided(schema, not tool.strict)), f"{tool.param}.parameters")
            self.parts.append(part)
        return names[0] if len(names) == 1 else f"({' | '.join(names)})"

    def _arguments(self, name: str, schema: dict[str, object], *, lenient: bool) -> str:
        assert self._calls is not None
        if not self._calls.in_elements:
            return _json_of(schema, lenient=lenient)
        elements = ElementRules(name, lambda one: _json_of(one, lenient=lenient))
        term = elements.arguments(schema)
        self.rules += [rule for rule in elements.rules if rule not in self.rules]
        return term

    def _words(self, text: str, tokens: Sequence[str] | None = None) -> str:
        """A text in which tokens of the format stand for themselves."""
        words = tokens if tokens is not None else self._calls.tokens if self._calls else ()
        tokens = [token for token in words if self._token_id(token) is not None]
        if not tokens and self._splits:
            # As JSON's own grammar cuts it: of several lexemes that begin alike only the longest is looked at.
            return " ".join(map(_quoted, re.findall(r'"[^"]*"|[^"\s]|\s+', text)))
        if not tokens:
            return _quoted(text) if text else ""
        pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
        return " ".join(self._word(piece) for piece in pieces if piece)

    def _word(self, text: str) -> str:
        token = self._token_id(text)
        return _quoted(text) if token is None else f"<[{token}]>"


def _schema_of(tool: Tool) -> dict[str, object]:
    """Of the arguments: an object, and without keys of which the schema says nothing."""
    parameters = without_other_formats(tool.parameters or {"properties": {}})
    schema: dict[str, object] = {"type": "object", **parameters}
    if "properties" in schema and not any(word in schema for word in ("additionalProperties", *_OPEN_ENDED)):
        schema["additionalProperties"] = False
    return schema


def _guided(schema: dict[str, object], lenient: bool) -> dict[str, object]:
    """What is lenient lets words pass that the grammar cannot enforce."""
    return schema | {"x-guidance": {"lenient": lenient, "whitespace_pattern": JSON_WHITESPACE}}


def _json_of(schema: dict[str, object], *, lenient: bool) -> str:
    return f"%json {json.dumps(_guided(schema, lenient))}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")

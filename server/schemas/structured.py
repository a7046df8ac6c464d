"""The fields that ask for structured output, in OpenAI's, vLLM's and text-generation-inference's words."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from softbatch.server.requests.output_format import OutputFormat
from softbatch.server.schemas.base import MAX_NAME_CHARS, Neutral, RequestModel, refusal

MAX_GRAMMAR_CHARS = 1 << 16
MAX_CHOICES = 1024
ANY_OBJECT = '{"type":"object"}'

Name = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)]
Description = Annotated[str, StringConstraints(max_length=MAX_GRAMMAR_CHARS)]
GrammarText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


def _as_schema(value: object) -> object:
    """The schema as JSON text."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
            raise refusal("json_schema", "must be a JSON schema, as an object or as its text") from None
    if not isinstance(value, dict | bool):
        raise refusal("json_schema", "must be a JSON schema: an object such as {'type': 'object'}")
    try:
        text = msgspec.json.encode(value).decode()
    except (RecursionError, UnicodeEncodeError):
        raise refusal("json_schema", "is nested too deeply, or not valid Unicode") from None
    if len(text) > MAX_GRAMMAR_CHARS:
        raise refusal("too_long", f"at most {MAX_GRAMMAR_CHARS} characters are allowed, not {len(text)}")
    return text


def _not_empty_choices(value: list[str]) -> list[str]:
    if not value:
        raise refusal("too_short", "at least one choice is needed")
    if len(value) > MAX_CHOICES:
        raise refusal("too_long", f"at most {MAX_CHOICES} choices are allowed, not {len(value)}")
    if sum(map(len, value)) > MAX_GRAMMAR_CHARS:
        raise refusal("too_long", f"at most {MAX_GRAMMAR_CHARS} characters in all choices are allowed")
    return value


SchemaText = Annotated[str, BeforeValidator(_as_schema, json_schema_input_type=dict[str, Any] | str)]
Choices = Annotated[list[GrammarText], AfterValidator(_not_empty_choices)]


class NamedSchema(RequestModel):
    """OpenAI's `json_schema`. The output follows the schema, whatever `strict` says."""

    name: Name
    description: Description | None = None
    schema_text: SchemaText | None = Field(default=None, alias="schema")
    strict: bool = False


class GrammarParameter(RequestModel):
    """text-generation-inference's `grammar`."""

    type: Literal["json", "regex", "json_schema"]
    value: Any

    @model_validator(mode="after")
    def _is_readable(self) -> GrammarParameter:
        self.as_format("")
        return self

    def as_format(self, param: str) -> OutputFormat:
        return _format_of(self.type, self.value, f"{param}.value")


def _format_of(kind: str, value: object, param: str) -> OutputFormat:
    """Of an expression or, for other kinds, a schema. Raises an error about the field `value`."""
    if kind == "json_schema":
        if not isinstance(value, dict) or "schema" not in value:
            raise refusal("json_schema", "must be an object with a 'schema'", "value")
        value = value["schema"]
    if kind != "regex":
        try:
            return OutputFormat("json_schema", str(_as_schema(value)), param)
        except PydanticCustomError as error:
            raise refusal(error.type, error.message(), "value") from None
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_GRAMMAR_CHARS:
        raise refusal("regex", f"must be a regular expression of at most {MAX_GRAMMAR_CHARS} characters", "value")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise refusal("regex", "must be valid Unicode, without lone surrogates", "value")
    return OutputFormat("regex", value, param)


class ResponseFormat(RequestModel):
    """OpenAI's `response_format`, with a `schema` beside the type as llama.cpp has it, and text-generation-inference's
    'json' and 'regex', which have a `value`."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"name", "description", "strict"})

    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    json_schema: NamedSchema | None = None
    schema_text: SchemaText | None = Field(default=None, alias="schema", description="not from OpenAI's API")
    value: Any = Field(default=None, description="a schema or an expression; not from OpenAI's API")

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        places: dict[str, tuple[str, ...]] = {
            "json_schema": ("json_schema", "schema", "value"),
            "json_object": ("schema", "value"),
        }
        places |= {"json": ("value",), "regex": ("value",)}
        allowed = places.get(self.type, ())
        sent = [name for name in ("json_schema", "schema", "value") if self._is_sent(name)]
        for name in sent:
            if name not in allowed or len(sent) > 1:
                message = f"is not allowed with type {self.type!r}" if name not in allowed else "is there twice"
                raise refusal("json_schema", message, name)
        if not sent and self.type not in ("text", "json_object"):
            raise refusal("json_schema", f"is needed with type {self.type!r}", allowed[0])
        self.as_format("")
        return self

    def _is_sent(self, name: str) -> bool:
        return getattr(self, "schema_text" if name == "schema" else name) is not None

    def as_format(self, param: str) -> OutputFormat | None:
        if self.type == "text":
            return None
        if self.value is not None:
            return _format_of(self.type, self.value, f"{param}.value")
        if self.json_schema is not None:
            schema = self.json_schema.schema_text
            return OutputFormat("json_schema", "true" if schema is None else schema, f"{param}.json_schema.schema")
        if self.schema_text is not None:
            return OutputFormat("json_schema", self.schema_text, f"{param}.schema")
        return OutputFormat("json_schema", ANY_OBJECT, param)


class StructuredOutputs(RequestModel):
    """vLLM's `structured_outputs`: one of these."""

    unsupported: ClassVar[Neutral] = {
        "structural_tag": (),
        "disable_fallback": (False,),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
    }

    json_text: SchemaText | None = Field(default=None, alias="json")
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = Field(default=None, description="Lark, or GBNF as llama.cpp has it")
    json_object: bool = False

    def formats(self, prefix: str, joint: str) -> list[OutputFormat]:
        found = []
        if self.json_text is not None:
            found.append(OutputFormat("json_schema", self.json_text, f"{prefix}{joint}json"))
        if self.regex is not None:
            found.append(OutputFormat("regex", self.regex, f"{prefix}{joint}regex"))
        if self.choice is not None:
            choices = msgspec.json.encode(self.choice).decode()
            found.append(OutputFormat("choice", choices, f"{prefix}{joint}choice"))
        if self.grammar is not None:
            found.append(OutputFormat("grammar", self.grammar, f"{prefix}{joint}grammar"))
        if self.json_object:
            found.append(OutputFormat("json_schema", ANY_OBJECT, f"{prefix}{joint}json_object"))
        return found


class StructuredRequest(RequestModel):
    """The fields of a request, of which at most one may ask for a form of the output."""

    response_format: ResponseFormat | None = Field(default=None, description="JSON, or JSON that follows a schema")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="not from OpenAI's API")
    guided_json: SchemaText | None = Field(default=None, description="older name of structured_outputs.json")
    guided_regex: GrammarText | None = Field(default=None, description="older name of structured_outputs.regex")
    guided_choice: Choices | None = Field(default=None, description="older name of structured_outputs.choice")
    guided_grammar: GrammarText | None = Field(default=None, description="older name of structured_outputs.grammar")

    @property
    def output_format(self) -> OutputFormat | None:
        """What the output must follow, if anything."""
        formats = self._formats()
        return formats[0] if formats else None

    @model_validator(mode="after")
    def _has_one_format(self) -> StructuredRequest:
        formats = self._formats()
        if len(formats) > 1:
            first, second = (wanted.param for wanted in formats[:2])
            raise refusal("output_format", f"{first} asks for another form of the output: send only one", second)
        return self

    def _formats(self) -> list[OutputFormat]:
        older = StructuredOutputs.model_construct(
            json_text=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        formats = older.formats("guided", "_")
        if self.structured_outputs is not None:
            formats += self.structured_outputs.formats("structured_outputs", ".")
        wanted = self.response_format.as_format("response_format") if self.response_format is not None else None
        return formats + ([wanted] if wanted is not None else [])

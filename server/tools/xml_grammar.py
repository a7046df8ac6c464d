"""Arguments that are elements of XML, as rules of llguidance's Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from softbatch.server.tools.xml_calls import is_plain_text

_CLOSING = "\n</parameter>\n"


class ElementRules:
    """Writes the rules of one tool's arguments, which are named after its own; `json_of` writes a schema as a term.
    Parameters come in the order of the schema. A text ends where its element does, so that mark is not in it."""

    def __init__(self, name: str, json_of: Callable[[dict[str, Any]], str]) -> None:
        self._name = name
        self._json_of = json_of
        self.rules: list[str] = []

    def arguments(self, schema: dict[str, Any]) -> str:
        """A term for all of them."""
        properties = schema.get("properties")
        required = schema.get("required")
        terms = []
        for index, (key, one) in enumerate((properties if isinstance(properties, dict) else {}).items()):
            name = f"{self._name}_{index}"
            definitions: dict[str, Any] = {word: schema[word] for word in ("$defs", "definitions") if word in schema}
            self.rules += self._element(name, key, one, definitions)
            terms.append(name if isinstance(required, list) and key in required else f"{name}?")
        if schema.get("additionalProperties") is not False:
            name = f"{self._name}_more"
            self.rules.append(f"{name}: /<parameter=[^<>\\n]{{1,64}}>\\n/ {name}_value")
            self.rules.append(f"{name}_value[suffix={_quoted(_CLOSING)}]: /(?s:.*)/")
            terms.append(f"{name}*")
        return " ".join(terms)

    def _element(self, name: str, key: str, schema: Any, definitions: dict[str, Any]) -> Iterator[str]:
        opening = _quoted(f"<parameter={key}>\n")
        if not is_plain_text(schema):
            term = self._json_of(schema | definitions if isinstance(schema, dict) else {} if schema else {"not": {}})
            yield f"{name}: {opening} {term} {_quoted(_CLOSING)}"
        elif "const" in schema or "enum" in schema:
            words = [schema["const"]] if "const" in schema else schema["enum"]
            yield f"{name}: {opening} ({' | '.join(_quoted(word + _CLOSING) for word in words)})"
        elif pattern := _whole(schema.get("pattern")):
            yield f"{name}: {opening} {name.upper()} {_quoted(_CLOSING)}"
            yield f"{name.upper()}: /{pattern}/ & /[^<\\n]*/"
        else:
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            times = f"{{{least},{most}}}" if least or most != "" else "*"
            yield f"{name}: {opening} {name}_value"
            yield f"{name}_value[suffix={_quoted(_CLOSING)}]: /(?s:.{times})/"


def _whole(pattern: object) -> str:
    """An expression for all of a text that has the pattern in it; empty for those in which anchors stand elsewhere."""
    if not isinstance(pattern, str) or not pattern:
        return ""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begins : len(pattern) - ends]
    if (begins or ends) and "|" in inner:
        return ""
    return with_slashes_escaped(f"{'' if begins else '.*'}({inner}){'' if ends else '.*'}")


def with_slashes_escaped(pattern: str) -> str:
    """An expression as it stands between slashes; those that are escaped already stay."""
    return re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

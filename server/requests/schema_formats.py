"""What of a JSON schema is made ready for the grammar: formats that it does not know bind nothing."""

from __future__ import annotations

from typing import Any

# Those that llguidance enforces. JSON Schema leaves it open to look at formats at all, and libraries make up their own.
ENFORCED_FORMATS = frozenset(
    "date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split()  # noqa: SIM905
)
# Whose values are no schemas.
_VALUES = frozenset({"const", "enum", "default", "examples", "example", "required", "dependentRequired"})
# Whose values are schemas by the names of something.
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_MAX_DEPTH = 200


def without_other_formats(schema: Any, depth: int = 0) -> Any:
    """The schema without formats that are not enforced; itself if it is nested deeper than any that is taken."""
    if isinstance(schema, list):
        return [without_other_formats(one, depth + 1) for one in schema] if depth < _MAX_DEPTH else schema
    if not isinstance(schema, dict) or depth >= _MAX_DEPTH:
        return schema
    kept = {}
    for word, value in schema.items():
        if word in _VALUES:
            kept[word] = value
        elif word in _BY_NAME and isinstance(value, dict):
            kept[word] = {name: without_other_formats(one, depth + 1) for name, one in value.items()}
        elif word != "format" or not isinstance(value, str) or value in ENFORCED_FORMATS:
            kept[word] = without_other_formats(value, depth + 1)
    return kept

"""Which types of JSON values a schema allows, as far as it names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Kinds = frozenset[str]
ANY: Kinds = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})


def kinds_allowed(schema: Any) -> Kinds:
    """All of them where the schema says nothing that is understood. Definitions stand in the schema itself."""
    return _Kinds(schema).of(schema)


def kinds_of(value: object) -> Kinds:
    """The types that a value has: a whole number has two."""
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int | float):
        return frozenset({"number", "integer"} if value == value // 1 else {"number"})
    if isinstance(value, str):
        return frozenset({"string"})
    return frozenset({"object"} if isinstance(value, Mapping) else {"array"})


class _Kinds:
    """Each definition is looked at once, so that the work grows with the schema's size alone."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[str, Kinds] = {}

    def of(self, schema: Any) -> Kinds:
        if not isinstance(schema, Mapping):
            return ANY
        found = _named(schema.get("type"))
        if "const" in schema:
            found &= kinds_of(schema["const"])
        if isinstance(values := schema.get("enum"), list):
            found &= frozenset[str]().union(*map(kinds_of, values))
        for word in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(word), list):
                found &= frozenset[str]().union(*map(self.of, branches))
        if isinstance(branches := schema.get("allOf"), list):
            found = found.intersection(*map(self.of, branches))
        if isinstance(name := schema.get("$ref"), str):
            found &= self._referred(name)
        return found

    def _referred(self, name: str) -> Kinds:
        if name not in self._known:
            self._known[name] = ANY
            place: Any = self._root
            for word in name.removeprefix("#/").split("/"):
                place = place.get(word.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
            self._known[name] = self.of(place)
        return self._known[name]


def _named(types: object) -> Kinds:
    """Of the word `type`, one or a list; a word that is no type of JSON may mean anything."""
    words = [types] if isinstance(types, str) else types
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word in ANY for word in words):
        return ANY
    return frozenset({*words, *(["integer"] if "number" in words else [])})

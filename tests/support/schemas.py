"""JSON schemas as people send them: nested, with unions, references, bounds and patterns, all of short documents."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
_WORDS = ("name", "größe", "id", "tags", "a b", "x-y", "日付", "unit", "is_open", '"quoted"')
_PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(yes|no|maybe)$", "^[a-f0-9]{8}$", "^\\d{4}-\\d{2}$")


def _text(rng: random.Random) -> Schema:
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(1, 8)},
            {"type": "string", "pattern": rng.choice(_PATTERNS)},
            {"type": "string", "format": rng.choice(["date", "date-time", "uuid", "ipv4"])},
            {"type": "string", "minLength": 2, "maxLength": 4},
        ]
    )


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 40},
            {"type": "number", "minimum": 0, "maximum": 1},
            {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
        ]
    )


def _constant(rng: random.Random) -> Schema:
    values = [rng.choice(_WORDS), rng.randint(-9, 9), True, False, None, 0.5]
    return rng.choice([{"enum": rng.sample(values, 3)}, {"const": rng.choice(values)}, {"type": "null"}])


def _array(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.3:
        return {"type": "array", "prefixItems": [_any(rng, depth), _any(rng, depth)], "items": False, "minItems": 2}
    return {"type": "array", "items": _any(rng, depth), "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_WORDS, rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": names[: rng.randint(0, len(names))],
        "additionalProperties": False,
    }


def _any(rng: random.Random, depth: int) -> Schema:
    leaves = [_text, _number, _constant]
    if depth == 0 or rng.random() < 0.5:
        return rng.choice([*leaves, lambda _: {"type": "boolean"}])(rng)
    kind = rng.choice(["array", "object", "union", "reference"])
    if kind == "array":
        return _array(rng, depth - 1)
    if kind == "union":
        return {"anyOf": [_any(rng, depth - 1), _constant(rng), {"type": ["boolean", "null"]}]}
    if kind == "reference":
        return {"$ref": "#/$defs/part"}
    return _object(rng, depth - 1)


def _document(seed: int) -> Schema:
    rng = random.Random(seed)
    return _object(rng, depth=2) | {"$defs": {"part": _object(rng, depth=0)}}


SCHEMAS: list[Schema] = [_document(seed) for seed in range(200)]

"""The file of `--key-weights`: how large a share of the engine each API key has."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

LEAST, MOST = 0.001, 1000.0


def owner_of(key: str) -> str:
    """The word that stands for the holder of a key; the key cannot be told from it."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def read_key_weights(path: Path, keys: Collection[str]) -> Mapping[str, float]:
    """By owner. Raises ValueError with what would be right, which names no key."""
    try:
        weights = msgspec.json.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), type=dict[str, float])
    except OSError as error:
        raise ValueError(f"--key-weights {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        example = '{"key-of-a": 3, "key-of-b": 0.5}'
        raise ValueError(f"--key-weights {path}: give a JSON object such as {example}; {error}") from error
    for place, (key, weight) in enumerate(weights.items(), 1):
        if not LEAST <= weight <= MOST:
            raise ValueError(
                f"--key-weights {path}: weight {place} is {weight:g}; give one from {LEAST:g} up to {MOST:g}"
            )
        if key not in keys:
            raise ValueError(f"--key-weights {path}: key {place} is none of --api-key and --admin-key")
    return {owner_of(key): weight for key, weight in weights.items()}

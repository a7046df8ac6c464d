"""The model that all servers of a run serve: the embedded one, or a GGUF file."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from softbatch.scheduler.model.source import EMBEDDED_ALIAS, _embedded_gguf, resolve

# What the embedded model's soft prompts were made from.
_OF_CONTEXTS = 32_000


@dataclass(frozen=True)
class BenchedModel:
    """`name` is what every server answers to; `argument` is what softbatch is given."""

    name: str
    argument: str
    gguf: Path

    @classmethod
    def embedded(cls) -> BenchedModel:
        return cls(EMBEDDED_ALIAS, EMBEDDED_ALIAS, _embedded_gguf())

    @classmethod
    def of_file(cls, text: str) -> BenchedModel:
        """Raises ArgumentTypeError where there is no such file."""
        file = Path(text).expanduser().resolve()
        if file.suffix != ".gguf" or not file.is_file():
            raise ArgumentTypeError(f"{text} is no GGUF file")
        return cls(file.stem, str(file), file)

    @property
    def is_embedded(self) -> bool:
        return self.argument == EMBEDDED_ALIAS

    @cached_property
    def vocab_size(self) -> int:
        """Prompts are drawn from the tokens below it."""
        if self.is_embedded:
            return _OF_CONTEXTS
        config = json.loads((self.directory / "config.json").read_bytes())
        return int(config.get("text_config", config)["vocab_size"])

    @property
    def directory(self) -> Path:
        """The same weights as transformers reads them: what softbatch computes with, and what vLLM is given."""
        return Path(resolve(self.argument).path)

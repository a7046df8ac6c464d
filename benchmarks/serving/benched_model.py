"""The model that all servers of a run serve: the embedded one, or a GGUF file."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

from softbatch.scheduler.model.source import EMBEDDED_ALIAS, _embedded_gguf, resolve


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

    @property
    def directory(self) -> Path:
        """The same weights as transformers reads them: what softbatch computes with, and what vLLM is given."""
        return Path(resolve(self.argument).path)

"""One example of the training data, and the JSON Lines files that examples are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softbatch.prompt_store.atomic_files import replace_file

Generate = Callable[[list[list[int]], int], list[list[int]]]

MAX_TEXT = 20_000
MAX_EXAMPLES = 100_000
PLACES = 16
MAX_ACCEPTED = 64
_FIELDS = {"input", "output", "accept", "kind", "position", "source", "cut", "passage"}


class DataError(ValueError):
    """A questions file that cannot be used; the message names the line."""


@dataclass(frozen=True)
class Example:
    """One question z and, once known, its gold answer ŷ. `position` in [0, 1) is the place in the context
    that the question is about; `source` is user, template or model; `cut` says that ŷ was cut at the token
    limit. An answer that contains one of the texts in `accept` is right; a question of the user's that says so is for
    measuring, and no training sees it. `passage` is the part of the context with the answer, which the full-context
    model is shown once more before the question."""

    input: str
    output: str | None = None
    kind: str = "user"
    position: float = 0.0
    source: str = "user"
    cut: bool = False
    accept: tuple[str, ...] = ()
    passage: str = ""

    @property
    def asked(self) -> str:
        """The user's turn as the full-context model reads it."""
        return f"{self.passage}\n\n{self.input}" if self.passage else self.input

    @property
    def place(self) -> int:
        return min(PLACES - 1, int(self.position * PLACES))


def save_jsonl(examples: Iterable[Example], path: Path) -> None:
    """One JSON object a line; read back by `load_jsonl`, and meant to be edited."""
    lines = []
    for example in examples:
        record: dict[str, Any] = {"input": example.input}
        if example.output is not None:
            record["output"] = example.output
        if example.accept:
            record["accept"] = list(example.accept)
        record |= {"kind": example.kind, "position": round(example.position, 4), "source": example.source}
        if example.cut:
            record["cut"] = True
        if example.passage:
            record["passage"] = example.passage
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    replace_file(path, lambda target: target.write_text("".join(lines), encoding="utf-8"))


def load_jsonl(path: Path) -> list[Example]:
    """Read {"input", "output"?, "accept"?} lines; kind, position and source are kept where they stand. Raises
    DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path.name}: not a UTF-8 text file") from None
    examples = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            examples.append(_parse(line, f"{path.name}, line {number}"))
        if len(examples) > MAX_EXAMPLES:
            raise DataError(f"{path.name}: more than {MAX_EXAMPLES} questions")
    if not examples:
        raise DataError(f"{path.name}: there are no questions in it")
    return examples


def _parse(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f'{where}: expected an object such as {{"input": "…"}}')
    if unknown := set(record) - _FIELDS:
        raise DataError(f"{where}: unknown field {sorted(unknown)[0]!r}; known are {', '.join(sorted(_FIELDS))}")
    for name in ("input", "output", "kind", "source", "passage"):
        value = record.get(name)
        if name == "input" or value is not None:
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{where}: {name} must be a text that is not empty")
            if len(value) > MAX_TEXT:
                raise DataError(f"{where}: {name} is longer than {MAX_TEXT} characters")
    position = record.get("position", 0.0)
    if isinstance(position, bool) or not isinstance(position, int | float) or not 0 <= position <= 1:
        raise DataError(f"{where}: position must be a number from 0 to 1")
    if not isinstance(record.get("cut", False), bool):
        raise DataError(f"{where}: cut must be true or false")
    return Example(
        record["input"],
        record.get("output"),
        record.get("kind") or "user",
        float(position),
        record.get("source") or "user",
        record.get("cut", False),
        _accepted(record.get("accept"), where),
        record.get("passage") or "",
    )


def _accepted(value: Any, where: str) -> tuple[str, ...]:
    """One text, or a list of them."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    good = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    if not good or (value is not None and not texts):
        raise DataError(
            f'{where}: accept must be a text, or a list of texts, that are not empty, such as ["20 minutes"]'
        )
    if len(texts) > MAX_ACCEPTED or any(len(text) > MAX_TEXT for text in texts):
        raise DataError(f"{where}: accept may have {MAX_ACCEPTED} texts of {MAX_TEXT} characters")
    return tuple(texts)

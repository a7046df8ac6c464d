"""Settings as command line flags: one flag a field, so that a setting is described in one place."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from softbatch.server.settings import Settings


class UsageError(Exception):
    """A wrong flag or environment variable; the message is one line that says what would be right."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A `--kebab-case` flag for every field of Settings; absent flags are left to environment and default."""
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, (), False) else f" (default: {field.default})"
        kind: dict[str, Any] = {"action": "store", "metavar": _metavar(field)}
        if field.annotation is bool:
            kind = {"action": "store_true"}
        elif field.default == ():
            kind["action"] = "append"
        parser.add_argument(
            _flag(name),
            dest=name,
            default=argparse.SUPPRESS,
            help=f"{field.description}{default} [SOFTBATCH_{name.upper()}]".replace("%", "%%"),
            **kind,
        )


def settings_from(options: argparse.Namespace) -> Settings:
    """The settings that flags, environment and defaults make. Raises UsageError."""
    given = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise UsageError("; ".join(_problem(details) for details in error.errors())) from error


def _problem(details: Any) -> str:
    reason = details["msg"].removeprefix("Value error, ").lower()
    if not details["loc"]:
        return str(details["msg"].removeprefix("Value error, "))
    name = str(details["loc"][0])
    value = repr(details["input"])
    shown = value if len(value) <= 60 else value[:60] + "…"
    return f"{_flag(name)} (or SOFTBATCH_{name.upper()}): {reason}, not {shown}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(field: FieldInfo) -> str:
    choices = getattr(field.annotation, "__args__", None)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "{" + ",".join(choices) + "}"
    kinds = {int: "N", float: "X", str: "TEXT"}
    return kinds.get(field.annotation, "N" if "int" in str(field.annotation) else "VALUE")  # type: ignore[arg-type]

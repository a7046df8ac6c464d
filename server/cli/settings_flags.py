"""Settings as command line flags: one flag a field, so that a setting is described in one place."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from softbatch.server.settings import Settings

logger = logging.getLogger(__name__)
# Kubernetes tells containers in this way about a service that is named softbatch.
_OF_KUBERNETES = re.compile(r"SOFTBATCH_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


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


def settings_from(options: argparse.Namespace, *, warn: bool = True) -> Settings:
    """The settings that flags, environment and defaults make. Raises UsageError."""
    if warn:
        warn_of_unknown_variables()
    given = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise UsageError("; ".join(_problem(details) for details in error.errors())) from error


def warn_of_unknown_variables() -> None:
    """Name each variable that looks like a setting and is none: it has no effect, which somebody might not notice."""
    known = {name.upper() for name in Settings.model_fields} | {"API_KEYS"}
    for name in sorted(os.environ):
        prefix, _, setting = name.upper().partition("_")
        if prefix != "SOFTBATCH" or setting in known or _OF_KUBERNETES.fullmatch(name):
            continue
        close = difflib.get_close_matches(setting, sorted(known), n=1)
        advice = f"did you mean SOFTBATCH_{close[0]}?" if close else "softbatch serve --help lists those that are"
        logger.warning("the environment variable %s is no setting and has no effect; %s", name, advice)


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

"""The settings of `serve` that the offline commands share: the same flags, defaults and environment variables."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from softbatch.server.cli.settings_flags import UsageError
from softbatch.server.settings import Settings, absolute_model, absolute_path

if TYPE_CHECKING:
    from softbatch.server.compressions.request import ModelChoice

_METAVARS = {
    "model": "TEXT",
    "served_model_name": "TEXT",
    "chat_template": "FILE",
    "dtype": "{auto,float32,bfloat16,float16}",
    "device": "{auto,cpu,cuda}",
    "prompt_store": "PLACE",
    "max_prompt_mib": "N",
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model is loaded, how, and where soft prompts lie."""
    group = parser.add_argument_group("model and store")
    for name, metavar in _METAVARS.items():
        field = Settings.model_fields[name]
        default = f" (default: {field.default})" if field.default is not None else ""
        group.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=f"{field.description}{default} [SOFTBATCH_{name.upper()}]",
        )


def add_server_flags(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--server, and the key it may want."""
    parser.add_argument("--server", metavar="URL", help=purpose)
    parser.add_argument(
        "--api-key",
        action="append",
        default=argparse.SUPPRESS,
        metavar="KEY",
        help="the server's API key [SOFTBATCH_API_KEY]",
    )


def check_report(directory: Path | None) -> None:
    """Raises UsageError when a report cannot be written there."""
    if directory is None:
        return
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"--report {directory}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--report {directory}: no permission to write in {existing}")


def choice_of(settings: Settings) -> ModelChoice:
    """The model to load."""
    from softbatch.server.compressions.request import ModelChoice

    return ModelChoice(
        absolute_model(settings.model),
        settings.served_model_name,
        settings.dtype,
        settings.device,
        absolute_path(settings.chat_template),
    )

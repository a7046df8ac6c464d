"""What log lines look like, the same in every process of a server."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any

LEVEL_VARIABLE = "SOFTBATCH_LOG_LEVEL"
FORMAT_VARIABLE = "SOFTBATCH_LOG_FORMAT"


def configure_logging(process: str = "") -> None:
    """Log to standard error as the environment says, which child processes inherit. `process` names one of those."""
    handler = logging.StreamHandler()
    is_json = os.environ.get(FORMAT_VARIABLE) == "json"
    handler.setFormatter(JsonLines(process) if is_json else TextLines(process))
    level = os.environ.get(LEVEL_VARIABLE, "info").upper()
    logging.basicConfig(level=level, handlers=[handler])


class TextLines(logging.Formatter):
    """For people: the message, then the fields as `name=value`."""

    def __init__(self, process: str = "") -> None:
        prefix = f"{process}: " if process else ""
        super().__init__(f"%(asctime)s %(levelname)s {prefix}%(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


class JsonLines(logging.Formatter):
    """For programs: one JSON object a line, with the fields beside the message and a traceback inside of it."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = process or "server"

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(_fields(record) | line, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a logger gave as `extra={"fields": {…}}`."""
    found = getattr(record, "fields", {})
    return found if isinstance(found, dict) else {}

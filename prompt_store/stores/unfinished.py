"""Files that are on their way into a store's directory: known by their owner, and removed once that is dead."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import socket
import time
from pathlib import Path

# A dot at the start: no prompt name begins with one, so a temporary file is never listed.
_TEMP = re.compile(r"\.add-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]{1,7})-[0-9a-f]{16}")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_STALE_SECONDS = 3600


def new_unfinished(root: Path) -> Path:
    """Of this process."""
    return root / f".add-{_HOST}-{os.getpid()}-{secrets.token_hex(8)}"


def remove_unfinished(root: Path) -> None:
    """What the dead have left, and what is so old that its owner on another host must be."""
    for path in root.iterdir():
        owner = _TEMP.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if owner and (_is_dead(owner) or time.time() - path.stat().st_mtime > _STALE_SECONDS):
                path.unlink()


def _is_dead(owner: re.Match[str]) -> bool:
    if owner["host"] != _HOST:
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False

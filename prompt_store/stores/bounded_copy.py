"""Copies of files that may grow while they are read."""

from __future__ import annotations

import errno
import hashlib
import os
from typing import BinaryIO

from softbatch.prompt_store.manifest import SoftPromptError

NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP}  # where a copy does instead
CHUNK = 1 << 20


def copy_bounded(source: BinaryIO, target: BinaryIO, max_bytes: int) -> str:
    """Returns the SHA-256 of what is then on disk. The source may grow meanwhile: the bound is kept here."""
    digest = hashlib.sha256()
    num_bytes = 0
    while chunk := source.read(CHUNK):
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise SoftPromptError(
                f"the file has more than the allowed {max_bytes} bytes", param="file", code="too_large"
            )
        digest.update(chunk)
        target.write(chunk)
    target.flush()
    os.fsync(target.fileno())
    return digest.hexdigest()

"""Replies that are files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import BinaryIO

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send


class OpenFile(FileResponse):
    """Sends a file that is open already: its name may be given away meanwhile. Owns it."""

    def __init__(
        self, file: BinaryIO, filename: str, media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(
            f"/dev/fd/{file.fileno()}",
            stat_result=os.fstat(file.fileno()),
            media_type=media_type,
            filename=filename,
            headers=headers,
        )
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)

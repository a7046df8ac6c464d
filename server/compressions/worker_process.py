"""The server's side of a compression worker: starts it, hears what it says, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

import softbatch
from softbatch.server.compressions.worker_messages import (
    DoneMessage,
    FailedMessage,
    PreviewMessage,
    ProgressMessage,
    WorkerMessage,
)

PROJECT = Path(softbatch.__file__).resolve().parents[1]  # where `-m softbatch…` finds the code
MAX_LINE = 1 << 20


class WorkerProcess:
    """One process for one job's directory. It ends itself when this process is gone."""

    def __init__(
        self, directory: Path, on_progress: Callable[[ProgressMessage], None], on_preview: Callable[[], None]
    ) -> None:
        self._directory = directory
        self._on_progress, self._on_preview = on_progress, on_preview
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False

    async def run(self) -> DoneMessage | FailedMessage:
        """Its result, made up where it died without one; the process is gone when this returns or raises."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "softbatch.server.compressions.worker",
            str(self._directory),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE,
            cwd=PROJECT,
        )
        self._process = process
        if self._killed:
            self.kill()
        assert process.stdout is not None
        decoder = msgspec.json.Decoder(WorkerMessage)
        result: DoneMessage | FailedMessage | None = None
        try:
            async for line in process.stdout:
                message = decoder.decode(line)
                if isinstance(message, ProgressMessage):
                    self._on_progress(message)
                elif isinstance(message, PreviewMessage):
                    self._on_preview()
                else:
                    result = message
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if result is not None:
            return result
        reason = "it was killed, perhaps for lack of memory" if status < 0 else f"it ended with status {status}"
        return FailedMessage("worker_died", f"the compression's process did not finish: {reason}")

    def kill(self) -> None:
        """End it on the spot; what it has done so far stays in its directory."""
        self._killed = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

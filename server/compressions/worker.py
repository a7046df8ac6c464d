"""`python -m softbatch.server.compressions.worker DIRECTORY`: the compression that DIRECTORY/request.json asks for.

It runs at the lowest priority, so that serving beside it keeps its speed. It reports on standard output; standard input
is its lifeline.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from softbatch.scheduler.engine.logs import configure_logging
from softbatch.scheduler.lasting_imports import importing_for_good
from softbatch.server.compressions.request import CompressionRequest, InputError
from softbatch.server.compressions.worker_messages import (
    DoneMessage,
    FailedMessage,
    PreviewMessage,
    ProgressMessage,
    WorkerMessage,
)

logger = logging.getLogger(__name__)
NICENESS = 19
SECONDS_BETWEEN_REPORTS = 0.5


def main() -> int:
    # Ctrl-C and service managers signal the whole group; the server decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _give_way()
    output = _take_output()
    _exit_with_server()
    configure_logging("compression")
    directory = Path(sys.argv[1])
    try:
        message = _run(directory, WorkerReporter(output))
    except InputError as error:
        message = FailedMessage(error.code, str(error), error.param)
    except Exception as error:
        logger.exception("the compression in %s failed", directory.name)
        message = _failure(error)
    _send(output, message)
    return 0


def _give_way() -> None:
    """Where the system has an idle class, a serving thread that wakes up takes the processor from this process at once;
    at low priority alone it waits for the end of a time slice, in every layer of every step."""
    os.nice(NICENESS)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class WorkerReporter:
    """Sends a phase's beginning and end at once, what lies between now and then."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._phase = ""
        self._sent = 0.0

    def __call__(self, progress: ProgressMessage) -> None:
        now = time.monotonic()
        is_edge = progress.phase != self._phase or progress.done >= progress.total
        if is_edge or now - self._sent >= SECONDS_BETWEEN_REPORTS:
            self._phase, self._sent = progress.phase, now
            _send(self._output, progress)

    def tell_of_preview(self) -> None:
        _send(self._output, PreviewMessage())


def _run(directory: Path, report: WorkerReporter) -> WorkerMessage:
    report(ProgressMessage("loading", 0, 1))
    with importing_for_good("torch"):
        import torch

        from softbatch.prompt_store.compression.progress import Progress
        from softbatch.server.compressions.prepare import ModelFiles, PreparedRun
        from softbatch.server.compressions.result import summary
        from softbatch.server.compressions.run import run_compression
        from softbatch.server.compressions.run_directory import locked

    # One processor stays free for serving.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) - 1)))
    request = msgspec.json.decode((directory / "request.json").read_bytes(), type=CompressionRequest)

    def on_progress(progress: Progress) -> None:
        report(ProgressMessage(**vars(progress)))

    # A worker of a server that was killed may still be on its way out.
    with locked(directory, wait=True):
        prepared = PreparedRun.of(request, ModelFiles.open(request.choice))
        finished = run_compression(
            prepared,
            directory,
            True,
            on_progress,
            lambda: False,
            on_preview=lambda preview: report.tell_of_preview(),
        )
    return DoneMessage(summary(finished.report))


def _failure(error: Exception) -> FailedMessage:
    """What is said of an error: its own words where they are meant for the user."""
    from softbatch.scheduler.model.source import ModelError

    if isinstance(error, ValueError | ModelError | FloatingPointError):
        return FailedMessage("compression_failed", str(error)[:1000])
    if isinstance(error, OSError):
        return FailedMessage("disk_error", f"the server cannot write its files: {error.strerror}")
    return FailedMessage("internal_error", "internal error; see the server's log")


def _take_output() -> BinaryIO:
    """Standard output for our messages alone: whatever else is printed goes to standard error."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return output


def _send(output: BinaryIO, message: WorkerMessage) -> None:
    output.write(msgspec.json.encode(message) + b"\n")
    output.flush()


def _exit_with_server() -> None:
    """The server holds the other end of our standard input: when it is gone, so are we."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()


if __name__ == "__main__":
    sys.exit(main())

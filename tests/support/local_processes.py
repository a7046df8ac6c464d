"""Other people's servers as processes that end with a test: ports for them, and whether they listen."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """All different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def running_processes(
    commands: Sequence[Sequence[str]], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[Sequence[subprocess.Popen[bytes]]]:
    """In the order given, and ended in the other."""
    started: list[subprocess.Popen[bytes]] = []
    with log.open("ab") as output:
        try:
            for command in commands:
                started.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env))
            yield started
        finally:
            for process in reversed(started):
                process.terminate()
            for process in reversed(started):
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

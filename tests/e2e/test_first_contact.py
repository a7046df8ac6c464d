"""What is answered at once: help, versions, mistakes and listings load neither torch nor a web framework."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from softbatch.server.cli.main import main
from tests.support.servers import PROJECT, environment

SLOW = ("torch", "transformers", "fastapi", "starlette", "uvicorn", "rich")
COMMANDS = {
    "serve --help": 0,
    "serve --modle x": 2,
    "serve --max-batch-size 0": 2,
    "compress --help": 0,
    "compress": 2,
    "evaluate --help": 0,
    "score --input x": 2,
    "bench --rate -1": 2,
    "prompts lst": 2,
    "prompts list": 0,
    "prompts show manual": 0,
    "prompts show nobody": 2,
    "prompts remove nobody": 2,
    "chat --help": 0,
    "top --interval 0": 2,
    "doctor --help": 0,
}
PROGRAM = """
import json, sys
from softbatch.server.cli.main import main

results = {}
for command in json.loads(sys.argv[1]):
    try:
        status = main(command.split())
    except SystemExit as exit:
        status = exit.code
    results[command] = [status, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]
print()
print(json.dumps(results))
"""


def outcomes(store: Path, commands: Iterable[str], modules: Iterable[str]) -> dict[str, list[object]]:
    """Of each command, run in a process of their own: the exit status, and which of `modules` are loaded behind it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(commands)), json.dumps(list(modules))],
        cwd=PROJECT,
        env=environment(SOFTBATCH_PROMPT_STORE=str(store)),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[object]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_nothing_slow_is_imported(tmp_path: Path) -> None:
    (tmp_path / "manual.safetensors").write_bytes((PROJECT / "examples/manual/manual.safetensors").read_bytes())
    assert outcomes(tmp_path, COMMANDS, SLOW) == {command: [status, []] for command, status in COMMANDS.items()}


def test_help_and_version_import_not_even_the_settings(tmp_path: Path) -> None:
    commands = {"--version": 0, "--help": 0, "dance": 2}
    found = outcomes(tmp_path, commands, (*SLOW, "pydantic", "msgspec"))
    assert found == {command: [status, []] for command, status in commands.items()}


@pytest.mark.usefixtures("no_settings")
class TestMisspeltVariables:
    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("SOFTBATCH_MAX_BATCHSIZE", "SOFTBATCH_MAX_BATCH_SIZE"),
            ("SOFTBATCH_API_KYE", "SOFTBATCH_API_KEY"),
            ("SOFTBATCH_PROMPTSTORE", "SOFTBATCH_PROMPT_STORE"),
            ("SOFTBATCH_XYZZY", "softbatch serve --help"),
        ],
    )
    @pytest.mark.parametrize("command", [["serve"], ["prompts", "list"]], ids=["serve", "prompts"])
    def test_are_named(
        self,
        name: str,
        meant: str,
        command: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv(name, "1")
        monkeypatch.setenv("SOFTBATCH_PROMPT_STORE", str(tmp_path))
        if command[0] == "serve":  # refused for something else behind the warning
            monkeypatch.setattr("softbatch.server.cli.serve._listen", _refuse)
        main(command)
        [record] = caplog.records
        assert name in record.getMessage()
        assert meant in record.getMessage()

    @pytest.mark.parametrize(
        "name",
        [
            "SOFTBATCH_SERVICE_HOST",
            "SOFTBATCH_SERVICE_PORT",
            "SOFTBATCH_SERVICE_PORT_HTTP",
            "SOFTBATCH_PORT_8000_TCP",
            "SOFTBATCH_PORT_8000_TCP_ADDR",
            "SOFTBATCH_API_KEYS",
        ],
    )
    def test_those_of_kubernetes_are_not(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv(name, "10.0.0.1")
        monkeypatch.setenv("SOFTBATCH_PORT", "tcp://10.0.0.1:8000")
        monkeypatch.setenv("SOFTBATCH_PROMPT_STORE", str(tmp_path))
        assert main(["prompts", "list"]) == 0
        assert not caplog.records


def _refuse(_: object) -> None:
    from softbatch.server.requests.engine_supervisor import StartupError

    raise StartupError("the port is taken")

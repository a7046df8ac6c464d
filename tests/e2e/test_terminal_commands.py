"""`softbatch chat`, `top` and `doctor`, as somebody at a terminal uses them."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.server.cli.main import main
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.servers import PROJECT, Server, environment, wait_for


def talk(server: Server, lines: list[str], monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """The exit status of a chat whose lines come through a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", "--server", server.url, "--temperature", "0", "--max-tokens", "6", *flags])


def answer(server: Server, messages: list[dict[str, str]], **fields: Any) -> str:
    body = {"messages": messages, "temperature": 0, "max_tokens": 6} | fields
    reply = server.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


@pytest.fixture
def registered(tiny_server: Server, tiny_spec: ModelSpec, tmp_path: Path) -> Iterator[str]:
    prompt = make_soft_prompt("kv", 9, tiny_spec, replaces="system")
    assert tiny_server.upload("manual", save_prompt(prompt, tmp_path, "prompt")).status_code == 201
    yield "manual"
    tiny_server.http.delete("/v1/soft_prompts/manual")


@pytest.mark.usefixtures("no_settings")
class TestChat:
    def test_it_remembers_what_was_said(
        self, tiny_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = [{"role": "user", "content": "Is the sea"}]
        first = answer(tiny_server, asked)
        both = [*asked, {"role": "assistant", "content": first}, {"role": "user", "content": "deep?"}]
        expected = [first, answer(tiny_server, both), answer(tiny_server, asked)]
        assert talk(tiny_server, ["Is the sea", "deep?", "/new", "Is the sea"], monkeypatch) == 0
        assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)

    def test_soft_prompts_and_instructions(
        self, registered: str, tiny_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = [{"role": "user", "content": "How far?"}]
        through = answer(tiny_server, asked, model=registered)
        instructed = answer(tiny_server, [{"role": "system", "content": "Be brief."}, *asked])
        lines = ["How far?", "/retry", "/soft-prompt none", "/new", "/system Be brief.", "How far?", "/prompts"]
        assert talk(tiny_server, lines, monkeypatch, "--soft-prompt", registered) == 0
        assert capsys.readouterr().out == f"{through}\n{through}\n{instructed}\nmanual\n"

    @pytest.mark.parametrize(
        ("lines", "flags", "message"),
        [
            (["/dance"], [], "/dance is no command; /help lists them"),
            (["/temperature warm"], [], "give a number, such as 0.7"),
            (["/retry"], [], "nothing has been asked yet"),
            ([], ["--soft-prompt", "nobody"], "the server has no soft prompt 'nobody'"),
            (["word " * 600], [], "the server says: "),
        ],
    )
    def test_a_mistake_ends_what_comes_through_a_pipe(
        self,
        lines: list[str],
        flags: list[str],
        message: str,
        tiny_server: Server,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert talk(tiny_server, lines, monkeypatch, *flags) == 2
        assert message in capsys.readouterr().err

    def test_without_a_server(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["chat", "--server", "http://127.0.0.1:1"]) == 2
        assert "is the server running?" in capsys.readouterr().err

    def test_at_a_terminal(self, four_slots: Server) -> None:
        """A mistake is told and the talk goes on; Ctrl-C stops an answer; Ctrl-D leaves."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "softbatch", "chat", "--server", four_slots.url],
            cwd=PROJECT,
            env=environment(TERM="dumb"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # A terminal's; tests that run in the background of a shell would hand on that it is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(theirs)
        screen = ""

        def shows(text: str) -> bool:
            nonlocal screen
            if text not in screen and select.select([ours], [], [], 0.1)[0]:
                screen += os.read(ours, 65536).decode(errors="replace")
            return text in screen

        try:
            wait_for(lambda: shows("Ctrl-D leaves"), "no greeting")
            os.write(ours, b"/dance\n")
            wait_for(lambda: shows("is no command"), "no message")
            os.write(ours, b"/max-tokens 5\nhello\n")
            wait_for(lambda: shows("5 written; the first after"), "no answer")
            os.write(ours, b"/max-tokens 15000\n/temperature 2\nhello again\n")
            wait_for(lambda: four_slots.metric("requests_running") == 1, "the request does not run")
            process.send_signal(signal.SIGINT)
            wait_for(lambda: shows("(stopped)"), "the answer goes on")
            four_slots.wait_empty()
            os.write(ours, b"\x04")
            assert process.wait(120) == 0
        finally:
            process.kill()
            os.close(ours)


@pytest.mark.usefixtures("no_settings")
def test_top_shows_what_runs(four_slots: Server, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"prompt": "Is the sea", "max_tokens": 15000, "stream": True, "ignore_eos": True}
    with four_slots.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert main(["top", "--server", four_slots.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "running 1 of 4" in shown
    assert "of 15000" in shown
    four_slots.wait_empty()


@pytest.mark.usefixtures("no_settings")
class TestDoctor:
    def test_looks_at_everything(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(["doctor", "--json", "--prompt-store", str(tmp_path)])
        findings = {finding["about"]: finding for finding in json.loads(capsys.readouterr().out)}
        assert {"processor", "threads", "memory", "GPU", "kernels", "prompt store", "cache"} <= findings.keys()
        assert all(finding["advice"] for finding in findings.values() if finding["state"] != "good")

    def test_a_store_that_cannot_be_written_is_fatal(
        self, tiny_flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").touch()
        assert main(["doctor", *tiny_flags[:2], "--prompt-store", str(tmp_path / "file" / "prompts")]) == 1
        assert "✗ prompt store" in capsys.readouterr().out

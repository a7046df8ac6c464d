"""`softbatch bench` against a real server: what it counts, what it writes, what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softbatch.server.cli.main import main
from tests.support.servers import Server, check_refusal

VOCABULARY = ("--vocab-size", "256")


def bench(server: Server, file: Path, *flags: str) -> dict[str, Any]:
    assert main(["bench", "--url", server.url, *VOCABULARY, "--json", str(file), *flags]) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    return report


@pytest.mark.usefixtures("untouched_engine")
def test_a_closed_loop_sends_what_was_asked(tiny_server: Server, tmp_path: Path, capsys: Any) -> None:
    before = tiny_server.metrics("prompt_tokens_total", "generation_tokens_total")
    flags = ("--workload", "short", "--concurrency", "3", "--requests", "7", "--output-tokens", "9")
    report = bench(tiny_server, tmp_path / "report.json", *flags)
    after = tiny_server.metrics("prompt_tokens_total", "generation_tokens_total")
    assert (after[0] - before[0], after[1] - before[1]) == (7 * 32, 7 * 9)
    assert (report["finished"], report["failed"], report["cut_off"], report["wrong_length"]) == (7, 0, 0, 0)
    assert report["output_tokens_per_second"] * report["seconds"] == pytest.approx(63)
    assert report["requests_per_second"] * report["seconds"] == pytest.approx(7)
    assert report["model"] == tiny_server.http.get("/v1/models").json()["data"][0]["id"]
    first, whole = report["first_token_ms"], report["whole_ms"]
    assert 0 < first["p50"] <= first["p99"] <= whole["p99"] <= 1000 * report["seconds"]
    assert report["per_token_ms"]["p50"] < whole["p50"]
    assert report["client_cpu_seconds"] > 0
    assert report["server"]["cpu_seconds"] > 0
    assert report["server"]["peak_rss_bytes"] > 50 << 20
    shown = capsys.readouterr().out
    assert "output tokens/s" in shown
    assert "7 finished, 0 failed" in shown


@pytest.mark.usefixtures("untouched_engine")
def test_a_window_of_a_steady_load(tiny_server: Server, tmp_path: Path) -> None:
    flags = ("--concurrency", "4", "--duration", "1.5", "--output-tokens", "20")
    report = bench(tiny_server, tmp_path / "report.json", *flags)
    assert report["seconds"] > 1.4
    assert report["loaded_seconds"] > report["seconds"]
    assert report["finished"] > 4
    assert (report["failed"], report["wrong_length"]) == (0, 0)
    assert report["cut_off"] <= 4
    # Counted by events, and by the requests that ended: the same but for what the window's edges cut.
    by_requests = 20 * report["finished"] / report["seconds"]
    assert report["output_tokens_per_second"] == pytest.approx(by_requests, abs=2 * 4 * 20 / report["seconds"])


@pytest.mark.usefixtures("untouched_engine")
def test_poisson_arrivals(tiny_server: Server, tmp_path: Path) -> None:
    flags = ("--rate", "20", "--requests", "10", "--output-tokens", "4", "--slo-first-token", "60")
    report = bench(tiny_server, tmp_path / "report.json", *flags, "--slo-per-token", "60")
    assert report["finished"] == 10
    assert report["goodput"] == pytest.approx(report["requests_per_second"])


def test_errors_are_counted_and_shown(tiny_server: Server, tmp_path: Path, capsys: Any) -> None:
    """The server takes sequences of up to 512 tokens."""
    file = tmp_path / "report.json"
    command = ["bench", "--url", tiny_server.url, *VOCABULARY, "--json", str(file), "--input-tokens", "600"]
    assert main([*command, "--concurrency", "1", "--requests", "2"]) == 1
    report = json.loads(file.read_text())
    assert (report["finished"], report["failed"]) == (0, 2)
    (message,) = report["errors"]
    assert message.startswith("status 400")
    assert "exceed the longest sequence" in message
    assert "2 × status 400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--url", "127.0.0.1:8000", "--model", "m"), ("--url", "http://127.0.0.1:8000")),
        (("--url", "http://127.0.0.1:9", "--concurrency", "1"), ("--url", "--model")),
        (("--workload", "short", "--soft-prompt", "x"), ("--soft-prompt", "no contexts")),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags: tuple[str, ...], parts: tuple[str, ...], capsys: Any) -> None:
    status = main(["bench", *flags])
    check_refusal(status, capsys.readouterr().err, parts)

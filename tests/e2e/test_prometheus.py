"""Prometheus itself takes what stands in deploy/, and what a server under load tells."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.server.observability.metrics import Metrics
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.servers import Server, free_port, wait_for
from tests.test_deploy import DEPLOY, RULES, queries, rules

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="Prometheus is not installed (Debian, Ubuntu: apt-get install prometheus)",
)


@needs_prometheus
class TestPrometheus:
    def test_takes_the_rules(self) -> None:
        for command in (
            ["check", "rules", *map(str, RULES)],
            ["check", "config", str(RULES[0].parent / "prometheus.yml")],
        ):
            done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

    def test_finds_no_fault_with_the_metrics(self) -> None:
        """Under our own names; vLLM's have colons, which Prometheus keeps for recorded series."""
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=Metrics().render(), capture_output=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def test_vllms_names_say_the_same(self, four_slots: Server) -> None:
        server = four_slots
        server.wait_empty()
        text = server.http.get("/metrics").text
        name = server.http.get("/info").json()["model_id"]
        for metric in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
            assert f'vllm:{metric}{{model_name="{name}"}} 0.0' in text

    def test_every_panel_has_data_under_load(self, four_slots: Server, tiny_spec: ModelSpec, tmp_path: Path) -> None:
        server, port = four_slots, free_port()
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(path) for path in RULES]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = ["prometheus", "--config.file", str(tmp_path / "prometheus.yml")]
        command += ["--storage.tsdb.path", str(tmp_path / "data"), "--web.listen-address", f"127.0.0.1:{port}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        empty, numbers = queries(), itertools.count()
        started = time.monotonic()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as prometheus:
                while empty and time.monotonic() < started + 200:
                    number = next(numbers)
                    path = save_prompt(make_soft_prompt("kv", 4, tiny_spec, seed=number), tmp_path, f"prompt{number}")
                    assert server.upload(f"prompt{number}", path).status_code == 201
                    server.complete("Is the sea", 20, model=f"prompt{number}")
                    empty = [expression for expression in empty if not has_data(prometheus, expression)]
                assert not empty
                wait_for(lambda: recorded(prometheus), "the rules record nothing")
        finally:
            process.kill()
            process.wait()
            for number in range(next(numbers)):
                server.http.delete(f"/v1/soft_prompts/prompt{number}")


def has_data(prometheus: httpx.Client, expression: str) -> bool:
    """Numbers; no traffic divided by no traffic is none."""
    expression = expression.replace("$__rate_interval", "30s").replace("$instance", ".*")
    found = ask(prometheus, expression)
    return bool(found) and all(series["value"][1] not in ("NaN", "+Inf") for series in found)


def recorded(prometheus: httpx.Client) -> bool:
    return all(ask(prometheus, rule["record"]) for rule in rules() if "record" in rule)


def ask(prometheus: httpx.Client, expression: str) -> list[dict[str, Any]]:
    try:
        answer = prometheus.get("/api/v1/query", params={"query": expression})
    except httpx.TransportError:  # it is starting
        answer = None
    if answer is None or answer.status_code == 503:
        time.sleep(0.1)
        return []
    reply = answer.json()
    assert reply["status"] == "success", reply
    found: list[dict[str, Any]] = reply["data"]["result"]
    return found

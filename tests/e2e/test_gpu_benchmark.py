"""The GPU's benchmark runs to its end where there is no GPU, and writes every figure it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import PROJECT, free_port


@pytest.mark.long
def test_on_a_tiny_model(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.gpu.gpu", "--device", "cpu", "--tiny", "--port", str(free_port())]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    assert all(limit > 0 for limit in figures["limits"].values())
    tiny = figures["models"]["tiny"]
    assert [(d["batch"], d["context"]) for d in tiny["steps"]["decode"]] == [(1, 16), (3, 16), (1, 64), (3, 64)]
    for step in [*tiny["steps"]["decode"], tiny["steps"]["prefill"]]:
        assert step["fraction_of_limit"] * step["ms"] > 0
    assert tiny["generate_batch"]["tokens_per_second"] > 0
    assert tiny["times_generate_batch"] > 0
    assert tiny["serving"]["throughput_without_async_scheduling"]["tokens_per_second"] > 0
    for hot in tiny["serving"]["hot"]:
        for way in ("whole", "soft"):
            assert [(run["concurrency"], run["requests"] > 0) for run in hot[way]] == [(2, True), (4, True)]
        rates = [max(run["requests_per_second"] for run in hot[way]) for way in ("whole", "soft")]
        assert [best["requests_per_second"] for best in hot["best"]] == rates
        assert abs(hot["times_faster"] - rates[1] / rates[0]) < 1e-9
    alone = tiny["serving"]["hot"][-1]  # more contexts: each running request holds its own
    assert alone["times_less_kv"] > 0
    assert "| prefill of 128" in done.stdout

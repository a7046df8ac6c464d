"""The comparison of libraries runs softbatch's engine and transformers over the same prompts, step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def test_softbatch_and_transformers_choose_the_same_tokens(tiny_models: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.libraries.libraries",
        "--model",
        tiny_models["llama"],
        "--dtype",
        "float32",
    ]
    command += ["--libraries", "softbatch,transformers generate", "--rounds", "2", "--batches", "1,3", "--threads", "1"]
    command += ["--context", "20", "--steps", "5", "--prefill", "50", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    runs = json.loads(output.read_text())["runs"]
    shapes = [(1, 50, 1)] * 3 + [(1, 20, 6), (3, 20, 6)]
    for library in ("softbatch", "transformers generate"):
        own = [run for run in runs if run["library"] == library]
        assert [(run["batch"], run["context"], len(run["seconds"])) for run in own] == 2 * shapes
        assert min(second for run in own for second in run["seconds"]) > 0
    written = [
        {run["first"]: run["tokens"] for run in runs if run["library"] == name}
        for name in ("softbatch", "transformers generate")
    ]
    assert written[0] == written[1]
    assert len({tuple(row) for rows in written[0].values() for row in rows}) > 2  # not all the same
    assert "| transformers generate |" in done.stdout
    assert "| 100 % |" in done.stdout.splitlines()[-3]

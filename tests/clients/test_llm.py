"""Simon Willison's `llm`: a model of its own in `extra-openai-models.yaml`, then the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llm")


def test_command_with_a_system_prompt(url: str, tmp_path: Path) -> None:
    models = f"- model_id: softbatch\n  model_name: smollm2-135m\n  api_base: {url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    command = ["prompt", "-m", "softbatch", "-s", "You are a helpful assistant.", "What is the capital of France?"]
    result = subprocess.run(
        [sys.executable, "-m", "llm", *command, "-o", "temperature", "0", "-o", "max_tokens", "40", "--key", "unused"],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Paris" in result.stdout, result.stderr

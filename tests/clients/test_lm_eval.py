"""lm-evaluation-harness: over completions and over chats it finds what its own backend finds, both in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PYTHON = Path(sys.prefix, "lm-eval", "bin", "python")
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="lm-eval has an environment of its own: make clients")

OWN = "pretrained={directory},dtype=float32,device=cpu,batch_size=16"
COMPLETIONS = "model=smollm2-135m,base_url={url}/v1/completions,tokenizer={directory},num_concurrent=4,batch_size=4"
CHATS = "model=smollm2-135m,base_url={url}/v1/chat/completions,num_concurrent=4"
RUNS = {  # --model, --model_args, --tasks, --apply_chat_template
    "own": ("hf", OWN, ["choice", "continuation", "perplexity"], False),
    "completions": ("local-completions", COMPLETIONS, ["choice", "continuation", "perplexity"], False),
    "own with template": ("hf", OWN, ["choice", "continuation"], True),
    "completions with template": ("local-completions", COMPLETIONS, ["choice", "continuation"], True),
    "chats": ("local-chat-completions", CHATS, ["continuation"], True),
}
# Nats of a request, or a figure's part: far above other orders of float32 sums, far below bfloat16.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def found(
    serve: Callable[..., AbstractContextManager[str]], model_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Figures by run and task. Nothing is fetched: tasks, tokenizer and weights are files."""
    place = tmp_path_factory.mktemp("lm-eval")
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place), "OPENAI_API_KEY": "unused"}
    environment["OMP_NUM_THREADS"] = "1"  # two would wait for each other where others work, too
    with serve("--dtype", "float32") as url:
        filled = {
            name: (model, args.format(url=url, directory=model_directory), tasks, chat)
            for name, (model, args, tasks, chat) in RUNS.items()
        }
        (place / "runs.json").write_text(json.dumps(filled))
        command = [PYTHON, HERE / "run_lm_eval.py", place / "runs.json", place / "figures.json"]
        done = subprocess.run(
            command, cwd=HERE / "tasks", env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((place / "figures.json").read_text())


SERVED = [(run, task) for run, (model, _, tasks, _) in RUNS.items() if model != "hf" for task in tasks]


@pytest.mark.parametrize(("run", "task"), SERVED)
def test_finds_what_its_own_backend_finds(found: dict[str, Any], run: str, task: str) -> None:
    """Each log-likelihood, whether it is the most probable text, each text, and what is computed of them."""
    own, served = found["own with template" if RUNS[run][-1] else "own"][task], found[run][task]
    apart = [pair for pair in zip(own["answers"], served["answers"], strict=True) if not _is_near(*pair)]
    assert not apart
    numbers = {name: value for name, value in own["metrics"].items() if isinstance(value, float)}
    assert {name: served["metrics"][name] for name in numbers} == pytest.approx(numbers, rel=TOLERANCE)


def _is_near(one: Any, other: Any) -> bool:
    return abs(one - other) < TOLERANCE if isinstance(one, float) else one == other

"""`python run_lm_eval.py RUNS FIGURES`, from the folder of the tasks: what lm-eval finds, in its own environment."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

model = cache(lambda name, args: get_model(name).create_from_arg_string(args))


def figures(name: str, args: str, tasks: list[str], chat: bool) -> dict[str, Any]:
    """As `lm_eval --model NAME --model_args ARGS --tasks TASKS` finds them, `--apply_chat_template` with `chat`."""
    loaded = TaskManager(include_path=".", include_defaults=False).load(tasks)
    found = evaluate(model(name, args), loaded, bootstrap_iters=0, apply_chat_template=chat)
    return {task: {"metrics": found["results"][task], "answers": _answers(found["samples"][task])} for task in tasks}


def _answers(samples: list[dict[str, Any]]) -> list[Any]:
    """Texts, or log-likelihoods; behind one of an ending stands whether it is the most probable text."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    answers = [answer for sample in ordered for request in sample["resps"] for answer in request]
    return [part for answer in answers for part in (answer if isinstance(answer, tuple | list) else [answer])]


runs = json.loads(Path(sys.argv[1]).read_text())
Path(sys.argv[2]).write_text(json.dumps({name: figures(*run) for name, run in runs.items()}))

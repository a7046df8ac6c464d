"""From a context file to a registered soft prompt: what is opened is opened once, and checked in one place."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch

import softbatch
from softbatch.prompt_store.compression.compression_settings import BOUNDS, MAX_MINUTES
from softbatch.server.compressions import worker
from softbatch.server.compressions.prepare import ModelFiles, PreparedRun
from softbatch.server.compressions.request import CompressionRequest, InputError, ModelChoice, make_settings
from softbatch.server.http.errors import ApiError
from softbatch.server.routes.compressions import _checked
from softbatch.server.schemas.compressions import CompressionRequestBody
from softbatch.server.services import Services
from tests.server.compressions.conftest import CONTEXT, OPENED_ONCE, VIRTUAL_TOKENS
from tests.support.small_compressions import SMALL


def test_a_servers_job_opens_everything_once(
    counted: Counter[str], tiny_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = CompressionRequest(
        name="harbour",
        context=CONTEXT,
        settings=make_settings(**SMALL | {"virtual_tokens": VIRTUAL_TOKENS, "steps": 1}),
        questions=(),
        choice=ModelChoice(tiny_path, dtype="float32", device="cpu"),
        store=str(tmp_path / "store"),
        max_prompt_bytes=1 << 30,
    )
    (tmp_path / "request.json").write_bytes(msgspec.json.encode(request))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    worker._run(tmp_path, worker.WorkerReporter(io.BytesIO()))
    assert counted == OPENED_ONCE


def body(**fields: Any) -> CompressionRequestBody:
    return CompressionRequestBody.model_validate({"name": "harbour", "context": CONTEXT} | fields)


@pytest.mark.parametrize(
    "field", ["minutes", "steps", "virtual_tokens", "seed", "model_questions", "max_answer_tokens"]
)
def test_http_and_the_command_have_the_same_limits(field: str) -> None:
    low, high = (0.001, MAX_MINUTES) if field == "minutes" else BOUNDS[field]
    sent = {"max_answer_tokens": "answer_tokens"}.get(field, field)
    for value in (low, high):
        assert getattr(make_settings(**{field: value}), field) == getattr(body(**{sent: value}), sent) == value
    for value in (low - 1, high + 1):
        with pytest.raises(InputError, match=field):
            make_settings(**{field: value})
        with pytest.raises(ValueError, match=sent):
            body(**{sent: value})


def test_a_model_without_a_chat_template_is_refused_by_what_it_lacks(tiny_path: str, tmp_path: Path) -> None:
    choice = ModelChoice(tiny_path, dtype="float32", device="cpu")
    files = ModelFiles.open(choice)
    files.tokenizer.chat_template = None
    request = CompressionRequest(
        name="harbour",
        context=CONTEXT,
        settings=make_settings(),
        questions=(),
        choice=choice,
        store=str(tmp_path),
        max_prompt_bytes=1 << 30,
    )
    with pytest.raises(InputError, match=r"model: .* has no chat template .* --chat-template FILE") as refused:
        PreparedRun.checked(request, files, tmp_path, 1 << 30)
    assert refused.value.code == "no_chat_template"


def test_texts_are_checked_while_the_engine_starts(tmp_path: Path) -> None:
    starting = SimpleNamespace(
        settings=SimpleNamespace(model="m", prompt_store=tmp_path, max_prompt_mib=8),
        model_name="m",
        store=softbatch.PromptStore(tmp_path, 8 << 20),
        supervisor=SimpleNamespace(info=None),
    )
    services = cast(Services, starting)
    for bad in ({"context": " \n"}, {"context": "a\0b"}, {"questions": [{"input": " "}]}, {"name": "m"}):
        with pytest.raises(InputError):
            _checked(services, body(**bad))
    with pytest.raises(ApiError) as refused:
        _checked(services, body())
    assert refused.value.status == 503

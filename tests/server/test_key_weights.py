"""Shares of API keys: read at the start, refused without telling a key, and sent with each request."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from softbatch.scheduler.protocol import SamplingParams
from softbatch.server.key_weights import owner_of
from softbatch.server.observability.request_record import RequestRecord, begin
from softbatch.server.requests.admission import Admission, AdmissionLimits
from softbatch.server.settings import Settings
from tests.support.in_process_engine import InProcessEngine

SECRET = "sk-secret-of-a"


def settings_with(tmp_path: Path, content: str, encoding: str = "utf-8") -> Settings:
    path = tmp_path / "weights.json"
    path.write_text(content, encoding=encoding)
    return Settings(api_key=(SECRET, "b"), admin_key=("c",), key_weights=path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "JSON object"),
        ("[3]", "JSON object"),
        (f'{{"{SECRET}": "3"}}', "JSON object"),
        (f'{{"{SECRET}": 0}}', "weight 1 is 0"),
        (f'{{"b": 1, "{SECRET}": -1}}', "weight 2 is -1"),
        ('{"b": 1e9}', "up to 1000"),
        (f'{{"{SECRET}": 2, "sk-secret-of-d": 2}}', "key 2 is none of --api-key"),
    ],
)
def test_a_wrong_file_is_refused_and_no_key_is_told(tmp_path: Path, content: str, part: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings_with(tmp_path, content)
    message = caught.value.errors()[0]["msg"]
    assert "--key-weights" in message
    assert part in message
    assert "secret" not in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"--key-weights .*nothing: No such file"):
        Settings(api_key=(SECRET,), key_weights=tmp_path / "nothing")


def test_requests_carry_the_weight_of_their_key(tmp_path: Path) -> None:
    weights = settings_with(tmp_path, f'{{"{SECRET}": 3, "c": 0.5}}').weights_by_owner()
    contextvars.copy_context().run(ask_with_each_key, weights)


def ask_with_each_key(weights: Mapping[str, float]) -> None:
    engine = InProcessEngine()
    limits = AdmissionLimits(slots=4, max_waiting=10, weights=weights)
    admission = Admission(engine.client, None, engine.metrics, limits)  # type: ignore[arg-type]
    for key, weight in ((SECRET, 3), ("b", 1), ("c", 0.5)):
        begin(RequestRecord("", owner=owner_of(key)))
        with admission.reserve(1) as places:
            assert places.prepare([1], SamplingParams(max_tokens=1), None, route="").add.weight == weight


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert settings_with(tmp_path, '{"b": 2}', "utf-8-sig").key_weights == tmp_path / "weights.json"

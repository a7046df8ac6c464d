"""Errors from below name a field as the route's clients know it, in `param` and where the message begins."""

from __future__ import annotations

import pytest

from softbatch.server.request_failures import InvalidGrammar, InvalidPrompt
from softbatch.server.routes.common import fields_named

NAMES = {"tools.0.parameters": "tools.0.input_schema", "prompt": "messages"}


@pytest.mark.parametrize(
    ("message", "param", "shown"),
    [
        ("tools.0.parameters: too complex", "tools.0.parameters", "tools.0.input_schema: too complex"),
        ("tools.1.parameters: too complex", "tools.1.parameters", "tools.1.parameters: too complex"),
        ("tools: too large", "tools", "tools: too large"),
        ("the prompt is empty", "prompt", "the prompt is empty"),
    ],
)
def test_a_message_begins_with_the_name_that_the_client_knows(message: str, param: str, shown: str) -> None:
    with pytest.raises(InvalidGrammar) as failed, fields_named(NAMES):
        raise InvalidGrammar(message, param=param)
    assert (failed.value.message, failed.value.param) == (shown, NAMES.get(param, param))


def test_the_name_of_a_soft_prompt_may_have_come_as_the_models() -> None:
    with pytest.raises(InvalidPrompt) as failed, fields_named({}, model="harbour"):
        raise InvalidPrompt("soft_prompt: of no use", param="soft_prompt")
    assert (failed.value.message, failed.value.param) == ("model: of no use", "model")

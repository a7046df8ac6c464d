"""Instructor: answers as Pydantic models, by a JSON schema or a tool that the server holds the model to."""

import pytest
from pydantic import BaseModel

instructor = pytest.importorskip("instructor")
openai = pytest.importorskip("openai")


class Town(BaseModel):
    name: str
    country: str


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_answer_is_a_model(url: str, mode: str) -> None:
    plain = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    client = instructor.from_openai(plain, mode=instructor.Mode[mode])
    town = client.chat.completions.create(
        model="smollm2-135m",
        messages=[{"role": "user", "content": "What is the capital of France? Answer with name and country."}],
        response_model=Town,
        max_tokens=200,
        temperature=0,
    )
    assert isinstance(town, Town)

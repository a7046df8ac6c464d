"""Pydantic AI: an agent with instructions, and one whose output is a Pydantic model."""

import pytest
from pydantic import BaseModel

pydantic_ai = pytest.importorskip("pydantic_ai")
openai_models = pytest.importorskip("pydantic_ai.models.openai")
providers = pytest.importorskip("pydantic_ai.providers.openai")


class Town(BaseModel):
    name: str
    country: str


@pytest.fixture
def model(url: str) -> "openai_models.OpenAIChatModel":
    provider = providers.OpenAIProvider(base_url=f"{url}/v1", api_key="unused")
    return openai_models.OpenAIChatModel(
        "smollm2-135m", provider=provider, settings={"temperature": 0, "max_tokens": 200}
    )


def test_instructions(model: "openai_models.OpenAIChatModel") -> None:
    agent = pydantic_ai.Agent(model, instructions="You are a helpful assistant.")
    assert "Paris" in agent.run_sync("What is the capital of France?").output


@pytest.mark.parametrize("way", ["NativeOutput", "ToolOutput"])
def test_output_is_a_model(model: "openai_models.OpenAIChatModel", way: str) -> None:
    agent = pydantic_ai.Agent(model, output_type=getattr(pydantic_ai, way)(Town))
    assert isinstance(agent.run_sync("What is the capital of France?").output, Town)

"""OpenAI's agents SDK, over chat completions."""

import pytest

agents = pytest.importorskip("agents")
openai = pytest.importorskip("openai")


def test_agent_with_instructions(url: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused")
    model = agents.OpenAIChatCompletionsModel("smollm2-135m", openai_client=client)
    agent = agents.Agent("guide", instructions="You are a helpful assistant.", model=model)
    agent.model_settings = agents.ModelSettings(temperature=0, max_tokens=40)
    agents.set_tracing_disabled(True)
    assert "Paris" in agents.Runner.run_sync(agent, "What is the capital of France?").final_output

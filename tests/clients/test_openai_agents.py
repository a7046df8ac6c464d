"""OpenAI's agents SDK, over responses, which is its default, and over chat completions."""

import pytest

agents = pytest.importorskip("agents")
openai = pytest.importorskip("openai")


@pytest.mark.parametrize("api", ["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
def test_agent_with_instructions(url: str, api: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused")
    model = getattr(agents, api)("smollm2-135m", openai_client=client)
    agent = agents.Agent("guide", instructions="You are a helpful assistant.", model=model)
    agent.model_settings = agents.ModelSettings(temperature=0, max_tokens=40)
    agents.set_tracing_disabled(True)
    assert "Paris" in agents.Runner.run_sync(agent, "What is the capital of France?").final_output


def test_agent_with_a_tool(url: str) -> None:
    asked = []

    @agents.function_tool
    def look_up(country: str) -> str:
        """Looks up a country's capital."""
        asked.append(country)
        return "Paris"

    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused")
    model = agents.OpenAIChatCompletionsModel("smollm2-135m", openai_client=client)
    settings = agents.ModelSettings(temperature=0, max_tokens=100, tool_choice="required")
    agent = agents.Agent("guide", model=model, tools=[look_up], model_settings=settings)
    agent.tool_use_behavior = "stop_on_first_tool"
    assert agents.Runner.run_sync(agent, "What is the capital of France?").final_output == "Paris"
    assert len(asked) == 1

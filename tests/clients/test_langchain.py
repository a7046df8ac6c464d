"""LangChain, through `langchain-openai`."""

import pytest
from pydantic import BaseModel

langchain_openai = pytest.importorskip("langchain_openai")
prompts = pytest.importorskip("langchain_core.prompts")


class Town(BaseModel):
    name: str
    country: str


@pytest.fixture
def model(url: str) -> "langchain_openai.ChatOpenAI":
    return langchain_openai.ChatOpenAI(
        base_url=f"{url}/v1", api_key="unused", model="smollm2-135m", temperature=0, max_tokens=200
    )


def test_chain(model: "langchain_openai.ChatOpenAI") -> None:
    template = prompts.ChatPromptTemplate([("system", "You are a helpful assistant."), ("user", "{question}")])
    chain = template | model
    assert "Paris" in chain.invoke({"question": "What is the capital of France?"}).content
    assert "Paris" in "".join(part.content for part in chain.stream({"question": "What is the capital of France?"}))


def test_structured_output(model: "langchain_openai.ChatOpenAI") -> None:
    bound = model.with_structured_output(Town, method="json_schema")
    assert isinstance(bound.invoke("What is the capital of France?"), Town)


def test_tools(model: "langchain_openai.ChatOpenAI") -> None:
    bound = model.bind_tools([Town], tool_choice="any")
    (call,) = bound.invoke("What is the capital of France?").tool_calls
    assert Town(**call["args"])

"""Requests of the `openai` package, and what plain transformers answers to them."""

from __future__ import annotations

from typing import Any

from openai import OpenAI

from tests.support.models import Reference
from tests.support.servers import Server

PROMPT = "The harbour office opens at seven"
MESSAGES: Any = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": [{"type": "text", "text": "What is the sea?"}]},
]


def client_of(server: Server, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", max_retries=0, timeout=120, **{"api_key": "unused"} | options)


def greedy_text(reference: Reference, token_ids: list[int], max_tokens: int, prompt: Any = None) -> str:
    output = reference.generate(token_ids, max_tokens, prompt)
    return str(reference.tokenizer.decode(output, skip_special_tokens=True))


def chat_ids(reference: Reference) -> list[int]:
    turns = [MESSAGES[0], {"role": "user", "content": MESSAGES[1]["content"][0]["text"]}]
    text = reference.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids: list[int] = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids

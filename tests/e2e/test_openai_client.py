"""The official `openai` package against a real server: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from tests.support.models import Reference
from tests.support.openai_requests import MESSAGES, PROMPT, chat_ids, client_of, greedy_text
from tests.support.servers import Server

SOFT_PROMPT = "openai-manual"
# Tokens that take long enough for some to arrive before the last is made, however busy the machine.
LONG = 400


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> Iterator[OpenAI]:
    with client_of(tiny_server) as client:
        yield client


class TestCompletions:
    def test_text_and_shape(self, client: OpenAI, tiny_llama: Reference) -> None:
        reply = client.completions.create(model="tiny-llama", prompt=PROMPT, max_tokens=20, temperature=0)
        ids = tiny_llama.tokenizer(PROMPT)["input_ids"]
        (choice,) = reply.choices
        assert choice.text == greedy_text(tiny_llama, ids, 20)
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
        assert (reply.object, reply.model, reply.id[:5]) == ("text_completion", "tiny-llama", "cmpl-")
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 20)
        assert reply.usage.total_tokens == len(ids) + 20

    def test_lists_of_texts_and_of_token_ids(self, client: OpenAI, tiny_llama: Reference) -> None:
        texts = [PROMPT, "winter", "an old clock"]
        ids = [tiny_llama.tokenizer(text)["input_ids"] for text in texts]
        expected = [greedy_text(tiny_llama, each, 8) for each in ids]
        for prompt in (texts, ids):
            reply = client.completions.create(model="tiny-llama", prompt=prompt, max_tokens=8, temperature=0)
            assert [choice.text for choice in reply.choices] == expected
            assert [choice.index for choice in reply.choices] == [0, 1, 2]
        reply = client.completions.create(model="tiny-llama", prompt=ids[1], max_tokens=8, temperature=0, echo=True)
        assert reply.choices[0].text == texts[1] + expected[1]

    def test_stream(self, client: OpenAI, tiny_llama: Reference) -> None:
        stream = client.completions.create(
            model="tiny-llama",
            prompt=PROMPT,
            max_tokens=LONG,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = list(stream)
        ids = tiny_llama.tokenizer(PROMPT)["input_ids"]
        assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in [*chunks, last]}) == 1
        assert "".join(chunk.choices[0].text for chunk in chunks) == greedy_text(tiny_llama, ids, LONG)
        assert len(chunks) > 5, "a stream that comes in one piece is none"
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == []
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(ids), LONG)

    def test_several_choices_in_one_stream(self, client: OpenAI) -> None:
        ask: dict[str, Any] = {"model": "tiny-llama", "prompt": ["rain", "maps"], "max_tokens": 12, "n": 2, "seed": 3}
        whole = client.completions.create(**ask)
        texts = [""] * 4
        for chunk in client.completions.create(**ask, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [choice.text for choice in whole.choices]
        assert len(set(texts)) == 4

    def test_logprobs_are_those_of_the_model(self, client: OpenAI, tiny_llama: Reference) -> None:
        reply = client.completions.create(model="tiny-llama", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3)
        found = reply.choices[0].logprobs
        assert found is not None
        ids = tiny_llama.tokenizer(PROMPT)["input_ids"]
        output = tiny_llama.generate(ids, 6)
        with torch.inference_mode():
            logits = tiny_llama.model(torch.tensor([ids + output])).logits[0, len(ids) - 1 : -1]
        table = torch.log_softmax(logits, dim=-1)
        expected = [float(table[i, token]) for i, token in enumerate(output)]
        assert found.token_logprobs == pytest.approx(expected, abs=1e-3)
        assert found.tokens == [tiny_llama.tokenizer.decode([token]) for token in output]
        for row, top in zip(table, found.top_logprobs or [], strict=True):
            assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
        lengths = [len(token) for token in found.tokens]
        assert found.text_offset == [sum(lengths[:i]) for i in range(6)]

    def test_cached_tokens(self, client: OpenAI, tiny_llama: Reference) -> None:
        """Whole blocks of 16 tokens of a prompt that was computed before, but for the last token."""
        text = "A prompt that nobody else sends " * 9
        ids = tiny_llama.tokenizer(text)["input_ids"]
        ask: Any = {"model": "tiny-llama", "prompt": text, "max_tokens": 2, "n": 2}
        found = []
        for _ in range(2):
            usage = client.completions.create(**ask).usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            found.append(usage.prompt_tokens_details.cached_tokens)
        assert found == [0, (len(ids) - 1) // 16 * 16]


class TestChat:
    def test_text_and_shape(self, client: OpenAI, tiny_llama: Reference) -> None:
        reply = client.chat.completions.create(
            model="tiny-llama", messages=MESSAGES, max_completion_tokens=16, temperature=0
        )
        ids = chat_ids(tiny_llama)
        (choice,) = reply.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == greedy_text(tiny_llama, ids, 16)
        assert choice.finish_reason == "length"
        assert (reply.object, reply.id[:9]) == ("chat.completion", "chatcmpl-")
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 16)

    def test_stream(self, client: OpenAI, tiny_llama: Reference) -> None:
        stream = client.chat.completions.create(
            model="tiny-llama",
            messages=MESSAGES,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = list(stream)
        assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in [*chunks, last]}) == 1
        assert chunks[0].object == "chat.completion.chunk"
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert deltas[0].content == ""
        assert "".join(delta.content or "" for delta in deltas) == greedy_text(tiny_llama, chat_ids(tiny_llama), 16)
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == 16

    def test_helper_that_collects_a_stream(self, client: OpenAI, tiny_llama: Reference) -> None:
        text = greedy_text(tiny_llama, chat_ids(tiny_llama), 16)
        ask: dict[str, Any] = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
        with client.chat.completions.stream(**ask, stop=text[20:25]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert kinds[-1] == "content.done"
        assert final.choices[0].message.content == text[: text.index(text[20:25])]
        assert final.choices[0].finish_reason == "stop"

    def test_logprobs(self, client: OpenAI) -> None:
        ask: dict[str, Any] = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 5, "temperature": 0}
        reply = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
        found = reply.choices[0].logprobs
        assert found is not None
        assert found.content is not None
        assert len(found.content) == 5
        for token in found.content:
            assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
            assert token.token == token.top_logprobs[0].token
            assert len(token.top_logprobs) == 2
            assert sum(math.exp(top.logprob) for top in token.top_logprobs) < 1
            assert token.bytes == list(token.token.encode())
        streamed = [
            token
            for chunk in client.chat.completions.create(**ask, logprobs=True, top_logprobs=2, stream=True)
            for token in (chunk.choices[0].logprobs.content or [] if chunk.choices[0].logprobs else [])
        ]
        assert [token.token for token in streamed] == [token.token for token in found.content]

    def test_a_real_model_answers(self, smollm2_server: Server, smollm2: Reference) -> None:
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        with client_of(smollm2_server) as client:
            reply = client.chat.completions.create(
                model="smollm2-135m", messages=question, temperature=0, max_tokens=24, stop=["\n"]
            )
        assert "Paris" in (reply.choices[0].message.content or "")
        assert reply.choices[0].finish_reason == "stop"

    def test_usage_in_every_chunk(self, client: OpenAI) -> None:
        options: Any = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
        ask: Any = {"model": "tiny-llama", "max_tokens": 8, "stream": True, "stream_options": options}
        for stream in (
            client.chat.completions.create(messages=MESSAGES, **ask),
            client.completions.create(prompt=PROMPT, **ask),
        ):
            chunks = list(stream)
            counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
            assert len(counts) == len(chunks)
            assert counts == sorted(counts)
            assert counts[-1] == 8
            assert len({chunk.usage.prompt_tokens for chunk in chunks if chunk.usage is not None}) == 1


class TestSampling:
    ASK: Any = {"model": "tiny-llama", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.0}  # noqa: RUF012

    def test_n_choices_differ_and_a_seed_repeats_them(self, client: OpenAI) -> None:
        first = client.completions.create(**self.ASK, n=2, seed=7)
        again = client.completions.create(**self.ASK, n=2, seed=7)
        texts = [choice.text for choice in first.choices]
        assert [choice.index for choice in first.choices] == [0, 1]
        assert texts == [choice.text for choice in again.choices]
        assert texts[0] != texts[1]
        assert first.usage is not None
        assert first.usage.completion_tokens == 32
        # Choice i draws from seed + i, alone or beside others.
        assert client.completions.create(**self.ASK, seed=8).choices[0].text == texts[1]

    def test_without_a_seed_every_answer_differs(self, client: OpenAI) -> None:
        texts = {client.completions.create(**self.ASK).choices[0].text for _ in range(3)}
        assert len(texts) == 3

    @pytest.mark.parametrize("as_list", [False, True])
    def test_stop_string(self, client: OpenAI, as_list: bool) -> None:
        ask = self.ASK | {"temperature": 0}
        whole = client.completions.create(**ask).choices[0].text
        # Across the border of two tokens, so that it can only be found in the text.
        stop = whole[len(whole) // 2 - 3 : len(whole) // 2 + 3]
        stops: Any = ["never written here", stop] if as_list else stop
        reply = client.completions.create(**ask, stop=stops)
        assert reply.choices[0].text == whole[: whole.index(stop)]
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage is not None
        assert reply.usage.completion_tokens < 16
        streamed = list(client.completions.create(**ask, stop=stops, stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == whole[: whole.index(stop)]
        assert streamed[-1].choices[0].finish_reason == "stop"

    def test_fields_beyond_openai(self, client: OpenAI, tiny_llama: Reference) -> None:
        ids = tiny_llama.tokenizer(PROMPT)["input_ids"]
        output = tiny_llama.generate(ids, 16)
        stop_at = output[5]
        reply = client.completions.create(**self.ASK | {"temperature": 0}, extra_body={"stop_token_ids": [stop_at]})
        expected = output[: output.index(stop_at)]
        assert reply.choices[0].text == tiny_llama.tokenizer.decode(expected)
        assert reply.choices[0].finish_reason == "stop"
        assert reply.choices[0].model_dump()["stop_reason"] == stop_at
        stop_ids = {"stop_token_ids": [stop_at]}
        late = client.completions.create(**self.ASK | {"temperature": 0}, extra_body=stop_ids | {"min_tokens": 16})
        assert late.choices[0].finish_reason == "length"
        assert late.choices[0].text.startswith(reply.choices[0].text)
        assert client.completions.create(**self.ASK, top_p=0).choices[0].text == tiny_llama.tokenizer.decode(output)
        top = client.completions.create(**self.ASK, extra_body={"top_k": 1})
        assert top.choices[0].text == tiny_llama.tokenizer.decode(output), "top_k 1 is greedy"


class TestAsync:
    def test_many_at_once_and_a_stream(self, tiny_server: Server, tiny_llama: Reference) -> None:
        texts = [f"{PROMPT} {i}" for i in range(8)]

        async def ask() -> tuple[list[str], str]:
            options: Any = {"api_key": "unused", "max_retries": 0, "timeout": 120}
            async with AsyncOpenAI(base_url=f"{tiny_server.url}/v1", **options) as client:
                replies = await asyncio.gather(
                    *(
                        client.completions.create(model="tiny-llama", prompt=text, max_tokens=10, temperature=0)
                        for text in texts
                    )
                )
                stream = await client.chat.completions.create(
                    model="tiny-llama", messages=MESSAGES, max_tokens=10, temperature=0, stream=True
                )
                pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
                return [reply.choices[0].text for reply in replies], "".join(pieces)

        answers, streamed = asyncio.run(ask())
        for text, answer in zip(texts, answers, strict=True):
            assert answer == greedy_text(tiny_llama, tiny_llama.tokenizer(text)["input_ids"], 10)
        assert streamed == greedy_text(tiny_llama, chat_ids(tiny_llama), 10)

"""Fields that vLLM's and OpenAI's clients send beside the common ones, each with what it must change."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.models import Reference
from tests.support.openai_requests import MESSAGES, PROMPT, chat_ids, greedy_text
from tests.support.servers import Server, error_of, stream_json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENS = 6


def ask(server: Server, route: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    base = {"prompt": PROMPT} if route == COMPLETIONS else {"messages": MESSAGES}
    reply = server.post(route, {**base, "max_tokens": TOKENS, "temperature": 0, **fields})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def text_of(server: Server, route: str = COMPLETIONS, **fields: Any) -> str:
    (choice,) = ask(server, route, **fields)["choices"]
    text: str = choice["text"] if route == COMPLETIONS else choice["message"]["content"]
    return text


@pytest.fixture(scope="module")
def prompt_ids(tiny_llama: Reference) -> list[int]:
    ids: list[int] = tiny_llama.tokenizer(PROMPT)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def output(tiny_llama: Reference, prompt_ids: list[int]) -> list[int]:
    return tiny_llama.generate(prompt_ids, TOKENS)


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_logit_bias_forces_and_bans(tiny_server: Server, tiny_llama: Reference, route: str) -> None:
    forced = text_of(tiny_server, route, logit_bias={"337": 100})
    assert forced == tiny_llama.tokenizer.decode([337] * TOKENS)
    ids = tiny_llama.tokenizer(PROMPT)["input_ids"] if route == COMPLETIONS else chat_ids(tiny_llama)
    best = tiny_llama.generate(ids, 1)[0]
    fields = {"max_tokens": 1, "logit_bias": {str(best): -100}, "logprobs": 1 if route == COMPLETIONS else True}
    reply = ask(tiny_server, route, **fields, top_logprobs=1) if route == CHAT else ask(tiny_server, route, **fields)
    logprobs = reply["choices"][0]["logprobs"]
    if route == CHAT:
        (token,) = logprobs["content"]
        chosen, most_probable = token["token"], token["top_logprobs"][0]["token"]
    else:
        chosen = logprobs["tokens"][0]
        most_probable = max(logprobs["top_logprobs"][0], key=logprobs["top_logprobs"][0].__getitem__)
    assert chosen != most_probable == tiny_llama.tokenizer.decode([best]), "log-probabilities are told without it"


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_tokens_that_the_model_does_not_have_are_refused(tiny_server: Server, field: str) -> None:
    wrong = {"49152": 1} if field == "logit_bias" else [5, 49152]
    reply = tiny_server.post(COMPLETIONS, {"prompt": PROMPT, field: wrong})
    assert (reply.status_code, error_of(reply)["param"]) == (400, field)


def test_only_allowed_tokens_come(tiny_server: Server) -> None:
    reply = ask(tiny_server, allowed_token_ids=[300, 301], return_token_ids=True, temperature=1, max_tokens=20, seed=1)
    assert set(reply["choices"][0]["token_ids"]) == {300, 301}
    # The end of the text is none of them, so that it does not end before its length.
    assert reply["choices"][0]["finish_reason"] == "length"


def test_bad_words_do_not_come(tiny_server: Server, tiny_llama: Reference, output: list[int]) -> None:
    decode = tiny_llama.tokenizer.decode
    for count in (1, 2):
        word = decode(output[2 : 2 + count])
        if tiny_llama.tokenizer(word)["input_ids"] != output[2 : 2 + count]:
            continue
        reply = ask(tiny_server, bad_words=[word], return_token_ids=True)
        ids = reply["choices"][0]["token_ids"]
        assert ids[: 1 + count] == output[: 1 + count]
        assert ids[1 + count] != output[1 + count]
        assert word not in reply["choices"][0]["text"]


def test_a_stop_string_or_token_stays_in_the_text(
    tiny_server: Server, tiny_llama: Reference, output: list[int]
) -> None:
    decode = tiny_llama.tokenizer.decode
    kept = {"include_stop_str_in_output": True}
    assert text_of(tiny_server, stop_token_ids=[output[2]]) == decode(output[:2])
    assert text_of(tiny_server, stop_token_ids=[output[2]], **kept) == decode(output[:3])
    stop = decode(output)[5:8]
    assert text_of(tiny_server, stop=stop, **kept) == decode(output)[: decode(output).index(stop) + 3]


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_special_tokens_can_be_text(tiny_server: Server, tiny_llama: Reference, route: str) -> None:
    start, word = tiny_llama.tokenizer.convert_tokens_to_ids(["<|im_start|>", "sea"])
    fields: dict[str, Any] = {"allowed_token_ids": [start, word], "logit_bias": {str(start): 100}, "max_tokens": 2}
    assert text_of(tiny_server, route, **fields) == ""
    for spaces in (True, False):
        shown = text_of(tiny_server, route, **fields, skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert shown == "<|im_start|><|im_start|>"
    assert text_of(tiny_server, route, **fields, skip_special_tokens=False, stop="start|><") == "<|im_"
    end = tiny_llama.tokenizer.eos_token_id
    ended = {"logit_bias": {str(end): 100}, "skip_special_tokens": False}
    assert text_of(tiny_server, route, **ended) == ""
    shown = text_of(tiny_server, route, **ended, include_stop_str_in_output=True)
    assert shown == tiny_llama.tokenizer.decode([end])


def test_a_prompt_is_truncated_at_its_start(tiny_server: Server, tiny_llama: Reference, prompt_ids: list[int]) -> None:
    reply = ask(tiny_server, truncate_prompt_tokens=3, return_token_ids=True)
    assert reply["choices"][0]["prompt_token_ids"] == prompt_ids[-3:]
    assert reply["choices"][0]["text"] == greedy_text(tiny_llama, prompt_ids[-3:], TOKENS)
    chat = ask(tiny_server, CHAT, truncate_prompt_tokens=9, return_token_ids=True)
    assert chat["prompt_token_ids"] == chat_ids(tiny_llama)[-9:]
    long = ask(tiny_server, prompt="word " * 100_000, truncate_prompt_tokens=-1, return_token_ids=True)
    assert long["usage"]["prompt_tokens"] == 512 - TOKENS
    assert ask(tiny_server, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == len(prompt_ids)


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_token_ids_are_told_in_one_reply_and_in_streams(tiny_server: Server, tiny_llama: Reference, route: str) -> None:
    ids = tiny_llama.tokenizer(PROMPT)["input_ids"] if route == COMPLETIONS else chat_ids(tiny_llama)
    expected = tiny_llama.generate(ids, TOKENS)
    fields = {"return_token_ids": True, "n": 2}
    reply = ask(tiny_server, route, **fields)
    assert [choice["token_ids"] for choice in reply["choices"]] == [expected] * 2
    assert (reply if route == CHAT else reply["choices"][1])["prompt_token_ids"] == ids
    base = {"prompt": PROMPT} if route == COMPLETIONS else {"messages": MESSAGES}
    body = {**base, "max_tokens": TOKENS, "temperature": 0, "stream": True, **fields}
    events = stream_json(tiny_server, route, body)[:-1]
    for index in range(2):
        mine = [event for event in events if event["choices"][0]["index"] == index]
        first = mine[0] if route == CHAT else mine[0]["choices"][0]
        assert first["prompt_token_ids"] == ids
        assert [token for event in mine for token in event["choices"][0].get("token_ids", [])] == expected
        assert sum("prompt_token_ids" in str(event) for event in mine) == 1
    assert "token_ids" not in tiny_server.post(route, {**base, "max_tokens": 1}).text


def test_tokens_are_named_by_their_ids(tiny_server: Server, output: list[int]) -> None:
    names = [f"token_id:{token}" for token in output]
    reply = ask(tiny_server, logprobs=2, return_tokens_as_token_ids=True)
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == names
    assert all(name in top for name, top in zip(names, logprobs["top_logprobs"], strict=True))
    chat = ask(tiny_server, CHAT, logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    for token in chat["choices"][0]["logprobs"]["content"]:
        assert token["token"] == token["top_logprobs"][0]["token"]
        assert token["token"].startswith("token_id:")


def test_the_last_message_is_continued(tiny_server: Server, tiny_llama: Reference) -> None:
    begun = [MESSAGES[1], {"role": "assistant", "content": "The sea is <|im_end|> a "}]
    fields = {"messages": begun, "return_token_ids": True}
    tokenizer = tiny_llama.tokenizer
    whole = ask(tiny_server, CHAT, **fields, add_generation_prompt=False)["prompt_token_ids"]
    assert tokenizer.decode(whole).endswith("The sea is <|im_end|> a <|im_end|>\n")
    with_prompt = ask(tiny_server, CHAT, **fields)["prompt_token_ids"]
    assert with_prompt[: len(whole)] == whole
    assert tokenizer.decode(with_prompt[len(whole) :]) == "<|im_start|>assistant\n"
    # As vLLM, Mistral and Qwen ask for it.
    goes_on: dict[str, Any] = {"continue_final_message": True}
    marked = [{"messages": [begun[0], begun[1] | {name: True}]} for name in ("prefix", "partial")]
    for extra in (goes_on, goes_on | {"add_generation_prompt": False}, *marked):
        reply = ask(tiny_server, CHAT, **(fields | extra))
        ids = reply["prompt_token_ids"]
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nThe sea is <|im_end|> a ")
        assert ids.count(tokenizer.eos_token_id) == whole.count(tokenizer.eos_token_id) - 1
        assert reply["choices"][0]["message"]["content"] == greedy_text(tiny_llama, ids, TOKENS)


def test_best_of_tells_the_most_probable_first(tiny_server: Server) -> None:
    fields: dict[str, Any] = {"prompt": [PROMPT, "winter"], "temperature": 2, "seed": 3}
    made = ask(tiny_server, **fields, n=4, logprobs=0)["choices"]

    def likely(choice: dict[str, Any]) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return math.fsum(logprobs) / len(logprobs)

    reply = ask(tiny_server, **fields, n=2, best_of=4)
    best = [sorted(made[at : at + 4], key=likely, reverse=True)[:2] for at in (0, 4)]
    assert [choice["text"] for choice in reply["choices"]] == [one["text"] for two in best for one in two]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in reply["choices"])
    assert reply["usage"]["completion_tokens"] == 8 * TOKENS

"""`--async-scheduling on` as a user meets it: what transformers answers, for many clients, some of whom leave."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from tests.support.models import Reference, sample_texts
from tests.support.servers import Site


def test_many_clients_get_what_transformers_answers(async_site: Site, tiny_llama: Reference) -> None:
    server = async_site.server
    texts = sample_texts(10)

    def ask(index: int) -> str:
        body = {"prompt": texts[index], "max_tokens": 6 + index, "temperature": 0, "stream": index % 2 == 1}
        if index % 2 == 0:
            return str(server.post("/v1/completions", body).json()["choices"][0]["text"])
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: {")]
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines if json.loads(line)["choices"])

    def leave(index: int) -> None:
        body = {"prompt": texts[index], "max_tokens": 5000, "stream": True, "ignore_eos": True}
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            next(reply.iter_lines())

    with ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(leave, index) for index in range(3)]
        answers = list(pool.map(ask, range(len(texts))))
        for future in leaving:
            future.result()
    for index, text in enumerate(texts):
        ids = tiny_llama.tokenizer(text)["input_ids"]
        expected = tiny_llama.generate(ids, 6 + index)
        assert answers[index] == tiny_llama.tokenizer.decode(expected, skip_special_tokens=True), text
    server.wait_empty()

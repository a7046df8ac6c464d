"""`--kv-cache-dtype` as a user meets it: the embedded model and the shipped soft prompt, in a third of the memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import StartServer
from tests.support.servers import PROJECT

SHIPPED = PROJECT / "examples" / "manual" / "manual.safetensors"
QUESTION = "How far does the radio of the WS-4 reach?"
BYTES_PER_TOKEN = {"auto": 30 * 3 * 2 * 2 * 64, "int8": 30 * 3 * 2 * (34 + 36), "k6v4": 30 * 3 * 2 * (26 + 20)}


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "k6v4"])
def test_the_shipped_soft_prompt_answers_from_a_packed_cache(start_server: StartServer, kv_cache_dtype: str) -> None:
    server = start_server("--dtype", "bfloat16", "--kv-cache-gib", "0.05", "--kv-cache-dtype", kv_cache_dtype)
    info = server.http.get("/info").json()
    assert info["kv_cache_dtype"] == kv_cache_dtype
    assert info["kv_blocks"] == int(0.05 * 2**30) // (16 * BYTES_PER_TOKEN[kv_cache_dtype])
    assert server.metric("kv_cache_bytes") == info["kv_blocks"] * 16 * BYTES_PER_TOKEN[kv_cache_dtype]
    assert f"packed as {kv_cache_dtype}" in Path(server.log).read_text()

    assert server.upload("manual", SHIPPED).status_code == 201
    body = {"model": "manual", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}
    reply = server.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    assert "100 meters" in reply.json()["choices"][0]["message"]["content"]
    assert server.metric("soft_prompts_resident_bytes") == 64 * BYTES_PER_TOKEN[kv_cache_dtype]

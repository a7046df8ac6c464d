"""Real checkpoints over HTTP (make test-models): what a server says of a long text is what transformers computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.checkpoints import CHECKPOINTS, Checkpoint, fetch
from softbatch.scheduler.model.source import resolve
from tests.e2e.conftest import StartServer
from tests.support.servers import PROJECT

pytestmark = [pytest.mark.checkpoint, pytest.mark.timeout(900)]
TOKENS, STEP = 2000, 250
TEXTS = ("examples/manual/context.md", "examples/policy/context.md", "scheduler/scheduler.py")


@torch.inference_mode()
def log_probabilities(path: str, tokens: list[int]) -> list[float]:
    """Of every token but the first, in float32; the vocabulary's log-probabilities never lie in memory at once."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    states = model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    found: list[float] = []
    for start in range(0, len(tokens) - 1, STEP):
        following = torch.tensor(tokens[start + 1 : start + 1 + STEP])
        rows = model.lm_head(states[start : start + len(following)]).log_softmax(-1)
        found += rows.gather(1, following[:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_log_probabilities_over_2000_tokens(start_server: StartServer, checkpoint: Checkpoint) -> None:
    """In chunks, beyond Gemma's windows of 512 tokens."""
    source = resolve(str(fetch(checkpoint)))
    text = "\n".join((PROJECT / name).read_text() for name in TEXTS)
    tokens = source.tokenizer(text)["input_ids"][:TOKENS]
    assert len(tokens) == TOKENS
    expected = log_probabilities(source.path, tokens)
    server = start_server("--model", str(fetch(checkpoint)), "--dtype", "float32", "--max-model-len", "2304")
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    reply = server.http.post("/v1/completions", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    found = reply.json()["choices"][0]["logprobs"]["token_logprobs"][1:TOKENS]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-3)

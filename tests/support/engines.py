"""An engine in this process, with exactly so many blocks, and traffic for it."""

from __future__ import annotations

import random
import time
from functools import cache

import torch

from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.engine.engine import Engine, build_engine
from softbatch.scheduler.model.source import ModelSource, resolve
from softbatch.scheduler.protocol import (
    AddRequest,
    CancelRequest,
    EngineConfig,
    Ready,
    SamplingParams,
    SequenceOutput,
    SoftPromptRef,
)
from tests.support.models import Reference, make_soft_prompt


def build(path: str, *, num_blocks: int, block_size: int = 16, **overrides: object) -> tuple[Engine, Ready]:
    """An engine in this process with exactly `num_blocks` blocks."""
    probe = {"model": path, "dtype": "float32", "device": "cpu", "block_size": block_size} | overrides
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_block = 2 * config.num_hidden_layers * heads * head_dim * block_size * 4
    gib = (num_blocks + 0.5) * bytes_per_block / 2**30
    engine, ready = build_engine(EngineConfig(kv_cache_gib=gib, **probe), lambda *_: None, source_of(path))
    assert ready.num_blocks == num_blocks
    return engine, ready


@cache
def source_of(path: str) -> ModelSource:
    """Its tokenizer, which takes longer to read than a tiny model, is read for the first engine only."""
    return resolve(path)


def run(
    engine: Engine, requests: list[AddRequest], *, seed: int = 0, cancel: frozenset[str] = frozenset()
) -> tuple[dict[str, list[int]], int, int]:
    """Add requests at random moments, cancel some at random moments; returns outputs, preemptions, chunked rows."""
    rng = random.Random(seed)
    pending, received, done = list(requests), {r.request_id: [] for r in requests}, set()
    rng.shuffle(pending)
    preemptions = chunks = 0
    wanted = {r.request_id for r in requests} - cancel
    to_cancel = set(cancel)
    for _ in range(20_000):
        for _ in range(rng.randint(0, 3)):
            if pending:
                engine.handle(pending.pop())
        for request_id in sorted(to_cancel):
            if received[request_id] and rng.random() < 0.3:
                engine.handle(CancelRequest([request_id]))
                to_cancel.discard(request_id)
        output = engine.step()
        preemptions += len(output.preempted)
        for sequence in output.outputs:
            assert sequence.error is None, sequence.error
            received[sequence.request_id] += sequence.token_ids
            chunks += not sequence.token_ids
            if sequence.finish_reason:
                done.add(sequence.request_id)
        engine.scheduler.check_integrity()
        if not pending and not engine.has_work:
            break
        if not output.has_news and not engine.is_running:
            time.sleep(0.001)  # a soft prompt is being read
    assert wanted <= done
    return received, preemptions, chunks


def check_empty(engine: Engine) -> None:
    resident = sum(len(p.blocks) for p in engine.scheduler.soft_prompts.all())
    assert engine.scheduler.pool.num_used == resident
    assert not engine.scheduler.running
    assert len(engine.scheduler.waiting) == 0


def request(name: str, token_ids: list[int], max_tokens: int, ref: SoftPromptRef | None = None) -> AddRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return AddRequest(request_id=name, token_ids=token_ids, params=params, soft_prompt=ref)


def trained_like(kind: str, length: int, reference: Reference, info: object) -> SoftPrompt:
    """What a real text would leave behind: token embeddings, or keys and values, of its first tokens."""
    from transformers import DynamicCache

    prompt = make_soft_prompt(kind, length, info)
    text = "The harbour office opens at seven. Ring the brass bell twice before you enter, and wait. " * 8
    ids = torch.tensor([reference.tokenizer(text)["input_ids"][:length]])
    with torch.inference_mode():
        if kind == "embeddings":
            return SoftPrompt(prompt.manifest, embeddings=reference.model.get_input_embeddings()(ids)[0])
        cache = DynamicCache(config=reference.model.config)
        reference.model(ids, past_key_values=cache)
        keys = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers])
        values = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers])
    return SoftPrompt(prompt.manifest, keys=keys, values=values)


def drain(engine: Engine, requests: list[AddRequest]) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.handle(request)
    for _ in range(5000):
        if not engine.has_work:
            return outputs
        step = engine.step()
        for output in step.outputs:
            outputs[output.request_id].append(output)
        if not step.has_news:  # a soft prompt is still being read
            time.sleep(0.002)
    raise AssertionError("the engine did not come to an end")


def tokens_of(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def make_request(name: str, token_ids: list[int], **params: object) -> AddRequest:
    values = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True} | params
    return AddRequest(request_id=name, token_ids=token_ids, params=SamplingParams(**values))

"""The engine as a GPU runs it — fused kernels, padded batches in static memory — but in Triton's interpreter."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from softbatch.scheduler.engine.engine import Engine
from softbatch.scheduler.model.attention.triton import build as build_attention
from softbatch.scheduler.model.batch import RaggedBatch
from softbatch.scheduler.model.cuda.device_memory import DeviceMemory
from softbatch.scheduler.model.cuda.fused import FusedForward
from softbatch.scheduler.model.cuda.graphs import CudaCapturer, GraphForward
from softbatch.scheduler.model.cuda.setup import largest_step, make_forward, make_planner, with_graphs
from softbatch.scheduler.model.forward import TransformersForward
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.loader import load_transformers, spec_of
from softbatch.scheduler.model.runner import Runner
from softbatch.scheduler.model.source import resolve
from softbatch.scheduler.protocol import EngineConfig, ModelInfo, Pooling, SoftPromptRef
from softbatch.scheduler.scheduler import Scheduler
from softbatch.scheduler.scheduler_config import SchedulerConfig
from tests.support import triton_device
from tests.support.call_again import CallAgain
from tests.support.engines import check_empty, drain, request, run
from tests.support.models import load_reference, make_soft_prompt, save_prompt, save_tiny, tiny_config
from tests.support.pooling import embedding_request, pooled_states

BLOCKS, BLOCK_SIZE, BATCH, LONGEST = 17, 4, 5, 64


@pytest.fixture(scope="module")
def small_models(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As small as a model can be that has layers and heads: the interpreter takes milliseconds for each."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    changes: dict[str, dict[str, Any]] = {
        "llama": {"num_hidden_layers": 2, "num_attention_heads": 4},
        "qwen3": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        "gpt2": {"n_layer": 2, "n_head": 2},
    }
    return {
        kind: save_tiny(tiny_config(kind, **fields), tokenizer, tmp_path_factory.mktemp("models") / kind)
        for kind, fields in changes.items()
    }


@pytest.fixture(params=triton_device.DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return triton_device.prepare(request.param)


class Counting:
    """The graphs, and how many steps went each way."""

    def __init__(self, graphs: GraphForward) -> None:
        self._graphs = graphs
        self.steps = Counter[str]()

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        kind = "eager" if batch.shape is None else "decoding" if batch.shape.is_decoding else "mixed"
        self.steps[kind] += 1
        return self._graphs(batch)

    def hidden_states(self, batch: RaggedBatch) -> torch.Tensor:
        return self._graphs.hidden_states(batch)


def build(path: str, device: torch.device, async_scheduling: bool = True) -> tuple[Engine, ModelInfo, Counting]:
    model, tokenizer = load_transformers(resolve(path), torch.float32, device)
    spec = spec_of("tiny", model, tokenizer)
    attention = build_attention(device)
    cache = KVCache(
        num_layers=spec.num_layers,
        num_blocks=BLOCKS,
        num_kv_heads=spec.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=spec.head_dim,
        dtype=torch.float32,
        device=device,
        scratch_block=True,
    )
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    graphs, batches = with_graphs(
        make_forward(model, cache, attention),
        cache,
        make_planner(model, attention, spec),
        max_batch_size=BATCH,
        max_batch_tokens=11,
        max_model_len=LONGEST,
        capturer=CudaCapturer() if device.type == "cuda" else CallAgain(),
    )
    assert graphs.capture_all().startswith("5 of 5")
    counting = Counting(graphs)
    limits = {"max_batch_size": BATCH, "max_batch_tokens": 11, "max_model_len": LONGEST, "max_queue_size": 50}
    config = SchedulerConfig(num_blocks=BLOCKS, block_size=BLOCK_SIZE, eos_token_ids=frozenset({2}), **limits)
    runner = Runner(counting, cache, spec, 1 << 28, batches)
    engine = Engine(Scheduler(config), runner, cache.bytes_per_block, async_scheduling=async_scheduling)
    fields = {name: getattr(spec, name) for name in ("name", "fingerprint", "hidden_size", "num_layers")}
    info = ModelInfo(
        **fields,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        tokenizer_path=path,
        vocab_size=49152,
        max_model_len=LONGEST,
        eos_token_ids=[2],
        dtype="float32",
        device=str(device),
        attention="triton",
        num_parameters=0,
    )
    return engine, info, counting


@pytest.mark.parametrize(("kind", "async_scheduling"), [("llama", False), ("qwen3", True), ("gpt2", True)])
def test_greedy_output_equals_transformers(
    small_models: dict[str, str], kind: str, async_scheduling: bool, device: torch.device, tmp_path: Path
) -> None:
    """gpt2 is not fused: it runs through transformers' code with the Triton attention inside."""
    reference = load_reference(small_models[kind])
    engine, info, counting = build(small_models[kind], device, async_scheduling)
    prompts = {n: make_soft_prompt("embeddings" if n % 2 else "kv", n, info, scale=0.5) for n in (4, 7)}
    refs = {n: SoftPromptRef(f"{n:064d}", str(save_prompt(p, tmp_path, f"p{n}")), n) for n, p in prompts.items()}
    cases = [(1, 0), (9, 0), (5, 4), (17, 7), (3, 7), (12, 0), (2, 4)]
    ids = [[(97 * i + 13 * j) % 40_000 for j in range(length)] for i, (length, _) in enumerate(cases)]
    requests = [request(f"r{i}", ids[i], 10, refs.get(virtual)) for i, (_, virtual) in enumerate(cases)]
    received, preemptions, chunks = run(engine, requests)
    for index, (_, virtual) in enumerate(cases):
        assert received[f"r{index}"] == reference.generate(ids[index], 10, prompts.get(virtual)), index
    assert preemptions > 0
    assert chunks > 0
    assert min(counting.steps[kind] for kind in ("decoding", "mixed", "eager")) > 0, counting.steps
    pooled: dict[str, Pooling] = {"a": "mean", "b": "last", "c": "mean"}
    found = drain(engine, [embedding_request(name, ids[1][: ord(name) - 92], way) for name, way in pooled.items()])
    for name, way in pooled.items():
        expected = pooled_states(reference, ids[1][: ord(name) - 92], way)
        assert found[name][-1].embedding == pytest.approx(expected, abs=1e-4), name
    check_empty(engine)


def test_an_engine_that_is_dropped_holds_no_memory(tiny_models: dict[str, str], device: torch.device) -> None:
    """A compression gives its engine up and trains in what that frees: nothing may wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        engine, _, counting = build(tiny_models["llama"], device)
        cache = engine._runner._kv_cache
        held = [weakref.ref(tensor) for tensor in (cache._keys, cache._values, counting._graphs._forward._norm)]
        engine.close()
        del engine, counting, cache
        assert [reference() for reference in held] == [None, None, None]
    finally:
        gc.enable()


def test_which_models_are_fused(tiny_models: dict[str, str]) -> None:
    device = triton_device.prepare("interpreter" if not torch.cuda.is_available() else "cuda")
    for kind, expected in {"llama": FusedForward, "qwen3": FusedForward, "gpt2": TransformersForward}.items():
        model, tokenizer = load_transformers(resolve(tiny_models[kind]), torch.float32, device)
        spec = spec_of("tiny", model, tokenizer)
        cache = KVCache(
            num_layers=spec.num_layers,
            num_blocks=2,
            num_kv_heads=spec.num_kv_heads,
            block_size=4,
            head_dim=spec.head_dim,
            dtype=torch.float32,
            device=device,
        )
        assert type(make_forward(model, cache, build_attention(device))) is expected


@pytest.mark.parametrize(("tokens", "longest", "batch"), [(40, 512, 8), (40, 16, 8), (6, 512, 6), (33, 8, 3)])
def test_the_largest_step_runs_whatever_the_limits(
    tiny_models: dict[str, str], device: torch.device, tokens: int, longest: int, batch: int
) -> None:
    model, tokenizer = load_transformers(resolve(tiny_models["llama"]), torch.float32, device)
    config = EngineConfig(model="tiny", max_batch_tokens=tokens, max_batch_size=batch, block_size=4)
    spec = spec_of("tiny", model, tokenizer)
    largest_step(model, build_attention(device), spec, config, longest)()


def test_what_is_left_for_the_cache() -> None:
    gib = 1 << 30
    memory = DeviceMemory(total=100 * gib, free=80 * gib, step=5 * gib)
    assert memory.left_for_cache(0.9) == pytest.approx(60 * gib, abs=2)
    assert memory.left_for_cache(0.2) <= 0
    assert "leaves 60.0 GiB" in memory.describe(0.9)
    assert "20.0 are taken" in memory.describe(0.9)

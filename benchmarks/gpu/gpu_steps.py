"""Steps of a model beside their floors, in this process: for `gpu.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.gpu_models import Costs
from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model import transformers_attention as interface
from softbatch.scheduler.model.attention import choose
from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.cuda.graphs import CudaCapturer
from softbatch.scheduler.model.cuda.setup import make_forward, make_planner, with_graphs
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.runner import Runner
from softbatch.scheduler.model.sampling.adjustments import SampleInput
from softbatch.scheduler.model.sampling.sampler import sample
from softbatch.scheduler.protocol import SamplingParams

BLOCK_SIZE = 16
Figures = dict[str, float]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device, repeats: int, warm_ups: int = 3) -> list[float]:
    """Seconds of each repeat."""
    for _ in range(warm_ups):
        run()
    found = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - started)
    return found


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes read and written per second by a copy within the device."""
    source = torch.zeros((16 << 20) if tiny else (2 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(timed(lambda: target.copy_(source), device, 10))


def matmul_rate(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """Floating-point operations per second of a large square product."""
    size = 512 if tiny else 8192
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / statistics.median(timed(lambda: left @ right, device, 10))


class Steps:
    """One model with a KV cache of its own, run as the engine runs it: batch built, computed, sampled, read back."""

    def __init__(self, model: Any, spec: ModelSpec, tokens: int, max_batch_size: int, longest: int) -> None:
        interface.register()
        model.set_attn_implementation(interface.ATTENTION_NAME)
        self.device: torch.device = model.device
        self.costs = Costs.of(model)
        self.backend_name, backend = choose(self.device, model.dtype)
        self._cache = KVCache(
            num_layers=spec.num_layers,
            num_blocks=-(-tokens // BLOCK_SIZE) + max_batch_size,
            num_kv_heads=spec.num_kv_heads,
            block_size=BLOCK_SIZE,
            head_dim=spec.head_dim,
            dtype=model.dtype,
            device=self.device,
            scratch_block=True,
        )
        forward = make_forward(model, self._cache, backend)
        self.forward_name = type(forward).__name__
        self._graphs, build = with_graphs(
            forward,
            self._cache,
            make_planner(model, backend, spec),
            max_batch_size=max_batch_size,
            max_batch_tokens=1,  # of mixed steps none is measured
            max_model_len=longest,
            capturer=CudaCapturer() if self.device.type == "cuda" else lambda run: run,
        )
        self.graphs = self._graphs.capture_all()
        self._runner = Runner(self._graphs, self._cache, spec, 1 << 20, build)

    @torch.inference_mode()
    def decode(self, batch: int, context: int, repeats: int) -> list[float]:
        """Seconds of steps in which `batch` sequences of `context` tokens each get one more."""
        per_sequence = -(-context // BLOCK_SIZE)
        rows, inputs = [], []
        for index in range(batch):
            blocks = range(index * per_sequence, (index + 1) * per_sequence)
            rows.append(Row(context - 1, [5 + index], blocks, range(1)))
            inputs.append(SampleInput(SamplingParams(temperature=0.0), [5], 1, context))
        return timed(lambda: sample(self._runner.forward(rows), inputs).read(), self.device, repeats)

    @torch.inference_mode()
    def prefill(self, tokens: int, repeats: int) -> list[float]:
        blocks = range(-(-tokens // BLOCK_SIZE))
        row = Row(0, [(7 * i) % 500 + 3 for i in range(tokens)], blocks, range(tokens - 1, tokens))
        inputs = [SampleInput(SamplingParams(temperature=0.0), [5], 1, tokens)]
        return timed(lambda: sample(self._runner.forward([row]), inputs).read(), self.device, repeats, warm_ups=1)


def against_floor(seconds: list[float], floor: float) -> Figures:
    """Medians in milliseconds, their spread, and how near they come to the floor (1: reached)."""
    median = statistics.median(seconds)
    return {
        "ms": 1000 * median,
        "least_ms": 1000 * min(seconds),
        "most_ms": 1000 * max(seconds),
        "floor_ms": 1000 * floor,
        "fraction_of_limit": floor / median,
    }


def generate_batch(model: Any, prompts: list[list[int]], max_tokens: int) -> Figures:
    """transformers' continuous batching with the same weights, all prompts handed over at once; then once more.

    Only the time from the first prompt to the last answer counts, as in `gpu_serving.throughput`: not that of starting
    and stopping, which `generate_batch` itself does in every call.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    model.set_attn_implementation("sdpa")
    config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    longest = max(map(len, prompts))
    room = ContinuousBatchingConfig()
    if model.device.type == "cpu":  # it would take over half of all memory, whatever the work
        block_size = getattr(room, "page_size", None) or room.block_size  # the newer name, and that of 5.17
        room.num_blocks = len(prompts) * (2 + (longest + max_tokens) // block_size)
        room.max_batch_tokens = len(prompts) * longest
    hints = WorkloadHints(longest, max_tokens, len(prompts))
    runs = []
    with model.continuous_batching_context_manager(config, True, 5, room, workload_hints=hints) as manager:
        for turn in range(2):
            asked = changed(prompts, turn)
            started = time.perf_counter()
            manager.add_requests(inputs=asked, max_new_tokens=max_tokens)
            tokens, missing = 0, len(asked)
            while missing:
                result = manager.get_result(timeout=1)
                if result is not None and result.error is not None:
                    raise RuntimeError(f"transformers' continuous batching: {result.error}")
                if result is not None and result.is_finished():
                    tokens, missing = tokens + len(result.generated_tokens), missing - 1
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching has stopped")
            runs.append((time.perf_counter() - started, tokens))
    seconds, tokens = min(runs)
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "first_run_seconds": runs[0][0]}


def changed(prompts: list[list[int]], turn: int) -> list[list[int]]:
    """The prompts as no cache knows them yet."""
    return [[3 + turn, *prompt[1:]] for prompt in prompts] if turn else prompts

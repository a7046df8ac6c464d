"""A GPU's figures: steps beside their floors, transformers' generate_batch, and soft prompts against whole contexts.

Models of real shapes with random weights are made on the device, so that nothing has to be downloaded. Prints tables,
ending with what must be reached beside what was, and writes JSON. Without a GPU, `--device cpu --tiny` runs all of it
on a tiny model, to see that it works.

    python -m benchmarks.gpu.gpu --output figures.json
    python -m benchmarks.gpu.gpu --device cpu --tiny
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.gpu_models import SHAPES, Costs, build, save
from benchmarks.gpu.gpu_serving import Load, Server, hot, save_soft_prompts, throughput
from benchmarks.gpu.gpu_steps import Steps, against_floor, copy_bandwidth, generate_batch, matmul_rate
from benchmarks.gpu.gpu_targets import MODEL, table
from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model.loader import load_transformers, spec_of
from softbatch.scheduler.model.source import resolve


@dataclass(frozen=True)
class Plan:
    """What is measured, on a GPU or on a tiny model."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill: int
    repeats: int
    prompts: int  # of the comparison with generate_batch
    prompt_tokens: int
    answer_tokens: int
    hot_contexts: tuple[int, ...]
    hot_concurrency: tuple[int, ...]
    load: Load
    server_flags: tuple[str, ...]

    @property
    def longest(self) -> int:
        return max(self.prefill, *self.contexts, self.load.context_tokens) + 512


FULL = Plan(
    batches=(1, 16, 64, 256),
    contexts=(128, 2048),
    prefill=8192,
    repeats=30,
    prompts=64,
    prompt_tokens=512,
    answer_tokens=128,
    hot_contexts=(1, 16, 128),
    hot_concurrency=(64, 256, 512),
    load=Load(
        0, context_tokens=8192, virtual_tokens=64, question_tokens=32, answer_tokens=32, concurrency=0, seconds=12
    ),
    server_flags=("--max-batch-size", "512", "--max-batch-tokens", "8192", "--max-queue-size", "1024"),
)
TINY = Plan(
    batches=(1, 3),
    contexts=(16, 64),
    prefill=128,
    repeats=3,
    prompts=4,
    prompt_tokens=24,
    answer_tokens=8,
    hot_contexts=(1, 3),
    hot_concurrency=(2, 4),
    load=Load(0, context_tokens=256, virtual_tokens=8, question_tokens=6, answer_tokens=4, concurrency=0, seconds=0.2),
    server_flags=("--max-batch-size", "8", "--max-batch-tokens", "64", "--kv-cache-gib", "0.02"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short runs")
    parser.add_argument(
        "--models", default="SmolLM2-135M,Llama-3.2-1B,Llama-3.1-8B", help="some of " + ", ".join(SHAPES)
    )
    parser.add_argument("--parts", default="steps,generate_batch,serving", help="what to measure")
    parser.add_argument("--port", type=int, default=8398)
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON, beside those that are there")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --tiny shows that the benchmark works")
    device, plan = torch.device(options.device), TINY if options.tiny else FULL
    dtype = torch.float32 if options.tiny else torch.bfloat16
    parts = options.parts.split(",")
    limits = {"copy_bytes_per_second": copy_bandwidth(device, options.tiny)}
    limits["matmul_flops_per_second"] = matmul_rate(device, dtype, options.tiny)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "dtype": str(dtype),
        "limits": limits,
        "plan": asdict(plan),
        "models": {},
    }
    print(f"{results['device']}: copies {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s", end=", ")
    print(f"multiplies {limits['matmul_flops_per_second'] / 1e12:.1f} TFLOP/s\n", flush=True)
    if options.output and options.output.exists():  # what other calls have measured on this device stays
        before = json.loads(options.output.read_text())
        if all(before[name] == results[name] for name in ("device", "torch", "dtype")):
            results["models"] = before["models"]
    for name in ["tiny"] if options.tiny else options.models.split(","):
        found = results["models"].setdefault(name, {})
        for _ in measure(name, device, dtype, plan, limits, parts, options.port, found):
            if options.output:  # after every part: machines are lent for minutes
                options.output.write_text(json.dumps(results, indent=1))
    if MODEL in results["models"]:
        print(f"## {MODEL}: the targets, on {results['device']}\n\n{table(results['models'])}")
    return 0


def measure(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    plan: Plan,
    limits: dict[str, float],
    parts: list[str],
    port: int,
    found: dict[str, Any],
) -> Iterator[None]:
    """Into `found`, part by part."""
    print(f"## {name}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="softbatch-gpu-") as directory:
        path = Path(directory, name)
        save(build(name, device, dtype, plan.longest), path)
        model, tokenizer = load_transformers(resolve(str(path)), dtype, device)
        spec = spec_of(name, model, tokenizer)
        prompts = [[(i * 7919 + j * 31) % 400 + 3 for j in range(plan.prompt_tokens)] for i in range(plan.prompts)]
        if "steps" in parts:
            found["steps"] = measure_steps(model, spec, plan, limits)
            free(device)
            yield
        if "generate_batch" in parts:
            found["generate_batch"] = generate_batch(model, prompts, plan.answer_tokens)
            print(f"generate_batch: {found['generate_batch']['tokens_per_second']:.0f} output tokens/s", flush=True)
            yield
        vocabulary = model.config.vocab_size
        del model
        free(device)
        if "serving" in parts:
            found["serving"] = {}
            for _ in measure_serving(path, spec, plan, prompts, vocabulary, dtype, device, port, found["serving"]):
                if "generate_batch" in found and "throughput" in found["serving"]:
                    ratio = found["serving"]["throughput"]["tokens_per_second"]
                    found["times_generate_batch"] = ratio / found["generate_batch"]["tokens_per_second"]
                yield
            if "times_generate_batch" in found:
                print(f"softbatch over HTTP: {found['times_generate_batch']:.2f} times generate_batch\n", flush=True)


def measure_steps(model: Any, spec: ModelSpec, plan: Plan, limits: dict[str, float]) -> dict[str, Any]:
    tokens = max(plan.prefill, max(plan.batches) * max(plan.contexts))
    if model.device.type == "cuda":  # a tenth is left for the steps themselves
        room = int(0.9 * torch.cuda.mem_get_info()[0]) // Costs.of(model).kv_bytes_per_token
        tokens = min(tokens, room - 16 * max(plan.batches))
    steps = Steps(model, spec, tokens, max(plan.batches), plan.longest)
    print(f"{steps.forward_name}, attention {steps.backend_name}, graphs: {steps.graphs}\n")
    print("| step | ms | least to most | floor, ms | of the limit |\n|---|---|---|---|---|")
    found: dict[str, Any] = {"decode": []}
    for context in plan.contexts:
        for batch in plan.batches:
            if batch * context > tokens:
                print(f"| decode, batch {batch}, context {context} | does not fit | | | |")
                continue
            floor = steps.costs.decode_bytes(batch, context) / limits["copy_bytes_per_second"]
            figures = against_floor(steps.decode(batch, context, plan.repeats), floor)
            found["decode"].append({"batch": batch, "context": context, **figures})
            print_row(f"decode, batch {batch}, context {context}", figures)
    floor = steps.costs.prefill_flops(plan.prefill) / limits["matmul_flops_per_second"]
    figures = against_floor(steps.prefill(plan.prefill, max(3, plan.repeats // 5)), floor)
    figures["tokens_per_second"] = plan.prefill / figures["ms"] * 1000
    found["prefill"] = {"tokens": plan.prefill, **figures}
    print_row(f"prefill of {plan.prefill} ({figures['tokens_per_second']:.0f} tokens/s)", figures)
    print(flush=True)
    return found


def measure_serving(
    path: Path,
    spec: ModelSpec,
    plan: Plan,
    prompts: list[list[int]],
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    port: int,
    found: dict[str, Any],
) -> Iterator[None]:
    """Into `found`, figure by figure."""
    store = path.parent / "prompts"
    save_soft_prompts(store, spec, max(plan.hot_contexts), plan.load.virtual_tokens)
    flags = [*plan.server_flags, "--device", device.type, "--dtype", str(dtype).removeprefix("torch.")]
    block_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize * 16
    server = Server(path, store, port, [*flags, "--async-scheduling", "off"])
    try:
        waiting = found["throughput_without_async_scheduling"] = throughput(server, prompts, plan.answer_tokens)
    finally:
        server.stop()
    yield
    server = Server(path, store, port, [*flags, "--async-scheduling", "on"])
    try:
        found |= {"throughput": throughput(server, prompts, plan.answer_tokens), "hot": []}
        yield
        rates = [found["throughput"]["tokens_per_second"], waiting["tokens_per_second"]]
        print("softbatch over HTTP: {:.0f} output tokens/s, without --async-scheduling {:.0f}\n".format(*rates))
        print("Each way at the concurrency, in brackets, at which it was fastest.\n")
        print("| contexts | whole, requests/s | soft, requests/s | times | KV per request, times less |")
        print("|---|---|---|---|---|")
        for contexts in plan.hot_contexts:
            loads = [replace(plan.load, contexts=contexts, concurrency=clients) for clients in plan.hot_concurrency]
            whole, soft = ([hot(server, load, way, vocabulary, block_bytes) for load in loads] for way in (False, True))
            row = {"contexts": contexts, "whole": whole, "soft": soft, **comparison(whole, soft)}
            found["hot"].append(row)
            rates = " | ".join(f"{best['requests_per_second']:.2f} ({best['concurrency']:.0f})" for best in row["best"])
            print(f"| {contexts} | {rates} | {row['times_faster']:.2f} | {row['times_less_kv']:.2f} |", flush=True)
            yield
        print()
    finally:
        server.stop()


def comparison(whole: list[dict[str, float]], soft: list[dict[str, float]]) -> dict[str, Any]:
    """Both ways at their best: the concurrency with the most requests per second."""
    best = [max(runs, key=lambda run: run["requests_per_second"]) for runs in (whole, soft)]
    faster = best[1]["requests_per_second"] / max(1e-9, best[0]["requests_per_second"])
    smaller = best[0]["kv_bytes_per_running_request"] / max(1e-9, best[1]["kv_bytes_per_running_request"])
    return {"best": best, "times_faster": faster, "times_less_kv": smaller}


def print_row(name: str, figures: dict[str, float]) -> None:
    spread = f"{figures['least_ms']:.2f} to {figures['most_ms']:.2f}"
    print(
        f"| {name} | {figures['ms']:.2f} | {spread} | {figures['floor_ms']:.2f} | {figures['fraction_of_limit']:.0%} |"
    )


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())

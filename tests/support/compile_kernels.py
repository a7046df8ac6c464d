"""Compiles every kernel launch of a model's step for an H100/H200, without one; prints what became of each as JSON.

Run as a program, once for all models: where kernels run in Triton's interpreter, they cannot be compiled, and starting
takes longer than compiling.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from softbatch.scheduler.model.attention import triton_kernels as attention_kernels
from softbatch.scheduler.model.attention.backend import AttentionKind
from softbatch.scheduler.model.attention.triton import TritonAttention
from softbatch.scheduler.model.batch import Row, build_batch
from softbatch.scheduler.model.cuda import fused
from softbatch.scheduler.model.cuda import fused_kernels as decoder_kernels
from softbatch.scheduler.model.kv_cache import KVCache

MULTIPROCESSORS, SHARED_MEMORY = 132, 232_448  # of an H100 or H200
TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Recorder:
    """Stands for a module of kernels: a launch compiles instead, for the arguments as a launch would see them."""

    def __init__(self, module: Any, found: dict[str, dict[str, Any]]) -> None:
        self._module = module
        self._found = found

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        recorder = self

        class Launcher:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *args, **options: recorder._compile(name, function, args, options)

        return Launcher()

    def _compile(self, name: str, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        launch = {option: options.pop(option) for option in ("num_warps", "num_stages") if option in options}
        given = dict(zip(function.arg_names, args, strict=False)) | options
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(function.params):
            value = given[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or (special and type(value) is int and value == 1):
                signature[parameter.name], constants[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[parameter.name] = "i32"
                if special and value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32"
        key = f"{name} {sorted(launch.items())} {sorted(options.items())}"
        if key in self._found:
            return
        source = ASTSource(function, signature, constants, attributes)
        kernel = triton.compile(source, target=TARGET, options=launch)
        ptx = kernel.asm["ptx"]
        self._found[key] = {
            "kernel": name,
            "dtype": str(args[0].dtype),
            "cubin_bytes": len(kernel.asm["cubin"]),
            "shared_bytes": kernel.metadata.shared,
            "async_copies": ptx.count("cp.async.c"),
            "copies_in_flight": max(
                map(int, re.findall(r"async_wait [^{]*\{num = (\d+)", kernel.asm["ttgir"])), default=0
            ),
            "tensor_core_products": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
            **_registers(ptx),
        }


def _registers(ptx: str) -> dict[str, int]:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(PTXAS), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", log))
    return {"registers": max(map(int, re.findall(r"Used (\d+) registers", log))), "spill_bytes": spills}


def compile_model(kind: str, head_dim: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The launches of a mixed and of a decoding step of a two-layer model with a real model's widths.

    Of `windows` they are those of a layer whose attention is not plainly causal."""
    found: dict[str, dict[str, Any]] = {}
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": head_dim}
    config = (Qwen3Config if kind == "qwen3" else LlamaConfig)(**sizes, **heads)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    attention = TritonAttention(Recorder(attention_kernels, found), MULTIPROCESSORS, SHARED_MEMORY)
    meta = torch.device("meta")
    kv_cache = KVCache(
        num_layers=1, num_blocks=300, num_kv_heads=8, block_size=16, head_dim=head_dim, dtype=dtype, device=meta
    )
    planner = attention.planner(heads=32, kv_heads=8, head_dim=head_dim, dtype=dtype)
    decode = Row(2047, [1], list(range(128)), range(1))
    prefill = Row(0, [1] * 500, list(range(32)), range(499, 500))
    batches = [build_batch(rows, 16, torch.device("cpu"), planner) for rows in ([prefill, decode], [decode])]
    if kind == "windows":
        query, key = (torch.empty((501, heads, head_dim), dtype=dtype, device=meta) for heads in (32, 8))
        batch = batch_on_meta(batches[0]).attention
        other = AttentionKind(window=512, softcap=50.0, sinks=torch.empty(32, dtype=dtype, device=meta))
        attention(query, key, key, kv_cache.keys[0], kv_cache.values[0], batch, 0.1, other)
        return list(found.values())
    forward = fused.FusedForward(model, kv_cache, attention)
    forward._kernels = Recorder(decoder_kernels, found)
    for batch in batches:
        forward(batch_on_meta(batch))
    # transformers' own layers call the backend with keys and values of their own.
    keys = torch.empty((2, 8, head_dim), dtype=dtype, device=meta)
    attention.write(keys, keys, kv_cache.keys[0], kv_cache.values[0], torch.empty(2, dtype=torch.int64, device=meta))
    return list(found.values())


def batch_on_meta(batch: Any) -> Any:
    from dataclasses import fields, is_dataclass, replace

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return batch_on_meta(value) if is_dataclass(value) else value

    return replace(batch, **{field.name: moved(getattr(batch, field.name)) for field in fields(batch)})


def outcome(case: str) -> list[dict[str, Any]] | str:
    """The kernels of one `kind-head_dim-dtype`, or the error that compiling them ended with."""
    kind, head_dim, dtype = case.split("-")
    try:
        return compile_model(kind, int(head_dim), getattr(torch, dtype))
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    print(json.dumps({case: outcome(case) for case in sys.argv[1:]}))

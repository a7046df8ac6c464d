"""Loads a model with everything it needs to run: weights, attention backend, KV cache, and a check of all three."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from softbatch.scheduler.length_rule import LengthRule
from softbatch.scheduler.model.attention import choose
from softbatch.scheduler.model.attention.backend import AttentionBackend
from softbatch.scheduler.model.batch import build_batch
from softbatch.scheduler.model.block_experts import pack_experts
from softbatch.scheduler.model.cpu.build import begin_to_build
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import BlockKind, WeightFormat
from softbatch.scheduler.model.cuda.failures import as_model_error
from softbatch.scheduler.model.cuda.fused import FusedForward
from softbatch.scheduler.model.cuda.graphs import CudaCapturer
from softbatch.scheduler.model.cuda.setup import make_forward, make_planner, with_graphs
from softbatch.scheduler.model.earlier_start import EarlierStarts, StartsOfState
from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.forward import Forward, TransformersForward
from softbatch.scheduler.model.gguf_weights import GgufWeights
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.kv_cache_sizing import make_cache
from softbatch.scheduler.model.llama.decoder import DecoderForward, supports, unsupported_option_error
from softbatch.scheduler.model.model_files import check_config, first_line
from softbatch.scheduler.model.model_options import (
    NOT_CHANGED,
    refuse_family,
    refuse_on_gpu,
    refuse_without_decoder,
    rounding,
)
from softbatch.scheduler.model.model_reading import (
    ReadModel,
    read_again,
    read_model,
    told_as_architecture,
)
from softbatch.scheduler.model.model_reading import load_transformers as load_transformers
from softbatch.scheduler.model.model_reading import spec_of as spec_of
from softbatch.scheduler.model.native_weights import NATIVE, refuse_native, refuse_native_file
from softbatch.scheduler.model.onednn_linear import pack_linears
from softbatch.scheduler.model.runner import Runner
from softbatch.scheduler.model.sampling.grammar import GrammarMasks, grammar_tokenizer
from softbatch.scheduler.model.self_check import Yardstick, has_short_windows, self_check, short_windows
from softbatch.scheduler.model.source import ModelError, ModelSource, resolve
from softbatch.scheduler.protocol import EngineConfig, ModelInfo

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Report = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Loaded:
    """A model ready to run steps."""

    runner: Runner
    kv_cache: KVCache
    info: ModelInfo
    length_rule: LengthRule | None = None


class Phases:
    """Reports each phase of the start with its seconds."""

    def __init__(self, report: Report, since: float) -> None:
        self._report = report
        self._since = since

    def done(self, name: str, detail: str = "") -> None:
        now = time.monotonic()
        self._report(name, now - self._since, detail)
        self._since = now


def load(
    config: EngineConfig, report: Report, source: ModelSource | None = None, starts: EarlierStarts | None = None
) -> Loaded:
    """Load what `config` names; `report(phase, seconds, detail)` follows the progress. `source` is its model where that
    was resolved before. With `starts`, what one of them has found out is not found out again. Raises ModelError."""
    with as_model_error():
        return _load(config, report, source, starts)


def _load(config: EngineConfig, report: Report, source: ModelSource | None, starts: EarlierStarts | None) -> Loaded:
    phases = Phases(report, config.started_at or time.monotonic())
    phases.done("process", "Python and torch imported")
    device = _device(config.device)
    refuse_on_gpu(config, device)
    dtype = _dtype(config.dtype, device)
    source = source or _resolve(config, device, dtype)
    refuse_native(config, source)
    phases.done("model files", source.path)
    is_kept = starts is not None and device.type == "cpu" and config.quantization != NATIVE
    of_state = starts.of(source.path, dtype) if starts is not None and is_kept else None
    if of_state is not None and (again := _from_earlier(of_state, config, source, device, phases)) is not None:
        return again
    refuse_without_decoder(config, source, dtype, device)
    read = read_model(config, source, dtype, device, phases.done)
    new = of_state.begin(read.model) if of_state is not None and supports(read.model, dtype) else None
    loaded = _put_together(config, source, read, device, phases)
    if new is not None:
        is_short = has_short_windows(Family.of(read.model.config), read.longest)
        new.keep(read.spec.fingerprint, read.eos_token_ids, read.yardstick, is_short, read.tokenizer())
    return loaded


def _from_earlier(
    starts: StartsOfState, config: EngineConfig, source: ModelSource, device: torch.device, phases: Phases
) -> Loaded | None:
    """None where there is none to go on from, or where anything about it fails: what is wrong with the model itself
    fails again when it is read anew."""
    start = starts.find()
    if start is None or not build_kernels():
        return None
    try:
        again = read_again(config, source, start, phases.done)
        return None if again is None else _put_together(config, source, again, device, phases)
    except Exception as error:
        logger.info("the model is read anew, as what an earlier start has kept does not fit: %s", first_line(error))
        return None


def _put_together(
    config: EngineConfig, source: ModelSource, read: ReadModel, device: torch.device, phases: Phases
) -> Loaded:
    """Lays the model out for this machine, and checks what comes of it. Raises ModelError."""
    model, spec, dtype, tokenizer = read.model, read.spec, read.yardstick.dtype, read.tokenizer
    num_parameters = read.num_parameters
    name, backend = choose(device, dtype)
    phases.done("attention kernel", name)
    kv_cache, max_model_len = make_cache(config, model, dtype, backend, spec, read.longest)
    phases.done("KV cache", kv_cache.describe())
    forward, layout = _forward(model, kv_cache, backend, config, read.longest, read.blocks)
    phases.done("weight layout", layout)

    info = ModelInfo(
        name=spec.name,
        tokenizer_path=source.path,
        fingerprint=spec.fingerprint,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_model_len=max_model_len,
        eos_token_ids=read.eos_token_ids,
        dtype=_name(dtype),
        device=str(device),
        attention=name,
        num_parameters=num_parameters,
    )
    grammars = GrammarMasks(
        lambda: grammar_tokenizer(tokenizer(), info.vocab_size, info.eos_token_ids), info.vocab_size
    )
    runner, found = _checked_runner(model, read.longest, read.yardstick, forward, kv_cache, info, config, grammars)
    phases.done("self-check", found)
    rule = Family.of(model.config).length_rule
    if device.type == "cuda":
        graphs, build = with_graphs(
            forward,
            kv_cache,
            make_planner(model, backend, spec),
            max_batch_size=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=max_model_len,
            capturer=CudaCapturer(),
            by_length=rule is not None,
        )
        runner = Runner(graphs, kv_cache, info.spec, config.max_prompt_bytes, build, grammars)
        phases.done("CUDA graphs", graphs.capture_all())
    return Loaded(runner, kv_cache, info, rule)


def _resolve(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> ModelSource:
    """Kernels are compiled while the model is converted and read, but not for one that is refused at a glance."""

    def begin() -> None:
        if device.type == "cpu":
            begin_to_build()

    def accept(found: Any) -> None:
        check_config(found, config.max_model_len)
        refuse_native_file(config, found, dtype)
        refuse_family(config, found, dtype, device)
        begin()

    source = resolve(config.model, accept, config.chat_template)
    begin()
    return source


def _forward(
    model: Any,
    kv_cache: KVCache,
    backend: AttentionBackend,
    config: EngineConfig,
    longest: int,
    blocks: GgufWeights | None,
) -> tuple[Forward, str]:
    """The fastest way to run this model here, and how its weights lie for it. Raises ModelError."""
    quantization = config.quantization
    if supports(model, kv_cache.dtype) and build_kernels():
        try:
            weights = None if quantization in NOT_CHANGED else WeightFormat.named(quantization)
            decoder = DecoderForward(model, kv_cache, weights, release=True, longest=longest, blocks=blocks)
            formats = " and ".join(map(str, dict.fromkeys((decoder.weights, decoder.weights_of_long_steps))))
            kinds = f" ({blocks.kinds})" if blocks else ""
            embedding = model.get_input_embeddings().weight.nbytes
            size = f"{decoder.weight_bytes / 1e6:,.0f} MB, embedding {embedding / 1e6:,.0f} MB"
            return decoder, f"packed for the decoder in C++, {formats}{kinds}, {size}"
        except (RuntimeError, MemoryError, ValueError) as error:
            reason = (str(error).splitlines() or ["not enough memory"])[0]
            raise ModelError(f"the weights cannot be laid out (--quantization {quantization}): {reason}") from error
    if quantization not in NOT_CHANGED:
        raise unsupported_option_error(f"--quantization {quantization}", model, "--quantization none")
    if config.deterministic:
        raise unsupported_option_error("--deterministic", model, "another model, or leave it out")
    if kv_cache.device.type == "cuda":
        forward = make_forward(model, kv_cache, backend, longest)
        return forward, "merged for fused kernels" if isinstance(forward, FusedForward) else "as transformers has it"
    in_blocks = pack_experts(model)
    if quantization == NATIVE and not in_blocks:
        raise ModelError(f"--quantization {quantization} takes a C++ compiler: use --quantization none")
    experts = (
        f", experts computed from their blocks ({BlockKind.MXFP4}), {in_blocks / 1e6:,.0f} MB" if in_blocks else ""
    )
    layout = f"{pack_linears(model)} linear layers packed{experts}"
    return TransformersForward(model, kv_cache, backend, longest), layout


def _checked_runner(
    model: Any,
    longest: int,
    yardstick: Yardstick,
    forward: Forward,
    kv_cache: KVCache,
    info: ModelInfo,
    config: EngineConfig,
    grammars: GrammarMasks,
) -> tuple[Runner, str]:
    """And what the check has found."""
    size, device = kv_cache.block_size, kv_cache.device
    by_length = Family.of(model.config).length_rule is not None
    joins_ranges = not config.deterministic
    build = partial(build_batch, block_size=size, device=device, joins_ranges=joins_ranges, by_length=by_length)
    runner = Runner(forward, kv_cache, info.spec, config.max_prompt_bytes, build, grammars)
    rounded_by = [option for option, _ in rounding(config)]
    with told_as_architecture(info.name, bool(rounded_by)), short_windows(model, longest) as window:
        if isinstance(forward, DecoderForward):
            forward.limit_windows(window)
        found = self_check(yardstick, runner, kv_cache.block_size, rounded_by)
    if isinstance(forward, DecoderForward):
        forward.limit_windows(None)
    return runner, found


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # in float32 it would round positions, too
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 wherever matrix products in it are fast, float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.backends.cpu.get_cpu_capability() == "AVX512" and _has_bf16() else torch.float32


def _has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

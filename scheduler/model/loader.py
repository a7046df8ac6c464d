"""Loads a model with everything it needs to run: weights, attention backend, KV cache, and a check of all three."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from softbatch.prompt_store.fingerprint import fingerprint
from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model import transformers_attention as interface
from softbatch.scheduler.model.attention import choose
from softbatch.scheduler.model.attention.backend import AttentionBackend
from softbatch.scheduler.model.batch import build_batch
from softbatch.scheduler.model.cpu.build import begin_to_build
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import WeightFormat
from softbatch.scheduler.model.cuda.device_memory import is_shortage
from softbatch.scheduler.model.cuda.failures import as_model_error
from softbatch.scheduler.model.cuda.fused import FusedForward
from softbatch.scheduler.model.cuda.graphs import CudaCapturer
from softbatch.scheduler.model.cuda.setup import make_forward, make_planner, with_graphs
from softbatch.scheduler.model.end_tokens import end_tokens
from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.forward import Forward, TransformersForward
from softbatch.scheduler.model.gguf_weights import GgufWeights
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.kv_cache_sizing import make_cache
from softbatch.scheduler.model.llama.decoder import DecoderForward, supports, unsupported_option_error
from softbatch.scheduler.model.model_files import check_config, config_content, first_line, read_config
from softbatch.scheduler.model.native_weights import NATIVE, native_weights, refuse_native, refuse_native_file
from softbatch.scheduler.model.onednn_linear import pack_linears
from softbatch.scheduler.model.runner import Runner
from softbatch.scheduler.model.sampling.grammar import GrammarMasks, grammar_tokenizer
from softbatch.scheduler.model.self_check import LENGTH, Yardstick, measure, self_check, short_windows
from softbatch.scheduler.model.source import ModelError, ModelSource, resolve
from softbatch.scheduler.model.weights import load_weights
from softbatch.scheduler.protocol import EngineConfig, ModelInfo

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Report = Callable[[str, float, str], None]
# Values of --quantization with which weights are those of the model's file.
_NOT_CHANGED = frozenset({"none", NATIVE})


@dataclass(frozen=True)
class Loaded:
    """A model ready to run steps."""

    runner: Runner
    kv_cache: KVCache
    info: ModelInfo


class Phases:
    """Reports each phase of the start with its seconds."""

    def __init__(self, report: Report, since: float) -> None:
        self._report = report
        self._since = since

    def done(self, name: str, detail: str = "") -> None:
        now = time.monotonic()
        self._report(name, now - self._since, detail)
        self._since = now


def load(config: EngineConfig, report: Report, source: ModelSource | None = None) -> Loaded:
    """Load what `config` names; `report(phase, seconds, detail)` follows the progress. `source` is its model where that
    was resolved before. Raises ModelError."""
    with as_model_error():
        return _load(config, report, source)


def _load(config: EngineConfig, report: Report, source: ModelSource | None) -> Loaded:
    phases = Phases(report, config.started_at or time.monotonic())
    phases.done("process", "Python, torch and transformers imported")
    device = _device(config.device)
    _refuse_on_gpu(config, device)
    on_gpu = device.type == "cuda"
    dtype = _dtype(config.dtype, device)
    source = source or _resolve(config, device, dtype)
    refuse_native(config, source)
    phases.done("model files", source.path)
    model, tokenizer = load_transformers(source, dtype, device, config.max_model_len)
    num_parameters = sum(p.numel() for p in model.parameters())
    phases.done("weights", f"{num_parameters:,} parameters in {_name(dtype)}")
    name, backend = choose(device, dtype)
    phases.done("attention kernel", name)

    spec = spec_of(config.served_model_name or source.name, model, tokenizer)
    blocks = native_weights(config, source, model)
    longest = max(Family.of(model.config).length(config.max_model_len), LENGTH)
    yardstick = _measure(model, spec, tokenizer, longest)  # before weights are laid out anew and memory is taken
    phases.done("yardstick", "a short sequence in float32")
    kv_cache, max_model_len = make_cache(config, model, dtype, backend, spec, longest)
    phases.done("KV cache", kv_cache.describe())
    forward, layout = _forward(model, kv_cache, backend, config, longest, blocks)
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
        eos_token_ids=end_tokens(model, tokenizer, config_content(source.path)),
        dtype=_name(dtype),
        device=str(device),
        attention=name,
        num_parameters=num_parameters,
    )
    grammars = GrammarMasks(
        lambda: grammar_tokenizer(tokenizer.backend_tokenizer, info.vocab_size, info.eos_token_ids), info.vocab_size
    )
    runner, found = _checked_runner(model, longest, yardstick, forward, kv_cache, info, config, grammars)
    phases.done("self-check", found)
    if on_gpu:
        graphs, build = with_graphs(
            forward,
            kv_cache,
            make_planner(model, backend, spec),
            max_batch_size=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=max_model_len,
            capturer=CudaCapturer(),
        )
        runner = Runner(graphs, kv_cache, info.spec, config.max_prompt_bytes, build, grammars)
        phases.done("CUDA graphs", graphs.capture_all())
    return Loaded(runner, kv_cache, info)


def _resolve(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> ModelSource:
    """Kernels are compiled while the model is converted and read, but not for one that is refused at a glance."""

    def begin() -> None:
        if device.type == "cpu":
            begin_to_build()

    def accept(found: Any) -> None:
        check_config(found, config.max_model_len)
        refuse_native_file(config, found, dtype)
        begin()

    source = resolve(config.model, accept, config.chat_template)
    begin()
    return source


def load_transformers(
    source: ModelSource, dtype: torch.dtype, device: torch.device, max_model_len: int | None = None
) -> tuple[Any, Any]:
    """The frozen model, set to our attention, and its tokenizer. Raises ModelError."""
    interface.register()
    try:
        config = read_config(source.path)
        check_config(config, max_model_len)
    except ModelError as error:
        raise ModelError(f"--model {source.name}: {error}") from error
    tokenizer = source.tokenizer
    model = load_weights(source.name, source.path, dtype, config=config, attn_implementation="eager")
    _check_vocabulary(source.name, model, tokenizer)
    try:
        model = model.to(device).eval().requires_grad_(False)
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise ModelError(f"--model {source.name}: its weights do not fit the GPU's free memory") from error
    model.set_attn_implementation(interface.ATTENTION_NAME)
    return model, tokenizer


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Requests with a token beyond the embedding are refused one by one; a model that begins or ends each of them so is
    refused here. Raises ModelError."""
    rows = model.get_input_embeddings().weight.shape[0]
    for field in ("bos_token", "eos_token"):
        token = getattr(tokenizer, f"{field}_id")
        if token is not None and token >= rows:
            raise ModelError(
                f"--model {name}: the tokenizer's {field} {getattr(tokenizer, field)!r} is token {token}, but the "
                f"embedding has {rows} rows"
            )
    if len(tokenizer) > rows:
        logger.warning(
            "the tokenizer has %d tokens, the embedding %d rows: the last cannot be used", len(tokenizer), rows
        )


def spec_of(name: str, model: Any, tokenizer: Any) -> ModelSpec:
    """What a soft prompt must fit to be used with this model."""
    family = Family.of(model.config)
    return ModelSpec(
        name=name,
        fingerprint=fingerprint(model, tokenizer),
        hidden_size=model.get_input_embeddings().weight.shape[1],
        num_layers=family.num_layers,
        num_kv_heads=family.num_kv_heads,
        head_dim=family.head_dim,
    )


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
            weights = None if quantization in _NOT_CHANGED else WeightFormat.named(quantization)
            decoder = DecoderForward(model, kv_cache, weights, release=True, longest=longest, blocks=blocks)
            formats = " and ".join(map(str, dict.fromkeys((decoder.weights, decoder.weights_of_long_steps))))
            kinds = f" ({blocks.kinds})" if blocks else ""
            embedding = model.get_input_embeddings().weight.nbytes
            size = f"{decoder.weight_bytes / 1e6:,.0f} MB, embedding {embedding / 1e6:,.0f} MB"
            return decoder, f"packed for the decoder in C++, {formats}{kinds}, {size}"
        except (RuntimeError, MemoryError, ValueError) as error:
            reason = (str(error).splitlines() or ["not enough memory"])[0]
            raise ModelError(f"the weights cannot be laid out (--quantization {quantization}): {reason}") from error
    if quantization not in _NOT_CHANGED:
        raise unsupported_option_error(f"--quantization {quantization}", model, "--quantization none")
    if config.deterministic:
        raise unsupported_option_error("--deterministic", model, "another model, or leave it out")
    if kv_cache.device.type == "cuda":
        forward = make_forward(model, kv_cache, backend, longest)
        return forward, "merged for fused kernels" if isinstance(forward, FusedForward) else "as transformers has it"
    return TransformersForward(model, kv_cache, backend, longest), f"{pack_linears(model)} linear layers packed"


def _measure(model: Any, spec: ModelSpec, tokenizer: Any, longest: int) -> Yardstick:
    """Raises ModelError for an architecture that does not pass through paged attention."""
    with _told_as_architecture(spec.name), short_windows(model, longest):
        return measure(model, spec, tokenizer)


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
    build = partial(build_batch, block_size=size, device=device, joins_ranges=not config.deterministic)
    runner = Runner(forward, kv_cache, info.spec, config.max_prompt_bytes, build, grammars)
    rounded_by = [option for option, _ in _rounding(config)]
    with _told_as_architecture(info.name, bool(rounded_by)), short_windows(model, longest) as window:
        if isinstance(forward, DecoderForward):
            forward.limit_windows(window)
        found = self_check(yardstick, runner, kv_cache.block_size, rounded_by)
    if isinstance(forward, DecoderForward):
        forward.limit_windows(None)
    return runner, found


@contextmanager
def _told_as_architecture(name: str, is_optional: bool = False) -> Iterator[None]:
    """Raises ModelError for what model code and kernels raise where they cannot run a model."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if is_shortage(error):
            raise
        logger.debug("the self-check failed", exc_info=True)
        blamed = "" if is_optional else "this architecture cannot be served: "
        raise ModelError(f"--model {name}: {blamed}{first_line(error)}") from error


def _rounding(config: EngineConfig) -> list[tuple[str, str]]:
    """Options that round more than the dtype does: as they were given, and as they would not."""
    found = []
    for name, value, plain in (
        ("--quantization", "none" if config.quantization in _NOT_CHANGED else config.quantization, "none"),
        ("--kv-cache-dtype", config.kv_cache_dtype, "auto"),
    ):
        if value != plain:
            found.append((f"{name} {value}", f"{name} {plain}"))
    return found


def _refuse_on_gpu(config: EngineConfig, device: torch.device) -> None:
    """Before gigabytes of weights are loaded. Raises ModelError."""
    given = [(f"--quantization {NATIVE}", "--quantization none")] if config.quantization == NATIVE else []
    for option, plain in [*given, *_rounding(config)] if device.type != "cpu" else ():
        raise ModelError(f"{option} takes a CPU: use --device cpu, or {plain}")
    if config.deterministic and device.type != "cpu":
        raise ModelError("--deterministic takes a CPU: use --device cpu, or leave it out")


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

"""Loads a model with everything it needs to run: weights, attention backend, KV cache, and a check of all three."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from softbatch.prompt_store.fingerprint import fingerprint
from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model import transformers_attention as interface
from softbatch.scheduler.model.attention import choose
from softbatch.scheduler.model.attention.backend import AttentionBackend
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import WeightFormat
from softbatch.scheduler.model.cuda.device_memory import is_shortage
from softbatch.scheduler.model.cuda.failures import failures_told
from softbatch.scheduler.model.cuda.fused import FusedForward
from softbatch.scheduler.model.cuda.graphs import CudaCapturer
from softbatch.scheduler.model.cuda.setup import make_forward, make_planner, with_graphs
from softbatch.scheduler.model.forward import Forward, TransformersForward
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.kv_cache_sizing import make_cache
from softbatch.scheduler.model.llama.decoder import DecoderForward, supports, unsupported_option_error
from softbatch.scheduler.model.onednn_linear import pack_linears
from softbatch.scheduler.model.runner import Runner
from softbatch.scheduler.model.self_check import eager_logits, self_check
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


class Phases:
    """Reports each phase of the start with its seconds."""

    def __init__(self, report: Report, since: float) -> None:
        self._report = report
        self._since = since

    def done(self, name: str, detail: str = "") -> None:
        now = time.monotonic()
        self._report(name, now - self._since, detail)
        self._since = now


def load(config: EngineConfig, report: Report) -> Loaded:
    """Load what `config` names; `report(phase, seconds, detail)` follows the progress. Raises ModelError."""
    with failures_told():
        return _load(config, report)


def _load(config: EngineConfig, report: Report) -> Loaded:
    phases = Phases(report, config.started_at or time.monotonic())
    phases.done("process", "Python, torch and transformers imported")
    device = _device(config.device)
    _refuse_rounding_on_gpu(config, device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = False  # in float32 it would round positions, too
    dtype = _dtype(config.dtype, device)
    source = resolve(config.model)
    phases.done("model files", source.path)
    model, tokenizer = load_transformers(source, dtype, device)
    phases.done("weights", f"{sum(p.numel() for p in model.parameters()):,} parameters in {_name(dtype)}")
    name, backend = choose(device, dtype)
    phases.done("attention kernel", name)

    spec = spec_of(config.served_model_name or source.name, model, tokenizer)
    num_parameters = sum(p.numel() for p in model.parameters())
    kv_cache, max_model_len = make_cache(config, model, dtype, backend, spec, _max_model_len(config, model))
    phases.done("KV cache", kv_cache.describe())
    expected = eager_logits(model)  # before the weights are laid out anew
    forward, layout = _forward(model, kv_cache, backend, config.quantization)
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
        eos_token_ids=_eos_token_ids(model, tokenizer),
        dtype=_name(dtype),
        device=str(device),
        attention=name,
        num_parameters=num_parameters,
    )
    runner = _checked_runner(expected, forward, kv_cache, info, config)
    phases.done("self-check", "paged attention agrees with transformers' own")
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
        runner = Runner(graphs, kv_cache, info.spec, config.max_prompt_bytes, build)
        phases.done("CUDA graphs", graphs.capture_all())
    return Loaded(runner, kv_cache, info)


def load_transformers(source: ModelSource, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """The frozen model, set to our attention, and its tokenizer. Raises ModelError."""
    interface.register()
    disable_progress_bar()  # the phases say how far the start has come
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path)
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        logger.debug("loading failed", exc_info=True)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"--model {source.name}: transformers cannot load it: {reason}") from error
    _refuse_unsupported(model)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"--model {source.name}: its tokenizer has no fast version (tokenizer.json)")
    try:
        model = model.to(device).eval().requires_grad_(False)
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise ModelError(f"--model {source.name}: its weights do not fit the GPU's free memory") from error
    model.set_attn_implementation(interface.ATTENTION_NAME)
    return model, tokenizer


def spec_of(name: str, model: Any, tokenizer: Any) -> ModelSpec:
    """What a soft prompt must fit to be used with this model."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    return ModelSpec(
        name=name,
        fingerprint=fingerprint(model, tokenizer),
        hidden_size=model.get_input_embeddings().weight.shape[1],
        num_layers=text.num_hidden_layers,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def _forward(model: Any, kv_cache: KVCache, backend: AttentionBackend, quantization: str) -> tuple[Forward, str]:
    """The fastest way to run this model here, and how its weights lie for it. Raises ModelError."""
    if supports(model, kv_cache.dtype) and build_kernels():
        try:
            weights = None if quantization == "none" else WeightFormat.named(quantization)
            decoder = DecoderForward(model, kv_cache, weights, release=True)
            formats = " and ".join(map(str, dict.fromkeys((decoder.weights, decoder.weights_of_long_steps))))
            return decoder, f"packed for the decoder in C++, {formats}"
        except (RuntimeError, MemoryError, ValueError) as error:
            reason = (str(error).splitlines() or ["not enough memory"])[0]
            raise ModelError(f"the weights cannot be laid out (--quantization {quantization}): {reason}") from error
    if quantization != "none":
        raise unsupported_option_error(f"--quantization {quantization}", model, "--quantization none")
    if kv_cache.device.type == "cuda":
        forward = make_forward(model, kv_cache, backend)
        return forward, "merged for fused kernels" if isinstance(forward, FusedForward) else "as transformers has it"
    return TransformersForward(model, kv_cache, backend), f"{pack_linears(model)} linear layers packed"


def _checked_runner(
    expected: torch.Tensor, forward: Forward, kv_cache: KVCache, info: ModelInfo, config: EngineConfig
) -> Runner:
    runner = Runner(forward, kv_cache, info.spec, config.max_prompt_bytes)
    rounded_by = [option for option, _ in _rounding(config)]
    try:
        self_check(expected, runner, info.vocab_size, kv_cache.block_size, rounded_by)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if is_shortage(error):
            raise
        raise ModelError(f"--model {info.name}: this architecture cannot be served: {error}") from error
    return runner


def _refuse_unsupported(model: Any) -> None:
    config = model.config.get_text_config()
    kind = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"{kind} does not use transformers' attention interface; such models cannot be served")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if layers != {"full_attention"} or window is not None:
        raise ModelError(f"{kind} uses attention that is not full ({', '.join(sorted(layers))}): not supported yet")
    if getattr(config, "attn_logit_softcapping", None):
        raise ModelError(f"{kind} caps attention scores (attn_logit_softcapping): not supported yet")


def _rounding(config: EngineConfig) -> list[tuple[str, str]]:
    """Options that round more than the dtype does: as they were given, and as they would not."""
    found = []
    for name, value, plain in (
        ("--quantization", config.quantization, "none"),
        ("--kv-cache-dtype", config.kv_cache_dtype, "auto"),
    ):
        if value != plain:
            found.append((f"{name} {value}", f"{name} {plain}"))
    return found


def _refuse_rounding_on_gpu(config: EngineConfig, device: torch.device) -> None:
    """Before gigabytes of weights are loaded. Raises ModelError."""
    for option, plain in _rounding(config) if device.type != "cpu" else ():
        raise ModelError(f"{option} takes a CPU: use --device cpu, or {plain}")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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


def _max_model_len(config: EngineConfig, model: Any) -> int:
    text = model.config.get_text_config()
    own = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if config.max_model_len is None:
        return int(own or 4096)
    if own is not None and config.max_model_len > own:
        raise ModelError(f"--max-model-len {config.max_model_len} is more than the model's own {own}")
    return config.max_model_len


def _eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return []
    return sorted(set(eos)) if isinstance(eos, list) else [int(eos)]

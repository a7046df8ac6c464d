"""A model opened for compression: the decoder that trains and measures, and the engine that writes gold answers."""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from softbatch.prompt_store.compression.evaluation.free_answers import Response, Sigma
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder, Kernels
from softbatch.prompt_store.compression.frozen.layer_kinds import windows_of
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.manifest import Manifest, ModelRef, ModelSpec
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, save
from softbatch.scheduler.model.attention import cpu
from softbatch.scheduler.model.cpu.build import is_loaded
from softbatch.scheduler.model.llama.training import DTYPES as DTYPES_WITH_GRADIENTS
from softbatch.scheduler.model.llama.training import behind_prefix_with_gradients, kernels_of
from softbatch.scheduler.model.loader import DTYPES, load_transformers
from softbatch.scheduler.model.model_files import read_config
from softbatch.scheduler.protocol import SoftPromptRef
from softbatch.server.compressions.local_engine import LocalEngine
from softbatch.server.compressions.prepare import ModelFiles

CPU_KERNELS = Kernels(
    attend=behind_prefix_with_gradients, attend_without_gradients=cpu.behind_prefix, of_model=kernels_of
)
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


@dataclass
class CompressionSession:
    """Several copies of the weights while the engine answers: its own have no gradients, and where kernels train, the
    decoder has one more that is transposed. `release_engine` gives the engine's and its KV cache back; whoever asks
    behind that opens it again, which takes `engine_seconds`."""

    decoder: Decoder
    spec: ModelSpec
    stop_ids: frozenset[int]
    engine_seconds: float
    open_engine: Callable[[], LocalEngine] = field(repr=False)
    engine: LocalEngine | None = field(repr=False)

    @classmethod
    def open(cls, files: ModelFiles, context: TokenizedContext, max_prompt_bytes: int) -> CompressionSession:
        """Raises ModelError, or ValueError for a model that cannot be compressed for."""
        windows_of(read_config(files.source.path).get_text_config())  # refuses what could not be trained behind
        _keep_freed_memory()
        open_engine = partial(LocalEngine, files, context.longest, context.max_answer_tokens, max_prompt_bytes)
        began = time.monotonic()
        engine = open_engine()
        seconds = time.monotonic() - began
        info = engine.ready.model
        model, _ = load_transformers(files.source, DTYPES[info.dtype], torch.device(info.device))
        model.set_attn_implementation("eager")  # ours needs a KV cache; the decoder puts its own in its place
        decoder = Decoder(model, info.device, _kernels(info.device, model.dtype))
        return cls(decoder, info.spec, context.renderer.stop_ids, seconds, open_engine, engine)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """data.examples.Generate."""
        return self._opened().generate(prompts, max_tokens, self.stop_ids)

    def respond(self, prompts: list[list[int]], max_tokens: int, sigma: Sigma | None) -> list[Response]:
        """evaluation.free_answers.Respond. σ goes through a file, as one that is served."""
        engine = self._opened()
        if sigma is None:
            return engine.respond(prompts, max_tokens, self.stop_ids, None)
        with tempfile.TemporaryDirectory(prefix="softbatch-sigma-") as directory:
            path = Path(directory) / "sigma.safetensors"
            model = ModelRef(name=self.spec.name, fingerprint=self.spec.fingerprint)
            manifest = Manifest(
                kind=sigma.kind,
                num_virtual_tokens=sigma.length,
                model=model,
                replaces=sigma.replaces,
                source="measuring",
                created_at=0,
            )
            save(SoftPrompt(manifest, **sigma.tensors), path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            ref = SoftPromptRef(digest, str(path), sigma.length, has_keys=sigma.kind == "kv")
            try:
                return engine.respond(prompts, max_tokens, self.stop_ids, ref)
            finally:
                engine.forget(ref)

    def _opened(self) -> LocalEngine:
        if self.engine is None:
            self.engine = self.open_engine()
        return self.engine

    def release_engine(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None
            malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if malloc_trim is not None:
                malloc_trim(0)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _kernels(device: str, dtype: torch.dtype) -> Kernels:
    """The engine has built those of CPUs where that can be done."""
    if device != "cpu" or not is_loaded():
        return Kernels()
    return CPU_KERNELS if dtype in DTYPES_WITH_GRADIENTS else Kernels(attend_without_gradients=cpu.behind_prefix)


def _keep_freed_memory() -> None:
    """Tensors of tens of megabytes come and go all the time in training. By default glibc gives each back to the
    kernel, and taking it anew, page by page, made up half of the teacher's time where page faults are dear."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

"""What is read of a model before its weights are, and the one place that says what a valid compression is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from softbatch.prompt_store.compression.frozen.rendering import Renderer
from softbatch.scheduler.model.source import ModelSource, resolve
from softbatch.server.compressions.request import (
    CompressionRequest,
    InputError,
    ModelChoice,
    ModelShape,
    check_context,
    check_length,
    check_room,
)


@dataclass(frozen=True)
class ModelFiles:
    """A model by what stands beside its weights: resolved once, its tokenizer and its config read once."""

    choice: ModelChoice
    source: ModelSource
    tokenizer: Any
    shape: ModelShape

    @classmethod
    def open(cls, choice: ModelChoice) -> ModelFiles:
        """Raises ModelError, or OSError or ValueError when transformers cannot read the files."""
        source = resolve(choice.model)
        shape = ModelShape.of(AutoConfig.from_pretrained(source.path))
        return cls(choice, source, AutoTokenizer.from_pretrained(source.path), shape)

    @property
    def name(self) -> str:
        """What manifests call the model."""
        return self.choice.served_model_name or self.source.name

    def check_text(self, text: str, param: str) -> None:
        """Raises TemplateError for a text with a token that the model does not have."""
        Renderer(self.tokenizer, vocab_size=self.shape.vocab_size).check(text, param)

    def count_tokens(self, context: str, instruction: str | None) -> int:
        """Length of the turn that a soft prompt of this context stands for. Raises TemplateError."""
        return len(Renderer(self.tokenizer, instruction).context(context))


@dataclass(frozen=True)
class PreparedRun:
    """A compression with its model's files open and its context counted: all that a run needs to begin."""

    request: CompressionRequest
    model: ModelFiles
    context_tokens: int

    @classmethod
    def of(cls, request: CompressionRequest, model: ModelFiles) -> PreparedRun:
        """Of a request that was checked before. Raises TemplateError."""
        return cls(request, model, model.count_tokens(request.context, request.settings.instruction))

    @classmethod
    def checked(
        cls, request: CompressionRequest, model: ModelFiles, directory: Path, max_prompt_bytes: int
    ) -> PreparedRun:
        """Raises InputError or TemplateError."""
        settings = request.settings
        tokens = check_compression(
            request,
            model.shape,
            lambda: model.count_tokens(request.context, settings.instruction),
            model.check_text,
            directory,
            max_prompt_bytes,
        )
        return cls(request, model, tokens)


def check_compression(
    request: CompressionRequest,
    shape: ModelShape,
    count_tokens: Callable[[], int],
    check_text: Callable[[str, str], None],
    directory: Path,
    max_prompt_bytes: int,
) -> int:
    """Everything that can be said against it once its model's shape is known; returns the context's tokens.

    The context is tokenised last, because it may be long. Raises InputError, and what `count_tokens` and
    `check_text`, which is told the field, raise.
    """
    settings = request.settings
    check_context(request.context)
    for index, question in enumerate(request.questions):
        for field in ("input", "output"):
            text = getattr(question, field)
            if text is not None and not text.strip():
                raise InputError(f"questions.{index}.{field}", f"questions.{index}.{field}: it must not be blank")
            check_text(text or "", f"questions.{index}.{field}")
    check_text(settings.instruction or "", "instruction")
    check_room(directory, shape, settings, request.questions, max_prompt_bytes)
    check_text(request.context, "context")
    tokens = count_tokens()
    check_length(tokens, settings, shape.max_positions)
    return tokens

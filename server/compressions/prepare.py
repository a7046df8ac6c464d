"""A compression with its model's files open and its context tokenised: what stands before the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softbatch.prompt_store.compression.frozen.layer_kinds import windows_of
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.template import TemplateError
from softbatch.scheduler.model.model_files import check_config, read_config
from softbatch.scheduler.model.source import ModelSource, resolve
from softbatch.server.compressions.checks import check_compression
from softbatch.server.compressions.request import CompressionRequest, InputError, ModelChoice, ModelShape


@dataclass(frozen=True)
class ModelFiles:
    """A model by what stands beside its weights: resolved once, its tokenizer and its config read once."""

    choice: ModelChoice
    source: ModelSource
    tokenizer: Any
    shape: ModelShape

    @classmethod
    def open(cls, choice: ModelChoice) -> ModelFiles:
        """Raises ModelError."""
        source = resolve(choice.model, lambda config: check_config(config, None), choice.chat_template)
        return cls(choice, source, source.tokenizer, _shape_of(source))

    @classmethod
    def served(cls, choice: ModelChoice, tokenizer: Any) -> ModelFiles:
        """Of the model that a server runs, which has resolved it and read its tokenizer."""
        source = ModelSource(choice.model, choice.served_model_name or choice.model)
        return cls(choice, source, tokenizer, _shape_of(source))

    @property
    def name(self) -> str:
        """What manifests call the model."""
        return self.choice.served_model_name or self.source.name

    def context(self, text: str, instruction: str | None, max_answer_tokens: int) -> TokenizedContext:
        """A text as this model reads it."""
        shape = self.shape
        return TokenizedContext(
            self.tokenizer, text, instruction, max_answer_tokens, shape.max_positions, shape.vocab_size
        )


def _shape_of(source: ModelSource) -> ModelShape:
    return ModelShape.of(read_config(source.path))


@dataclass(frozen=True)
class PreparedRun:
    """All that a run needs to begin. Nobody behind it resolves the model, reads its tokenizer or tokenises the context
    again."""

    request: CompressionRequest
    model: ModelFiles
    context: TokenizedContext

    @classmethod
    def of(cls, request: CompressionRequest, model: ModelFiles) -> PreparedRun:
        """Of a request that was checked before."""
        settings = request.settings
        return cls(request, model, model.context(request.context, settings.instruction, settings.max_answer_tokens))

    @classmethod
    def checked(
        cls, request: CompressionRequest, model: ModelFiles, directory: Path, max_prompt_bytes: int
    ) -> PreparedRun:
        """Raises InputError or TemplateError."""
        prepared = cls.of(request, model)
        try:
            windows_of(read_config(model.source.path).get_text_config())
        except ValueError as error:
            raise InputError("model", f"model: {model.name}: {error}") from None
        try:
            check_compression(request, model.name, model.shape, prepared.context, directory, max_prompt_bytes)
        except TemplateError as error:
            if error.code != "no_chat_template":
                raise
            raise InputError(
                "model",
                f"model: {model.name} has no chat template that shows what a user says, and compression asks its "
                "questions through one: give one with --chat-template FILE, or put it beside config.json as "
                "chat_template.jinja",
                code=error.code,
            ) from None
        return prepared

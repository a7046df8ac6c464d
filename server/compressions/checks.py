"""Everything that a model can say against a compression before its weights are loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.frozen.rendering import Renderer
from softbatch.prompt_store.compression.frozen.tokenized_context import QUESTION_ROOM, TokenizedContext
from softbatch.prompt_store.template import TemplateError
from softbatch.server.compressions.limits import MIB
from softbatch.server.compressions.request import CompressionRequest, InputError, ModelShape

# σ in float32 lies on disk up to this often at once: the checkpoint (σ and Adam's two moments), its successor while
# that is being written, the finished file and that of a preview, and the store's copies of both.
COPIES_ON_DISK = 10
# A user's question, with its answer: in the request, among all questions and in the training data, while that is
# being written and once more beside the report.
TEXTS_ON_DISK = 6


def check_compression(
    request: CompressionRequest,
    model_name: str,
    shape: ModelShape,
    context: TokenizedContext,
    directory: Path,
    max_prompt_bytes: int,
) -> None:
    """The one place that says whether a request and a model go together. The context is tokenised last, because it may
    be long. Raises InputError or TemplateError."""
    settings = request.settings
    if request.name == model_name:
        raise InputError("name", f"name: {model_name} is the model's own name; choose another one", code="name_taken")
    check_tokens(request, context.renderer)
    check_room(directory, shape, settings, request.questions, max_prompt_bytes)
    check_window(settings, shape.max_positions)
    try:
        tokens = context.num_tokens
    except TemplateError:
        raise
    except ValueError as error:
        raise InputError("answer_tokens", f"answer_tokens: {error}") from None
    check_length(tokens, settings)
    try:
        context.check_questions(request.questions)
    except ValueError as error:
        raise InputError("questions", str(error)) from None


def check_tokens(request: CompressionRequest, renderer: Renderer) -> None:
    """Raises TemplateError for an instruction or a question with a token that the model does not have."""
    renderer.check(request.settings.instruction or "", "instruction")
    for index, question in enumerate(request.questions):
        renderer.check(question.input, f"questions.{index}.input")
        renderer.check(question.output or "", f"questions.{index}.output")


def check_window(settings: CompressionSettings, window: int | None) -> None:
    """Raises InputError when the model's `window` has no room behind the soft prompt."""
    if window is None:
        return
    most = window - QUESTION_ROOM - settings.max_answer_tokens
    if most < 2:
        raise InputError(
            "answer_tokens",
            f"answer_tokens: {settings.max_answer_tokens} leave no room in the model's window of {window} tokens",
        )
    if settings.virtual_tokens > most:
        raise InputError(
            "virtual_tokens",
            f"{settings.virtual_tokens} virtual tokens leave no room for a question and its answer in the model's "
            f"window of {window} tokens; {most} are the most",
        )


def check_length(context_tokens: int, settings: CompressionSettings) -> None:
    """Raises InputError when there is nothing to compress."""
    if settings.virtual_tokens > context_tokens:
        raise InputError(
            "virtual_tokens",
            f"{settings.virtual_tokens} virtual tokens are more than the context's {context_tokens} tokens; "
            f"choose fewer than {context_tokens}",
        )


def sigma_bytes(shape: ModelShape, settings: CompressionSettings) -> int:
    """Bytes of σ in float32."""
    per_token = shape.elements_per_token if settings.kind == "kv" else shape.hidden_size
    return 4 * per_token * settings.virtual_tokens


def check_room(
    directory: Path,
    shape: ModelShape,
    settings: CompressionSettings,
    questions: Sequence[Example],
    max_prompt_bytes: int,
) -> None:
    """Raises InputError when the soft prompt would be too large for the store, or it and what the run keeps for
    resuming, the user's own `questions` included, for the disk under it."""
    size = sigma_bytes(shape, settings)
    if size + MIB > max_prompt_bytes:
        raise InputError(
            "virtual_tokens",
            f"{settings.virtual_tokens} virtual tokens of kind {settings.kind} take {size / MIB:.0f} MiB, more than "
            f"the {max_prompt_bytes / MIB:g} MiB that a soft prompt may have; choose fewer, or raise --max-prompt-mib "
            "(with --server the server's)",
            code="too_large",
        )
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    answers = settings.questions + settings.held_out + len(questions)
    # Of the teacher, kept for resuming, and its successor while that is being written.
    states = 2 * 4 * shape.hidden_size * answers * settings.max_answer_tokens
    texts = TEXTS_ON_DISK * sum(len((one.input + (one.output or "")).encode()) for one in questions)
    needed = COPIES_ON_DISK * size + states + texts + 16 * MIB
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            "prompt_store",
            f"not enough disk space for the prompt store: {free / MIB:.0f} MiB are free, {needed / MIB:.0f} MiB needed",
            code="disk_full",
        )

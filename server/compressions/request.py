"""What a compression is asked to do, and every check that can be made before any work is done."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.examples import DataError, Example, load_jsonl
from softbatch.prompt_store.compression.frozen.context import QUESTION_ROOM

MIB = 1 << 20
MAX_CONTEXT_BYTES = 8 * MIB
# The manifest of a soft prompt keeps the instruction; longer texts do not fit there.
MAX_INSTRUCTION_CHARS = 4096
# σ in float32 lies on disk up to this often at once: the checkpoint (σ and Adam's two moments), its successor while
# that is being written, the finished file, and the store's copy of it.
COPIES_ON_DISK = 8
# A user's question, with its answer: in the request, among all questions and in the training data, while that is
# being written and once more beside the report.
TEXTS_ON_DISK = 6


class InputError(Exception):
    """Something asked for cannot be done; the message says what would be right, `param` names the field."""

    def __init__(self, param: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelChoice(msgspec.Struct, frozen=True):
    """Which model to load and how; the fields mean what they mean in EngineConfig."""

    model: str
    served_model_name: str | None = None
    dtype: str = "auto"
    device: str = "auto"


class CompressionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A compression as its directory keeps it, so that another process can take it up."""

    name: str
    context: str
    settings: CompressionSettings
    questions: tuple[Example, ...]
    choice: ModelChoice
    store: str
    max_prompt_bytes: int


@dataclass(frozen=True)
class ModelShape:
    """What the size of σ and of the context's KV depends on."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    max_positions: int | None = None
    vocab_size: int | None = None

    @property
    def elements_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """From a transformers config."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            num_layers=text.num_hidden_layers,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            hidden_size=text.hidden_size,
            max_positions=getattr(text, "max_position_embeddings", None),
            vocab_size=getattr(text, "vocab_size", None),
        )


def make_settings(**given: Any) -> CompressionSettings:
    """CompressionSettings of what is not None; its defaults stand for the rest. Raises InputError."""
    known = {name: value for name, value in given.items() if value is not None}
    try:
        settings = CompressionSettings(**known)
    except ValueError as error:
        param = str(error).split()[0]
        raise InputError(param, str(error)) from None
    if settings.instruction is not None and len(settings.instruction) > MAX_INSTRUCTION_CHARS:
        raise InputError("instruction", f"instruction is longer than {MAX_INSTRUCTION_CHARS} characters")
    return settings


def read_context(path: Path) -> str:
    """The text of a context file. Raises InputError when it is no text, empty or too large."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONTEXT_BYTES + 1)
    except OSError as error:
        raise InputError("context", f"{path}: {error.strerror}") from None
    if len(content) > MAX_CONTEXT_BYTES:
        raise InputError("context", f"{path}: larger than the {MAX_CONTEXT_BYTES // MIB} MiB that a context may have")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            "context", f"{path}: not a UTF-8 text file (byte {error.start} cannot be read); convert it to text first"
        ) from None
    try:
        check_context(text)
    except InputError as error:
        raise InputError("context", f"{path}: {error}") from None
    return text


def check_context(text: str) -> None:
    """Raises InputError."""
    if not text.strip():
        raise InputError("context", "the context is empty; give the text that is to be compressed")
    if "\0" in text:
        raise InputError("context", "the context is not text: it contains a NUL byte")


def read_questions(path: Path) -> tuple[Example, ...]:
    """The user's own questions. Raises InputError naming the line at fault."""
    try:
        return tuple(as_users(load_jsonl(path)))
    except OSError as error:
        raise InputError("questions", f"{path}: {error.strerror}") from None
    except DataError as error:
        raise InputError("questions", str(error)) from None


def as_users(examples: Sequence[Example]) -> list[Example]:
    """However they were made, as a user's own they are trained on and never held out."""
    return [replace(example, kind="user", source="user", cut=False) for example in examples]


def check_length(context_tokens: int, settings: CompressionSettings, window: int | None) -> None:
    """Raises InputError when there is nothing to compress, or the model's `window` has no room behind the soft
    prompt."""
    most = context_tokens if window is None else window - QUESTION_ROOM - settings.max_answer_tokens
    if most < 2:
        raise InputError(
            "answer_tokens",
            f"answer_tokens: {settings.max_answer_tokens} leave no room in the model's window of {window} tokens",
        )
    if window is not None and settings.virtual_tokens > most:
        raise InputError(
            "virtual_tokens",
            f"{settings.virtual_tokens} virtual tokens leave no room for a question and its answer in the model's "
            f"window of {window} tokens; {most} are the most",
        )
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

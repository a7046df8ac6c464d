"""What a compression is asked to do, by a command, over HTTP or from Python; its texts are checked here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.context_text import ContextTextError, clean_context, decode_context
from softbatch.prompt_store.compression.data.examples import MAX_EXAMPLES, MAX_TEXT, DataError, Example, load_jsonl
from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.kept_text import DEFAULT_RECALL, KeptText, check_kept
from softbatch.scheduler.model.family import Family
from softbatch.server.compressions.limits import MAX_CONTEXT_BYTES, MIB

DIRECTORY = ".compressions"  # in a prompt store
_MADE = ("model", "template")  # what a compression calls the source of its own questions
LOCK = "lock"  # in it, of the server that runs the compressions; and in each one's directory


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
    chat_template: str | None = None


class CompressionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A compression as its directory keeps it, so that another process can take it up."""

    name: str
    context: str
    settings: CompressionSettings
    questions: tuple[Example, ...]
    choice: ModelChoice
    store: str
    max_prompt_bytes: int
    recall: int | None = None
    preview: bool = False

    @property
    def kept(self) -> KeptText | None:
        """The context, where a number of passages to recall is given: it is then kept with the soft prompt."""
        return None if self.recall is None else KeptText(text=self.context, recall=self.recall)


@dataclass(frozen=True)
class ModelShape:
    """What the size of σ and of the context's KV depends on; beyond `max_positions` positions may turn otherwise."""

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
        """From a transformers config. Raises ModelError."""
        family = Family.of(config)
        return cls(
            num_layers=family.num_layers,
            num_kv_heads=family.num_kv_heads,
            head_dim=family.head_dim,
            hidden_size=family.hidden_size,
            max_positions=family.of_one_kind,
            vocab_size=getattr(config.get_text_config(), "vocab_size", None),
        )


def make_settings(**given: Any) -> CompressionSettings:
    """CompressionSettings of what is not None; its defaults stand for the rest. Raises InputError."""
    known = {name: value for name, value in given.items() if value is not None}
    try:
        return CompressionSettings(**known)
    except ValueError as error:
        param = str(error).split()[0]
        raise InputError(param, str(error)) from None


def make_request(
    *,
    name: str,
    context: str,
    settings: CompressionSettings,
    questions: Sequence[Example],
    choice: Callable[[], ModelChoice],
    store: Path | str,
    max_prompt_bytes: int,
    keep_text: bool = False,
    recall: int | None = None,
    preview: bool = False,
) -> CompressionRequest:
    """A request whose texts can be used. The model is asked for behind that: a server's may be starting. Raises
    InputError, and what `choice` raises."""
    if name == LOCK:
        raise InputError("name", f"name: {LOCK} is what a server's own file is called there; choose another one")
    try:
        context = clean_context(context)
    except ContextTextError as error:
        raise InputError("context", str(error)) from None
    if len(questions) > MAX_EXAMPLES:
        raise InputError("questions", f"questions: more than {MAX_EXAMPLES}")
    for index, question in enumerate(questions):
        for field in ("input", "output"):
            text = getattr(question, field)
            if text is not None and not (text.strip() and len(text) <= MAX_TEXT):
                param = f"questions.{index}.{field}"
                raise InputError(param, f"{param}: it must have 1 to {MAX_TEXT} characters that are not blank")
        if not all(text.strip() for text in question.accept):
            param = f"questions.{index}.accept"
            raise InputError(param, f"{param}: a text that answers must contain cannot be blank")
    if recall is not None and not keep_text:
        raise InputError("recall", "recall: passages are recalled of a kept text alone; ask for that too (keep_text)")
    passages = (DEFAULT_RECALL if recall is None else recall) if keep_text else None
    if passages is not None:
        try:
            check_kept(KeptText(text=context, recall=passages))
        except SoftPromptError as error:
            param = "recall" if error.param == "recall" else "keep_text"
            raise InputError(param, f"{param}: {error}") from None
    return CompressionRequest(
        name=name,
        context=context,
        settings=settings,
        questions=tuple(questions),
        choice=choice(),
        store=str(store),
        max_prompt_bytes=max_prompt_bytes,
        recall=passages,
        preview=preview,
    )


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
        return decode_context(content)
    except ContextTextError as error:
        raise InputError("context", f"{path}: {error}") from None


def read_questions(path: Path) -> tuple[Example, ...]:
    """The user's own questions. Raises InputError naming the line at fault."""
    try:
        return tuple(as_users(load_jsonl(path)))
    except OSError as error:
        raise InputError("questions", f"{path}: {error.strerror}") from None
    except DataError as error:
        raise InputError("questions", str(error)) from None


def as_users(examples: Sequence[Example]) -> list[Example]:
    """However they were made, as a user's own they are trained on and never held out, unless they say what is right:
    then they are for measuring alone. What another compression made says that of its own accord, and with it the part
    of its context that the model was shown; neither is the user's word."""
    return [
        replace(
            example,
            kind="user",
            source="user",
            cut=False,
            accept=() if example.source in _MADE else example.accept,
            passage="",
        )
        for example in examples
    ]

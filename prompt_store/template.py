"""Chat turns -> the text that follows a soft prompt; training and serving share it.

A soft prompt that replaces the system turn stands for a prefix of the rendered chat that ends behind the
context. Where that prefix ends is found by rendering the model's own chat template with placeholders, so no
template needs to be known here.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jinja2

from softbatch.prompt_store.manifest import Replaces

Messages = Sequence[Mapping[str, Any]]
Placement = Literal["turn", "user", "nowhere"]
_SYSTEM_ROLES = ("system", "developer")
_SEPARATOR = "\n\n"


class TemplateError(ValueError):
    """Messages the model's chat template cannot render. `param` names the field at fault; `code` is
    invalid_messages or no_chat_template."""

    def __init__(self, message: str, *, param: str = "messages", code: str = "invalid_messages") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def render_chat(
    tokenizer: Any,
    messages: Messages,
    add_generation_prompt: bool = True,
    replaces: Replaces | None = None,
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The text to tokenise without adding special tokens.

    With `replaces` None or 'nothing' the whole rendering. With 'system' what comes after the system turn, as
    the soft prompt stands for all before: no BOS, no system turn, no default system turn. What the messages say in
    system turns at their front then goes to the front of the first user turn. `messages` are
    {"role", "content"} with text content; which roles may follow which is up to the template. `fields` are what else
    the template is given, such as tools; a soft prompt stands for what it writes without them.
    Raises TemplateError.
    """
    _check_messages(messages)
    if replaces != "system":
        return _render(tokenizer, messages, add_generation_prompt, fields)
    messages = _instructions_to_user(messages)
    placement = _placement(tokenizer)
    placeholder = secrets.token_hex(16)
    prefix = _prefix(tokenizer, placeholder, placement)
    rendered = _render(tokenizer, _with_context(messages, placeholder, placement), add_generation_prompt, fields)
    # Compared by position, so nothing a user writes is ever taken for the placeholder.
    if not rendered.startswith(prefix):
        raise TemplateError("the chat template leaves the soft prompt no place in front of these messages")
    return rendered[len(prefix) :]


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the template ends an assistant's turn with; None if it ends in text, or there is none."""
    mark = secrets.token_hex(16)
    try:
        rendered = _render(tokenizer, [_turn("user", "x"), _turn("assistant", mark)], False)
    except TemplateError:
        return None
    _, found, tail = rendered.rpartition(mark)
    if not found:  # dropped or changed: what stands there may be anything, a BOS too
        return None
    ending = tokenizer.encode(tail.lstrip(), add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *_added_specials(tokenizer)}
    return int(ending[0]) if ending and ending[0] in special else None


def _added_specials(tokenizer: Any) -> list[int]:
    """Marked special in the vocabulary, whether or not a role of the tokenizer's config names them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [index for index, token in added.items() if getattr(token, "special", False)]


def context_turn(tokenizer: Any, context: str, instruction: str | None = None) -> str:
    """The text a soft prompt that replaces 'system' stands for: BOS and the system turn with the context.

    The instruction, if any, comes before the context. For every template
    `context_turn(t, c) + render_chat(t, messages, replaces="system")` is the rendering of the messages with a
    system turn c in front; a template without system turns gets c at the head of the first user turn.
    Raises TemplateError.
    """
    text = f"{instruction}{_SEPARATOR}{context}" if instruction else context
    if not text.strip():
        raise TemplateError("context: it must not be empty", param="context")
    return _prefix(tokenizer, text, _placement(tokenizer))


def _instructions_to_user(messages: Messages) -> Messages:
    """Without system turns at the front: the soft prompt has their place, and the first user turn begins with them."""
    count = next((at for at, message in enumerate(messages) if message["role"] not in _SYSTEM_ROLES), len(messages))
    rest, texts = messages[count:], [text for message in messages[:count] if (text := message["content"].strip())]
    if not texts:
        if not rest:
            raise TemplateError("messages: a user's turn is needed behind the system turn")
        return rest
    if rest and rest[0]["role"] == "user":
        texts.append(rest[0]["content"])
        rest = rest[1:]
    return [_turn("user", _SEPARATOR.join(texts)), *rest]


def _placement(tokenizer: Any) -> Placement:
    """Where this template puts a system turn: 'turn', a turn of its own; 'user', written into the first user
    turn; 'nowhere', refused, dropped, or moved behind earlier turns (as some of Mistral's templates do)."""
    system, user, answer, last = (secrets.token_hex(16) for _ in range(4))
    chat = [_turn("user", user), _turn("assistant", answer), _turn("user", last)]
    try:
        rendered = _render(tokenizer, [_turn("system", system), *chat], True)
    except TemplateError as error:
        if error.code == "no_chat_template":
            raise
        return "nowhere"
    if not 0 <= rendered.find(system) < rendered.find(user):
        return "nowhere"
    try:
        alone = _render(tokenizer, [_turn("system", system)], False)
    except TemplateError:
        return "user"
    return "turn" if system in alone and rendered.startswith(alone) else "user"


def _prefix(tokenizer: Any, text: str, placement: Placement) -> str:
    """The rendering of `text` as context, up to the end of its turn or, in a user's turn, to their words."""
    if placement == "turn":
        return _render(tokenizer, [_turn("system", text)], False)
    user = secrets.token_hex(16)
    rendered = _render(tokenizer, _with_context([_turn("user", user)], text, placement), False)
    head, found, _ = rendered.partition(user)
    if not found:
        raise TemplateError("the model's chat template drops the user's turn", code="no_chat_template")
    return head


def _with_context(messages: Messages, text: str, placement: Placement) -> list[Mapping[str, Any]]:
    if placement != "nowhere":
        return [_turn("system", text), *messages]
    first = messages[0]
    if first["role"] != "user":
        raise TemplateError(
            "messages.0.role: with this model's chat template the first message must be the user's",
            param="messages.0.role",
        )
    return [{**first, "content": f"{text}{_SEPARATOR}{first['content']}"}, *messages[1:]]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _render(
    tokenizer: Any,
    messages: Messages,
    add_generation_prompt: bool,
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    if not tokenizer.chat_template:
        raise TemplateError(
            "the model has no chat template; send a plain prompt instead of messages", code="no_chat_template"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **fields,
            )
        )
    except jinja2.TemplateError as error:
        raise TemplateError(f"the model's chat template refuses these messages: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError):
        raise TemplateError("the model's chat template cannot render these messages") from None


def _check_messages(messages: Messages) -> None:
    if not messages:
        raise TemplateError("messages: at least one message is needed")
    for number, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise TemplateError(
                    f"messages.{number}.{field}: it must be a string", param=f"messages.{number}.{field}"
                )

"""What people write is text: a control token that it spells out, such as the end of a turn, does not become one."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from softbatch.prompt_store.template import Messages, TemplateError, render_chat

_LAST = 0xFFFF


class ControlTokens:
    """Owns which tokens of a tokenizer only its chat template may write.

    `quote` replaces each one that a text spells out by an unguessable stand-in, with which the text can go through
    any template. `encode` makes ordinary tokens of the stand-ins. A text without control tokens is not changed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        names = _control_tokens(tokenizer)[:_LAST]
        self._secret = secrets.token_hex(12)
        self._names = names
        self._stand_ins = {name: self._stand_in(index) for index, name in enumerate(names)}
        self._control = _any_of(names)
        self._quoted = re.compile(self._secret + "([0-9a-f]{4})")
        self._normalised = self._normalised_names()

    def quote(self, text: str) -> str:
        if self._control is None:
            return text
        quoted = self._control.sub(lambda found: self._stand_ins[found[0]], text)
        if quoted == text and self._normalised is not None:
            # Other spellings too, e.g. full-width letters, if the tokenizer looks for the token behind its normaliser.
            normalised = self._backend.normalizer.normalize_str(text)
            if self._normalised.search(normalised):
                start = len(text) - len(text.lstrip())
                quoted = text[:start] + self._stand_in(_LAST) + text[start:]
        return quoted

    def quote_turns(self, messages: Messages) -> list[dict[str, Any]]:
        return [
            {key: value if key == "role" else self.quote_all(value) for key, value in message.items()}
            for message in messages
        ]

    def quote_all(self, value: Any) -> Any:
        """Every text in a JSON value, keys too."""
        if isinstance(value, str):
            return self.quote(value)
        if isinstance(value, Mapping):
            return {self.quote(key): self.quote_all(one) for key, one in value.items()}
        return [self.quote_all(one) for one in value] if isinstance(value, list | tuple) else value

    def has_quotes(self, text: str) -> bool:
        return self._secret in text

    def unquote(self, text: str) -> str:
        return self._quoted.sub(lambda found: self._name(int(found[1], 16)), text)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Control tokens for those that are not quoted, ordinary tokens for all quotes. Raises TemplateError if the
        tokenizer cannot do that."""
        if not self.has_quotes(text):
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        tokenizer, markers = self._renamed
        marked = text if self._control is None else self._control.sub(lambda found: markers[found[0]], text)
        ids: list[int] = tokenizer.encode(self.unquote(marked), add_special_tokens=add_special_tokens).ids
        return ids

    def _stand_in(self, index: int) -> str:
        return f"{self._secret}{index:04x}"

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else ""

    def _normalised_names(self) -> re.Pattern[str] | None:
        normalizer = self._backend.normalizer
        added = self._backend.get_added_tokens_decoder().values()
        names = [token.content for token in added if token.normalized and token.content in self._stand_ins]
        return _any_of(normalizer.normalize_str(name) for name in names) if normalizer is not None else None

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str]]:
        """The same tokenizer with unguessable names for its control tokens, so that to it their old names are text like
        any other; all else is cut and merged as before."""
        # The first and last characters stay, as tokens beside it may ask whether their neighbour is part of a word.
        markers = {name: f"{name[0]}{secrets.token_hex(12)}{name[-1]}" for name in self._names}
        try:
            state = json.loads(self._backend.to_str())
            _rename(state, markers)
            tokenizer = Tokenizer.from_str(json.dumps(state))
        except Exception as error:  # what tokenizers raises has no narrower type
            raise self._refusal() from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for name, marker in markers.items():
            ids = tokenizer.encode(marker, add_special_tokens=False).ids
            if self._backend.token_to_id(name) not in ids or tokenizer.token_to_id(name) is not None:
                raise self._refusal()
        return tokenizer, markers

    def _refusal(self) -> TemplateError:
        return TemplateError("the text contains a control token of the model, which its tokenizer cannot read as text")


def _control_tokens(tokenizer: Any) -> list[str]:
    """The tokens marked special, and of the others those that look like marks and that the chat template writes: some
    vocabularies do not mark them."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    named = set(tokenizer.all_special_tokens)
    special = {token.content for token in added if token.special or token.content in named}
    others = {token.content for token in added} - special
    marks = [name for name in others if _looks_like_a_mark(name.strip())]
    if marks:
        written = _written_by_template(tokenizer)
        special.update(name for name in marks if name in written)
    return sorted(name for name in special if name.strip())


def _looks_like_a_mark(name: str) -> bool:
    """As <start_of_turn> or [INST], unlike words and runs of spaces, which are tokens in ordinary text too."""
    ends = name[:1] + name[-1:]
    return any(map(str.isalnum, name)) and not any(map(str.isalnum, ends))


def _written_by_template(tokenizer: Any) -> str:
    texts = (secrets.token_hex(16) for _ in range(8))
    user, answer = ({"role": role, "content": next(texts)} for role in ("user", "assistant"))
    system = {"role": "system", "content": next(texts)}
    written = []
    for chat in ([user], [user, answer, user], [system, user]):
        try:
            written.append(render_chat(tokenizer, chat))
        except TemplateError:
            continue
    return "\n".join(written)


def _rename(state: dict[str, Any], names: Mapping[str, str]) -> None:
    """In a tokenizer.json. Ids stay, for they follow from the order."""
    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): index for token, index in vocab.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if names.keys().isdisjoint(_tokens_of(merge))]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])


def _tokens_of(merge: str | list[str]) -> tuple[str, str, str]:
    """The two that it joins, and what it makes of them."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """Finds the first, and of those that begin there the longest, as tokenizers do; None if there are no names."""
    known = {name for name in names if name}
    return re.compile(_branches(known)) if known else None


def _branches(names: Iterable[str]) -> str:
    """A tree by first characters: a plain list of a thousand reserved tokens would be tried one by one."""
    tails: dict[str, set[str]] = {}
    for name in names:
        if name:
            tails.setdefault(name[0], set()).add(name[1:])
    branches = "|".join(re.escape(head) + _branches(rest) for head, rest in tails.items())
    may_end = "" in names
    if len(tails) == 1 and not may_end:
        return branches
    return f"(?:{branches}){'?' if may_end else ''}" if tails else ""

"""`softbatch chat`: talk with a running server in the terminal, through a soft prompt or without one."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from softbatch.server.cli.server_client import ServerClient
from softbatch.server.cli.settings_flags import UsageError, settings_from
from softbatch.server.request_failures import printable

NO_SOFT_PROMPT = ("", "-", "none")
HELP = """\
/soft-prompt NAME   answer through this soft prompt from now on (/soft-prompt none: without one)
/prompts            the soft prompts that the server has
/system TEXT        an instruction before everything (/system alone: none)
/temperature T      0 always takes the likeliest token
/max-tokens N       the most tokens of an answer
/retry              the last answer once more
/new                forget the conversation
/exit               leave (also Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Conversation:
    """What has been said, and how the next answer is asked for. It owns nothing of the terminal."""

    client: ServerClient
    soft_prompt: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)  # of the last answer

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer's pieces as they come; what had come is kept when whoever reads them stops.

        Raises UsageError if it fails. A question without an answer is forgotten.
        """
        self.messages.append({"role": "user", "content": question})
        answer = ""
        try:
            for event in self.client.stream("/v1/chat/completions", self._body()):
                self.usage = event.get("usage") or {}
                for choice in event.get("choices", ()):
                    if piece := choice["delta"].get("content"):
                        answer += piece
                        yield piece
        except UsageError:
            answer = ""
            raise
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def retry(self) -> str | None:
        """Takes back the last question, with its answer."""
        while self.messages:
            if (last := self.messages.pop())["role"] == "user":
                return last["content"]
        return None

    def _body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        fields = {"model": self.soft_prompt, "temperature": self.temperature, "max_tokens": self.max_tokens}
        return {
            "messages": [*system, *self.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        } | {name: value for name, value in fields.items() if value is not None}


def run(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
        client = ServerClient(options.server, next(iter(settings.api_key), None))
        conversation = Conversation(client, max_tokens=options.max_tokens, temperature=options.temperature)
        conversation.system = options.system
        model = client.call("GET", "/info")[1].get("model_id")
        if options.soft_prompt is not None:
            _name_soft_prompt(conversation, options.soft_prompt)
        if sys.stdin.isatty():
            _import_line_editing()
            print(f"{printable(str(model))} at {options.server}; /help lists the commands, Ctrl-D leaves")
        return _talk(conversation)
    except UsageError as error:
        print(f"softbatch chat: {error}", file=sys.stderr)
        return 2


def _talk(conversation: Conversation) -> int:
    """Until there are no more lines; from a file or a pipe each is a question, and the first failure ends it."""
    interactive = sys.stdin.isatty()
    while (line := _read_line(conversation, interactive)) is not None:
        try:
            if line.startswith("/"):
                if not _obey(conversation, line):
                    return 0
            elif line.strip():
                _answer(conversation, line)
        except UsageError as error:
            if not interactive:
                raise
            print(error, file=sys.stderr)
    return 0


def _read_line(conversation: Conversation, interactive: bool) -> str | None:
    if not interactive:
        return line.rstrip("\n") if (line := sys.stdin.readline()) else None
    try:
        return input(f"{conversation.soft_prompt or ''}> ")
    except EOFError:
        print()
        return None


def _answer(conversation: Conversation, question: str) -> None:
    """Print the answer as it comes, then what it took."""
    started, first = time.monotonic(), None
    pieces = conversation.ask(question)
    try:
        for piece in pieces:
            first = first or time.monotonic()
            print(_shown(piece), end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        pieces.close()
        print("\n(stopped)")
        return
    print()
    if sys.stdin.isatty() and first is not None:
        print(_dim(_cost(conversation.usage, first - started, time.monotonic() - first)))


def _cost(usage: dict[str, Any], waited: float, took: float) -> str:
    generated, prompt = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
    pace = f", {(generated - 1) / took:.0f} tokens/s" if generated > 1 and took > 0 else ""
    return f"{prompt} tokens read, {generated} written; the first after {waited:.2f} s{pace}"


def _shown(text: str) -> str:
    """What a model writes must not steer the terminal."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def _dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def _obey(conversation: Conversation, line: str) -> bool:
    """Whether the conversation goes on. Raises UsageError for a command that is none."""
    command, _, value = line.strip().partition(" ")
    value = value.strip()
    if command in ("/exit", "/quit", "/bye"):
        return False
    if command not in _COMMANDS:
        raise UsageError(f"{command} is no command; /help lists them")
    _COMMANDS[command](conversation, value)
    return True


def _name_soft_prompt(conversation: Conversation, name: str) -> None:
    if name in NO_SOFT_PROMPT:
        conversation.soft_prompt = None
        return
    names = _names(conversation.client)
    if name not in names:
        known = f"it has {', '.join(names)}" if names else "it has none; `softbatch compress` makes one"
        raise UsageError(f"the server has no soft prompt {name!r}: {known}")
    conversation.soft_prompt = name


def _names(client: ServerClient) -> list[str]:
    return [str(entry["name"]) for entry in client.call("GET", "/v1/soft_prompts")[1]["data"]]


def _print_names(conversation: Conversation, _: str) -> None:
    print("\n".join(_names(conversation.client)) or "none; `softbatch compress` makes one")


def _set_temperature(conversation: Conversation, value: str) -> None:
    try:
        conversation.temperature = float(value) if value else None
    except ValueError:
        raise UsageError(f"/temperature {value}: give a number, such as 0.7") from None


def _set_max_tokens(conversation: Conversation, value: str) -> None:
    if value and not (value.isascii() and value.isdigit()):
        raise UsageError(f"/max-tokens {value}: give a whole number, such as 200")
    conversation.max_tokens = int(value) if value else None


def _set_system(conversation: Conversation, value: str) -> None:
    conversation.system = value or None


def _retry(conversation: Conversation, _: str) -> None:
    question = conversation.retry()
    if question is None:
        raise UsageError("/retry: nothing has been asked yet")
    _answer(conversation, question)


def _import_line_editing() -> None:
    """Arrow keys and a history of lines for `input`."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


_COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/help": lambda *_: print(HELP),
    "/soft-prompt": _name_soft_prompt,
    "/prompts": _print_names,
    "/system": _set_system,
    "/temperature": _set_temperature,
    "/max-tokens": _set_max_tokens,
    "/retry": _retry,
    "/new": lambda conversation, _: conversation.messages.clear(),
}

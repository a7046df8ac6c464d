"""What an output must follow, as the client says it, and the grammar that the sampler obeys."""

from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
from tokenizers import Tokenizer

import softbatch
from softbatch.server.request_failures import GrammarsUnavailable, InvalidGrammar, QueueFull

logger = logging.getLogger(__name__)
FormatKind = Literal["json_schema", "regex", "choice", "grammar"]
# Some grammars take hours to compile, and no limit of the library's sees them coming.
COMPILE_SECONDS = 5.0
START_SECONDS = 60.0
REMEMBER_SECONDS = 60.0
MAX_CHECKS = 16
MAX_KNOWN = 256
MAX_KNOWN_CHARS = 8 << 20
# A model that is unsure of itself writes blanks without end if a schema allows them.
JSON_WHITESPACE = r"[ \n\r\t]{0,32}"
PROJECT = Path(softbatch.__file__).resolve().parents[1]  # where `-m softbatch…` finds the code
Key = tuple[FormatKind, str, str]


@dataclass(frozen=True)
class OutputFormat:
    """`text` is the schema, expression or grammar as sent, or a JSON list of choices; `param` is the field's name.
    `parts` are what it was made of: if it cannot be compiled, the one at fault is named. `begun` is what there is
    already of the text that must follow it."""

    kind: FormatKind
    text: str
    param: str
    parts: tuple[OutputFormat, ...] = ()
    begun: str = ""

    def behind(self, text: str) -> OutputFormat:
        """The same of an answer that begins with this text. JSON may have blanks before it."""
        return replace(self, begun=text.lstrip(" \n\r\t") if self.kind == "json_schema" else text)


class CheckerSettings(msgspec.Struct, frozen=True):
    """What the checking process is started with: a tokenizer as JSON text, and which of its tokens matter."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int]


class CheckReply(msgspec.Struct, frozen=True):
    """The grammar, or the reason why there is none."""

    grammar: str | None = None
    reason: str = ""


class GrammarCompiler:
    """Turns output formats into grammars that the engine can compile in bounded time and memory.

    Owns a process that tries each of them once. One that takes too long is killed with it; others wait for that, so
    that there is a bound on how many wait, and what was too complex is known for a while.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._settings = CheckerSettings(tokenizer.to_str(), vocab_size, list(eos_token_ids))
        self._process: asyncio.subprocess.Process | None = None
        self._known: OrderedDict[Key, tuple[CheckReply, float]] = OrderedDict()
        self._known_chars = 0
        self._checks: dict[Key, asyncio.Task[CheckReply]] = {}
        self._turn = asyncio.Lock()

    async def compile(self, wanted: OutputFormat) -> str:
        """Raises InvalidGrammar, QueueFull or GrammarsUnavailable."""
        if not self._settings.eos_token_ids:
            raise InvalidGrammar(
                f"{wanted.param}: this model has no end token to end such an output with", param=wanted.param
            )
        key = (wanted.kind, wanted.text, wanted.begun)
        reply, until = self._known.get(key, (None, 0.0))
        if reply is None or until < time.monotonic():
            reply = await asyncio.shield(self._check_of(key))
        if reply.grammar is None:
            until = time.monotonic() + COMPILE_SECONDS
            for part in wanted.parts:
                if time.monotonic() > until:
                    break
                await self.compile(part)
            raise InvalidGrammar(f"{wanted.param}: {reply.reason}", param=wanted.param)
        return reply.grammar

    def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None

    def _check_of(self, key: Key) -> asyncio.Task[CheckReply]:
        """Requests of one format share a check, which goes on when they leave."""
        check = self._checks.get(key)
        if check is None:
            if len(self._checks) >= MAX_CHECKS:
                raise QueueFull("too many output formats are being compiled; try again later", retry_after=5)
            check = self._checks[key] = asyncio.create_task(self._check(key))
            check.add_done_callback(partial(self._ended, key))
        return check

    def _ended(self, key: Key, check: asyncio.Task[CheckReply]) -> None:
        del self._checks[key]
        if not check.cancelled():
            check.exception()  # known to whoever still waits; asyncio complains of one that nobody has looked at

    async def _check(self, key: Key) -> CheckReply:
        async with self._turn:
            until = math.inf
            try:
                await self._ensure_process()
                async with asyncio.timeout(COMPILE_SECONDS):
                    reply = await self._exchange(key)
            except TimeoutError:
                self.close()
                reason = f"too complex: no grammar was made of it in {COMPILE_SECONDS:g} seconds; simplify it"
                reply, until = CheckReply(reason=reason), time.monotonic() + REMEMBER_SECONDS
            except (asyncio.IncompleteReadError, OSError):
                self.close()
                reason = "too complex: compiling it took too much memory; simplify it"
                reply, until = CheckReply(reason=reason), time.monotonic() + REMEMBER_SECONDS
            except BaseException:
                self.close()
                raise
        self._remember(key, reply, until)
        return reply

    def _remember(self, key: Key, reply: CheckReply, until: float) -> None:
        self._forget(key)
        self._known[key] = (reply, until)
        self._known_chars += _size(key, reply)
        while len(self._known) > 1 and (len(self._known) > MAX_KNOWN or self._known_chars > MAX_KNOWN_CHARS):
            self._forget(next(iter(self._known)))

    def _forget(self, key: Key) -> None:
        if key in self._known:
            reply, _ = self._known.pop(key)
            self._known_chars -= _size(key, reply)

    async def _ensure_process(self) -> None:
        """Raises GrammarsUnavailable."""
        if self._process is not None and self._process.returncode is None:
            return
        try:
            async with asyncio.timeout(START_SECONDS):
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "softbatch.server.requests.grammar_checker"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=PROJECT,
                )
                await self._exchange(self._settings)
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            self.close()
            logger.exception("output formats cannot be compiled")
            raise GrammarsUnavailable from error

    async def _exchange(self, message: object) -> CheckReply:
        """One message out, one reply in, each behind its length."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        content = msgspec.msgpack.encode(message)
        self._process.stdin.write(len(content).to_bytes(4, "big") + content)
        await self._process.stdin.drain()
        size = int.from_bytes(await self._process.stdout.readexactly(4), "big")
        return msgspec.msgpack.decode(await self._process.stdout.readexactly(size), type=CheckReply)


def _size(key: Key, reply: CheckReply) -> int:
    return len(key[1]) + len(key[2]) + len(reply.grammar or reply.reason)

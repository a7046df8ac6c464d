"""What an output must follow, as the client says it, and the grammar that the sampler obeys."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from tokenizers import Tokenizer

from softbatch.server.request_failures import InvalidGrammar

FormatKind = Literal["json_schema", "regex", "choice", "grammar"]
# Some grammars take hours to compile, and no limit of the library's sees them coming.
COMPILE_SECONDS = 5.0
START_SECONDS = 60.0
MAX_KNOWN = 256


@dataclass(frozen=True)
class OutputFormat:
    """`text` is the schema, expression or grammar as sent, or a JSON list of choices; `param` is the field's name."""

    kind: FormatKind
    text: str
    param: str


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

    Owns a process that tries each of them once: one that takes too long is killed, and nobody else waits for it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._settings = CheckerSettings(tokenizer.to_str(), vocab_size, list(eos_token_ids))
        self._process: asyncio.subprocess.Process | None = None
        self._known: OrderedDict[tuple[str, str], CheckReply] = OrderedDict()
        self._lock = asyncio.Lock()

    async def compile(self, wanted: OutputFormat) -> str:
        """Raises InvalidGrammar. What took too long may be tried again: the machine may have been busy."""
        key = (wanted.kind, wanted.text)
        reply = self._known.get(key)
        if reply is None:
            async with self._lock:
                reply = self._known.get(key) or await self._check(wanted)
            self._known[key] = reply
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        if reply.grammar is None:
            raise InvalidGrammar(f"{wanted.param}: {reply.reason}", param=wanted.param)
        return reply.grammar

    def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None

    async def _check(self, wanted: OutputFormat) -> CheckReply:
        try:
            if self._process is None:
                async with asyncio.timeout(START_SECONDS):
                    await self._start()
            async with asyncio.timeout(COMPILE_SECONDS):
                return await self._exchange([wanted.kind, wanted.text])
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            self.close()
            message = f"too complex: no grammar was made of it in {COMPILE_SECONDS:g} seconds; simplify it"
            raise InvalidGrammar(f"{wanted.param}: {message}", param=wanted.param) from None
        except BaseException:  # a caller that leaves now would leave its reply for the next one to read
            self.close()
            raise

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "softbatch.server.requests.grammar_checker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=1 << 24,
        )
        await self._exchange(self._settings)

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

"""A process that compiles one output format after another, and may be killed while it does."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

import msgspec
from llguidance import LLMatcher, LLTokenizer, grammar_from
from tokenizers import Tokenizer

from softbatch.scheduler.model.sampling.grammar import GrammarError, begin, compile_grammar, grammar_tokenizer
from softbatch.server.requests.output_format import JSON_WHITESPACE, CheckerSettings, CheckReply, FormatKind, Key
from softbatch.server.requests.schema_formats import without_other_formats

# What one grammar may need beside the tokenizer.
MAX_BYTES = 2 << 30
MAX_CPU_SECONDS = 30
NICE = 5


def main() -> None:
    """Read settings, then (kind, text) after another from standard input until it ends."""
    # The whole group gets these; the server still has requests to finish, and ends this process then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICE)
    inbox, outbox = sys.stdin.buffer, sys.stdout.buffer
    settings = msgspec.msgpack.decode(_read(inbox), type=CheckerSettings)
    tokenizer = Tokenizer.from_str(settings.tokenizer)
    tokens = grammar_tokenizer(tokenizer, settings.vocab_size, settings.eos_token_ids)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    _write(outbox, CheckReply())
    while content := _read(inbox):
        # A server that was killed does not end a compilation; the kernel does.
        spent = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent.ru_utime + spent.ru_stime) + MAX_CPU_SECONDS, -1))
        kind, text, begun = msgspec.msgpack.decode(content, type=Key)
        _write(outbox, check(tokens, settings.vocab_size, kind, text, begun))


def check(tokens: LLTokenizer, vocab_size: int, kind: FormatKind, text: str, begun: str = "") -> CheckReply:
    """The grammar, if it can be followed at all, and behind what is begun."""
    try:
        grammar = _grammar_of(json.loads(text)) if kind == "json_schema" else grammar_from(kind, text)
        begin(compile_grammar(tokens, grammar, vocab_size), tokens, begun)
    except RecursionError:
        return CheckReply(reason="it is nested too deeply")
    except (GrammarError, ValueError) as error:
        return CheckReply(reason=_reason(" ".join(str(error).split())))
    return CheckReply(grammar)


def _grammar_of(schema: Any) -> str:
    if schema is False:
        raise GrammarError("false allows nothing at all")
    schema = json.dumps({} if schema is True else without_other_formats(schema))
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_WHITESPACE})


def _reason(said: str) -> str:
    if "NoExtensionBias" in said:  # what the library says of rules without an end
        return "it refers to itself without end, so that nothing can follow it"
    return said.replace("Unimplemented keys", "these words are not enforced here") or "it cannot be read"


def _read(inbox: BinaryIO) -> bytes:
    return inbox.read(int.from_bytes(inbox.read(4), "big"))


def _write(outbox: BinaryIO, reply: CheckReply) -> None:
    content = msgspec.msgpack.encode(reply)
    outbox.write(len(content).to_bytes(4, "big") + content)
    outbox.flush()


if __name__ == "__main__":
    main()

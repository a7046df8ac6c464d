"""Feeds one parser with bytes that atheris makes, led by what they reach: `python -m tests.fuzz.parsers NAME SEEDS`.

Anything but the parser's own errors ends the process, and leaves the input in the working directory. Options behind the
folder of seeds are libFuzzer's, such as -max_total_time=60 and -rss_limit_mb=2048.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["softbatch"], enable_loader_override=False):
    import pydantic
    from tokenizers import Tokenizer

    from softbatch.prompt_store.compression.data.context_text import ContextTextError, decode_context
    from softbatch.prompt_store.peft import CONFIG_NAME, import_peft, looks_like_peft_zip
    from softbatch.prompt_store.soft_prompt_file import SoftPromptError, load
    from softbatch.scheduler.model.sampling.grammar import grammar_tokenizer
    from softbatch.server.requests.grammar_checker import check
    from softbatch.server.schemas.chat import ChatCompletionRequest
    from softbatch.server.schemas.completions import CompletionRequest
    from softbatch.server.schemas.compressions import CompressionRequestBody
    from softbatch.server.schemas.generate import CompatGenerateRequest
    from softbatch.server.schemas.score import ScoreRequest

from tests.support.soft_prompt_samples import MAX_BYTES, SPEC, byte_tokenizer

FOLDER = Path(os.environ.get("TMPDIR", "/tmp"))
BODIES = (ChatCompletionRequest, CompletionRequest, CompressionRequestBody, CompatGenerateRequest, ScoreRequest)


def soft_prompt(content: bytes) -> None:
    with contextlib.suppress(SoftPromptError):
        load(_file(content, "prompt"), MAX_BYTES)


def peft(content: bytes) -> None:
    """A config, a line feed, and the weights."""
    config, _, weights = content.partition(b"\n")
    files = [_file(config, CONFIG_NAME), _file(weights, "adapter_model.safetensors")]
    with contextlib.suppress(SoftPromptError):
        import_peft(files, SPEC, MAX_BYTES)


def archive(content: bytes) -> None:
    path = _file(content, "adapter.zip")
    if not looks_like_peft_zip(path):
        return
    with contextlib.suppress(SoftPromptError):
        import_peft(path, SPEC, MAX_BYTES)


def body(content: bytes) -> None:
    for model in BODIES:
        try:
            model.model_validate_json(content)
        except pydantic.ValidationError as error:
            error.errors()


def context(content: bytes) -> None:
    with contextlib.suppress(ContextTextError):
        decode_context(content)


def grammar(content: bytes) -> None:
    """A schema, a regular expression, or a grammar, as its first byte says."""
    kinds: tuple[Any, ...] = ("json_schema", "regex", "grammar")
    try:
        text = content[1:].decode()
    except UnicodeDecodeError:
        return
    tokens, size = _tokens()
    check(tokens, size, kinds[sum(content[:1]) % 3], text)


@functools.cache
def _tokens() -> tuple[Any, int]:
    tokenizer: Tokenizer = byte_tokenizer().backend_tokenizer
    size = tokenizer.get_vocab_size()
    return grammar_tokenizer(tokenizer, size, [0]), size


def _file(content: bytes, name: str) -> Path:
    path = FOLDER / f"{os.getpid()}-{name}" if name != CONFIG_NAME else FOLDER / name
    path.write_bytes(content)
    return path


PARSERS: dict[str, Callable[[bytes], None]] = {
    parser.__name__: parser for parser in (soft_prompt, peft, archive, body, context, grammar)
}


def main() -> None:
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options], PARSERS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()

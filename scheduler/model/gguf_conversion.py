"""GGUF files as directories of bfloat16 safetensors, each made once and known by the file's whole content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from softbatch.prompt_store.atomic_files import lock, process_directory, replacing
from softbatch.scheduler.model.gguf_metadata import IN_CONFIG, GgufFile, complete_config
from softbatch.scheduler.model.gguf_tensors import GgufTensors
from softbatch.scheduler.model.gguf_tokenizer import save_tokenizer
from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.model_files import first_line, reason

logger = logging.getLogger(__name__)
_MAGIC = b"GGUF"
# Raised when the same file would become another directory.
_VERSION = 3
# A file that changed so shortly before it was read may change again without a new time stamp.
_SETTLED_SECONDS = 2.0
# Keys of files that were read before, and locks of those that are converted.
_NOTES = ".keys"
_GPT_OSS = "gpt-oss"  # whose experts have other names for transformers, and whose yarn it reads wrongly
# A file names one of the tokens at which its answers end.
_ENDS_OF_GPT_OSS = ("<|return|>", "<|call|>", "<|endoftext|>")


def is_gguf(path: Path) -> bool:
    """By how the file begins: programs that keep models under the hash of their content give them no suffix."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def converted(gguf: Path, cache: Path, accept: Callable[[Any], None]) -> Path:
    """The directory made from a GGUF file: written aside, then renamed into the cache. `accept` is asked before any
    conversion. Raises ModelError."""
    try:
        return _converted(gguf, cache, accept)
    except ModelError as error:
        raise ModelError(f"--model {gguf.name}: {error}") from None


def _converted(gguf: Path, cache: Path, accept: Callable[[Any], None]) -> Path:
    key, seen = _content_key(gguf, cache)
    target = cache / f"{gguf.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    file = GgufFile(gguf)
    config = _read_config(gguf, file)
    accept(config)
    try:
        with _alone(cache, key):
            if not (target / "config.json").is_file():  # another process has made it meanwhile
                logger.info("converting %s, once: the result is kept in %s", gguf.name, target)
                began = time.monotonic()
                with process_directory(cache, ".converting-") as aside:
                    _convert(gguf, file, config, aside)
                    if _stat_of(gguf) != seen:
                        raise ModelError("the file changed while it was converted: start again")
                    aside.rename(target)
                logger.info("converted in %.1f s", time.monotonic() - began)
    except OSError as error:
        if not (target / "config.json").is_file():  # otherwise another process was quicker
            raise ModelError(f"cannot write the converted model to {target}: {error.strerror}") from error
    return target


@contextlib.contextmanager
def _alone(cache: Path, key: str) -> Iterator[None]:
    """Waits until no other process converts the same file: two would take twice the memory."""
    notes = cache / _NOTES
    notes.mkdir(parents=True, exist_ok=True)
    with (notes / f"{key}.lock").open("ab") as file:
        try:
            lock(file)
        except BlockingIOError:
            logger.info("waiting for another process that converts the same file")
            lock(file, wait=True)
        except OSError:
            logger.debug("the file system has no locks", exc_info=True)
        yield


def _content_key(path: Path, cache: Path) -> tuple[str, list[int]]:
    """The hash of the whole content, and the file's stat that it goes with. It is remembered with all that changes when
    the file does, so that only the first start reads many gigabytes for it."""
    stat = path.stat()
    seen = _stat_fields(stat)
    note = cache / _NOTES / hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if (known["version"], known["seen"]) == (_VERSION, seen):
            return str(known["key"]), seen
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(str(_VERSION).encode())
    key = digest.hexdigest()[:16]
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS and _stat_of(path) == seen:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            with replacing(note) as written:
                written.write_text(json.dumps({"version": _VERSION, "seen": seen, "key": key}), encoding="utf-8")
        except OSError:
            logger.debug("the key is not remembered", exc_info=True)
    return key, seen


def _stat_of(path: Path) -> list[int]:
    return _stat_fields(path.stat())


def _stat_fields(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_config(gguf: Path, file: GgufFile) -> Any:
    from transformers import AutoConfig

    try:
        if file.architecture == _GPT_OSS:
            from softbatch.scheduler.model.gguf_gpt_oss import config_of  # with torch

            config = config_of(file, GgufTensors(gguf))
        else:
            config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # of many kinds: a field's type, what a config computes of its fields
        raise ModelError(f"transformers cannot read its metadata: {reason(error, 'config')}") from error
    try:
        complete_config(config, file)
    except ModelError:
        raise
    except Exception as error:  # of many kinds: any field may be of any type
        raise ModelError(f"its metadata cannot be read: {type(error).__name__}: {first_line(error)}") from error
    return config


def _convert(gguf: Path, file: GgufFile, config: Any, target: Path) -> None:
    if file.architecture == _GPT_OSS:
        _convert_gpt_oss(gguf, file, config, target)
    else:
        _convert_by_transformers(gguf, file, config, target)


def _convert_gpt_oss(gguf: Path, file: GgufFile, config: Any, target: Path) -> None:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from softbatch.scheduler.model.gguf_gpt_oss import convert

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        save_tokenizer(tokenizer, file.of_tokenizer, target)
        convert(GgufTensors(gguf), config, target)
        known = tokenizer.get_vocab()
        ends = {known[token] for token in _ENDS_OF_GPT_OSS if token in known} | {config.eos_token_id}
        GenerationConfig(eos_token_id=sorted(ends - {None}) or None).save_pretrained(str(target))
    except ModelError:
        raise
    except Exception as error:  # of many kinds: a reader's, numpy's, torch's
        raise ModelError(f"it cannot be converted: {first_line(error)}") from error


def _convert_by_transformers(gguf: Path, file: GgufFile, config: Any, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from softbatch.scheduler.model.weights import load_weights

    options = {"gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), trust_remote_code=False, **options)
        save_tokenizer(tokenizer, file.of_tokenizer, target)  # first: minutes before the weights of a large file
        model = load_weights(
            gguf.name,
            str(gguf.parent),
            torch.float32,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            **options,
        )
    except ModelError:
        raise
    except Exception as error:  # of many kinds: a reader's, numpy's, transformers' own
        raise ModelError(f"transformers cannot convert it: {first_line(error)}") from error
    _refuse_left_out(model, file)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    # save_pretrained refuses a model that came from GGUF; an empty one with the same weights is saved instead.
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(str(target))


def _refuse_left_out(model: Any, file: GgufFile) -> None:
    """transformers passes over tensors that it has no name for."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    from softbatch.scheduler.model.weights import refuse_other_weights

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
    named = get_gguf_hf_weights_map(model, processor).keys() | IN_CONFIG
    # The stacked weights of experts are bare parameters in transformers: its names for them have no suffix.
    left_out = [name for name in file.tensor_names if not {name, name.removesuffix(".weight")} & named]
    refuse_other_weights(model, {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": left_out})

"""How a GGUF file's vocabulary cuts, begins and ends texts, where transformers leaves that out or may do otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.model_files import load_tokenizer

# What the file says about its tokenizer under a name; None where it says nothing.
Said = Callable[[str], Any]
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Contractions in any case, a sign or a space with the word behind it, digits, signs with the line's end, and spaces.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS_ALONE = _WORDS.replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+")
_SIGN = "[" + re.escape("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + "]"
# By tokenizer.ggml.pre: expressions that cut a text one after the other, each what the ones before have left whole.
# A digit that is cut out first leaves spaces before it to themselves: a run of them is one token, not two.
_DIGITS_FIRST = (r"\p{N}", _GPT2)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    _SIGN + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_CUTS: dict[str, tuple[str, ...]] = {
    "codeshell": _DIGITS_FIRST,
    "command-r": _DIGITS_FIRST,
    "exaone": _DIGITS_FIRST,
    "minerva-7b": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "chatglm-bpe": (_WORDS % r"\p{N}{1,3}",),
    "glm4": (_WORDS % r"\p{N}{1,3}",),
    "hunyuan": (_WORDS % r"\p{N}",),
    "solar-open": (_WORDS % r"\p{N}",),
    "stablelm2": (_WORDS % r"\p{N}",),
    "seed-coder": (_SIGNS_ALONE % r"\p{N}",),
    "minicpm5": (r"\p{N}{1,3}", _WORDS % r"\p{N}+"),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ),
    "deepseek-v3": _DEEPSEEK_V3,
    "hunyuan-dense": _DEEPSEEK_V3,
    "joyai-llm": _DEEPSEEK_V3,
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Of kinds that are in neither of these transformers has the expression, or cuts as GPT-2 does without a word.
_CUT_AS_GPT2 = frozenset(
    {
        "a.x-4.0",
        "exaone4",
        "gigachat",
        "gpt-2",
        "granite-docling",
        "jais",
        "mellum",
        "modern-bert",
        "mpt",
        "olmo",
        "phi-2",
        "trillion",
    }
)

_SPACE = "▁"  # as vocabularies of SentencePiece write it
# Of transformers; it takes all from tokenizer.json.
_PLAIN_CLASS = "PreTrainedTokenizerFast"


def refuse_unknown_cut(said: Said) -> None:
    """Raises ModelError where text would be cut otherwise than the vocabulary was made for."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    cut = said("pre")
    known = {*_CUTS, *_CUT_AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS}
    if said("model") == "gpt2" and cut is not None and cut not in known:
        raise ModelError(f"the file says tokenizer.ggml.pre = {cut!r}, a way to cut text that is not supported")


def save_tokenizer(tokenizer: Any, said: Said, target: Path) -> None:
    """As transformers makes it of the file, but for what it leaves out. Raises ModelError where what is then read from
    there is another."""
    backend = tokenizer.backend_tokenizer
    is_changed = True
    if said("model") == "gpt2" and said("pre") in _CUTS:
        backend.pre_tokenizer = _cut(_CUTS[said("pre")])
    elif said("model") == "llama" and said("add_space_prefix") is False and _puts_space_first(backend):
        _put_no_space_first(backend)
    else:
        is_changed = False
    tokenizer.save_pretrained(str(target))
    if is_changed:  # classes of one family bring a way to cut of their own
        file = target / "tokenizer_config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content | {"tokenizer_class": _PLAIN_CLASS}, indent=2), encoding="utf-8")
    read = load_tokenizer(str(target))
    if is_changed and str(read.backend_tokenizer.pre_tokenizer) != str(backend.pre_tokenizer):
        raise ModelError(f"the file says tokenizer.ggml.pre = {said('pre')!r}, but transformers cuts otherwise")
    check_tokenizer(read, said)


def _cut(expressions: tuple[str, ...]) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    steps = [Split(Regex(expression), behavior="isolated") for expression in expressions]
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


def _puts_space_first(backend: Any) -> bool:
    return "".join(backend.encode("a", add_special_tokens=False).tokens).startswith(_SPACE)


def _put_no_space_first(backend: Any) -> None:
    """Spaces stay as many as they are, in both directions."""
    from tokenizers import decoders, normalizers

    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])


def check_tokenizer(tokenizer: Any, said: Said) -> None:
    """Whether texts begin and end as the file says. Raises ModelError."""
    backend = tokenizer.backend_tokenizer
    ids = backend.encode("a", add_special_tokens=True)
    does = {
        "add_bos_token": ids.ids[:1] == [said("bos_token_id")],
        "add_eos_token": ids.ids[-1:] == [said("eos_token_id")],
    }
    if said("model") == "llama":
        does["add_space_prefix"] = _puts_space_first(backend)
    for name, is_so in does.items():
        # Gemma 4's template writes the first token, whatever the file says.
        if said(name) is not None and said(name) != is_so and said("model") != "gemma4":
            made = "makes one that does" if is_so else "makes one that does not"
            raise ModelError(f"the file says tokenizer.ggml.{name} = {said(name)!r}, but transformers {made}")

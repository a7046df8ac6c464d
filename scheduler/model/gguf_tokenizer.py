"""How a GGUF file's vocabulary cuts, begins and ends texts, where transformers leaves that out or may do otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.model_files import load_tokenizer

# What the file says about its tokenizer under a name; None where it says nothing.
Said = Callable[[str], Any]
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# By tokenizer.ggml.pre: expressions that cut a text one after the other, each what the ones before have left whole.
# A digit that is cut out first leaves spaces before it to themselves: a run of them is one token, not two.
_DIGITS_FIRST = (r"\p{N}", _GPT2)
_CUTS: dict[str, tuple[str, ...]] = {
    "codeshell": _DIGITS_FIRST,
    "command-r": _DIGITS_FIRST,
    "exaone": _DIGITS_FIRST,
    "minerva-7b": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Of kinds that are in neither of these transformers has the expression, or cuts as GPT-2 does without a word.
_CUT_AS_GPT2 = frozenset(
    {
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
    does_cut = said("model") == "gpt2" and said("pre") in _CUTS
    if does_cut:
        tokenizer.backend_tokenizer.pre_tokenizer = _cut(_CUTS[said("pre")])
    tokenizer.save_pretrained(str(target))
    if does_cut:  # classes of one family bring a way to cut of their own
        file = target / "tokenizer_config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content | {"tokenizer_class": _PLAIN_CLASS}, indent=2), encoding="utf-8")
    read = load_tokenizer(str(target))
    if does_cut and str(read.backend_tokenizer.pre_tokenizer) != str(tokenizer.backend_tokenizer.pre_tokenizer):
        raise ModelError(f"the file says tokenizer.ggml.pre = {said('pre')!r}, but transformers cuts otherwise")
    check_tokenizer(read, said)


def _cut(expressions: tuple[str, ...]) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    steps = [Split(Regex(expression), behavior="isolated") for expression in expressions]
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


def check_tokenizer(tokenizer: Any, said: Said) -> None:
    """Whether texts begin and end as the file says. Raises ModelError."""
    backend = tokenizer.backend_tokenizer
    ids, alone = (backend.encode("a", add_special_tokens=special) for special in (True, False))
    does = {
        "add_bos_token": ids.ids[:1] == [said("bos_token_id")],
        "add_eos_token": ids.ids[-1:] == [said("eos_token_id")],
    }
    if said("model") == "llama":
        does["add_space_prefix"] = "".join(alone.tokens).startswith("▁")
    for name, is_so in does.items():
        # Gemma 4's template writes the first token, whatever the file says.
        if said(name) is not None and said(name) != is_so and said("model") != "gemma4":
            made = "makes one that does" if is_so else "makes one that does not"
            raise ModelError(f"the file says tokenizer.ggml.{name} = {said(name)!r}, but transformers {made}")

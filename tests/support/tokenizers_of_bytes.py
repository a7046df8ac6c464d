"""Small tokenizers of the two kinds that write any byte: byte-level, and byte fallback as Llama 2's."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from softbatch.server.requests.detokenizer import BYTE_OF

WORDS = ("hello", "world", "café", "日本", "🙂")


def byte_level() -> Tokenizer:
    alphabet = sorted(BYTE_OF, key=BYTE_OF.__getitem__)
    merges: list[tuple[str, str]] = []
    vocab = {char: index for index, char in enumerate(alphabet)}
    of_byte = {byte: char for char, byte in BYTE_OF.items()}
    for word in (" the", " caf", *WORDS):
        chars = [of_byte[byte] for byte in word.encode()]
        grown = chars[0]
        for char in chars[1:]:
            if grown + char not in vocab:
                vocab[grown + char] = len(vocab)
                merges.append((grown, char))
            grown += char
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer)


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """Without `strip` as Gemma's."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helowrdcaf,", "é", "日", "▁▁"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = [("▁", "▁")]
    for word in ("▁hello", "▁world"):
        grown = word[0]
        for char in word[1:]:
            if grown + char not in vocab:
                vocab[grown + char] = len(vocab)
                merges.append((grown, char))
            grown += char
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return _with_added(tokenizer)


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<extra>", special=False, normalized=False)])
    return tokenizer


CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    names = {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names)

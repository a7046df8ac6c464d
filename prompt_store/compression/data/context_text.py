"""What counts as a context's text, whether it comes as a file's bytes or as a string."""

from __future__ import annotations

import codecs
import re

# How files of other kinds begin; those that look like text are the dangerous ones.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"%PDF-", "a PDF"),
    (b"{\\rtf", "an RTF document"),
    (b"%!PS", "a PostScript document"),
    (b"PK\x03\x04", "a zip archive (Word, Excel, EPUB and OpenDocument files are such archives)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"GGUF", "a GGUF model"),
    (b"OggS", "an Ogg file"),
    (b"wOF2", "a font"),
    (b"ID3", "an MP3 file"),
)
# These beginnings occur in texts as well; the byte behind them decides.
_ALSO_WORDS = {
    b"BZh": re.compile(rb"BZh[1-9]1AY&SY"),
    b"ID3": re.compile(rb"ID3[\x02-\x04]"),
    b"GGUF": re.compile(rb"GGUF.\0"),
}
# Longest first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNPRINTABLE = re.compile("[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f\ufffd]")
_MOST_UNPRINTABLE = 0.1  # of a text's characters; logs and terminals' copies have some


class ContextTextError(ValueError):
    """What cannot be a context's text, and what would be right."""


def decode_context(content: bytes) -> str:
    """A file's text: UTF-8, or another UTF that its byte order mark names. Raises ContextTextError."""
    _refuse_other_kinds(content.lstrip(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else content)
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return clean_context(content.decode(encoding))
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise ContextTextError(
            f"not a {name} text file (byte {error.start} cannot be read); convert it to text first"
        ) from None


def clean_context(text: str) -> str:
    """The text as it is compressed: no byte order marks, which also stand between files that were put together, and
    lines that end in a line feed. Raises ContextTextError."""
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip().strip("\u200b"):
        raise ContextTextError("the context is empty; give the text that is to be compressed")
    if "\0" in text:
        raise ContextTextError("the context is not text: it contains a NUL byte; if it is UTF-16, save it as UTF-8")
    try:
        _refuse_other_kinds(text[:64].encode())
        text.encode()
    except UnicodeEncodeError as error:
        raise ContextTextError(
            f"the context is not text: character {error.start} is half of a surrogate pair"
        ) from None
    unprintable = len(_UNPRINTABLE.findall(text))
    if unprintable > _MOST_UNPRINTABLE * len(text):
        raise ContextTextError(
            f"the context is not text: {unprintable} of its {len(text)} characters are control or replacement "
            "characters; convert it to text first"
        )
    return text


def _refuse_other_kinds(content: bytes) -> None:
    head = content[:64].lstrip(b" \t\r\n")
    for magic, kind in _MAGIC:
        if head.startswith(magic) and (magic not in _ALSO_WORDS or _ALSO_WORDS[magic].match(head)):
            raise ContextTextError(f"the context is {kind}, not text; extract its text first")

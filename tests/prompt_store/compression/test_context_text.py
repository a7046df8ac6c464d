"""What is taken as a context's text, and what is refused although it could be read as text."""

from __future__ import annotations

import codecs
import io
import zipfile

import pytest

from softbatch.prompt_store.compression.data.context_text import ContextTextError, clean_context, decode_context


def archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("word/document.xml", "<w:t>Text</w:t>")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n", "a PDF"),
        (codecs.BOM_UTF8 + b"\n%PDF-1.7\n", "a PDF"),
        (rb"{\rtf1\ansi Hello.}", "an RTF document"),
        (b"%!PS-Adobe-3.0\nshowpage\n", "a PostScript document"),
        (archive(), "Word, Excel"),
        (b"\x1f\x8b\x08\x00" + bytes(8), "a gzip archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(8), "a PNG image"),
        (b"text\0text", "a NUL byte"),
        ("Ring twice.".encode("utf-16-le"), "save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"R", "not a UTF-16 text file"),
        ("Grüße".encode("latin-1"), "not a UTF-8 text file"),
        (codecs.BOM_UTF8 + b" \r\n", "empty"),
        (b"\x01\x02\x03\x04 text \x05\x06", "control or replacement characters"),
    ],
)
def test_what_is_no_text_is_refused_by_its_kind(content: bytes, message: str) -> None:
    with pytest.raises(ContextTextError, match=message):
        decode_context(content)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-marked", "utf-16-be-marked", "utf-32"])
def test_marks_go_and_lines_end_alike(encoding: str) -> None:
    text = "Läute zweimal.\r\n鐘を鳴らす。\rEnde\n"
    mark = {"utf-16-le-marked": codecs.BOM_UTF16_LE, "utf-16-be-marked": codecs.BOM_UTF16_BE}.get(encoding, b"")
    content = mark + text.encode(encoding.removesuffix("-marked"))
    assert decode_context(content) == "Läute zweimal.\n鐘を鳴らす。\nEnde\n"


def test_a_string_is_cleaned_like_a_file() -> None:
    assert clean_context("\ufeffOne.\r\nTwo.") == "One.\nTwo."
    assert clean_context("\ufeff\ufeffOne.\r\n\ufeffTwo.") == "One.\nTwo.", "two files that were put together"
    assert clean_context("BZh, ID3 and GGUF are names of formats.").startswith("BZh")
    assert clean_context("\x1b[1mbold\x1b[0m and so on\tand on") != ""
    for text in ("%PDF-1.4 text", "half \ud800", " \ufeff\n"):
        with pytest.raises(ContextTextError):
            clean_context(text)

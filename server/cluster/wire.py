"""What ingress and replicas say to each other: a request, and what becomes of it bit by bit."""

from __future__ import annotations

import msgspec

from softbatch.server.journal import Entry, SequenceBrought, SequenceOpened

Headers = list[tuple[bytes, bytes]]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP request without its body, which goes beside. `entries` is what earlier replicas have written into its
    journal, each packed, for they are kept as long as the request runs; None: no journal is kept."""

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: Headers
    scheme: str = "http"
    http_version: str = "1.1"
    client: tuple[str, int] | None = None
    server: tuple[str, int | None] | None = None
    entries: list[bytes] | None = None


class ReplyHead(msgspec.Struct, frozen=True, tag="head"):
    status: int
    headers: Headers


class ReplyPart(msgspec.Struct, frozen=True, tag="part"):
    """What the app sent at once: of a stream, an event. The last part has no `more`."""

    data: bytes
    more: bool


Said = ReplyHead | ReplyPart | SequenceOpened | SequenceBrought

_encoder = msgspec.msgpack.Encoder()
_entry: msgspec.msgpack.Decoder[Entry] = msgspec.msgpack.Decoder(Entry)
_asked = msgspec.msgpack.Decoder(Asked)
_said = msgspec.msgpack.Decoder(list[Said])


def pack_entry(entry: Entry) -> bytes:
    return _encoder.encode(entry)


def unpack_entry(data: bytes) -> Entry:
    return _entry.decode(data)


def encode_asked(asked: Asked) -> bytes:
    return _encoder.encode(asked)


def decode_asked(data: bytes) -> Asked:
    return _asked.decode(data)


def encode_said(said: list[Said]) -> bytes:
    return _encoder.encode(said)


def decode_said(data: bytes) -> list[Said]:
    return _said.decode(data)

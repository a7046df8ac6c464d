"""Streams for clients of HTTP/1.0, which know no chunks: the end of the connection is the end of the body."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def answer_without_chunks(cycle: RequestResponseCycle) -> None:
    """uvicorn sends whatever names no length in chunks. To be called before the cycle runs."""
    send, names_no_length = cycle.send, False

    async def send_plain(message: Any) -> None:
        nonlocal names_no_length
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message.get("headers", ())]
            names_no_length = not any(name == b"content-length" for name, _ in headers)
            if names_no_length:
                cycle.chunked_encoding, cycle.keep_alive = False, False
                message = {**message, "headers": [one for one in headers if one[0] != b"connection"]}
        elif names_no_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain  # type: ignore[method-assign]

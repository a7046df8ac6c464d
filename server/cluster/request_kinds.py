"""What the ingress has to know of a request: what it is about, and whether it may be asked twice."""

from __future__ import annotations

import msgspec

from softbatch.server.cluster.prefixes import LONGEST

# What they change is changed once: registering and deleting soft prompts, compressions, files, batches, and the queue.
CHANGING_PATHS = ("/v1/soft_prompts", "/v1/compressions", "/v1/files", "/v1/batches", "/v1/queue")
# Of the servers on one directory, one has the files and batches, and one the compressions. No soft prompt is named so.
BATCHES, COMPRESSIONS = "/v1/batches", "/v1/compressions"
PLACES = frozenset({BATCHES, COMPRESSIONS})
_PLACES = {"/v1/files": BATCHES, "/v1/batches": BATCHES, "/v1/compressions": COMPRESSIONS}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class Named(msgspec.Struct, frozen=True):
    """What a body names; empty where it says nothing, or cannot be read: the replica will say what is wrong with it.
    `start` is how its prompt begins, as JSON."""

    model: str = ""
    soft_prompt: str = ""
    start: bytes = b""


_NONE = msgspec.Raw(b"")


class _Fields(msgspec.Struct):
    """What makes the prompt comes in the order in which templates write it, whatever the order in the body."""

    model: object = None
    soft_prompt: object = None
    adapter_id: object = None  # text-generation-inference's
    tools: msgspec.Raw = _NONE
    system: msgspec.Raw = _NONE
    instructions: msgspec.Raw = _NONE
    messages: msgspec.Raw = _NONE
    prompt: msgspec.Raw = _NONE
    input: msgspec.Raw = _NONE
    inputs: msgspec.Raw = _NONE


_decoder = msgspec.json.Decoder(_Fields)


def may_be_asked_twice(method: str, path: str) -> bool:
    return method in _READING or not any(_is_below(path, changing) for changing in CHANGING_PATHS)


def is_generating(method: str, path: str) -> bool:
    """Whether another replica goes on with it rather than begins again."""
    return method == "POST" and may_be_asked_twice(method, path)


def place_of(path: str) -> str:
    """What the replica has to hold that is to answer; empty: any may."""
    return next((place for prefix, place in _PLACES.items() if _is_below(path, prefix)), "")


def names_in(body: bytes) -> Named:
    try:
        fields = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Named()
    model, soft_prompt = (
        value if isinstance(value, str) else "" for value in (fields.model, fields.soft_prompt or fields.adapter_id)
    )
    asked = (fields.messages, fields.prompt, fields.input, fields.inputs)
    parts = (fields.tools, fields.system, fields.instructions, *asked)
    start = b"".join(memoryview(part)[:LONGEST] for part in parts)[:LONGEST]
    return Named(model, soft_prompt, start)


def _is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}/")

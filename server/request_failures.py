"""Why a request cannot be served, in words alone; `http/errors.py` knows the status that each of these has there."""

from __future__ import annotations

import errno

from softbatch.prompt_store.stores.bucket import BucketDenied, BucketError

MAX_ECHO_CHARS = 80


class Failure(Exception):
    """Base of all: `message` is for people, `param` names the field at fault, `code` is for programs, and the same
    request may work in `retry_after` seconds."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after


class InvalidPrompt(Failure):
    """The prompt, or what is asked for with it, can never be served."""


class PromptTooLong(InvalidPrompt):
    """Prompt and output together exceed the longest sequence."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class InvalidGrammar(Failure):
    """What the output must follow cannot be followed by any text, or not be read."""


class GrammarsUnavailable(Failure):
    """The process that compiles output formats does not start."""

    def __init__(self) -> None:
        super().__init__("output formats cannot be compiled at the moment; the server's log says why", retry_after=30)


class TooManySequences(Failure):
    """One request asks for more sequences than the server ever takes at once."""


class QueueFull(Failure):
    """Every place in the waiting queue is taken."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, code="rate_limit_exceeded", retry_after=retry_after)


class DeadlineExceeded(Failure):
    """The request's time is over, and nothing of its output is there yet."""

    def __init__(self, seconds: float) -> None:
        message = f"the request had no output within its time ({seconds:g} s, timeout_ms or the server's default)"
        super().__init__(message, code="deadline_exceeded")


class EngineAway(Failure):
    """Nothing is taken any more: the server is shutting down, or its engine cannot be kept alive."""


class EngineGone(Failure):
    """The server ends before the request has been answered."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, code="engine_gone", retry_after=retry_after)


class SequenceChanged(Failure):
    """Another server has begun the sequence behind another prompt or soft prompt: what it brought does not fit here."""

    def __init__(self) -> None:
        message = "the replica died, and the request's soft prompt or its prompt is another one now; ask again"
        super().__init__(message, code="replica_lost")


class RequestCancelled(Failure):
    """Somebody who may has taken the request out of the batch or the queue."""

    def __init__(self) -> None:
        super().__init__("the request was cancelled on the server, by DELETE /v1/queue/{id}", code="request_cancelled")


class RequestFailed(Failure):
    """The engine gave this one request up."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="request_failed")


class RequestKillsEngine(Failure):
    """The engine has died on this request more than once, the last time with nobody beside it."""

    def __init__(self, deaths: int) -> None:
        message = (
            f"the engine died {deaths} times on this request, the last time with nothing beside it; it is given up"
        )
        super().__init__(message, code="request_kills_engine")


class UnknownSoftPrompt(Failure):
    """No soft prompt has this name."""

    def __init__(self, name: str) -> None:
        message = f"the soft prompt {shown(name)} does not exist; GET /v1/soft_prompts lists those that do"
        super().__init__(message, param="soft_prompt", code="soft_prompt_not_found")


class UnusableSoftPrompt(Failure):
    """The soft prompt is there, but its file is broken."""


class SoftPromptOfAnotherModel(UnusableSoftPrompt):
    """The soft prompt was made for a model other than the one served."""


class StorageFull(Failure):
    """There is no room on the server's disk."""


class StorageUnwritable(Failure):
    """The server may not, or cannot, write on its disk."""


def storage_failure(error: OSError) -> Failure:
    """What an error of the disk, or of the bucket, means to somebody who wants to store or use something there."""
    if isinstance(error, BucketError):
        message = f"the prompt store does not answer: {error.strerror}"
        return StorageUnwritable(message, code="store_unreachable", retry_after=5)
    if isinstance(error, BucketDenied):
        return StorageUnwritable(f"the server may not do this in its bucket: {error.strerror}", code="store_denied")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message = (
            "the server's disk is full: nothing was stored; make room there, or delete soft prompts, and try again"
        )
        return StorageFull(message, code="disk_full")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        message = "the server's prompt store is read-only: nothing can be registered, deleted or compressed there"
        return StorageUnwritable(message, code="store_read_only")
    return StorageUnwritable(f"the server's disk does not work: {error.strerror}", code="disk_error")


class CompressionNotFound(Failure):
    """No compression job has this id."""

    def __init__(self, job_id: str) -> None:
        message = f"there is no compression {shown(job_id)}; GET /v1/compressions lists them"
        super().__init__(message, param="id", code="compression_not_found")


class CompressionNameTaken(Failure):
    """An unfinished compression will register this name."""

    def __init__(self, name: str) -> None:
        message = f"name: another compression named {shown(name)} is queued or running"
        super().__init__(message, param="name", code="name_taken")


class CompressionEnded(Failure):
    """The job has reached another final state than the one asked for."""

    def __init__(self, status: str) -> None:
        message = f"the compression has {status} already; it cannot be cancelled any more"
        super().__init__(message, param="id", code="already_finished")


class TooManyCompressions(Failure):
    """The queue of compressions is full."""

    def __init__(self, queued: int) -> None:
        message = f"{queued} compressions are queued already; try again when one has finished"
        super().__init__(message, code="rate_limit_exceeded", retry_after=60)


class CompressionsUnavailable(Failure):
    """Compressions cannot be read or queued here at the moment."""

    def __init__(self, message: str, *, code: str = "unavailable") -> None:
        super().__init__(message, code=code, retry_after=5)


class UnknownBatchFile(Failure):
    """No file has this id, or it is another key's."""

    def __init__(self, file_id: str, *, param: str = "id") -> None:
        message = f"there is no file {shown(file_id)}; GET /v1/files lists them"
        super().__init__(message, param=param, code="file_not_found")


class UnknownBatch(Failure):
    """No batch has this id, or it is another key's."""

    def __init__(self, batch_id: str) -> None:
        message = f"there is no batch {shown(batch_id)}; GET /v1/batches lists them"
        super().__init__(message, param="id", code="batch_not_found")


class BatchFileInUse(Failure):
    """An unfinished batch reads the file."""

    def __init__(self, file_id: str, batch_id: str) -> None:
        message = f"batch {batch_id} still reads the file {shown(file_id)}; wait for its end, or cancel it"
        super().__init__(message, param="id", code="file_in_use")


class BatchNotRunning(Failure):
    """The batch has ended, or is about to."""

    def __init__(self, status: str) -> None:
        super().__init__(f"the batch is {status}; it cannot be cancelled any more", param="id", code="already_finished")


class TooManyBatches(Failure):
    """As many batches are unfinished, or as many files kept, as there may be."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="rate_limit_exceeded", retry_after=60)


class BatchesUnavailable(Failure):
    """Files and batches cannot be read or taken here at the moment."""

    def __init__(self, message: str, *, code: str = "unavailable") -> None:
        super().__init__(message, code=code, retry_after=5)


def shown(value: str) -> str:
    """A client's own word as it may stand in a message: quoted, printable, short."""
    clipped = value if len(value) <= MAX_ECHO_CHARS else value[:MAX_ECHO_CHARS] + "…"
    return f"'{printable(clipped)}'"


def printable(value: str) -> str:
    """Neither control characters nor lone surrogates, which pydantic and UTF-8 cannot carry."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)

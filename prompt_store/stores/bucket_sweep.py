"""What a server does about a bucket once, at its start: say what it lacks, and delete what crashes have left there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.bucket import PROBES, Bucket, Offers
from softbatch.prompt_store.stores.prompt_record import PromptRecord, name_and_nonce

logger = logging.getLogger(__name__)
STALE_SECONDS = 86_400.0


def remove_stale(bucket: Bucket, look_up: Callable[[str], PromptRecord | SoftPromptError | None]) -> None:
    """Objects that no name leads to, once no other machine can be at work on them. Raises BucketError."""
    for prefix in (PROBES, "objects/", "texts/"):
        for found in bucket.list(prefix):
            if found.modified is None or time.time() - found.modified < STALE_SECONDS:
                continue
            if prefix == PROBES:
                bucket.delete(found.key)
                continue
            owner = name_and_nonce(found.key)
            if owner is None:
                continue
            record = look_up(owner[0])
            if record is None or (isinstance(record, PromptRecord) and record.nonce != owner[1]):
                bucket.delete(found.key)


def sweep(location: str, remove: Callable[[], None]) -> None:
    """Returns at once."""

    def run() -> None:
        try:
            remove()
        except OSError as error:
            logger.warning("what crashes have left in %s is not removed: %s", location, error.strerror)

    threading.Thread(target=run, daemon=True, name="sweep-bucket").start()


def tell_of(url: str, offers: Offers) -> None:
    if not offers.write:
        logger.warning("%s is read-only: none of its soft prompts can be added or deleted", url)
    elif not offers.create:
        logger.warning(
            "%s offers no conditional writes (If-None-Match) that keep apart two who write at the same moment: of two "
            "that register one name then, the later one may win, and the earlier one's soft prompt is lost",
            url,
        )

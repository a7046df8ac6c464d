"""The SQLite database of files, batches and answers: what it has committed survives the end of the process."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from softbatch.server.batches.batch_record import ENDED, BatchRecord, FileRecord, PendingLine, first_id
from softbatch.server.request_failures import BatchesUnavailable

VERSION = 1
_TABLES = """
CREATE TABLE files (id TEXT PRIMARY KEY, owner TEXT NOT NULL, purpose TEXT NOT NULL, expires_at INTEGER, record BLOB);
CREATE TABLE batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, has_ended INTEGER NOT NULL, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, record BLOB
);
CREATE INDEX owned ON batches (owner);
CREATE INDEX unfinished ON batches (id) WHERE NOT has_ended;
CREATE TABLE lines (
    batch TEXT NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL, offset INTEGER NOT NULL,
    length INTEGER NOT NULL, has_succeeded INTEGER, answer BLOB, PRIMARY KEY (batch, number)
);
CREATE INDEX pending ON lines (batch, number) WHERE answer IS NULL;
"""


class Ledger:
    """Every method blocks until what it writes is on disk, may be called from any thread, and raises BatchesUnavailable
    if the database does not work.

    Invariants: a line has at most one answer, and the counts of a batch are those of its answers, for both are written
    in one transaction; a file that is listed is whole, for its bytes are on disk before its row.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT")
            elif version != VERSION:
                message = f"{path} was written by another version of softbatch (its layout is {version})"
                raise BatchesUnavailable(message, code="disk_error")
        except sqlite3.Error as error:
            raise _failure(error) from error

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise _failure(error) from error
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def _rows(self, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise _failure(error) from error

    # --- files ----------------------------------------------------------------------------------------------

    def add_file(self, record: FileRecord) -> None:
        with self._transaction() as connection:
            _add_file(connection, record)

    def file(self, file_id: str, owner: str | None) -> FileRecord | None:
        """`owner` here and below: whose are looked at, None: everybody's."""
        rows = self._rows("SELECT record FROM files WHERE id = ? AND (? IS NULL OR owner = ?)", (file_id, owner, owner))
        return _file(rows[0][0]) if rows else None

    def files(
        self, owner: str | None, purpose: str | None, order: Literal["asc", "desc"], after: str | None, limit: int
    ) -> list[FileRecord]:
        comparison = ">" if order == "asc" else "<"
        query = (
            "SELECT record FROM files WHERE (? IS NULL OR owner = ?) AND (? IS NULL OR purpose = ?) "
            f"AND (? IS NULL OR id {comparison} ?) ORDER BY id {order} LIMIT ?"
        )
        return [_file(row[0]) for row in self._rows(query, (owner, owner, purpose, purpose, after, after, limit))]

    def file_ids(self) -> set[str]:
        return {row[0] for row in self._rows("SELECT id FROM files", ())}

    def num_files(self, owner: str) -> int:
        number: int = self._rows("SELECT count(*) FROM files WHERE owner = ?", (owner,))[0][0]
        return number

    def num_batches(self, owner: str) -> int:
        """Ended ones too."""
        number: int = self._rows("SELECT count(*) FROM batches WHERE owner = ?", (owner,))[0][0]
        return number

    def expired_files(self, now: int) -> list[str]:
        """Without those that an unfinished batch reads."""
        used = {batch.input_file_id for batch in self.unfinished()}
        rows = self._rows("SELECT id FROM files WHERE expires_at <= ?", (now,))
        return [row[0] for row in rows if row[0] not in used]

    def remove_file(self, file_id: str) -> str | None:
        """Unless an unfinished batch reads it, whose id is returned."""
        with self._transaction() as connection:
            for batch in _unfinished(connection):
                if batch.input_file_id == file_id:
                    return batch.id
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        return None

    # --- batches --------------------------------------------------------------------------------------------

    def add_batch(self, record: BatchRecord) -> bool:
        """False if its input file has gone meanwhile."""
        with self._transaction() as connection:
            if not connection.execute("SELECT 1 FROM files WHERE id = ?", (record.input_file_id,)).fetchone():
                return False
            connection.execute(
                "INSERT INTO batches (id, owner, has_ended, record) VALUES (?, ?, 0, ?)",
                (record.id, record.owner, msgspec.json.encode(record)),
            )
        return True

    def batch(self, batch_id: str, owner: str | None) -> BatchRecord | None:
        query = "SELECT record, completed, failed FROM batches WHERE id = ? AND (? IS NULL OR owner = ?)"
        rows = self._rows(query, (batch_id, owner, owner))
        return _batch(rows[0]) if rows else None

    def batches(self, owner: str | None, after: str | None, limit: int) -> list[BatchRecord]:
        """Newest first."""
        query = (
            "SELECT record, completed, failed FROM batches WHERE (? IS NULL OR owner = ?) AND (? IS NULL OR id < ?) "
            "ORDER BY id DESC LIMIT ?"
        )
        return [_batch(row) for row in self._rows(query, (owner, owner, after, after, limit))]

    def unfinished(self) -> list[BatchRecord]:
        """Oldest first."""
        with self._transaction() as connection:
            return _unfinished(connection)

    def save(self, record: BatchRecord, *, files: Sequence[FileRecord] = ()) -> None:
        """With its output files, if it has any; the lines of a batch that has ended are forgotten."""
        with self._transaction() as connection:
            for file in files:
                _add_file(connection, file)
            _save(connection, record)

    def begin(self, record: BatchRecord, lines: Sequence[PendingLine]) -> None:
        """The batch is valid, and these are its lines."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM lines WHERE batch = ?", (record.id,))
            connection.executemany(
                "INSERT INTO lines (batch, number, custom_id, offset, length) VALUES (?, ?, ?, ?, ?)",
                ((line.batch_id, line.number, line.custom_id, line.offset, line.length) for line in lines),
            )
            _save(connection, record)

    def forget_old(self, before: int) -> None:
        """Batches that were created before that time, as their ids tell, and have ended."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM batches WHERE has_ended AND id < ?", (first_id("batch_", before),))

    # --- lines ----------------------------------------------------------------------------------------------

    def pending(self, batch_id: str, after: int, limit: int) -> list[PendingLine]:
        """Of the batch, in order, those with numbers above `after`."""
        query = (
            "SELECT batch, number, custom_id, offset, length FROM lines "
            "WHERE batch = ? AND number > ? AND answer IS NULL ORDER BY number LIMIT ?"
        )
        return [PendingLine(*row) for row in self._rows(query, (batch_id, after, limit))]

    def answer(self, line: PendingLine, answer: bytes, *, has_succeeded: bool) -> bool:
        """False if the line has an answer already, or its batch has ended: then nothing is changed."""
        with self._transaction() as connection:
            changed = connection.execute(
                "UPDATE lines SET answer = ?, has_succeeded = ? WHERE batch = ? AND number = ? AND answer IS NULL",
                (answer, has_succeeded, line.batch_id, line.number),
            ).rowcount
            if changed:
                column = "completed" if has_succeeded else "failed"
                connection.execute(f"UPDATE batches SET {column} = {column} + 1 WHERE id = ?", (line.batch_id,))
        return bool(changed)

    def answer_rest(self, batch_id: str, make: Callable[[str], bytes]) -> None:
        """Give every line of the batch that has no answer the one that is made for its custom_id: it has failed."""
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT number, custom_id FROM lines WHERE batch = ? AND answer IS NULL", (batch_id,)
            ).fetchall()
            connection.executemany(
                "UPDATE lines SET answer = ?, has_succeeded = 0 WHERE batch = ? AND number = ?",
                ((make(custom_id), batch_id, number) for number, custom_id in rows),
            )
            connection.execute("UPDATE batches SET failed = failed + ? WHERE id = ?", (len(rows), batch_id))

    def answers(self, batch_id: str, *, has_succeeded: bool) -> Iterator[bytes]:
        """In the order of the lines; reads a few at a time, as together they may be larger than memory."""
        after = -1
        query = (
            "SELECT number, answer FROM lines WHERE batch = ? AND number > ? AND has_succeeded = ? "
            "ORDER BY number LIMIT 64"
        )
        while rows := self._rows(query, (batch_id, after, has_succeeded)):
            for number, answer in rows:
                after = number
                yield answer


def _failure(error: sqlite3.Error) -> BatchesUnavailable:
    return BatchesUnavailable(f"the database of batches does not work: {error}", code="disk_error")


def _file(record: bytes) -> FileRecord:
    return msgspec.json.decode(record, type=FileRecord)


def _batch(row: tuple[Any, ...]) -> BatchRecord:
    batch = msgspec.json.decode(row[0], type=BatchRecord)
    batch.completed, batch.failed = row[1], row[2]
    return batch


def _add_file(connection: sqlite3.Connection, record: FileRecord) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO files (id, owner, purpose, expires_at, record) VALUES (?, ?, ?, ?, ?)",
        (record.id, record.owner, record.purpose, record.expires_at, msgspec.json.encode(record)),
    )


def _save(connection: sqlite3.Connection, record: BatchRecord) -> None:
    connection.execute(
        "UPDATE batches SET record = ?, has_ended = ? WHERE id = ?",
        (msgspec.json.encode(record), record.status in ENDED, record.id),
    )
    if record.has_ended:
        connection.execute("DELETE FROM lines WHERE batch = ?", (record.id,))


def _unfinished(connection: sqlite3.Connection) -> list[BatchRecord]:
    query = "SELECT record, completed, failed FROM batches WHERE NOT has_ended ORDER BY id"
    return [_batch(row) for row in connection.execute(query)]

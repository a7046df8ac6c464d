"""`/v1/batches`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints, field_validator

from softbatch.server.batches.batch_record import BatchStatus
from softbatch.server.schemas.base import MAX_NAME_CHARS, RequestModel, refusal

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
MAX_METADATA = 16
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
_WINDOW = re.compile(r"([1-9][0-9]{0,3})([mhd])")
_UNIT_SECONDS = {"m": 60, "h": 3600, "d": 86_400}
MAX_WINDOW_SECONDS = 30 * 86_400
LEAST_KEPT_SECONDS = 3600
MOST_KEPT_SECONDS = 30 * 86_400


class KeptFor(RequestModel):
    """How long a file is kept."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=LEAST_KEPT_SECONDS, le=MOST_KEPT_SECONDS)


class BatchRequest(RequestModel):
    """Run the requests of an uploaded file."""

    input_file_id: Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)]
    endpoint: BatchEndpoint = Field(description="what every line of the file names as its `url`")
    completion_window: str = Field(
        description="24h, as OpenAI has it, or another time such as 90m or 7d: what is not answered by then is given up"
    )
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        default=None, max_length=MAX_METADATA, description="comes back with the batch"
    )
    output_expires_after: KeptFor | None = Field(default=None, description="of its files; left out: 30 days")

    @field_validator("completion_window")
    @classmethod
    def _is_window(cls, value: str) -> str:
        found = _WINDOW.fullmatch(value)
        if found is None or int(found[1]) * _UNIT_SECONDS[found[2]] > MAX_WINDOW_SECONDS:
            raise refusal("completion_window", "must be a number of minutes, hours or days up to 30d, such as 24h")
        return value

    @property
    def window_seconds(self) -> int:
        number, unit = self.completion_window[:-1], self.completion_window[-1]
        return int(number) * _UNIT_SECONDS[unit]


class BatchLineError(BaseModel):
    """Why the file cannot be run; `line` counts from 1."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchLineError]


class RequestCounts(BaseModel):
    """Lines; `failed` are those with an answer other than 2xx, or none at the end."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """A batch in OpenAI's shape. Times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """Newest first. `has_more`: go on with `after` the last id."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool

"""How many replicas there are and what each is given: flags of `softbatch ray-serve`, arguments of `serve run`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softbatch.server.settings import Settings


class ClusterSettings(BaseModel):
    """Everything of a cluster that is not told to each server of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    replicas: int = Field(
        1, ge=1, le=10_000, description="servers, each with an engine process and a copy of the model"
    )
    min_replicas: int | None = Field(
        None, ge=1, le=10_000, description="fewest of them; with --max-replicas Serve scales by load"
    )
    max_replicas: int | None = Field(None, ge=1, le=10_000, description="most of them")
    target_requests: float | None = Field(
        None,
        gt=0,
        description="unfinished requests for each replica that scaling aims at; default: --max-batch-size",
    )
    target_first_token: float | None = Field(
        None,
        gt=0,
        description="seconds to the first token, on average, above which scaling adds replicas whatever else it aims "
        "at; default: no matter",
    )
    scale_up_after: float = Field(30.0, ge=0, description="seconds of too much load before scaling adds a replica")
    scale_down_after: float = Field(600.0, ge=0, description="seconds of too little before it takes one away")
    ingress_replicas: int = Field(
        2, ge=1, le=1000, description="processes that forward requests; what is on one that dies is lost"
    )
    replica_cpus: float = Field(
        1, ge=0, le=4096, description="cores that Ray sets aside for each replica, and its engine computes on"
    )
    replica_gpus: float = Field(0, ge=0, le=64, description="GPUs of each replica")
    router: Literal["affinity", "default"] = Field(
        "affinity",
        description="affinity: to a replica that holds the soft prompt, or has computed the prompt's beginning; "
        "default: Serve's own",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.min_replicas is not None and self.max_replicas is None:
            raise ValueError(f"--min-replicas {self.min_replicas} wants --max-replicas beside it")
        if self.target_first_token is not None and self.max_replicas is None:
            raise ValueError(f"--target-first-token {self.target_first_token} wants --max-replicas beside it")
        if self.max_replicas is not None and (self.min_replicas or 1) > self.max_replicas:
            raise ValueError(f"--min-replicas {self.min_replicas} is more than --max-replicas {self.max_replicas}")
        return self


def with_own_directories(models: Mapping[str, Settings]) -> list[Settings]:
    """Several models, by their names, none of which keeps compressions or batches where another one does: whoever comes
    first to such a directory takes all in it for its own. Raises ValueError."""
    if len(models) == 1:
        return list(models.values())
    found = []
    stores: dict[Path, str] = {}
    batches: dict[Path, str] = {}
    for name, settings in models.items():
        if isinstance(settings.prompt_store, Path):
            _take(stores, settings.prompt_store, name, "prompt_store, or all of them a bucket")
        elif settings.batch_dir is None:
            own = settings.store_root / ".batches" / quote(name, safe="")
            settings = settings.model_copy(update={"batch_dir": own})
        if settings.batch_dir is not None:
            _take(batches, settings.batch_dir, name, "batch_dir")
        found.append(settings)
    return found


def _take(taken: dict[Path, str], directory: Path, name: str, what: str) -> None:
    other = taken.setdefault(directory.expanduser().resolve(), name)
    if other != name:
        raise ValueError(f"models: {other!r} and {name!r} are both on {directory}; give each its own {what}")

"""One frozen settings object: flags of `softbatch serve`, each also a SOFTBATCH_* environment variable."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from softbatch.prompt_store.stores.open_store import GIB, cache_directory_of, is_url
from softbatch.server.key_weights import read_key_weights
from softbatch.server.tools.parser_names import CallParser, ReasoningParser

Port = Annotated[int, Field(ge=1, le=65535)]
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class Settings(BaseSettings):
    """Everything a server is told at start; nothing here changes afterwards."""

    model_config = SettingsConfigDict(
        env_prefix="SOFTBATCH_", frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    model: str = Field(
        "smollm2-135m",
        min_length=1,
        max_length=4096,
        description="alias (smollm2-135m), local directory, GGUF file or hub id",
    )
    served_model_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,255}$",
        description="name that clients use for the model; default: the last part of --model",
    )
    chat_template: Path | None = Field(
        None,
        description="file with a Jinja template that makes a prompt of a chat, for models that bring none; default: "
        "the model's. A soft prompt fits the template that it was made with",
    )
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: Port = Field(8000, description="port to listen on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and, by default, KV cache; auto: bfloat16 where the processor computes in it"
    )
    quantization: Literal["none", "native", "int8"] = Field(
        "none",
        description="of the weights; native: those of a GGUF file as they are, not widened to bfloat16; int8 halves "
        "what a step reads: faster on CPUs, a little less exact; gpt-oss's experts in MXFP4 stay as they are on CPUs "
        "with none too",
    )
    kv_cache_dtype: Literal["auto", "int8", "k6v4"] = Field(
        "auto",
        description="of the KV cache; auto: as --dtype; int8: 9 bits a number, 0.0001 to 0.0005 nats off float32 where "
        "bfloat16 is 0.0001 to 0.0003; k6v4: 6 bits, 0.004 to 0.016 nats (three models, on text; the log says how far "
        "yours is at each start); both for models that run in one call on CPUs",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    max_batch_size: int = Field(32, ge=1, le=4096, description="slots: sequences that run at once")
    max_batch_tokens: int = Field(
        1024, ge=1, le=1_048_576, description="most tokens of one step (prefill is cut into such chunks, or smaller)"
    )
    step_target: float | None = Field(
        None,
        gt=0,
        le=3600,
        description="seconds that one step should take: prefill is cut into chunks that fit, so that neither decoding "
        "nor short prompts wait for long ones; up to six times as long while several long prompts wait; default: 0.05 "
        "on a CPU, no such limit on a GPU",
    )
    max_model_len: int | None = Field(
        None,
        ge=8,
        le=16_777_216,
        description="longest sequence, virtual tokens included; default: the model's",
    )
    default_max_tokens: int = Field(
        1024,
        ge=1,
        le=16_777_216,
        description="most tokens of an answer whose request names no limit, as chats may; cut off by the window",
    )
    step_timeout: float | None = Field(
        None,
        ge=1,
        le=86_400,
        description="seconds that one step may take before the engine counts as hung and another is started; default: "
        "60, and what a full step takes a slow machine",
    )
    max_engine_deaths: int = Field(
        10, ge=1, le=1000, description="the server ends when its engine has died so often within --engine-death-window"
    )
    engine_death_window: float = Field(600, gt=0, le=86_400, description="seconds in which engine deaths are counted")
    drain_timeout: float = Field(
        300, ge=0, le=86_400, description="seconds that requests may take to finish once the server is told to stop"
    )
    max_queue_size: int = Field(
        256, ge=0, le=1_000_000, description="requests that may wait behind a full batch; more get 429"
    )
    max_queue_tokens: int | None = Field(
        None,
        ge=1,
        le=2**40,
        description="prompt tokens that may wait behind a full batch; more get 429; default: no limit",
    )
    max_queue_size_per_key: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="waiting requests of one API key or, if keys do not tell, of one user; default: no limit",
    )
    request_timeout: float | None = Field(
        None,
        ge=0.001,
        le=86_400,
        description="seconds that a request may take if it brings no timeout_ms of its own: without output by then it "
        "gets 504, otherwise it ends with what it has; default: no limit",
    )
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        le=4096,
        description="memory for keys and values, in GiB; default: what --gpu-memory-utilization leaves, on a CPU 1",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of the GPU's memory to use for weights, steps and KV cache"
    )
    block_size: int = Field(16, ge=1, le=1024, description="tokens in one KV block")
    embedding_pooling: Literal["mean", "last"] = Field(
        "mean", description="what /v1/embeddings makes of a text's last hidden states if a request does not say it"
    )
    async_scheduling: Literal["auto", "on", "off"] = Field(
        "auto", description="schedule and launch each step while the one before runs; auto: on a GPU"
    )
    deterministic: bool = Field(
        False,
        description="a request gets the same tokens and log-probabilities, bit for bit, whatever runs beside it or ran "
        "before it; for Llama-like models on CPUs; long contexts that many requests share are decoded more slowly",
    )
    max_connections: int = Field(4096, ge=1, le=1_000_000, description="open connections; further ones get 503")
    max_connections_per_address: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="of one client address; default: no limit, as behind a proxy all have one address",
    )
    max_header_bytes: int = Field(32_768, ge=1024, le=1 << 20, description="of a request's address and headers")
    max_headers: int = Field(100, ge=10, le=10_000, description="of a request")
    head_timeout: float = Field(15, gt=0, le=3600, description="seconds in which a request's headers must be there")
    body_timeout: float = Field(
        60, gt=0, le=3600, description="seconds in which its body must be there; a second more for each 16 KiB of it"
    )
    keep_alive_timeout: int = Field(75, ge=1, le=3600, description="seconds that an idle connection is kept open")
    prompt_store: Path | str = Field(
        Path("prompts"),
        description="where the registered soft prompts are: a directory, or a bucket such as s3://bucket/prefix",
    )
    prompt_cache: Path | None = Field(
        None,
        description="directory for this machine's copies of what lies in a bucket; default: in the user's cache",
    )
    prompt_cache_gib: float = Field(10, gt=0, le=65_536, description="most that --prompt-cache holds, in GiB")
    max_prompt_mib: int = Field(256, ge=1, le=65_536, description="largest soft prompt upload, in MiB")
    batch_dir: Path | None = Field(
        None,
        description="directory of files and batches, /v1/files and /v1/batches; default: .batches in --prompt-store, "
        "or beside a bucket's copies",
    )
    max_batch_lines: int = Field(50_000, ge=1, le=1_000_000, description="requests of one batch")
    max_batch_file_bytes: int = Field(200_000_000, ge=1, le=2**40, description="of a file that is uploaded for a batch")
    batch_concurrency: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="requests of batches that are in the queue or the running batch at once, behind all others; "
        "default: a quarter of --max-batch-size",
    )
    api_key: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        validation_alias=AliasChoices("api_key", "SOFTBATCH_API_KEY", "SOFTBATCH_API_KEYS"),
        description="key that clients must send as a bearer token; repeat it or separate keys with commas",
    )
    allow_origin: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="origin whose web pages may use the server, such as https://app.example.com, or * for all; repeat "
        "it or separate origins with commas",
    )
    no_console: bool = Field(False, description="do not serve the page to watch and use the server with, /console")
    strict_model_names: bool = Field(
        False, description="refuse placeholders such as 'tgi' or 'dummy' as model; without it they mean the base model"
    )

    tool_call_parser: CallParser = Field(
        "auto",
        description="form in which the model writes calls of tools; auto: what its chat template says, else hermes; "
        "none: no tools are taken",
    )
    reasoning_parser: ReasoningParser = Field(
        "auto", description="marks around the model's reasoning; auto: those of its chat template; none: it is text"
    )
    admin_key: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="key that may also register and delete soft prompts, compress, and see all of the queue; if there "
        "is one, an --api-key may not",
    )
    key_weights: Path | None = Field(
        None,
        description='JSON file with the shares of API keys, such as {"KEY": 3}: among requests of one priority a key '
        "has as many times the tokens of another as its weight is; default: 1 each",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least serious lines of the log that are written; info has a line for each request"
    )
    log_format: Literal["text", "json"] = Field("text", description="of the log; json: an object a line")
    otlp_endpoint: str | None = Field(
        None,
        max_length=2048,
        description="base address of an OpenTelemetry collector, such as http://localhost:4318, that gets traces and "
        "metrics (OTLP over HTTP); the OTEL_* variables count too; default: OTEL_EXPORTER_OTLP_ENDPOINT, else off",
    )
    vllm_metric_names: bool = Field(
        False, description="give queue, batch and KV use under vLLM's names too, for routers that know only those"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="start of the random seeds given to requests that bring none")

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_base_address(cls, value: str | None) -> str | None:
        if value is None or not value.strip():
            return None  # an environment variable that is empty counts as not set
        try:
            parts = urlsplit(value)
            is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_usable = False
        if not is_usable or parts.query or parts.fragment or value != value.strip():
            raise ValueError("must be an address such as http://localhost:4318")
        if parts.path.rstrip("/").endswith(("/v1/traces", "/v1/metrics")):
            raise ValueError("must be the collector's base address; /v1/traces and /v1/metrics are put behind it")
        return value.rstrip("/")

    @field_validator("allow_origin", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            return value
        origins = tuple(origin.rstrip("/") for part in parts for origin in part.replace(",", " ").split())
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", origin):
                raise ValueError(f"{origin} is no origin: write * or scheme://host or scheme://host:port")
        return origins

    @field_validator("api_key", "admin_key", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
            # As a flag; an environment variable that is empty counts as not set.
            if parts is value and not all(part.strip(" ,") for part in parts):
                raise ValueError("a key must not be empty: without one the server would be open to everybody")
            return tuple(key for part in parts for key in part.replace(",", " ").split())
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _not_of_kubernetes(cls, value: object) -> object:
        """Kubernetes sets SOFTBATCH_PORT to an address in every container beside a service that is named softbatch."""
        return cls.model_fields["port"].default if str(value).startswith("tcp://") else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"--max-batch-tokens {self.max_batch_tokens} is less than --max-batch-size {self.max_batch_size}: "
                "every running sequence needs one token of each step"
            )
        if not (self.api_key or self.admin_key) and self.host not in LOOPBACK:
            raise ValueError(
                f"--host {self.host} can be reached from other machines: set --api-key, or listen on 127.0.0.1"
            )
        if isinstance(self.prompt_store, str) and self.prompt_cache_bytes < self.max_prompt_mib << 20:
            raise ValueError(
                f"--prompt-cache-gib {self.prompt_cache_gib:g} is less than one soft prompt may have: raise it, or "
                f"lower --max-prompt-mib {self.max_prompt_mib}"
            )
        self.weights_by_owner()
        return self

    def weights_by_owner(self) -> Mapping[str, float]:
        """Of API keys that have one other than 1. Raises ValueError."""
        keys = (*self.api_key, *self.admin_key)
        return read_key_weights(self.key_weights, keys) if self.key_weights is not None else {}

    @field_validator("prompt_store", mode="before")
    @classmethod
    def _place(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("file://"):
            value = value.removeprefix("file://")
        if isinstance(value, str) and is_url(value):
            return value.rstrip("/")
        return Path(value).expanduser().absolute() if isinstance(value, str | Path) else value

    @property
    def store_root(self) -> Path:
        """The directory that is the store, or of a bucket's copies."""
        if isinstance(self.prompt_store, Path):
            return self.prompt_store
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache = self.prompt_cache or Path(base) / "softbatch"
        return cache_directory_of(self.prompt_store, cache.expanduser().absolute())

    @property
    def prompt_cache_bytes(self) -> int:
        return int(self.prompt_cache_gib * GIB)

    @field_validator("batch_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value is not None else None


def absolute_model(model: str) -> str:
    """A model on disk, named independently of the directory a command was started in."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def absolute_path(path: Path | None) -> str | None:
    """A file on disk, named like that."""
    return None if path is None else str(path.expanduser().resolve())

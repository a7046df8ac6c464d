"""Whether traces and metrics are exported, and where to, as flags and OpenTelemetry's own environment say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PROTOCOL = "http/protobuf"


@dataclass(frozen=True)
class OtlpTarget:
    """The addresses of both signals, None for one that is off. `is_flag`: --otlp-endpoint asks for it, so that a server
    which cannot do it must not start."""

    traces: str | None
    metrics: str | None
    is_flag: bool


def shown(url: str) -> str:
    """An address for the log: without a user, a password and what stands behind the path, which may be keys."""
    return re.sub(r"^([a-zA-Z][\w+.-]*://|//)?[^/]*@", r"\1", re.split(r"[?#]", url, maxsplit=1)[0])


def without_credentials(text: str, url: str) -> str:
    """What others say of an address, as a whole or in parts, without what is not to be shown of it."""
    text = re.sub(r"(//)[^/\s]*@", r"\1", text.replace(url, shown(url)))
    behind = "".join(re.split(r"[?#]", url, maxsplit=1)[1:])
    return text.replace(behind, "…") if behind else text


def otlp_target(endpoint: str | None, environ: Mapping[str, str]) -> OtlpTarget | None:
    """`endpoint` is the flag's, which goes before the environment's; None: nothing is exported. Raises ValueError for a
    protocol that is not spoken here."""
    if _word(environ, "OTEL_SDK_DISABLED") == "true":
        return None
    traces = _address("traces", endpoint, environ)
    metrics = _address("metrics", endpoint, environ)
    return OtlpTarget(traces, metrics, endpoint is not None) if traces or metrics else None


def _address(signal: str, endpoint: str | None, environ: Mapping[str, str]) -> str | None:
    name = signal.upper()
    if _word(environ, f"OTEL_{name}_EXPORTER") == "none":
        return None
    own = environ.get(f"OTEL_EXPORTER_OTLP_{name}_ENDPOINT", "").strip()
    base = endpoint or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
    if not own and not base:
        return None
    for variable in (f"OTEL_EXPORTER_OTLP_{name}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = _word(environ, variable)
        if protocol and protocol != PROTOCOL:
            raise ValueError(
                f"{variable}={protocol}: softbatch sends {PROTOCOL} alone, which collectors take at port 4318"
            )
        if protocol:
            break
    return own if own and endpoint is None else f"{base.rstrip('/')}/v1/{signal}"


def _word(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip().lower()

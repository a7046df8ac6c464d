"""Prometheus' rules for names, for every metric there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.metrics_core import Metric

from softbatch.server.observability.metrics import Metrics

RESERVED = ("_total", "_count", "_sum", "_bucket", "_created", "_info")
SECONDS = ("milliseconds", "_ms", "minutes", "hours")


def families() -> Iterator[Metric]:
    yield from Metrics().registry.collect()


@pytest.mark.parametrize("family", list(families()), ids=lambda family: family.name)
def test_names_say_the_kind(family: Metric) -> None:
    assert family.name.startswith("softbatch_")
    assert family.documentation.strip()
    assert not any(word in family.name for word in SECONDS), "base units: seconds, bytes, ratio"
    # The library takes a counter's `_total` off the family's name, and puts it on the sample.
    assert not family.name.endswith(RESERVED), f"a {family.type} of this name looks like another kind"
    assert family.type in ("counter", "gauge", "histogram")
    if family.type == "counter":
        assert all(sample.name.endswith(("_total", "_created")) for sample in family.samples)

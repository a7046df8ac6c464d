"""What `softbatch ray-serve` puts on a cluster, and takes away again, in terms of Serve's calls."""

from __future__ import annotations

import pytest

from softbatch.server.cli.ray_serve import APPLICATION, deployed
from softbatch.server.cli.settings_flags import UsageError


class Serve:
    """As much of Ray Serve as is called: what runs on the cluster."""

    def __init__(self, *applications: str) -> None:
        self.applications = set(applications)
        self.proxies = {"node": "HEALTHY"} if applications else {}
        self.fails = False

    def status(self) -> Serve:
        return self

    def start(self, http_options: dict[str, object]) -> None:
        self.proxies = {"node": str(http_options["port"])}

    def run(self, _app: object, name: str, route_prefix: str) -> None:
        assert route_prefix == "/"
        if self.fails:
            raise RuntimeError("no")
        self.applications.add(name)

    def delete(self, name: str) -> None:
        self.applications.discard(name)

    def shutdown(self) -> None:
        self.applications, self.proxies = set(), {}


def test_other_applications_stay() -> None:
    serve = Serve("other")
    with deployed(serve, object, "127.0.0.1", 8000) as where:
        assert serve.applications == {"other", APPLICATION}
        assert "8000" not in where  # Serve listens elsewhere, for all we know
    assert (serve.applications, serve.proxies) == ({"other"}, {"node": "HEALTHY"})
    serve.fails = True
    with pytest.raises(RuntimeError), deployed(serve, object, "127.0.0.1", 8000):
        pass
    assert serve.applications == {"other"}


def test_of_an_own_cluster_nothing_stays() -> None:
    serve = Serve()
    with deployed(serve, object, "127.0.0.1", 8123) as where:
        assert where == "http://127.0.0.1:8123"
    assert not serve.proxies
    with deployed(serve, object, "127.0.0.1", 8123):
        serve.applications.add("other")  # somebody else's, meanwhile
    assert serve.applications == {"other"}


def test_one_that_runs_already_is_left_alone() -> None:
    serve = Serve(APPLICATION)
    with pytest.raises(UsageError, match="runs on this cluster already"), deployed(serve, object, "127.0.0.1", 8000):
        pass
    assert serve.applications == {APPLICATION}

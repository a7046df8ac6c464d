"""`softbatch ray-serve`: check the settings, start Ray or join a cluster, deploy, and wait until told to stop."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from softbatch.scheduler.engine.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging
from softbatch.server.cli.settings_flags import UsageError, settings_from
from softbatch.server.cluster.cluster_settings import ClusterSettings
from softbatch.server.settings import Settings

logger = logging.getLogger(__name__)
APPLICATION = "softbatch"


def run(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
        cluster = _cluster_settings(options)
        os.environ.update({LEVEL_VARIABLE: settings.log_level, FORMAT_VARIABLE: settings.log_format})
        configure_logging()
        try:
            import ray  # noqa: F401
            from ray import serve  # noqa: F401
        except ImportError as error:
            raise UsageError(f"Ray Serve is missing ({error.name}): pip install 'softbatch[ray]'") from error
        return _serve(cluster, settings, options.address)
    except UsageError as error:
        print(f"softbatch ray-serve: {error}", file=sys.stderr)
        return 2


def _cluster_settings(options: argparse.Namespace) -> ClusterSettings:
    """Raises UsageError."""
    given = {name: value for name, value in vars(options).items() if name in ClusterSettings.model_fields}
    try:
        return ClusterSettings.model_validate(given)
    except ValidationError as error:
        raise UsageError("; ".join(_problem(details) for details in error.errors())) from error


def _problem(details: Any) -> str:
    reason = str(details["msg"]).removeprefix("Value error, ")
    if not details["loc"]:
        return reason
    return f"--{str(details['loc'][0]).replace('_', '-')}: {reason.lower()}, not {details['input']!r}"


def _serve(cluster: ClusterSettings, settings: Settings, address: str | None) -> int:
    """Raises UsageError."""
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from softbatch.server.cluster.deployments import application

    stopped = threading.Event()
    try:
        # "local": never a cluster that RAY_ADDRESS, or a file of Ray's, happens to name.
        own = {} if address else {"include_dashboard": False}
        ray.init(address=address or "local", logging_level=logging.WARNING, **own)
    except Exception as error:  # of any type, even of none of its own: such as that a node took too long to start
        raise UsageError(f"--address {address}: {error}" if address else f"Ray does not start: {error}") from error
    for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray has handlers of its own, which abort
        signal.signal(number, lambda *_: stopped.set())
    try:
        with deployed(serve, lambda: application([(cluster, settings)]), settings.host, settings.port) as where:
            logger.info("serving %s on %s", settings.model, where)
            stopped.wait()
    except (RuntimeError, ValueError, TypeError, TimeoutError, RayError, RayServeException) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        logs = "the replicas' logs say more: /tmp/ray/session_latest/logs/serve"
        raise UsageError(f"it cannot be deployed: {reason[0]}; {logs}") from error
    finally:
        ray.shutdown()
    return 0


@contextlib.contextmanager
def deployed(serve: Any, make: Callable[[], object], host: str, port: int) -> Iterator[str]:
    """Where it listens. `serve` is Ray's. At the end it is taken away, and Serve with it if that was started here and
    nobody else has put anything there: a cluster has other applications. Raises UsageError, and what Ray does."""
    before = serve.status()
    if APPLICATION in before.applications:
        raise UsageError(
            f"--address: an application {APPLICATION!r} runs on this cluster already; end that one first "
            f"(`serve shutdown` ends all of them)"
        )
    runs_already = bool(before.proxies)
    if runs_already:
        logger.warning("Serve runs on this cluster already, and listens as before: --host and --port do not count")
    try:
        app = make()
        if not runs_already:
            serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(app, name=APPLICATION, route_prefix="/")
            yield "Serve's own address" if runs_already else f"http://{host}:{port}"
        finally:
            serve.delete(APPLICATION)
    finally:
        if not runs_already and not serve.status().applications:
            serve.shutdown()

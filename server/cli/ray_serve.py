"""`softbatch ray-serve`: check the settings, start Ray or join a cluster, deploy, and wait until told to stop."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
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

    from softbatch.server.cluster.deployments import application

    stopped = threading.Event()
    try:
        own = {} if address else {"include_dashboard": False}
        ray.init(address=address, logging_level=logging.WARNING, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--address {address}: {error}" if address else f"Ray does not start: {error}") from error
    for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray has handlers of its own, which abort
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application([(cluster, settings)]), name=APPLICATION, route_prefix="/")
        logger.info("serving %s on http://%s:%d", settings.model, settings.host, settings.port)
        stopped.wait()
    except (
        RuntimeError,
        RayError,
    ) as error:  # Serve's, of what cannot be deployed; Ray's, of a machine too busy for it
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{first}; the logs say more: /tmp/ray/session_latest/logs/serve") from error
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0

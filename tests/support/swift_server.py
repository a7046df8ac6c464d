"""OpenStack Swift with its S3 API: one node of four real servers, each a process, in a directory of its own."""

from __future__ import annotations

import contextlib
import getpass
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.local_processes import free_ports, is_listening, running_processes
from tests.support.servers import wait_for

ACCESS_KEY, SECRET_KEY = "test:tester", "testing"
INSTALL = "apt-get install swift-proxy swift-account swift-container swift-object"
# The system's, which has Swift's own packages.
PYTHON = "/usr/bin/python3"
_NAMES = ("account", "container", "object", "proxy")

_RINGS = """
import sys
from swift.common.ring import RingBuilder

directory, *ports = sys.argv[1:]
for name, port in zip(("account", "container", "object"), map(int, ports)):
    builder = RingBuilder(4, 1, 0)
    where = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "device": "disk", "weight": 1, "meta": "", **where})
    builder.rebalance()
    builder.get_ring().save(f"{directory}/{name}.ring.gz")
"""

_DEFAULT = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {directory}
devices = {directory}/devices
mount_check = false
disable_fallocate = true
log_level = WARNING
"""

_STORAGE = """
[pipeline:main]
pipeline = {name}-server

[app:{name}-server]
use = egg:swift#{name}
"""

# What would be cached is looked up each time: nothing listens at the cache's address.
_PROXY = f"""
[pipeline:main]
pipeline = catch_errors gatekeeper proxy-logging cache listing_formats s3api tempauth slo proxy-logging proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:proxy-logging]
use = egg:swift#proxy_logging
access_log_level = NOTSET

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1

[filter:listing_formats]
use = egg:swift#listing_formats

[filter:s3api]
use = egg:swift#s3api

[filter:tempauth]
use = egg:swift#tempauth
user_{ACCESS_KEY.replace(":", "_")} = {SECRET_KEY} .admin

[filter:slo]
use = egg:swift#slo
"""


def is_installed() -> bool:
    return all(shutil.which(_command(name)) for name in _NAMES)


@contextlib.contextmanager
def running_swift(directory: Path) -> Iterator[str]:
    """Where it listens. `directory` is to be on a file system with extended attributes."""
    ports = dict(zip(_NAMES, free_ports(len(_NAMES)), strict=True))
    (directory / "devices" / "disk").mkdir(parents=True)
    rings = [str(ports[name]) for name in _NAMES if name != "proxy"]
    subprocess.run([PYTHON, "-c", _RINGS, str(directory), *rings], check=True)
    commands = []
    for name, port in ports.items():
        config = directory / f"{name}.conf"
        general = _DEFAULT.format(port=port, user=getpass.getuser(), directory=directory)
        config.write_text(general + (_PROXY if name == "proxy" else _STORAGE.format(name=name)))
        commands.append([_command(name), str(config), "--verbose"])
    with running_processes(commands, directory / "log"):
        for name, port in ports.items():
            wait_for(lambda port=port: is_listening(port), f"Swift's {name} server does not listen", 60)
        yield f"http://127.0.0.1:{ports['proxy']}"


def _command(name: str) -> str:
    return f"swift-{name}-server"

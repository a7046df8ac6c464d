"""Ceph's S3 gateway: a monitor, a disk in memory and a gateway, each a process, in a directory of its own."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.support.local_processes import free_ports, is_listening, running_processes
from tests.support.servers import wait_for

ACCESS_KEY, SECRET_KEY = "test", "testing"
INSTALL = "apt-get install --no-install-recommends ceph-mon ceph-osd radosgw"

# One disk, so one copy. There is no manager: nobody looks at statistics.
_CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}]
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 1073741824
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 1
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {directory}
log file = {directory}/$name.log
admin socket = {directory}/$name.asok
pid file = {directory}/$name.pid
mon data = {directory}/mon
mon cluster log file = {directory}/cluster.log
osd data = {directory}/osd
rgw data = {directory}/rgw
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw thread pool size = 32
rgw enable ops log = false
"""


def is_installed() -> bool:
    return all(
        shutil.which(name) for name in ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
    )


@contextlib.contextmanager
def running_ceph(directory: Path) -> Iterator[str]:
    """Where it listens."""
    fsid, config, log = str(uuid.uuid4()), directory / "ceph.conf", directory / "log"
    mon, gateway = free_ports(2)
    config.write_text(_CONFIG.format(fsid=fsid, mon=mon, gateway=gateway, directory=directory))
    for name in ("mon", "osd", "rgw"):
        (directory / name).mkdir()
    given = ("--conf", str(config))

    def run(*command: str) -> None:
        with log.open("ab") as output:
            subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, timeout=120)

    monmap = str(directory / "monmap")
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon}]", monmap)
    run("ceph-mon", *given, "--mkfs", "--id", "a", "--monmap", monmap)
    with running_processes([["ceph-mon", *given, "-f", "--id", "a"]], log):
        osd = str(uuid.uuid4())
        run("ceph", *given, "--connect-timeout", "60", "osd", "new", osd)
        run("ceph-osd", *given, "--mkfs", "--id", "0", "--osd-uuid", osd)
        with (
            running_processes([["ceph-osd", *given, "-f", "--id", "0"]], log),
            running_processes([["radosgw", *given, "-f", "--name", "client.rgw.a"]], log),
        ):
            wait_for(lambda: is_listening(gateway), "Ceph's gateway does not listen", 120)
            keys = (f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
            run("radosgw-admin", *given, "user", "create", "--uid=test", "--display-name=test", *keys)
            yield f"http://127.0.0.1:{gateway}"

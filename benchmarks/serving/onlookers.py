"""Who looks on while a server is measured: a collector that takes its traces, or an open console.

    python -m benchmarks.serving.onlookers collector 4318
    python -m benchmarks.serving.onlookers console http://127.0.0.1:8000

The console's page asks for its stream of events alone. The browser that draws it is left out: it runs on the machine of
whoever looks, while a benchmark has one machine for all.
"""

from __future__ import annotations

import contextlib
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Taker(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def collect(port: int) -> None:
    """Take whatever is sent."""
    ThreadingHTTPServer(("127.0.0.1", port), _Taker).serve_forever()


def watch(url: str) -> None:
    """Read every event of the live queue, for as long as the server is there."""
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/queue/events") as events:
            for _ in events:
                pass
        time.sleep(0.5)


def main() -> int:
    kind, of = sys.argv[1:]
    if kind == "collector":
        collect(int(of))
    else:
        watch(of)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())

"""Real replicas on Ray Serve, on this machine: what a death costs, what scaling costs, what affinity gains.

- death: 100 requests at once, streams and whole replies, greedy and drawn without a seed; one of two replicas is
  killed, with its engine, while they run. Greedy answers must be those of an undisturbed run.
- scale: 1 replica, then 2, then 1 again, while requests come; none may fail. autoscale: the same by Serve itself, as
  requests come and go; first_token: by what they wait for their first token. update: another setting, as a new version.
- affinity: 40 soft prompts and two replicas that hold 20 each; default: the same by Serve's own router.

    python -m benchmarks.scaling.on_ray --store /tmp/ray-prompts
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from benchmarks.scaling.ray_requests import ask, body_of, replicas
from benchmarks.scaling.ray_scaling import ScalingParts
from benchmarks.serving.soft_prompts import VIRTUAL_TOKENS, register
from softbatch.server.cluster.cluster_settings import ClusterSettings
from softbatch.server.cluster.deployments import application
from softbatch.server.settings import Settings

PARTS = ["affinity", "death", "scale", "autoscale", "first_token", "update", "default"]
REQUESTS = 100
CONTEXT_TOKENS, VOCAB = 512, 49152
SOFT_PROMPTS, HELD = 40, 20
BLOCK_BYTES = 368_640  # of the embedded model, in bfloat16
BLOCKS = HELD * VIRTUAL_TOKENS // 16 + 8  # and those of the requests that run
WARM, ASKED = 4 * SOFT_PROMPTS, 8 * SOFT_PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("/tmp/softbatch-ray-prompts"))
    parser.add_argument("--parts", nargs="+", default=PARTS)
    options = parser.parse_args()
    register(options.store, SOFT_PROMPTS, CONTEXT_TOKENS, VOCAB)
    bench = Bench(options.store)
    try:
        for part in options.parts:
            print(json.dumps({part: getattr(bench, part)()}), flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


class Bench(ScalingParts):
    def __init__(self, store: Path) -> None:
        self.port, self.metrics_port = _free_port(), _free_port()
        self.store = store
        often = {"metrics_report_interval_ms": 2000}
        ports = {"_metrics_export_port": self.metrics_port}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=often, **ports)
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})

    def deploy(self, count: int, settings: dict[str, Any] | None = None, **cluster_settings: Any) -> None:
        cluster = ClusterSettings.model_validate({"replicas": count, "replica_cpus": 0.9, **cluster_settings})
        memory = (BLOCKS + 0.5) * BLOCK_BYTES / 2**30
        given = Settings(model="smollm2-135m", prompt_store=self.store, kv_cache_gib=memory, **(settings or {}))
        serve.run(application([(cluster, given)]), name="softbatch", route_prefix="/")

    def death(self) -> dict[str, Any]:
        self.deploy(2)
        expected = asyncio.run(self.ask_all(None))
        found = asyncio.run(self.ask_all(self.kill_one))
        lost = [answer for answer in found if answer is None]
        # Those that were drawn without a seed are another text each time: that they are whole is what counts.
        other = sum(one != two for at, (one, two) in enumerate(zip(expected, found, strict=True)) if at % 4 < 2)
        return {
            "requests": len(found),
            "went_to_another_replica": _count_in_logs("goes to another replica"),
            "lost": len(lost),
            "greedy_answers_that_differ": other,
            "killed_processes": self.killed,
        }

    async def ask_all(self, disturb: Callable[[], None] | None) -> list[str | None]:
        limits = httpx.Limits(max_connections=None)
        started = asyncio.Event()
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits) as client:
            asked = [asyncio.create_task(ask(client, body_of(at), started)) for at in range(REQUESTS)]
            if disturb is not None:
                await started.wait()
                await asyncio.sleep(0.5)
                await asyncio.to_thread(disturb)
            return await asyncio.gather(*asked)

    def kill_one(self) -> None:
        worker = replicas()[0]
        dying = [worker, *worker.children(recursive=True)]
        self.killed = len(dying)
        for process in dying:
            process.send_signal(signal.SIGKILL)

    def affinity(self, router: str = "affinity") -> dict[str, Any]:
        self.deploy(2, router=router)
        start = self.hits()
        asyncio.run(self.ask_soft_prompts(WARM))  # until each is where it will be
        before = self.hits_after(start, WARM)
        asyncio.run(self.ask_soft_prompts(ASKED))
        after = self.hits_after(before, ASKED)
        each = {key: tuple(a - b for a, b in zip(after[key], before.get(key, (0, 0)), strict=True)) for key in after}
        each = {key: counts for key, counts in each.items() if any(counts)}  # not those of an earlier deployment
        asked = {key: hits + misses for key, (hits, misses) in each.items()}
        return {
            "soft_prompts": SOFT_PROMPTS,
            "held_by_each": HELD,
            "hit_rate": round(sum(hits for hits, _ in each.values()) / sum(asked.values()), 3),
            "of_each": {key: round(hits / asked[key], 3) for key, (hits, _) in each.items()},
            "requests": asked,
        }

    def default(self) -> dict[str, Any]:
        serve.delete("softbatch")
        return self.affinity("default")

    async def ask_soft_prompts(self, count: int) -> None:
        names = [f"context-{at % SOFT_PROMPTS}" for at in range(count)]
        random.Random(count).shuffle(names)
        async with httpx.AsyncClient(base_url=self.url, timeout=None) as http:

            async def client() -> None:
                while names:
                    body = {"model": names.pop(), "prompt": "And then", "max_tokens": 1, "temperature": 0}
                    reply = await http.post("/v1/completions", json=body)
                    assert reply.status_code == 200, reply.text

            await asyncio.gather(*(client() for _ in range(4)))

    def hits_after(self, before: dict[str, tuple[float, float]], asked: int) -> dict[str, tuple[float, float]]:
        """Once all that was asked since is counted: Ray reports every few seconds."""
        for _ in range(60):
            after = self.hits()
            if _total(after) >= _total(before) + asked:
                return after
            time.sleep(1)
        raise RuntimeError(f"Ray's metrics do not count all requests: {before}, {after}")

    def hits(self) -> dict[str, tuple[float, float]]:
        """Hits and misses of each replica, by Ray's metrics."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30).text
        return {key: (_sample(text, "hits", key), _sample(text, "misses", key)) for key in _replica_names(text)}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def _count_in_logs(what: str) -> int:
    """Lines of Ray's workers in this session."""
    logs = Path("/tmp/ray/session_latest/logs")
    return sum(path.read_text(errors="replace").count(what) for path in logs.glob("worker-*.err"))


def _total(counts: dict[str, tuple[float, float]]) -> float:
    return sum(hits + misses for hits, misses in counts.values())


_NAME = r"ray_softbatch_soft_prompt_cache_%s_total\{([^}]*)\} ([0-9.e+]+)"


def _replica_names(text: str) -> set[str]:
    return {key for labels, _ in re.findall(_NAME % "misses", text) for key in re.findall(r'replica="([^"]+)"', labels)}


def _sample(text: str, what: str, replica: str) -> float:
    return sum(float(value) for labels, value in re.findall(_NAME % what, text) if f'replica="{replica}"' in labels)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()

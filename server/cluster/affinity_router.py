"""Serve's request router that knows which replica holds which soft prompt. Ray's interface for it is alpha."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from softbatch.server.cluster.affinity import ReplicaLoad, ranked
from softbatch.server.cluster.request_kinds import PLACES

# So long at most a replica is taken to hold what was sent to it without saying so itself, and so long it is not asked
# to know: what it is sent has to be loaded.
FRESH_SECONDS = 5.0
LOAD_SECONDS = 1.0
MOST_FRESH = 10_000


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """A request's `multiplexed_model_id` is the name of what it needs, and is empty if any replica is as good."""

    def initialize_state(self, **_: Any) -> None:
        self._sent: OrderedDict[tuple[str, ReplicaID], float] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        name = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if not name:
            two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
            return [two, candidate_replicas]
        by_key = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        candidates = [self._candidate(name, replica) for replica in candidate_replicas]
        groups = ranked(name, candidates, only_holders=name in PLACES)
        return [[by_key[key] for key in group] for group in groups]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        name = pending_request.metadata.multiplexed_model_id
        if name:
            self._sent[name, replica_id] = time.time()
            self._sent.move_to_end((name, replica_id))
            if len(self._sent) > MOST_FRESH:
                self._sent.popitem(last=False)

    def _candidate(self, name: str, replica: RunningReplica) -> ReplicaLoad:
        stats = replica.routing_stats
        sent = self._sent.get((name, replica.replica_id), 0.0)
        is_fresh = name not in PLACES and max(time.time() - FRESH_SECONDS, stats.get("at", 0.0) - LOAD_SECONDS) < sent
        return ReplicaLoad(
            key=replica.replica_id.unique_id,
            outstanding=self.replica_queue_len_cache.get(replica.replica_id) or 0,
            holds=is_fresh or name in stats.get("held", ()),
            has_room=stats.get("has_room", True),
        )

"""Serve's request router that knows which replica holds which soft prompt. Ray's interface for it is alpha."""

from __future__ import annotations

import random
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from softbatch.prompt_store.names import is_name
from softbatch.server.cluster.affinity import PREFIX_BOUND, SOFT_PROMPT_BOUND, ReplicaLoad, ranked
from softbatch.server.cluster.prefixes import PrefixTable, hashes_in
from softbatch.server.cluster.request_kinds import PLACES
from softbatch.server.cluster.residency import Residency


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """A request's `multiplexed_model_id` is the name of what it needs, or tells how its prompt begins. It is empty if
    any replica is as good."""

    def initialize_state(self, **_: Any) -> None:
        self._residency = Residency()
        self._prefixes = PrefixTable()

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
        groups = self._ranked(name, by_key)
        return [[by_key[key] for key in group] for group in groups]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        name = pending_request.metadata.multiplexed_model_id
        if hashes := hashes_in(name):
            self._prefixes.sent(hashes, replica_id.unique_id)
        elif is_name(name):  # no place is
            self._residency.sent(replica_id.unique_id, name, time.time())

    def _ranked(self, name: str, replicas: dict[str, RunningReplica]) -> list[list[str]]:
        outstanding = {
            key: self.replica_queue_len_cache.get(replica.replica_id) or 0 for key, replica in replicas.items()
        }
        if hashes := hashes_in(name):
            matches = self._prefixes.matches(hashes)
            loads = [ReplicaLoad(key, outstanding[key], matches.get(key, 0)) for key in replicas]
            return ranked(hashes[0], loads, PREFIX_BOUND)
        now = time.time()
        self._residency.keep(replicas)
        for key, replica in replicas.items():
            self._residency.take(key, replica.routing_stats, now)
        loads = [
            ReplicaLoad(
                key, outstanding[key], int(self._residency.holds(key, name)), has_room=self._residency.has_room(key)
            )
            for key in replicas
        ]
        return ranked(name, loads, None if name in PLACES else SOFT_PROMPT_BOUND)

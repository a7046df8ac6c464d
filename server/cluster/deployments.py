"""The application that Ray Serve runs: replicas of the server, one deployment a model, behind an ingress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from softbatch.server.cluster.cluster_settings import ClusterSettings, with_own_directories
from softbatch.server.cluster.ingress import Ingress
from softbatch.server.settings import Settings, absolute_model

ROUTER = "softbatch.server.cluster.affinity_router.AffinityRouter"
POLICY = "softbatch.server.cluster.scaling_policy.ScalingPolicy"
# Serve hears of the load every 10 s.
SHORTEST_LOOK_BACK, LONGEST_LOOK_BACK = 12.0, 30.0
# Between two looks at what the replicas hold.
STATS_SECONDS = 1.0
# Beside what a replica takes in: it refuses the others itself, with 429.
SPARE_REQUESTS = 32
MOST_REQUESTS = 1_000_000


def build(arguments: dict[str, Any]) -> Application:
    """For `serve run` and `serve deploy`, as `import_path`. Raises ValueError."""
    given = dict(arguments)
    several = given.pop("models", None) or [{}]
    return application([_split({**given, **one}) for one in several])


def _split(given: dict[str, Any]) -> tuple[ClusterSettings, Settings]:
    of_cluster = {name: value for name, value in given.items() if name in ClusterSettings.model_fields}
    return ClusterSettings(**of_cluster), Settings(**{k: v for k, v in given.items() if k not in of_cluster})


def application(deployed: Sequence[tuple[ClusterSettings, Settings]]) -> Application:
    """One deployment for each pair; what concerns all of them the first says. Raises ValueError."""
    clusters = [cluster for cluster, _ in deployed]
    models = [_absolute(one) for _, one in deployed]
    names = [_name(one) for one in models]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise ValueError(f"models: two are called {name!r}; give each a served_model_name of its own")
    models = with_own_directories(dict(zip(names, models, strict=True)))
    replicas = [
        _replicas(cluster, one, f"model-{at}") for at, (cluster, one) in enumerate(zip(clusters, models, strict=True))
    ]
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=clusters[0].ingress_replicas,
        max_ongoing_requests=MOST_REQUESTS,
        graceful_shutdown_timeout_s=models[0].drain_timeout,
        ray_actor_options={"num_cpus": 0},
    )
    known = [frozenset({name, one.model}) for name, one in zip(names, models, strict=True)]
    return ingress.bind(models[0], known, *replicas)


def _replicas(cluster: ClusterSettings, settings: Settings, name: str) -> Application:
    from softbatch.server.cluster.model_replica import ModelReplica

    options: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas is not None:
        options = {"autoscaling_config": _scaling(cluster, settings)}
    if cluster.router == "affinity":
        options["request_router_config"] = RequestRouterConfig(
            request_router_class=ROUTER, request_routing_stats_period_s=STATS_SECONDS
        )
    deployment = serve.deployment(
        ModelReplica,
        name=name,
        max_ongoing_requests=settings.max_batch_size + settings.max_queue_size + SPARE_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": cluster.replica_cpus, "num_gpus": cluster.replica_gpus},
        **options,
    )
    return deployment.bind(settings)


def _scaling(cluster: ClusterSettings, settings: Settings) -> AutoscalingConfig:
    least, most = cluster.min_replicas or 1, cluster.max_replicas or 1
    by_first_token: dict[str, Any] = {}
    if cluster.target_first_token is not None:
        aim = {"first_token_seconds": cluster.target_first_token}
        by_first_token = {"policy": AutoscalingPolicy(policy_function=POLICY, policy_kwargs=aim)}
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        initial_replicas=min(max(cluster.replicas, least), most),
        target_ongoing_requests=cluster.target_requests or float(settings.max_batch_size),
        upscale_delay_s=cluster.scale_up_after,
        downscale_delay_s=cluster.scale_down_after,
        # Of what was long before the delay, a decision says nothing.
        look_back_period_s=min(LONGEST_LOOK_BACK, max(SHORTEST_LOOK_BACK, cluster.scale_up_after)),
        **by_first_token,
    )


def _absolute(settings: Settings) -> Settings:
    """Replicas run in a directory of Ray's."""
    paths = {name: value.expanduser().absolute() for name, value in settings if isinstance(value, Path)}
    return settings.model_copy(update={"model": absolute_model(settings.model), **paths})


def _name(settings: Settings) -> str:
    """As the server will call its model."""
    path = Path(settings.model)
    return settings.served_model_name or (path.stem if path.suffix.lower() == ".gguf" else path.name)

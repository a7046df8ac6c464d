"""What stands in deploy/ fits the server: metrics, routes, alerts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from softbatch.server.observability.metrics import Metrics
from softbatch.server.settings import Settings
from tests.support.servers import PROJECT

DEPLOY = PROJECT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "softbatch.json"
MANIFESTS = DEPLOY / "kubernetes" / "softbatch.yaml"
UNIT = DEPLOY / "systemd" / "softbatch.service"
RULES = [DEPLOY / "prometheus" / name for name in ("rules.yml", "alerts.yml")]


def rules() -> list[dict[str, Any]]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[str]:
    """Of every panel."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def known_names() -> set[str]:
    """Of all series that the server gives, and of those that the rules record."""
    names = {rule["record"] for rule in rules() if "record" in rule}
    for family in Metrics().registry.collect():
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + end for end in ends}
    return names


@pytest.mark.parametrize("expression", [*queries(), *(rule["expr"] for rule in rules())])
def test_expressions_name_metrics_that_exist(expression: str) -> None:
    named = set(re.findall(r"(?:instance:)?softbatch_\w+(?::\w+)?", expression))
    assert named or "up{" in expression
    assert named <= known_names() | {"softbatch_compression_jobs"}


def test_the_dashboard_is_what_its_program_writes() -> None:
    command = "import make_dashboard; print(make_dashboard.text(), end='')"
    written = subprocess.check_output([sys.executable, "-c", command], cwd=DEPLOY / "grafana", text=True)
    assert DASHBOARD.read_text() == written


@pytest.mark.parametrize("alert", [rule for rule in rules() if "alert" in rule], ids=lambda rule: rule["alert"])
def test_alerts_name_a_section_that_says_what_to_do(alert: dict[str, Any]) -> None:
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^## (.+)$", (PROJECT / page).read_text(), re.MULTILINE)
    assert alert["alert"] in headings
    assert anchor == alert["alert"].lower()


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    """What Kubernetes is to run."""
    documents = list(yaml.safe_load_all(MANIFESTS.read_text()))
    (deployment,) = (document for document in documents if document["kind"] == "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def test_probes_ask_routes_that_exist(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    assert "/health/live" in (PROJECT / "Dockerfile").read_text()


def test_what_runs_is_not_root_and_writes_into_volumes_alone(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert pod["securityContext"]["runAsNonRoot"]
    dockerfile = (PROJECT / "Dockerfile").read_text()
    user = pod["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}\n" in dockerfile
    volumes = re.findall(r"^VOLUME (.+)$", dockerfile, re.MULTILINE)
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [*volumes, "/tmp"]
    places = re.findall(r"^ENV (?:HOME|XDG_CACHE_HOME|SOFTBATCH_PROMPT_STORE)=(.+)$", dockerfile, re.MULTILINE)
    assert len(places) == 3
    assert all(place.startswith(volumes[0]) for place in places)


def test_everyone_waits_for_the_drain(pod: dict[str, Any]) -> None:
    drain = Settings.model_fields["drain_timeout"].default
    before = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > drain + before
    (unit,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert int(unit) > drain
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert int(compose["services"]["softbatch"]["stop_grace_period"].removesuffix("s")) > drain


def test_kubernetes_knows_every_field() -> None:
    """Of the newest version that the schemas have; KEDA's own kinds are not among them."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in yaml.safe_load_all(MANIFESTS.read_text()):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """As it is, but for the command, which has to be there."""
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")

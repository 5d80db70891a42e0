"""The ScaledObject for KEDA: its fields, the Deployment that it scales, and what its queries say of a real server."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tests.ops.prometheus import SHIPPED, Prometheus, running_prometheus
from tests.ops.test_helm import render
from tests.serving import ROOT, RunningServer, running_server

SCALED = yaml.safe_load((ROOT / "deploy" / "keda" / "scaledobject.yaml").read_text())
OF_VLLM = {
    "type": "prometheus",
    "name": "vllm",
    "metadata": {"query": 'sum(vllm:num_requests_waiting{model_name="tiny"})', "threshold": "5"},
}
"""A trigger as examples for vLLM have it."""


class Strict(BaseModel):
    """Fields of KEDA's custom resource, keda.sh/v1alpha1, that ours uses; any other is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Target(Strict):
    name: str


class PrometheusTrigger(Strict):
    """KEDA takes only strings."""

    serverAddress: str = Field(pattern="^https?://")
    query: str
    threshold: str = Field(pattern=r"^\d+(\.\d+)?$")
    ignoreNullValues: str = Field(pattern="^(true|false)$")


class Trigger(Strict):
    type: str = Field(pattern="^prometheus$")
    name: str
    metadata: PrometheusTrigger


class Fallback(Strict):
    failureThreshold: int = Field(ge=1)
    replicas: int = Field(ge=1)


class Spec(Strict):
    scaleTargetRef: Target
    minReplicaCount: int = Field(ge=1)
    maxReplicaCount: int
    pollingInterval: int = Field(ge=1)
    fallback: Fallback
    advanced: dict[str, Any]
    triggers: list[Trigger] = Field(min_length=1)


class ScaledObject(Strict):
    apiVersion: str = Field(pattern="^keda.sh/v1alpha1$")
    kind: str = Field(pattern="^ScaledObject$")
    metadata: Target
    spec: Spec


def test_the_scaled_object_has_kedas_fields() -> None:
    spec = ScaledObject.model_validate(SCALED).spec
    assert spec.minReplicaCount <= spec.maxReplicaCount
    # A failing Prometheus takes no server away.
    assert spec.fallback.replicas == spec.maxReplicaCount
    assert len({trigger.name for trigger in spec.triggers}) == len(spec.triggers)


def test_the_scaled_object_names_the_deployment_and_thresholds_of_the_chart() -> None:
    manifests = render({"autoscaling": {"enabled": True}}, name="fastblt")
    assert SCALED["spec"]["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    scaler = manifests["HorizontalPodAutoscaler"]["spec"]
    thresholds = {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in scaler["metrics"]}
    for trigger in SCALED["spec"]["triggers"]:
        assert thresholds.pop(f"fastblt_{trigger['name']}_sequences") == trigger["metadata"]["threshold"]
    assert not thresholds
    # Our field has the scaler's own shape, whose schema tests/ops/test_helm.py holds the chart against.
    behavior = SCALED["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == scaler["behavior"]
    (job,) = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())["scrape_configs"]
    assert all(f'job="{job["job_name"]}"' in t["metadata"]["query"] for t in SCALED["spec"]["triggers"])


def pod(deployment: str = "fastblt") -> str:
    """A name as a Deployment gives it."""
    return f"{deployment}-6d4cf56db6-x7k2p"


@pytest.mark.parametrize("trigger", SCALED["spec"]["triggers"], ids=lambda trigger: str(trigger["name"]))
def test_only_the_pods_of_the_release_count(trigger: dict[str, Any], tmp_path: Path) -> None:
    places = {("default", pod()): 3, ("default", pod("fastblt-two")): 10, ("another", pod()): 100}
    series = [
        {
            "series": f'fastblt_{trigger["name"]}_sequences{{job="fastblt", namespace="{namespace}", pod="{name}"}}',
            "values": f"{value}x5",
        }
        for (namespace, name), value in places.items()
    ]
    check = {"expr": trigger["metadata"]["query"], "eval_time": "3m", "exp_samples": [{"value": 3}]}
    file = tmp_path / "tests.yml"
    file.write_text(
        yaml.safe_dump({"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [check]}]})
    )
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("log") / "log"
    with running_server(tiny, log, "--metric-aliases", "vllm", "--max-sequences", "8") as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """As a PodMonitor labels a pod of the release."""
    labels = {"namespace": "default", "pod": pod()}
    target = {"targets": [server.url.removeprefix("http://")], "labels": labels}
    scraped = {"job_name": "fastblt", "static_configs": [target]}
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), scraped) as running:
        yield running


def numbers(prometheus: Prometheus) -> dict[str, float]:
    """By trigger: KEDA takes a query's only series, and nothing else."""
    found = {}
    for trigger in (*SCALED["spec"]["triggers"], OF_VLLM):
        if series := prometheus.query(trigger["metadata"]["query"]):
            (only,) = series
            found[trigger["name"]] = float(only["value"][1])
    return found


def until(prometheus: Prometheus, low: bool) -> dict[str, float]:
    """The numbers once all are 0, or above 0."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = numbers(prometheus)
        if len(found) == 3 and all((number == 0) == low for number in found.values()):
            return found
        time.sleep(0.3)
    raise AssertionError(numbers(prometheus))


def test_the_queries_follow_the_load_up_and_down(server: RunningServer, prometheus: Prometheus) -> None:
    until(prometheus, low=True)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3000, "n": 60, "ignore_eos": True, "stream": True}
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines)
        busy = until(prometheus, low=False)
        assert busy["running"] <= 8 and busy["queued"] > 4
    until(prometheus, low=True)

"""The Helm chart, rendered by Helm's own library and held against Kubernetes' schemas and against the server."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import httpx
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from engine.process.client import STOP_SECONDS
from server.cli import app
from server.lifecycle import LAST_RESPONSES_SECONDS
from server.settings import ServerSettings
from tests.conftest import ROOT

CHART = ROOT / "deploy" / "helm" / "fastblt"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
Manifests = dict[str, dict[str, Any]]

ALWAYS = {"Deployment", "PodDisruptionBudget", "Service", "ServiceAccount"}
CLAIM = {"persistentVolumeClaim": {"claimName": "checkpoints", "readOnly": True}}
PEERS = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
EVERYTHING = {
    "replicas": 3,
    "args": ["--dtype=bfloat16", "--max-sequences", "32", "--no-graphs"],
    "env": [{"name": "FASTBLT_SERVED_MODEL_NAME", "value": "blt"}],
    "model": {"volume": CLAIM, "subPath": "blt-1b"},
    "cache": {"volume": {"persistentVolumeClaim": {"claimName": "kernels"}}},
    "apiKeys": {"secret": "keys"},
    "resources": {"requests": {"cpu": "4"}, "limits": {"memory": "16Gi"}},
    "service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}},
    "networkPolicy": {"enabled": True, "from": PEERS, "egress": [{"to": PEERS}]},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "serviceAccount": {"annotations": {"a": "b"}},
    "imagePullSecrets": [{"name": "registry"}],
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "text"},
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
}
CHOICES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, ALWAYS),
    "cpu": ({"device": "cpu", "resources": {}}, ALWAYS),
    "claim": ({"model": {"volume": CLAIM, "subPath": "blt-1b"}}, ALWAYS),
    "host path": ({"model": {"volume": {"hostPath": {"path": "/srv/checkpoint"}}}}, ALWAYS),
    "keys": ({"apiKeys": {"secret": "keys", "key": "mine"}}, ALWAYS),
    "one GPU in all": ({"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}}, ALWAYS),
    "autoscaling": ({"autoscaling": {"enabled": True}}, ALWAYS | {"HorizontalPodAutoscaler"}),
    "pod monitor": ({"podMonitor": {"enabled": True}}, ALWAYS | {"PodMonitor"}),
    "rules": ({"prometheusRule": {"enabled": True}}, ALWAYS | {"PrometheusRule"}),
    "closed": ({"networkPolicy": {"enabled": True}}, ALWAYS | {"NetworkPolicy"}),
    "bare": (
        {"serviceAccount": {"create": False}, "podDisruptionBudget": {"enabled": False}, "preStopSeconds": 0},
        {"Deployment", "Service"},
    ),
    "everything": (EVERYTHING, ALWAYS | {"NetworkPolicy", "PodMonitor", "PrometheusRule"}),
}


OPTIONAL = {"global", "limits", "claims", "type", "rollingUpdate"}
"""Values without a default."""


def render(values: dict[str, Any] | None = None, chart: Path = CHART, name: str = "demo") -> Manifests:
    """The manifests by kind; no two are of one kind."""
    with helm_python.Chart.load(chart) as loaded:
        files = loaded.render(values, name=name, namespace="text")
    del files["fastblt/templates/NOTES.txt"]
    found = [manifest for text in files.values() for manifest in yaml.safe_load_all(text) if manifest]
    assert len({manifest["kind"] for manifest in found}) == len(found)
    return {manifest["kind"]: manifest for manifest in found}


def pod(manifests: Manifests) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(manifests: Manifests) -> dict[str, Any]:
    (only,) = pod(manifests)["containers"]
    return only


@pytest.fixture(params=CHOICES)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    values, kinds = CHOICES[request.param]
    found = render(values)
    assert found.keys() == kinds
    return found


@pytest.mark.parametrize("choice", CHOICES)
def test_helm_lint_accepts_the_chart(choice: str) -> None:
    report = helm_python.lint(CHART, CHOICES[choice][0], strict=True)
    assert not report["errors"]
    # A chart for a registry's web page would have one.
    assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("version", ["1.25", kubernetes_validate.latest_version()])
def test_manifests_match_the_kubernetes_schemas(manifests: Manifests, version: str) -> None:
    for manifest in manifests.values():
        if not manifest["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_kubernetes_schemas_reject_a_wrong_manifest() -> None:
    manifests = render()
    container(manifests)["comand"] = ["sh"]
    with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
        kubernetes_validate.validate(manifests["Deployment"], kubernetes_validate.latest_version(), strict=True)


def test_labels_and_selectors_of_the_manifests_match(manifests: Manifests) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    chosen = {"app.kubernetes.io/name": "fastblt", "app.kubernetes.io/instance": "demo"}
    selectors = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        *(manifests[kind]["spec"]["selector"]["matchLabels"] for kind in ("PodDisruptionBudget", "PodMonitor")
          if kind in manifests),
        *(manifests[kind]["spec"]["podSelector"]["matchLabels"] for kind in ("NetworkPolicy",) if kind in manifests),
    ]  # fmt: skip
    assert all(selector == chosen for selector in selectors)
    assert chosen.items() <= labels.items()
    account = manifests.get("ServiceAccount", {"metadata": {"name": "default"}})
    assert pod(manifests)["serviceAccountName"] == account["metadata"]["name"]
    mounts = {mount["name"] for mount in container(manifests)["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod(manifests)["volumes"]}


def flags(manifests: Manifests) -> dict[str, Any]:
    """As the command line reads and checks them."""
    command = ["serve", "--model", "x", *container(manifests)["args"], "--print-config"]
    result = CliRunner().invoke(app, command)
    assert not result.exit_code, result.output
    given: dict[str, Any] = yaml.safe_load(result.output)
    return given


def test_the_command_line_accepts_the_arguments_of_the_chart(manifests: Manifests) -> None:
    given = flags(manifests)
    assert (given["drain-seconds"], given["restart-seconds"], given["loading-seconds"]) == (30, 30, 1800)
    assert (given["device"] == "cuda") == ("nvidia.com/gpu" in container(manifests)["resources"].get("limits", {}))


def test_a_pod_has_time_to_drain(manifests: Manifests) -> None:
    hook = container(manifests).get("lifecycle", {"preStop": {"exec": {"command": ["sleep", "0"]}}})
    waits = int(hook["preStop"]["exec"]["command"][1])
    least = waits + 30 + LAST_RESPONSES_SECONDS + STOP_SECONDS
    assert pod(manifests)["terminationGracePeriodSeconds"] >= least


def test_the_pod_uses_the_user_and_folders_of_the_image(manifests: Manifests) -> None:
    (user,) = re.findall(r"^USER (\d+):\1$", DOCKERFILE, re.M)
    assert pod(manifests)["securityContext"].items() >= {"runAsUser": int(user), "runAsNonRoot": True}.items()
    mounts = {mount["name"]: mount["mountPath"] for mount in container(manifests)["volumeMounts"]}
    assert f"HOME={mounts['cache']} " in DOCKERFILE and mounts["tmp"] == "/tmp"
    assert mounts.get("model", "/models") == re.findall(r"FASTBLT_MODEL=(\S+)", DOCKERFILE)[0]
    (port,) = container(manifests)["ports"]
    assert [str(port["containerPort"])] == re.findall(r"FASTBLT_PORT=(\d+)", DOCKERFILE)
    assert container(manifests)["securityContext"]["readOnlyRootFilesystem"]


def test_every_port_in_the_manifests_is_the_servers(manifests: Manifests) -> None:
    (port,) = container(manifests)["ports"]
    named = [container(manifests)[f"{probe}Probe"]["httpGet"]["port"] for probe in ("startup", "readiness", "liveness")]
    named += [entry["targetPort"] for entry in manifests["Service"]["spec"]["ports"]]
    if "PodMonitor" in manifests:
        named += [entry["port"] for entry in manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]]
    if "NetworkPolicy" in manifests:
        named += [entry["port"] for entry in manifests["NetworkPolicy"]["spec"]["ingress"][0]["ports"]]
    assert set(named) == {port["name"]}


def test_the_server_answers_the_paths_and_metrics_named_in_the_chart(tiny_server: str) -> None:
    manifests = render(EVERYTHING | {"autoscaling": {"enabled": True}})
    paths = [container(manifests)[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")]
    (endpoint,) = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert all(httpx.get(tiny_server + path).status_code == 200 for path in [*paths, endpoint["path"]])
    exposed = httpx.get(tiny_server + endpoint["path"]).text
    for metric in manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]:
        name, target = metric["pods"]["metric"]["name"], metric["pods"]["target"]
        assert f"# TYPE {name} gauge" in exposed
        assert target["type"] == "AverageValue" and int(target["averageValue"]) > 0


def test_with_autoscaling_the_deployment_sets_no_replicas() -> None:
    scaled = render({"autoscaling": {"enabled": True, "maxReplicas": 9}})
    assert "replicas" not in scaled["Deployment"]["spec"] and render()["Deployment"]["spec"]["replicas"] == 1
    target = scaled["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", scaled["Deployment"]["metadata"]["name"])


def test_another_scaler_may_decide_the_replicas() -> None:
    assert "replicas" not in render({"replicas": None})["Deployment"]["spec"]


def test_api_keys_reach_the_server_as_a_file() -> None:
    manifests = render({"apiKeys": {"secret": "keys", "key": "mine"}})
    (variable,) = container(manifests)["env"]
    (volume,) = (v["secret"] for v in pod(manifests)["volumes"] if v["name"] == "api-keys")
    (mount,) = (m for m in container(manifests)["volumeMounts"] if m["name"] == "api-keys")
    assert variable["name"] == "FASTBLT_API_KEY_FILE" and "api_key_file" in ServerSettings.model_fields
    assert variable["value"] == f"{mount['mountPath']}/{volume['items'][0]['path']}"
    assert (volume["secretName"], volume["items"][0]["key"]) == ("keys", "mine")
    assert "keys" not in str(render())


def test_service_variables_of_kubernetes_are_not_read_as_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets FASTBLT_PORT to a URL for a Service that is called fastblt, as a release of that name has it."""
    manifests = render(name="fastblt")
    assert manifests["Service"]["metadata"]["name"] == "fastblt"
    assert pod(manifests)["enableServiceLinks"] is False
    monkeypatch.setenv("FASTBLT_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(ValueError, match="port"):
        ServerSettings()


def test_seconds_of_the_chart_reach_the_server() -> None:
    given = flags(render({"drainSeconds": 7, "restartSeconds": 90, "loadingSeconds": 600}))
    assert (given["drain-seconds"], given["restart-seconds"], given["loading-seconds"]) == (7, 90, 600)


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Path]:
    """The chart as `helm package` makes it, with what its links point to."""
    yield Path(helm_python.package(str(CHART), destination=str(tmp_path)))


def test_the_chart_has_the_prometheus_rules_of_the_repository(archive: Path, tmp_path: Path) -> None:
    written = [yaml.safe_load((ROOT / "deploy" / "prometheus" / f).read_text()) for f in ("rules.yml", "alerts.yml")]
    for chart in (CHART, archive):
        spec = render({"prometheusRule": {"enabled": True}}, chart)["PrometheusRule"]["spec"]
        assert spec == {"groups": [group for rules in written for group in rules["groups"]]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec))
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], check=True)


def test_the_pod_monitor_uses_the_job_name_of_the_rules() -> None:
    manifests = render({"podMonitor": {"enabled": True}}, name="other")
    label = manifests["PodMonitor"]["spec"]["jobLabel"]
    job = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"][label]
    (scraped,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job == scraped["job_name"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "additional properties 'replica' not allowed"),
        ({"replicas": -1}, "at '/replicas': minimum: got -1, want 0"),
        ({"device": "gpu"}, "at '/device': value must be one of 'cuda', 'cpu'"),
        ({"drainSeconds": "30s"}, "at '/drainSeconds': got string, want integer"),
        ({"restartSeconds": -1}, "at '/restartSeconds': minimum: got -1, want 0"),
        ({"loadingSeconds": 0}, "at '/loadingSeconds': minimum: got 0, want 1"),
        ({"args": ["--restart-seconds=90"]}, "args: --restart-seconds=90 is set by the chart"),
        ({"model": {"volume": {**CLAIM, "hostPath": {"path": "/x"}}}}, "at '/model/volume': maxProperties: got 2"),
        ({"cache": {"volume": {"emptyDir": True}}}, "at '/cache/volume/emptyDir': got boolean, want object"),
        ({"service": {"port": 70000}}, "at '/service/port': maximum: got 70,000"),
        ({"apiKeys": {"secret": ["a"]}}, "at '/apiKeys/secret': got array, want string"),
        ({"args": ["--port=80"]}, "args: --port=80 is set by the chart"),
        ({"args": ["--model", "/x"]}, "args: --model is set by the chart"),
        ({"args": ["--ssl-certfile=/tls/crt"]}, "args: --ssl-certfile=/tls/crt cannot be used: the probes speak plain"),
        ({"autoscaling": {"enabled": True, "minReplicas": 5}}, "minReplicas 5 must not exceed maxReplicas 4"),
    ],
)  # fmt: skip
def test_wrong_chart_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(message)):
        render(values)


def test_the_documented_values_are_accepted_by_the_chart() -> None:
    text = (ROOT / "docs" / "containers.md").read_text()
    (flags,) = re.findall(r"^    helm install fastblt deploy/helm/fastblt --set (\S+)$", text, re.M)
    assert container(render(helm_python.parse_set_string(flags)))["image"].startswith("registry.example.com/fastblt:")
    (values,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(image:.*?)```", text, re.S))
    kinds = ALWAYS | {"HorizontalPodAutoscaler", "NetworkPolicy", "PodMonitor", "PrometheusRule"}
    assert render(values, name="fastblt").keys() == kinds
    (rule,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(rules:.*?)```", text, re.S))
    for metric in render(values)["HorizontalPodAutoscaler"]["spec"]["metrics"]:
        series = re.search(r'__name__=~"(.*?)"', rule["rules"]["custom"][0]["seriesQuery"])
        assert series and re.fullmatch(series[1], metric["pods"]["metric"]["name"])


def test_every_chart_value_is_in_the_schema() -> None:
    with helm_python.Chart.load(CHART) as chart:
        values, schema = chart.values, chart.schema
    assert schema

    def compare(values: dict[str, Any], schema: dict[str, Any], where: str) -> None:
        assert values.keys() | OPTIONAL >= schema["properties"].keys(), where
        for name, value in values.items():
            if "properties" in schema["properties"][name]:
                compare(value, schema["properties"][name], f"{where}.{name}")

    compare(values, schema, "values")


def test_the_chart_has_the_projects_version() -> None:
    version = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert [chart["version"]] == [chart["appVersion"]] == version
    assert re.findall(r'image\.version="(.*)"', DOCKERFILE) == version

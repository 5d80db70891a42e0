"""The compose file, read by Docker Compose itself; no daemon is needed for that."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.process.client import STOP_SECONDS
from server.flags import ENGINE_FLAGS
from server.lifecycle import LAST_RESPONSES_SECONDS
from server.settings import ServerSettings
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
COMMAND = Path(sys.executable).with_name("docker-compose")
SETTINGS = {f"FASTBLT_{name.upper()}" for name in (*ENGINE_FLAGS, *ServerSettings.model_fields)}


def compose(*files: str, **variables: str) -> dict[str, Any]:
    """The services as Compose understands them, by name."""
    command = [COMMAND, *(f"--file={DEPLOY / file}" for file in files), "config", "--format", "json"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def mounted(service: dict[str, Any]) -> dict[str, Path]:
    """Folders of this machine by where they are mounted."""
    return {mount["target"]: Path(mount["source"]) for mount in service["volumes"] if mount["type"] == "bind"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return compose("compose.yaml")


def test_the_server_has_a_gpu_and_serves_models_nano(services: dict[str, Any]) -> None:
    server = services["fastblt"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert mounted(server) == {"/models": ROOT / "models" / "nano"}
    assert Path(server["build"]["context"]) == ROOT


def test_a_checkpoint_and_settings_come_from_the_environment(tmp_path: Path) -> None:
    server = compose("compose.yaml", CHECKPOINT=str(tmp_path), FASTBLT_DTYPE="bfloat16")["fastblt"]
    assert mounted(server) == {"/models": tmp_path}
    assert server["environment"]["FASTBLT_DTYPE"] == "bfloat16"
    assert server["environment"].keys() <= SETTINGS
    assert {name for name, value in server["environment"].items() if value} == {"FASTBLT_DTYPE"}


def test_the_compose_file_for_cpu_differs_only_in_the_device(services: dict[str, Any]) -> None:
    on_cpu = compose("compose.yaml", "compose.cpu.yaml")
    server, environment = services["fastblt"], services["fastblt"]["environment"]
    expected = {name: value for name, value in server.items() if name != "deploy"}
    assert on_cpu["fastblt"] == expected | {"environment": environment | {"FASTBLT_DEVICE": "cpu"}}
    assert {**on_cpu, "fastblt": server} == services


def test_every_mounted_folder_is_in_the_repository(services: dict[str, Any]) -> None:
    folders = [folder for service in services.values() for folder in mounted(service).values()]
    assert len(folders) == 4
    assert all(folder.is_dir() and folder.is_relative_to(ROOT) for folder in folders)


def test_images_are_pinned_and_ports_bind_to_localhost(services: dict[str, Any]) -> None:
    assert services.keys() == {"fastblt", "prometheus", "grafana"}
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", services[name]["image"])
    assert all(port["host_ip"] == "127.0.0.1" for service in services.values() for port in service["ports"])


def test_the_stop_grace_period_covers_the_drain_time(services: dict[str, Any]) -> None:
    default = ServerSettings.model_fields["drain_seconds"].default
    assert float(services["fastblt"]["stop_grace_period"].removesuffix("s")) >= (
        default + LAST_RESPONSES_SECONDS + STOP_SECONDS
    )


def test_prometheus_has_its_rule_files_and_scrapes_the_server(services: dict[str, Any]) -> None:
    prometheus = services["prometheus"]
    folder = mounted(prometheus)["/etc/prometheus"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in prometheus["command"]
    scraped = yaml.safe_load((folder / "prometheus.yml").read_text())
    assert all((folder / name).is_file() for name in scraped["rule_files"])
    targets = [t for job in scraped["scrape_configs"] for static in job["static_configs"] for t in static["targets"]]
    assert targets == [f"fastblt:{services['fastblt']['ports'][0]['target']}"]
    subprocess.run(["promtool", "check", "config", folder / "prometheus.yml"], check=True)


def test_grafana_is_provisioned_with_data_source_and_dashboard(services: dict[str, Any]) -> None:
    grafana, folders = services["grafana"], mounted(services["grafana"])
    provisioning = folders["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0]['target']}"
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "fastblt.yaml").read_text())["providers"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    dashboard = json.loads((folders[str(home.parent)] / home.name).read_text())
    assert dashboard["panels"]


def test_documented_compose_commands_are_valid() -> None:
    shown = re.findall(r"^    docker compose (.*) up (.*)$", (ROOT / "docs" / "containers.md").read_text(), re.M)
    assert len(shown) == 2
    options = subprocess.run([COMMAND, "up", "--help"], capture_output=True, text=True, check=True).stdout
    for files, flags in shown:
        assert compose(*(Path(name).name for name in re.findall(r"-f deploy/(\S+)", files)))
        assert all(flag in options for flag in flags.split())

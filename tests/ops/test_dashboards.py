"""Dashboard, rules and alerts against a real Prometheus that scrapes a real server under load."""

import json
import math
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from deploy import dashboards, panels
from deploy.preview import Preview, fill
from server.metrics import OUTCOMES, REASONS
from tests.ops.prometheus import SHIPPED, Prometheus, running_prometheus
from tests.serving import ROOT, RunningServer, running_server

SECONDS = 90
"""Within which everything must have data, from the first query on."""
WINDOW = 15
"""Seconds that a panel shows, and that its rates look back."""

BOARD = json.loads(dashboards.PATH.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
RULES = {name: yaml.safe_load((SHIPPED / name).read_text())["groups"] for name in ("rules.yml", "alerts.yml")}
RECORDED = [rule["record"] for group in RULES["rules.yml"] for rule in group["rules"]]
ALERTS = [rule for group in RULES["alerts.yml"] for rule in group["rules"]]
METRICS_DOC = (ROOT / "docs" / "metrics.md").read_text()

NO_DATA = {("Memory", "C"): "the GPU's memory: there is no GPU here"}
"""Queries, by panel and letter, that give nothing in this test."""
UNDRAFTED = {"Acceptance": {"blt", "auto"}, "Drafts that stand, by position": {"blt", "blt-d", "auto"}}
"""Decoders that may have no number on a panel: blt drafts nothing, nor does auto where that does not pay, and blt-d
does not verify."""


class Query(NamedTuple):
    panel: dict[str, Any]
    target: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.panel['id']}{self.target['refId']} {self.panel['title']}"

    @property
    def expr(self) -> str:
        return str(self.target["expr"])


QUERIES = [Query(panel, target) for panel in PANELS for target in panel["targets"]]
WITH_DATA = [q for q in QUERIES if (q.panel["title"], q.target["refId"]) not in NO_DATA]
EXPRESSIONS = [
    *(q.expr for q in QUERIES),
    *(rule["expr"] for groups in RULES.values() for group in groups for rule in group["rules"]),
]


class Stack(NamedTuple):
    server: RunningServer
    prometheus: Prometheus

    @property
    def instance(self) -> str:
        return self.server.url.removeprefix("http://")


@contextmanager
def load(url: str) -> Iterator[None]:
    """A client per decoder that asks for one completion after the other, and one whose requests are refused."""
    done = threading.Event()
    failures: list[str] = []

    def client(decoder: str) -> None:
        body = {"model": "nano", "prompt": "import os\n\ndef ", "max_tokens": 48, "decoder": decoder}
        with httpx.Client(base_url=url, timeout=60) as http:
            while not done.is_set():
                response = http.post("/v1/completions", json=body)
                if not response.is_success:
                    failures.append(response.text)
                    return

    def wrong() -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            while not done.wait(0.2):
                for body in ({"model": "nano", "n": 0}, {"model": "none"}):
                    assert http.post("/v1/completions", json=body).is_client_error

    threads = [threading.Thread(target=client, args=[decoder]) for decoder in panels.DECODERS]
    threads.append(threading.Thread(target=wrong))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        running_server(ROOT / "models" / "nano", folder / "server.log") as server,
        running_prometheus(folder, server.url.removeprefix("http://")) as prometheus,
        load(server.url),
    ):
        yield Stack(server, prometheus)


def finite(series: dict[str, Any]) -> bool:
    return any(math.isfinite(float(value)) for _, value in series.get("values") or [series["value"]])


def run(prometheus: Prometheus, target: dict[str, Any], expr: str) -> list[dict[str, Any]]:
    """The series that Grafana would draw: those with a number."""
    series = prometheus.query(expr) if target["instant"] else prometheus.query_range(expr, WINDOW)
    return [s for s in series if finite(s)]


def wait_for(prometheus: Prometheus, target: dict[str, Any], expr: str, wanted: dict[str, set[str]]) -> list[Any]:
    """The series of a query, once they have at least these values of these labels."""
    deadline = time.monotonic() + SECONDS
    while True:
        series = run(prometheus, target, expr)
        if series and all(values <= {s["metric"].get(name) for s in series} for name, values in wanted.items()):
            return series
        assert time.monotonic() < deadline, (expr, wanted, series)
        time.sleep(0.25)


def unit(panel: dict[str, Any]) -> str | None:
    if panel["type"] == "heatmap":
        return panel["options"]["yAxis"]["unit"]
    return panel.get("fieldConfig", {"defaults": {}})["defaults"].get("unit")


def labels_of(query: Query) -> set[str]:
    """The labels by which a query tells its series apart: those that its legend or its table shows."""
    shown = set(re.findall(r"{{(\w+)}}", query.target.get("legendFormat", "")))
    for step in query.panel.get("transformations", []):
        shown |= {step["options"][field] for field in ("rowField", "columnField") if field in step["options"]}
    return shown


@pytest.mark.parametrize("query", WITH_DATA, ids=lambda q: q.name)
def test_every_dashboard_query_has_data_for_all_its_label_values(query: Query, stack: Stack) -> None:
    known = {
        "decoder": set(panels.DECODERS) - UNDRAFTED.get(query.panel["title"], set()),
        "stage": set(panels.STAGES) - ({"patcher"} if "estimated" in query.expr else set()),
        "pool": set(panels.POOLS),
        "position": set("01234567"),
        "finish_reason": set(REASONS),
        "outcome": set(OUTCOMES),
        "reason": {"invalid_value", "model_not_found"},
        "instance": {stack.instance},
    }
    shown = labels_of(query)
    wanted = {name: values for name, values in known.items() if name in shown}
    series = wait_for(stack.prometheus, query.target, fill(query.expr, WINDOW), wanted)
    assert all(shown <= s["metric"].keys() for s in series)
    numbers = [float(value) for s in series for _, value in s.get("values") or [s["value"]]]
    if unit(query.panel) == "percentunit" and "peak" not in query.panel["title"]:
        assert max(n for n in numbers if math.isfinite(n)) <= 1 + 1e-9


@pytest.mark.parametrize("query", WITH_DATA, ids=lambda q: q.name)
def test_every_dashboard_query_obeys_the_dashboard_variables(query: Query, stack: Stack) -> None:
    here = stack.instance.replace(".", r"\\.")
    chosen = fill(query.expr, WINDOW, instance=here, decoder="(blt-s|auto)")
    series = wait_for(stack.prometheus, query.target, chosen, {})
    assert {s["metric"].get("decoder", "auto") for s in series} <= {"blt-s", "auto"}
    assert not run(stack.prometheus, query.target, fill(query.expr, WINDOW, instance="elsewhere:1"))


def test_without_a_gpu_only_the_gpu_panel_is_empty(stack: Stack) -> None:
    empty = [q for q in QUERIES if q not in WITH_DATA]
    assert len(empty) == len(NO_DATA)
    for query in empty:
        assert not run(stack.prometheus, query.target, fill(query.expr, WINDOW))


def test_dashboard_variables_and_annotations_have_data(stack: Stack) -> None:
    known = {"job": ["fastblt"], "instance": [stack.instance], "decoder": sorted(panels.DECODERS)}
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            found = stack.prometheus.api(f"label/{label}/values", **{"match[]": fill(series, WINDOW)})
            assert found == known[label]
    for annotation in BOARD["annotations"]["list"]:
        stack.prometheus.query(fill(annotation["expr"], WINDOW))


@pytest.mark.parametrize("name", RECORDED)
def test_every_recording_rule_records_data(name: str, stack: Stack) -> None:
    wait_for(stack.prometheus, {"instant": True}, name, {})


def test_prometheus_evaluates_every_rule_and_a_healthy_server_fires_no_alert(stack: Stack) -> None:
    wait_for(stack.prometheus, {"instant": True}, RECORDED[-1], {})
    rules = [rule for group in stack.prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {*RECORDED, *(alert["alert"] for alert in ALERTS)}
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {r["name"]: r["state"] for r in rules if r.get("labels", {}).get("severity") == "critical"} == {
        alert["alert"]: "inactive" for alert in ALERTS if alert["labels"]["severity"] == "critical"
    }


def test_the_preview_draws_the_dashboard(stack: Stack, tmp_path: Path) -> None:
    wait_for(stack.prometheus, {"instant": True}, RECORDED[-1], {})
    Preview(stack.prometheus.url, WINDOW).picture(BOARD, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 50_000


def promtool(*arguments: str | Path, stdin: str | None = None) -> None:
    done = subprocess.run(["promtool", *arguments], input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "FAILED" not in done.stdout + done.stderr, done.stdout + done.stderr


def test_promtool_accepts_the_configuration_and_both_rule_files() -> None:
    promtool("check", "config", SHIPPED / "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", *(SHIPPED / name for name in RULES))


def test_promtool_accepts_the_metrics(stack: Stack) -> None:
    with stack.server.client() as http:
        promtool("check", "metrics", stdin=http.get("/metrics").text)


def test_the_unit_tests_of_the_rules_pass_and_cover_every_alert() -> None:
    promtool("test", "rules", SHIPPED / "alerts_test.yml")
    groups = yaml.safe_load((SHIPPED / "alerts_test.yml").read_text())["tests"]
    checks = [check for group in groups for check in group.get("alert_rule_test", [])]
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == {alert["alert"] for alert in ALERTS}


def test_the_committed_dashboard_equals_the_generated_one() -> None:
    assert dashboards.PATH.read_text() == dashboards.render(), "run python -m deploy.dashboards"


def test_every_end_and_outcome_has_its_own_colour() -> None:
    for colours, names in ((dashboards.ENDS, REASONS), (dashboards.OUTCOMES, OUTCOMES)):
        assert {*colours} == {*names} and len({*colours.values()}) == len(names)


def test_panels_have_a_unique_id_a_description_and_a_position() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(len(panel["description"]) > 40 for panel in PANELS)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)
    assert [panel["title"] for panel in PANELS if not unit(panel)] == ["What runs"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23


def test_metrics_and_labels_in_queries_are_documented() -> None:
    rows = re.findall(r"^\| `(fastblt_\w+)` \| \w+ \|([\w, ]*)\|", METRICS_DOC, re.M)
    documented = {label for _, cell in rows for label in re.findall(r"\w+", cell)}
    everything = "\n".join(EXPRESSIONS)
    grouped = re.findall(r"\b(?:by|on|ignoring|without|group_left|group_right) ?\(([\w, ]*)\)", everything)
    labels = set(re.findall(r"\w+", " ".join(grouped))) | set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", everything))
    assert labels - documented == {"job", "instance", "le"}
    named = re.findall(r"(?<![\w:])fastblt_\w+", everything)
    metrics = {re.sub("_(bucket|sum|count)$", "", name) for name in named}
    assert metrics and metrics <= {name for name, _ in rows}
    assert set(re.findall(r"\w+:\w+:\w+", everything)) <= set(RECORDED)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_has_a_severity_and_a_runbook_url(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/operations.md#alert-{alert['alert'].lower()}"


def assert_shows(title: str, series: dict[str, str], value: float, tmp_path: Path) -> None:
    """That a panel of one number has this value after ten minutes of these series, in promtool's notation."""
    (query,) = (q for q in QUERIES if q.panel["title"] == title)
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    check = {"expr": f"round({fill(query.expr, 1200)}, 0.001)", "eval_time": "10m", "exp_samples": [{"value": value}]}
    file = tmp_path / "tests.yml"
    file.write_text(
        yaml.safe_dump({"tests": [{"interval": "15s", "input_series": inputs, "promql_expr_test": [check]}]})
    )
    promtool("test", "rules", file)


def test_what_a_clients_own_limit_refuses_does_not_hide_that_all_else_fails(tmp_path: Path) -> None:
    here = 'job="fastblt", instance="a"'
    series = {
        f'fastblt_requests_total{{{here}, route="/v1/completions", outcome="ok"}}': "0x40",
        f'fastblt_requests_total{{{here}, route="/v1/completions", outcome="failed"}}': "0+10x40",
        f'fastblt_requests_total{{{here}, route="/v1/completions", outcome="rejected"}}': "0+310x40",
        f'fastblt_rejections_total{{{here}, reason="rate_limit_exceeded"}}': "0+300x40",
        f'fastblt_rejections_total{{{here}, reason="queue_full"}}': "0+10x40",
        f'fastblt_http_responses_total{{{here}, route="/v1/completions", status="500"}}': "0+10x40",
        f'fastblt_http_responses_total{{{here}, route="/v1/completions", status="429"}}': "0+310x40",
    }
    assert_shows("Failed or refused", series, 1.0, tmp_path)
    fewer = series | {f'fastblt_requests_total{{{here}, route="/v1/completions", outcome="ok"}}': "0+60x40"}
    assert_shows("Failed or refused", fewer, 0.25, tmp_path)


def test_a_drained_server_is_not_ready(tmp_path: Path) -> None:
    series = {}
    for instance, draining in (("a", 0), ("b", 1)):
        for name, value in (("up", 1), ("fastblt_engine_up", 1), ("fastblt_draining", draining)):
            series[f'{name}{{job="fastblt", instance="{instance}"}}'] = f"{value}x40"
    assert_shows("Ready", series, 0.5, tmp_path)
    both = series | {'fastblt_draining{job="fastblt", instance="a"}': "1x40"}
    assert_shows("Ready", both, 0, tmp_path)

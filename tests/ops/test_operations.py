"""The queries of docs/operations.md and docs/metrics.md are PromQL, in Prometheus' own eyes."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCS = Path(__file__).parents[2] / "docs"


def queries(document: str) -> list[str]:
    return re.findall(r"^ *```promql\n(.*?)^ *```$", (DOCS / document).read_text(), re.M | re.S)


@pytest.mark.parametrize(("document", "least"), [("operations.md", 8), ("metrics.md", 4)])
def test_prometheus_accepts_every_query_of_the_documentation(document: str, least: int, tmp_path: Path) -> None:
    found = queries(document)
    assert len(found) >= least
    rules = [{"record": f"operations:query:{number}", "expr": query} for number, query in enumerate(found)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "operations", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(found)} rules found" in checked.stdout


def test_queries_of_the_metrics_page_give_the_figures_that_it_promises(tmp_path: Path) -> None:
    """Of one instance that is scraped each minute: per minute a stage reads 600 bytes in 30 s, a fifth of the peak of
    100 a second; a decoder reads 600 for 100 of text, where blt would read 1,000."""
    stage, decoder = 'job="fastblt", instance="a", stage="global"', 'job="fastblt", instance="a", decoder="blt-s"'
    rates = {
        f"fastblt_stage_read_bytes_total{{{stage}}}": 600,
        f"fastblt_stage_seconds_total{{{stage}}}": 30,
        f'fastblt_decoder_stage_estimated_bytes_total{{{decoder}, stage="global"}}': 600,
        f'fastblt_decoder_stage_read_bytes_total{{{decoder}, stage="global"}}': 600,
        f"fastblt_blt_estimated_bytes_total{{{decoder}}}": 1000,
        f"fastblt_committed_bytes_total{{{decoder}}}": 100,
    }
    series = [{"series": name, "values": f"0+{rate}x20"} for name, rate in rates.items()]
    peak = 'fastblt_peak_bandwidth_bytes_per_second{job="fastblt", instance="a", operation="gemv"}'
    series.append({"series": peak, "values": "100x20"})
    wanted = [(f"{{{stage}}}", 20), (f"{{{stage}}}", 0.2), ('{decoder="blt-s"}', 0.4), ('{decoder="blt-s"}', 6)]
    checks: list[dict[str, Any]] = [
        {"expr": query, "eval_time": "20m", "exp_samples": [{"labels": labels, "value": value}]}
        for query, (labels, value) in zip(queries("metrics.md"), wanted, strict=True)
    ]
    check_in_promtool(series, checks, tmp_path)


def test_the_queries_for_tuning_give_figures_of_pods_too(tmp_path: Path) -> None:
    """A PodMonitor adds labels of its own. Per minute 6 steps take 12 s, of which a stage takes 9 to read 360 bytes, at
    most 100 a second."""
    pod = 'job="fastblt", instance="a", namespace="n", pod="p"'
    rates = {
        f"fastblt_step_seconds_total{{{pod}}}": 12,
        f"fastblt_steps_total{{{pod}}}": 6,
        f'fastblt_stage_rows_total{{{pod}, stage="encoder"}}': 60,
        f'fastblt_stage_seconds_total{{{pod}, stage="global"}}': 9,
        f'fastblt_stage_read_bytes_total{{{pod}, stage="global"}}': 360,
    }
    series = [{"series": name, "values": f"0+{rate}x20"} for name, rate in rates.items()]
    peak = f'fastblt_peak_bandwidth_bytes_per_second{{{pod}, operation="gemv"}}'
    series.append({"series": peak, "values": "100x20"})
    here = '{job="fastblt", instance="a"}'
    wanted = [(f"{{{pod}}}", 2), (here, 10), (here, 0.25), ('{stage="global"}', 0.4)]
    checks: list[dict[str, Any]] = [
        {"expr": f"round({query}, 0.001)", "eval_time": "20m", "exp_samples": [{"labels": labels, "value": value}]}
        for query, (labels, value) in zip(queries("operations.md"), wanted, strict=False)
    ]
    check_in_promtool(series, checks, tmp_path)


def check_in_promtool(series: list[dict[str, str]], checks: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": checks}]}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

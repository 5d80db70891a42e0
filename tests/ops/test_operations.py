"""The queries of docs/operations.md are PromQL, in Prometheus' own eyes."""

import re
import subprocess
from pathlib import Path

import yaml

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_prometheus_accepts_every_query_of_the_operations_guide(tmp_path: Path) -> None:
    queries = re.findall(r"^ *```promql\n(.*?)^ *```$", OPERATIONS.read_text(), re.M | re.S)
    assert len(queries) >= 8
    rules = [{"record": f"operations:query:{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "operations", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(queries)} rules found" in checked.stdout

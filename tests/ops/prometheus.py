"""A real Prometheus with the configuration that we ship, faster and pointed at a server of ours."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

SHIPPED = Path(__file__).parents[2] / "deploy" / "prometheus"
INTERVAL_SECONDS = 1


class Prometheus(NamedTuple):
    url: str

    def api(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer; AssertionError with Prometheus' own message otherwise."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series as {"metric": labels, "value": [time, number as a string]}."""
        return self.api("query", query=expr)["result"]

    def query_range(self, expr: str, seconds: int) -> list[dict[str, Any]]:
        """Series as {"metric": labels, "values": [[time, number as a string], ...]}, over the last seconds."""
        now = time.time()
        return self.api("query_range", query=expr, start=now - seconds, end=now, step=INTERVAL_SECONDS)["result"]


@contextmanager
def running_prometheus(folder: Path, target: str | dict[str, Any]) -> Iterator[Prometheus]:
    """Scrapes `target`, a host and port, as deploy/prometheus/prometheus.yml says, every second; or as `target` says,
    one of its `scrape_configs`."""
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], f"{INTERVAL_SECONDS}s")
    if isinstance(target, str):
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    else:
        config["scrape_configs"] = [target]
    for name in config["rule_files"]:
        shutil.copy(SHIPPED / name, folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
    log = folder / "prometheus.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(
            ["prometheus", *flags, f"--web.listen-address={address}"], stdout=out, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            _await_ready(process, f"http://{address}", log)
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/-/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"Prometheus did not start:\n{log.read_text()}")

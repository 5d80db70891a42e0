"""Without the extra `traces`: what does not need it never looks for it, and what does says so."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.serving import ROOT

WITHOUT_EXTRA = """
import sys
sys.modules |= {"opentelemetry.sdk": None, "opentelemetry.exporter": None}
from server.cli import main
main()
"""
"""The command line, as if the packages were not installed."""
runner = CliRunner()
EXTRA = ("opentelemetry.sdk", "opentelemetry.exporter")
ENDPOINT = "http://127.0.0.1:4318"
SERVE = ("serve", "--model", "none", "--port", "0")
"""A server that has no model, either."""


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, too, as if the packages were not installed, nor ever imported."""
    for name in [name for name in sys.modules if name.startswith((*EXTRA, "server.telemetry"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in EXTRA:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize("asked", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "a flag"])
def test_tracing_without_the_extra_names_the_package_to_install(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if asked == "a flag":
        message, asked = refused("--otlp-endpoint", ENDPOINT), f"--otlp-endpoint {ENDPOINT}"
    else:
        monkeypatch.setenv(asked, ENDPOINT)
        message = refused()
    assert message.startswith(f'fastblt: {asked} asks for traces, which need fastblt\'s extra "traces"')


def refused(*flags: str) -> str:
    """Before the first line of the log."""
    result = runner.invoke(app, [*SERVE, *flags])
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_a_server_without_tracing_does_not_need_the_extra(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "none: no such directory" in refused()


def test_no_module_that_a_server_imports_needs_the_extra() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRA, *SERVE], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1 and "none: no such directory" in ended.stderr and "Traceback" not in ended.stderr


def test_an_otlp_endpoint_must_be_a_url() -> None:
    result = runner.invoke(app, [*SERVE, "--otlp-endpoint", "collector:4317"])
    assert result.exit_code == 2
    assert "must be a URL such as http://127.0.0.1:4318, not 'collector:4317'" in " ".join(result.stderr.split())

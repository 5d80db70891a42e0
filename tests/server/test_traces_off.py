"""Without the extra `traces`: what does not need it never looks for it, and what does says so."""

import os
import subprocess
import sys

import pytest

from tests.serving import ROOT

WITHOUT_EXTRA = """
import sys
sys.modules |= {"opentelemetry.sdk": None, "opentelemetry.exporter": None}
from server.cli import main
main()
"""
"""The command line, as if the packages were not installed."""
ENDPOINT = "http://127.0.0.1:4318"


def serve(*flags: str, **variables: str) -> str:
    """What a server says that has no model, either."""
    command = [sys.executable, "-c", WITHOUT_EXTRA, "serve", "--model", "none", "--port", "0", *flags]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60)
    assert ended.returncode and "Traceback" not in ended.stderr
    return ended.stderr


@pytest.mark.parametrize("asked", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "a flag"])
def test_tracing_without_the_extra_names_the_package_to_install(asked: str) -> None:
    if asked == "a flag":
        message, asked = serve("--otlp-endpoint", ENDPOINT), f"--otlp-endpoint {ENDPOINT}"
    else:
        message = serve(**{asked: ENDPOINT})
    assert message.startswith(f'fastblt: {asked} asks for traces, which need: pip install "fastblt[traces]"')


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_a_server_without_tracing_does_not_need_the_extra(variables: dict[str, str]) -> None:
    assert "none: no such directory" in serve(**variables)


def test_an_otlp_endpoint_must_be_a_url() -> None:
    message = serve("--otlp-endpoint", "collector:4317")
    assert "must be a URL such as http://127.0.0.1:4318, not 'collector:4317'" in message

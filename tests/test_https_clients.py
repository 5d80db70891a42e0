"""The client, `fastblt load` and `fastblt batch` over HTTPS, against a served port with a self-signed certificate."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from clients.fastblt_client import AsyncClient, ConnectionFailed
from server.app import create_app
from server.cli import app
from server.settings import ServerSettings
from server.tls import make_context
from tests.scripted_server import ScriptedClient, listening

UNTRUSTED = "certificate verify failed: self-signed certificate"
ASKED = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "model": "scripted"}}
Command = Callable[..., list[str]]
"""Its arguments, given the folder of the test."""


def load(folder: Path) -> list[str]:
    return ["load", "--concurrency", "2", "--requests", "6", "--prompt-bytes", "4", "--json"]


def load_of_a_model(folder: Path) -> list[str]:
    return [*load(folder), "--model", "scripted"]


def batch(folder: Path) -> list[str]:
    (folder / "in.jsonl").write_text(json.dumps(ASKED) + "\n")
    return ["batch", str(folder / "in.jsonl"), str(folder / "out.jsonl")]


def client(folder: Path) -> list[str]:
    return ["client", "--prompt", "x"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem for 127.0.0.1, signed by itself, its key.pem, and other.pem, another such certificate."""
    folder = tmp_path_factory.mktemp("tls")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    for name, key in (("cert", "key"), ("other", "other-key")):
        files = ["-keyout", f"{key}.pem", "-out", f"{name}.pem"]
        names = ["-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*new, *files, *names], cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem"


@asynccontextmanager
async def served(certificate: Path) -> AsyncIterator[str]:
    chosen = ServerSettings(ssl_certfile=certificate, ssl_keyfile=certificate.with_name("key.pem"))
    async with listening(create_app(chosen, ScriptedClient()), chosen, make_context(chosen)) as port:
        yield f"https://127.0.0.1:{port}"


async def run(url: str, arguments: list[str], ca_file: Path | None, **variables: str) -> Result:
    given = [*arguments, "--url", url, *(["--ca-file", str(ca_file)] if ca_file else [])]
    return await asyncio.to_thread(CliRunner().invoke, app, given, env=variables)


@pytest.mark.parametrize("command", [load, load_of_a_model, batch, client])
async def test_a_command_trusts_the_certificate_that_it_is_given(
    certificate: Path, tmp_path: Path, command: Command
) -> None:
    async with served(certificate) as url:
        for unfit in (None, certificate.with_name("other.pem")):
            # Without tries that would not help.
            async with asyncio.timeout(20):
                refused = await run(url, command(tmp_path), unfit)
            assert refused.exit_code == 1 and UNTRUSTED in refused.output, refused.output
        done = await run(url, command(tmp_path), certificate)
        by_variable = await run(url, command(tmp_path), None, FASTBLT_CA_FILE=str(certificate))
    for result in (done, by_variable):
        assert result.exit_code == 0, result.output
    if command is batch:
        assert '"text": "ab"' in (tmp_path / "out.jsonl").read_text()
    elif command is client:
        assert done.stdout.startswith("ab")
    else:
        told = json.loads(done.stdout)
        assert told["url"] == url and told["runs"][0]["outcomes"]["done"] == 6


@pytest.mark.parametrize("command", [load, load_of_a_model, batch, client])
async def test_a_file_without_certificates_is_refused_by_its_name(tmp_path: Path, command: Command) -> None:
    (tmp_path / "text").write_text("no certificate")
    for name, why in (("text", "text must hold certificates in PEM"), ("none", "none: No such file or directory")):
        refused = await run("https://127.0.0.1:1", command(tmp_path), tmp_path / name)
        assert refused.exit_code == 1 and not refused.stdout
        assert refused.stderr.splitlines() == [f"fastblt: ca_file: {tmp_path}/{why}"]


async def test_the_async_client_trusts_the_certificate_that_it_is_given(certificate: Path) -> None:
    async with served(certificate) as url:
        async with AsyncClient(url, ca_file=certificate) as trusting:
            assert (await trusting.complete("x", model="scripted")).text == "ab"
        async with AsyncClient(url, retries=1000) as wary, asyncio.timeout(20):
            with pytest.raises(ConnectionFailed, match=UNTRUSTED):
                await wary.models()

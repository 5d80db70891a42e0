"""Dependencies point one way: server -> engine -> kernels; clients speak HTTP."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "server": {"engine", "clients", "training"},
    "engine": {"kernels"},
    "kernels": set(),
    "clients": set(),
    "training": {"engine", "kernels"},
    "deploy": {"server", "engine"},
}
OURS = {*ALLOWED, "benchmarks", "tests"}
HTTP = {"fastapi", "starlette", "uvicorn", "httpx"}
FOREIGN = {
    "server": {"safetensors", "transformers"},
    "engine": HTTP | {"transformers"},
    "kernels": HTTP | {"transformers"},
    "clients": {"torch", "numpy", "fastapi"},
    "training": HTTP | {"transformers"},
    "deploy": {"torch", "transformers"},
}
"""Third-party packages that a package of ours has no business with."""


def imports(package: str) -> Iterator[tuple[Path, str]]:
    """(file, name of the package it imports) for every absolute import, wherever it stands in the file."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module
                yield path, node.module.partition(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_is_below_it(package: str) -> None:
    found = list(imports(package))
    assert found
    wrong = [(str(path), name) for path, name in found if name in (OURS - ALLOWED[package]) | FOREIGN[package]]
    assert not wrong


def test_in_server_only_the_command_line_imports_clients_training_and_torch() -> None:
    users = {path.name for path, name in imports("server") if name in ("clients", "training", "torch")}
    assert users <= {"cli.py"}


def test_the_copyable_client_needs_httpx_alone() -> None:
    names = {name for path, name in imports("clients") if path.name == "fastblt_client.py"}
    assert names - sys.stdlib_module_names == {"httpx"}


@pytest.mark.parametrize(
    "modules", ["engine.config, engine.types, engine.process.client", "server.app, server.lifecycle, server.cli"]
)
def test_the_http_process_never_loads_torch(modules: str) -> None:
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_other_installed_distribution_owns_our_package_names() -> None:
    owners = packages_distributions()
    assert {name: owner for name in ALLOWED if (owner := set(owners.get(name, [])) - {"fastblt"})} == {}

"""Ray clusters that are closed with a token, and open ones: `python -m deploy.ray_serve` joins either, or says in one
line why it cannot."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ops.ray_cluster import NANO, SECONDS, Cluster, clean_environment, running_application, running_cluster
from tests.serving import ROOT

MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
SECRET = "0123456789abcdef" * 4


def token_file(home: Path) -> Path:
    return home / ".ray" / "auth_token"


def refusal(address: str, environment: dict[str, str]) -> str:
    """What the command says when it does not join: one line, and it ends at once."""
    command = [sys.executable, "-m", "deploy.ray_serve", "--model", str(NANO), "--ray-address", address]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "CRITICAL" in line and SECRET not in line
    return line


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As docs/ray.md has it: the token lies in the home folder."""
    home = tmp_path_factory.mktemp("home")
    token_file(home).parent.mkdir()
    token_file(home).write_text(SECRET)
    with running_cluster(clean_environment(home)) as cluster:
        yield cluster


def test_a_local_cluster_leaves_a_token_with_which_the_next_cluster_is_joined(tmp_path: Path) -> None:
    environment = clean_environment(tmp_path)
    with running_application(Cluster("local", environment), NANO, tmp_path / "alone.log") as application:
        assert application.complete(prompt="x", max_tokens=1).is_success
    token = token_file(tmp_path).read_text()
    with running_cluster(environment) as cluster:
        assert "demands a token" in refusal(cluster.address, environment | {MODE: "disabled"})
        with running_application(cluster, NANO, tmp_path / "joined.log") as application:
            assert application.complete(prompt="x", max_tokens=1).is_success
    assert token_file(tmp_path).read_text() == token


@pytest.mark.parametrize("mode", [None, "token"])
def test_a_cluster_with_a_given_token_is_joined_with_it(closed: Cluster, tmp_path: Path, mode: str | None) -> None:
    """It need not lie in the home folder."""
    given = clean_environment(tmp_path) | {TOKEN: SECRET} | ({MODE: mode} if mode else {})
    with running_application(closed._replace(environment=given), NANO, tmp_path / "application.log") as application:
        assert application.complete(prompt="x", max_tokens=1).is_success
    assert not token_file(tmp_path).exists()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "there is none here: set RAY_AUTH_TOKEN"),
        ({MODE: "token"}, "there is none here: set RAY_AUTH_TOKEN"),
        ({TOKEN: "another"}, "refuses the token that was found in RAY_AUTH_TOKEN"),
        ({TOKEN: SECRET, MODE: "disabled"}, "demands a token, but RAY_AUTH_MODE is 'disabled'"),
        ({f"{TOKEN}_PATH": "/nowhere"}, "RAY_AUTH_TOKEN_PATH is set but file cannot be opened or is empty: /nowhere"),
    ],
)
def test_joining_a_closed_cluster_without_its_token_explains_what_to_do(
    closed: Cluster, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    line = refusal(closed.address, clean_environment(tmp_path) | variables)
    assert said in line and closed.address.rpartition(":")[2] in line


def test_an_open_cluster_is_joined_even_when_a_token_exists(tmp_path: Path) -> None:
    token_file(tmp_path).parent.mkdir()
    token_file(tmp_path).write_text(SECRET)
    environment = clean_environment(tmp_path)
    with running_cluster(environment | {MODE: "disabled"}) as cluster:
        assert "lets anyone in" in refusal(cluster.address, environment | {MODE: "token"})
        joining = cluster._replace(environment=environment)
        with running_application(joining, NANO, tmp_path / "application.log") as application:
            assert application.complete(prompt="x", max_tokens=1).is_success


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "no Ray cluster answers at"),
        ("ray://127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9"),
        ("nonsense", "cannot join the Ray cluster at nonsense: Invalid address format"),
    ],
)
def test_joining_a_missing_cluster_explains_that_there_is_none(tmp_path: Path, address: str, said: str) -> None:
    assert said in refusal(address, clean_environment(tmp_path))

"""The keys in force: their file is read again while the server runs."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from server import keys
from server.keys import KeyRing, read_key_file
from tests.scripted_server import ScriptedClient, body, serving, settled

ONE, TWO, THREE = "the-key-of-client-one", "the-key-of-client-two", "the-key-of-client-three"


def write(path: Path, *lines: str, age: float = 10) -> None:
    """As an editor does that replaces the file."""
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines))
    then = time.time() - age
    os.utime(new, (then, then))
    new.replace(path)


async def test_keys_are_read_again_over_http(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    write(file, ONE, TWO)
    client = ScriptedClient()
    # The keys of the setting stay.
    settings = {"api_keys": THREE, "api_key_file": file}
    loaded = (THREE.encode(), ONE.encode(), TWO.encode())
    async with serving(client, loaded, **settings) as http:

        async def ask(key: str, prompt: str = "x") -> int:
            headers = {"authorization": f"Bearer {key}"}
            return (await http.post("/v1/completions", json=body(prompt), headers=headers)).status_code

        assert [await ask(key) for key in (ONE, TWO, THREE)] == [200] * 3
        running = asyncio.create_task(ask(ONE, "wait"))
        await settled(client, 1)
        caplog.set_level(logging.INFO, "fastblt.server")
        write(file, "# New ones", TWO, "the-key-of-client-four")
        await eventually(lambda: ask("the-key-of-client-four"), 200)
        assert [await ask(key) for key in (ONE, TWO, THREE)] == [401, 200, 200]
        # What runs was let in.
        client.release.set()
        assert await running == 200
        assert "API keys: 3 in force, 1 new, 1 removed" in caplog.messages
        assert not any("key-of-client" in message for message in caplog.messages)


async def eventually(ask: Callable[[], Awaitable[int]], expected: int) -> None:
    async with asyncio.timeout(5):
        while await ask() != expected:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


class Watch:
    """A ring, and a clock that moves on whenever it is asked for a key."""

    def __init__(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(keys.time, "monotonic", lambda: self.now)
        self.ring = KeyRing("API keys", [ONE.encode()], file, lambda: [k.encode() for k in read_key_file(file)])

    def __call__(self, key: str) -> bool:
        self.now += keys.LOOK_SECONDS
        return self.ring.find(key.encode()) is not None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "keys", ONE)
    return tmp_path / "keys"


@pytest.fixture
def find(file: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(file, monkeypatch)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda file: write(file, TWO, "short"), "line 2: a key has at least 16 characters"),
        (lambda file: write(file, "# nothing left"), "holds no key"),
        (lambda file: write(file), "holds no key"),
        (lambda file: file.unlink(), "No such file"),
        (lambda file: (file.write_bytes(b"\xff" * 40), os.utime(file, (1, 1))), "is not UTF-8"),
    ],
    ids=["a wrong line", "no key", "empty", "missing", "not text"],
)
def test_a_wrong_file_keeps_the_keys_and_is_told_once(
    file: Path, find: Watch, spoil: Callable[[Path], object], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert find(ONE)
    spoil(file)
    assert all(find(ONE) and not find(TWO) for _ in range(5))
    (message,) = caplog.messages
    assert why in message and message.endswith("; the 1 in force stay") and TWO not in message
    write(file, TWO)
    assert find(TWO) and not find(ONE)
    spoil(file)
    assert find(TWO) and len(caplog.messages) == 2


def test_a_file_is_not_read_while_it_is_being_written(file: Path, find: Watch) -> None:
    assert find(ONE)
    with file.open("w") as out:
        out.write("the-key-of-client")
        out.flush()
        assert find(ONE) and not find("the-key-of-client")
        out.write("-two")
    then = time.time() - keys.SETTLE_SECONDS
    os.utime(file, (then, then))
    assert find(TWO) and not find("the-key-of-client") and not find(ONE)


def test_a_file_is_looked_at_once_a_second_and_read_once(file: Path, find: Watch) -> None:
    reads = []
    load = find.ring._load
    find.ring._load = lambda: reads.append(1) or load()  # type: ignore[func-returns-value]
    for _ in range(5):
        assert find(ONE)
    assert len(reads) == 1
    write(file, TWO)
    find.ring._looked = find.now
    assert find.ring.find(ONE.encode()) and len(reads) == 1
    assert find(TWO) and len(reads) == 2


def test_a_change_of_rights_is_seen(file: Path, find: Watch, caplog: pytest.LogCaptureFixture) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    write(file, TWO)
    file.chmod(0)
    assert find(ONE) and "Permission denied" in caplog.text
    file.chmod(0o600)
    assert find(TWO)


def test_a_pipe_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    find = Watch(tmp_path / "pipe", monkeypatch)
    assert find(ONE) and not find(TWO)


def test_a_link_to_another_file_is_followed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes replaces a mounted secret."""
    link = file.with_name("link")
    link.symlink_to(file)
    find = Watch(link, monkeypatch)
    assert find(ONE)
    write(file.with_name("other"), TWO)
    link.with_name("next").symlink_to("other")
    link.with_name("next").replace(link)
    assert find(TWO) and not find(ONE)

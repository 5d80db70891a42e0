"""Images and containers without a daemon: Podman with a storage of its own, on a base that debootstrap makes."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

BASE = "localhost/debian"
RUN = ["--network=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]
"""The host's network, as ports then need no helper; limits that a machine which may not raise its own can give."""
READY_SECONDS = 60


class Podman:
    """Commands of `podman`; all that they leave is in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # runc also runs where cgroups are of version 1 or mixed. Errors that matter are those of the exit code.
        self.command = ["podman", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self.command += ["--runtime=runc", "--cgroup-manager=cgroupfs", "--log-level=fatal"]

    def __call__(self, *arguments: str | Path, stdin: str | None = None, code: int = 0) -> str:
        """What the command prints, stripped. It must end with that code."""
        done = subprocess.run(
            [*self.command, *arguments], input=stdin or "", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == code, done.stdout
        return done.stdout.strip()

    def make_base(self) -> None:
        """A minimal Debian, of the release that runs here, as the image BASE."""
        system, archive = self._folder / "debian", self._folder / "debian.tar"
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        subprocess.run(["debootstrap", "--variant=minbase", release, system], check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-C", system, "-cf", archive, "."], check=True)
        self("import", "--quiet", archive, BASE)
        shutil.rmtree(system)
        archive.unlink()

    def build(self, tag: str) -> None:
        """The Dockerfile on that base. pip asks where it asks here."""
        mounts = [f"--volume={source}:{target}:ro" for source, target in self._pip().items()]
        # In a chroot, as a container that may do all that a build does is more than many machines can make.
        how = ["--isolation=chroot", "--layers=false", "--format=docker", f"--build-arg=BASE={BASE}"]
        self("build", *how, *mounts, f"--tag={tag}", ROOT)

    def _pip(self) -> dict[Path, str]:
        """What pip needs of this machine, and where."""
        index, cert, links = map(_pip_setting, ("index-url", "cert", "find-links"))
        settings = ["[global]", f"find-links = {links}"]
        mounts = {Path(folder): folder for folder in links.split() if Path(folder).is_dir()}
        if index:
            settings.append(f"index-url = {index}")
        if cert:
            settings.append("cert = /etc/pip.pem")
            mounts[Path(cert)] = "/etc/pip.pem"
        (self._folder / "pip.conf").write_text("\n".join(settings))
        return mounts | {self._folder / "pip.conf": "/etc/pip.conf"}

    def clear(self) -> None:
        self("rm", "--all", "--force", "--time=0")
        self("rmi", "--all", "--force")
        self("volume", "prune", "--force")
        subprocess.run(["umount", "--quiet", self._folder / "storage" / "overlay"])
        shutil.rmtree(self._folder)


def _pip_setting(name: str) -> str:
    if value := os.environ.get(f"PIP_{name.replace('-', '_').upper()}"):
        return value
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


class Container:
    """A server in a container."""

    def __init__(self, podman: Podman, name: str, port: int) -> None:
        self.podman, self.name, self.url = podman, name, f"http://127.0.0.1:{port}"

    @property
    def healthy(self) -> bool:
        """What the image's own health check says."""
        command = [*self.podman.command, "healthcheck", "run", self.name]
        return subprocess.run(command, capture_output=True).returncode == 0

    def state(self, field: str) -> str:
        return self.podman("inspect", "--format", f"{{{{.State.{field}}}}}", self.name)

    def wait(self, *, healthy: bool) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while self.healthy != healthy:
            running = self.state("Status") == "running"
            assert running and time.monotonic() < deadline, self.podman("logs", self.name)


@contextmanager
def serving(podman: Podman, *options: str, image: str, flags: tuple[str, ...]) -> Iterator[Container]:
    """A container that has become healthy."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    setting = ["--env", f"FASTBLT_PORT={port}", "--env", "FASTBLT_NUM_THREADS=1"]
    name = podman("run", "--detach", *RUN, *setting, *options, image, "--cache-bytes", str(64 << 20), *flags)
    try:
        container = Container(podman, name, port)
        container.wait(healthy=True)
        yield container
    finally:
        podman("rm", "--force", "--time=0", name)

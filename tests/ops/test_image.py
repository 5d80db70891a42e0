"""The Dockerfile, linted, built on a Debian in its base's place, and run: as its user, on a read-only root."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer.main

from server.cli import app
from tests.conftest import ROOT

from .podman import RUN, Podman, serving

DOCS = (ROOT / "docs" / "containers.md").read_text()
IMAGE = "localhost/fastblt"
CLOSED = ["--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=all"]
CLOSED += ["--security-opt=no-new-privileges"]
CPU = ("--device", "cpu")
TRITONS_FIRST_STEP = """
import os, pathlib, subprocess, tempfile
with tempfile.TemporaryDirectory() as folder:
    # An empty library in the place of the GPU's driver: it can be linked with, and then lacks every function.
    subprocess.run(["gcc", "-shared", "-o", f"{folder}/libcuda.so.1", "-x", "c", "/dev/null"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    from triton.backends.nvidia.driver import CudaUtils
    try:
        CudaUtils()
    except ImportError as error:
        print(error)
"""


def test_hadolint_accepts_the_dockerfile() -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], check=True)


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """With the image. Takes a minute or three."""
    if os.geteuid() != 0:
        pytest.skip("debootstrap needs root")
    podman = Podman(tmp_path_factory.mktemp("podman"))
    try:
        podman.make_base()
        podman.build(IMAGE)
        yield podman
    finally:
        podman.clear()


def test_the_image_serves_a_mounted_model_and_drains(podman: Podman, tiny: Path) -> None:
    mounts = [f"--volume={tiny}:/models:ro", "--volume=kernels:/cache"]
    with serving(podman, *CLOSED, *mounts, image=IMAGE, flags=CPU) as server, httpx.Client(base_url=server.url) as http:
        asked = "tr '\\0' ' ' < /proc/1/cmdline; id -u; touch /models/x /x"
        told = podman("exec", server.name, "sh", "-c", asked, code=1)
        assert re.search(r"/fastblt serve --cache-bytes \d+ --device cpu 10001\n", told)
        assert told.count("Read-only file system") == 2
        request = {"model": "tiny", "prompt": "a", "max_tokens": 8, "ignore_eos": True}
        assert http.post("/v1/completions", json=request).json()["usage"]["completion_tokens"] == 8
        # More than fits between server and client, so that it cannot end before it is read.
        endless = request | {"max_tokens": 4000, "n": 8, "logprobs": 5, "stream": True}
        with http.stream("POST", "/v1/completions", json=endless) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            stop = [*podman.command, "stop", "--time=60", server.name]
            with subprocess.Popen(stop, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
                server.wait(healthy=False)
                assert http.post("/v1/completions", json=request).status_code == 503
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert server.state("ExitCode") == "0"


def test_the_image_serves_the_embedded_model_as_any_user(podman: Podman) -> None:
    with serving(podman, *CLOSED, "--tmpfs=/cache", "--user=4321:4321", image=IMAGE, flags=CPU) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "nano"


def test_the_image_without_a_gpu_reports_the_missing_cuda_device(podman: Podman) -> None:
    said = podman("run", "--rm", *RUN, *CLOSED, IMAGE, code=1)
    last = said.splitlines()[-1]
    assert re.fullmatch(r"fastblt: device 'cuda': torch \S+ finds no CUDA device; 'cpu' needs none", last)


def test_triton_compiles_its_driver_interface_in_the_image(podman: Podman) -> None:
    """Its interface to the driver: with the compiler and headers of the image, into a volume, and loaded from there."""
    run = ["run", "--rm", "--interactive", *RUN, *CLOSED, "--volume=kernels:/cache", "--entrypoint=python", IMAGE, "-"]
    assert re.search(r"^/cache/\S+/cuda_utils\.\S+\.so: undefined symbol: cu", podman(*run, stdin=TRITONS_FIRST_STEP))


def test_the_gpu_check_runs_in_the_image(podman: Podman, tmp_path: Path) -> None:
    """As documented, but for the GPU, the report's folder, and the wheels, which must be those of this Python."""
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "download", "--quiet", "--dest", wheels, "pytest", "hypothesis"], check=True)
    (options,) = (options for options, _ in documented_runs() if any("gpu_check" in option for option in options))
    options += [f"--volume={wheels}:/wheels:ro", f"--volume={tmp_path}:/report", "--env=OMP_NUM_THREADS=1", *RUN[1:]]
    check = "--wheels /wheels --device cpu --quick --parts probe exactness --out /report"
    podman("run", *options, IMAGE, *check.split())
    assert "| exactness | passed |" in (tmp_path / "gpu_check-cpu-quick.md").read_text()


def test_the_other_commands_of_the_image_run_as_documented(podman: Podman) -> None:
    ((options, words),) = (run for run in documented_runs() if "generate" in run[1])
    assert len(podman("run", *RUN, *options, IMAGE, *words)) > 20
    (inspect,) = re.findall(r"^    docker exec fastblt fastblt (.*)$", DOCS, re.M)
    said = podman("run", "--rm", *RUN, "--entrypoint=fastblt", IMAGE, *inspect.split())
    assert said.startswith("nano: fastblt format")


def test_the_image_holds_only_the_needed_files(podman: Podman) -> None:
    found = podman("run", "--rm", *RUN, "--entrypoint=sh", IMAGE, "-c", "ls /src /opt /models; find /models -type d")
    assert found.splitlines()[0].endswith("No such file or directory")
    assert "README.md" in found and "/models/nano" not in found
    config = podman("inspect", "--format", "{{.Config.StopSignal}} {{.Config.User}} {{.Config.ExposedPorts}}", IMAGE)
    assert config == "SIGTERM 10001:10001 map[8000/tcp:{}]"


def documented_runs() -> list[tuple[list[str], list[str]]]:
    """Options and flags of every `docker run` that the documentation shows, as they can be on this machine."""
    lines = [line.strip() for line in DOCS.replace("\\\n", "").splitlines() if line.startswith("    docker run")]
    found = []
    for line in lines:
        line = line.replace("--gpus all ", "").replace("/path/to/checkpoint", "$PWD")
        words = shlex.split(line.replace("~/.cache/huggingface", "$PWD"))[2:]
        words = [word.replace("$PWD", str(ROOT)).replace("$(id -u)", str(os.getuid())) for word in words]
        (image,) = (
            index
            for index, word in enumerate(words)
            if word == "fastblt" and words[index - 1] not in ("--name", "--entrypoint")
        )
        found.append((words[:image], words[image + 1 :]))
    return found


def test_documented_options_are_accepted_by_podman_and_flags_by_the_server(podman: Podman) -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    assert len(documented_runs()) >= 11
    for options, flags in documented_runs():
        detached = [option for option in options if option not in ("-d", "--rm")]
        podman("rm", podman("create", *detached, IMAGE))
        if "--entrypoint" not in options:
            serve.make_context("serve", ["--model", "/models", *flags])

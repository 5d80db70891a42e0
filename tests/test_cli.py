"""The command line, in its own process where that is the point."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from engine.checkpoint import load
from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig
from server.cli import app
from server.flags import ENGINE_FLAGS, with_settings
from server.settings import ServerSettings
from tests import reference
from tests.conftest import COMMAND, ROOT
from tests.serving import free_port

NANO = ROOT / "models" / "nano"
SERVE: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]

runner = CliRunner()


def run(*arguments: str | Path, stdin: bytes = b"", code: int = 0) -> bytes:
    """What a command prints; on standard error if it is to fail."""
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, input=stdin, capture_output=True)
    assert done.returncode == code, done.stderr.decode()
    return done.stderr if code else done.stdout


def fails(*arguments: str | Path, code: int = 1) -> str:
    """The error of a command, without starting a process. One line if it is not about usage; a server has logged what
    starts before it."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert not result.stdout and "Traceback" not in result.stderr
    assert code == 2 or result.stderr.count("\n") == 1 + (arguments[0] == "serve")
    return result.stderr


def generate(tiny: Path, *arguments: str) -> list[dict]:
    result = runner.invoke(app, ["generate", "--model", str(tiny), "--json", *arguments])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_help_has_the_whole_summary_of_each_command() -> None:
    listed = run("--help").decode().partition("Commands:\n")[2].splitlines()
    assert len(listed) > 10 and not [line for line in listed if not line.endswith(".") or line.endswith("...")]


class TestServeFlags:
    """Flags of `serve`, read into the two settings objects."""

    @pytest.fixture
    def parse(self):
        def parse(*flags: str, model: bool = True) -> tuple[ServerSettings, EngineConfig]:
            taken: list[tuple[ServerSettings, EngineConfig]] = []
            serve = typer.Typer(rich_markup_mode=None)
            serve.command()(with_settings(lambda settings, config, explain: taken.append((settings, config))))
            result = runner.invoke(serve, [*(["--model", "here"] if model else []), *flags])
            if result.exit_code:
                raise ValueError(result.stderr)
            return taken[0]

        return parse

    def test_serve_has_one_flag_per_settings_field(self) -> None:
        flags = {parameter.name for parameter in SERVE.params} - {"help"}
        of_settings = {field.name for field in fields(EngineConfig)} | set(ServerSettings.model_fields)
        assert flags == of_settings | {"config", "print_config"}
        assert not set(ENGINE_FLAGS) & set(ServerSettings.model_fields)

    def test_serve_without_flags_uses_the_defaults(self, parse) -> None:
        assert parse() == (ServerSettings(), EngineConfig("here"))

    def test_serve_without_a_model_uses_the_embedded_model(self, parse, monkeypatch: pytest.MonkeyPatch) -> None:
        assert parse(model=False)[1] == EngineConfig(str(ROOT / "models" / "nano"))
        monkeypatch.setenv("FASTBLT_MODEL", "there")
        assert parse(model=False)[1] == EngineConfig("there")
        assert parse()[1] == EngineConfig("here")

    def test_serve_flags_set_their_fields(self, parse) -> None:
        flags = ["--port=0", "--dtype=bfloat16", "--no-isolate-documents", "--default-timeout=1.5", "--max-length=9"]
        settings, config = parse(*flags)
        assert (settings.port, settings.default_timeout) == (0, 1.5)
        assert config == EngineConfig("here", dtype="bfloat16", isolate_documents=False, max_length=9)

    def test_list_flags_of_serve_may_be_repeated(self, parse) -> None:
        settings, _ = parse("--cors-origins", "http://a,http://b", "--cors-origins", "http://c")
        assert settings.cors_origins == ["http://a", "http://b", "http://c"]

    def test_serve_flags_override_environment_variables(self, parse, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTBLT_PORT", "1")
        monkeypatch.setenv("FASTBLT_MAX_QUEUE", "200")
        settings, _ = parse("--port", "2")
        assert (settings.port, settings.max_queue) == (2, 200)
        monkeypatch.setenv("FASTBLT_MODEL", "there")
        monkeypatch.setenv("FASTBLT_DTYPE", "bfloat16")
        monkeypatch.setenv("FASTBLT_GRAPHS", "false")
        monkeypatch.setenv("FASTBLT_PAGE_SIZE", "8")
        monkeypatch.setenv("FASTBLT_MAX_LENGTH", "")
        _, config = parse("--page-size", "16")
        assert config == EngineConfig("here", dtype="bfloat16", graphs=False, page_size=16)

    def test_errors_of_bad_serve_values_name_flag_and_variable(self, parse, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"--port \(or FASTBLT_PORT\): must be at most 65535"):
            parse("--port", "65536")
        monkeypatch.setenv("FASTBLT_RETRY_AFTER", "soon")
        with pytest.raises(ValueError, match="FASTBLT_RETRY_AFTER"):
            parse()

    @pytest.mark.parametrize("by_variable", [False, True])
    @pytest.mark.parametrize(
        ("name", "value", "rule"),
        [
            ("port", "abc", "must be a valid integer, not 'abc'"),
            ("port", "tcp://10.0.0.1:80", "must be a valid integer, not 'tcp://10.0.0.1:80'"),
            ("page-size", "x", "must be a valid integer, not 'x'"),
            ("head-timeout", "x", "must be a valid number, not 'x'"),
            ("device", "gpu", "must be 'cpu' or 'cuda', not 'gpu'"),
            ("log-format", "xml", "must be 'human' or 'json', not 'xml'"),
            ("trusted-proxies", "x", "must be a valid IPv4 or IPv6 network, not 'x'"),
        ],
    )
    def test_a_wrong_serve_value_is_told_the_same_however_it_came(
        self, parse, monkeypatch: pytest.MonkeyPatch, name: str, value: str, rule: str, by_variable: bool
    ) -> None:
        variable = f"FASTBLT_{name.upper().replace('-', '_')}"
        if by_variable:
            monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=re.escape(f"Invalid value for --{name} (or {variable}): {rule}\n")):
            parse(*([] if by_variable else [f"--{name}", value]))

    def test_errors_of_serve_flags_never_show_an_api_key(self, parse) -> None:
        with pytest.raises(ValueError) as caught:
            parse("--api-keys", "s3cret", "--port", "-1")
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("command", [["client"], ["load", "--rate=1"], ["tasks", "humaneval", "--out=none"]])
def test_a_command_without_its_server_names_the_address_and_the_flag(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clients.fastblt_client.retry_delay", lambda *_: 0.0)
    monkeypatch.setattr("server.evaluation.command.tasks_of", lambda *_: ([], None))
    address = f"http://127.0.0.1:{free_port()}"
    found = fails(*command, "--url", address)
    assert found.startswith(f"fastblt: no connection to {address}: ")
    assert found.endswith("; is the server running there? --url names another\n")
    for wrong in ("127.0.0.1:8765", "http://", "ftp://127.0.0.1"):
        assert fails(*command, "--url", wrong) == f"fastblt: url: must be like http://127.0.0.1:8000, not {wrong!r}\n"


def test_generate_runs_prompts_as_a_batch_and_each_equals_a_full_forward(tiny: Path) -> None:
    prompts = ["def f(x):", "ä", ""]
    found = generate(tiny, "--max-tokens", "24", "--ignore-eos", *(f"--prompt={prompt}" for prompt in prompts))
    checkpoint = load(tiny)
    for prompt, result in zip(prompts, found, strict=True):
        ids = [BOS_ID, *(byte + BYTE_OFFSET for byte in prompt.encode())]
        expected = reference.greedy(checkpoint.config, checkpoint.tensors, ids, 24)
        data = bytes(i - BYTE_OFFSET for i in expected if i >= BYTE_OFFSET)
        assert (result["bytes"], result["text"]) == (data.hex(), data.decode(errors="replace"))
        assert result["finish_reason"] == "length"
        assert result["usage"]["prompt_tokens"] == len(ids)
        assert result["usage"]["total_tokens"] == len(ids) + 24


def test_generate_streams_raw_bytes(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\x00\n")
    flags = ["--model", tiny, "--max-tokens", "20", "--prompt-file"]
    raw = run("generate", *flags, tmp_path / "prompt")
    piped = runner.invoke(app, ["generate", *map(str, flags), "-", "--json"], input=b"\xff\x00\n")
    assert raw and raw.hex() == json.loads(piped.stdout)["bytes"]


def test_generate_stops_before_a_stop_string(tiny: Path) -> None:
    (whole,) = generate(tiny, "--prompt=abc", "--max-tokens=40", "--ignore-eos")
    data = bytes.fromhex(whole["bytes"])
    stop = next(data[i : i + 1] for i in range(5, 40) if data[i] < 128 and data[i])
    (stopped,) = generate(tiny, "--prompt=abc", "--max-tokens=40", "--ignore-eos", f"--stop={stop.decode()}")
    assert stopped["finish_reason"] == "stop"
    assert bytes.fromhex(stopped["bytes"]) == data[: data.index(stop)]


def test_generate_reports_patches_of_prompt_and_output(tiny: Path) -> None:
    flags = ["--patches", "--max-tokens=30", "--temperature=0.9", "--stop=\x00"]
    checkpoint = load(tiny)
    prompts = ["naïve(", "x" * 90]
    for decoder in ("blt", "blt-s"):
        found = generate(tiny, *flags, f"--decoder={decoder}", *(f"--prompt={prompt}" for prompt in prompts))
        for prompt, result in zip(prompts, found, strict=True):
            data = prompt.encode() + bytes.fromhex(result["bytes"])
            ids = [BOS_ID, *(byte + BYTE_OFFSET for byte in data)][: len(result["patches"]["entropies"])]
            entropies = reference.entropies(checkpoint.config, checkpoint.tensors, ids)
            assert result["patches"]["entropies"] == pytest.approx(entropies.tolist(), abs=1e-4)
            assert result["patches"]["starts"] == reference.patch_starts(checkpoint.config.patching, entropies)
            assert result["patches"]["output_start"] == 1 + len(prompt.encode())
            assert len(ids) >= len(data) - 1
    assert "patches" not in generate(tiny, "--prompt=a", "--max-tokens=1")[0]


def test_generate_samples_the_same_bytes_for_the_same_seed(tiny: Path) -> None:
    sampled = ["--prompt=abc", "--max-tokens=20", "--temperature=1", "--top-k=50", "--top-p=0.9", "--min-p=0.01"]
    one, again, other = (generate(tiny, *sampled, f"--seed={seed}")[0]["bytes"] for seed in (1, 1, 2))
    assert one == again != other


def test_generate_refuses_wrong_combinations_of_flags(tiny: Path, tmp_path: Path) -> None:
    model = ("generate", "--model", tiny)
    assert "several prompts need --json" in fails(*model, "--prompt=a", "--prompt=b", code=2)
    assert "--prompt-file" in fails(*model, code=2)
    assert "needs --json" in fails(*model, "--prompt=a", "--patches", code=2)
    assert "--prompt-file" in fails(*model, "--prompt=a", "--prompt-file=x", code=2)
    assert "--stop" in fails(*model, "--prompt=a", "--stop=", code=2)
    assert "blt-d" in fails(*model, "--prompt=a", "--decoder=magic", code=2)
    assert "--max-tokens" in fails(*model, "--prompt=a", "--max-tokens=0", code=2)
    assert fails(*model, "--prompt-file", none := tmp_path / "none") == f"fastblt: {none}: No such file or directory\n"
    assert "up to 8" in fails(*model, "--prompt=a", "--decoder=blt-d", "--block-size=9")
    assert "option of blt-s" in fails(*model, "--prompt=a", "--draft-length=4")
    assert "entropy:GAMMA" in fails(*model, "--prompt=a", "--decoder=blt-dv", "--unmask=entropy", code=2)
    assert "0 to 1" in fails(*model, "--prompt=a", "--decoder=blt-dv", "--unmask=confidence:7", code=2)
    assert "hold 4096" in fails(*model, "--prompt=a", "--max-tokens=5000")
    assert "no such directory" in fails("generate", "--model", tmp_path / "none", "--prompt=a")


def test_generate_without_a_gpu_refuses_device_cuda(tiny: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "device 'cuda': torch" in fails("generate", "--model", tiny, "--prompt=a", "--device=cuda")


def test_generate_reports_failures_of_a_batch_in_prompt_order(tiny: Path) -> None:
    flags = ["--prompt=a", f"--prompt={'x' * 4090}", "--max-tokens=6", "--json"]
    result = runner.invoke(app, ["generate", "--model", str(tiny), *flags])
    fine, failed = map(json.loads, result.stdout.splitlines())
    assert result.exit_code == 1 and fine["usage"]["completion_tokens"] == 6
    assert failed["error"]["code"] == "too_long"


def test_generate_into_a_closed_pipe_prints_no_traceback(tiny: Path) -> None:
    command = [*COMMAND, "generate", "--model", tiny, "--prompt=a", "--max-tokens=300"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", b"? ?\n"), ("utf-8", "\ufffd \u2588\n".encode())])
def test_a_terminal_without_utf8_ends_no_command(encoding: str, shown: bytes) -> None:
    program = "from server import cli; cli.app = lambda **_: print('\\ufffd \\u2588'); cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, shown), done.stderr


def test_init_writes_the_same_weights_for_the_same_seed(tmp_path: Path) -> None:
    def written(name: str, *flags: str) -> bytes:
        result = runner.invoke(app, ["init", "--config=tiny", *flags, str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert written("a") == written("b") != written("c", "--seed=1")
    assert len(written("d", "--hash-rows=9")) < len(written("e", "--hash-rows=99"))


def test_init_accepts_the_config_of_an_existing_model(tiny: Path, tmp_path: Path) -> None:
    for name, source in (("folder", tiny), ("file", tiny / "config.json")):
        result = runner.invoke(app, ["init", "--config", str(source), str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        assert load(tmp_path / name).config.encoder == load(tiny).config.encoder


def test_init_tells_of_too_many_hash_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "less than or equal to 2147483647" in fails(
        "init", "--config=tiny", "--hash-rows=100000000000", tmp_path / "out", code=2
    )

    def refuse(*of: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 6400000000000 bytes.")

    monkeypatch.setattr("engine.checkpoint.presets.RandomTensors.__getitem__", refuse)
    said = fails("init", "--config=tiny", "--hash-rows=2000000000", tmp_path / "out")
    assert said == "fastblt: too little memory for a tensor of the model: --hash-rows below 2000000000 needs less\n"
    assert not (tmp_path / "out").exists()


def test_init_refuses_to_overwrite_a_folder(tiny: Path, tmp_path: Path) -> None:
    assert "not an empty folder" in fails("init", "--config=tiny", tiny)
    assert "no such directory" in fails("init", "--config=none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect_counts_the_parameters_of_the_checkpoint(tiny: Path) -> None:
    described = json.loads(runner.invoke(app, ["inspect", str(tiny), "--json"]).stdout)
    assert described["parameters"]["total"] == sum(t.numel() for t in load(tiny).tensors.values())
    shown = runner.invoke(app, ["inspect", str(tiny)]).stdout
    assert f"{described['parameters']['total']:,} parameters" in shown
    assert "no such directory" in fails("inspect", tiny / "none")


def test_inspect_and_generate_default_to_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # From any folder.
    monkeypatch.chdir(tmp_path)
    assert runner.invoke(app, ["inspect"]).stdout.startswith("nano: fastblt format, ")
    written = runner.invoke(app, ["generate", "--prompt=for i in ", "--max-tokens=6"]).stdout
    named = runner.invoke(app, ["generate", f"--model={NANO}", "--prompt=for i in ", "--max-tokens=6"]).stdout
    assert written == named != ""


@pytest.mark.parametrize("command", ["eval", "calibrate", "compare"])
def test_commands_that_measure_a_model_require_the_model_flag(command: str) -> None:
    assert "Missing option '--model'" in fails(command, "file", code=2)


def test_inspect_and_generate_accept_a_patching_threshold(tiny: Path) -> None:
    command = ["inspect", str(tiny), "--patching-threshold=0.25"]
    assert json.loads(runner.invoke(app, [*command, "--json"]).stdout)["patching"]["threshold"] == 0.25
    assert "entropy above 0.25 nats" in runner.invoke(app, command).stdout
    assert "must be a finite number of nats" in fails("inspect", tiny, "--patching-threshold=nan")

    def global_calls(*flags: str) -> int:
        command = [
            "generate",
            "--model",
            str(tiny),
            "--prompt=abc",
            "--max-tokens=20",
            "--ignore-eos",
            "--json",
            *flags,
        ]
        calls: int = json.loads(runner.invoke(app, command).stdout)["usage"]["fastblt"]["global_calls"]
        return calls

    # Every byte a patch, and as few patches as max_patch_length of the preset, 8, allows.
    assert global_calls("--patching-threshold=-1") == 20
    assert global_calls("--patching-threshold=99") < 4


def test_serve_explains_in_one_line_why_it_cannot_start(tiny: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert b"the port is already in use" in run("serve", "--model", tiny, "--port", port, code=1)
    assert b"no such directory" in run("serve", "--model", tmp_path / "none", "--port", "0", code=1)

"""Settings in a file, from the command line to the two settings objects."""

import os
import string
import subprocess
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import typer
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deploy.ray_settings import RaySettings
from engine.config import EngineConfig
from server.config_file import HIDDEN, MOST_BYTES, ConfigError, read_config, write_line
from server.flags import with_settings
from server.settings import ServerSettings
from tests.conftest import COMMAND, ROOT

runner = CliRunner()
fast = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
KEY = "a-key-of-16-characters"
Taken = tuple[ServerSettings, EngineConfig]


@cache
def command(further: tuple[type[RaySettings], ...]) -> tuple[typer.Typer, list[Any]]:
    """A command, and what it was last called with."""
    taken: list[Any] = []
    serve = typer.Typer(rich_markup_mode=None)
    serve.command()(with_settings(lambda *parts, explain: taken.extend(parts), *further))
    return serve, taken


def invoke(*arguments: str | Path, further: tuple[type[RaySettings], ...] = ()) -> tuple[list[Any], Any]:
    """What the command is called with, and the result."""
    serve, taken = command(further)
    taken.clear()
    result = runner.invoke(serve, [str(argument) for argument in arguments])
    return [*taken], result


def parse(*arguments: str | Path) -> Taken:
    taken, result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    of_http, engine = taken
    return of_http, engine


def printed(*arguments: str | Path) -> str:
    taken, result = invoke(*arguments, "--print-config")
    assert result.exit_code == 0 and not taken, result.output
    return result.stdout


def refusal(*arguments: str | Path) -> str:
    """The error, in one line."""
    taken, result = invoke(*arguments)
    assert result.exit_code == 2 and not taken and not result.stdout, result.output
    return " ".join(result.stderr.split("Error: ")[1].split())


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "fastblt.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


Write = Callable[[str | bytes], Path]


@pytest.mark.parametrize(
    "name", ["port", "max_step_rows"]
)  # Pydantic reads the one from the environment, typer the other.
def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(
    name: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*arguments: str | Path) -> tuple[int, str]:
        (line,) = (line for line in printed(*arguments).splitlines() if line.startswith(name.replace("_", "-")))
        parts = parse(*arguments)
        value = getattr(parts[name == "max_step_rows"], name)
        assert yaml.safe_load(line) == {name.replace("_", "-"): value}
        return value, line.split("  # ")[1]

    flag = (f"--{name.replace('_', '-')}", "3")
    config = ("--config", write(f"{name}: 1"))
    default = found()
    assert default[1] == "default"
    assert found(*config) == (1, "file")
    assert found(*flag) == (3, "flag")
    assert found(*config, *flag) == (3, "flag")
    monkeypatch.setenv(f"FASTBLT_{name.upper()}", "2")
    assert found() == found(*config) == (2, "environment")
    assert found(*flag) == found(*config, *flag) == (3, "flag")


def test_a_variable_names_the_file_and_a_flag_names_another(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBLT_CONFIG", str(write("port: 1")))
    assert parse()[0].port == 1
    (tmp_path / "other.yaml").write_text("max-queue: 200")
    assert parse("--config", tmp_path / "other.yaml")[0] == ServerSettings(max_queue=200)


def test_a_file_writes_settings_as_flags_and_variables_do(write: Write) -> None:
    text = """\
        max_step_rows: 9
        page-size: "8"
        prefix-cache: off
        graphs: no
        max-length: null
        model: 123
        host: 1:20
        served-model-name: [no, 1e9]
        trusted-proxies: 10.0.0.0/8, ::1
        idle-timeout: &seconds 1e2
        head-timeout: *seconds
        log-level: debug
    """
    of_http, engine = parse("--config", write(text))
    assert engine == EngineConfig("123", max_step_rows=9, page_size=8, prefix_cache=False, graphs=False)
    assert (of_http.host, of_http.served_model_name, of_http.log_level) == ("1:20", ["no", "1e9"], "debug")
    assert [str(network) for network in of_http.trusted_proxies] == ["10.0.0.0/8", "::1/128"]
    assert (of_http.idle_timeout, of_http.head_timeout) == (100, 100)


def test_the_documented_file_can_be_used(write: Write) -> None:
    section = (ROOT / "docs" / "operations.md").read_text().split("\n## Settings in a file\n")[1]
    of_http, engine = parse("--config", write(section.split("```yaml\n")[1].split("```")[0]))
    assert engine == EngineConfig("/srv/checkpoint", cache_bytes=4 << 30, max_sequences=32, prefix_cache=False)
    assert of_http == ServerSettings(served_model_name=["blt", "blt-1b"], api_key_file=Path("/etc/fastblt.keys"))


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff# a byte order mark\n", "null\n", "{}"])
def test_a_file_may_set_nothing(text: str, write: Write) -> None:
    assert parse("--model=here", "--config", write(text)) == (ServerSettings(), EngineConfig("here"))


def test_ray_takes_its_own_settings_from_the_file_too_and_serve_does_not(write: Write) -> None:
    path = write("replicas: 2\nport: 1\nmax-sequences: 3")
    taken, result = invoke("--config", path, further=(RaySettings,))
    assert result.exit_code == 0
    assert (taken[0].port, taken[1].max_sequences, taken[2].replicas) == (1, 3, 2)
    assert "'replicas' is not a setting" in refusal("--config", path)


WRONG: list[tuple[str | bytes, str]] = [
    ("prot: 1", "line 1: 'prot' is not a setting; did you mean port?"),
    ("\nmax-step-row: 1", "line 2: 'max-step-row' is not a setting; did you mean max-step-rows?"),
    ("zzz: 1", "line 1: 'zzz' is not a setting; names are those of the flags"),
    ("config: other.yaml", "line 1: 'config' is not a setting"),
    ("<<: {port: 1}", "line 1: '<<' is not a setting"),
    ("[port]: 1", "line 1: 'a sequence as a key' is not a setting"),
    ("port: 1\nhost: a\nport: 1", "line 3: port is already in line 1; keep one of them"),
    ("max-queue: 200\nmax_queue: 200", "line 2: max_queue is already in line 1; keep one of them"),
    ("- port", "must be one mapping such as 'port: 8000', not a sequence"),
    ("port 8000", "must be one mapping such as 'port: 8000', not a scalar"),
    ("port: {number: 1}", "line 1: port must be one value or a list of them, not a mapping"),
    ("cors-origins: [[a]]", "line 1: cors-origins: each item must be one value or a list of them, not a sequence"),
    ("cors-origins: [a, ~]", "line 1: cors-origins: each item must be text or a number, not null"),
    ("cors-origins: &all [*all]", "line 1: cors-origins: each item must be"),
    ("port: !!python/object/apply:os.getpid []", "line 1: port must be one value"),
    ("host: !!python/name:os.getpid x", "line 1: host must be text or a number, not a value with a tag"),
    ("!!map [port]", "must be one mapping such as 'port: 8000', not a sequence"),
    ("cors-origins: !!seq {a: b}", "line 1: cors-origins must be one value or a list of them, not a mapping"),
    ("cors-origins: !!seq text", "line 1: cors-origins must be text or a number, not a value with a tag"),
    ("port: 1\nhost: [", "line 2: is not valid YAML: expected the node content"),
    ("port: 1\n---\nport: 1", "line 2: is not valid YAML"),
    ("host: \x01", "is not valid YAML: unacceptable character"),
    ("[" * 1000, "must be one mapping such as 'port: 8000', not nested so deeply"),
    (b"port: 1\nhost: \xff", "line 2: must be UTF-8, which the byte 0xff is not"),
    ("port: 1".encode("utf-16"), "line 1: must be UTF-8, which the byte 0xff is not"),
    (b"#" * (MOST_BYTES + 1), "must hold at most 1048576 bytes"),
]


@pytest.mark.parametrize(("text", "why"), WRONG, ids=range(len(WRONG)))
def test_a_file_that_cannot_be_used_is_refused_with_its_name_and_line(
    text: str | bytes, why: str, write: Write
) -> None:
    path = write(text)
    message = refusal("--config", path)
    assert message.startswith(f"Invalid value for --config (or FASTBLT_CONFIG): {path}")
    assert why in message


BAD_VALUES = [
    ("port: 65536", "port", "must be at most 65535, not '65536'"),
    ("port: true", "port", "must be a valid integer, not 'true'"),
    ("port: [1, 2]", "port", "must be a valid integer, not ['1', '2']"),
    ("port:", "port", "must be a valid integer, not null"),
    ("max-sequences: 0", "max-sequences", "must be at least 1, not '0'"),
    ("max_sequences: many", "max-sequences", "must be a valid integer, not 'many'"),
    ("cache-bytes: 1e9", "cache-bytes", "must be a valid integer, not '1e9'"),
    ("model: null", "model", "must be a valid string, not null"),
    ("dtype: float16", "dtype", "must be 'float32' or 'bfloat16', not 'float16'"),
    ("prefix-cache: 2", "prefix-cache", "must be a valid boolean, not '2'"),
    ("graphs: maybe", "graphs", "must be a valid boolean, not 'maybe'"),
    ("head-timeout: 0", "head-timeout", "must be greater than 0, not '0'"),
    ("log-level: loud", "log-level", "must be 'debug', 'info', 'warning' or 'error', not 'loud'"),
    (
        "served-model-name: ['a:b']",
        "served-model-name",
        "must not be empty or hold ':', which sets a decoder apart: 'a:b'",
    ),
    ("trusted-proxies: [here]", "trusted-proxies", "must be a valid IPv4 or IPv6 network, not ['here']"),
    ("ssl-certfile: [a]", "ssl-certfile", "must be a valid path, not ['a']"),
    ("otlp-endpoint: here", "otlp-endpoint", "must be a URL such as http://127.0.0.1:4318, not 'here'"),
]


@pytest.mark.parametrize(("text", "name", "why"), BAD_VALUES)
def test_a_wrong_value_of_a_file_is_refused_with_its_line(text: str, name: str, why: str, write: Write) -> None:
    path = write(f"# settings\n{text}")
    message = refusal("--config", path)
    assert message.startswith(f"Invalid value for {name} in {path}, line 2: ") and message.endswith(why)


def test_a_wrong_value_that_a_flag_replaces_does_no_harm(write: Write) -> None:
    path = write("port: 65536\nmax-sequences: 0")
    of_http, engine = parse("--config", path, "--port=1", "--max-sequences=2")
    assert (of_http.port, engine.max_sequences) == (1, 2)


def test_a_wrong_flag_beside_a_file_is_not_blamed_on_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("port: 1\nmax-queue: 200")
    assert refusal("--config", path, "--port=65536").startswith("Invalid value for --port (or FASTBLT_PORT): must")
    assert str(path) not in refusal("--config", path, "--ssl-certfile=x")
    monkeypatch.setenv("FASTBLT_RETRY_AFTER", "soon")
    assert "--retry-after (or FASTBLT_RETRY_AFTER): must be a valid integer, not 'soon'" in refusal("--config", path)


def test_a_contradiction_names_the_lines_that_take_part(write: Write) -> None:
    path = write("port: 1\nmax-queue: 100")
    why = "--max-queue 100 must be at least --max-choices 128: raise --max-queue, or lower --max-choices"
    assert refusal("--config", path) == f"Invalid value: {why} (max-queue in {path}, line 2)"
    assert refusal("--config", path, "--max-queue=5") == f"Invalid value: {why.replace('100', '5')}"
    path = write("ssl-keyfile: x")
    assert refusal("--config", path).endswith(f"go together (ssl-keyfile in {path}, line 1)")


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ("./m/config.json: no such file", ["model"]),
        ("m: no such directory", ["model"]),
        ("m-2/config.json: no such file", []),
        ("the model has port 80801 and port 80", []),
        ("cannot listen on port 8080 of host ::1: why", ["host", "port"]),
        ("cache_bytes 100 is too small", ["cache-bytes"]),
        ("--cache-bytes makes the caches smaller, --cache-bytes-2 and --host-name do not exist", ["cache-bytes"]),
        ("served_model_name is a list, max_cache_bytes is none of these", ["served-model-name"]),
    ],
)
def test_a_later_error_names_the_places_of_its_settings(message: str, names: list[str], write: Write) -> None:
    lines = ["model: ./m", "host: ::1", "port: 8080", "cache-bytes: 100", "served-model-name: [a, b]"]
    told: list[str] = []
    serve = typer.Typer()
    serve.command()(with_settings(lambda *_, explain: told.append(explain(message))))
    path = write("\n".join(lines))
    assert runner.invoke(serve, ["--config", str(path)]).exit_code == 0
    numbers = {line.split(":")[0]: number for number, line in enumerate(lines, 1)}
    places = {f"{name} from {path}, line {numbers[name]}" for name in names}
    assert told[0].startswith(message)
    assert {*filter(None, told[0].removeprefix(message).removeprefix(" (").removesuffix(")").split("; "))} == places


def test_a_path_without_a_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "fifo: must be a regular file, not a FIFO or a device" in refusal("--config", tmp_path / "fifo")
    assert "must be a regular file, not a folder" in refusal("--config", tmp_path)
    assert "missing: cannot be read: No such file or directory" in refusal("--config", tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop: cannot be read: Too many levels of symbolic links" in refusal("--config", tmp_path / "loop")


def test_aliases_do_not_multiply(write: Write) -> None:
    levels = "\n".join(f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * 9)}]" for level in range(1, 20))
    path = write(f"x0: &x0 [a]\n{levels}")
    with pytest.raises(ConfigError, match="line 2: x1: each item must be one value"):
        read_config(path, [f"x{level}" for level in range(20)])
    levels = "\n".join(f"x{level}: &x{level} {{<<: [{', '.join([f'*x{level - 1}'] * 9)}]}}" for level in range(1, 20))
    with pytest.raises(ConfigError, match="line 2: x1 must be one value"):
        read_config(write(f"x0: &x0 a\n{levels}"), [f"x{level}" for level in range(20)])


@fast
@given(st.binary(max_size=60) | st.text("aport:-{}[]&*!|>'\"#%~ \n\t\\", max_size=60).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "any").write_bytes(data)
    try:
        entries = read_config(tmp_path / "any", ["port", "a"])
    except ConfigError as error:
        assert str(error).startswith(str(tmp_path / "any"))
    else:
        assert entries.keys() <= {"port", "a"}


TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("\0\n\t\x85\u2028\ufeff\udcff #:'\"&*!%@`[]{},|>-?"))
NUMBERS = st.floats(min_value=1e-300, allow_nan=False) | st.sampled_from([1e20, 1e-7, 5e-324, float("inf")])


@fast
@given(st.lists(TEXTS) | TEXTS | st.sampled_from(["null", "~", "", "no", "1e9", "---", "... #", "<<", "="]))
def test_what_is_written_is_read(tmp_path: Path, value: str | list[str]) -> None:
    path = tmp_path / "written"
    path.write_text(write_line("a_b", value, "file") + write_line("c", None, "default"), "utf-8", newline="")
    assert {name: entry.value for name, entry in read_config(path, ["a_b", "c"]).items()} == {"a_b": value, "c": None}


NAMES = st.text(string.ascii_letters + "äß#'\"\n 漢-", min_size=1, max_size=8)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a setting's type."""
    kinds = [kind, *get_args(kind)]
    if choices := [choice for part in kinds for choice in get_args(part) if isinstance(choice, str)]:
        return st.sampled_from(choices)
    if get_origin(kind) is list:
        return st.lists(NAMES, max_size=2)
    known = {bool: st.booleans(), int: st.integers(1, 1 << 60), float: NUMBERS, Path: NAMES.map(Path), str: NAMES}
    return next(strategy for part, strategy in known.items() if part in kinds)


ENGINE = {
    field.name: st.integers(1, field.metadata["most"]) if field.metadata["most"] else values_of(field.type)
    for field in fields(EngineConfig)
    if field.name != "model"
}
SPECIAL = {
    "port": st.integers(0, 65535),
    "trusted_proxies": st.lists(st.ip_addresses().map(str), max_size=2),
    "max_queue": st.integers(128, 1 << 60),
    "max_choices": st.integers(1, 128),
    "max_body_bytes": st.integers(1024, 1 << 60),
    "max_header_bytes": st.integers(1024, 1 << 60),
    "otlp_endpoint": NAMES.map("http://{}/".format),
}
APART = {"ssl_certfile", "ssl_keyfile", "api_keys"}
"""Tied to others, or secret."""
HTTP = {
    name: SPECIAL[name] if name in SPECIAL else values_of(info.annotation)
    for name, info in ServerSettings.model_fields.items()
    if name not in APART
}


@settings(fast, max_examples=20)
@given(st.fixed_dictionaries({"model": NAMES}, optional=ENGINE), st.fixed_dictionaries({}, optional=HTTP))
@example({"model": "m"}, {"idle_timeout": float("inf")})
def test_a_printed_file_gives_the_same_settings(
    tmp_path: Path, of_engine: dict[str, Any], of_http: dict[str, Any]
) -> None:
    if "ssl_ca_certs" in of_http:
        of_http |= {"ssl_certfile": Path("c"), "ssl_keyfile": Path("k")}
    expected = ServerSettings(**of_http), EngineConfig(**of_engine)
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in (of_engine | of_http).items()}
    # Another writer than ours; only infinity it writes in its own way.
    text = yaml.safe_dump({name.replace("_", "-"): value for name, value in plain.items()}).replace(
        ": .inf\n", ": inf\n"
    )
    first.write_text(text, "utf-8")
    assert parse("--config", first) == expected
    second.write_text(printed("--config", first), "utf-8", newline="")
    assert parse("--config", second) == expected


def test_secrets_are_neither_printed_nor_taken_for_secrets(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--api-keys", KEY, "--otlp-endpoint", "http://user:pass@word@host:1/v1"]
    text = printed(*flags)
    assert KEY not in text and "pass" not in text and "word" not in text
    assert f"otlp-endpoint: 'http://{HIDDEN}@host:1/v1'  # flag\n" in text
    # An open server must not come of it.
    path = write("\n".join(line for line in text.splitlines() if "otlp" not in line))
    message = refusal("--config", path)
    assert f"api-keys in {path}, line" in message and "write the secret there or in FASTBLT_API_KEYS" in message
    assert f"otlp-endpoint in {write(text)}" in refusal("--config", write(text), "--api-keys", KEY)
    monkeypatch.setenv("FASTBLT_API_KEYS", KEY)
    assert parse("--config", write(text), *flags[2:]) == parse(*flags)


@pytest.mark.parametrize("text", ["api-keys: [secret]", "api-keys: secret", "api-keys: [sec:ret, x]", "api-keys:"])
def test_a_wrong_key_in_a_file_is_not_shown(text: str, write: Write) -> None:
    message = refusal("--config", write(text))
    assert "api-keys in" in message and "line 1" in message and "ret" not in message.split("line 1")[1]


@pytest.mark.parametrize("text", ["api-keys: *secret", "api-keys: !secret", "api-keys: {secret: x}", "api-keys: '"])
def test_a_key_that_is_no_plain_yaml_is_not_shown(text: str, write: Write) -> None:
    message = refusal("--config", write(text))
    assert "line 1" in message and "secret" not in message


def test_an_empty_list_of_keys_is_an_open_server_and_an_empty_text_is_not(write: Write) -> None:
    assert parse("--config", write("api-keys: []"))[0].api_keys == []
    assert "holds no API key" in refusal("--config", write("api-keys: ''"))


def test_serve_prints_its_settings_without_loading_a_model(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: no-such-model\nport: 1\n")
    arguments = [*COMMAND, "serve", "--print-config", "--max-queue=200"]
    environment = {**os.environ, "FASTBLT_CONFIG": str(tmp_path / "a.yaml"), "FASTBLT_HOST": "0.0.0.0"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    lines = {
        "model: no-such-model  # file",
        "port: 1  # file",
        "max-queue: 200  # flag",
        "host: 0.0.0.0  # environment",
    }
    assert lines | {"page-size: 64  # default"} <= {*done.stdout.splitlines()}

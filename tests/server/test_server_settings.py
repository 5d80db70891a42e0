from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import ServerSettings


def test_settings_are_read_from_the_environment_and_arguments_override_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBLT_PORT", "9000")
    monkeypatch.setenv("FASTBLT_SERVED_MODEL_NAME", "a, b")
    assert ServerSettings().port == 9000
    assert ServerSettings().served_model_name == ["a", "b"]
    assert ServerSettings(port=1).port == 1


ONE, TWO, THREE = (f"{name}-of-these-keys" for name in ("one", "two", "three"))


def test_api_keys_come_from_setting_and_file_and_are_never_shown(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# of bob\n{TWO}\r\n\n  {THREE}  \n#{ONE}\n{TWO}")
    settings = ServerSettings(api_keys=f"{ONE},{TWO}", api_key_file=tmp_path / "keys")  # type: ignore[arg-type]
    assert settings.load_api_keys() == (ONE.encode(), TWO.encode(), THREE.encode())
    assert ONE not in repr(settings)


def test_a_byte_order_mark_in_the_key_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbf" + ONE.encode())
    assert ServerSettings(api_key_file=tmp_path / "keys").load_api_keys() == (ONE.encode(),)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "holds no key"),
        (b"\n # only a comment\n", "holds no key"),
        (f"{ONE}\n{TWO} # alice\n".encode(), "line 2: a key has at least 16 characters"),
        (b"sk-1\n", "line 1: a key has"),
        (f"{ONE},{TWO}\n".encode(), "line 1: a key has"),
        ("ein-schlüssel-der-klemmt".encode(), "line 1: a key has"),
        (b"\xff\xfe" + ONE.encode("utf-16-le"), "is not UTF-8"),
    ],
)
def test_a_key_file_with_anything_but_keys_is_refused(tmp_path: Path, text: bytes, why: str) -> None:
    (tmp_path / "keys").write_bytes(text)
    with pytest.raises(ValueError) as caught:
        ServerSettings(api_key_file=tmp_path / "keys").load_api_keys()
    assert str(tmp_path / "keys") in str(caught.value) and why in str(caught.value)
    assert ONE not in str(caught.value) and "sk-1" not in str(caught.value)


def test_an_empty_source_of_api_keys_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServerSettings().load_api_keys() == ()
    with pytest.raises(OSError):
        ServerSettings(api_key_file=tmp_path / "missing").load_api_keys()
    for empty in ("", "  ", " , "):
        monkeypatch.setenv("FASTBLT_API_KEYS", empty)
        with pytest.raises(ValidationError, match="holds no API key"):
            ServerSettings()
    monkeypatch.setenv("FASTBLT_API_KEYS", "s3cret")
    with pytest.raises(ValidationError, match="at least 16 characters") as caught:
        ServerSettings()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [{"port": 70000}, {"max_queue": 1}, {"served_model_name": ["a:b"]}, {"prot": 1}, {"trusted_proxies": "here"}]
    + [{"ssl_certfile": "x"}, {"ssl_ca_certs": "x"}, {"head_timeout": 0}, {"max_connections": 0}],
)
def test_contradictory_and_misspelt_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ServerSettings(**wrong)  # type: ignore[arg-type]


def test_every_setting_has_a_description() -> None:
    assert all(field.description for field in ServerSettings.model_fields.values())

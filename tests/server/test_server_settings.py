from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import ServerSettings


def test_the_environment_is_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBLT_PORT", "9000")
    monkeypatch.setenv("FASTBLT_SERVED_MODEL_NAME", "a, b")
    assert ServerSettings().port == 9000
    assert ServerSettings().served_model_name == ["a", "b"]
    assert ServerSettings(port=1).port == 1


def test_keys_come_from_both_places_and_are_never_shown(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key-two\nkey-three\n\n")
    settings = ServerSettings(api_keys="key-one", api_key_file=tmp_path / "keys")  # type: ignore[arg-type]
    assert settings.load_api_keys() == (b"key-one", b"key-two", b"key-three")
    assert "key-one" not in repr(settings)


def test_a_file_without_keys_does_not_open_the_server_to_all(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValueError, match="holds no API key"):
        ServerSettings(api_key_file=tmp_path / "keys").load_api_keys()
    with pytest.raises(OSError):
        ServerSettings(api_key_file=tmp_path / "missing").load_api_keys()


@pytest.mark.parametrize("wrong", [{"port": 70000}, {"max_queue": 1}, {"served_model_name": ["a:b"]}, {"prot": 1}])
def test_contradictions_and_typos_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ServerSettings(**wrong)  # type: ignore[arg-type]


def test_every_setting_is_described() -> None:
    assert all(field.description for field in ServerSettings.model_fields.values())

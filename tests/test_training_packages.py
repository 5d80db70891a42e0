"""The packages that a model may learn from: which of their files are taken, and under which licences."""

import io
import re
import tarfile
from pathlib import Path

import pytest

from training import corpus, packages
from training.card import card_data


def source_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "library").mkdir()
    for i in range(40):
        (tmp_path / "library" / f"{i}.py").write_text(f"# {i}\n")
    return tmp_path / "library"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    files = {
        "one-1.0/one/code.py": b"print(1)\n",
        "one-1.0/docs/text.txt": b"prose\n",
        "one-1.0/docs/more.rst": b"more prose\n",
        "one-1.0/README.md": b"# one\n",
        "one-1.0/copy.py": b"# 7\n",  # also in the library
        "one-1.0/requirements.txt": b"two\n",
        "one-1.0/tests/test_code.py": b"assert 1\n",
        "one-1.0/one/locale/de.py": b"x = 1\n",
        "one-1.0/one/empty.py": b"",
        "one-1.0/one/latin.py": b"# \xe9\n",
        "one-1.0/one/table.py": b"0, " * (packages.MOST_BYTES // 3 + 1),
        "one-1.0/one/image.png": b"\x89PNG",
    }
    return source_archive(tmp_path / "one-1.0.tar.gz", files)


def test_sources_and_documentation_are_taken_and_nothing_else(library: Path, package: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus.tar.xz"
    assert corpus.write_archive(out, library, [package]) == 40 + 4
    training, held_out = corpus.read_archive(out)
    names = {*training.names, *held_out.names}
    of_package = {"one-1.0/one/code.py", "one-1.0/docs/text.txt", "one-1.0/docs/more.rst", "one-1.0/README.md"}
    assert names == {f"{i}.py" for i in range(40)} | of_package
    assert training.sources == held_out.sources
    assert training.sources[1:] == ("one-1.0",) and training.sources[0].startswith("cpython-")
    # The library's files are split as without packages.
    alone = corpus.standard_library(library)[1]
    assert {n for n in held_out.names if "/" not in n} == set(alone.names)


def test_nothing_held_out_has_a_copy_to_learn_from(tmp_path: Path) -> None:
    for i in range(400):
        (tmp_path / f"{i}.py").write_text(f"# {i % 100}\n")
    training, held_out = corpus.standard_library(tmp_path)
    assert held_out.texts and not set(training.texts) & set(held_out.texts)
    assert len(training.texts) + len(held_out.texts) == 100


def test_a_folder_without_a_version_is_refused(library: Path, tmp_path: Path) -> None:
    for name, why in (
        ("one/code.py", "one/code.py is not in a folder NAME-VERSION"),
        ("one-1.0/a.py", "holds 0 folders"),
    ):
        path = tmp_path / "bad.tar.xz"
        with tarfile.open(path, "w:xz") as archive:
            member = tarfile.TarInfo(name)
            archive.addfile(member, io.BytesIO())
        with pytest.raises(ValueError, match=re.escape(why)):
            corpus.read_archive(path)


def test_every_release_has_its_hash_and_a_free_licence() -> None:
    lines = [line for line in packages.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert len(packages.licences()) == len(lines) > 10
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}  # .+", line), line
    free = {"MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "MIT OR Apache-2.0"}
    assert set(packages.licences().values()) <= free


def test_the_card_names_every_source_with_its_licence(library: Path, package: Path, tmp_path: Path) -> None:
    text = card_data(corpus.Corpus(("a",), (b"x",), ("cpython-3.11.7", "flask-3.1.3", "one-1.0")))
    assert "CPython 3.11.7 (PSF License Agreement" in text
    assert "flask-3.1.3 (BSD-3-Clause), one-1.0 (licence unknown)." in text
    assert "sources and documentation" not in card_data(corpus.Corpus(("a",), (b"x",), ("cpython-3.11.7",)))

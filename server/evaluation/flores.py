"""FLORES into English with four examples (Goyal et al. 2022, arXiv 2106.03193): the examples are the first of `dev`,
the sentences of `devtest` are tests."""

from pathlib import Path

from .tasks import Problem, Task, TaskError

NUM_BYTES = 512
NUM_EXAMPLES = 4
LANGUAGES = {"fr-en": ("French", ("fra", "fra_Latn")), "de-en": ("German", ("deu", "deu_Latn"))}
"""Names of files in FLORES-101 and FLORES-200."""
ENGLISH = ("eng", "eng_Latn")


def load(pair: str, folder: Path | None) -> Task:
    """pair: one of `LANGUAGES`. folder: FLORES as it is unpacked, with the folders dev and devtest. Raises TaskError,
    OSError."""
    if folder is None:
        raise TaskError(f"{pair}: name the folder of FLORES, which has the folders dev and devtest, with --flores")
    language, names = LANGUAGES[pair]
    examples = "".join(
        f"{language}: {source}\nEnglish: {target}\n\n" for source, target in _pairs(folder, "dev", names)[:NUM_EXAMPLES]
    )
    problems = [
        Problem(f"{pair}/{number}", f"{examples}{language}: {source}\nEnglish:", reference=target)
        for number, (source, target) in enumerate(_pairs(folder, "devtest", names))
    ]
    return Task(pair, "BLEU", NUM_BYTES, ("\n",), problems)


def _pairs(folder: Path, part: str, names: tuple[str, ...]) -> list[tuple[str, str]]:
    source, target = (_sentences(folder / part, part, some) for some in (names, ENGLISH))
    if len(source) != len(target):
        raise TaskError(f"{folder / part}: {len(source)} sentences of {names[0]} and {len(target)} of {ENGLISH[0]}")
    return [*zip(source, target, strict=True)]


def _sentences(folder: Path, part: str, names: tuple[str, ...]) -> list[str]:
    for name in names:
        if (file := folder / f"{name}.{part}").exists():
            return [line.strip() for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    raise TaskError(f"{folder}: it has neither {' nor '.join(f'{name}.{part}' for name in names)}")

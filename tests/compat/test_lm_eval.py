"""lm-eval's `local-completions`, run as it is, gets the sums that the plain model gives (tests/reference.py).

It sends prompt and continuation as one prompt with `echo`, `max_tokens` 1 and `logprobs`, and takes the entries
[number of prompt tokens : -1] of the answer: whatever is generated must have its one entry, an end of sequence too.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from engine.checkpoint import PRESETS, calibrated, random_tensors, save
from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, ModelConfig
from server import tokenizer_files
from tests import reference
from tests.serving import RunningServer, running_server

from .environments import installed
from .running import PROGRAMS, RECIPES, output, plain, run_recipe

STRINGS = PROGRAMS / "lm_eval_strings.py"
TOLERANCE = 1e-4
LIKELIEST = "!"
"""The first question's choice that the model itself would make."""
QUESTIONS: list[dict[str, Any]] = [
    {"context": "def f(", "choices": ["x):", LIKELIEST, "é, *rest) -> 1:"], "answer": 1},
    {"context": "Ünd dann\n\tkam", "choices": [" der Herbst.", " die 日本語"], "answer": 1},
]
TEXTS = ["Once upon a time\nthere was a byte.", "naïve", "x = [1, 2]"]
ENDS = {"def f(x):", "def f(!", "Ünd dann\n\tkam die 日本語", "naïve"}
"""The model ends its text after these, and after no other whole text of a request."""
BEGIN = [BOS_ID]


def to_ids(text: str) -> list[int]:
    return [byte + BYTE_OFFSET for byte in text.encode()]


class Score(NamedTuple):
    total: float
    is_greedy: bool


class Model(NamedTuple):
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    folder: Path

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Score:
        """The log-probability of the continuation, and whether each of its ids is the likeliest."""
        ids = [*context, *continuation]
        rows = reference.forward(self.config, self.tensors, ids)[len(context) - 1 : -1].log_softmax(-1)
        wanted = torch.tensor(continuation)
        return Score(float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(-1) == wanted).all()))

    def ends_after(self, ids: Sequence[int]) -> bool:
        return int(reference.forward(self.config, self.tensors, ids)[-1].argmax()) == EOS_ID


def steer(config: ModelConfig, tensors: dict[str, Tensor], token: int, wanted: Mapping[tuple[int, ...], bool]) -> None:
    """Gives the token the row of the head that makes it the likeliest after the wanted texts, and not after others."""
    head = tensors["lm_head.weight"]
    # With this head the reference returns what it would multiply with the head.
    bare = tensors | {"lm_head.weight": torch.eye(head.shape[1])}
    states = torch.stack([reference.forward(config, bare, ids)[-1] for ids in wanted])
    others = (states @ head.T).amax(-1)
    values = others + torch.tensor([4.0 if is_wanted else -4.0 for is_wanted in wanted.values()])
    tensors["lm_head.weight"] = head.index_copy(0, torch.tensor([token]), (torch.linalg.pinv(states) @ values)[None])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    drawn = random_tensors(PRESETS["tiny"], seed=3)
    config = calibrated(PRESETS["tiny"], drawn)
    tensors = dict(drawn)
    contexts = [question["context"] for question in QUESTIONS]
    wholes = [question["context"] + choice for question in QUESTIONS for choice in question["choices"]]
    prompts = {(*begin, *to_ids(text)): text for begin in ([], BEGIN) for text in contexts + wholes}
    prompts |= {(*begin, *to_ids(text)): text for begin in (BEGIN, 2 * BEGIN) for text in TEXTS}
    steer(config, tensors, to_ids(LIKELIEST)[0], {ids: text == contexts[0] for ids, text in prompts.items()})
    steer(config, tensors, EOS_ID, {ids: text in ENDS for ids, text in prompts.items()})
    save(folder, config, tensors, torch.float32)
    return Model(config, tensors, folder)


@pytest.fixture(scope="module")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(model.folder, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choices": (
        QUESTIONS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
    ),
    "rolling": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ),
}


BATCH = 3
"""Prompts of one request, where several are sent at a time."""
LOCAL = {"tokenizer_backend": "huggingface"}
KINDS: dict[str, dict[str, Any]] = {
    "no tokenizer": {},
    "several with no tokenizer": {"num_concurrent": 2},
    "ids of bytes": LOCAL,
    "ids of begin-of-sequence and bytes": LOCAL | {"add_bos_token": True, "num_concurrent": 2},
    "strings without begin-of-sequence": LOCAL | {"tokenized_requests": False},
}
"""The arguments of lm-eval's model. What a prompt begins with is up to them: only those that say so have
begin-of-sequence. Without a tokenizer it finds the server's."""


class Evaluated(NamedTuple):
    begin: list[int]
    """What stands before the bytes of a prompt."""
    metrics: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=KINDS)
def told(request: pytest.FixtureRequest, server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """What lm-eval's command says about the tasks."""
    arguments, folder = KINDS[request.param], tmp_path_factory.mktemp("lm-eval")
    strings = "tokenized_requests" in arguments
    # Its own request for a whole text as a string has begin-of-sequence as the text "<s>".
    names = ["choices"] if strings else ["choices", "rolling"]
    for name in names:
        write_task(name, folder)
    given = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        **arguments,
    }
    if "tokenizer_backend" in arguments:
        tokenizer_files.write(folder / "tokenizer")
        given["tokenizer"] = folder / "tokenizer"
    program = installed("lm-eval")
    command = program.command(STRINGS) if strings else [str(program.tool("lm-eval"))]
    command += ["run"]
    command += ["--model", "completions-of-bare-strings" if strings else "local-completions"]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in given.items())]
    command += ["--batch_size", str(BATCH if "num_concurrent" in arguments else 1)]
    command += ["--tasks", ",".join(names), "--include_path", str(folder)]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    output(command, folder)
    (results,) = (folder / "out").rglob("results_*")
    samples = {}
    for name in names:
        (path,) = (folder / "out").rglob(f"samples_{name}_*")
        samples[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    begin = BEGIN if "add_bos_token" in arguments else []
    return Evaluated(begin, json.loads(results.read_text())["results"], samples)


def write_task(name: str, folder: Path) -> None:
    rows, described = TASKS[name]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **described}))


def test_lm_eval_scores_multiple_choice_as_the_plain_model_does(told: Evaluated, model: Model) -> None:
    right, seen = [], []
    for question, sample in zip(QUESTIONS, told.samples["choices"], strict=True):
        context = [*told.begin, *to_ids(question["context"])]
        expected = [model.score(context, to_ids(choice)) for choice in question["choices"]]
        for choice, [(total, greedy)], wanted in zip(question["choices"], sample["resps"], expected, strict=True):
            assert float(total) == pytest.approx(wanted.total, abs=TOLERANCE), choice
            assert greedy == str(wanted.is_greedy), choice
            seen.append((wanted.is_greedy, model.ends_after([*context, *to_ids(choice)])))
        right.append(expected.index(max(expected)) == question["answer"])
    assert told.metrics["choices"]["acc,none"] == pytest.approx(sum(right) / len(right))
    # A likeliest byte was among them, and texts that the model ends and does not end.
    assert [greedy for greedy, _ in seen].count(True) == 1 and [ends for _, ends in seen].count(True) == 3


def test_lm_eval_scores_whole_texts_as_the_plain_model_does(told: Evaluated, model: Model) -> None:
    """lm-eval itself puts begin-of-sequence before a whole text; one of the tokenizer's comes second, and is scored."""
    if "rolling" not in told.samples:
        pytest.skip("lm-eval cannot ask for this with strings")
    sums = [float(sample["resps"][0][0]) for sample in told.samples["rolling"]]
    texts = [[*told.begin, *to_ids(text)] for text in TEXTS]
    assert sums == pytest.approx([model.score(BEGIN, text).total for text in texts], abs=TOLERANCE)
    assert [model.ends_after([*BEGIN, *text]) for text in texts].count(True) == 1
    bits = -sum(sums) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert told.metrics["rolling"]["bits_per_byte,none"] == pytest.approx(bits)


def test_the_recipe_of_lm_eval_scores_each_choice(nano: RunningServer, tmp_path: Path) -> None:
    tokenizer_files.write(tmp_path / "tokenizer")
    (tmp_path / "tasks").mkdir()
    write_task("choices", tmp_path / "tasks")
    run_recipe(installed("lm-eval"), RECIPES["lm-eval"], nano, tmp_path)
    (path,) = (tmp_path / "out").rglob("samples_choices_*")
    sums = {}
    for sample in map(json.loads, path.read_text().splitlines()):
        sums[sample["doc_id"]] = [float(total) for [(total, _)] in sample["resps"]]
    for number, question in enumerate(QUESTIONS):
        context = to_ids(question["context"])
        for choice, total in zip(question["choices"], sums[number], strict=True):
            asked = {"prompt": context + to_ids(choice), "max_tokens": 0, "echo": True, "logprobs": 0}
            (scored,) = plain(nano, model="nano", **asked)["choices"]
            expected = sum(scored["logprobs"]["token_logprobs"][len(context) :])
            assert total == pytest.approx(expected, abs=TOLERANCE)

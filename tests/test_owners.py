"""Each part of a sequence's state has one writer: the file that owns it, or methods of the part itself.

A `Sequence` holds committed ids only: what the device has drawn, and the host has not read and committed, cannot enter.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ENGINE = Path(__file__).parent.parent / "engine"
OWNERS = {
    "sequence.py": ("ids", "id_counts", "num_computed", "num_cached", "patching", "documents", "patch_documents"),
    "scheduler.py": ("due", "last_round", "preemptions"),
    "memory": ("tables", "prefix", "slot"),
    "output.py": ("output", "constraint"),
    "costs/ledger.py": ("counts",),
}
"""By file or folder of the engine, the attributes of a `Sequence`."""
OWNER = {part: owner for owner, parts in OWNERS.items() for part in parts}
MUTATORS = {
    *("append", "extend", "insert", "pop", "popitem", "remove", "clear", "update", "setdefault", "sort", "reverse"),
    *("take", "cut", "resume"),  # of Patching
    *("own", "borrow", "trim", "trim_before", "release"),  # of BlockTable
    *("add",),  # of Counts
}
METHODS_OF_PARTS = {"output": {"take"}}
"""Mutators by which a part changes itself: any file may call them."""


def part_of(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """Which part of a sequence an expression reaches into: `rows.sequence.ids[3]` -> "ids"."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        if isinstance(node, ast.Attribute) and node.attr in OWNER and is_sequence(node.value):
            return node.attr
        node = node.func if isinstance(node, ast.Call) else node.value
    return aliases.get(node.id) if isinstance(node, ast.Name) else None


def is_sequence(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "sequence"
    return isinstance(node, ast.Name) and node.id in {"sequence", "victim", "s"}


def is_copy(node: ast.expr | None) -> bool:
    """Calls give new values as far as this test knows, slices of lists do."""
    return isinstance(node, ast.Call) or (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice))


def pairs(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    if isinstance(target, ast.Tuple | ast.List):
        values = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
        for one, given in zip(target.elts, values, strict=False):
            yield from pairs(one, given)
    else:
        yield target, value


def writes(source: str) -> Iterator[tuple[int, str]]:
    """(line, part) of every statement that sets a part of a sequence or what it holds."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        aliases: dict[str, str] = {}
        for node in ast.walk(function):
            targets: list[ast.expr] = []
            match node:
                case ast.Assign(of, value):
                    for target, given in (pair for one in of for pair in pairs(one, value)):
                        part = part_of(given, aliases) if given is not None else None
                        if isinstance(target, ast.Name) and part and not is_copy(given):
                            aliases[target.id] = part
                        elif not isinstance(target, ast.Name):
                            targets.append(target)
                case ast.AugAssign(target) | ast.AnnAssign(target):
                    targets = [target]
                case ast.Delete(of):
                    targets = of
                case ast.Call(ast.Attribute(value, name), lineno=line) if name in MUTATORS:
                    part = part_of(value, aliases)
                    if part and name not in METHODS_OF_PARTS.get(part, ()):
                        yield line, part
            for target in targets:
                # A bare name that is an alias is bound anew; what it stood for stays as it was.
                if not isinstance(target, ast.Name) and (part := part_of(target, aliases)):
                    yield target.lineno, part


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.py")), ids=lambda path: str(path.relative_to(ENGINE)))
def test_only_the_file_that_owns_a_part_of_a_sequence_sets_it(path: Path) -> None:
    file = path.relative_to(ENGINE)
    for line, part in writes(path.read_text()):
        assert file.is_relative_to(OWNER[part]), f"{file}:{line} sets Sequence.{part}, which {OWNER[part]} owns"


def test_every_owned_part_is_an_attribute_of_a_sequence() -> None:
    tree = ast.parse((ENGINE / "sequence.py").read_text())
    (made,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    stored = {n.attr for n in ast.walk(made) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    constant = {"request", "arrival", "deadline", "num_prompt", "mask_id"}
    assert stored - constant == {*OWNER} | {"_submitted", "_begun", "_first", "_decoder", "_round", "_ask"}


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        ("rows.sequence.ids[3] = 1", "ids"),
        ("sequence.num_computed += 1", "num_computed"),
        ("del sequence.documents[1:]", "documents"),
        ("a, rows.sequence.due = 1, 2", "due"),
        ("sequence.patching.cut(3)", "patching"),
        ("starts = sequence.patching.starts; starts.append(4)", "patching"),
        ("counts = rows.sequence.counts; counts.calls['decoder'] += 1", "counts"),
        ("for s in running: s.prefix = None", "prefix"),
        ("sequence.tables['open'].release()", "tables"),
    ],
)
def test_a_write_from_outside_is_found(statement: str, part: str) -> None:
    assert [found for _, found in writes(f"def f():\n    {statement}\n")] == [part]


@pytest.mark.parametrize(
    "statement", ["ids = [*sequence.ids]; ids.append(1)", "sequence.output.take([1])", "rows.ids = []"]
)
def test_reading_a_part_is_no_write(statement: str) -> None:
    assert not list(writes(f"def f():\n    {statement}\n"))


# A sequence holds committed ids only.

GIVEN_NO_IDS = {"patch_of", "most_patches", "note_patch_documents", "decide"}
"""The methods of a `Sequence` that steps may call: positions and boundaries go in."""
SEQUENCE = (ENGINE / "sequence.py").read_text()


def methods() -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in class_of(SEQUENCE).body if isinstance(n, ast.FunctionDef)}


def class_of(source: str) -> ast.ClassDef:
    return next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Sequence")


def writers_of_ids(source: str) -> set[str]:
    """The methods of `Sequence` that write its ids."""
    found = set()
    for method in class_of(source).body:
        if isinstance(method, ast.FunctionDef):
            inside = ast.unparse(method).replace("self.", "sequence.")
            found |= {method.name for _, part in writes(inside) if part == "ids"}
    return found


def uses(source: str) -> set[str]:
    """Methods of a sequence that are called, or taken to be called."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and is_sequence(node.value)
        and node.attr in methods()
        and not is_property(node.attr)
    }


def is_property(name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == "property" for n in methods()[name].decorator_list)


def test_only_append_and_the_constructor_write_the_ids_of_a_sequence() -> None:
    assert writers_of_ids(SEQUENCE) == {"__init__", "append"}


@pytest.mark.parametrize("folder", ["engine/step", "kernels"])
def test_what_a_step_has_drawn_enters_no_sequence(folder: str) -> None:
    """Only the engine commits ids, after the decoder's round has returned them."""
    for path in (ENGINE.parent / folder).rglob("*.py"):
        assert uses(path.read_text()) <= GIVEN_NO_IDS, path


def test_only_the_engine_commits_ids_and_only_once() -> None:
    callers = [path.name for path in sorted(ENGINE.rglob("*.py")) if "append" in uses(path.read_text())]
    assert callers == ["engine.py"] and (ENGINE / "engine.py").read_text().count("sequence.append(") == 1


@pytest.mark.parametrize(
    "body",
    [
        "self.ids += drafts",
        "self.ids[3:] = drafts",
        "del self.ids[3:]",
        "self.ids.extend(drafts)",
        "ids = self.ids; ids.pop()",
    ],
)
def test_another_method_that_writes_ids_is_found(body: str) -> None:
    mutated = SEQUENCE.replace(
        "    # Patches.\n", f"    def extend(self, drafts):\n        {body}\n\n    # Patches.\n", 1
    )
    assert writers_of_ids(mutated) == {"__init__", "append", "extend"}


@pytest.mark.parametrize(
    "call", ["rows.sequence.append(ids)", "commit = rows.sequence.append", "s.append([1])", "sequence.resume(r)"]
)
def test_a_step_that_commits_ids_is_found(call: str) -> None:
    source = (ENGINE / "step" / "step.py").read_text() + f"\n\ndef commit(rows, ids, s, sequence, r):\n    {call}\n"
    assert not uses(source) <= GIVEN_NO_IDS

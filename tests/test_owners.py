"""Each part of a sequence's state has one writer: the file that owns it, or methods of the part itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ENGINE = Path(__file__).parent.parent / "engine"
OWNERS = {
    "sequence.py": ("ids", "id_counts", "num_computed", "num_cached", "patching", "documents", "patch_documents"),
    "scheduler.py": ("due", "preemptions"),
    "memory": ("tables", "prefix"),
    "output.py": ("output",),
    "costs/ledger.py": ("counts",),
}
"""By file or folder of the engine, the attributes of a `Sequence`."""
OWNER = {part: owner for owner, parts in OWNERS.items() for part in parts}
MUTATORS = {
    *("append", "extend", "insert", "pop", "popitem", "remove", "clear", "update", "setdefault", "sort", "reverse"),
    *("take", "cut", "resume"),  # of Patching
    *("own", "borrow", "settle", "trim_before", "release"),  # of BlockTable
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
    constant = {"request", "arrival", "arrived", "deadline", "num_prompt", "mask_id"}
    assert stored - constant == {*OWNER} | {"_begun", "_decoder", "_round", "_ask"}


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

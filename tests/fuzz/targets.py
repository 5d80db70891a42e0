"""All targets, by name. A target is imported when it is asked for, so that a fuzzer can watch its imports."""

from importlib import import_module

from tests.fuzz.target import Target

NAMES = ("connection", "parser", "reader", "splitter", "stops", "wire")


def target(name: str) -> Target:
    found: Target = import_module(f"tests.fuzz.{name}").TARGET
    return found

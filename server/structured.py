"""What a text must match: `response_format`, `structured_outputs` and flags of `fastblt generate`, as grammars for the
engine. This finds faults that need no compiler; `server.grammars` or `engine.grammars` finds the others.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from llguidance import LLMatcher
from pydantic_core import from_json

from engine.types import Failed

from .errors import ApiError, shown
from .schemas import CompletionRequest, StructuredOutputs

MAX_BYTES = 100_000
"""Most bytes of a grammar."""
MAX_DEPTH = 64
"""Most levels of a JSON schema."""
MAX_CHOICES = 1024

JSON_RULE = "must be a JSON schema that can be enforced"
REGEX_RULE = "must be a regular expression without look-around and back-references"
LARK_RULE = "must be a Lark grammar whose first rule is 'start'"
CHOICE_RULE = f"must be an array of 1 to {MAX_CHOICES} strings"


class WrongGrammar(ValueError):
    """A constraint that cannot be used. field: of the request, or a flag."""

    def __init__(self, field: str, rule: str, value: object, why: str) -> None:
        super().__init__(f"{field}: {rule}, not {shown(value)}: {why}")
        self.field = field


@dataclass(frozen=True)
class Grammar:
    """One grammar, and what the client wrote. rule: what would be right."""

    field: str
    value: object
    rule: str
    text: str

    def __post_init__(self) -> None:
        if (size := len(self.text.encode())) > MAX_BYTES:
            raise self.fault(f"it makes a grammar of {size} bytes; at most {MAX_BYTES} are allowed")

    def fault(self, message: str) -> WrongGrammar:
        """message: of the compiler, as `server.grammar_worker.essence` or `server.grammars` tells it, or ours."""
        return WrongGrammar(self.field, self.rule, self.value, message)


@dataclass(frozen=True)
class TextConstraint:
    """What the texts of one request must match. field: of the request."""

    field: str
    grammar: str
    checked: Sequence[Grammar]
    """What must be compiled first, and in this order."""

    def named(self, failed: Failed) -> Failed:
        """A failure in the client's words: the engine's field is `grammar`."""
        if failed.param != "grammar":
            return failed
        message = self.field + failed.message.removeprefix("grammar")
        return msgspec.structs.replace(failed, param=self.field, message=message)


def constraint_of(request: CompletionRequest) -> TextConstraint | None:
    """None for a request that asks for nothing. Raises ApiError."""
    wanted, given = request.response_format, request.structured_outputs
    asked = wanted if wanted and wanted.type != "text" else None
    if asked and given:
        message = "response_format: must be left out, or be of type 'text', where structured_outputs is given"
        raise ApiError(400, message, param="response_format")
    try:
        if given:
            return _from_structured_outputs(given)
        if asked:
            field, schema = "response_format", {"type": "object"}
            if asked.json_schema:
                field, schema = "response_format.json_schema.schema", asked.json_schema.schema_
            grammar = from_json_schema(field, schema)
            return TextConstraint("response_format", grammar.text, [grammar])
    except WrongGrammar as error:
        raise refusal(error) from None
    return None


def refusal(error: WrongGrammar) -> ApiError:
    return ApiError(400, str(error), param=error.field, code="invalid_value")


def _from_structured_outputs(given: StructuredOutputs) -> TextConstraint:
    field, checked = "structured_outputs", list[Grammar]()
    if (spaces := given.whitespace_pattern) is not None:
        checked.append(from_regex(f"{field}.whitespace_pattern", spaces))
    if given.regex is not None:
        checked.append(from_regex(f"{field}.regex", given.regex))
    elif given.choice is not None:
        checked.append(from_choices(f"{field}.choice", given.choice))
    elif given.grammar is not None:
        checked.append(from_lark(f"{field}.grammar", given.grammar))
    elif given.json_ is not None:
        checked.append(from_json_schema(f"{field}.json", given.json_, spaces))
    else:
        checked.append(from_json_schema(f"{field}.json_object", {"type": "object"}, spaces))
    return TextConstraint(field, checked[-1].text, checked)


def from_json_schema(field: str, schema: dict[str, Any] | str, spaces: str | None = None) -> Grammar:
    """schema: an object, or its text. spaces: a regular expression of what may stand between tokens; None allows
    nothing. A small model may write spaces for ever; and without spaces most bytes between values are forced, and cost
    no draft. Raises WrongGrammar."""
    try:
        parsed = from_json(schema, allow_inf_nan=False) if isinstance(schema, str) else schema
    except ValueError as error:
        raise WrongGrammar(field, JSON_RULE, schema, f"it is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise WrongGrammar(field, JSON_RULE, schema, "it is no JSON object")
    if _is_deeper(parsed, MAX_DEPTH):
        raise WrongGrammar(field, JSON_RULE, schema, f"it has more than {MAX_DEPTH} levels")
    options: dict[str, Any] = {"whitespace_flexible": False}
    if spaces is not None:
        options = {"whitespace_pattern": spaces}
    # A client's own options, if there are any, could turn checks off.
    text = json.dumps({"grammars": [{"json_schema": parsed | {"x-guidance": options}}]}, ensure_ascii=False)
    return Grammar(field, schema, JSON_RULE, text)


def from_regex(field: str, regex: str) -> Grammar:
    """The whole text must match. Raises WrongGrammar."""
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise WrongGrammar(field, REGEX_RULE, regex, "its last backslash escapes nothing")
    return Grammar(field, regex, REGEX_RULE, LLMatcher.grammar_from_regex(regex))


def from_choices(field: str, choices: list[str]) -> Grammar:
    """The text must be one of them. Raises WrongGrammar."""
    if not 0 < len(choices) <= MAX_CHOICES:
        raise WrongGrammar(field, CHOICE_RULE, choices, f"it has {len(choices)}")
    return Grammar(field, choices, CHOICE_RULE, LLMatcher.grammar_from_regex("|".join(map(_literal, choices))))


def from_lark(field: str, lark: str) -> Grammar:
    """Raises WrongGrammar."""
    # Alone, a text that begins with a brace would be taken for JSON.
    return Grammar(field, lark, LARK_RULE, json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False))


def _literal(text: str) -> str:
    """A regular expression for this text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _is_deeper(value: object, most: int) -> bool:
    level: list[object] = [value]
    for _ in range(most + 1):
        if not level:
            return False
        level = [inner for outer in level for inner in _parts(outer)]
    return True


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()

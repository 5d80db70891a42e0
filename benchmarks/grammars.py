"""Ten grammars as a server makes them of requests, and whether a text matches, by libraries that know none of them."""

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from server.structured import from_choices, from_json_schema, from_lark, from_regex

JSON = r"""(?x)(?&value)(?(DEFINE)
    (?<value> (?&object) | \[ (?: (?&value) (?: , (?&value) )* )? \] | (?&string) | (?&number) | true | false | null )
    (?<object> \{ (?: (?&member) (?: , (?&member) )* )? \} )
    (?<member> (?&string) : (?&value) )
    (?<string> " (?: [^"\\\x00-\x1f] | \\ ["\\/bfnrt] | \\u [0-9a-fA-F]{4} )* " )
    (?<number> -? (?: 0 | [1-9][0-9]* ) (?: \. [0-9]+ )? (?: [eE] [-+]? [0-9]+ )? )
)"""
"""Any JSON without spaces between tokens."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """text: what the engine takes. pattern: a regular expression that every text matches; schema: of its value, if it
    is JSON."""

    text: str
    pattern: str
    schema: Mapping[str, Any] | None = None

    def fault(self, data: bytes, *, is_whole: bool) -> str | None:
        """Why a text does not match; None if it does. is_whole: if not, it must be the beginning of one that does."""
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(data, final=is_whole)
            if not regex.fullmatch(self.pattern, text, partial=not is_whole):
                return f"another library finds no {'match' if is_whole else 'beginning of one'}"
            if is_whole and self.schema is not None:
                checker = Draft202012Validator.FORMAT_CHECKER
                Draft202012Validator(self.schema, format_checker=checker).validate(json.loads(text))
        except (ValueError, ValidationError) as error:
            return str(error).split("\n", 1)[0]
        return None


def of_schema(schema: Mapping[str, Any]) -> Grammar:
    return Grammar(from_json_schema("schema", dict(schema)).text, JSON, schema)


def of_regex(pattern: str) -> Grammar:
    return Grammar(from_regex("regex", pattern).text, pattern)


def of_choices(*choices: str) -> Grammar:
    return Grammar(from_choices("choice", list(choices)).text, "|".join(map(regex.escape, choices)))


def of_lark(lark: str, pattern: str) -> Grammar:
    """pattern: an equivalent regular expression."""
    return Grammar(from_lark("grammar", lark).text, pattern)


GRAMMARS = {
    "any JSON object": of_schema({"type": "object"}),
    "JSON, a person": of_schema(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 130},
                "email_is_verified": {"type": "boolean"},
            },
            "required": ["name", "age", "email_is_verified"],
            "additionalProperties": False,
        }
    ),
    "JSON, an array of colours": of_schema(
        {"type": "array", "items": {"enum": ["red", "grün", "bleu clair", "青"]}, "minItems": 2, "maxItems": 5}
    ),
    "JSON, a place": of_schema(
        {
            "type": "object",
            "properties": {
                "größe": {"type": "number", "exclusiveMinimum": 0, "maximum": 99.5},
                "città": {"enum": ["Ålesund", "Łódź", "København", "京都"]},
                "seit": {"type": "string", "format": "date"},
                "kod": {"type": "string", "pattern": "^[A-ZÄÖ]{2}-[0-9]{3}$"},
            },
            "required": ["größe", "città", "kod"],
            "additionalProperties": False,
        }
    ),
    "JSON, a tree": of_schema(
        {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "anyOf": [
                        {"type": "null"},
                        {
                            "type": "object",
                            "properties": {
                                "left": {"$ref": "#/$defs/node"},
                                "right": {"$ref": "#/$defs/node"},
                                "value": {"type": "integer", "minimum": -9, "maximum": 9},
                            },
                            "required": ["left", "right", "value"],
                            "additionalProperties": False,
                        },
                    ]
                }
            },
        }
    ),
    "regex, a function": of_regex(r"def [a-z_]{1,12}\(self(, [a-z]{1,5}: (int|str|bytes)){0,3}\) -> (None|int|str):"),
    "regex, Cyrillic": of_regex(r"[А-Я]?[а-яё]{2,8}(, [а-яё]{1,8}| — [а-яё]{2,6}){0,3}[.!…]"),
    "choice": of_choices("yes", "yesterday", "no", "naïve", "на", "нано", "そうです", "そうだ", "🙂", "🙃🙂"),
    "Lark, a sum": of_lark(
        'start: term (("+" | "-") term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /0|[1-9][0-9]{0,3}/',
        r"(?<sum>(?<term>0|[1-9][0-9]{0,3}|\((?&sum)\))(?:[-+](?&term))*)",
    ),
    "Lark, settings": of_lark(
        'start: "[настройки]\\n" line{1,4} "¶"\nline: KEY " = " (NUMBER | QUOTED | "включено" | "выключено") "\\n"\n'
        "KEY: /[a-zäöü]{1,8}/\nNUMBER: /[0-9]{1,3}/\nQUOTED: /«[^«»\\n]{0,12}»/",
        r"\[настройки\]\n(?:[a-zäöü]{1,8} = (?:[0-9]{1,3}|«[^«»\n]{0,12}»|включено|выключено)\n){1,4}¶",
    ),
}

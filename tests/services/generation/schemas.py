"""Random JSON schemas of bounded answers, and what an answer has against one."""

import json
import random
from typing import Any

from jsonschema import Draft202012Validator

WORDS = ("name", "age", "city", "tags", "price", "kind", "items", "owner", "date", "size", "note", "ok")
PATTERNS = ("^[a-z]{2,8}$", "^[0-9]{4}-[0-9]{2}$", "^[xy]{1,9}z$")


def random_schema(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    """An object with some required and some optional properties, of all of JSON's types."""
    names = chance.sample(WORDS, chance.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _value(chance, depth) for name in names},
        "required": [name for name in names if chance.random() < 0.7],
        "additionalProperties": False,
    }


def violations(schema: dict[str, Any], text: str) -> list[str]:
    """What is wrong with an answer; nothing where it is JSON of the schema."""
    try:
        answer = json.loads(text)
    except ValueError as error:
        return [str(error)]
    return [error.message for error in Draft202012Validator(schema).iter_errors(answer)]


def _value(chance: random.Random, depth: int) -> dict[str, Any]:
    """Any value; within `depth` it may hold others."""
    lowest = chance.randint(-50, 50)
    plain: list[dict[str, Any]] = [
        {"type": "string", "minLength": chance.randint(0, 3), "maxLength": chance.randint(3, 20)},
        {"type": "string", "pattern": chance.choice(PATTERNS)},
        {"enum": chance.sample(["red", "green", 7, None, True, 'a "quoted" word'], 3)},
        {"type": "integer", "minimum": lowest, "maximum": lowest + chance.randint(0, 1000)},
        {"type": "number", "minimum": lowest, "maximum": lowest + 10, "multipleOf": 0.5},
        {"type": "boolean"},
        {"type": "null"},
        {"const": chance.choice(["fixed", 3, False])},
    ]
    if not depth or chance.random() < 0.7:
        return chance.choice(plain)
    inner = _value(chance, depth - 1)
    return chance.choice(
        [
            {"type": "array", "items": inner, "maxItems": chance.randint(1, 4)},
            random_schema(chance, depth - 1),
            {"anyOf": [inner, {"type": "null"}]},
        ]
    )

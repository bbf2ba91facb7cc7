"""Strict options: every record that a user can write in YAML derives from `Options`.

Strict means: unknown keys are errors that name the closest known key, values are not converted between types
(an int may stand for a float, nothing else), and a record never changes after it was made.
"""

import difflib
import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from llmcompress.errors import RecipeError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class Options(BaseModel):
    """Base of every options record: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def parse(cls, options: Any, where: str) -> Self:
        """Make the record from plain YAML values; `where` is the path of the block in the recipe, for messages.

        Raises RecipeError naming the first bad key, what was found and what is known.
        """
        if not isinstance(options, dict):
            raise RecipeError(f"{where}: expected a mapping of options, found {options!r}")
        try:
            return cls.model_validate(options)
        except ValidationError as exc:
            raise RecipeError(describe(exc, cls, where)) from None


def describe(exc: ValidationError, cls: type[BaseModel], where: str) -> str:
    """The first problem of `exc` in one line: path, what is wrong, what was found, what would be right."""
    problem = exc.errors()[0]
    path = where
    for part in problem["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if problem["type"] == "extra_forbidden":
        known = sorted(known_keys(cls, problem["loc"][:-1]))
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{path}: unknown option{hint} (known: {', '.join(known)})"
    if problem["type"] == "missing":
        return f"{path}: this option is required"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message[0].lower()}{message[1:]} (found {problem['input']!r})"


def known_keys(cls: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """Option names of the record at `path` below `cls`; the record itself for an empty path."""
    for part in path:
        field = cls.model_fields.get(str(part))
        nested = (
            [t for t in _members(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)] if field else []
        )
        if not nested:
            break
        cls = nested[0]
    return set(cls.model_fields)


def _members(annotation: Any) -> list[Any]:
    """A type and, for unions and containers, the types inside it."""
    return [annotation, *(m for a in getattr(annotation, "__args__", ()) for m in _members(a))]


def parse_bytes(text: str) -> int:
    """'6GiB', '500 MB' or '1024' as bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise ValueError("expected a size such as 6GiB or 500MB")
    return int(float(found[1]) * UNITS[found[2].upper()])

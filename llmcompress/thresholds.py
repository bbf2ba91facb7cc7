"""Activation thresholds beside a model: DIR/activation_thresholds.json.

A linear's input x at or below its threshold in size, |x[k]| <= t, counts as zero for that token, so column k of the
weight need not be read. The weights are those of the dense model; who does not know the file computes with all of them.
Layout and rules: docs/formats.md.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import FormatError
from llmcompress.files import write_json

FILE = "activation_thresholds.json"
VERSION = 1
LARGEST = 1e38  # of any number: it is also a float32
LARGEST_FILE = 2**26  # bytes: a hundred for each of half a million linears
MODEL_KEYS = {"version", "method", "sparsity", "dense_tokens", "modules"}


@dataclass(frozen=True, slots=True)
class Threshold:
    """Of one linear."""

    threshold: float  # inputs of at most this size count as zero
    sparsity: float  # share of them on the calibration data
    in_features: int


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Of a model."""

    sparsity: float  # share of the linears' weights that a token does not need, on the calibration data
    dense_tokens: int  # so many at the start of every text use all weights
    modules: Mapping[str, Threshold]  # by module path; linears that are not here use all weights


def write_thresholds(folder: Path, thresholds: Thresholds) -> None:
    """Write the file into the folder of its model."""
    modules = {name: asdict(each) for name, each in thresholds.modules.items()}
    head = {"version": VERSION, "method": "teal", "sparsity": thresholds.sparsity}
    write_json(folder / FILE, head | {"dense_tokens": thresholds.dense_tokens, "modules": modules})


def thresholds_of(folder: Path) -> Thresholds | None:
    """What the file of a folder says; None if it has none. Raises FormatError if it is not what a writer makes."""
    path = folder / FILE
    if not path.is_file():
        return None
    values = parsed(path)
    if (version := values.get("version")) != VERSION or isinstance(version, bool):
        raise FormatError(f"{path}: version {version!r} is not known; this llmcompress reads version {VERSION}")
    if values.keys() != MODEL_KEYS or values["method"] != "teal":
        raise FormatError(f"{path}: expected the keys {sorted(MODEL_KEYS)} with method 'teal', found {sorted(values)}")
    if not isinstance(values["modules"], dict):
        raise FormatError(f"{path}: modules is {type(values['modules']).__name__}, expected an object")
    return Thresholds(
        number(path, "sparsity", values["sparsity"], lambda share: 0 <= share < 1),
        whole(path, "dense_tokens", values["dense_tokens"], at_least=0),
        {name: one_threshold(path, name, each) for name, each in values["modules"].items()},
    )


def parsed(path: Path) -> dict[str, Any]:
    """The JSON object in a file that somebody else may have written."""
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise FormatError(f"{path}: {size} bytes, more than any model needs ({LARGEST_FILE})")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as exc:
        raise FormatError(f"{path}: cannot be read as JSON ({exc})") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different; of equal ones two readers could take either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key appears twice among {sorted(found)[:4]}")
    return found


def one_threshold(path: Path, name: str, values: Any) -> Threshold:
    """The record of one linear."""
    if not isinstance(values, dict) or values.keys() != set(Threshold.__slots__):
        raise FormatError(f"{path}: {name}: expected an object with {', '.join(Threshold.__slots__)}")
    return Threshold(
        number(path, f"{name}.threshold", values["threshold"], lambda size: size >= 0),
        number(path, f"{name}.sparsity", values["sparsity"], lambda share: 0 <= share <= 1),
        whole(path, f"{name}.in_features", values["in_features"], at_least=1),
    )


def number(path: Path, name: str, value: Any, allowed: Callable[[float], bool]) -> float:
    """A finite number in its range."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    if not fits or not allowed(value):
        raise FormatError(f"{path}: {name} is {value!r}, which is not a number in its range")
    return float(value)


def whole(path: Path, name: str, value: Any, *, at_least: int) -> int:
    """A whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < 2**31:
        raise FormatError(f"{path}: {name} is {value!r}, expected a whole number from {at_least} on")
    return value

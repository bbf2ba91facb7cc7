"""Numbers and strings of results.json as text; nothing is computed here but units."""

import math
import re
from typing import Any

from jinja2 import Undefined
from markupsafe import Markup

UNKNOWN = Markup("–")


def show(value: float | None, unit: str) -> Markup:
    """A number of results.json as text; the only way for a number to reach a reader.

    unit: "bytes", "seconds", "count" (whole), "percent" and "points" (from a share), "fixed" (2 decimals), "ratio"
    (3 decimals) or "significant" (3 digits). None is shown as a dash.
    """
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return Markup("not finite")
    if unit == "bytes":
        return show_bytes(value)
    if unit == "seconds":
        return show_seconds(value)
    scale, form = {
        "count": (1, ",.0f"),
        "percent": (100, ".1f"),
        "points": (100, "+.1f"),
        "fixed": (1, ".2f"),
        "ratio": (1, ".3f"),
        "significant": (1, ".3g"),
    }[unit]
    return Markup(f"{scale * value:{form}}{'%' if unit == 'percent' else ''}")


def show_bytes(value: float) -> Markup:
    """Bytes in the largest binary unit that leaves at least 1."""
    for power, name, form in ((30, "GiB", ".2f"), (20, "MiB", ".1f"), (10, "KiB", ".1f")):
        if abs(value) >= 2**power:
            return Markup(f"{value / 2**power:{form}} {name}")
    return Markup(f"{value:.0f} B")


def show_seconds(value: float) -> Markup:
    """Seconds as a person would say them."""
    if value < 59.95:
        return Markup(f"{value:.1f} s")
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return Markup(f"{minutes} min {seconds:02d} s")
    hours, minutes = divmod(round(value / 60), 60)
    return Markup(f"{hours} h {minutes:02d} min")


def spread(score: dict[str, Any] | None, unit: str) -> Markup:
    """A score {"value", "stderr"} with its standard error; a dash if there is none."""
    return UNKNOWN if score is None else plus_minus(score["value"], score["stderr"], unit)


def plus_minus(value: float | None, stderr: float | None, unit: str) -> Markup:
    """`value ± stderr`; the value alone if its error is unknown."""
    if value is None or stderr is None:
        return show(value, unit)
    return Markup(f"{show(value, unit)} ± {show(stderr, unit).removeprefix('+')}")


def one_line(text: object) -> str:
    """`text` with every run of white space and control characters as one space."""
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(text)).strip()


def markdown(value: object) -> str:
    """What the card prints for an expression: Markup as it is, any other string so that Markdown shows it literally."""
    text = printable(value)
    if isinstance(text, Markup | Undefined):
        return str(text)
    # An underscore inside a word is no emphasis; leaving it keeps names like arc_easy readable in the source.
    escaped = re.sub(r"[\\`*\[\]<>&|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))
    return re.sub(r"^(\d*)(?=[+=-]|(?<=\d)[.)](?:\s|$))", r"\1\\", escaped)  # no heading, no item of a list


def printable(value: object) -> str | Undefined:
    """Refuse to print what is not text, so that no number gets past `show`. Raises TypeError."""
    if not isinstance(value, str | Undefined):
        raise TypeError(f"a template prints {value!r} without a unit")
    return value


def fenced(text: str, language: str) -> Markup:
    """A Markdown code block; its fence is longer than any run of backticks in `text`."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")

"""What the measured times say: which targets are met, and the table that is printed."""

from collections.abc import Iterator, Sequence
from typing import Any

from cases import Target, int4_bytes
from layers import SHAPES


def verdict(target: Target, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the worst measured case reaches the target. `met` is None if no such case was measured."""
    ratios = [(result["peers"][target.against]["ratio"], result) for result in results if speaks_of(target, result)]
    found = {"target": target.text(), "wanted": target.at_least, "cases": len(ratios)}
    if not ratios:
        return found | {"met": None, "worst": None, "where": None}
    worst, result = min(ratios, key=lambda pair: pair[0])
    where = f"{result['model']} {result['parts']}, M = {result['tokens']}"
    return found | {"met": worst >= target.at_least, "worst": worst, "where": where}


def speaks_of(target: Target, result: dict[str, Any]) -> bool:
    """Whether the target is about this result, which is of a layer of SHAPES, and its baseline was measured."""
    return (
        result["model"] in {shape.model for shape in SHAPES}
        and result["operator"] == target.operator
        and result["tokens"] in target.tokens
        and int4_bytes(result["rows"], result["columns"]) >= target.int4_bytes
        and "ratio" in result["peers"].get(target.against, {})
    )


def in_words(found: dict[str, Any]) -> str:
    """One line for a verdict."""
    if found["met"] is None:
        return f"not measured  {found['target']}"
    word = "met" if found["met"] else "missed"
    return f"{word:12}  {found['target']}: {found['worst']:.2f}x at worst of {found['cases']} ({found['where']})"


def lines(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table of all results: time, share of copy bandwidth, ratios."""
    if not results:
        return
    peers = sorted({name for result in results for name in result["peers"]})
    yield f"{'operator':22}{'layer':22}{'weight':>14}{'M':>6}{'us':>10}{'of copy':>9}" + "".join(
        f"{name:>14}" for name in peers
    )
    for result in results:
        layer, weight = f"{result['model']} {result['parts']}", f"{result['rows']}x{result['columns']}"
        yield (
            f"{result['operator']:22}{layer:22}{weight:>14}{result['tokens']:>6}{result['seconds'] * 1e6:>10.1f}"
            f"{result['share_of_copy']:>9.0%}" + "".join(f"{ratio(result, name):>14}" for name in peers)
        )


def ratio(result: dict[str, Any], peer: str) -> str:
    """`2.31x`, or `-` where the peer was not measured."""
    found = result["peers"].get(peer, {})
    return f"{found['ratio']:.2f}x" if "ratio" in found else "-"

"""The resource tables on disk, kernels/resources/<operator>.json, and what kernels/README.md shows of them.

A table names the triton that made it and a digest of the sources of the kernels. Compiling everything takes minutes,
comparing digests nothing: a kernel that was changed and not compiled again fails the default tests by its digest.
Tiles, groups and splits are in the name of each row, so the digest is of kernel.py and what that imports, not of
launch.py; comments, docstrings and blank lines are left out of it.
"""

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1]
PACKAGE = KERNELS / "torch-ext/llmcompress_kernels"
TABLES = KERNELS / "resources"
README = KERNELS / "README.md"
BEGIN, END = "<!-- resources: begin -->\n", "<!-- resources: end -->\n"

Rows = dict[str, dict[str, Any]]  # name of a case to its facts

SHOWN = {  # heading to the fact, and which of all values of a kernel is the worst
    "registers": ("registers", max),
    "spills": ("spills", max),
    "shared memory, bytes": ("shared_bytes", max),
    "128-bit loads": ("weight_loads_128", min),
    "narrower": ("weight_loads_narrow", max),
    "conversions": ("conversions", max),
    "tensor-core instructions": ("tensor_core", min),
}


# sources


def sources(operator: str) -> list[Path]:
    """kernel.py of an operator and every file of this package that it imports, directly or not."""
    found, left = set(), [PACKAGE / operator / "kernel.py"]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left.extend(imported(path))
    return sorted(found)


def imported(path: Path) -> Iterator[Path]:
    """The files that one imports relatively."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            yield path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")


def digest(operator: str) -> str:
    """Of the code of all its sources."""
    found = hashlib.sha256()
    for path in sources(operator):
        found.update(f"{path.relative_to(PACKAGE).as_posix()}\n{code_of(path.read_text(encoding='utf-8'))}\n".encode())
    return found.hexdigest()[:16]


def code_of(text: str) -> str:
    """Python source without comments, docstrings and blank lines, which machine code does not depend on."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            for at in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[at] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


# tables


def recorded(operator: str) -> dict[str, Any] | None:
    """A table as it was written, or None: `triton`, `sources` and, by names of cases, `kernels`."""
    path = TABLES / f"{operator}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(operator: str, rows: Rows) -> None:
    """One line per configuration, so that a change reads as a change."""
    import triton

    body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    head = f'"triton": {json.dumps(triton.__version__)}, "sources": {json.dumps(digest(operator))}'
    TABLES.mkdir(exist_ok=True)
    (TABLES / f"{operator}.json").write_text(f'{{{head}, "kernels": {{\n{body}\n}}}}\n', encoding="utf-8")


def still_true(operator: str) -> Rows:
    """The rows of a table of this triton and of the kernels as they are now; none of any other table."""
    import triton

    found = recorded(operator)
    same = found is not None and (found["triton"], found["sources"]) == (triton.__version__, digest(operator))
    return found["kernels"] if found is not None and same else {}


def differences(operator: str, rows: Rows, names: set[str]) -> list[str]:
    """One line for every case whose facts are others than those in the table, or that only one of the two has.

    rows: facts of cases; names: of all cases.
    """
    import triton

    found = recorded(operator)
    if found is None:
        return [f"{operator}: no {TABLES / f'{operator}.json'}"]
    expected = found["kernels"]
    made_by = f"table of triton {found['triton']}, compiled by {triton.__version__}"
    changed = [f"{n}: {expected[n]} -> {row} ({made_by})" for n, row in rows.items() if expected.get(n, row) != row]
    missing = [f"{n}: not in the table" for n in sorted(names - expected.keys())]
    return [*changed, *missing, *(f"{n}: no such configuration" for n in sorted(expected.keys() - names))]


# what the README shows


def shown() -> Iterator[str]:
    """Markdown: one row per operator and kernel, with the worst of all its configurations on all architectures."""
    yield f"| operator | kernel | compiled | {' | '.join(SHOWN)} |\n"
    yield f"|---|---|{'---:|' * (1 + len(SHOWN))}\n"
    for path in sorted(TABLES.glob("*.json")):
        kernels: dict[str, list[dict[str, Any]]] = {}
        for name, row in json.loads(path.read_text(encoding="utf-8"))["kernels"].items():
            kernels.setdefault(name.split()[0], []).append(row)
        for kernel, rows in sorted(kernels.items()):
            worst = [str(choose(row[fact] for row in rows)) for fact, choose in SHOWN.values()]
            yield f"| `{path.stem}` | `{kernel}` | {len(rows)} | {' | '.join(worst)} |\n"


def with_tables(text: str) -> str:
    """The README with today's tables between its markers; raises ValueError if it has none."""
    return between(text, BEGIN, END, "".join(shown()))


def between(text: str, begin: str, end: str, new: str) -> str:
    """The README with something new between two lines; raises ValueError if it does not have them."""
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{README} has no line {begin.strip()} followed by a line {end.strip()}")
    return head + begin + new + end + tail


def write_readme() -> None:
    """Put the tables of today into kernels/README.md."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")

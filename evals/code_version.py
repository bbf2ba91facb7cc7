"""Which code a measurement was made with: a fingerprint of what the steps of a recipe compute with.

Counted are the module of each step's options, what carries out steps of its kind, and the modules that these import
from their own package or from the tensor level; comments, docstrings and layout are not. So a word that is changed in
a docstring, or a new command, leaves a measurement as it is, and a changed formula does not.
"""

import ast
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TENSORS = ("budget", "grid", "histogram", "mask", "stats", "weight")  # that all packages compute with
CARRIED_OUT_BY = {
    "train": ("llmcompress.training.loop", "llmcompress.training.objective", "llmcompress.training_job"),
    "method": ("llmcompress.compress",),
    "structure": ("llmcompress.structure_job", "llmcompress.hidden_job"),
    "runtime": ("llmcompress.runtime_job", "llmcompress.teal"),
}


def code_version(values: Mapping[str, Any]) -> str:
    """Of a recipe, or of a KV cache that is measured by `continuation.py`."""
    if "cache" in values:
        policy = f"llmcompress.eviction.{values['cache']}"
        return combined("evals.continuation", *([policy] if file_of(policy).is_file() else []))
    return combined(*(module for step in values["steps"] for module in modules_of(step)))


def modules_of(step: Mapping[str, Any]) -> list[str]:
    """Where the computation of a step begins."""
    from llmcompress.at_runtime import RUNTIMES
    from llmcompress.methods import METHODS
    from llmcompress.structure import STRUCTURES
    from llmcompress.training import TRAININGS

    tables: dict[str, Mapping[str, type]] = {"train": TRAININGS, "method": METHODS, "runtime": RUNTIMES}
    kind = next(kind for kind in CARRIED_OUT_BY if kind in step)
    options = (tables | {"structure": STRUCTURES})[kind][step[kind]]
    return [options.__module__, *CARRIED_OUT_BY[kind]]


def combined(*modules: str) -> str:
    """One fingerprint of modules and of what they import."""
    texts = [meaning(each) for each in sorted({each for module in modules for each in with_imports(module)})]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def with_imports(module: str) -> set[str]:
    """A module, and those that it imports, however far away, from its own package or from the tensor level."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in imports(name) if near(name, other)]
    return found


def near(module: str, other: str) -> bool:
    """Whether a module's meaning depends on one that it imports."""
    package, inside = ".".join(module.split(".")[:2]), other.split(".")
    same = len(inside) > 2 and module.count(".") > 1 and ".".join(inside[:2]) == package
    return same or inside[1] in TENSORS


@lru_cache
def imports(module: str) -> tuple[str, ...]:
    """The project's modules that one imports anywhere in its text."""
    found = []
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmcompress."):
            assert node.module is not None
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in inside if file_of(name).is_file()] or [node.module]
    return tuple(found)


@lru_cache
def meaning(module: str) -> str:
    """A module's text without comments, docstrings and layout."""
    tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return f"{module}\n{ast.unparse(tree)}"


def file_of(module: str) -> Path:
    """Of a module, or of a package's own text."""
    place = ROOT.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")

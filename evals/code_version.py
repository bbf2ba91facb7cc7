"""Which code a measurement was made with: a fingerprint of what the steps of a recipe compute with.

Counted are the module of each step's options and of its score, what carries out steps of its kind, what every trial
does (texts, the first weights, perplexity), and what these import of the modules that compute; further the config of
tiny-llama and the texts of the suite. Comments, docstrings and layout are not. So a word that is changed in a
docstring, or a new command, leaves a measurement as it is, and a changed formula does not. A registry is not followed:
it names all techniques, and a change of one is to leave the rows of the others.
"""

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "evals/suites/tiny.yaml"
COMPUTE = {  # modules and packages below `llmcompress` whose text decides results, wherever they are imported
    "arch", "assignment", "at_runtime", "budget", "building", "calibrate", "depth_plan", "eviction", "gradients",
    "grid", "hidden_plan", "histogram", "mask", "methods", "perplexity", "stats", "stream", "structure",
    "structure_budget", "teal", "text", "training", "weight", "width_plan",
}  # fmt: skip
REGISTRIES = {"at_runtime", "eviction", "methods", "structure", "structure.scores", "training", "training.techniques"}
EVERY = ("llmcompress.calibrate", "llmcompress.new_model", "llmcompress.perplexity")
CARRIED_OUT_BY = {
    "train": ("llmcompress.training.loop", "llmcompress.training.objective", "llmcompress.training_job"),
    "method": ("llmcompress.assignment", "llmcompress.compress", "llmcompress.survey"),
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
    score = [score_of(step)] if "score" in step else []
    return [options.__module__, *score, *CARRIED_OUT_BY[kind]]


def score_of(step: Mapping[str, Any]) -> str:
    """The module of a structure step's score."""
    from llmcompress.structure.scores import BLOCK_SCORES, CHANNEL_SCORES, UNIT_SCORES

    tables: dict[str, Mapping[str, type]] = {"block": BLOCK_SCORES, "hidden": CHANNEL_SCORES}
    score = step["score"]
    name = score if isinstance(score, str) else score["method"]
    return tables.get(step["structure"], UNIT_SCORES)[name].__module__


def combined(*modules: str) -> str:
    """One fingerprint of modules, of what they import, and of what every trial has in common."""
    reached = {each for module in (*modules, *EVERY) for each in with_imports(module)}
    texts = [meaning(each) for each in sorted(reached)]
    return hashlib.sha256("\n".join([*texts, common()]).encode()).hexdigest()


def common() -> str:
    """What all trials begin with and are scored on: the config of tiny-llama, and the suite without its comments."""
    from llmcompress.catalog import TINY_LLAMA

    suite = yaml.safe_load(SUITE.read_text(encoding="utf-8"))
    return json.dumps([TINY_LLAMA, suite], sort_keys=True)


def with_imports(module: str) -> set[str]:
    """A module, and those that it imports, however far away, as far as they compute."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in imports(name) if decides(other)]
    return found


def decides(module: str) -> bool:
    """Whether the meaning of what imports a module depends on it."""
    inside = module.removeprefix("llmcompress.")
    return inside.split(".")[0] in COMPUTE and inside not in REGISTRIES


@lru_cache
def imports(module: str) -> tuple[str, ...]:
    """The project's modules that one imports anywhere in its text."""
    found = []
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llmcompress":
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

"""A suite: what to score, in YAML, with a version so that two results can be told apart.

    name: quick
    version: 1
    dtype: float32                 # perplexity and divergence
    task_dtype: bfloat16           # lm-eval tasks
    perplexity:
      - {name: boolq-heldout, source: boolq-heldout, length: 512, windows: 24}
    divergence: {text: boolq-heldout, windows: 8}
    tasks:
      - {name: arc_easy, task: arc_easy_offline, metric: acc, chance: 0.25, limit: 100}

A suite holds data only. `version` goes up whenever a score under the same name would mean something else.
"""

import sys
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

import llmcompress
from llmcompress.calibrate import DataSource
from llmcompress.errors import EvaluationError
from llmcompress.options import Options

Dtype = Literal["float32", "bfloat16", "float16"]


class TextEntry(Options):
    """Perplexity of the first `windows` windows of `length` tokens of a text."""

    name: str
    source: DataSource  # or just its `data`: a path, a Hub dataset, a listed name
    length: int = Field(default=512, ge=2)  # tokens per window
    windows: int | None = Field(default=None, ge=1)  # None: the whole text

    @field_validator("source", mode="before")
    @classmethod
    def short(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, str) else value


class Divergence(Options):
    """KL to the base model, on the first `windows` windows of one of the perplexity texts."""

    text: str
    windows: int | None = Field(default=None, ge=1)  # None: as many as the perplexity takes


class TaskEntry(Options):
    """One lm-eval task."""

    name: str  # how results call it
    task: str  # lm-eval's name, an offline name, or a task YAML file
    metric: str | None = None  # None: acc, or the task's first metric
    chance: float | None = Field(default=None, ge=0, lt=1)  # score of a guess; None: unknown, so no recovery
    limit: int | None = Field(default=None, ge=1)  # items, evenly spaced over the task; None: all
    fewshot: int | None = Field(default=None, ge=0)  # None: the task's own default


class Suite(Options):
    """Everything that decides a score, and nothing about the models."""

    name: str
    version: int
    dtype: Dtype = "float32"  # of perplexity and divergence
    task_dtype: Dtype | None = None  # of tasks; None: `dtype`
    batch_size: int = Field(default=8, ge=1)  # sequences per forward pass
    perplexity: list[TextEntry] = Field(default=[])
    divergence: Divergence | None = None
    tasks: list[TaskEntry] = Field(default=[])

    @model_validator(mode="after")
    def consistent(self) -> Self:
        """Names are unique, and the divergence names a text that is there."""
        for kind in (self.perplexity, self.tasks):
            names = [entry.name for entry in kind]
            if len(set(names)) < len(names):
                raise ValueError(f"every name may appear once, found {', '.join(names)}")
        texts = [entry.name for entry in self.perplexity]
        if self.divergence and self.divergence.text not in texts:
            raise ValueError(f"divergence.text must name a perplexity text, one of: {', '.join(texts) or 'none'}")
        return self


def suite_paths() -> dict[str, Path]:
    """The suites that ship with the package, by name: from the source tree, else from the installed data files."""
    tree = Path(llmcompress.__file__).parent.parent / "evals" / "suites"
    folder = tree if tree.is_dir() else Path(sys.prefix) / "share" / "llmcompress" / "suites"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_suite(name: str | Path) -> Suite:
    """A suite by its name or by the path of a YAML file.

    Raises EvaluationError if there is none, RecipeError if its content is wrong.
    """
    known = suite_paths()
    path = known.get(str(name), Path(name))
    if not path.is_file():
        raise EvaluationError(f"suite {str(name)!r}: no such suite or file (known: {', '.join(known) or 'none'})")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise EvaluationError(f"{path}: not readable as YAML: {exc}") from None
    return Suite.parse(options, str(path))


def suite_from_options(
    suite: str | Path | None = None,
    tasks: list[str] | None = None,
    text: str | Path | None = None,
    length: int | None = None,
    windows: int | None = None,
    limit: int | None = None,
) -> Suite:
    """The suite that command-line options ask for, starting from `suite` (default: quick).

    tasks: names from the suite, offline names or lm-eval names; they replace the suite's tasks.
    text: a file, dataset or listed name, scored in place of the suite's texts.
    Either one given without `suite` drops what the other one would have replaced: `--text FILE` runs no tasks.
    length, windows: tokens per window and number of windows of every text.  limit: items of every task.
    """
    start = load_suite(suite or "quick")
    changes: dict[str, Any] = {}
    if tasks is not None:
        listed = {entry.name: entry for entry in start.tasks}
        changes["tasks"] = [listed.get(task) or TaskEntry(name=task, task=task) for task in tasks]
        if suite is None and text is None:
            changes |= {"perplexity": [], "divergence": None}
    if text is not None:
        name = Path(text).name
        changes["perplexity"] = [TextEntry.parse({"name": name, "source": str(text)}, "evaluation options")]
        changes["divergence"] = Divergence(text=name)
        if suite is None and tasks is None:
            changes["tasks"] = []
    changed = start.model_copy(update=changes)
    return _resized(changed, length, windows, limit) if (changes or length or windows or limit) else start


def _resized(suite: Suite, length: int | None, windows: int | None, limit: int | None) -> Suite:
    """The suite under a name of its own, with sizes replaced where one is given."""
    plain = suite.model_dump(exclude_unset=True)  # a default must not look as if it had been asked for
    for entry in plain.get("perplexity", []):
        entry |= {key: value for key, value in (("length", length), ("windows", windows)) if value is not None}
    if plain.get("divergence") and windows is not None:
        plain["divergence"]["windows"] = windows
    for entry in plain.get("tasks", []) if limit is not None else ():
        entry["limit"] = limit
    return Suite.parse(plain | {"name": "custom"}, "evaluation options")

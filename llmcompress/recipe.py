"""The recipe: what to do, in YAML. Strict, frozen, and known by its fingerprint.

    model: smollm2-135m
    calibration: {data: boolq-calibration, samples: 128, length: 512}
    steps:
      - method: gptq
        bits: 4
        group_size: 64
    output: {format: pack-quantized}

A step names a `method` for single weights, a `structure` whose units go, how to `train` (recovery, or a technique), or
what is left out at `runtime`. Its other options, but for `targets`, are the fields of that record (`llmcompress list
methods`, `list structures`, `list trainings`, `list runtimes`).

Consecutive method steps are one stage, in which every block is loaded once; any other step is a stage of its own, whose
result is the model that the next stage starts from.
"""

import difflib
import fnmatch
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

import llmcompress
from llmcompress.at_runtime import RUNTIMES, Runtime
from llmcompress.calibrate import CalibrationOptions
from llmcompress.errors import RecipeError
from llmcompress.formats import FORMATS
from llmcompress.methods import METHODS, IntMethod, Method
from llmcompress.options import Options, parse_bytes
from llmcompress.structure import STRUCTURES, Structure
from llmcompress.training import TRAININGS, Train


class Output(Options):
    """How the result is stored."""

    format: str = "auto"  # a key of FORMATS; "auto": the smallest that stock engines load

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "auto" and value not in FORMATS:
            raise ValueError(f"unknown format; known: auto, {', '.join(FORMATS)}")
        return value


class Evaluate(Options):
    """Scores taken on the reloaded checkpoint and on the base model."""

    suite: str = "quick"  # a name from `list suites`, or the path of a suite's YAML file


class Publish(Options):
    """Where the finished folder goes."""

    repo_id: str
    private: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """One method and the linears it is for."""

    method: Method
    name: str  # its key in METHODS
    where: str  # path in the recipe, for messages
    targets: tuple[str, ...] = ("*",)  # globs on module names

    def matches(self, module: str) -> bool:
        """Whether the step is for the linear at this module path."""
        return matches(module, self.targets)


@dataclass(frozen=True, slots=True)
class StructureStep:
    """Units that go from the whole model."""

    options: Structure
    name: str  # its key in STRUCTURES
    where: str  # path in the recipe, for messages


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Learning, with the whole model."""

    options: Train
    name: str  # its key in TRAININGS
    where: str  # path in the recipe, for messages


@dataclass(frozen=True, slots=True)
class RuntimeStep:
    """What the finished model leaves out while it computes."""

    options: Runtime
    name: str  # its key in RUNTIMES
    where: str  # path in the recipe, for messages


AnyStep = Step | StructureStep | TrainStep | RuntimeStep


class Recipe(Options):
    """The whole recipe, as plain values; `parsed_steps` are its steps as records."""

    model: str
    revision: str | None = None  # of a Hub model; resolved to a commit in the manifest
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: str = "auto"  # cuda when there is one, else cpu
    max_memory: int | None = Field(None, gt=0)  # bytes of host memory the run may use; written as 8GiB
    trust_remote_code: bool = False
    calibration: CalibrationOptions | None = None
    steps: list[dict[str, Any]] = Field(min_length=1)
    keep: list[str] = ["lm_head"]  # globs on module names left alone on purpose
    output: Output = Output()
    evaluate: Evaluate | None = None
    publish: Publish | None = None

    @field_validator("max_memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    def parsed_steps(self) -> list[AnyStep]:
        """Every step with its options checked. Raises RecipeError with the path of the first bad key."""
        return [parse_step(step, f"steps[{i}]") for i, step in enumerate(self.steps)]

    def stages(self) -> list["Stage"]:
        """The recipe as a chain, each link of method steps alone or of one step of another kind.

        All but the last give a dense model, unless only steps that leave weights alone follow one that quantizes: they
        start from packed weights and leave them so. Only the last is published. A recipe of method steps is one stage.
        """
        runs: list[list[AnyStep]] = []
        for step in self.parsed_steps():
            if runs and isinstance(step, Step) and isinstance(runs[-1][0], Step):
                runs[-1].append(step)
            else:
                runs.append([step])
        stages, first = [], 0
        for number, steps in enumerate(runs):
            changes: dict[str, Any] = {"steps": self.steps[first : first + len(steps)]}
            if later := runs[number + 1 :]:
                packed = quantize(steps) and all(isinstance(run[0], TrainStep | RuntimeStep) for run in later)
                changes |= {"publish": None} | ({} if packed else {"output": Output(format="dense")})
            stages.append(Stage(self if len(runs) == 1 else self.model_copy(update=changes), steps))
            first += len(steps)
        return stages

    def plain(self) -> dict[str, Any]:
        """The recipe as values that YAML and JSON hold, without what was left at its default."""
        return self.model_dump(mode="json", exclude_unset=True)


def quantize(steps: Iterable[AnyStep]) -> bool:
    """Whether one of the steps puts weights on an integer grid."""
    return any(isinstance(step, Step) and isinstance(step.method, IntMethod) for step in steps)


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps that are carried out in one go, as a recipe of their own."""

    recipe: Recipe
    steps: list[AnyStep]  # one, or method steps


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe; `overrides` maps dotted keys ("calibration.samples", "steps.0.bits") to values."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise RecipeError(f"{path}: the recipe cannot be read ({exc}); see `llmcompress list recipes`") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a mapping with `model` and `steps`, found {type(values).__name__}")
    for key, value in (overrides or {}).items():
        override(values, key, value)
    try:
        return parse_recipe(values)
    except RecipeError as exc:
        exc.add_note(f"recipe: {path}")
        raise


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Check plain values, the methods' options included."""
    recipe = Recipe.parse(values, "")
    recipe.parsed_steps()
    return recipe


def parse_step(values: dict[str, Any], where: str) -> AnyStep:
    """One step from its plain values."""
    options = dict(values)
    kinds = [kind for kind in ("method", "structure", "train", "runtime") if kind in options]
    if len(kinds) > 1:
        raise RecipeError(f"{where}: has both `{kinds[0]}` and `{kinds[1]}`; make two steps of it")
    if "structure" in options:
        found, name = known_kind(options, "structure", STRUCTURES, where)
        return StructureStep(found.parse(options, where), name, where)
    if "train" in options:
        found, name = known_kind(options, "train", TRAININGS, where)
        return TrainStep(found.parse(options, where), name, where)
    if "runtime" in options:
        found, name = known_kind(options, "runtime", RUNTIMES, where)
        return RuntimeStep(found.parse(options, where), name, where)
    name = options.pop("method", None)
    if not isinstance(name, str) or name not in METHODS:
        close = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"{where}.method: unknown method {name!r}{hint} (known: {', '.join(METHODS)})")
    targets = options.pop("targets", ["*"])
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise RecipeError(f"{where}.targets: expected a list of globs on module names, found {targets!r}")
    unknown = set(options) - set(METHODS[name].model_fields)
    if close := [c for u in unknown for c in difflib.get_close_matches(u, ["targets", "method"], n=1)]:
        raise RecipeError(f"{where}.{min(unknown)}: unknown option; did you mean {close[0]!r}?")
    return Step(METHODS[name].parse(options, where), name, where, tuple(targets))


def known_kind(options: dict[str, Any], kind: str, table: dict[str, Any], where: str) -> tuple[Any, str]:
    """The record in `table` that options[kind] names, and the name, which is taken out of the options."""
    name = options.pop(kind)
    if not isinstance(name, str) or name not in table:
        close = difflib.get_close_matches(str(name), table, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"{where}.{kind}: unknown {kind} {name!r}{hint} (known: {', '.join(table)})")
    return table[name], name


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in nested plain values, making mappings on the way; list items go by number."""
    place: Any = values
    *path, last = key.split(".")
    for part in path:
        place = place[list_index(place, part, key)] if isinstance(place, list) else place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise RecipeError(f"--set {key}: {part!r} holds {place!r}, which has no options below it")
    if isinstance(place, list):
        place[list_index(place, last, key)] = value
    else:
        place[last] = value


def list_index(values: list[Any], part: str, key: str) -> int:
    """The item that `part` of a dotted key names."""
    if not part.isdigit() or int(part) >= len(values):
        raise RecipeError(f"--set {key}: {part!r} is not an item of a list of {len(values)} (the first is 0)")
    return int(part)


def recipe_paths() -> dict[str, Path]:
    """The recipes that ship with the package, by name ("smollm2-135m/w4a16-gptq")."""
    tree = Path(llmcompress.__file__).parent.parent / "recipes"
    folder = tree if tree.is_dir() else Path(sys.prefix) / "share" / "llmcompress" / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def default_output(recipe: Recipe, path: Path) -> Path:
    """Where a run writes when nobody says: outputs/<model>-<recipe>."""
    return Path("outputs") / f"{Path(recipe.model).name.removesuffix('.gguf')}-{path.stem}"


def matches(module: str, globs: tuple[str, ...] | list[str]) -> bool:
    """Whether a module path matches one of the globs; a glob without a dot also matches the last part alone."""
    leaf = module.rpartition(".")[2]
    return any(fnmatch.fnmatchcase(module, g) or ("." not in g and fnmatch.fnmatchcase(leaf, g)) for g in globs)

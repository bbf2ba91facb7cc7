"""The plan: what a recipe does to each tensor, and what it will cost, before a weight is read.

Made from config.json and the tensor index alone, so it is quick and can be made for a model that is not downloaded.
It refuses what cannot work (groups that do not divide, targets that match nothing, too little memory or disk) and
predicts output size, peak memory, disk and time. The run reports what it measured beside these numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from llmcompress.assignment import assign, earlier_patterns, kind_after, methods_by_linear, needs_data
from llmcompress.cost import Cost
from llmcompress.errors import PlanError
from llmcompress.formats import FORMATS, OWN, Format
from llmcompress.layout import CONV1D_MODELS, block_index, block_linears, find_block_path, is_expert, refuse_experts
from llmcompress.lazy import torch
from llmcompress.machine import device_of
from llmcompress.method_cost import predict
from llmcompress.methods import Budgeted, Method
from llmcompress.recipe import Recipe, Step, matches
from llmcompress.safetensors_file import TensorInfo
from llmcompress.source import ModelSource
from llmcompress.weight import Kind

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a number in each dtype of a recipe
DENSE_EXPERTS = "stock transformers takes the experts of a packed checkpoint for packed, and these are kept dense"


@dataclass(frozen=True, slots=True)
class PlannedLinear:
    """What happens to one linear of a decoder block."""

    name: str  # module path, as in the checkpoint
    block: int
    shape: tuple[int, int]  # [out, in]
    steps: tuple[int, ...]  # indices into the recipe's steps, in order; empty: left alone
    methods: tuple[Method, ...]  # of these steps, with what a budget gives to this linear
    earlier: Kind | None  # an earlier run has pruned it so: what is zero stays zero
    before_bytes: int  # dense, in the recipe's dtype
    after_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe that fits a model."""

    recipe: Recipe
    source: ModelSource
    steps: list[Step]
    format_name: str
    blocks: str  # path of the decoder blocks in the checkpoint, such as "model.layers"
    count: int  # of blocks
    transposed: bool
    linears: list[PlannedLinear]
    kept: dict[str, str]  # linears left alone -> why
    notes: list[str]
    before_bytes: int
    predicted: Cost

    @property
    def format(self) -> Format:
        """How compressed weights are stored."""
        return FORMATS[self.format_name]

    @property
    def dtype(self) -> "torch.dtype":
        """Of everything that is not packed."""
        dtype: torch.dtype = getattr(torch, self.recipe.dtype)
        return dtype

    @property
    def itemsize(self) -> int:
        """Bytes of a number in that dtype."""
        return ITEMSIZE[self.recipe.dtype]

    @property
    def device(self) -> "torch.device":
        """Where blocks are computed."""
        return torch.device(device_of(self.recipe))

    @property
    def on_cpu(self) -> bool:
        """Whether that is the CPU."""
        return device_of(self.recipe) == "cpu"

    @property
    def needs_data(self) -> bool:
        """Whether anything is gathered from calibration data."""
        return any(needs_data(step.method) for step in self.steps)

    @property
    def advice(self) -> str:
        """How to need less memory."""
        return "use fewer calibration samples or shorter ones"

    @property
    def roundings(self) -> int:
        """How often the result rounds otherwise than the stream, for each addition to the hidden states."""
        return 1

    @property
    def result(self) -> ModelSource:
        """The model that the plan leaves, as far as it is known: shapes, and what is pruned; nothing is packed yet."""
        masks = {x.name: kind_after(x.methods, x.earlier) for x in self.linears if x.methods}
        pruned = {name: (str(kind.pattern), kind.sparsity) for name, kind in masks.items() if kind.pattern}
        return replace(self.source, pruned=self.source.pruned | pruned)

    @property
    def survey(self) -> list[str]:
        """The walks over the dense model that come first; see `survey.py`."""
        return sorted({walk for step in self.steps for walk in step.method.survey})

    def budgeted(self, step: int) -> list[PlannedLinear]:
        """The linears among which the budget of a step is spread: all of its own but those with `overrides`."""
        method = self.steps[step].method
        apart = list(method.overrides) if isinstance(method, Budgeted) else []
        return [linear for linear in self.linears if step in linear.steps and not matches(linear.name, apart)]

    def with_sparsities(self, sparsities: Mapping[str, float]) -> "Plan":
        """The plan in which these linears are pruned to sparsities of their own."""

        def updated(linear: PlannedLinear) -> PlannedLinear:
            share = {"sparsity": sparsities[linear.name]}
            methods = tuple(m.model_copy(update=share) if m.prunes else m for m in linear.methods)
            return replace(linear, methods=methods)

        return replace(self, linears=[updated(x) if x.name in sparsities else x for x in self.linears])

    def methods_of(self, linear: str) -> dict[int, Method]:
        """Index of a step -> its method for the linear at this module path, in order."""
        found = next((planned for planned in self.linears if planned.name == linear), None)
        return {} if found is None else dict(zip(found.steps, found.methods, strict=True))

    def kind_of(self, linear: str) -> Kind:
        """What the linear at this module path becomes."""
        planned = next((planned for planned in self.linears if planned.name == linear), None)
        return Kind() if planned is None else kind_after(planned.methods, planned.earlier)

    def tensors_of(self, block: int | None) -> list[TensorInfo]:
        """Checkpoint tensors of one block, or with None those outside all blocks, in stored order."""
        prefix = f"{self.blocks}."

        def index(name: str) -> int | None:
            return int(name[len(prefix) :].split(".", 1)[0]) if name.startswith(prefix) else None

        return [info for info in self.source.tensors.values() if index(info.name) == block]

    def plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "format": self.format_name,
            "before_bytes": self.before_bytes,
            "predicted": asdict(self.predicted),
            "linears": [
                plain_linear(linear) | {"methods": [self.steps[i].name for i in linear.steps]}
                for linear in self.linears
            ],
            "kept": self.kept,
            "notes": self.notes,
        }


def make_plan(recipe: Recipe, source: ModelSource, steps: list[Step] | None = None) -> Plan:
    """Fit method steps to a model. Raises PlanError with the first thing that does not fit and what would.

    steps: those of the recipe, if they are not known yet; none may be of another kind.
    """
    if steps is None:
        steps = method_steps(recipe)
    if source.needs_remote_code and not recipe.trust_remote_code:
        raise PlanError(
            f"{source.name}: its config.json asks for Python code from the repository (auto_map), which is not run; "
            "read that code, then set `trust_remote_code: true` in the recipe if you trust it"
        )
    if recipe.calibration is None and (needing := [step.name for step in steps if needs_data(step.method)]):
        raise PlanError(
            f"steps: method {needing[0]!r} needs `calibration` data; add that block, or use a data-free method"
        )
    device_of(recipe)
    if recipe.calibration:
        check_length(recipe.calibration.length, source)
    blocks, count = find_block_path(source)
    transposed = source.config.get("model_type") in CONV1D_MODELS
    names = block_linears(source, blocks, transposed)
    refuse_experts(source, blocks, recipe.keep)
    assigned = assign(names, steps, recipe.keep)
    experts = any(is_expert(name) for name in source.tensors)
    methods = methods_by_linear(steps, assigned, names)
    earlier = earlier_patterns(source.pruned, steps, assigned)
    kinds = {name: kind_after(mine, earlier.get(name)) for name, mine in methods.items()}
    format_name = choose_format(recipe, kinds, names, transposed, experts)
    itemsize = ITEMSIZE[recipe.dtype]
    linears = []
    for name, shape in names.items():
        after = dense = shape[0] * shape[1] * itemsize
        if name in kinds:
            after = FORMATS[format_name].stored_bytes(kinds[name], shape, itemsize)
        block = block_index(name, blocks)
        mine = (assigned[name], methods.get(name, ()), earlier.get(name))
        linears.append(PlannedLinear(name, block, shape, *mine, dense, after))
    plan = Plan(
        recipe,
        source,
        steps,
        format_name,
        blocks,
        count,
        transposed,
        linears,
        kept=kept_linears(names, assigned, source, recipe, blocks),
        notes=notes(source, format_name, kinds, names, transposed, experts),
        before_bytes=sum(prod(info.shape) for info in source.tensors.values()) * itemsize,
        predicted=Cost(0, 0, 0, 0, 0.0),
    )
    return replace(plan, predicted=predict(plan))


def dense_plan(recipe: Recipe, source: ModelSource) -> Plan:
    """A plan that leaves every tensor as it is, for stages without methods to build on."""
    if source.needs_remote_code:
        raise PlanError(
            f"{source.name}: its config.json asks for Python code from the repository (auto_map); only method steps "
            "take such a model"
        )
    if recipe.calibration:
        check_length(recipe.calibration.length, source)
    device_of(recipe)
    blocks, count = find_block_path(source)
    itemsize = ITEMSIZE[recipe.dtype]
    transposed = source.config.get("model_type") in CONV1D_MODELS
    linears = [
        PlannedLinear(name, block_index(name, blocks), shape, (), (), None, size, size)
        for name, shape in block_linears(source, blocks, transposed).items()
        for size in [shape[0] * shape[1] * itemsize]
    ]
    check_keep(recipe.keep, [*source.tensors, *(name.removesuffix(".weight") for name in source.tensors)], source)
    before = sum(prod(info.shape) for info in source.tensors.values()) * itemsize
    unknown = Cost(0, 0, 0, 0, 0.0)
    return Plan(recipe, source, [], "dense", blocks, count, transposed, linears, {}, [], before, unknown)


def method_steps(recipe: Recipe) -> list[Step]:
    """The steps of a recipe that has no others."""
    steps = [step for step in recipe.parsed_steps() if isinstance(step, Step)]
    if len(steps) < len(recipe.steps):
        raise ValueError("a recipe with other than method steps is planned stage by stage, see stages.py")
    return steps


def check_length(length: int, source: ModelSource, where: str = "calibration") -> None:
    """Samples must not be longer than the positions that the model knows."""
    limit = source.config.get("max_position_embeddings", source.config.get("n_positions"))
    if isinstance(limit, int) and length > limit:
        raise PlanError(
            f"{where}.length: {length} tokens, but {source.name} knows {limit} positions; use at most {limit}"
        )


def plain_linear(linear: PlannedLinear) -> dict[str, Any]:
    """For `--json`."""
    return {
        "name": linear.name,
        "block": linear.block,
        "shape": linear.shape,
        "sparsity": next((method.share for method in linear.methods if method.prunes), None),
        "before_bytes": linear.before_bytes,
        "after_bytes": linear.after_bytes,
    }


def choose_format(
    recipe: Recipe,
    kinds: dict[str, Kind],
    names: dict[str, tuple[int, int]],
    transposed: bool,
    experts: bool,
) -> str:
    """The recipe's format, or for "auto" the first of pack-quantized and dense that takes every linear."""
    wanted = [recipe.output.format] if recipe.output.format != "auto" else ["pack-quantized", "dense"]
    reason = ""
    for format_name in wanted:
        if experts and format_name == "pack-quantized":
            reason = f"output.format: {format_name!r} cannot hold this mixture of experts: {DENSE_EXPERTS}"
            continue
        for name, kind in kinds.items():
            if refusal := FORMATS[format_name].refuses(kind, names[name], transposed):
                reason = f"{name}: cannot be stored as {format_name!r}: {refusal}"
                break
        else:
            return format_name
    raise PlanError(f"{reason}; try `output: {{format: dense}}`")


def kept_linears(
    names: Iterable[str], assigned: dict[str, tuple[int, ...]], source: ModelSource, recipe: Recipe, blocks: str
) -> dict[str, str]:
    """Everything with a matrix that stays as it is, and why."""
    kept = {
        name: "keep" if matches(name, recipe.keep) else "no step targets it" for name in names if not assigned[name]
    }
    for name, info in source.tensors.items():
        module = name.removesuffix(".weight")
        if len(info.shape) >= 2 and module not in assigned and name.endswith(".weight"):
            inside = "not a linear" if name.startswith(blocks + ".") else "outside the decoder blocks"
            kept[module] = "keep" if matches(module, recipe.keep) else inside
    check_keep(recipe.keep, [*assigned, *kept, *source.tensors], source)
    return kept


def check_keep(keep: list[str], names: Iterable[str], source: ModelSource) -> None:
    """A glob that matches nothing is a typing error; `lm_head` is there even where it is tied and not stored."""
    names = [*names, "lm_head"]
    for pattern in keep:
        if not any(matches(name, [pattern]) for name in names):
            raise PlanError(f"keep: {pattern!r} matches nothing in {source.name}")


def notes(
    source: ModelSource,
    format_name: str,
    kinds: dict[str, Kind],
    names: dict[str, tuple[int, int]],
    transposed: bool,
    experts: bool,
) -> list[str]:
    """What the user should know before the run."""
    found = []
    fitting = [
        own
        for own, stored in OWN.items()
        if not any(stored.refuses(kind, names[name], transposed) for name, kind in kinds.items())
    ]
    if transposed and format_name == "dense":
        found.append(
            f"{source.config['model_type']} keeps its weights in Conv1D modules, which have no packed form in stock "
            "libraries: the values are written as dense weights, so the result is not smaller"
        )
    elif experts:
        found.append(f"the values are written as dense weights: {DENSE_EXPERTS}")
    elif format_name == "dense":
        smaller = f"; smaller: `output.format` {' or '.join(fitting)}, which llmcompress loads" if fitting else ""
        found.append(f"dense output: the files are as large as before{smaller}")
    return found

"""One decoder block through the steps of a recipe: statistics, scales, methods, packed tensors.

Weights are worked on in float32 and written back in the dtype of the checkpoint once, as the values that the method
chose; so the block that is replayed computes with exactly what the file will hold. Linears that share an input and a
step are stacked, so that one factorization of their Gram matrix serves them all.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmcompress.arch import Architecture, Link, is_transposed, row_factors, rows_of, scale_producer
from llmcompress.errors import LLMCompressError, NumericalError
from llmcompress.mask import Pattern, follows
from llmcompress.methods import IntMethod, Method
from llmcompress.plan import Plan
from llmcompress.proof import digest
from llmcompress.stats import GradientMean, InputGram, Inputs, InputSquares
from llmcompress.stream import Block, InputKind, checkpoint_module, collect_inputs, oriented
from llmcompress.weight import CompressedWeight, relative_error

ZEROS = 0.05  # share of zeros from which they are taken for a mask: weights that were trained dense hold next to none


@dataclass(slots=True)
class BlockResult:
    """What became of a block."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # packed linears, by checkpoint name
    layers: list[dict[str, Any]] = field(default_factory=list)  # rows of results.json
    gone: set[str] = field(default_factory=set)  # tensors of the checkpoint that the block has no more
    digests: dict[str, str] = field(default_factory=dict)  # module path -> sha256 of its values
    notes: list[str] = field(default_factory=list)


class BlockCompressor:
    """Compresses blocks of one model.

    stored: parameter name -> its tensors in the checkpoint; a linear's weight has exactly one.
    gradients: gives the statistics of gradients that a survey has found for a block, [out, in] float32 by linear.
    """

    def __init__(
        self,
        plan: Plan,
        architecture: Architecture,
        stored: dict[str, list[str]],
        gradients: Callable[[Block], dict[str, Tensor]],
    ) -> None:
        self.plan = plan
        self.architecture = architecture
        self.stored = stored
        self.gradients = gradients

    def __call__(self, block: Block) -> BlockResult:
        """Replace the weights of `block` by what the recipe's steps make of them, one step after another."""
        result, steps = BlockResult(), self._steps(block)
        layout = self.architecture.at(block.index)
        inputs, gradients = self._inputs(block, steps), self.gradients(block)
        pruned = self._already_zero(block, steps, result)
        for index, step in enumerate(self.plan.steps):
            mine = {name: methods[index] for name, methods in steps.items() if index in methods}
            scales = self._link_scales(block, step.method, mine, inputs, result) if step.method.rescales else Scales()
            for group in layout.shared:
                for method, members in stacks({name: mine[name] for name in group if name in mine}):
                    statistics = gather(method, members, inputs, gradients)
                    for name, done in self._compress(block, method, members, statistics, scales, pruned).items():
                        if index == max(steps[name]):
                            self._store(block, steps[name], name, done, inputs.get(name), result)
                            pruned.pop(name, None)
                for name in group:
                    if index >= max(steps[name], default=0):
                        inputs.pop(name, None)
        return result

    def _steps(self, block: Block) -> dict[str, dict[int, Method]]:
        """Index of a step -> its method, for every linear of the block."""
        return {
            name: self.plan.methods_of(checkpoint_module(self.stored, block, name))
            for name in self.architecture.at(block.index).linears
        }

    def _already_zero(
        self, block: Block, steps: dict[str, dict[int, Method]], result: BlockResult
    ) -> dict[str, "Pruned"]:
        """Linears that come with zeros, whoever made them: no step may fill these again."""
        found = {}
        for name in steps:
            weight = oriented(block, name)
            zeros = weight.numel() - int(weight.count_nonzero())
            meant = checkpoint_module(self.stored, block, name) in self.plan.source.pruned
            if steps[name] and zeros >= (1 if meant else ZEROS * weight.numel()):
                found[name] = Pruned(weight.clone(), weight != 0)
        if found:
            result.notes.append(
                "weights that were zero before stay zero, in linears that an earlier run has pruned and in those with "
                f"{ZEROS:.0%} of zeros and more"
            )
        return found

    def _inputs(self, block: Block, steps: dict[str, dict[int, Method]]) -> dict[str, Inputs]:
        """What methods need of the inputs of linears; one record for those in a group, if one of them needs it."""
        kinds: dict[tuple[str, ...], InputKind] = {}
        for group in self.architecture.at(block.index).shared:
            needs = {method.needs for name in group for method in steps[name].values()}
            if InputGram in needs:
                kinds[group] = InputGram
            elif InputSquares in needs:
                kinds[group] = InputSquares
        return collect_inputs(block, kinds)

    def _link_scales(
        self, block: Block, method: Method, mine: Collection[str], inputs: dict[str, Inputs], result: BlockResult
    ) -> "Scales":
        """Search the scale of every link whose consumers the method is for, and move it into norms and biases at once.

        The factors on weights are kept aside until a weight is compressed, so that they are applied in float32.
        """
        scales, layout = Scales(), self.architecture.at(block.index)
        for link in layout.links:
            if not any(name in mine for name in link.consumers):
                continue
            if reason := not_scaled(link, mine, layout.linears):
                result.notes.append(
                    f"{block.name}: {link.producer} -> {', '.join(link.consumers)} not scaled: {reason}"
                )
                continue
            weights = [scales.apply(weight_of(block, name), name) for name in link.consumers]
            gram = inputs[link.consumers[0]].gram
            index = link.rows.to(gram.device)
            scale = method.link_scale(weights, gram, index, self.plan.dtype)
            moved = scales.add(block, link, scale)[index]
            gram.div_(moved).div_(moved[:, None])
        linked = {name for link in layout.links for name in link.consumers}
        if without := [name for name in mine if name not in linked]:
            result.notes.append(f"{block.name}: no module can absorb a scale for {', '.join(without)}; only clipped")
        return scales

    def _compress(
        self,
        block: Block,
        method: Method,
        members: list[str],
        statistics: Tensor | None,
        scales: "Scales",
        pruned: dict[str, "Pruned"],
    ) -> dict[str, "Done"]:
        """Run a method on linears that share an input, and set their values; what it made of each."""
        weights = [scales.apply(weight_of(block, name), name) for name in members]
        mask = None
        if any(name in pruned for name in members):
            all_stay = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
            mask = torch.cat([pruned[n].mask if n in pruned else m for n, m in zip(members, all_stay, strict=True)])
        try:
            stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
            whole = method.compress(stacked, statistics, self.plan.dtype, mask)
        except LLMCompressError as exc:
            exc.add_note(f"in {block.name}.{members[0]}")
            raise
        done = {}
        parts = whole.split([len(w) for w in weights])
        for name, weight, compressed in zip(members, weights, parts, strict=True):
            if lost := compressed.lost_zeros():
                raise NumericalError(
                    f"{block.name}.{name}: {type(method).__name__} gave values to {lost} pruned weights; that is an "
                    "error in it: please report it"
                )
            if compressed.mask is not None:
                compressed.values.add_(0.0)  # -0.0 becomes 0.0, as formats that leave zeros out give it back
            before = weight
            if name in pruned:
                before = scales.apply(pruned[name].original.float(), name)
            if compressed.mask is not None:
                original = pruned[name].original if name in pruned else oriented(block, name).clone()
                pruned[name] = Pruned(original, compressed.mask)
            set_values(block, name, compressed)
            done[name] = Done(before, compressed)
        return done

    def _store(
        self,
        block: Block,
        methods: dict[int, Method],
        linear: str,
        done: "Done",
        inputs: Inputs | None,
        result: BlockResult,
    ) -> None:
        """Put the packed tensors and the record of a linear into the result."""
        name, weight, compressed = checkpoint_module(self.stored, block, linear), done.before, done.compressed
        module = block.module.get_submodule(linear)
        try:
            packed = self.plan.format.pack(compressed, is_transposed(module))
        except LLMCompressError as exc:
            exc.add_note(f"in {block.name}.{linear}")
            raise
        result.tensors |= {f"{name}.{leaf}": tensor.cpu() for leaf, tensor in packed.items()}
        result.digests[f"{block.name}.{linear}"] = digest(module.weight)
        method = methods[max(methods)]
        pattern = self.plan.kind_of(name).pattern
        if compressed.mask is not None and (pattern is None or not follows(compressed.mask, pattern)):
            pattern = Pattern("layer")  # zeros that the model came with: a count over the matrix is all there is to say
        grid = method.model_dump(include={"bits", "group_size", "symmetric"}) if isinstance(method, IntMethod) else {}
        weights = compressed.values.numel()
        zeros = weights - int(compressed.values.count_nonzero())
        pruning = {"pattern": str(pattern), "zeros": zeros, "sparsity": zeros / weights} if pattern else {}
        result.layers.append(
            {
                "name": name,
                "block": block.index,
                "method": " + ".join(self.plan.steps[i].name for i in methods),
                **grid,
                **pruning,
                "before_bytes": weight.numel() * self.plan.itemsize,
                "after_bytes": sum(tensor.nbytes for tensor in packed.values()),
                "error": None if inputs is None else relative_error(weight, compressed.values, inputs.gram),
                "weight_error": relative_error(weight, compressed.values),
            }
        )


@dataclass(frozen=True, slots=True)
class Pruned:
    """A linear with weights that must stay zero."""

    original: Tensor  # [out, in] in the dtype of the checkpoint: the weight before the first step
    mask: Tensor  # [out, in] bool


@dataclass(frozen=True, slots=True)
class Done:
    """What a step made of a linear."""

    before: Tensor  # [out, in] float32: the original weight, rescaled where the step rescales
    compressed: CompressedWeight


class Scales:
    """Factors waiting to be applied to linears of one block: columns multiplied, rows divided."""

    def __init__(self) -> None:
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}

    def add(self, block: Block, link: Link, scale: Tensor) -> Tensor:
        """Note the factors of a link, and apply them to what is not a linear's weight: norms and biases.

        Returns the factors that the consumers get. For a norm they are what its weight really changed by, after
        rounding to the dtype of the checkpoint, so that the rounding does not become an error of the layer.
        """
        producer = block.module.get_submodule(link.producer)
        if producer.weight.ndim == 1:
            before, bias = producer.weight.float() + link.offset, getattr(producer, "bias", None)
            old_bias = bias.float() if isinstance(bias, Tensor) else None
            scale_producer(block.module, link, scale)
            after = producer.weight.float() + link.offset
            scale = torch.where((after != 0) & (before != 0), before / after, scale)
            if isinstance(bias, Tensor) and old_bias is not None:
                bias.data.copy_(old_bias / row_factors(link, scale, rows_of(producer)))
        else:
            factor = row_factors(link, scale, rows_of(producer))
            self.rows[link.producer] = factor
            if isinstance(getattr(producer, "bias", None), Tensor):
                producer.bias.data.copy_(producer.bias.float() / factor)
        for name in link.consumers:
            self.columns[name] = scale[link.rows.to(scale.device)]
        return scale

    def apply(self, weight: Tensor, name: str) -> Tensor:
        """weight [out, in] of the linear `name` with its factors, in place."""
        if name in self.columns:
            weight.mul_(self.columns[name])
        if name in self.rows:
            weight.div_(self.rows[name][:, None])
        return weight


def not_scaled(link: Link, mine: Collection[str], linears: Collection[str]) -> str | None:
    """Why a link is left alone: all its linears must be changed by one step; linears: of the block."""
    if any(name not in mine for name in link.consumers):
        return "its consumers are kept, or compressed by different steps"
    if link.producer in linears and link.producer not in mine:
        return f"{link.producer} is kept, or compressed by another step"
    return None


def stacks(methods: dict[str, Method]) -> list[tuple[Method, list[str]]]:
    """Linears that share an input and a method, in the stacks that it takes."""
    found: list[tuple[Method, list[str]]] = []
    for name, method in methods.items():
        fitting = [members for other, members in found if other == method and method.stacks]
        if fitting:
            fitting[0].append(name)
        else:
            found.append((method, [name]))
    return found


def gather(
    method: Method, members: list[str], inputs: dict[str, Inputs], gradients: dict[str, Tensor]
) -> Tensor | None:
    """The statistics that a method needs for stacked linears."""
    if method.needs and issubclass(method.needs, GradientMean):
        return torch.cat([gradients[name] for name in members])
    return inputs[members[0]].needed_by(method.needs) if method.needs else None


def set_values(block: Block, linear: str, compressed: CompressedWeight) -> None:
    """Let a linear compute with the values that a method chose."""
    oriented(block, linear).copy_(compressed.values)


def weight_of(block: Block, linear: str) -> Tensor:
    """A fresh [out, in] float32 copy of a linear's weight."""
    return oriented(block, linear).to(torch.float32, copy=True, memory_format=torch.contiguous_format)

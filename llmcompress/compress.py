"""One decoder block through the steps of a recipe: statistics, scales, methods, packed tensors.

Weights are worked on in float32 and written back in the dtype of the checkpoint once, as the values that the method
chose; so the block that is replayed computes with exactly what the file will hold. Linears that share an input and a
step are stacked, so that one factorization of their Gram matrix serves them all.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmcompress.arch import Architecture, Link, is_transposed, row_factors, rows_of, scale_producer
from llmcompress.errors import LLMCompressError
from llmcompress.methods import IntMethod
from llmcompress.plan import Plan
from llmcompress.proof import digest
from llmcompress.recipe import Step
from llmcompress.stats import InputGram
from llmcompress.stream import Block, collect
from llmcompress.weight import CompressedWeight, relative_error


@dataclass(slots=True)
class BlockResult:
    """What became of a block."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # packed linears, by checkpoint name
    layers: list[dict[str, Any]] = field(default_factory=list)  # rows of results.json
    digests: dict[str, str] = field(default_factory=dict)  # module path -> sha256 of its values
    notes: list[str] = field(default_factory=list)


class BlockCompressor:
    """Compresses blocks of one model.

    stored: parameter name -> its tensors in the checkpoint; a linear's weight has exactly one.
    """

    def __init__(self, plan: Plan, architecture: Architecture, stored: dict[str, list[str]]) -> None:
        self.plan = plan
        self.architecture = architecture
        self.stored = stored

    def __call__(self, block: Block) -> BlockResult:
        """Replace the weights of `block` by what the recipe's steps make of them."""
        result, steps = BlockResult(), self._steps(block)
        needing = [
            group
            for group in self.architecture.shared
            if any(step.method.needs for name in group if (step := steps[name]))
        ]
        grams = collect(block, needing) if needing else {}
        inputs: dict[str, Tensor] = {}
        for group in needing:  # one at a time: a mean is as large as its sum, which goes at once
            inputs |= dict.fromkeys(group, take_mean(grams, group))
        scales = self._link_scales(block, steps, inputs, result)
        for group in self.architecture.shared:
            for step in dict.fromkeys(step for name in group if (step := steps[name])):
                members = [name for name in group if steps[name] == step]
                self._compress(block, step, members, inputs.get(group[0]), scales, result)
            for name in group:
                inputs.pop(name, None)
        return result

    def checkpoint_module(self, block: Block, linear: str) -> str:
        """Name of a linear in the checkpoint."""
        return self.stored[f"{block.name}.{linear}.weight"][0].removesuffix(".weight")

    def _steps(self, block: Block) -> dict[str, Step | None]:
        """The step of every linear of the block."""
        return {name: self.plan.step_of(self.checkpoint_module(block, name)) for name in self.architecture.linears}

    def _link_scales(
        self, block: Block, steps: dict[str, Step | None], inputs: dict[str, Tensor], result: BlockResult
    ) -> "Scales":
        """Search the scale of every link whose consumers ask for one, and move it into norms and biases at once.

        The factors on weights are kept aside until a weight is compressed, so that they are applied in float32.
        """
        scales = Scales()
        for link in self.architecture.links:
            step = next((s for name in link.consumers if (s := steps[name]) and s.method.rescales), None)
            if step is None:
                continue
            if reason := self._not_scaled(link, steps, step):
                result.notes.append(
                    f"{block.name}: {link.producer} -> {', '.join(link.consumers)} not scaled: {reason}"
                )
                continue
            weights = [scales.apply(weight_of(block, name), name) for name in link.consumers]
            gram = inputs[link.consumers[0]]
            index = link.rows.to(gram.device)
            scale = step.method.link_scale(weights, gram, index, self.plan.dtype)
            moved = scales.add(block, link, scale)[index]
            gram.div_(moved).div_(moved[:, None])
        without = [
            name
            for name, step in steps.items()
            if step is not None
            and step.method.rescales
            and not any(name in link.consumers for link in self.architecture.links)
        ]
        if without:
            result.notes.append(f"{block.name}: no module can absorb a scale for {', '.join(without)}; only clipped")
        return scales

    def _not_scaled(self, link: Link, steps: dict[str, Step | None], step: Step) -> str | None:
        """Why a link is left alone: all its linears must be changed by one step."""
        if any(steps[name] != step for name in link.consumers):
            return "its consumers are kept, or compressed by different steps"
        if link.producer in steps and steps[link.producer] != step:
            return f"{link.producer} is kept, or compressed by another step"
        return None

    def _compress(
        self, block: Block, step: Step, members: list[str], gram: Tensor | None, scales: "Scales", result: BlockResult
    ) -> None:
        """Run a step on linears that share an input; set their values and pack them."""
        weights = [scales.apply(weight_of(block, name), name) for name in members]
        try:
            stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
            whole = step.method.compress(stacked, gram if step.method.needs else None, self.plan.dtype)
        except LLMCompressError as exc:
            exc.add_note(f"in {block.name}.{members[0]}")
            raise
        for name, weight, compressed in zip(members, weights, whole.split([len(w) for w in weights]), strict=True):
            self._store(block, step, name, weight, compressed, gram, result)

    def _store(
        self,
        block: Block,
        step: Step,
        linear: str,
        weight: Tensor,
        compressed: CompressedWeight,
        gram: Tensor | None,
        result: BlockResult,
    ) -> None:
        """Put the values into the module, the packed tensors and the record into the result."""
        module, name = block.module.get_submodule(linear), self.checkpoint_module(block, linear)
        transposed = is_transposed(module)
        module.weight.data.copy_(compressed.values.T if transposed else compressed.values)
        packed = self.plan.format.pack(compressed, transposed)
        result.tensors |= {f"{name}.{leaf}": tensor.cpu() for leaf, tensor in packed.items()}
        result.digests[f"{block.name}.{linear}"] = digest(module.weight)
        method = step.method
        grid = method.model_dump(include={"bits", "group_size", "symmetric"}) if isinstance(method, IntMethod) else {}
        result.layers.append(
            {
                "name": name,
                "block": block.index,
                "method": step.name,
                **grid,
                "before_bytes": weight.numel() * self.plan.dtype.itemsize,
                "after_bytes": sum(tensor.nbytes for tensor in packed.values()),
                "error": None if gram is None else relative_error(weight, compressed.values, gram),
                "weight_error": relative_error(weight, compressed.values),
            }
        )


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
            before = producer.weight.float() + link.offset
            scale_producer(block.module, link, scale)
            after = producer.weight.float() + link.offset
            scale = torch.where((after != 0) & (before != 0), before / after, scale)
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


def take_mean(grams: dict[str, InputGram], group: tuple[str, ...]) -> Tensor:
    """The mean of what a group of linears shares; its sum is forgotten."""
    gram = grams[group[0]]
    for name in group:
        del grams[name]
    return gram.mean


def weight_of(block: Block, linear: str) -> Tensor:
    """A fresh [out, in] float32 copy of a linear's weight."""
    module = block.module.get_submodule(linear)
    weight = module.weight.T if is_transposed(module) else module.weight
    return weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)

"""One structure step on a model at hand: scores, selection, compensation, and the files of the smaller model.

    width   walk over the dense model for scores -> how many units of each block stay, and which -> block by block:
            statistics of what the smaller model so far feeds it, compensation, masked units -> what is left of tensors
    depth   the score's own walks -> which blocks stay -> their tensors under new numbers

The stream computes with the masked blocks, which have the old shapes; the folder holds the cut ones. So the proof of
loading is also the proof that cutting changed nothing.
"""

import math
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from llmcompress.arch import is_transposed
from llmcompress.checkpoint import Checkpoint, read_tensors, write_tensors
from llmcompress.compress import ZEROS, BlockResult, weight_of
from llmcompress.depth_plan import without_blocks
from llmcompress.errors import CalibrationError, PlanError
from llmcompress.files import read_json, write_json
from llmcompress.gradients import stream_gradients
from llmcompress.job import Job
from llmcompress.proof import digest
from llmcompress.stats import GradientMoments, InputGram, InputGramMean, InputMoments
from llmcompress.stream import Block, collect, oriented, stream_blocks
from llmcompress.structure import Depth, Sublayer, Width
from llmcompress.structure.compensation import least_squares, mean_bias
from llmcompress.structure.groups import Group, cut, kept_positions, mask_units, zero_units
from llmcompress.structure.scores import Seen
from llmcompress.structure.selection import check_scores, comparable, keep_highest
from llmcompress.structure_budget import StructurePlan, unprotected
from llmcompress.weight import quadratic, relative_error
from llmcompress.width_plan import with_widths


class WidthJob(Job):
    """Every block becomes narrower."""

    plan: StructurePlan

    def compress(self, checkpoint: Checkpoint) -> None:
        """Choose units, then all blocks, then all else."""
        self.kept = self._choose(checkpoint)
        widths = {index: len(units) for index, units in self.kept.items()}
        if widths != self.plan.widths:  # a ranking has decided otherwise than the plan could know
            plan = self.plan
            self.plan = with_widths(plan, plan.step, self.model, self.architecture, plan.groups, widths)
        self._stream_through(checkpoint, self._shrink)

    def _choose(self, checkpoint: Checkpoint) -> dict[int, Tensor]:
        """Block -> units that stay [n] int64, by the scores of the dense model; kept for a run that continues."""
        path = checkpoint.state / "units.safetensors"
        if not path.exists():
            kept = self._used() if self._options.zeros else self._best(checkpoint)
            write_tensors(path, {str(index): units for index, units in kept.items()})
        return {int(index): units for index, units in read_tensors(path).items()}

    def _best(self, checkpoint: Checkpoint) -> dict[int, Tensor]:
        """Block -> units of the highest scores."""
        self.progress.stage(f"scoring {self.plan.step.name}", self.plan.count)
        scores: dict[int, Tensor] = {}
        for done, seen in enumerate(self._seen(checkpoint), 1):
            scores[seen.block] = self._options.score.score(self.plan.groups[seen.block], seen).cpu()
            seen.forget()
            self.progress.advance(done)
        check_scores(list(scores.values()), self.plan.step.where)
        return {index: keep_highest(scores[index], width) for index, width in self._widths(scores).items()}

    def _used(self) -> dict[int, Tensor]:
        """Block -> units that are not zero, and so many others that widths are what they may be."""
        plan, options, kept = self.plan, self._options, {}
        free = unprotected(plan, plan.step)
        for index, group in plan.groups.items():
            block = self.stream.load_block(index, torch.empty(0))
            used = ~zero_units(block.module, group) if index in free else torch.ones(group.units, dtype=torch.bool)
            self.stream.free_block(index)
            steps = max(options.fewest, math.ceil(int(used.sum()) / options.multiple))
            kept[index] = keep_highest(used.float(), min(group.units, steps * options.multiple))
        return kept

    def _widths(self, scores: dict[int, Tensor]) -> dict[int, int]:
        """Units that each block keeps: what the plan says, or what one ranking of all of them decides."""
        plan, score = self.plan, self._options.score
        if plan.ranking is None:
            return plan.widths
        costs = plan.ranking.costs
        most = max(costs.values())  # relative costs leave scores as they are where all are alike
        values = {
            index: comparable(
                scores[index], costs[index] / most, across=score.across_blocks, per_parameter=score.per_parameter
            )
            for index in sorted(costs)
        }
        return plan.widths | plan.ranking.widths(values)

    def _seen(self, checkpoint: Checkpoint) -> Iterator[Seen]:
        """Every block of the dense model that has such units, with what the score's walk gathers."""
        walk, groups = self._options.score.walk, self.plan.groups
        if walk == "weights":
            for index in groups:
                yield self._with(self.stream.load_block(index, torch.empty(0)))
                self.stream.free_block(index)
        elif walk == "inputs":
            for block in stream_blocks(self.stream, self.stream.embed(self.data.tokens)):
                if group := groups.get(block.index):
                    yield self._with(block, inputs=collect(block, {(name,): InputMoments for name in group.linears}))
        else:

            def empty(block: Block) -> dict[str, GradientMoments]:
                linears = groups[block.index].linears if block.index in groups else ()
                return {name: GradientMoments(oriented(block, name).shape, self.plan.device) for name in linears}

            folder = checkpoint.state / "inputs"
            tokens = self.data.tokens[: self._options.score.windows(len(self.data.tokens))]
            for block, found in stream_gradients(self._exact(), tokens, folder, empty):
                if block.index in groups:
                    yield self._with(block, gradients=found)

    def _with(self, block: Block, **found: Any) -> Seen:
        """A block with what was gathered of it."""
        weights = {name: weight_of(block, name) for name in self.plan.groups[block.index].linears}
        return Seen(block.index, weights, **found)

    def _shrink(self, block: Block) -> BlockResult:
        """Compensate and mask a block; the result holds what is left of its tensors."""
        result, group = BlockResult(), self.plan.groups.get(block.index)
        for info in self.plan.result.tensors.values():  # biases that a setting brings to every block, for a mean
            if info.name not in self.source.tensors and info.name.startswith(f"{self.plan.blocks}.{block.index}."):
                result.tensors[info.name] = torch.zeros(info.shape, dtype=self.plan.dtype)
        if group is None:
            return result
        stays = self.kept[block.index]
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[stays] = False
        removed = gone.nonzero().flatten()
        shapes = {name: tuple(value.shape) for name, value in block.module.named_parameters()}
        error = self._compensate(block, group, group.columns[stays].flatten(), result) if len(removed) else None
        mask_units(block.module, group, removed)
        kept = kept_positions(group, removed, shapes)
        for name in dict.fromkeys(member.parameter for member in group.members):
            stored = self.stored[f"{block.name}.{name}"][0]
            left = cut(name, block.module.get_parameter(name).data, kept)
            if left.numel():
                result.tensors[stored] = left.to(self.plan.dtype).contiguous()
            else:
                result.gone.add(stored)
        if result.gone:
            result.notes.append(f"{block.name}: its {group.kind} is gone")
            return result
        for name in group.linears:
            result.layers.append(self._row(block, name, shapes, kept, error if name == group.consumer else None))
            left = cut(f"{name}.weight", block.module.get_parameter(f"{name}.weight").data, kept)
            result.digests[f"{block.name}.{name}"] = digest(left)
        return result

    def _compensate(self, block: Block, group: Group, columns: Tensor, result: BlockResult) -> float | None:
        """Let the kept columns of the consumer make up for the others; its relative output error, if data was seen."""
        name, how = group.consumer, self._options.compensate
        if how == "none":
            return None
        weight = weight_of(block, name)
        if how == "least_squares":
            gram = collect(block, {(name,): InputGram})[name].mean
            self._check_no_zeros(name, block, weight)
            changed = least_squares(weight, gram, columns)
            oriented(block, name).copy_(changed)
            return relative_error(weight, changed, gram)
        found = collect(block, {(name,): InputGramMean})[name]
        changed, gram, mean = torch.zeros_like(weight), found.mean, found.average
        changed[:, columns] = weight[:, columns]
        self._add_bias(block, name, mean_bias(weight, mean, columns), result)
        left = quadratic(changed - weight, gram - torch.outer(mean, mean)).clamp(min=0)
        return float((left / quadratic(weight, gram)).sqrt())

    def _check_no_zeros(self, name: str, block: Block, weight: Tensor) -> None:
        """Raises PlanError for a weight that was pruned, in this run or elsewhere: its zeros are meant to stay."""
        zeros = weight.numel() - int(weight.count_nonzero())
        if zeros >= ZEROS * weight.numel():
            raise PlanError(
                f"{self.plan.step.where}.compensate: {block.name}.{name} has {zeros / weight.numel():.0%} of zeros, "
                "which least_squares would fill; use none, or start from the model before it was pruned"
            )

    def _add_bias(self, block: Block, consumer: str, bias: Tensor, result: BlockResult) -> None:
        """Add a bias [out] to the consumer, also where it had none."""
        linear = block.module.get_submodule(consumer)
        if getattr(linear, "bias", None) is not None:
            linear.bias.data.add_(bias.to(linear.bias.dtype))
            return
        bias = bias.to(self.plan.dtype)
        linear.register_forward_hook(lambda module, inputs, output: output + bias.to(output.device))
        stem = self.stored[f"{block.name}.{consumer}.weight"][0].removesuffix("weight")
        result.tensors[f"{stem}bias"] = bias.cpu().contiguous()

    def _row(
        self, block: Block, name: str, shapes: dict[str, tuple[int, ...]], kept: Any, error: float | None
    ) -> dict[str, Any]:
        """The row of results.json for a linear that became smaller."""
        shape = shapes[f"{name}.weight"]
        left = list(shape)
        for (parameter, dim), positions in kept.items():
            if parameter == f"{name}.weight":
                left[dim] = len(positions)
        if is_transposed(block.module.get_submodule(name)):
            shape, left = shape[::-1], left[::-1]
        item = self.plan.itemsize
        return {
            "name": self.stored[f"{block.name}.{name}.weight"][0].removesuffix(".weight"),
            "block": block.index,
            "method": self.plan.step.name,
            "shape_before": list(shape),
            "shape": list(left),
            "before_bytes": prod(shape) * item,
            "after_bytes": prod(left) * item,
            "error": error,
            "weight_error": None,
        }

    @property
    def _options(self) -> Width | Sublayer:
        options = self.plan.step.options
        assert isinstance(options, Width | Sublayer)
        return options

    def _config(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        return self._dense_config(self.plan.result.config)

    def _check_against_plan(self) -> None:
        """The plan was made from the modules themselves."""


class DepthJob(Job):
    """Some blocks go as a whole."""

    plan: StructurePlan

    @property
    def block_shards(self) -> int:
        """How many blocks the result has."""
        return self.plan.count - self.plan.drop

    def compress(self, checkpoint: Checkpoint) -> None:
        """Choose blocks, then copy the tensors of the others, then all else."""
        dropped, plan = self._choose(checkpoint), self.plan
        self.plan = without_blocks(plan, plan.step, self.model, self.architecture, dropped)
        self.numbers = [i for i in range(self.plan.count) if i not in dropped]
        self.proof_blocks = min(self.proof_blocks, len(self.numbers))
        self._carry_over(checkpoint, self.numbers)
        self._write_rest(checkpoint)

    def _choose(self, checkpoint: Checkpoint) -> list[int]:
        """Which blocks go; kept for a run that continues."""
        path = checkpoint.state / "blocks.json"
        if not path.exists():
            options, steps = self.plan.step.options, self.plan.count
            assert isinstance(options, Depth)
            self.progress.stage("scoring blocks", steps)
            found = options.score.choose(
                self.stream,
                self.data.tokens,
                self.plan.drop,
                unprotected(self.plan, self.plan.step),
                lambda done, total: self.progress.advance(done * steps // total),
            )
            if not all(math.isfinite(score) for score in found.scores.values()):
                raise CalibrationError(
                    f"{self.plan.step.where}: a block's score is NaN or infinite; the model overflows "
                    f"{self.plan.recipe.dtype} on the calibration data, or its weights are damaged"
                )
            write_json(path, {"blocks": found.blocks, "scores": {str(b): s for b, s in found.scores.items()}})
        blocks: list[int] = read_json(path)["blocks"]
        return blocks

    def _config(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        return self._dense_config(self.plan.result.config)

    def _check_against_plan(self) -> None:
        """No linear changes."""

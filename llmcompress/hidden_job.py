"""A step of the hidden dimension on a model at hand: scores, selection, and the files of the narrower model.

    walk over the dense model for scores -> which channels stay -> block by block: what is left of every tensor
    -> the same outside the blocks

The stream computes with the full model, in which the removed channels are zero and norms are as they were; the folder
holds what was cut out and rescaled. So the proof of loading is also the proof that cutting changed nothing.
"""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from llmcompress.checkpoint import Checkpoint, read_tensors, write_tensors
from llmcompress.errors import CalibrationError
from llmcompress.hidden_plan import HiddenPlan
from llmcompress.job import Job
from llmcompress.stats import InputSizes
from llmcompress.stream import collect, stream_blocks
from llmcompress.structure import Hidden
from llmcompress.structure.scores import Stream
from llmcompress.structure.selection import keep_highest


class HiddenJob(Job):
    """The residual stream becomes narrower."""

    plan: HiddenPlan
    kept: Tensor | None = None  # channels that stay [n] int64, once they are chosen

    def compress(self, checkpoint: Checkpoint) -> None:
        """Choose channels, then cut them out of all blocks, then of all else."""
        self.kept = self._choose(checkpoint)
        self._carry_over(checkpoint, list(range(self.plan.count)))
        self._write_rest(checkpoint)

    def _choose(self, checkpoint: Checkpoint) -> Tensor:
        """Which channels stay, by the scores of the dense model; kept for a run that continues."""
        path = checkpoint.state / "channels.safetensors"
        if not path.exists():
            options = self.plan.step.options
            assert isinstance(options, Hidden)
            self.progress.stage("scoring hidden", self.plan.count)
            score = options.score.score(Stream(self.plan.residual.width, self._slices, self._inputs))
            if not bool(score.isfinite().all()):
                raise CalibrationError(
                    f"{self.plan.step.where}: the score of a channel is NaN or infinite; the weights or the "
                    "calibration data are damaged"
                )
            write_tensors(path, {"kept": keep_highest(score, self.plan.channels), "score": score})
        return read_tensors(path)["kept"]

    def _slices(self) -> Iterator[Tensor]:
        """Pieces [width, n] of every parameter that has the channels, block by block, then those outside."""
        for index in range(self.plan.count):
            block = self.stream.load_block(index, torch.empty(0))
            for name, value in block.module.named_parameters():
                yield from self.plan.residual.slices(f"{block.name}.{name}", value)
            self.stream.free_block(index)
            self.progress.advance(index + 1)
        for name, _ in self.model.named_parameters():
            if not name.startswith(self.architecture.blocks + "."):
                yield from self.plan.residual.slices(name, self._read([name])[name])

    def _inputs(self) -> Iterator[Tensor]:
        """Mean sizes [width] of what the linears of each block read of the stream, once for each norm."""
        for block in stream_blocks(self.stream, self.stream.embed(self.data.tokens)):
            readers = [
                group for group in self.architecture.at(block.index).shared if self._reads(block.index, group[0])
            ]
            for total in collect(block, {(names[0],): InputSizes for names in readers}).values():
                yield total.mean
            self.progress.advance(block.index + 1)

    def _reads(self, index: int, linear: str) -> bool:
        """Whether the stream is the input of a linear."""
        dim = self.plan.residual.dims.get(f"{self.architecture.block(index)}.{linear}.weight")
        return dim == (0 if self.architecture.at(index).linears[linear].transposed else 1)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by their names in the model, with zeros for the channels that go."""
        tensors = super()._read(names)
        if self.kept is None:
            return tensors
        gone = torch.ones(self.plan.residual.width, dtype=torch.bool)
        gone[self.kept] = False
        return {n: self.plan.residual.masked(n, t, gone.nonzero().flatten()) for n, t in tensors.items()}

    def _left(self, parameter: str, value: Tensor) -> Tensor:
        assert self.kept is not None
        return self.plan.residual.cut(parameter, value, self.kept)

    def _as_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What is left of tensors of the checkpoint, under the same names."""
        parameters = {found[0]: name for name, found in self.stored.items()}
        tensors = {}
        for name in names:
            tensors[name] = self._left(parameters.get(name, name), super()._as_stored([name])[name])
        return tensors

    def _rows(self, index: int) -> Iterator[dict[str, Any]]:
        """The rows of results.json for the linears of a block."""
        width, item = self.plan.residual.width, self.plan.itemsize
        for linear, found in self.architecture.at(index).linears.items():
            name = f"{self.architecture.block(index)}.{linear}.weight"
            if name not in self.plan.residual.dims:
                continue
            before = [found.out_features, found.in_features]
            after = before.copy()
            after[1 if self._reads(index, linear) else 0] = self.plan.channels
            yield {
                "name": self.stored[name][0].removesuffix(".weight"),
                "block": index,
                "method": self.plan.step.name,
                "shape_before": before,
                "shape": after,
                "before_bytes": prod(before) * item,
                "after_bytes": prod(before) * self.plan.channels // width * item,
                "error": None,
                "weight_error": None,
            }

    def _config(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        return self._dense_config(self.plan.result.config)

    def _check_against_plan(self) -> None:
        """The plan was made from the modules themselves."""

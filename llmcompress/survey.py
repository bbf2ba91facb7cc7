"""The survey: what a run must know of the dense model before its first block is compressed.

Three walks over the blocks of the dense model, of which a recipe's steps ask for none, one or more (`Method.survey`):

    weights     nothing but the weights               rank all scores of a data-free method
    inputs      forward, statistics of the inputs     OWL's shares of outliers; rank all scores of wanda, sparsegpt, ...
    gradients   forward and back (`gradients.py`)     keep the statistics of snip and taylor; rank their scores

What they find is kept beside the finished blocks: sparsities in survey.json, which is written last, and statistics of
gradients in one file per block. A run that is killed in a survey begins it anew.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.arch import Architecture
from llmcompress.budget import global_counts, owl_sparsities, score_histogram
from llmcompress.checkpoint import read_tensors, write_tensors
from llmcompress.errors import NumericalError
from llmcompress.files import read_json, write_json
from llmcompress.gradients import stream_gradients
from llmcompress.mask import kept
from llmcompress.methods import Budgeted
from llmcompress.plan import Plan, PlannedLinear
from llmcompress.progress import Progress
from llmcompress.stats import GradientMean, InputGram, Inputs, InputSquares
from llmcompress.stream import Block, StreamedModel, checkpoint_module, collect_inputs, oriented, stream_blocks

Found = Mapping[str, Inputs | Tensor]  # of some linears of a block, by name below it; tensors are gradients


class Survey:
    """The walks that a plan asks for.

    stored: parameter name -> its tensors in the checkpoint.  folder: where what is found is kept.
    """

    def __init__(self, plan: Plan, architecture: Architecture, stored: dict[str, list[str]], folder: Path) -> None:
        self.plan = plan
        self.architecture = architecture
        self.stored = stored
        self.folder = folder
        self.methods = {linear.name: linear.methods for linear in plan.linears}

    def run(
        self, dense: StreamedModel, exact: Callable[[], StreamedModel], tokens: Tensor, progress: Progress
    ) -> dict[str, float]:
        """The sparsity of every linear whose share of a budget depends on the model.

        dense: a stream of the model as it is.  exact: makes one in float32, for gradients.  tokens: [samples, length].
        What an earlier run into the same folder has found is used again.
        """
        path = self.folder / "survey.json"
        if self.plan.survey and not read_json(path):
            sparsities: dict[str, float] = {}
            for walk in self.plan.survey:
                progress.stage(f"surveying {walk}", self.plan.count)
                judges = self._judges(walk)
                for count, (block, found) in enumerate(self._blocks(walk, judges, dense, exact, tokens), 1):
                    self._show(block, found, judges)
                    progress.advance(count, block.name)
                for judge in judges:
                    sparsities |= judge.sparsities()
            write_json(path, {"sparsity": sparsities})
        return dict(read_json(path)["sparsity"]) if self.plan.survey else {}

    def gradients(self, block: Block) -> dict[str, Tensor]:
        """Statistics of gradients that were found for a block's linears, [out, in] float32, by name below it."""
        path = self._gradient_file(block)
        return read_tensors(path) if path.exists() else {}

    def _judges(self, walk: str) -> list["Ranking | Outliers"]:
        """Who looks at this walk: one for every step with such a budget."""
        judges: list[Ranking | Outliers] = []
        for i, step in enumerate(self.plan.steps):
            method = step.method
            if isinstance(method, Budgeted) and method.budget == "global" and walk == ranked_in(method):
                judges.append(Ranking(method, self.plan.budgeted(i)))
            if isinstance(method, Budgeted) and method.budget == "owl" and walk == "inputs":
                judges.append(Outliers(method, self.plan.budgeted(i)))
        return judges

    def _show(self, block: Block, found: Found, judges: list["Ranking | Outliers"]) -> None:
        """Show the linears of a block to the judges of their steps."""
        for name in self.architecture.at(block.index).linears:
            module = self._module(block, name)
            for judge in judges:
                if module in judge.linears:
                    judge.see(module, oriented(block, name), found.get(name))

    def _blocks(
        self,
        walk: str,
        judges: list["Ranking | Outliers"],
        dense: StreamedModel,
        exact: Callable[[], StreamedModel],
        tokens: Tensor,
    ) -> Iterator[tuple[Block, Found]]:
        """Every block of the dense model with the statistics of this walk, for the linears that are judged."""
        if walk == "weights":
            for index in range(self.architecture.count):
                yield dense.load_block(index, torch.empty(0)), {}
                dense.free_block(index)
        elif walk == "inputs":
            judged = {name for judge in judges for name in judge.linears}
            whole = any(isinstance(judge, Ranking) and judge.method.needs is InputGram for judge in judges)
            for block in stream_blocks(dense, dense.embed(tokens)):
                layout = self.architecture.at(block.index)
                names = {name for name in layout.linears if self._module(block, name) in judged}
                groups = [group for group in layout.shared if names & set(group)]
                yield block, collect_inputs(block, dict.fromkeys(groups, InputGram if whole else InputSquares))
        else:
            for block, sums in stream_gradients(exact(), tokens, self.folder / "inputs", self._accumulators):
                means = {name: total.mean for name, total in sums.items()}
                sums.clear()
                write_tensors(self._gradient_file(block), means)
                yield block, means
                means.clear()  # whoever went over this block still has them, and the next one needs the room

    def _accumulators(self, block: Block) -> dict[str, GradientMean]:
        """What gathers the gradients of the linears whose methods need them."""
        found = {}
        for name in self.architecture.at(block.index).linears:
            for method in self.methods.get(self._module(block, name), ()):
                if method.needs and issubclass(method.needs, GradientMean):
                    weight = oriented(block, name)
                    found[name] = method.needs(weight.shape, weight.device)
        return found

    def _module(self, block: Block, linear: str) -> str:
        return checkpoint_module(self.stored, block, linear)

    def _gradient_file(self, block: Block) -> Path:
        return self.folder / f"gradients-{block.index:05d}.safetensors"


class Ranking:
    """The budget `global`: how many of the highest scores of all are in each matrix."""

    def __init__(self, method: Budgeted, linears: list[PlannedLinear]) -> None:
        self.method = method
        self.linears = {linear.name: linear for linear in linears}
        self.histograms: dict[str, Tensor] = {}

    def see(self, name: str, weight: Tensor, found: Inputs | Tensor | None) -> None:
        """Count the scores of weight [out, in]."""
        if isinstance(found, Inputs):
            found = found.needed_by(self.method.needs) if self.method.needs else None
        score = self.method.score(weight.float(), found)
        if bool(score.isnan().any()):
            raise NumericalError(f"{name}: a score is NaN; the weights or the statistics are damaged")
        self.histograms[name] = score_histogram(score).to("cpu", torch.int32)

    def sparsities(self) -> dict[str, float]:
        """Of every matrix."""
        sizes = {name: prod(linear.shape) for name, linear in self.linears.items()}
        counts = global_counts(self.histograms, kept(sum(sizes.values()), self.method.share))
        return {name: 1 - counts[name] / sizes[name] for name in sizes}


class Outliers:
    """The budget `owl`: what share of a block's scores |W_ij| ||x_j|| stands out."""

    def __init__(self, method: Budgeted, linears: list[PlannedLinear]) -> None:
        self.method = method
        self.linears = {linear.name: linear for linear in linears}
        self.seen: list[tuple[Tensor, Tensor]] = []  # weights of the block, and the norms of their inputs
        self.shares: dict[int, float] = {}

    def see(self, name: str, weight: Tensor, found: Inputs | Tensor | None) -> None:
        """Note weight [out, in] and the norms of its inputs; the last of a block gives the block's share."""
        assert isinstance(found, Inputs)
        block = self.linears[name].block
        self.seen.append((weight, found.squares.sqrt()))
        if len(self.seen) == sum(linear.block == block for linear in self.linears.values()):
            total = sum(weight.numel() for weight, _ in self.seen)
            mean = sum(float((weight.abs() * norm).sum()) for weight, norm in self.seen) / total
            limit = self.method.outlier_factor * mean
            self.shares[block] = sum(int((w.abs() * norm > limit).sum()) for w, norm in self.seen) / total
            self.seen.clear()

    def sparsities(self) -> dict[str, float]:
        """Of every matrix: that of its block."""
        sizes = dict.fromkeys(self.shares, 0)
        for linear in self.linears.values():
            sizes[linear.block] += prod(linear.shape)
        blocks = owl_sparsities(self.shares, sizes, self.method.share, self.method.outlier_range)
        return {name: blocks[linear.block] for name, linear in self.linears.items()}


def ranked_in(method: Budgeted) -> str:
    """The walk that has what the method's score needs."""
    return next(walk for walk in ("gradients", "inputs", "weights") if walk in method.survey)

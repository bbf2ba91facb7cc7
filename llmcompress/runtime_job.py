"""A run-time step on a model at hand: thresholds, found block by block, and the files of the model as they are.

    block by block: histograms of what comes into each linear -> levels, by runs of the block on a few windows ->
    thresholds; then the block runs with them, so that the next one sees what it will see at run time

That last point goes beyond the paper, which takes all histograms from the dense model. What was found of a block is
written before the next one is begun, so a run that continues only computes the finished ones. The folder holds the
weights of the source, and its proof is that of the dense model, as stock engines compute it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.arch import Module
from llmcompress.at_runtime.allocation import greedy, uniform
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CalibrationError
from llmcompress.files import MANIFEST, read_json, write_json
from llmcompress.histogram import InputHistogram
from llmcompress.job import Job
from llmcompress.packed_source import PackedSource
from llmcompress.runtime_plan import RuntimePlan
from llmcompress.stream import Block, batches, checkpoint_module, in_features, stream_blocks
from llmcompress.teal import masked
from llmcompress.thresholds import Threshold, Thresholds, thresholds_of, write_thresholds

FOUND = "thresholds.json"  # in the state: what was found of finished blocks


class RuntimeJob(Job):
    """A model gets thresholds."""

    plan: RuntimePlan

    def compress(self, checkpoint: Checkpoint) -> None:
        """Find thresholds, then copy the model."""
        found = thresholds_of(checkpoint.partial)
        if found is None:
            found = self._find(checkpoint.state / FOUND)
            write_thresholds(checkpoint.partial, found)
        self.thresholds = found
        self._carry_over(checkpoint, list(range(self.plan.count)))
        self._write_rest(checkpoint)

    def _find(self, path: Path) -> Thresholds:
        """Of all blocks, one after another; path: where those of finished blocks are kept for a run that continues."""
        options, tokens = self.plan.options, self.data.tokens
        self.progress.stage(f"thresholds: {self.plan.step.name}", self.plan.count)
        hidden = self.stream.embed(tokens)
        if options.allocation == "greedy":
            self.stream.prepare(tokens[: options.search_samples])  # what blocks are called with for that many
        finished: dict[str, Any] = read_json(path)  # block -> linear -> its threshold
        modules: dict[str, Threshold] = {}
        sizes: dict[str, int] = {}
        with ExitStack() as hooks:
            for block in stream_blocks(self.stream, hidden):
                names = [name for name in self.architecture.at(block.index).linears if self._sparse(block, name)]
                sizes |= {f"{block.name}.{n}": block.module.get_submodule(n).weight.numel() for n in names}
                masks = self._watched(block, names, hooks)
                if block.name not in finished:
                    found = self._find_in(block, names, masks)
                    finished[block.name] = {name: asdict(each) for name, each in found.items()}
                    write_json(path, finished)
                here = {name: Threshold(**each) for name, each in finished[block.name].items()}
                masks.thresholds = {name: each.threshold for name, each in here.items()}
                modules |= {f"{block.name}.{name}": each for name, each in here.items()}
                self.progress.advance(block.index + 1, block.name)
        share = sum(each.sparsity * sizes[name] for name, each in modules.items()) / max(1, sum(sizes.values()))
        return Thresholds(share, options.dense_tokens, modules)

    def _watched(self, block: Block, names: list[str], hooks: ExitStack) -> "InputMasks":
        """What masks the linears of a block until `hooks` are left; nothing so far."""
        masks = InputMasks(self.plan.options.dense_tokens, block.hidden.shape[1])
        for name in names:
            hooks.callback(masks.watch(block.module, name).remove)
        return masks

    def _find_in(self, block: Block, names: list[str], masks: "InputMasks") -> dict[str, Threshold]:
        """Of the linears of one block, by their names in it."""
        options = self.plan.options
        shared = [[n for n in group if n in names] for group in self.architecture.at(block.index).shared]
        histograms = self._histograms(block, [group for group in shared if group], masks)
        if not names or options.sparsity == 0:
            return {}
        sizes = {name: block.module.get_submodule(name).weight.numel() for name in names}
        if options.allocation == "uniform":
            levels = uniform(sizes, options.sparsity)
        else:
            error = block_error(block, masks, histograms, options.search_samples)
            levels = greedy(sizes, options.sparsity, options.step, error)
        thresholds = {n: histograms[n].threshold(level) for n, level in levels.items() if level > 0}
        return {
            name: Threshold(threshold, histograms[name].share(threshold), in_features(block.module.get_submodule(name)))
            for name, threshold in thresholds.items()
        }

    def _histograms(self, block: Block, groups: list[list[str]], masks: "InputMasks") -> dict[str, InputHistogram]:
        """Of the inputs of each linear, dense tokens left aside; one for all that share an input."""
        found: dict[str, InputHistogram] = {}
        for group in groups:
            found |= dict.fromkeys(group, InputHistogram(self.plan.device))
        masks.histograms = {group[0]: found[group[0]] for group in groups}
        try:
            for rows in block.batches():
                block.forward(rows)
        except CalibrationError as exc:
            exc.add_note(f"in {block.name}")
            raise
        finally:
            masks.histograms = {}
        return found

    def _sparse(self, block: Block, linear: str) -> bool:
        return self.plan.sparse(checkpoint_module(self.stored, block, linear))

    def _as_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the source's files; packed ones as they are."""
        if isinstance(self.source, PackedSource):
            return self.source.stored(part for name in names for part in self.source.parts(name))
        return super()._as_stored(names)

    def _rows(self, index: int) -> Iterator[dict[str, Any]]:
        """Rows of results.json for the linears of a block: those of the quantizing stage, or with what they keep."""
        assert self.source.folder is not None
        name = self.architecture.block(index)
        found = {}
        for linear in self.architecture.at(index).linears:
            stored = self.stored[f"{name}.{linear}.weight"][0].removesuffix(".weight")
            if each := self.thresholds.modules.get(f"{name}.{linear}"):
                found[stored] = {"threshold": each.threshold, "input_sparsity": each.sparsity}
        if self._packed:
            for row in read_json(self.source.folder / MANIFEST).get("layers", []):
                if row["block"] == index:
                    more = found.pop(row["name"], None)
                    yield row if more is None else row | more | {"method": f"{row['method']} + {self.plan.step.name}"}
        for planned in self.plan.linears:
            pruned = planned.name in self.source.pruned and not self._packed
            if planned.block == index and (planned.name in found or pruned):
                yield (
                    {
                        "name": planned.name,
                        "block": index,
                        "method": self.plan.step.name,
                        "before_bytes": planned.before_bytes,
                        "after_bytes": planned.after_bytes,
                        "error": None,
                        "weight_error": None,
                    }
                    | (self._zeros(planned.name) if pruned else {})
                    | found.get(planned.name, {})
                )

    def _zeros(self, linear: str) -> dict[str, Any]:
        """What a row says of zeros that an earlier step has made."""
        weight = self._as_stored([f"{linear}.weight"])[f"{linear}.weight"]
        zeros = weight.numel() - int(weight.count_nonzero())
        return {"pattern": self.source.pruned[linear][0], "zeros": zeros, "sparsity": zeros / weight.numel()}

    @property
    def _packed(self) -> bool:
        return isinstance(self.source, PackedSource)

    def _config(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        if self._packed:
            assert self.source.folder is not None
            return read_json(self.source.folder / "config.json")
        return self._dense_config(self.source.config)

    def _check_against_plan(self) -> None:
        """No weight changes."""


class InputMasks:
    """Hooks on the linears of a block that count their inputs, and mask them where there is a threshold."""

    def __init__(self, dense_tokens: int, length: int) -> None:
        self.dense_tokens, self.length = dense_tokens, length
        self.histograms: Mapping[str, InputHistogram] = {}
        self.thresholds: Mapping[str, float] = {}

    def watch(self, block: Module, name: str) -> Any:
        """Put a hook on a linear; returns its handle."""

        def hook(module: Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x: Tensor = args[0]
            windows = x.reshape(-1, self.length, x.shape[-1])  # some models join windows before a linear
            if histogram := self.histograms.get(name):
                histogram.update(windows[:, self.dense_tokens :])
            if (threshold := self.thresholds.get(name)) is None:
                return None
            sparse = torch.arange(self.length, device=x.device) >= self.dense_tokens
            return (masked(x, threshold, sparse.expand(len(windows), -1)), *args[1:])

        return block.get_submodule(name).register_forward_pre_hook(hook)


def block_error(
    block: Block, masks: InputMasks, histograms: Mapping[str, InputHistogram], samples: int
) -> Callable[[Mapping[str, float]], float]:
    """A function from levels to the squared error of the block's output, relative to the output.

    On the first `samples` windows, dense tokens left aside.
    """

    def outputs() -> Tensor:
        parts = [block.forward(rows) for rows in batches(samples, block.hidden.shape[1])]
        return torch.cat(parts)[:, masks.dense_tokens :].float()

    exact = outputs()
    scale = float(exact.square().sum())

    def error(levels: Mapping[str, float]) -> float:
        masks.thresholds = {n: histograms[n].threshold(level) for n, level in levels.items() if level > 0}
        return float((outputs() - exact).square().sum()) / scale

    return error

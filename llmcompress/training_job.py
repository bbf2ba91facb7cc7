"""One train step on a model at hand: the teacher's lessons, the loop, and the files of what was learned.

The model is in memory as a whole, in float32; the dense model that teaches it goes through the stream before, block by
block. Weights that are zero because a step has pruned them stay zero.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.arch import first, match_names
from llmcompress.calibrate import load_calibration, tokens_sha256
from llmcompress.checkpoint import Checkpoint, read_tensors, write_tensors
from llmcompress.compress import ZEROS
from llmcompress.errors import PlanError
from llmcompress.files import write_json
from llmcompress.job import Data, Job, build_for, data_from, tensors_by_parameter
from llmcompress.recipe import matches
from llmcompress.results import version
from llmcompress.stream import StreamedModel, assign
from llmcompress.training import Recover
from llmcompress.training.loop import Task, drawn_rows, share_of_batch, train
from llmcompress.training.losses import cross_entropy, distillation, hidden_error
from llmcompress.training.processes import launched, tell_others, training_together
from llmcompress.training.teacher import Lessons
from llmcompress.training_plan import TrainPlan


class TrainJob(Job):
    """A model learns."""

    plan: TrainPlan

    def compress(self, checkpoint: Checkpoint) -> None:
        """Learn, then write all blocks and all else."""
        path = checkpoint.state / "trained.safetensors"
        if not path.exists():
            model, student = self._learn(checkpoint)
            model = student.merge_and_unload() if self._options.parameters == "lora" else model
            learned = {name: p.detach().to(self.plan.dtype).cpu() for name, p in model.named_parameters()}
            write_tensors(path, learned)
            shutil.rmtree(checkpoint.state / "lessons", ignore_errors=True)
        self.learned = read_tensors(path)
        self._carry_over(checkpoint, list(range(self.plan.count)))
        self._write_rest(checkpoint)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters as they were learned."""
        return {name: self.learned[name] for name in names}

    def _as_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the checkpoint, those that are parameters as they were learned."""
        parameter = self._parameters_stored
        names = list(names)
        learned = {name: self.learned[parameter[name]] for name in names if name in parameter}
        return learned | super()._as_stored([name for name in names if name not in parameter])

    @cached_property
    def _parameters_stored(self) -> dict[str, str]:
        """Tensor of the checkpoint -> parameter; a tied head that is stored once more is the table it is tied to."""
        first_name = {id(p): name for name, p in reversed(list(self.model.named_parameters()))}
        found = {tensors[0]: name for name, tensors in self.stored.items()}
        for alias, p in self.model.named_parameters(remove_duplicate=False):
            if alias in self.source.tensors:
                found.setdefault(alias, first_name[id(p)])
        return found

    def _learn(self, checkpoint: Checkpoint) -> tuple[Any, Any]:
        """The trained model in float32, and the same as what was trained: with LoRA, wrapped by peft."""
        options, state = self._options, checkpoint.state
        share_of_batch(options, launched())  # before the teacher is asked, and by the first process alone
        model, student, task = self._prepare(state)
        if options.has_teacher:
            windows = self.text.tokens
            rows = drawn_rows(len(windows), options)
            self.progress.stage("asking the dense model", len(rows))
            lessons = Lessons(options, state / "lessons")
            lessons.write(self._teacher(), windows, rows, lambda done, total: self.progress.advance(done))
        tell_others({"where": self.plan.step.where, "source": str(self.source.folder), "state": str(state)})
        self.progress.stage(f"training: {self.plan.step.name}", options.steps)
        with training_together():
            curve = train(student, options, task, state, self.progress.advance)
        record: dict[str, Any] = {"name": self.plan.step.name, "loss": options.loss, "losses": curve.losses}
        record |= {"tokens": curve.tokens, "seconds": curve.seconds, "data": self.text.record}
        write_json(state / "curve.json", record)
        return model, student

    def join(self, state: Path) -> None:
        """Take part in the training of another process, which writes everything; state: its folder."""
        _, student, task = self._prepare(state)
        train(student, self._options, task, state, lambda done, shown: None)

    def _prepare(self, state: Path) -> tuple[Any, Any, Task]:
        """The model, the same with what is trained requiring gradients, and what it learns."""
        options = self._options
        model, _ = build_for(self.plan, torch.float32)
        load_all(model, self.source, self.stored)
        masks = self._masks(model)
        loss = RecoverLoss(options, self.text.tokens, Lessons(options, state / "lessons"))
        windows, length = self.text.tokens.shape
        task = Task(windows, length, loss, masks, cpu=self.plan.device.type == "cpu")
        return model, prepared(model, options, self.plan.recipe.keep), task

    @property
    def _options(self) -> Recover:
        options = self.plan.step.options
        assert isinstance(options, Recover)
        return options

    def fingerprint(self) -> str:
        """Also of the text that is learned from, of the teacher, and of how sums are shared out over processes."""
        parts = [super().fingerprint(), tokens_sha256(self.text.tokens), self.shared.origin.source.fingerprint]
        parts += [str(launched()), *(version(name) or "" for name in ("accelerate", "peft"))]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @cached_property
    def text(self) -> Data:
        """What is learned from, and where it is from."""
        own = self.plan.step.options.data
        return self.data if own is None else data_from(load_calibration(own, self.shared.tokenizer))

    def _teacher(self) -> StreamedModel:
        """A stream of the model that the run began with."""
        source = self.shared.origin.source
        model, architecture = build_for(self.plan, source=source)
        stored = match_names(model, source.tensors)
        dtype, device = self.plan.dtype, self.plan.device
        read = tensors_by_parameter(model, source, stored, dtype)
        return StreamedModel(model, architecture, read, dtype=dtype, device=device)

    def _masks(self, model: Any) -> dict[str, Tensor]:
        """Where pruned weights are zero: in what an earlier step has pruned, and in what comes with many zeros."""
        masks = {}
        for name, p in model.named_parameters():
            module = self.stored[name][0].removesuffix(".weight")
            zeros = p.numel() - int(p.count_nonzero())
            if p.ndim == 2 and zeros and (module in self.source.pruned or zeros >= ZEROS * p.numel()):
                masks[name] = p != 0
        if self._options.parameters == "lora":
            inside = [name for name in masks if name.startswith(self.architecture.blocks + ".")]
            if inside:
                raise PlanError(
                    f"{inside[0]}: holds many zeros, which LoRA would fill when it is merged; set `parameters: all`, "
                    "which keeps them"
                )
            return {}
        return {name: mask for name, mask in masks.items() if not kept(name, self.plan.recipe.keep)}

    def _rows(self, index: int) -> Iterator[dict[str, Any]]:
        """Rows of results.json for the linears of a block that an earlier step has pruned."""
        for linear in self.plan.linears:
            if linear.block == index and linear.name in self.source.pruned:
                weight = self._as_stored([f"{linear.name}.weight"])[f"{linear.name}.weight"]
                zeros = weight.numel() - int(weight.count_nonzero())
                yield {
                    "name": linear.name,
                    "block": index,
                    "method": self.plan.step.name,
                    "pattern": self.source.pruned[linear.name][0],
                    "zeros": zeros,
                    "sparsity": zeros / weight.numel(),
                    "before_bytes": linear.before_bytes,
                    "after_bytes": linear.after_bytes,
                    "error": None,
                    "weight_error": None,
                }

    def _config(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        return self._dense_config(self.source.config)

    def _check_against_plan(self) -> None:
        """Every parameter is trained."""


class RecoverLoss:
    """The weighted sum of a recipe's losses on some windows."""

    def __init__(self, options: Recover, windows: Tensor, lessons: Lessons) -> None:
        self.options, self.windows, self.lessons = options, windows, lessons

    def __call__(self, model: Any, rows: Tensor) -> Tensor:
        """For windows [n] int64, with its graph."""
        tokens, weights = self.windows[rows].to(next(model.parameters()).device), self.options.loss
        seen: list[Tensor] = []
        wanted = "hidden" in weights
        hook = last_block(model).register_forward_hook(lambda m, a, o: seen.append(first(o))) if wanted else None
        try:
            logits = model(tokens, use_cache=False).logits
        finally:
            if hook:
                hook.remove()
        total = torch.zeros((), device=logits.device)
        if "cross_entropy" in weights:
            total = total + weights["cross_entropy"] * cross_entropy(logits, tokens)
        if self.options.has_teacher:
            taught = self.lessons.read(rows, logits.device)
            if "distillation" in weights:
                total = total + weights["distillation"] * distillation(logits, taught, self.options.temperature)
            if "hidden" in weights:
                total = total + weights["hidden"] * hidden_error(seen[-1], taught)
        return total


def last_block(model: Any) -> nn.Module:
    """The last decoder block, however the model is wrapped."""
    from llmcompress.arch import find_blocks

    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    blocks: Any = find_blocks(inner)[1]
    return blocks[-1]


def kept(parameter: str, keep: list[str]) -> bool:
    """Whether a parameter is left alone on purpose."""
    return matches(parameter.rpartition(".")[0], keep)


def prepared(model: Any, options: Recover, keep: list[str]) -> Any:
    """The model with what is to be trained requiring gradients; keep: globs on modules that stay as they are."""
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(options.parameters == "all" and not kept(name, keep))
    if options.compile:
        compile_blocks(model, all_but_last="hidden" in options.loss)
    if options.parameters == "all":
        return model
    from peft import LoraConfig, get_peft_model

    from llmcompress.arch import block_linears, find_blocks

    path, blocks = find_blocks(model)
    linears = {f"{path}.{i}.{name}": x for i in range(len(blocks)) for name, x in block_linears(blocks[i]).items()}
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=0.0,
        target_modules=[name for name in linears if not matches(name, keep)],
        fan_in_fan_out=any(linear.transposed for linear in linears.values()),
    )
    torch.manual_seed(options.seed)
    return get_peft_model(model, config)


def compile_blocks(model: Any, *, all_but_last: bool) -> None:
    """Compile every block by itself: all are alike, so it takes as long as one.

    all_but_last: hidden states are read behind the last block by a hook, for which it would be compiled at each step.
    """
    from llmcompress.arch import find_blocks

    blocks: Any = find_blocks(model)[1]
    for block in blocks[: len(blocks) - all_but_last]:
        block.compile(dynamic=False)


def load_all(model: Any, source: Any, stored: dict[str, list[str]]) -> None:
    """Give a skeleton all its weights in float32."""
    read = tensors_by_parameter(model, source, stored, torch.float32)
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        assign(model, name, read([name])[name])
    model.tie_weights()

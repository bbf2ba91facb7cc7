"""One train step on a model at hand: the teacher's lessons, the loop, and the files of what was learned.

The model is in memory as a whole, in float32; the dense model that teaches it goes through the stream before, block by
block. Weights that are zero because a step has pruned them stay zero.
"""

import shutil
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress import cost
from llmcompress.arch import first, match_names
from llmcompress.checkpoint import Checkpoint, read_tensors, write_tensors
from llmcompress.compress import ZEROS
from llmcompress.files import write_json
from llmcompress.job import Job, build_for, tensors_by_parameter
from llmcompress.proof import digest
from llmcompress.results import peak_bytes
from llmcompress.stream import StreamedModel, assign
from llmcompress.training import Recover
from llmcompress.training.loop import Curve, Task, train
from llmcompress.training.losses import cross_entropy, distillation, hidden_error
from llmcompress.training.teacher import Lessons
from llmcompress.training_plan import TrainPlan


class TrainJob(Job):
    """A model learns."""

    plan: TrainPlan

    def compress(self, checkpoint: Checkpoint) -> None:
        """Learn, then write all blocks and all else."""
        path = checkpoint.state / "trained.safetensors"
        if not path.exists():
            learned = self._learn(checkpoint)
            write_tensors(path, learned)
            shutil.rmtree(checkpoint.state / "lessons", ignore_errors=True)
        self.learned = read_tensors(path)
        self._write_blocks(checkpoint, list(range(self.plan.count)))
        self._write_rest(checkpoint)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters as they were learned."""
        return {name: self.learned[name] for name in names}

    def _as_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the checkpoint, those that are parameters as they were learned."""
        parameter = {found[0]: name for name, found in self.stored.items()}
        names = list(names)
        learned = {name: self.learned[parameter[name]] for name in names if name in parameter}
        return learned | super()._as_stored([name for name in names if name not in parameter])

    def _learn(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """All parameters after training, in the dtype of the result."""
        options = self.plan.step.options
        assert isinstance(options, Recover)
        windows = self._windows()
        lessons = Lessons(options, checkpoint.state / "lessons")
        if options.has_teacher:
            self.progress.stage("asking the dense model", len(windows))
            lessons.write(self._teacher(), windows, lambda done, total: self.progress.advance(done))
        model, _ = build_for(self.plan, torch.float32)
        load_all(model, self.source, self.stored)
        masks = self._masks(model)
        student = prepared(model, options)
        self.progress.stage(f"training: {self.plan.step.name}", options.steps)
        task = Task(len(windows), windows.shape[1], RecoverLoss(options, windows, lessons), masks)
        curve = train(student, options, task, checkpoint.state, self.progress.advance)
        write_json(checkpoint.state / "curve.json", curve_record(self.plan.step.name, options, curve))
        if options.parameters == "lora":
            model = student.merge_and_unload()
        return {name: p.detach().to(self.plan.dtype).cpu() for name, p in model.named_parameters()}

    def _windows(self) -> Tensor:
        """What is learned from, [n, length] int64."""
        from llmcompress.calibrate import load_calibration

        own = self.plan.step.options.data
        return self.data.tokens if own is None else load_calibration(own, self.shared.tokenizer).tokens

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
        return masks

    def _write_blocks(self, checkpoint: Checkpoint, numbers: list[int]) -> None:
        """Shards of all blocks as they were learned, and what the proof needs."""
        hidden = self.stream.embed(self.data.tokens[: cost.PROOF_SAMPLES])
        for index in numbers:
            start = time.monotonic()
            block = self.stream.load_block(index, hidden)
            for rows in block.batches():
                hidden[rows] = block.forward(rows).to(hidden.device)
            digests = {
                f"{block.name}.{linear}": digest(block.module.get_submodule(linear).weight)
                for linear in self.architecture.linears
            }
            self.stream.free_block(index)
            checkpoint.write_shard(index, self._as_stored([info.name for info in self.plan.tensors_of(index)]))
            if index == self.proof_blocks - 1:
                write_tensors(checkpoint.state / "proof.safetensors", {"hidden": hidden.clone()})
            record = {"layers": [], "notes": [], "digests": digests, "seconds": time.monotonic() - start}
            checkpoint.finish_block(index, hidden, record | {"peak_bytes": peak_bytes()})

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
        hook = last_block(model).register_forward_hook(lambda m, a, o: seen.append(first(o)))
        try:
            logits = model(tokens, use_cache=False).logits
        finally:
            hook.remove()
        total = torch.zeros((), device=logits.device)
        if "cross_entropy" in weights:
            total = total + weights["cross_entropy"] * cross_entropy(logits, tokens)
        if self.options.has_teacher:
            taught = self.lessons.read(rows)
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


def prepared(model: Any, options: Recover) -> Any:
    """The model with what is to be trained requiring gradients."""
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.requires_grad_(options.parameters == "all")
    if options.parameters == "all":
        return model
    from peft import LoraConfig, get_peft_model

    from llmcompress.arch import block_linears, find_blocks

    path, blocks = find_blocks(model)
    names = [f"{path}.{i}.{name}" for i in range(len(blocks)) for name in block_linears(blocks[i])]
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=0.0, target_modules=names)
    torch.manual_seed(options.seed)
    return get_peft_model(model, config)


def load_all(model: Any, source: Any, stored: dict[str, list[str]]) -> None:
    """Give a skeleton all its weights in float32."""
    read = tensors_by_parameter(model, source, stored, torch.float32)
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        assign(model, name, read([name])[name])
    model.tie_weights()


def curve_record(name: str, options: Recover, curve: Curve) -> dict[str, Any]:
    """The loss curve for results.json."""
    return {
        "name": name,
        "loss": options.loss,
        "losses": curve.losses,
        "tokens": curve.tokens,
        "seconds": curve.seconds,
    }

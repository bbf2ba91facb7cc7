"""One train step on a model at hand: the teacher's lessons, the loop, and the files of what was learned.

The model is in memory as a whole, in float32; the dense model that teaches it goes through the stream before, block by
block. Weights that are zero because a step has pruned them stay zero. A technique may begin with random weights, prunes
the linears of the blocks that are not kept, and leaves zeros that later steps keep.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.arch import match_names
from llmcompress.building import build_random
from llmcompress.calibrate import load_calibration, tokens_sha256
from llmcompress.checkpoint import Checkpoint, read_tensors, write_tensors
from llmcompress.compress import ZEROS
from llmcompress.errors import LLMCompressError, PlanError
from llmcompress.files import write_json
from llmcompress.job import Data, Job, build_for, data_from, tensors_by_parameter
from llmcompress.recipe import matches
from llmcompress.results import version
from llmcompress.source import open_source
from llmcompress.stream import StreamedModel, assign
from llmcompress.training import Recover, Train
from llmcompress.training.deepspeed import SWITCH
from llmcompress.training.loop import Task, drawn_rows, share_of_batch, train
from llmcompress.training.objective import TextLoss
from llmcompress.training.processes import launched, switched_on, tell_others, training_together
from llmcompress.training.sharding import refuse_sharing
from llmcompress.training.teacher import Lessons
from llmcompress.training_plan import TrainPlan
from llmcompress.weight import CompressedWeight


class TrainJob(Job):
    """A model learns."""

    plan: TrainPlan

    def compress(self, checkpoint: Checkpoint) -> None:
        """Learn, then write all blocks and all else."""
        path = checkpoint.state / "trained.safetensors"
        if not path.exists():
            model, student = self._learn(checkpoint)
            model = student.merge_and_unload() if self._options.lora else model
            learned = {name: p.detach().to(self.plan.dtype).cpu() for name, p in model.named_parameters()}
            write_tensors(path, learned)
            shutil.rmtree(checkpoint.state / "lessons", ignore_errors=True)
        self.learned = read_tensors(path)
        for name in self._packed_parameters():
            self.learned[name].add_(0.0)  # -0.0 becomes 0.0, as formats that leave zeros out give it back
        self._carry_over(checkpoint, list(range(self.plan.count)))
        self._write_rest(checkpoint)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters as they were learned."""
        return {name: self.learned[name] for name in names}

    def _as_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the result, those that are parameters as they were learned, in the format of the plan."""
        stored: dict[str, Tensor] = {}
        for name, value in self._as_learned(names).items():
            stored |= self._packed(name, value)
        return stored

    def _packed(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Stored tensors of one of the checkpoint: the weight of a pruned linear packed, all else as it is."""
        module = name.removesuffix(".weight")
        if self.plan.format_name == "dense" or name != f"{module}.weight" or module not in self.plan.kinds:
            return {name: value}
        try:
            parts = self.plan.format.pack(CompressedWeight(value), self.plan.transposed)
        except LLMCompressError as exc:
            exc.add_note(f"in {module}")
            raise
        return {f"{module}.{leaf}": part for leaf, part in parts.items()}

    def _packed_parameters(self) -> list[str]:
        """Parameters that `_packed` packs."""
        kinds = {} if self.plan.format_name == "dense" else self.plan.kinds
        return [name for name, found in self.stored.items() if found[0].removesuffix(".weight") in kinds]

    def _as_learned(self, names: Iterable[str]) -> dict[str, Tensor]:
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
        if self.plan.targets:
            refuse_sharing(self.plan.step.name)
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
        record |= task.technique.record() if task.technique else {}
        write_json(state / "curve.json", record)
        return model, student

    def join(self, state: Path) -> None:
        """Take part in the training of another process, which writes everything; state: its folder."""
        _, student, task = self._prepare(state)
        train(student, self._options, task, state, lambda done, shown: None)

    def _prepare(self, state: Path) -> tuple[Any, Any, Task]:
        """The model, the same with what is trained requiring gradients, and what it learns."""
        options = self._options
        if options.begins_anew:
            model = build_random(self.source, options.seed)
        else:
            model, _ = build_for(self.plan, torch.float32)
            load_all(model, self.source, self.stored)
        masks = {} if options.begins_anew else self._masks(model)
        loss = TextLoss(options, self.text.tokens, Lessons(options, state / "lessons"))
        windows, length = self.text.tokens.shape
        cpu = self.plan.device.type == "cpu"
        task = Task(windows, length, loss, masks, cpu, options.technique(), self._targets(), self._given())
        return model, prepared(model, options, self.plan.recipe.keep), task

    def _targets(self) -> tuple[str, ...]:
        """Names of the parameters that the technique prunes."""
        modules = {linear.name for linear in self.plan.targets}
        return tuple(name for name, found in self.stored.items() if found[0].removesuffix(".weight") in modules)

    def _given(self) -> dict[str, Tensor]:
        """Masks of these out of another model, if the step names one."""
        if self._options.mask_source is None:
            return {}
        tensor = {name: self.stored[name][0] for name in self._targets()}
        values = open_source(self._options.mask_source).fetch().load(tensor.values(), dtype=torch.float32)
        return {name: values[tensor[name]] != 0 for name in tensor}

    @property
    def _options(self) -> Train:
        return self.plan.step.options

    def fingerprint(self) -> str:
        """Also of the text that is learned from, of the teacher, and of how sums are shared out over processes."""
        parts = [super().fingerprint(), tokens_sha256(self.text.tokens), self.shared.origin.source.fingerprint]
        libraries = ("accelerate", "peft", "deepspeed") if switched_on(SWITCH) else ("accelerate", "peft")
        parts += [str(launched()), *(version(name) or "" for name in libraries)]
        parts += [open_source(self._options.mask_source).fingerprint] if self._options.mask_source is not None else []
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
        if self._options.lora:
            inside = [name for name in masks if name.startswith(self.architecture.blocks + ".")]
            if inside:
                raise PlanError(
                    f"{inside[0]}: holds many zeros, which LoRA would fill when it is merged; set `parameters: all`, "
                    "which keeps them"
                )
            return {}
        if self._options.leaves and (full := [name for name in self._targets() if name in masks]):
            raise PlanError(
                f"{full[0]}: holds many zeros already, which {self.plan.step.name} would choose anew; `train: dense` "
                "keeps them"
            )
        return {name: mask for name, mask in masks.items() if not kept(name, self.plan.recipe.keep)}

    def _rows(self, index: int) -> Iterator[dict[str, Any]]:
        """Rows of results.json for the linears of a block that this step or an earlier one has pruned."""
        pruned = self.plan.result.pruned
        for linear in self.plan.linears:
            if linear.block == index and linear.name in pruned:
                key = f"{linear.name}.weight"
                weight = self._as_learned([key])[key]
                zeros = weight.numel() - int(weight.count_nonzero())
                yield {
                    "name": linear.name,
                    "block": index,
                    "method": self.plan.step.name,
                    "pattern": pruned[linear.name][0],
                    "zeros": zeros,
                    "sparsity": zeros / weight.numel(),
                    "before_bytes": linear.before_bytes,
                    "after_bytes": sum(part.nbytes for part in self._packed(key, weight).values()),
                    "error": None,
                    "weight_error": None,
                }

    def _config(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        return self._dense_config(self.source.config) | self._quantization(set(self.plan.kinds))

    def _check_against_plan(self) -> None:
        """Every parameter is trained."""


def kept(parameter: str, keep: list[str]) -> bool:
    """Whether a parameter is left alone on purpose."""
    return matches(parameter.rpartition(".")[0], keep)


def prepared(model: Any, options: Train, keep: list[str]) -> Any:
    """The model with what is to be trained requiring gradients; keep: globs on modules that stay as they are."""
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not options.lora and not kept(name, keep))
    if options.compile:
        compile_blocks(model, all_but_last="hidden" in options.loss)
    if not isinstance(options, Recover) or not options.lora:
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

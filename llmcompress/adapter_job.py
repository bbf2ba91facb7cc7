"""LoRA on a quantized model: trained on its unpacked values, kept in a folder beside its files, which stay as they are.

The base is in memory in float32 with exactly the values that its codes stand for, and frozen. What the reloaded model
must reproduce is computed here without peft: block by block, from the unpacked weights and the adapter's file.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from llmcompress.adapter import CONFIG, FOLDER, WEIGHTS, parameter_name
from llmcompress.adapter_plan import AdapterPlan
from llmcompress.checkpoint import Checkpoint, read_tensors
from llmcompress.files import MANIFEST, read_json, replacing, write_json
from llmcompress.job import Job
from llmcompress.packed_source import PackedSource
from llmcompress.training import Recover
from llmcompress.training_job import TrainJob


class AdapterJob(TrainJob):
    """A quantized model learns beside its weights."""

    plan: AdapterPlan
    source: PackedSource

    def compress(self, checkpoint: Checkpoint) -> None:
        """Learn, then copy the quantized model, whose linears add what was learned while it is proved."""
        weights = checkpoint.partial / FOLDER / WEIGHTS
        if not weights.exists():
            _, student = self._learn(checkpoint)
            self._save(student, checkpoint)
            shutil.rmtree(checkpoint.state / "lessons", ignore_errors=True)
        self.adapter = read_tensors(weights)
        self._add_updates()
        self._carry_over(checkpoint, list(range(self.plan.count)))
        self._write_rest(checkpoint)

    def _save(self, student: Any, checkpoint: Checkpoint) -> None:
        """The adapter in peft's own form, in the recipe's dtype; its weights come last."""
        raw, folder = checkpoint.state / FOLDER, checkpoint.partial / FOLDER
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.plan.dtype)
        student.save_pretrained(str(raw), safe_serialization=True, save_embedding_layers=False)
        config = read_json(raw / CONFIG)
        publish = self.shared.origin.recipe.publish
        # Peft notes the path it has read the base from, which nobody else has, and the linears in any order.
        config |= {"base_model_name_or_path": publish.repo_id if publish else None}
        config |= {"target_modules": sorted(config["target_modules"])}
        write_json(folder / CONFIG, config)
        with replacing(folder / WEIGHTS) as temporary:
            shutil.copyfile(raw / WEIGHTS, temporary)
        shutil.rmtree(raw)

    def _add_updates(self) -> None:
        """Let every linear of the stream add (alpha / rank) B A x to its output."""
        options = self._options
        assert isinstance(options, Recover)
        for index in range(self.plan.count):
            for linear in self.architecture.at(index).linears:
                module = f"{self.architecture.block(index)}.{linear}"
                pair = [self.adapter.get(parameter_name(module, matrix)) for matrix in ("lora_A", "lora_B")]
                if pair[0] is not None and pair[1] is not None:
                    hook = added(pair[0], pair[1], options.alpha / options.rank)
                    self.model.get_submodule(module).register_forward_hook(hook)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters of the quantized model, unpacked."""
        return Job._read(self, names)

    def _as_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the quantized model's files, as they are."""
        return self.source.stored(part for name in names for part in self.source.parts(name))

    def _masks(self, model: Any) -> dict[str, Tensor]:
        """None are needed: weights are frozen."""
        return {}

    def _rows(self, index: int) -> Iterator[dict[str, Any]]:
        """Rows of results.json as the quantizing stage has written them."""
        assert self.source.folder is not None
        for row in read_json(self.source.folder / MANIFEST).get("layers", []):
            if row["block"] == index:
                yield row

    def _config(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """That of the quantized model."""
        assert self.source.folder is not None
        return read_json(self.source.folder / "config.json")


def added(a: Tensor, b: Tensor, scale: float) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook for a linear, with LoRA's a [rank, in] and b [out, rank]; it computes in float32."""

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].float()
        update = x @ a.to(x.device).float().T @ b.to(x.device).float().T
        return (output.float() + scale * update).to(output.dtype)

    return hook

"""The result of a quantizing stage, to start from: dense names, shapes and values, and packed tensors in its files.

A plan only needs names and shapes, so such a source exists before its folder does; `opened` then gives it the folder.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import SourceError
from llmcompress.formats import OWN
from llmcompress.plan import Plan
from llmcompress.recipe import quantize
from llmcompress.safetensors_file import TensorInfo, read_tensors
from llmcompress.source import ModelSource, open_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PackedSource(ModelSource):
    """A quantized model; `load` unpacks, to the very values that its methods chose."""

    plan: Plan = field(kw_only=True, repr=False)  # of the stage that makes it
    files: dict[str, TensorInfo] = field(default_factory=dict, repr=False)  # by stored name; empty before it is made

    def parts(self, name: str) -> list[str]:
        """Stored tensors that hold the tensor `name`: itself, or what its format makes of it."""
        if name in self.files:
            return [name]
        module, marked = name.removesuffix(".weight"), self.plan.format.suffix
        if f"{module}.{marked}" not in self.files:
            raise SourceError(f"{self.folder}: neither {name} nor {module}.{marked} is in its files; they are damaged")
        return [stored for stored in self.files if stored.startswith(f"{module}.weight")]

    def stored(self, names: Iterable[str]) -> dict[str, "Tensor"]:
        """Stored tensors, by their names in the files, as they are."""
        assert self.folder is not None
        folder, found = self.folder, dict[str, "Tensor"]()
        for name in names:
            found |= read_tensors(folder / self.files[name].file, [name], None, "cpu")
        return found

    def load(self, names: Iterable[str], *, dtype: "torch.dtype", device: Any = "cpu") -> dict[str, "Tensor"]:
        """As of any source; packed tensors are unpacked."""
        wanted = list(names)
        found = super().load([name for name in wanted if self.parts(name) == [name]], dtype=dtype, device=device)
        for name in wanted:
            if name not in found:
                found[name] = self._unpacked(name).to(device=device, dtype=dtype)
        return found

    def _unpacked(self, name: str) -> "Tensor":
        """The weight [out, in] of a packed linear, in the dtype of its scales."""
        from llmcompress.inspection import scheme_of  # it needs torch, which a plan does without

        module = name.removesuffix(".weight")
        tensors = {part.removeprefix(f"{module}."): t for part, t in self.stored(self.parts(name)).items()}
        scheme = None if self.plan.format_name in OWN else scheme_of(module, self.config)
        return self.plan.format.unpack(tensors, scheme, transposed=False)


def result_after(plan: Plan) -> ModelSource:
    """The model that a plan leaves; where it quantizes, with its grids kept."""
    left = plan.result
    if not quantize(plan.steps):
        return left
    values = {f.name: getattr(left, f.name) for f in fields(ModelSource)}
    return PackedSource(**values, plan=plan)


def opened(planned: ModelSource, folder: Path) -> ModelSource:
    """The folder of the stage that was to make `planned`."""
    if not isinstance(planned, PackedSource):
        return open_folder(str(folder), folder)
    made = open_folder(str(folder), folder, quantized=True)
    tensors = {name: made.tensors.get(name, info) for name, info in planned.tensors.items()}
    changes = {key: getattr(made, key) for key in ("fingerprint", "config", "folder", "local", "pruned")}
    return replace(planned, **changes, gguf=None, tensors=tensors, files=made.tensors)

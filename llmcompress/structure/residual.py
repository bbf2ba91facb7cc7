"""The hidden dimension: channel i of the residual stream, in every parameter that has it.

Channel i is column i of the embedding and of the output head, entry i of every norm over the stream, an input column
of each linear that reads it and an output row of each that writes it. Which dimension of which parameter that is, the
model itself tells: built once more with another hidden size and all else as it was, the dimensions that changed are
those of the stream. So it does not matter where another size happens to be the same number.

    masked    channel i is zero in every parameter, so the stream is zero there
    removed   channel i is cut out, what `rescaling.py` says is multiplied, and config.json says so
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from llmcompress.arch import Heads, Module
from llmcompress.errors import PlanError
from llmcompress.structure.rescaling import Rescaling, dimensions, plain_name
from llmcompress.structure.reshape import REFUSED, edited, stock_model

PIECE = 4096  # positions of a parameter that are looked at together: less than a vocabulary in float32


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual stream of a model: where its channels are, and what must be multiplied when some go."""

    width: int
    dims: Mapping[str, int]  # parameter -> its dimension that is the stream's
    blocks: str  # module path of the decoder blocks
    rescaling: Rescaling

    def parameters_per_channel(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Parameters that go with one channel, of those in `shapes`."""
        return sum(prod(shapes[name]) // shapes[name][dim] for name, dim in self.dims.items() if name in shapes)

    def masked(self, name: str, tensor: Tensor, gone: Tensor) -> Tensor:
        """The parameter with zeros for the channels gone [n] int64, in place."""
        if name not in self.dims:
            return tensor
        return tensor.index_fill_(self.dims[name], gone.to(tensor.device), 0)

    def cut(self, name: str, tensor: Tensor, kept: Tensor) -> Tensor:
        """What the smaller model has of a parameter, in the dtype of `tensor`; kept: [n] int64, in order."""
        if name not in self.dims:
            return tensor
        left = tensor.index_select(self.dims[name], kept.to(tensor.device))
        return self.rescaling.applied(plain_name(name, self.blocks), left, self.width / len(kept))

    def slices(self, name: str, tensor: Tensor) -> Iterator[Tensor]:
        """The parameter in pieces [width, n] float32, one row for each channel."""
        if name in self.dims:
            table = tensor.movedim(self.dims[name], 0).reshape(self.width, -1)
            yield from (piece.float() for piece in table.split(PIECE, dim=1))

    def config(self, config: Mapping[str, Any], model: Module, kept: int) -> dict[str, Any]:
        """config.json of the smaller model; model: the one that `config` describes."""
        changes = with_width(model, kept)
        if key := self.rescaling.eps:
            changes[key] = getattr(model.config, key) * self.width / kept
        return edited(config, model, changes)


def find_residual(config: Mapping[str, Any], model: Module, blocks: str, kept: int, rescaling: Rescaling) -> Residual:
    """The stream of `model`, a skeleton of `config`; kept: another hidden size that its stock code takes."""
    smaller = build_narrower(edited(config, model, with_width(model, kept)), model)
    found = Residual(model.config.hidden_size, dimensions(model, smaller), blocks, rescaling)
    unknown = [name for name in found.dims if plain_name(name, blocks) not in rescaling.powers]
    if unknown:
        raise PlanError(
            f"{type(model).__name__}: {unknown[0]} follows the hidden size, and a small copy of the model has no such "
            "parameter; use mlp_channel or block"
        )
    return found


def grain(config: Mapping[str, Any], model: Module) -> int:
    """What hidden sizes must be a multiple of, as stock code of many architectures wants it: 1, or the query heads."""
    odd = model.config.hidden_size - 1
    try:
        build_narrower(edited(config, model, with_width(model, odd)), model)
    except PlanError:
        return Heads.of(model.config).query
    return 1


def with_width(model: Module, kept: int) -> dict[str, Any]:
    """What changes in the config with the hidden size: heads keep their size, which many would derive from it."""
    return {"hidden_size": kept, "head_dim": Heads.of(model.config).size}


def build_narrower(config: Mapping[str, Any], model: Module) -> Module:
    """The skeleton for an edited config, whatever its shapes. Raises PlanError if stock code refuses it."""
    return stock_model(config, type(model).__name__, REFUSED)

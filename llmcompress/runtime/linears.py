"""Linears whose weight is not a dense matrix: as the file has it, or in the layout of a kernel."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.formats import OWN
from llmcompress.runtime.operators import Operator, Shape, Weight

logger = logging.getLogger(__name__)


class CompressedLinear(nn.Module):
    """A linear [out, in]; `dense` makes its weight, and `stored` the tensors that a file has for it."""

    def __init__(self, shape: Shape, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = bias

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.out_features, self.in_features

    def stored(self) -> dict[str, Tensor]:
        """The tensors of its file, by their names below the module."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight [out, in] in the dtype of the file."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], with the weight unpacked for this one call."""
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompressedLinear":
        """Packed tensors go where the model goes, but keep their dtype: rounded scales would be another weight."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if tensor is self.bias or result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self


class StoredLinear(CompressedLinear):
    """A linear in one of our own formats, with the tensors of the file as its parameters; none can be trained.

    Every call unpacks it: small in memory, and no faster.
    """

    def __init__(self, linear: nn.Linear, format_name: str, dtype: torch.dtype) -> None:
        """dtype: of the file's floats; the model computes in that of the linear, which may be another one."""
        super().__init__((linear.out_features, linear.in_features), linear.bias)
        self.format_name, self.stored_in, self.computes_in = format_name, dtype, linear.weight.dtype
        for name, tensor in OWN[format_name].placeholders(self.shape, dtype).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def stored(self) -> dict[str, Tensor]:
        """The parameters."""
        return {name: parameter.data for name, parameter in self.named_parameters() if name != "bias"}

    def dense(self) -> Tensor:
        """The weight. The tensors were checked when they were loaded."""
        return OWN[self.format_name].values(self.stored())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredLinear":
        """As of all; the model's dtype is what it turns other weights into."""
        self.computes_in = fn(torch.empty(0, dtype=self.computes_in)).dtype
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format_name}"


class PackedLinear(CompressedLinear):
    """A linear that multiplies with its packed weight, by an operator of llmcompress_kernels.

    The weight is in the layout of the operator, as buffers; a state dict has the tensors of the file again, exactly.
    An input of another dtype than the weight's floats is multiplied with the unpacked weight: right, slow, and said
    once in the log. It comes about where a loaded model is turned into another dtype, or runs under autocast; a model
    that is loaded in another dtype is not packed at all.
    """

    def __init__(self, operator: Operator, weight: Weight, shape: Shape, bias: nn.Parameter | None) -> None:
        super().__init__(shape, bias)
        self.operator = operator
        for name, tensor in zip(operator.weight._fields, weight, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def packed(self) -> Weight:
        """The weight as the operator takes it; not kept, since hooks that move models put other tensors in place."""
        return self.operator.weight(*(self._buffers[name] for name in self.operator.weight._fields))

    @property
    def floats(self) -> torch.dtype:
        """The dtype of the weight's floats, and of inputs that the operator takes."""
        tensor = self._buffers[self.operator.floats]
        assert tensor is not None
        return tensor.dtype

    def takes(self, x: Tensor) -> bool:
        """Whether the operator multiplies with this input."""
        return x.dtype == self.floats

    def product(self, x: Tensor) -> Tensor:
        """x [..., in], which the operator takes -> [..., out]."""
        return self.operator.compute(x, self.packed(), self.bias)

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the file, made anew."""
        return self.operator.stored(self.packed(), self.shape)

    def dense(self) -> Tensor:
        """The weight, bit for bit what unpacking the file gives."""
        return self.operator.dense(self.packed(), self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.takes(x):
            return self.product(x)
        if not torch.compiler.is_compiling():  # which cannot write to a log
            say_unpacked(self.operator.name, self.floats, x.dtype)
        return super().forward(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """As of all; says once if the model leaves the dtype that the operator computes in."""
        changed = fn(getattr(self, self.operator.floats)[:0]).dtype
        if changed != self.floats:
            say_unpacked(self.operator.name, self.floats, changed)
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: tensor for name, tensor in self.stored().items()}

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, operator={self.operator.name}"


@functools.cache
def say_unpacked(operator: str, packed: torch.dtype, found: torch.dtype) -> None:
    """One line for all linears of a process."""
    logger.warning(
        "%s computes in %s, the dtype of the packed weights; in %s they are unpacked at each call: load the folder "
        "with that dtype instead",
        operator,
        packed,
        found,
    )


def compressed_linears(model: nn.Module) -> Iterator[tuple[str, CompressedLinear]]:
    """Every linear of ours, by its name."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            yield name, module


def unpack_linears(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Ordinary linears with the same values in place of ours, one after the other."""
    for name in [name for name, _ in compressed_linears(model)]:
        packed = model.get_submodule(name)
        assert isinstance(packed, CompressedLinear)
        weight = packed.dense()
        model.set_submodule(name, plain_linear(weight if dtype is None else weight.to(dtype), packed.bias))


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An ordinary linear of a weight [out, in]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]  # declared as a tensor, and None in every linear without one
    return linear

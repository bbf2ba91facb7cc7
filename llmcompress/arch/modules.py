"""The modules of a model that everything else is about: its decoder blocks and the linears in them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmcompress.errors import PlanError

Module = Any  # an nn.Module; what attributes a model has, no type checker can know


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix multiplication of a block."""

    out_features: int
    in_features: int
    transposed: bool  # the module keeps [in, out] (transformers' Conv1D)


def find_blocks(model: Module) -> tuple[str, Module]:
    """The ModuleList of decoder blocks and its path: the one whose length is num_hidden_layers."""
    count = model.config.num_hidden_layers
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise PlanError(
            f"{type(model).__name__}: no list of {count} decoder blocks found (num_hidden_layers is {count}); "
            "encoder-decoder models and models with unlike stacks are not supported"
        )
    return min(found, key=lambda item: item[0].count("."))  # the outermost: experts may be as many as layers


def block_linears(block: Module) -> dict[str, Linear]:
    """Every linear of a block, by its name below it."""
    from transformers.pytorch_utils import Conv1D

    linears = {}
    for name, module in block.named_modules():
        if isinstance(module, Conv1D):
            linears[name] = Linear(module.weight.shape[1], module.weight.shape[0], transposed=True)
        elif isinstance(module, nn.Linear):
            linears[name] = Linear(module.out_features, module.in_features, transposed=False)
    return linears


def rows_of(module: Module) -> int:
    """Output features of a norm or linear."""
    return int(module.weight.shape[1] if is_transposed(module) else module.weight.shape[0])


def is_transposed(module: Module) -> bool:
    """Whether the module keeps its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def first(output: Any) -> Tensor:
    """The hidden states of what a block returned: a tensor, or a tuple that starts with one."""
    return output if isinstance(output, Tensor) else output[0]


def address(tensor: Tensor) -> int:
    """Where the data are; equal for views of one tensor that is still alive."""
    return tensor.untyped_storage().data_ptr()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence advice that is about training or generation and not about what happens here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

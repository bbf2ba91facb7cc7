"""What operators refuse, before anything runs: operator, argument, what was found, what is expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16)
DEVICES = ("cuda", "cpu", "meta")


def refuse_unless(holds: bool, operator: str, argument: str, found: object, expected: str) -> None:
    """Raises ValueError unless `holds`."""
    if not holds:
        raise ValueError(f"{operator}: {argument} is {found}, expected {expected}")


def check_dtype(operator: str, argument: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raises ValueError if the dtype is none of those given."""
    refuse_unless(tensor.dtype in dtypes, operator, argument, tensor.dtype, " or ".join(map(str, dtypes)))


def check_shape(operator: str, argument: str, tensor: Tensor, *shape: int) -> None:
    """Raises ValueError if the shape is another one."""
    refuse_unless(tuple(tensor.shape) == shape, operator, argument, list(tensor.shape), str(list(shape)))


def check_place(operator: str, x: Tensor, others: Sequence[tuple[str, Tensor | None]]) -> None:
    """Raises ValueError if x is on a device without a kernel, or another tensor elsewhere or not contiguous."""
    refuse_unless(x.device.type in DEVICES, operator, "x", f"on {x.device}", f"a tensor on {' or '.join(DEVICES)}")
    for argument, tensor in others:
        if tensor is not None:
            refuse_unless(tensor.device == x.device, operator, argument, f"on {tensor.device}", f"on {x.device} as x")
            refuse_unless(
                tensor.is_contiguous(), operator, argument, f"strided {list(tensor.stride())}", "a contiguous tensor"
            )

"""What operators refuse, before anything runs: operator, argument, what was found, what is expected."""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16)
DEVICES = ("cuda", "cpu", "meta")
CAPABILITY = (8, 0)  # of an NVIDIA GPU at least: before it there are neither bfloat16 nor asynchronous copies


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


def check_gpu(operator: str, x: Tensor) -> None:
    """Raises ValueError if the kernels do not run on the GPU of x."""
    lacking = unsupported(x.device)
    if lacking is not None:
        refuse_unless(False, operator, "x", *lacking)


@functools.cache
def unsupported(device: torch.device) -> tuple[str, str] | None:
    """What is found on a GPU, or installed for it, that the kernels do not run with, and what they expect instead."""
    if torch.version.hip is not None:
        return "on a GPU of ROCm", "an NVIDIA GPU"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        expected = ".".join(map(str, CAPABILITY))
        return f"on a GPU of compute capability {found[0]}.{found[1]}", f"{expected} or more"
    if importlib.util.find_spec("triton") is None:
        return "on a GPU, and triton is not installed", "triton 3.7 or newer beside torch"
    return None
